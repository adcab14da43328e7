"""Parity checks that every language model family passes, from a folder that transformers wrote."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from tests.in_memory import fill
from tests.reference import torch_weights
from vilam3_jax.convert import exporter, importer
from vilam3_jax.models import families, param_paths
from vilam3_jax.ops.losses import chunked_cross_entropy
from vilam3_jax.runtime import compat
from vilam3_jax.runtime.settings import Section

VOCAB = 61


@dataclasses.dataclass
class Pair:
    """transformers' model and ours with the same weights.

    Attributes:
      reference: transformers' model.
      folder: that it was saved to.
      config: our section, as the importer reads the folder.
      params: our nested parameters.
    """

    reference: Any
    folder: Path
    config: Section
    params: dict[str, Any]

    def model(self, params, dtype="float32"):
        """Our model with these parameters."""
        family = families.get("llm", self.config.type)
        kwargs = dict(dtype=dtype, param_dtype="float32", remat="none")
        graphdef, _ = compat.split(
            compat.nnx.eval_shape(lambda: family.module(self.config, rngs=compat.nnx.Rngs(0), **kwargs))
        )
        return compat.merge(graphdef, params)

    def logits(self, ids, segments, positions, dtype="float32"):
        """Our logits of packed rows."""

        def run(params):
            model = self.model(params, dtype)
            return model.logits(model(model.embed(jnp.asarray(ids)), segments, positions))

        return np.asarray(jax.jit(run)(self.params))


def imported(reference: Any, folder: Path) -> Pair:
    """Saves transformers' model and reads the folder as `vilam3 convert import` does."""
    reference.save_pretrained(folder)
    checkpoint = importer.open_source(folder)
    flat = {path.removeprefix("llm/"): jnp.asarray(x) for path, x in fill(checkpoint).items()}
    section = families.config_of("llm", checkpoint.config["llm"])
    return Pair(reference, folder, section, param_paths.unflatten(flat))


def tokens(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def check_logits(pair: Pair, length: int, start: int = 0) -> np.ndarray:
    """Logits of whole rows at positions from `start` on."""
    ids = tokens(2, length)
    positions = start + np.arange(length)[None].repeat(2, 0)
    with torch.no_grad():
        want = pair.reference(torch.from_numpy(ids), position_ids=torch.from_numpy(positions)).logits.numpy()
    np.testing.assert_allclose(pair.logits(ids, np.ones_like(ids), positions), want, atol=1e-4, rtol=0)
    assert np.ptp(want) > 1  # the outputs are not all alike
    return want


def check_gradients(pair: Pair, length: int) -> None:
    """The loss and the gradient of every parameter."""
    ids = tokens(2, length)
    labels = ids.copy()
    labels[:, :3] = -100
    out = pair.reference(torch.from_numpy(ids), labels=torch.from_numpy(labels))
    out.loss.backward()

    def loss(params):
        model, segments = pair.model(params), jnp.ones((2, length), int)
        positions = jnp.arange(length)[None].repeat(2, 0)
        hidden = model(model.embed(jnp.asarray(ids)), segments, positions)
        weights = jnp.asarray(labels != -100, jnp.float32)
        total, count, _ = chunked_cross_entropy(
            hidden, model.head_kernel(), jnp.asarray(ids), weights, segments, chunk=4
        )
        return total / count

    value, got = jax.jit(jax.value_and_grad(loss))(pair.params)
    np.testing.assert_allclose(value, out.loss.item(), atol=1e-5)
    torch_weights.gradients_as_weights(pair.reference)
    want = imported(pair.reference, pair.folder.with_name("gradients")).params
    torch_weights.check_gradients(got, want)


def check_bfloat16(pair: Pair, length: int) -> None:
    """Our rounding errors in bfloat16 are of the size of transformers'."""
    ids = tokens(2, length)
    with torch.no_grad():
        exact, low = (
            model(torch.from_numpy(ids)).logits
            for model in (pair.reference, torch_weights.in_bfloat16(pair.reference))
        )
    positions = np.arange(length)[None].repeat(2, 0)
    got = pair.logits(ids, np.ones_like(ids), positions, "bfloat16")
    torch_weights.check_rounding(got, low, exact)


def check_packing(pair: Pair, lengths: tuple[int, ...]) -> None:
    """A packed row equals its samples alone."""
    total = sum(lengths)
    ids = tokens(1, total + 2)
    segments = np.repeat(np.arange(1, len(lengths) + 2), [*lengths, 2])[None]
    segments[:, total:] = 0
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(2, int)])[None]
    got = pair.logits(ids, segments, positions)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        with torch.no_grad():
            want = pair.reference(torch.from_numpy(ids[:, part])).logits.numpy()
        np.testing.assert_allclose(got[:, part], want, atol=1e-4, rtol=0)
        start += length
    assert np.isfinite(got).all()


def check_cache(pair: Pair, length: int, prefill: int) -> None:
    """Prefill and single steps with a cache equal transformers' logits of whole rows."""
    ids = tokens(2, length)
    with torch.no_grad():
        want = pair.reference(torch.from_numpy(ids)).logits.numpy()

    @jax.jit
    def run(params, chunk, cache, write_at):
        model = pair.model(params)
        positions = write_at[:, None] + jnp.arange(chunk.shape[1])[None]
        hidden, cache = model.forward_cached(model.embed(chunk), positions, cache, write_at)
        return model.logits(hidden), cache

    cache = pair.model(pair.params).init_cache(2, length)
    start, got = 0, []
    for size in (prefill, *(1,) * (length - prefill)):
        chunk = jnp.asarray(ids[:, start : start + size])
        logits, cache = run(pair.params, chunk, cache, jnp.full(2, start))
        got.append(np.asarray(logits))
        start += size
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=1e-4, rtol=0)


def check_export(pair: Pair, out: Path) -> None:
    """Imported and exported again, transformers reads the same model, and the importer the same section."""
    importer.import_model(pair.folder, out / "export")
    exporter.export_folder(out / "export", out / "folder")
    ids = torch.from_numpy(tokens(2, 12))
    again = transformers.AutoModelForCausalLM.from_pretrained(out / "folder", attn_implementation="eager")
    with torch.no_grad():
        want, got = pair.reference(ids).logits, again.eval()(ids).logits
    assert torch.equal(want, got)
    config = json.loads((out / "folder" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    read = importer.open_source(out / "folder").config["llm"]
    assert families.config_of("llm", read) == pair.config
