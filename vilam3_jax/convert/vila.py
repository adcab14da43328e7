"""Folders of VILA, VILA-1.5, VILA-M3 and NVILA: `llm/`, `vision_tower/` and `mm_projector/`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from vilam3_jax.convert.config_checks import check_quantisation
from vilam3_jax.convert.huggingface import licence, open_folder
from vilam3_jax.convert.safetensors_files import SafetensorsFolder, read_config
from vilam3_jax.convert.sources import Checkpoint, Source
from vilam3_jax.data.experts.cards import with_card_list
from vilam3_jax.data.experts.exchange import Style
from vilam3_jax.data.experts.record import THRESHOLD
from vilam3_jax.data.experts.wording import WORDINGS
from vilam3_jax.data.preprocessing import Preprocessing
from vilam3_jax.data.templates import TEMPLATES
from vilam3_jax.data.text_rules import TextRules
from vilam3_jax.data.tokenizer import Tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.models import families, projector
from vilam3_jax.models.hugging_face import refuse
from vilam3_jax.models.model_config import ModelConfig

PARTS = {"vision_tower": "vision_tower", "projector": "mm_projector", "llm": "llm"}


def open_vila(folder: Path, tokenizer: Tokenizer | None = None) -> Checkpoint:
    """Opens a VILA folder.

    The root's config.json selects the tower's hidden state. Released folders state neither the conversation
    mode nor the order of image tokens; both follow from the LLM, see `_template` and `_token_order`.

    Args:
      folder: with `config.json` and the parts.
      tokenizer: replaces the folder's.

    Raises:
      UserError: a part is missing, or a setting is not supported.
    """
    config_file = folder / "config.json"
    root = read_config(config_file)
    released = not isinstance(root.get("vilam3_jax"), dict)
    own = {} if released else root["vilam3_jax"]
    for name in PARTS.values():
        if not (folder / name / "config.json").exists():
            raise UserError(f"{folder / name}: has no config.json; download the whole model folder")
    llm = _open_part(folder / PARTS["llm"], "llm")
    tower = _open_tower(folder / PARTS["vision_tower"], root, config_file)
    images = _images(root, tower.config, config_file)
    width = tower.config["hidden_size"] * max(len(images["s2_scales"]), 1)
    joint = _open_projector(folder / PARTS["projector"], width, llm)
    order = _stated(own, "token_order", ("column", "row"), config_file)
    joint.config["token_order"] = order or _token_order(joint.config["type"], llm)
    if released:
        text = TextRules(*("as_trained",) * 3, image_end=_image_end(root, llm, config_file))
    else:
        text = _parsed(TextRules.of, own.get("text"), f"{config_file}: vilam3_jax.text")
    where = f"{config_file}: vilam3_jax.preprocessing"
    preprocessing = _parsed(Preprocessing.of, own.get("preprocessing"), where)
    for part in (llm, tower, joint):
        part.licence = part.licence or licence(folder)
    config = {
        **images,
        "template": _stated(own, "template", TEMPLATES, config_file) or _template(llm, tokenizer),
        "text": dataclasses.asdict(text),
        "preprocessing": dataclasses.asdict(preprocessing),
        **_experts(own, config_file),
        "tokenizer": "",
        "dtype": "bfloat16",
        "remat": "none",
        "vision_tower": tower.config,
        "projector": joint.config,
        "llm": llm.config,
    }
    return Checkpoint("generative", config, [tower, joint, llm])


def vila_folder_config(
    model: ModelConfig, dtype: str, parts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The root's config.json; `open_vila` reads it back.

    Args:
      model: our model config.
      dtype: dtype of the weights.
      parts: sub-folder → its config.json.
    """
    tower, layout = model.vision_tower, model.image_layout
    assert model.projector is not None
    return {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "llm_cfg": parts[PARTS["llm"]],
        "vision_tower_cfg": parts[PARTS["vision_tower"]],
        "mm_projector_cfg": parts[PARTS["projector"]],
        "resume_path": None,
        "hidden_size": model.llm.hidden_size,
        "mm_hidden_size": tower.hidden_size * layout.feature_maps,
        "mm_vision_select_layer": tower.select_layer,
        "mm_vision_select_feature": _selected_feature(tower),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": layout.mode,
        **({"max_tiles": layout.max_tiles} if layout.mode.startswith("dynamic") else {}),
        "s2": bool(layout.scales) and layout.mode != "dynamic_s2",
        "dynamic_s2": layout.mode == "dynamic_s2",
        "s2_resize_output_to_scale_idx": -1 if layout.mode == "dynamic_s2" else 0,
        "s2_scales": ",".join(str(side) for side in layout.scales),
        "s2_max_split_size": layout.tile_size,
        "num_video_frames": 8,
        "fps": 0.0,
        "vision_resolution": -1,
        "interpolate_mode": "linear",
        "drop_path_rate": 0.0,
        "tune_language_model": True,
        "tune_vision_tower": True,
        "tune_mm_projector": True,
        "model_dtype": f"torch.{dtype}",
        # VILA ignores unknown keys; released folders imply these settings.
        "vilam3_jax": {
            "template": model.template,
            "text": dataclasses.asdict(TextRules.of(model.text)),
            "preprocessing": dataclasses.asdict(Preprocessing.of(model.preprocessing)),
            "token_order": model.projector.token_order,
            "card_list": with_card_list(model.to_dict())["card_list"],
            "expert_wording": model.expert_wording,
            "expert_verdicts": model.expert_verdicts,
            "expert_threshold": model.expert_threshold,
        },
    }


