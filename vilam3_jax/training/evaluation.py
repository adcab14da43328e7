"""What the loop measures on held-out data while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vilam3_jax import paths, processes
from vilam3_jax.data import loader as loader_lib
from vilam3_jax.training import state as state_lib
from vilam3_jax.training import step as step_lib
from vilam3_jax.training.batches import Placement
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
          losses: from `heldout_losses`.
          answer: lets the model speak; None leaves it out.
          workdir: folder of the run; answers go to its `generations.jsonl`.
          start_step: of the checkpoint that the run goes on from; 0 for a new run.
        """
        self._losses, self._answer = losses, answer
        self._file = JsonLines(workdir, GENERATIONS_FILE, start_step) if answer and processes.lead() else None

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


def heldout_losses(
    program: Program, placement: Placement, image_tokens: int
) -> Callable[..., dict[str, float]]:
    """Returns `evaluate(state, swapped=True)` -> held-out losses, always over the same batches.

    Args:
      program: of the run.
      placement: the part of a batch that this process loads.
      image_tokens: T, the projector's output length.

    Returns:
      A function that gives `heldout_true` and, with `swapped`, `heldout_swapped`, means per supervised token
      (per pair for stage 1): with the true images and with images exchanged between samples.
    """
    config = program.config
    placed = state_lib.shardings(program.state)
    jitted = jax.jit(
        step_lib.make_eval_step(program.loss_fn),
        in_shardings=(placed, None),
        compiler_options=compiler_options(config, program.mesh),
    )

    def batches(swap: bool) -> Iterator[dict[str, np.ndarray]]:
        loader = loader_lib.build_loader(
            config,
            "heldout",
            tokens_per_image=image_tokens,
            swap_images=swap,
            experts=config.data.experts,
            held=placement.held,
        )
        try:
            own = iter(loader)
            for _ in range(config.eval_batches):
                batch = next(own, None)
                if not any(processes.gather(batch is not None)):
                    break
                yield loader.empty_batch() if batch is None else batch
        finally:
            loader.close()

    def mean_loss(state: Any, swap: bool) -> float:
        loss = weight = 0.0
        with program.placing():
            for batch in batches(swap):
                sums = jitted(state, placement.put(batch))
                loss += float(sums["loss"])
                weight += float(sums["weight"])
        return loss / max(weight, 1.0)

    def evaluate(state: Any, swapped: bool = True) -> dict[str, float]:
        values = {"heldout_true": mean_loss(state, False)}
        return values | {"heldout_swapped": mean_loss(state, True)} if swapped else values

    return evaluate
