"""Parameter counts of the published sizes: against publications, and against transformers."""

from __future__ import annotations

import jax
import pytest
from absl import flags
from vilam3_jax.configs import models
from vilam3_jax.configs.models.parts import llms, towers

from vilam3_jax import config as config_lib
from vilam3_jax import tasks  # noqa: F401, registers batches as pytrees
from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.errors import UserError
from vilam3_jax.models import build, model_config
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib

SIZES = ("vila_m3_3b", "vila_m3_8b", "vila_m3_13b", "vila_m3_40b")
# Projectors: computed from the released shapes; those of 8B and 13B match the released files' sizes in bf16.
# LLMs: totals of the model cards (8B has [PAD], one more row in both tables).
PUBLISHED = {
    "vila_m3_3b": {"projector": 18_364_416},
    "vila_m3_8b": {"projector": 35_668_992, "llm": 8_030_261_248 + 2 * 4096},
    "vila_m3_13b": {"projector": 49_826_816, "llm": 13_015_864_320},
    "vila_m3_40b": {"projector": 143_170_560, "llm": 34_388_917_248},
}


@pytest.mark.parametrize("name", SIZES)
def test_published_counts(name):
    got = build.parameter_counts(models.get(name))
    assert {part: got[part] for part in PUBLISHED[name]} == PUBLISHED[name]


def test_released_file_sizes():
    """Bytes of the released bf16 files: SigLIP 857 MB, Sheared-LLaMA 4.97 GB + 429 MB."""
    got = build.parameter_counts(models.get("vila_m3_3b"))
    assert 2 * got["vision_tower"] / 1e6 == pytest.approx(857, abs=1)
    assert 2 * got["llm"] / 1e9 == pytest.approx(4.97 + 0.429, abs=0.01)


# Sizes from the checkpoints' config.json, independent of ours. Totals are those that the model cards round
# (Qwen2.5 7.61B and 1.54B, Qwen3 8.2B), or follow from the files' bytes in bf16.
PUBLISHED_LLMS = {
    "sheared_llama_2_7b": ("Llama", (32_000, 2560, 6912, 32, 20, 20), {}, 2_701_560_320),
    "llama3_8b": ("Llama", (128_257, 4096, 14_336, 32, 32, 8), {}, 8_030_261_248 + 2 * 4096),
    "llama3_1_8b": ("Llama", (128_256, 4096, 14_336, 32, 32, 8), {}, 8_030_261_248),
    "vicuna_13b": ("Llama", (32_000, 5120, 13_824, 40, 40, 40), {}, 13_015_864_320),
    "yi_34b": ("Llama", (64_000, 7168, 20_480, 60, 56, 8), {}, 34_388_917_248),
    "qwen2_5_7b": ("Qwen2", (152_064, 3584, 18_944, 28, 28, 4), {}, 7_615_616_512),
    "qwen2_5_1_5b": (
        "Qwen2",
        (151_936, 1536, 8960, 28, 12, 2),
        {"tie_word_embeddings": True},
        1_543_714_304,
    ),
    "qwen3_8b": ("Qwen3", (151_936, 4096, 12_288, 36, 32, 8), {"head_dim": 128}, 8_190_735_360),
}
SIZE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def number_of_parameters(make):
    """Parameters of a PyTorch model, without allocating it."""
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize("name", sorted(llms.LLMS))
def test_llm_counts_equal_transformers(name):
    family, sizes, others, total = PUBLISHED_LLMS[name]
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        **dict(zip(SIZE_KEYS, sizes, strict=True)), **{"tie_word_embeddings": False, **others}
    )
    model = getattr(transformers, f"{family}ForCausalLM")
    assert number_of_parameters(lambda: model(config)) == total
    assert build.parameter_counts(models.get(f"vila_m3_3b,llm={name}"))["llm"] == total


def test_smollm2_count():
    """The published model, with tied embeddings: 134,515,008 parameters."""
    config = models.get("smollm2_135m")
    config.llm.lora_rank = 0
    assert build.parameter_counts(config)["llm"] == 134_515_008


# image size, patch, hidden, MLP, layers, heads; text vocabulary.
PUBLISHED_SIGLIPS = {
    "siglip_so400m_384": ((384, 14, 1152, 4304, 27, 16), 32_000),
    "siglip_so400m_448": ((448, 14, 1152, 4304, 27, 16), 32_000),
    "siglip2_so400m_384": ((384, 14, 1152, 4304, 27, 16), 256_000),
    "siglip_base_224": ((224, 16, 768, 3072, 12, 12), 32_000),
}