def _parsed(parse: Callable[[Any], Any], value: Any, what: str) -> Any:
    """A parsed value; errors name `what`."""
    try:
        return parse(value)
    except (TypeError, ValueError, UserError) as error:
        raise UserError(f"{what}: {error}") from error


def _stated(own: Mapping[str, Any], key: str, choices: Collection[str], where: Path) -> str | None:
    """A setting that `vila_folder_config` wrote; None in other folders."""
    value = own.get(key)
    if value is not None and value not in tuple(choices):
        raise UserError(f"{where}: vilam3_jax.{key}={value!r} is unknown; use one of {', '.join(choices)}")
    return value


def _experts(own: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Settings of expert models; those of VILA-M3 unless the folder states others."""
    wording = own.get("expert_wording", "vila_m3")
    verdicts = own.get("expert_verdicts", False)
    if wording not in WORDINGS or not isinstance(verdicts, bool):
        raise UserError(
            f"{where}: vilam3_jax: expert_wording {wording!r} must be one of {', '.join(WORDINGS)} and "
            f"expert_verdicts {verdicts!r} true or false"
        )
    found = {
        "cards": "vila_m3",
        "expert_wording": wording,
        "expert_verdicts": verdicts,
        "expert_threshold": own.get("expert_threshold", THRESHOLD),
    }
    _parsed(Style.of, found, f"{where}: vilam3_jax")
    cards = {"card_list": own["card_list"]} if "card_list" in own else {}
    return _parsed(with_card_list, {**found, **cards}, str(where))


def _image_end(root: Mapping[str, Any], llm: Source, where: Path) -> str:
    """Text after every image: a line end in NVILA, unless its `image_encoder` states another."""
    encoder = root.get("image_encoder")
    if isinstance(encoder, str):
        try:
            encoder = json.loads(encoder)
        except ValueError:
            encoder = {"_target_": encoder}
    if not isinstance(encoder, dict):
        return "\n" if _is_qwen(llm) else ""
    start, end = encoder.get("start_tokens"), encoder.get("end_tokens", "\n")
    if start or not isinstance(end, str | None):
        raise UserError(
            f"{where}: image_encoder has start_tokens={start!r}, end_tokens={end!r}; only text after an "
            "image is supported"
        )
    return end or ""


def _images(root: Mapping[str, Any], tower: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The image layout of the root's config.json, as keys of our model config; null counts as absent.

    Raises:
      UserError: a setting is not supported.
    """
    stated = {key: value for key, value in root.items() if value is not None}
    refuse(
        stated, where, {"mm_use_im_start_end": (False,), "mm_patch_merge_type": ("flat",), "ps3": (False,)}
    )
    mode = stated.get("image_aspect_ratio", "resize")
    size = tower["image_size"]
    found: dict[str, Any] = {"image_size": size, "image_aspect_ratio": mode, "s2_scales": ()}
    found["max_tiles"] = stated.get("max_tiles", 12)
    fixed = {"min_tiles": 1}
    if stated.get("vision_resolution", -1) != -1:
        fixed["vision_resolution"] = size
    if stated.get("s2") or mode == "dynamic_s2":
        found["s2_scales"] = _scales(stated.get("s2_scales"), where)
        fixed |= {"s2_max_split_size": size, "s2_resize_output_to_scale_idx": -(mode == "dynamic_s2")}
    for key, value in fixed.items():
        default = 0 if key == "s2_resize_output_to_scale_idx" else value  # 0 is VILA's default
        given = stated.get(key, default)
        if isinstance(given, bool) or given != value:
            raise UserError(f"{where}: {key}={given!r} is not supported, only {value!r} is")
    if isinstance(found["max_tiles"], bool):
        raise UserError(f"{where}: max_tiles={found['max_tiles']!r}, a number was expected")
    _parsed(lambda tower: ModelConfig(vision_tower=tower, **found).image_layout, dict(tower), str(where))
    return found


def _scales(value: Any, where: Path) -> tuple[int, ...]:
    """Parses '384,768', or NVILA's lists."""
    pieces = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(int(piece) for piece in pieces)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: s2_scales={value!r}, sides in pixels such as '384,768' were expected"
        ) from error


