"""Training tasks: how a model, its batches, its loss and its figures belong together."""

from vilam3_jax.tasks.contrastive import Contrastive
from vilam3_jax.tasks.generative import Generative
from vilam3_jax.tasks.task import Task

TASKS: dict[str, Task] = {"generative": Generative(), "contrastive": Contrastive()}

__all__ = ["TASKS", "Task"]
