"""Imports of transformers' folders: the same logits, features and token ids as transformers."""

from __future__ import annotations

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from tests.in_memory import fill
from tests.reference import torch_weights
from vilam3_jax.convert.importer import open_source
from vilam3_jax.models import families, param_paths
from vilam3_jax.runtime import compat

SETTINGS = dict(dtype="float32", param_dtype="float32", remat="none")


def build(source):
    """The imported model of one component."""
    (part,) = source.parts
    config = families.config_of(part.component, part.config)
    module = families.get(part.component, config.type).module
    graphdef, _ = compat.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0), **SETTINGS)))
    params = param_paths.unflatten({name: jnp.asarray(value) for name, value in fill(source).items()})
    return compat.merge(graphdef, params[part.component])


def llama_logits(source, tokens, first=0):
    """Float32 [B, L, V] of the imported model; every row is one segment, its positions from `first`."""
    model = build(source)
    positions = jnp.broadcast_to(first + jnp.arange(tokens.shape[1]), tokens.shape)
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.logits(model(model.embed(tokens), jnp.ones_like(tokens), positions)))


def check_logits(source, reference, first=0):
    tokens = (
        np.random.default_rng(0).integers(0, source.parts[0].config["vocab_size"], (2, 40)).astype(np.int32)
    )
    with torch.no_grad():
        positions = torch.arange(first, first + 40)[None]
        expected = reference.eval()(torch.from_numpy(tokens).long(), position_ids=positions).logits.numpy()
    actual = llama_logits(source, tokens, first)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_llama_saved_by_transformers(tmp_path, tied, shard_size):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
        rms_norm_eps=1e-3,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    reference = transformers.LlamaForCausalLM(config)
    reference.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "5GB")
    check_logits(open_source(tmp_path), reference)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Qwen2", {}),
        ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
        ("Qwen3", {"head_dim": 10}),
        ("Qwen3", {"head_dim": 8, "attention_bias": True}),
        ("Llama", {"attention_bias": True}),
        ("Llama", {"rope_parameters": LLAMA3_ROPE}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    ],
)
@pytest.mark.parametrize("first", [0, 4096])
def test_decoder_variants_saved_by_transformers(tmp_path, family, changes, first):
    sizes = dict(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
    )
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
    reference = torch_weights.randomise(getattr(transformers, f"{family}ForCausalLM")(config))
    reference.save_pretrained(tmp_path)
    check_logits(open_source(tmp_path), reference, first)


def test_siglip_saved_by_transformers(tmp_path):
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-3,
    )
    reference = transformers.SiglipVisionModel(config).eval()
    for parameter in reference.parameters():  # initial biases are zero and would hide swapped tensors
        torch.nn.init.normal_(parameter, std=0.3)
    reference.save_pretrained(tmp_path)
    model = build(open_source(tmp_path))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    pixels = torch.from_numpy((images / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True)
    with jax.default_matmul_precision("highest"):
        features, pooled = model.features(images), model.pooled(images)
    np.testing.assert_allclose(features, expected.hidden_states[-2].numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(pooled, expected.pooler_output.numpy(), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "convert")
        foreign = importlib.import_module("foreign")
        weights = {name: value * 0.3 for name, value in foreign.llama_weights().items()}
        return foreign.write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", weights)


def test_gguf_read_by_transformers(gguf_file):
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    check_logits(open_source(gguf_file), reference)


def test_gguf_tokenizer_read_by_transformers(gguf_file):
    theirs = transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    ours = open_source(gguf_file).tokenizer()
    texts = [
        "There is a moderate left pleural effusion, 12345 ml (3.14 cm x 2).",
        "<|im_start|>user\nWhat's this?<|im_end|>\n<|im_start|>assistant\n",
        "naïve café 日本語 🫁\t\ttabs\r\n\r\nlines   spaces  ",
        "don't I'll we've a1b2c3 2024-11-21 <|endoftext|>",
        "",
    ]
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, allow_special=True) == ids
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    # transformers does not implement SmolLM2's split.
    assert ours.encode("  7") != theirs.encode("  7", add_special_tokens=False)