def _open_part(folder: Path, component: str) -> Source:
    part = open_folder(folder)
    if part.component != component:
        raise UserError(f"{folder / 'config.json'}: is a {part.component}, a {component} was expected")
    return part


def _open_tower(folder: Path, root: Mapping[str, Any], where: Path) -> Source:
    tower = _open_part(folder, "vision_tower")
    kept = _selected_feature(families.config_of("vision_tower", tower.config))
    selected = root.get("mm_vision_select_feature") or kept
    if selected != kept:
        raise UserError(
            f"{where}: mm_vision_select_feature={selected!r} with a {tower.config['type']} tower would drop "
            f"or keep the wrong token; {kept!r} was expected"
        )
    layer = root.get("mm_vision_select_layer")
    layer = tower.config["select_layer"] if layer is None else layer
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise UserError(f"{where}: mm_vision_select_layer={layer!r} is not an integer; download it again")
    tower.config["select_layer"] = layer
    return tower


def _selected_feature(tower: Any) -> str:
    """VILA's name for the kept positions: 'patch' drops a class token, 'cls_patch' keeps all."""
    patches = families.get("vision_tower", tower.type).patches
    assert patches is not None
    has_class_token = patches(tower) > (tower.image_size // tower.patch_size) ** 2
    return "patch" if has_class_token else "cls_patch"


def _open_projector(folder: Path, width: int, llm: Source) -> Source:
    config_file = folder / "config.json"
    kind = read_config(config_file).get("mm_projector_type")
    if not isinstance(kind, str):
        raise UserError(f"{config_file}: mm_projector_type is {kind!r}, a name was expected")
    weights = SafetensorsFolder(folder)
    check_quantisation({}, [*weights.shapes, *weights.unlisted], weights.files[0])
    layers = projector.layers_of(kind, width, llm.config["hidden_size"])
    return Source(
        component="projector",
        config={"type": kind},
        tensors=weights.shapes,
        rules=projector.tensors(kind, layers),
        reader=weights,
        files=[config_file, *weights.files],
        dtypes=weights.dtypes,
    )


def _is_qwen(llm: Source) -> bool:
    return bool(llm.config.get("qkv_bias") or llm.config.get("qk_norm"))


def _token_order(kind: str, llm: Source) -> str:
    """'mlp_downsample' was column-major until NVILA, whose LLMs are Qwens."""
    return "column" if kind == "mlp_downsample" and not _is_qwen(llm) else "row"


def _template(llm: Source, tokenizer: Tokenizer | None) -> str:
    """The conversation mode of a released model, by the control tokens of its tokenizer."""
    if _is_qwen(llm):
        return "qwen2"
    if tokenizer is None and llm.tokenizer is not None:
        tokenizer = llm.tokenizer()
    if tokenizer is None:
        raise UserError(
            f"{llm.files[0].parent}: has no tokenizer; download the whole model folder or give --tokenizer"
        )
    if "<|start_header_id|>" in tokenizer.special_tokens:
        return "llama_3"
    return "hermes-2" if "<|im_start|>" in tokenizer.special_tokens else "v1"
