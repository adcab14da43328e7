"""The published sizes: as many parameters as published, and as transformers counts from the same settings."""

from __future__ import annotations

import math

import jax
import pytest
from vilam3_jax.configs import models
from vilam3_jax.configs.models.parts import llms, towers

from vilam3_jax.errors import UserError
from vilam3_jax.models import trees, vila

SIZES = ("vila_m3_3b", "vila_m3_8b", "vila_m3_13b", "vila_m3_40b")
# Projectors: arithmetic over the released shapes; 8B and 13B are the released files' sizes in bf16. LLMs: the
# model cards' totals (8B: with [PAD], one more row in both tables).
PUBLISHED = {
    "vila_m3_3b": {"projector": 18_364_416},
    "vila_m3_8b": {"projector": 35_668_992, "llm": 8_030_261_248 + 2 * 4096},
    "vila_m3_13b": {"projector": 49_826_816, "llm": 13_015_864_320},
    "vila_m3_40b": {"projector": 143_170_560, "llm": 34_388_917_248},
}


def counts(cfg, kind="generative"):
    """component -> number of parameters, without allocating any."""
    _, abstract = vila.abstract_model(cfg, kind)
    out: dict[str, int] = {}
    for path, leaf in trees.flatten(abstract).items():
        part = path.partition("/")[0]
        out[part] = out.get(part, 0) + math.prod(leaf.shape)
    return out


@pytest.mark.parametrize("name", SIZES)
def test_published_counts(name):
    got = counts(models.get(name))
    assert {part: got[part] for part in PUBLISHED[name]} == PUBLISHED[name]


def test_released_file_sizes():
    """Bytes of the released bf16 files: SigLIP 857 MB, Sheared-LLaMA 4.97 GB + 429 MB."""
    got = counts(models.get("vila_m3_3b"))
    assert 2 * got["vision_tower"] / 1e6 == pytest.approx(857, abs=1)
    assert 2 * got["llm"] / 1e9 == pytest.approx(4.97 + 0.429, abs=0.01)


def reference_config(llm):
    import transformers

    common = dict(
        vocab_size=llm.vocab_size,
        hidden_size=llm.hidden_size,
        intermediate_size=llm.mlp_dim,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        tie_word_embeddings=llm.tie_embeddings,
    )
    if llm.qk_norm:
        return transformers.Qwen3Config(head_dim=llm.head_dim, **common)
    return (transformers.Qwen2Config if llm.qkv_bias else transformers.LlamaConfig)(**common)


@pytest.mark.parametrize("name", sorted(llms.LLMS))
def test_llm_counts_equal_transformers(name):
    torch = pytest.importorskip("torch")
    import transformers

    cfg = models.get(f"vila_m3_3b,llm={name}")
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(reference_config(cfg.llm))
    assert counts(cfg)["llm"] == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("name", sorted(set(towers.TOWERS) - {"intern_vit_6b_448"}))
def test_siglip_counts_equal_transformers(name):
    torch = pytest.importorskip("torch")
    import transformers

    cfg = models.get(f"vila_m3_3b,tower={name}")
    tower = cfg.vision_tower
    config = transformers.SiglipVisionConfig(
        hidden_size=tower.hidden_size,
        intermediate_size=tower.mlp_dim,
        num_hidden_layers=tower.num_layers,
        num_attention_heads=tower.num_heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
    )
    with torch.device("meta"):
        reference = transformers.SiglipVisionModel(config)
    assert counts(cfg)["vision_tower"] == sum(p.numel() for p in reference.parameters())


def test_intern_vit_count():
    """5.54 billion: shards of 4.99, 4.94 and 1.15 GB in bf16."""
    got = counts(models.get("vila_m3_40b"))["vision_tower"]
    assert 2 * got / 1e9 == pytest.approx(4.99 + 4.94 + 1.15, abs=0.02)


def test_image_tokens():
    assert [vila.tokens_per_image(models.get(name)) for name in SIZES] == [196, 196, 196, 256]
    assert vila.tokens_per_image(models.get("vila_m3_8b,tower=siglip_so400m_448")) == 256
    nvila = "vila_m3_8b,tower=siglip_so400m_448,projector=mlp_downsample_3x3_fix,llm=qwen2_5_7b"
    assert vila.tokens_per_image(models.get(nvila)) == 121


@pytest.mark.parametrize("name", [*SIZES, "vila_m3_8b,llm=qwen3_8b"])
def test_shapes_pass_through(name):
    """One packed row through the abstract model: text, an image in its place, hidden states out."""
    cfg = models.get(name)
    graphdef, abstract = vila.abstract_model(cfg, "generative")
    size = cfg.image_size
    spec = jax.ShapeDtypeStruct

    def run(params, tokens, images, valid, index):
        return vila.merge(graphdef, params)(tokens, tokens, tokens, images, valid, index)

    out = jax.eval_shape(
        run,
        abstract,
        spec((1, 300), "int32"),
        spec((1, 1, size, size, 3), "uint8"),
        spec((1, 1), bool),
        spec((1, 300), "int32"),
    )
    assert out.shape == (1, 300, cfg.llm.hidden_size) and out.dtype == "bfloat16"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("vila_m3_9b", "known sizes are .*vila_m3_8b"),
        ("vila_m3_8b,llm=gpt", "llm 'gpt': unknown; known are .*qwen3_8b"),
        ("vila_m3_8b,tower=clip", "tower 'clip': unknown; known are .*siglip_so400m_384"),
        ("vila_m3_8b,head=2", "model part 'head=2'"),
    ],
)
def test_unknown_parts_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        models.get(spec)
