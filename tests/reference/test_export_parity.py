"""transformers loads our exports as the model that was imported."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.reference import torch_weights
from vilam3_jax.checkpoints import exports
from vilam3_jax.convert.exporter import export_folder
from vilam3_jax.convert.importer import import_model
from vilam3_jax.models import build

SIZES = dict(
    vocab_size=80,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attn_implementation="eager",
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
    rope_theta=5e3,
)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("Llama", {}),
        ("Llama", dict(tie_word_embeddings=True, head_dim=10)),
        ("Llama", dict(attention_bias=True)),
        ("Llama", dict(rope_parameters=LLAMA3_ROPE)),
        ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=2e4))),
        ("Qwen2", dict(tie_word_embeddings=True)),
        ("Qwen3", dict(head_dim=8)),
    ],
)
def test_decoders(tmp_path, family, changes):
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = torch_weights.randomise(getattr(transformers, f"{family}ForCausalLM")(config)).eval()
    model.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model) and loaded.config.max_position_embeddings == 64
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        np.testing.assert_array_equal(loaded.eval()(tokens).logits, model(tokens).logits)


def test_siglip(tmp_path):
    config = transformers.SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=20,
        patch_size=4,
        attn_implementation="eager",
    )
    model = torch_weights.randomise(transformers.SiglipVisionModel(config)).eval()
    model.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    loaded, report = transformers.SiglipVisionModel.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (
            m(pixels, output_hidden_states=True, interpolate_pos_encoding=False)
            for m in (loaded.eval(), model)
        )
    np.testing.assert_array_equal(found.pooler_output, expected.pooler_output)
    np.testing.assert_array_equal(found.hidden_states[-2], expected.hidden_states[-2])
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "back", use_fast=False)
    grey = processor(np.full((30, 50, 3), 255, np.uint8), return_tensors="np").pixel_values
    assert grey.shape == (1, 3, 20, 20) and np.allclose(grey, 1)


def test_both_towers_of_a_siglip(tmp_path):
    shape = dict(hidden_size=24, intermediate_size=40, num_attention_heads=3)
    config = transformers.SiglipConfig(
        text_config=dict(**shape, num_hidden_layers=2, vocab_size=50, max_position_embeddings=9),
        vision_config=dict(**shape, num_hidden_layers=3, image_size=20, patch_size=4),
        attn_implementation="eager",
    )
    model = torch_weights.randomise(transformers.SiglipModel(config)).eval()
    model.save_pretrained(tmp_path / "theirs")
    summary = import_model(tmp_path / "theirs", tmp_path / "ours")
    assert summary.component == "contrastive" and not summary.unused
    params, settings, _ = exports.load_export(tmp_path / "ours")
    settings = settings.replace(dtype="float32")
    ours = build.merge(build.abstract_model(settings, "contrastive")[0], params)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 20, 20, 3), np.uint8)
    tokens = rng.integers(0, 50, (3, 9))
    with jax.default_matmul_precision("highest"):
        image, text = ours(pixels, tokens, np.ones_like(tokens, bool))
    logits = np.exp(ours.logit_scale[...]) * np.asarray(text) @ np.asarray(image).T + ours.logit_bias[...]
    normal = torch.from_numpy((pixels / 127.5 - 1).transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens), pixel_values=normal).logits_per_text
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)

    export_folder(tmp_path / "ours", tmp_path / "back")
    loaded, report = transformers.SiglipModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)
    import_model(tmp_path / "theirs", tmp_path / "tower", source_format="hugging_face")
    assert exports.load_model_config(tmp_path / "tower").kind == "vision_tower"
