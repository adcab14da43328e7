"""Effect of a caption's first token on the first gradient of a new projector.

Run after `make quickstart`: python benchmarks/first_token.py [--run=runs/quickstart]

Uses the first batch of the quickstart's stage 2a with its tower, SmolLM2 and a randomly initialised projector
on one device, with `<bos>` before the image (the default) and without. Prints the norm of the projector's
gradient, summed over the batch, and the cosine between it and the gradient with bfloat16 matmuls.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from vilam3_jax import config as config_lib
from vilam3_jax.checkpoints import exports
from vilam3_jax.data import loader as loader_lib
from vilam3_jax.data import render, templates
from vilam3_jax.models import build, param_paths
from vilam3_jax.tasks import TASKS
from vilam3_jax.training.run_config import RunConfig


def parameters(run: Path, model: Any) -> dict[str, jax.Array]:
    """Flat parameters: stage 1's tower, the imported LLM, and random values for the rest."""
    flat = param_paths.flatten(build.init_params(model, "generative", jax.random.key(0)))
    sources = {"vision_tower": run / "stages" / "stage1_vision" / "export", "llm": run / "llm"}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for component, source in sources.items():
        wanted = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
            for path, leaf in flat.items()
            if path.startswith(f"{component}/")
        }
        optional = {path for path in wanted if "/lora_" in path}
        flat |= exports.load_params(source, wanted, optional=optional)
    return flat


def first_gradients(
    config: RunConfig, loss: Callable[..., Any], params: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Matmul precision → the projector's gradient as one vector."""
    make_format = TASKS[config.task].batch_format
    loader = loader_lib.build_loader(
        config.data, config.model, make_format, "train", seed=config.seed, experts="off"
    )
    batch = jax.tree.map(jnp.asarray, next(iter(loader)))
    loader.close()
    trained = {path: leaf for path, leaf in params.items() if path.startswith("projector/")}
    frozen = {path: leaf for path, leaf in params.items() if path not in trained}
    found = {}
    for precision in ("float32", "bfloat16"):
        with jax.default_matmul_precision(precision):
            # A new function each time: the precision is read while tracing.
            gradient = jax.jit(jax.grad(lambda part, rest, batch: loss({**rest, **part}, batch)))
            found[precision] = ravel_pytree(gradient(trained, frozen, batch))[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="folder of a finished run")
    run = parser.parse_args().run.absolute()
    config = config_lib.load(
        "configs/quickstart/stage2a_align.py:default",
        {
            "data.path": str(run / "data"),
            "data.annotations": str(run / "annotations"),
            "model.tokenizer": str(run / "llm" / "tokenizer"),
        },
    )
    graphdef, _ = build.abstract_model(config.model, "generative")

    def loss(params: dict[str, jax.Array], batch: Any) -> jax.Array:
        model = build.merge(graphdef, param_paths.unflatten(params))
        return TASKS[config.task].loss(model, batch, config.loss_chunk).loss

    params = parameters(run, config.model)
    for name, start in (("<bos><image>", templates.PLAIN.start), ("<image>", ())):
        render.PLAIN = dataclasses.replace(templates.PLAIN, start=start)
        exact, rounded = first_gradients(config, loss, params).values()
        cosine = exact @ rounded / jnp.linalg.norm(exact) / jnp.linalg.norm(rounded)
        print(f"{name:<14} norm {jnp.linalg.norm(exact):8.0f}   cosine {cosine:6.3f}")


if __name__ == "__main__":
    main()
