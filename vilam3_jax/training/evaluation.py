"""What the loop measures on held-out data while it trains."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from vilam3_jax.data.batches import Batch
from vilam3_jax.data.loader import Loader, build_loader
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths, processes
from vilam3_jax.training import state as state_lib
from vilam3_jax.training import step as step_lib
from vilam3_jax.training.device_put import Placement
from vilam3_jax.training.program import Program, compiler_options
from vilam3_jax.training.writers import JsonLines

GENERATIONS_FILE = "generations.jsonl"
# Flat parameters → (one record a held-out example, metrics).
Answer = Callable[[Mapping[str, jax.Array]], tuple[list[dict[str, Any]], dict[str, float]]]


class Evaluation:
    """Held-out losses, and answers if wished; a resumed run drops the answers after its checkpoint."""

    def __init__(
        self,
        losses: Callable[..., dict[str, float]],
        answer: Answer | None,
        workdir: paths.PathLike,
        start_step: int,
    ) -> None:
        """Puts the parts together.

        Args:
          losses: such as `HeldoutLosses`.
          answer: lets the model speak; None leaves it out.
          workdir: folder of the run; answers go to its `generations.jsonl`.
          start_step: of the checkpoint that the run goes on from; 0 for a new run.
        """
        self._losses, self._answer = losses, answer
        self._file = (
            JsonLines(workdir, GENERATIONS_FILE, start_step)
            if answer and processes.is_primary_process()
            else None
        )

    def __call__(self, step: int, state: Any, swapped: bool = True) -> dict[str, float]:
        """Measures a state; `swapped` adds the loss with exchanged images."""
        values = self._losses(state, swapped)
        if self._answer is not None:
            rows, found = self._answer(state_lib.model_params(state))
            values |= found
            if self._file is not None:
                for row in rows:
                    self._file.write(step, row)
                self._file.flush()
        return values


class HeldoutLosses:
    """`losses(state, swapped=True)` -> held-out losses, always over the same batches.

    The data is opened once, when it is first needed: shards of an object store are fetched, and the records
    whose images are exchanged are looked up.
    """

    def __init__(self, program: Program, placement: Placement, image_tokens: int) -> None:
        """Opens and compiles nothing yet.

        Args:
          program: of the run.
          placement: the part of a batch that this process loads.
          image_tokens: T, the projector's output length.
        """
        self._program, self._placement, self._image_tokens = program, placement, image_tokens
        self._loaders: dict[bool, Loader] = {}
        self._step = jax.jit(
            step_lib.make_eval_step(program.config, program.loss_fn),
            in_shardings=(state_lib.shardings(program.state), None),
            compiler_options=compiler_options(program.config, program.mesh),
        )

    def __call__(self, state: Any, swapped: bool = True) -> dict[str, float]:
        """Measures a state.

        Returns:
          `heldout_true` and, with `swapped`, `heldout_swapped`, means per supervised token (per pair for
          stage 1): with the true images and with images exchanged between samples.

        Raises:
          UserError: there is no supervised token in the held-out batches.
        """
        values = {"heldout_true": self._mean(state, False)}
        return values | {"heldout_swapped": self._mean(state, True)} if swapped else values

    def close(self) -> None:
        """Closes the data."""
        for loader in self._loaders.values():
            loader.close()

    def _mean(self, state: Any, swap: bool) -> float:
        loss = weight = 0.0
        with self._program.placing():
            for batch in self._batches(swap):
                sums = self._step(state, self._placement.put(batch))
                loss += float(sums["loss"])
                weight += float(sums["weight"])
        if not weight:
            skipped = itertools.chain(*processes.gather(self._loaders[swap].stats.skipped[:3]))
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped) or "no text to learn"
            raise UserError(f"no usable record in the held-out data: {reasons}; set eval_every=0 without any")
        return loss / weight

    def _batches(self, swap: bool) -> Iterator[Batch]:
        loader = self._loader(swap)
        with contextlib.closing(iter(loader)) as own:  # nothing is read ahead while the run trains
            for _ in range(self._program.config.eval_batches):
                batch = next(own, None)
                if not any(processes.gather(batch is not None)):
                    break
                yield loader.empty_batch() if batch is None else batch

    def _loader(self, swap: bool) -> Loader:
        if swap not in self._loaders:
            config = self._program.config
            self._loaders[swap] = build_loader(
                config,
                "heldout",
                tokens_per_image=self._image_tokens,
                swap_images=swap,
                experts=config.data.experts,
                held=self._placement.held,
            )
        return self._loaders[swap]
