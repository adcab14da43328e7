"""Training tasks: loss, batches and accounting of each way to train."""

from vilam3_jax.tasks.contrastive import Contrastive
from vilam3_jax.tasks.generative import Generative
from vilam3_jax.tasks.task import Task

TASKS: dict[str, Task] = {"generative": Generative(), "contrastive": Contrastive()}

__all__ = ["TASKS", "Task"]
