"""Continuous batching: dialogues share the rows of a few sessions, and a finished row is refilled at once.

A dialogue is a Python generator (`Script`) that yields the turns it needs and receives what was generated. An
answer has the same bits whatever shares its batch: a prompt is computed alone in a session of one row, the
decoding programs always have the same number of rows, and the size of a cache depends on the dialogue alone.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Generator as Coroutine
from concurrent.futures import Executor, Future, wait
from typing import Any, Protocol, TypeVar

import numpy as np

from vilam3_jax.inference.generate import Chunk, Decoded, Generator, Session, cache_size
from vilam3_jax.inference.sampling import GREEDY, Sampling

_BURST = 32  # tokens decoded between two looks at the queue
_STREAMED = 4  # the same if somebody is reading along
_POLL = 0.05  # seconds that `step` waits for calls if there is nothing to decode

T = TypeVar("T")


class Constraint(Protocol):
    """What a turn may consist of; see `constraints`."""

    def allowed(self) -> np.ndarray:
        """Bool [V], tokens that may follow; never empty."""
        ...

    def advance(self, token: int) -> None:
        """Takes the next token."""
        ...


@dataclasses.dataclass(frozen=True)
class Turn:
    """A chunk to read and how to answer it.

    Attributes:
      chunk: the next part of the dialogue.
      max_new_tokens: limit of the answer.
      stop_ids: tokens that end the answer, up to 8; they are not cached.
      stop_texts: texts that end the answer, which contains the first of them.
      sampling: of the answer.
      prefix: tokens of the chunk that other dialogues are likely to begin with, too; for the first turn.
      forget: positions to remove from the end of the dialogue before the chunk is read.
      constraint: what the answer may consist of, or None.
      on_tokens: called with the ids that are added to the answer.
    """

    chunk: Chunk
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    prefix: int = 0
    forget: int = 0
    constraint: Constraint | None = None
    on_tokens: Callable[[list[int]], None] | None = None


@dataclasses.dataclass(frozen=True)
class Wait:
    """A call whose result the script receives, such as an expert's, while other dialogues go on."""

    call: Callable[[], Any]


Script = Coroutine[Turn | Wait, Any, T]


class _Dialogue:
    """A script and where its cache is: in a row of a pool, in a separate session, or nowhere yet."""

    def __init__(self, script: Script[Any]):
        self.script = script
        self.future: Future[Any] = Future()
        self.turn: Turn | None = None
        self.answer = Decoded([], False)
        self.reading: Iterator[None] | None = None  # of the chunk of the next turn
        self.session: Session | None = None  # of one row, waiting for a row of a pool
        self.pool: _Pool | None = None
        self.row = -1

    def add(self, new: Decoded) -> None:
        """Adds newly decoded tokens to the answer."""
        old = self.answer
        self.answer = Decoded(old.ids + new.ids, new.stopped, (*old.log_probs, *new.log_probs), new.error)


class _Pool:
    """The rows of one session, all with caches of one size."""

    def __init__(self, generator: Generator, size: int):
        self.size = size
        self.session = generator.start(generator.batch_size, size=size)
        self.rows: list[_Dialogue | None] = [None] * generator.batch_size
        self.queue: collections.deque[_Dialogue] = collections.deque()

    def active(self) -> Iterator[_Dialogue]:
        """Dialogues that are being answered."""
        return (one for one in self.rows if one is not None and one.turn is not None)


