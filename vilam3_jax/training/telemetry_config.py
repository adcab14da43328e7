"""The section `telemetry` of a run's config."""

from __future__ import annotations

import dataclasses

from vilam3_jax.errors import UserError
from vilam3_jax.runtime.settings import Section, setting

# Writer → the package that it needs.
WRITERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


@dataclasses.dataclass(frozen=True)
class TelemetryConfig(Section):
    """Where the metrics of a run go.

    Attributes:
      writers: of `WRITERS`, besides metrics.jsonl.
      project: project or experiment at the services.
      wandb_offline: write W&B runs to the run's folder.
      stall_seconds: time without a step after which all stacks are dumped; 0 for never.
      profile_steps: first and last step to trace, or empty.
    """

    key = "telemetry"
    writers: tuple[str, ...] = ()
    project: str = "vilam3_jax"
    wandb_offline: bool = False
    stall_seconds: float = setting(default=1800.0, at_least=0)
    profile_steps: tuple[int, ...] = ()

    def validate(self) -> None:
        """Checks writers and steps."""
        if unknown := sorted({str(name) for name in self.writers} - set(WRITERS)):
            raise UserError(
                f"config telemetry.writers names {', '.join(unknown)}; known are {', '.join(WRITERS)}"
            )
        steps = self.profile_steps
        if steps and not (
            len(steps) == 2 and all(isinstance(step, int) for step in steps) and 1 <= steps[0] <= steps[1]
        ):
            raise self.error(
                "profile_steps", "must be the first and the last step to trace, such as (10, 12)"
            )
