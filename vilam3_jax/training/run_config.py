"""The config of a run, composed of frozen sections that are defined next to the code that reads them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from vilam3_jax.data.data_config import DataConfig
from vilam3_jax.errors import UserError
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.ops.attention import backends
from vilam3_jax.ops.quantized import QuantizationConfig
from vilam3_jax.runtime.settings import Section, flatten, setting
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES, MeshAxes, check_rules
from vilam3_jax.sharding.mesh import MeshConfig
from vilam3_jax.tasks import TASKS
from vilam3_jax.training.initialization import InitConfig
from vilam3_jax.training.optimizer import OptimizerConfig, ScheduleConfig
from vilam3_jax.training.step_guard import SkipConfig
from vilam3_jax.training.writers import TelemetryConfig

# Keys of earlier versions → their names today.
RENAMED_KEYS = {"kind": "task", "quantization.products": "quantization.matmul"}


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """A run.

    Attributes:
      name: of the run.
      task: 'generative' or 'contrastive', see `tasks`.
      seed: for parameters, data order and all other randomness.
      model, data, init, mesh, optimizer, schedule, skip, quantization, telemetry: see the sections.
      parameter_rules: rows (regex, mesh axes per dimension, fallbacks ...) that precede those of the model
        families, see `sharding.mesh.parameter_shardings`.
      activation_rules: logical axis → mesh axes, see `sharding.logical_axes`.
      attention: attention backend, see `ops.attention.backends`.
      trainable: rows (regex, learning-rate multiplier), see `optimizer.lr_groups`.
      ema_decay: decay of the moving average of the parameters; 0 for none.
      num_steps: optimizer steps of the run.
      grad_accum: micro-batches per step.
      loss_chunk: positions of a row whose logits exist at a time.
      compiler_options: rows (name, value) that override `program.compiler_options`.
      eval_every: steps between evaluations; 0 for none.
      eval_batches: held-out batches per evaluation.
      eval_generate: held-out examples to answer per evaluation.
      checkpoint_every: steps between checkpoints; 0 for the last step only.
      checkpoints_kept: number of newest checkpoints to keep.
      checkpoints_kept_every: also keep multiples of this step; 0 for none.
      log_every: steps between log lines.
    """

    name: str = ""
    task: str = setting(default="generative", choices=tuple(TASKS))
    seed: int = setting(default=0, at_least=0, at_most=2**32 - 1)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    parameter_rules: tuple[Any, ...] = ()
    activation_rules: Mapping[str, MeshAxes] = dataclasses.field(
        default_factory=lambda: dict(ACTIVATION_RULES)
    )
    attention: str = backends.AUTO
    trainable: tuple[Any, ...] = ((r".*", 1.0),)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    skip: SkipConfig = dataclasses.field(default_factory=SkipConfig)
    ema_decay: float = 0.0
    quantization: QuantizationConfig = dataclasses.field(default_factory=QuantizationConfig)
    num_steps: int = setting(default=100, at_least=1)
    grad_accum: int = setting(default=1, at_least=1)
    loss_chunk: int = setting(default=1024, at_least=1)
    compiler_options: tuple[Any, ...] = ()
    eval_every: int = setting(default=0, at_least=0)
    eval_batches: int = setting(default=4, at_least=1)
    eval_generate: int = setting(default=0, at_least=0)
    checkpoint_every: int = setting(default=100, at_least=0)
    checkpoints_kept: int = setting(default=2, at_least=1)
    checkpoints_kept_every: int = setting(default=0, at_least=0)
    log_every: int = setting(default=1, at_least=1)
    telemetry: TelemetryConfig = dataclasses.field(default_factory=TelemetryConfig)

    def validate(self) -> None:
        """Checks that the settings are consistent."""
        check_rules(self.activation_rules)
        backends.check_choice(self.attention)
        if not 0 <= self.ema_decay < 1:
            raise self.error("ema_decay", "must be 0 (off) or more, and less than 1")
        for row in self.compiler_options:
            pair = isinstance(row, tuple) and len(row) == 2 and isinstance(row[0], str)
            if not pair or not isinstance(row[1], str | bool | int | float):
                rows = "(('xla_option', True),)"
                raise UserError(f"config compiler_options: {row!r} is not a row (name, value); write {rows}")
        task = TASKS[self.task]
        if self.eval_generate and not (task.batch_format.has_dialogues and self.eval_every):
            raise self.error("eval_generate", "needs a generative run with eval_every; set it to 0")
        if self.model.vision_tower is not None:
            _ = self.model.image_layout
        if task.can_accumulate:
            self.data.check_groups(self.grad_accum)
        elif self.grad_accum != 1:
            raise self.error("grad_accum", f"must be 1, as a {task.name} run compares all pairs of a batch")

    def snapshot(self) -> str:
        """The config as sorted `key: value` lines, for logs and diffs."""
        rows = sorted(flatten(self.to_dict()).items())
        return "".join(f"{key}: {json.dumps(value)}\n" for key, value in rows)

    def to_json(self) -> str:
        """The config as JSON (tuples become lists)."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True)
