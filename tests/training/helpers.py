"""Batches and runs for the trainer's tests."""

import dataclasses

import jax
import numpy as np
from vilam3_jax.configs import models

from vilam3_jax import config as config_lib
from vilam3_jax.data.batches import PackedBatch, PairBatch, map_fields
from vilam3_jax.models import model_config
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib


def tiny_config(task="generative", **mesh_axes):
    config = config_lib.base_config()
    config.task = task
    config.model = models.get("tiny")
    config.mesh.update(dict(fsdp=1) | mesh_axes)
    config.num_steps = 20
    config.schedule.peak = 3e-3
    config.loss_chunk = 16
    return config


def packed_batch(seed, rows=8, length=48, slots=2, rows_per_group=1, side=32):
    """Rows of two samples each, one image a sample, and uneven numbers of supervised tokens."""
    rng = np.random.default_rng(seed)
    tokens_per_image = model_config.resolve(models.get("tiny")).tokens_per_image
    groups = rows // rows_per_group
    batch = PackedBatch(
        tokens=rng.integers(0, 2000, (rows, length), dtype=np.int32),
        segment_ids=np.zeros((rows, length), np.int32),
        positions=np.zeros((rows, length), np.int32),
        loss_weights=np.zeros((rows, length), np.float32),
        visual_index=np.full((rows, length), -1, np.int32),
        images=rng.integers(0, 256, (groups, slots * rows_per_group, side, side, 3), dtype=np.uint8),
        image_valid=np.ones((groups, slots * rows_per_group), bool),
    )
    for row in range(rows):
        start = 0
        for sample in range(2):
            size = int(rng.integers(14, 24))
            place = slice(start, start + size)
            batch.segment_ids[row, place] = sample + 1
            batch.positions[row, place] = np.arange(size)
            batch.loss_weights[row, place] = rng.random(size) < 0.4
            slot = (row % rows_per_group) * slots + sample
            visual = slice(start + 1, start + 1 + tokens_per_image)
            batch.visual_index[row, visual] = slot * tokens_per_image + np.arange(tokens_per_image)
            start += size
    return batch


def pair_batch(seed, rows=8, length=12):
    rng = np.random.default_rng(seed)
    return PairBatch(
        images=rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8),
        text_tokens=rng.integers(0, 2000, (rows, length), dtype=np.int32),
        text_valid=np.arange(length)[None] < rng.integers(4, length, (rows, 1)),
    )


def tiled_batch(seed, rows=8, length=48):
    """For two scales of 32 and 64 pixels: each group has an image of 2 x 2 tiles and an untiled one."""
    grid = [[0, 2, r, 2, c] for r in range(2) for c in range(2)]
    tiles = np.tile(np.asarray([[0, 1, 0, 1, 0], *grid, [5, 1, 0, 1, 0]], np.int32), (rows, 1, 1))
    batch = dataclasses.replace(packed_batch(seed, rows, length, slots=6), image_tiles=tiles)
    batch.visual_index[:] = -1
    tokens_per_image = model_config.resolve(models.get("tiny")).tokens_per_image
    for row in range(rows):
        first = np.arange(1, 5) * tokens_per_image
        places = np.concatenate([first, first + 1])  # some tokens of each tile, alternating between two tiles
        second = np.flatnonzero(batch.segment_ids[row] == 2)[0]
        batch.visual_index[row, 1 : 1 + len(places)] = places
        own = 5 * tokens_per_image + np.arange(tokens_per_image)
        batch.visual_index[row, second + 1 : second + 1 + len(own)] = own
    return batch


class Run:
    """A trainer without files: the program that `train` runs, its state and metrics."""

    def __init__(self, config, mesh=None):
        self.config = config_lib.resolve(config)
        self.mesh = mesh_lib.build_mesh(self.config.mesh) if mesh is None else mesh
        self.program = program_lib.build(self.config, self.mesh)
        self.state, self.origin = self.program.initial_state()
        self._compiled = {}

    def step(self, batch):
        """Runs the step on a batch; its shapes may differ from those of the config."""
        batch = map_fields(
            lambda name, x: jax.device_put(x, program_lib.field_sharding(name, x.shape, self.mesh)), batch
        )
        shapes = jax.tree.structure(batch), tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in self._compiled:
            with self.program.context():
                self._compiled[shapes] = self.program.step.lower(self.state, batch).compile()
        self.state, metrics = self._compiled[shapes](self.state, batch)
        return {key: float(value) for key, value in metrics.items()}

    def text(self):
        """The optimised HLO of the step; all batches so far must have had the same shapes."""
        (compiled,) = self._compiled.values()
        return compiled.as_text()


def equations(jaxpr, times=1):
    """(equation, number of runs) of a jaxpr and its inner jaxprs; unknown trips count once."""
    for equation in jaxpr.eqns:
        yield equation, times
        inside = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
        ):
            program = getattr(value, "jaxpr", value)
            if hasattr(program, "eqns"):
                yield from equations(program, inside)