class Batcher:
    """Runs dialogues together; not thread-safe: one thread calls `add` and `step`."""

    def __init__(self, generator: Generator, executor: Executor | None = None):
        """Compiles nothing before first use.

        Args:
          generator: the model; its `batch_size` is the number of rows that are decoded together.
          executor: runs `Wait` calls; None runs them in `step`, as several processes must.
        """
        self._generator, self._executor = generator, executor
        self._pools: dict[int, _Pool] = {}
        self._calls: dict[Future[Any], _Dialogue] = {}
        self._new: collections.deque[_Dialogue] = collections.deque()
        self._reading: list[_Dialogue] = []

    def run(self, scripts: Iterable[Script[T]]) -> Iterator[T]:
        """Runs scripts to their ends and yields their results, in order; scripts are read as rows are free.

        Raises the exception of a script in its place; those after it are cancelled.
        """
        source, started = iter(scripts), collections.deque[Future[T]]()
        exhausted = False
        try:
            while not exhausted or started:
                while not exhausted and self.unfinished < self._generator.batch_size:
                    script = next(source, None)
                    exhausted = script is None
                    if script is not None:
                        started.append(self.add(script))
                while started and started[0].done():
                    yield started.popleft().result()
                if started or not exhausted:  # other dialogues of the batcher may hold its rows
                    self.step()
        finally:
            for future in started:
                self.cancel(future)

    @property
    def unfinished(self) -> int:
        """Number of dialogues that have not ended."""
        return len(self._dialogues())

    def add(self, script: Script[T]) -> Future[T]:
        """Adds a script, which `step` starts when a row is free."""
        dialogue = _Dialogue(script)
        self._new.append(dialogue)
        return dialogue.future

    def step(self) -> bool:
        """Reads on in every prompt, fills free rows, decodes a few tokens in every pool, continues scripts.

        Returns whether anything is left to do. If all dialogues wait for calls, so does this, for a moment.
        """
        for dialogue in list(self._reading):
            self._read_on(dialogue)
        while self._new and len(self._started()) < self._generator.batch_size:
            self._resume(self._new.popleft(), None)
        decoded = bool(self._reading)
        for pool in list(self._pools.values()):
            self._seat(pool)
            for constrained in (False, True):
                decoded |= self._decode(pool, constrained)
        if self._calls:
            waited = wait(self._calls, timeout=0 if decoded else _POLL, return_when="FIRST_COMPLETED")
            for future in waited.done:
                dialogue = self._calls.pop(future)
                if not dialogue.future.cancelled():
                    failure = future.exception()
                    self._resume(dialogue, None if failure else future.result(), failure)
        self._pools = {
            size: pool for size, pool in self._pools.items() if pool.queue or any(pool.rows)
        } or dict(list(self._pools.items())[:1])
        return self.unfinished > 0

    def cancel(self, future: Future[Any]) -> None:
        """Ends a dialogue early; its future raises `CancelledError`."""
        for dialogue in self._dialogues():
            if dialogue.future is future:
                self._leave(dialogue)
                for waiting in (self._new, self._reading):
                    if dialogue in waiting:
                        waiting.remove(dialogue)
                dialogue.script.close()
                future.cancel()
                return

    def _dialogues(self) -> list[_Dialogue]:
        return [*self._new, *self._started()]

    def _started(self) -> list[_Dialogue]:
        seated = [one for pool in self._pools.values() for one in (*pool.rows, *pool.queue) if one]
        return list(dict.fromkeys([*seated, *self._reading, *self._calls.values()]))

    def _resume(self, dialogue: _Dialogue, value: Any, error: BaseException | None = None) -> None:
        """Continues a script with a value or an error, until it needs tokens or a call, or ends."""
        dialogue.turn = None
        while True:
            try:
                wanted = dialogue.script.send(value) if error is None else dialogue.script.throw(error)
            except StopIteration as end:
                self._leave(dialogue)
                return dialogue.future.set_result(end.value)
            except Exception as failure:
                self._leave(dialogue)
                return dialogue.future.set_exception(failure)
            error = None
            if isinstance(wanted, Wait) and self._executor is not None:
                self._calls[self._executor.submit(wanted.call)] = dialogue
                return None
            if isinstance(wanted, Turn):
                dialogue.reading = self._read(dialogue, wanted)
                self._reading.append(dialogue)
                return self._read_on(dialogue)
            try:  # the script may handle what goes wrong
                value = wanted.call()
            except Exception as failure:
                error = failure

    def _read_on(self, dialogue: _Dialogue) -> None:
        """Reads the next part of a chunk, while other dialogues wait."""
        assert dialogue.reading is not None
        try:
            next(dialogue.reading)
        except StopIteration:
            self._reading.remove(dialogue)
        except Exception as failure:  # the script may handle it
            self._reading.remove(dialogue)
            self._resume(dialogue, None, failure)

    def _read(self, dialogue: _Dialogue, turn: Turn) -> Iterator[None]:
        """Reads the chunk of a turn in parts; the dialogue then waits for a row, or keeps its own."""
        generator = self._generator
        before = self._length(dialogue) - turn.forget
        size = cache_size(
            min(before + len(turn.chunk.tokens) + turn.max_new_tokens, generator.max_length),
            generator.max_length,
        )
        pool = dialogue.pool
        if pool is None:
            prefix, rest = turn.chunk.split(turn.prefix) if turn.prefix else (None, turn.chunk)
            if prefix is not None:
                yield from generator.read_prefix(prefix)
            session = generator.start(1, prefix, size=size)
        else:
            rest, size = turn.chunk, max(size, pool.size)
            session = pool.session.extract(dialogue.row, size)
            session.rewind(0, before)
        yield from session.read([rest])
        dialogue.turn, dialogue.answer = turn, Decoded([], False)
        if pool is not None and pool.size == size:
            pool.session.insert(dialogue.row, session)
            return
        self._leave(dialogue)
        dialogue.session = session
        if size not in self._pools:
            self._pools[size] = _Pool(generator, size)
        self._pools[size].queue.append(dialogue)

    def _length(self, dialogue: _Dialogue) -> int:
        return 0 if dialogue.pool is None else int(dialogue.pool.session.lengths[dialogue.row])

    def _seat(self, pool: _Pool) -> None:
        """Gives free rows to waiting dialogues."""
        for row, taken in enumerate(pool.rows):
            if taken is None and pool.queue:
                dialogue = pool.queue.popleft()
                assert dialogue.session is not None
                pool.session.insert(row, dialogue.session)
                pool.rows[row], dialogue.pool, dialogue.row = dialogue, pool, row
                dialogue.session = None

    def _leave(self, dialogue: _Dialogue) -> None:
        """Frees the row of a dialogue."""
        if dialogue.pool is not None:
            dialogue.pool.rows[dialogue.row] = None
        for pool in self._pools.values():
            if dialogue in pool.queue:
                pool.queue.remove(dialogue)
        dialogue.pool, dialogue.session = None, None

    def _decode(self, pool: _Pool, constrained: bool) -> bool:
        """Decodes a few tokens in the rows with, or without, a constraint; returns whether there are any."""
        rows = {
            one.row: one.turn
            for one in pool.active()
            if one.turn is not None and (one.turn.constraint is not None) == constrained
        }
        if not rows:
            return False
        count, session = len(pool.rows), pool.session
        read_along = any(turn.on_tokens or turn.stop_texts for turn in rows.values())
        burst = 1 if constrained else _STREAMED if read_along else _BURST
        limits, sampling = [1] * count, [GREEDY] * count
        stops: list[tuple[int, ...]] = [()] * count
        allowed = np.ones((count, self._generator.vocab_size), bool) if constrained else None
        for row, turn in rows.items():
            done = len(self._row(pool, row).answer.ids)
            limits[row] = min(burst, turn.max_new_tokens - done)
            sampling[row], stops[row] = turn.sampling, turn.stop_ids
            if allowed is not None and turn.constraint is not None:
                allowed[row] = turn.constraint.allowed()
        decoded = session.decode(
            limits,
            stops,
            active=[row in rows for row in range(count)],
            sampling=sampling,
            allowed=allowed,
            until=1,
        )
        for row in rows:
            self._received(pool, self._row(pool, row), decoded[row])
        return True

    @staticmethod
    def _row(pool: _Pool, row: int) -> _Dialogue:
        dialogue = pool.rows[row]
        assert dialogue is not None
        return dialogue

    def _received(self, pool: _Pool, dialogue: _Dialogue, new: Decoded) -> None:
        """Adds new tokens to an answer, and continues the script if the answer is complete."""
        turn = dialogue.turn
        assert turn is not None
        kept = self._until_stop_text(dialogue, turn, new)
        if kept is not None:
            pool.session.rewind(dialogue.row, self._length(dialogue) - (len(new.ids) - kept))
            new = Decoded(new.ids[:kept], True, new.log_probs[:kept])
        dialogue.add(new)
        if turn.constraint is not None:
            for token in new.ids:
                turn.constraint.advance(token)
        if turn.on_tokens is not None and new.ids:
            turn.on_tokens(new.ids)
        full = self._length(dialogue) >= min(pool.size, self._generator.max_length)
        if new.stopped or new.error or full or len(dialogue.answer.ids) >= turn.max_new_tokens:
            self._resume(dialogue, dialogue.answer)

    def _until_stop_text(self, dialogue: _Dialogue, turn: Turn, new: Decoded) -> int | None:
        """How many of the new tokens complete the first stop text; None if they do not."""
        for count in range(1, len(new.ids) + 1) if turn.stop_texts else ():
            text = self._generator.tokenizer.decode([*dialogue.answer.ids, *new.ids[:count]])
            if any(stop in text for stop in turn.stop_texts):
                return count
        return None
