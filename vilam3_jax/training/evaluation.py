"""Held-out evaluation during training."""

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
from vilam3_jax.training import step as step_lib
from vilam3_jax.training.device_put import DevicePut
from vilam3_jax.training.program import Program, compiler_options
from vilam3_jax.training.train_state import TrainState, shardings
from vilam3_jax.training.writers import JsonLines

GENERATIONS_FILE = "generations.jsonl"
# Parameters by path → (one record per held-out example, metrics).
Answer = Callable[[Mapping[str, jax.Array]], tuple[list[dict[str, Any]], dict[str, float]]]


class Evaluation:
    """Held-out losses and, unless `answer` is None, answers, which go to `generations.jsonl` in `workdir`.

    A resumed run drops the answers after `start_step`, the step of its checkpoint.
    """

    def __init__(
        self,
        losses: Callable[..., dict[str, float]],
        answer: Answer | None,
        workdir: paths.PathLike,
        start_step: int,
    ) -> None:
        self._losses, self._answer = losses, answer
        writes = answer is not None and processes.is_primary_process()
        self._file = JsonLines(workdir, GENERATIONS_FILE, start_step) if writes else None

    def __call__(self, step: int, state: TrainState, swapped: bool = True) -> dict[str, float]:
        """Evaluates a state; `swapped` adds the loss with exchanged images."""
        values = self._losses(state, swapped)
        if self._answer is not None:
            rows, found = self._answer(state.params())
            values |= found
            if self._file is not None:
                for row in rows:
                    self._file.write(step, row)
                self._file.flush()
        return values


class HeldoutLosses:
    """Held-out losses, always over the same batches; the data is opened at the first call."""

    def __init__(self, program: Program, device_put: DevicePut) -> None:
        self._program, self._device_put = program, device_put
        self._loaders: dict[bool, Loader] = {}
        self._step = jax.jit(
            step_lib.make_eval_step(program.loss_fn, program.config.grad_accum),
            in_shardings=(shardings(program.state), None),
            compiler_options=compiler_options(program.config.compiler_options, program.mesh),
        )

    def __call__(self, state: TrainState, swapped: bool = True) -> dict[str, float]:
        """Evaluates a state.

        Returns:
          Means per supervised token (per pair for stage 1): `heldout_true` and, if `swapped`,
          `heldout_swapped`, with images exchanged between samples.

        Raises:
          UserError: the held-out batches have no supervised token.
        """
        values = {"heldout_true": self._mean(state, False)}
        return values | {"heldout_swapped": self._mean(state, True)} if swapped else values

    def close(self) -> None:
        """Closes the data."""
        for loader in self._loaders.values():
            loader.close()

    def _mean(self, state: TrainState, swap: bool) -> float:
        loss = weight = 0.0
        with self._program.context():
            for batch in self._batches(swap):
                sums = self._step(state, self._device_put(batch))
                loss += float(sums.loss)
                weight += float(sums.weight)
        if not weight:
            skipped = itertools.chain(*processes.gather(self._loaders[swap].stats.skipped[:3]))
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped) or "no text to learn"
            raise UserError(f"no usable record in the held-out data: {reasons}; set eval_every=0")
        return loss / weight

    def _batches(self, swap: bool) -> Iterator[Batch]:
        loader = self._loader(swap)
        with contextlib.closing(iter(loader)) as own:  # closed, so that it does not prefetch during training
            for _ in range(self._program.config.eval_batches):
                batch = next(own, None)
                if not any(processes.gather(batch is not None)):
                    break
                yield loader.empty_batch() if batch is None else batch

    def _loader(self, swap: bool) -> Loader:
        if swap not in self._loaders:
            config = self._program.config
            self._loaders[swap] = build_loader(
                config.data,
                config.model,
                self._program.task.batch_format,
                "heldout",
                seed=config.seed,
                swap_images=swap,
                local_units=self._device_put.local_units,
            )
        return self._loaders[swap]
