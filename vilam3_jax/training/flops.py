"""Floating-point operations of a model, for MFU.

Counted: the matmuls of vision tower, projector and LLM (stage 1: of both towers), with two operations per
multiply-add. Causal attention counts L²/2, sliding-window attention the keys in the window. Not counted:
padding, rematerialisation, norms, softmax, the optimizer, and stage 1's similarity matrix. A frozen component
counts its forward pass, and the gradients of its inputs if a component before it is trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.tasks import Task
from vilam3_jax.tasks.task import Work

_FACTOR = re.compile(r".*/(kernel|lora_[ab])|llm/embed/embedding")


def model_flops(
    task: Task, model: ModelConfig, shapes: Mapping[str, Any], lr_multipliers: Mapping[str, float]
) -> Work:
    """Operations of a training step, forward and backward, per unit of each field of `Work`.

    The first trained layer counts like the later ones, although its input needs no gradient.

    Args:
      task: task of the run.
      model: section of the config.
      shapes: path → array or ShapeDtypeStruct of every parameter.
      lr_multipliers: path → learning-rate multiplier, 0 for frozen parameters.
    """

    def learns(component: str) -> bool:
        return any(rate for path, rate in lr_multipliers.items() if path.startswith(component + "/"))

    def passes_gradient(component: str) -> bool:
        return any(map(learns, (component, *task.inputs(component))))

    sums = dict.fromkeys(Work._fields, 0.0)
    for path, leaf in shapes.items():
        if not _FACTOR.fullmatch(path):
            continue
        use = task.parameter_use(model, path)
        to_input = passes_gradient(path.split("/")[0]) and path != "vision_tower/patch_embed/kernel"
        products = 1 + to_input + bool(lr_multipliers[path])
        sums[use.unit] += 2 * math.prod(leaf.shape) * use.times * products
    for component, (unit, forward) in task.attention_flops(model).items():
        sums[unit] += forward * (3 if passes_gradient(component) else 1)
    return Work(**sums)


def step_flops(per_unit: Work, work: Work) -> float:
    """Operations of one step on `work`."""
    return sum(flops * amount for flops, amount in zip(per_unit, work, strict=True))
