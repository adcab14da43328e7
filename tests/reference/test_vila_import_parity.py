"""VILA folders built from transformers' models: after the import, the logits are the same."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from tests.reference import torch_weights
from tests.reference.test_projector_parity import C, H, layers
from vilam3_jax import cli
from vilam3_jax.checkpoints import exports
from vilam3_jax.convert.importer import import_model
from vilam3_jax.convert.vila import open_vila
from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.data.tokenizer import train_bpe
from vilam3_jax.errors import UserError
from vilam3_jax.models import build

SIZE, PATCH, VOCAB = 22, 4, 300  # 5 x 5 patches, an odd grid; a border of 2 pixels is dropped
TOWER = dict(hidden_size=C, num_hidden_layers=3, num_attention_heads=2, intermediate_size=9)
LLM = dict(
    vocab_size=VOCAB,
    hidden_size=H,
    intermediate_size=14,
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=1,
    tie_word_embeddings=False,
    attn_implementation="eager",
)
LLMS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLM)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLM)),
}


def siglip():
    config = transformers.SiglipVisionConfig(
        **TOWER, image_size=SIZE, patch_size=PATCH, attn_implementation="eager"
    )
    model = torch_weights.randomise(transformers.SiglipVisionModel(config))
    values = {**config.to_dict(), "model_type": "siglip_vision_model"}
    state = torch_weights.numpy_state(model)
    state = {
        name if name.startswith("vision_model.") else f"vision_model.{name}": x for name, x in state.items()
    }

    def features(pixels):
        normal = torch.from_numpy((pixels / 127.5 - 1).transpose(0, 3, 1, 2).astype(np.float32))
        return model(pixel_values=normal, output_hidden_states=True).hidden_states[-2]

    return values, state, features, {"mm_vision_select_layer": -2, "mm_vision_select_feature": "cls_patch"}


def intern_vit():
    model = torch_weights.intern_vit_model(**TOWER, image_size=(SIZE, SIZE), patch_size=(PATCH, PATCH))
    theirs = torch_weights.numpy_state(model)
    # Tensor names and fused QKV matrix of OpenGVLab's files.
    state = {
        "embeddings.class_embedding": theirs["embeddings.cls_token"],
        "embeddings.position_embedding": theirs["embeddings.position_embeddings"],
    }
    for name in ("weight", "bias"):
        state[f"embeddings.patch_embedding.{name}"] = theirs[f"embeddings.patch_embeddings.projection.{name}"]
    for i in range(3):
        old, new = f"encoder.layer.{i}.", f"encoder.layers.{i}."
        qkv = [theirs[f"{old}attention.{name}_proj.weight"] for name in "qkv"]
        state[f"{new}attn.qkv.weight"] = np.concatenate(qkv)
        renamed = {
            "attention.q_norm.weight": "attn.q_norm.weight",
            "attention.k_norm.weight": "attn.k_norm.weight",
            "attention.projection_layer.weight": "attn.proj.weight",
            "attention.projection_layer.bias": "attn.proj.bias",
            "layernorm_before.weight": "norm1.weight",
            "layernorm_after.weight": "norm2.weight",
            "lambda_1": "ls1",
            "lambda_2": "ls2",
            **{name: name for part in ("fc1", "fc2") for name in (f"mlp.{part}.weight", f"mlp.{part}.bias")},
        }
        state |= {new + to: theirs[old + name] for name, to in renamed.items()}
    values = dict(
        model_type="intern_vit_6b",
        **TOWER,
        image_size=SIZE,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        qkv_bias=False,
        qk_normalization=True,
        hidden_act="gelu",
        norm_type="rms_norm",
    )

    def features(pixels):
        normal = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        normal = torch.from_numpy(normal.transpose(0, 3, 1, 2).astype(np.float32))
        return model(pixel_values=normal, output_hidden_states=True).hidden_states[-1][:, 1:]

    return values, state, features, {"mm_vision_select_layer": -1, "mm_vision_select_feature": "patch"}


def write_part(folder, config, state):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(value) for name, value in state.items()}, folder / "model.safetensors"
    )


def write_vila(folder, llm, kind, tower, specials=("<s>", "</s>", "<pad>")):
    """Writes a folder as VILA does; returns (pixels, tokens, image positions) -> logits of the reference."""
    torch.manual_seed(1)
    decoder = torch_weights.randomise(LLMS[llm]())
    values, state, features, root = tower()
    modules = layers(kind)
    projector = torch_weights.randomise(torch.nn.Sequential(*modules))
    weights = torch_weights.numpy_state(projector)
    stem = (lambda name: name.removeprefix("0.")) if kind == "linear" else (lambda name: name)
    write_part(folder / "vision_tower", values, state)
    write_part(
        folder / "mm_projector",
        {"model_type": "v2l_projector", "mm_projector_type": kind},
        {f"layers.{stem(name)}": value for name, value in weights.items()},
    )
    write_part(folder / "llm", decoder.config.to_dict(), torch_weights.numpy_state(decoder))
    train_bpe(["liver spleen kidney"], 270, folder / "llm", specials)
    root |= {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "image_aspect_ratio": "resize",
    }
    (folder / "config.json").write_text(json.dumps(root))

    def logits(pixels, tokens, places):
        with torch.no_grad():
            embeds = decoder.get_input_embeddings()(torch.from_numpy(tokens).long())
            visual = projector(features(pixels)).reshape(-1, H)
            embeds[:, places] = visual.reshape(len(tokens), -1, H)
            return decoder.eval()(inputs_embeds=embeds).logits.numpy()

    return logits


@pytest.mark.parametrize(
    "said, end",
    [
        ('{"_target_": "llava.model.encoders.BasicImageEncoder"}', "\n"),
        ({"_target_": "llava.model.encoders.BasicImageEncoder", "end_tokens": None}, ""),
        ({"end_tokens": "<end>"}, "<end>"),
        ("llava.model.encoders.BasicImageEncoder", "\n"),
        ({"start_tokens": "x"}, None),
        ({"end_tokens": 3}, None),
    ],
)
def test_what_an_image_encoder_puts_after_an_image(tmp_path, said, end):
    write_vila(tmp_path, "qwen2", "mlp_downsample_2x2_fix", siglip)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_encoder": said}))
    if end is None:
        with pytest.raises(UserError, match=r"config\.json: image_encoder"):
            open_vila(tmp_path)
    else:
        assert open_vila(tmp_path).config["text"]["image_end"] == end


@pytest.mark.parametrize(
    "llm, kind, tower, template",
    [
        ("llama", "mlp_downsample", siglip, "v1"),
        ("llama", "mlp_downsample", intern_vit, "v1"),
        ("llama", "linear", siglip, "v1"),
        ("qwen2", "mlp_downsample_2x2_fix", siglip, "qwen2"),
        ("qwen2", "mlp_downsample_3x3_fix", siglip, "qwen2"),
        ("qwen2", "mlp_downsample_3x3_s2_new", intern_vit, "qwen2"),
    ],
)
def test_logits_of_an_imported_folder(tmp_path, llm, kind, tower, template):
    expected = write_vila(tmp_path / "vila", llm, kind, tower)
    import_model(tmp_path / "vila", tmp_path / "out")
    params, config, tokenizer = exports.load_export(tmp_path / "out")
    assert config.template == template and (tokenizer / "tokenizer.json").exists()
    trained = dict.fromkeys(("split", "bos", "spaces"), "as_trained")
    assert dict(config.text) == {**trained, "image_end": "\n" if llm == "qwen2" else ""}
    count = config.tokens_per_image
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    tokens = rng.integers(0, VOCAB, (2, count + 7)).astype(np.int32)
    places = 3 + np.arange(count)
    index = np.full(tokens.shape, -1, np.int32)
    index[:, places] = np.arange(count)
    config = config.replace(dtype="float32")
    graphdef, _ = build.abstract_model(config, "generative")
    model = build.merge(graphdef, params)
    with jax.default_matmul_precision("highest"):
        hidden = model(
            PackedBatch(
                tokens=jnp.asarray(tokens),
                segment_ids=jnp.ones_like(tokens),
                positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
                loss_weights=None,
                visual_index=jnp.asarray(index),
                images=jnp.asarray(pixels)[:, None],
                image_valid=jnp.ones((2, 1), bool),
            )
        )
        actual = np.asarray(model.llm.logits(hidden))
    np.testing.assert_allclose(actual, expected(pixels, tokens, places), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "specials, template",
    [
        (("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"), "llama_3"),
        (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "hermes-2"),
    ],
)
def test_the_tokenizer_tells_the_conversation_mode(tmp_path, specials, template):
    write_vila(tmp_path / "vila", "llama", "mlp_downsample", siglip, specials)
    import_model(tmp_path / "vila", tmp_path / "out")
    assert exports.load_model_config(tmp_path / "out").template == template


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres'"),
        ({"image_aspect_ratio": "dynamic", "min_tiles": 2}, "min_tiles=2"),
        ({"s2": True}, "s2_scales=None"),
        ({"s2": True, "s2_scales": "22,44"}, "config and weights are of different models"),
        ({"s2": True, "s2_scales": "22,40"}, "increasing multiples of the tower's 22"),
        ({"s2": True, "s2_scales": "22,44", "s2_max_split_size": 44}, "s2_max_split_size=44"),
        ({"mm_vision_select_feature": "patch"}, "wrong token"),
        ({"mm_vision_select_layer": -9}, "select_layer=-9 is not one of"),
        ({"mm_vision_select_layer": "last"}, "mm_vision_select_layer='last' is not an integer"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"vision_resolution": 44}, "vision_resolution=44"),
        ({"image_aspect_ratio": "dynamic_s2", "s2_scales": "22,44"}, "s2_resize_output_to_scale_idx=0"),
        ({"vilam3_jax": {"template": ["x"]}}, "vilam3_jax.template="),
        ({"vilam3_jax": {"template": "x"}}, "vilam3_jax.template='x' is unknown"),
        ({"vilam3_jax": {"text": {"split": "x"}}}, "vilam3_jax.text: text rule split='x'"),
        ({"vilam3_jax": {"text": 3}}, "vilam3_jax.text"),
        ({"ps3": True}, "ps3=True"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type='spatial'"),
    ],
)
def test_roots_that_ask_for_more_are_refused(tmp_path, change, message):
    write_vila(tmp_path / "vila", "llama", "mlp_downsample", siglip)
    file = tmp_path / "vila" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        import_model(tmp_path / "vila", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_null_counts_as_absent(tmp_path):
    write_vila(tmp_path, "llama", "mlp_downsample", siglip)
    plain = open_vila(tmp_path).config
    file = tmp_path / "config.json"
    keys = ("max_tiles", "min_tiles", "s2", "s2_scales", "vision_resolution", "image_encoder", "ps3")
    root = json.loads(file.read_text()) | dict.fromkeys(keys)
    del root["mm_vision_select_layer"], root["image_aspect_ratio"]
    selected = dict.fromkeys(("mm_vision_select_layer", "mm_vision_select_feature", "image_aspect_ratio"))
    file.write_text(json.dumps(root | selected))
    assert open_vila(tmp_path).config == plain


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("llm/adapter_config.json", {}, "llm: holds a model and an unmerged adapter"),
        ("llm/hf_quant_config.json", {}, "llm: holds weights quantised by ModelOpt"),
        ("adapter_config.json", {}, "is an adapter"),
        ("vision_tower/preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.5]}, "image_mean="),
        ("vision_tower/processor_config.json", {"image_processor": {"resample": 2}}, "resample=2"),
    ],
)
def test_files_beside_the_parts(tmp_path, name, content, message):
    write_vila(tmp_path / "vila", "llama", "mlp_downsample", siglip)
    (tmp_path / "vila" / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        import_model(tmp_path / "vila", tmp_path / "out")


def test_a_missing_part_and_a_projector_of_another_model(tmp_path, capsys):
    write_vila(tmp_path / "vila", "llama", "mlp_downsample", siglip)
    projector = tmp_path / "vila" / "mm_projector"
    (projector / "config.json").write_text(json.dumps({"mm_projector_type": "mlp2x_gelu"}))
    command = ["convert", "import", "--source", str(tmp_path / "vila"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "tensors not used: layers.1" in capsys.readouterr().err
    (projector / "config.json").unlink()
    assert cli.main(command) == 2
    assert "mm_projector: has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