@pytest.mark.parametrize("name", sorted(set(towers.TOWERS) - {"intern_vit_6b_448"}))
def test_siglip_counts_equal_transformers(name):
    """Both towers with the two scalars, and the vision tower alone."""
    transformers = pytest.importorskip("transformers")
    (image_size, patch_size, *rest), vocabulary = PUBLISHED_SIGLIPS[name]
    sizes = dict(
        zip(
            ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            rest,
            strict=True,
        )
    )
    # PaliGemma's tower has no pooling head.
    head = name != "siglip_so400m_448"
    vision = dict(image_size=image_size, patch_size=patch_size, vision_use_head=head, **sizes)
    text = dict(vocab_size=vocabulary, **sizes)
    config = transformers.SiglipConfig(vision_config=vision, text_config=text)
    cfg = models.get(f"vila_m3_3b,tower={name}")
    want = number_of_parameters(lambda: transformers.SiglipModel(config))
    assert sum(build.parameter_counts(cfg, "contrastive").values()) == want
    vision = number_of_parameters(lambda: transformers.SiglipVisionModel(config.vision_config))
    assert build.parameter_counts(cfg)["vision_tower"] == vision
    if name == "siglip_so400m_384":
        assert vision == 428_225_600


def test_intern_vit_count():
    """Shards of 4.99, 4.94 and 1.15 GB in bf16, so 5.54 billion parameters."""
    transformers = pytest.importorskip("transformers")
    config = transformers.InternVLVisionConfig(
        hidden_size=3200,
        num_hidden_layers=45,
        num_attention_heads=25,
        intermediate_size=12_800,
        image_size=(448, 448),
        patch_size=(14, 14),
        norm_type="rms_norm",
        use_qk_norm=True,
        attention_bias=False,
        use_absolute_position_embeddings=True,
    )
    got = build.parameter_counts(models.get("vila_m3_40b"))["vision_tower"]
    assert got == number_of_parameters(lambda: transformers.InternVLVisionModel(config))
    assert 2 * got / 1e9 == pytest.approx(4.99 + 4.94 + 1.15, abs=0.02)


def test_image_tokens():
    def tokens(name):
        return model_config.resolve(models.get(name)).tokens_per_image

    assert [tokens(name) for name in SIZES] == [196, 196, 196, 256]
    assert tokens("vila_m3_8b,tower=siglip_so400m_448") == 256
    nvila = "vila_m3_8b,tower=siglip_so400m_448,projector=mlp_downsample_3x3_fix,llm=qwen2_5_7b"
    assert tokens(nvila) == 121


@pytest.mark.parametrize("name", [*SIZES, "vila_m3_8b,llm=qwen3_8b"])
def test_shapes_pass_through(name):
    """One packed row with an image through the abstract model."""
    cfg = models.get(name)
    graphdef, abstract = build.abstract_model(cfg, "generative")
    size = cfg.image_size
    integers = jax.ShapeDtypeStruct((1, 300), "int32")
    batch = PackedBatch(
        tokens=integers,
        segment_ids=integers,
        positions=integers,
        loss_weights=jax.ShapeDtypeStruct((1, 300), "float32"),
        visual_index=integers,
        images=jax.ShapeDtypeStruct((1, 1, size, size, 3), "uint8"),
        image_valid=jax.ShapeDtypeStruct((1, 1), bool),
    )
    out = jax.eval_shape(lambda params, batch: build.merge(graphdef, params)(batch), abstract, batch)
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


def test_widths_that_differ_are_named():
    with pytest.raises(UserError, match="tower has 1152 and the LLM 4096"):
        build.parameter_counts(models.get("vila_m3_8b,projector=identity"))


def test_one_number_of_a_published_size_is_overridden():
    """Lowers the sharded step that `vilam3 train` would run with this command line."""
    argv = ["--config=configs/stage3_instruct.py:vila_m3_8b", "--config.model.llm.num_layers=2"]
    argv += ["--config.mesh.fsdp=8", "--config.data.seq_len=300"]
    config = config_lib.parse(argv, flags.FlagValues())
    program = program_lib.build(config, mesh_lib.build_mesh(config.mesh))
    assert program.state.trainable["llm/layers/attn/q/kernel"].shape == (2, 4096, 4096)
    rows, length, size = config.data.global_rows, config.data.seq_len, config.model.image_size
    assert program.batch.tokens.shape == (rows, 300) == (rows, length)
    assert program.batch.images.shape[2:] == (size, size, 3) and program.batch.images.dtype == "uint8"
    after, metrics = program.lower().out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), program.state
    )
    assert metrics["loss"].shape == ()
