"""Int8 weights and caches against transformers with the same numbers, rounded by NumPy and PyTorch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from vilam3_jax.configs import models

from tests.reference import decoder_parity
from tests.reference.test_llama_parity import pair as llama_pair
from vilam3_jax.checkpoints import exports
from vilam3_jax.inference.generate import Chunk, Generator
from vilam3_jax.inference.loading import open_model
from vilam3_jax.models import build, model_config, param_paths

pytest.importorskip("qwix")
NEW = 40


@pytest.fixture(autouse=True)
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Int8 along the last axis: the largest magnitude is 127 steps."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round() * scale, 0.0)


def use_int8_weights(reference: Any, params: Any) -> None:
    """Gives transformers our int8 weights, dequantised by NumPy, which are within half a step of its own."""
    flat = param_paths.flatten(params)
    for name, module in reference.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if name == "lm_head":
            tied = "llm/lm_head/kernel" not in flat
            kernel = flat["llm/embed/embedding" if tied else "llm/lm_head/kernel"].value
            kernel = kernel.T if tied else kernel
        else:
            *_, layer, part, projection = name.split(".")
            place = f"{part.removeprefix('self_')}/{projection.removesuffix('_proj')}"
            kernel = flat[f"llm/layers/{place}/kernel"].value[int(layer)]
        step = np.asarray(kernel.scale).T
        weights = np.asarray(kernel.qvalue, np.float32).T * step
        assert kernel.qvalue.dtype == np.int8
        assert (np.abs(module.weight.detach().numpy() - weights) <= 0.501 * step).all(), name
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(weights))  # a tied table, too


class RoundedCache(transformers.DynamicCache):
    """Keys and values [B, K, L, hd], rounded as they are stored."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(rounded(key_states), rounded(value_states), *args, **kwargs)


def said_by_transformers(reference, prompt, cache, new=NEW):
    """Tokens and their logits [n, V]."""
    reference.generation_config.eos_token_id = None
    out = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).numpy()


def vila_export(llm, params, folder):
    """An export of a VILA around a language model; its tower and projector are not used."""
    config = models.get("tiny")
    config.llm = llm.to_dict()
    resolved = model_config.resolve(config)
    wanted = param_paths.flatten(build.abstract_model(resolved, "generative")[1])
    own = {f"llm/{path}": leaf for path, leaf in param_paths.flatten(params).items()}
    rest = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in wanted.items() if path not in own}
    described = {**config.to_dict(), "kind": "generative"}
    exports.export_model(folder, param_paths.unflatten(rest | own), described, None, {})
    return folder


def generator_of(export, tokenizer, *, dtype, cache_dtype, max_length=256):
    source = open_model(export)
    params, config = exports.read_model(source.config, source.read, dtype=dtype)
    return Generator(config, params, tokenizer, max_length=max_length, batch_size=2, cache_dtype=cache_dtype)


@pytest.mark.parametrize("cache", ["float32", "int8"])
@pytest.mark.parametrize("variant", ["grouped", "multi-head, tied, odd", "Qwen3"])
def test_tokens_and_probabilities(variant, cache, tmp_path):
    reference, *_ = llama_pair(variant)
    plain = decoder_parity.imported(reference, tmp_path / "plain")
    export = vila_export(plain.config, plain.params, tmp_path / "export")
    tokenizer = SimpleNamespace(vocab_size=decoder_parity.VOCAB)
    generator = generator_of(export, tokenizer, dtype="int8", cache_dtype=cache)
    prompts = [decoder_parity.tokens(1, n, seed=n)[0].tolist() for n in (7, 30)]
    session = generator.start(2)
    session.append([Chunk.text(prompt) for prompt in prompts])
    found = session.decode(NEW, stop_ids=[])
    before = said_by_transformers(reference, prompts[0], transformers.DynamicCache())[1][0]
    use_int8_weights(reference, generator._params)
    after = said_by_transformers(reference, prompts[0], transformers.DynamicCache())[1][0]
    assert np.abs(after - before).max() > 1e-2, "rounding matters here"
    assert len({token for ours in found for token in ours.ids}) > 3
    for prompt, ours in zip(prompts, found, strict=True):
        stored = RoundedCache() if cache == "int8" else transformers.DynamicCache()
        wanted, logits = said_by_transformers(reference, prompt, stored)
        assert ours.ids == wanted
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(ours.log_probs, log_probs[np.arange(NEW), wanted], atol=1e-4, rtol=0)
