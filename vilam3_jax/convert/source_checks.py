"""What a source of `vilam3 convert import` is where it is no model that can be read, and what to do."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vilam3_jax.convert.safetensors_files import read_config
from vilam3_jax.convert.torch_files import NO_WEIGHTS
from vilam3_jax.data import file_kinds
from vilam3_jax.errors import UserError

_ORIGINAL = "import the unquantised model that it was made from"
_HUGGING_FACE = "give the Hugging Face folder of that model (config.json and safetensors)"
_TORCH_FILES = "save it as safetensors, or import with --torch_files"
_PICKLES = ("bin", "pt", "pth")
# Folders that are known by a file, whatever else they hold: pattern of its name, what they are, what to do.
_FOLDERS = (
    (
        "adapter_config.json",
        "is an adapter (PEFT or LoRA) without its base model",
        "merge both with `merge_and_unload()` and give the merged folder",
    ),
    ("adapter_model.*", "is an adapter (PEFT or LoRA) without its base model", "give the merged model"),
    ("non_lora_trainables.bin", "is an unmerged LoRA of LLaVA", "merge it into its base model first"),
    ("zero_to_fp32.py", "is a DeepSpeed checkpoint", "run its zero_to_fp32.py and give the model folder"),
    ("*.distcp", "is a distributed checkpoint of PyTorch", "save the model with `save_pretrained` first"),
    ("latest_checkpointed_iteration.txt", "is a Megatron checkpoint", _HUGGING_FACE),
    ("*.nemo", "holds a NeMo checkpoint", _HUGGING_FACE),
    ("model_index.json", "is a diffusers pipeline", "give the folder of a language or vision model"),
    ("open_clip_config.json", "is an OpenCLIP model", "give the same model in transformers' layout"),
    ("params.json", "is in Meta's or Mistral's own layout", _HUGGING_FACE),
    ("_CHECKPOINT_METADATA", "is an Orbax checkpoint", "it needs no import"),
    ("model.json", "is an export of this package already", "it needs no import"),
    ("quant_config.json", "holds quantised weights", _ORIGINAL),
    ("quantize_config.json", "holds weights quantised by GPTQ", _ORIGINAL),
    ("hf_quant_config.json", "holds weights quantised by ModelOpt", _ORIGINAL),
)
_SAVE = "save the model as safetensors"
_ORIGIN = "give the model that it was made from"
# Weights and graphs of other programs, by the suffixes of their files.
_FOREIGN = (
    ("*.ckpt", "PyTorch or TensorFlow weights", _SAVE),
    ("*.ckpt.index", "TensorFlow weights", _SAVE),
    ("*.h5", "TensorFlow or Keras weights", _SAVE),
    ("*.keras", "Keras weights", _SAVE),
    ("*.msgpack", "Flax weights (msgpack)", _SAVE),
    ("*.npz", "NumPy arrays", _SAVE),
    ("*.onnx", "an ONNX graph", _ORIGIN),
    ("openvino_model.xml", "an OpenVINO graph", _ORIGIN),
    ("*.engine", "a TensorRT engine", _ORIGIN),
    ("*.tflite", "a TensorFlow Lite graph", _ORIGIN),
)
_UNFINISHED = ("*.incomplete", "*.crdownload", "*.part")
# Folders without safetensors, by the weights that they have instead.
_WEIGHTS = (
    ("*.gguf", "its weights are in a GGUF file", "give that file as --source"),
    ("pytorch_model*.bin", "has only pytorch_model.bin, which can run code when opened", _TORCH_FILES),
    *(
        (f"*.{kind}", "has only PyTorch weights, which can run code when opened", _TORCH_FILES)
        for kind in _PICKLES
    ),
    *((pattern, f"has only {what}", advice) for pattern, what, advice in _FOREIGN),
    ("saved_model.pb", "is a TensorFlow SavedModel", _SAVE),
    *((pattern, "is a download that did not end", "download it again") for pattern in _UNFINISHED),
)
_FILES = (
    ("*.safetensors", "is one file of weights", "give the folder that also holds its config.json"),
    ("*.index.json", "is the index of a model", "give its folder"),
    ("config.json", "is the config of a model", "give its folder"),
    *(
        (f"*.{kind}", "is a file of PyTorch weights", "give its folder with --torch_files")
        for kind in _PICKLES
    ),
    *((pattern, f"is a file of {what}", advice) for pattern, what, advice in _FOREIGN),
    *((pattern, "is a download that did not end", "download it again") for pattern in _UNFINISHED),
)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_SHOWN = 5


def refuse_file(file: Path) -> UserError:
    """The error for a source that is a file, but no GGUF."""
    kind = file_kinds.identify(file)
    if kind in (*file_kinds.STAND_INS, file_kinds.EMPTY):
        return file_kinds.refusal(file, kind)
    for pattern, what, advice in _FILES:
        if fnmatch.fnmatch(file.name, pattern):
            return UserError(f"{file}: {what}; {advice}")
    if "unpack" in kind.advice:
        return file_kinds.refusal(file, kind)
    return UserError(
        f"{file}: {kind.name}, not a GGUF file; --source is a GGUF file or a Hugging Face model folder"
    )


def check_folder(folder: Path) -> None:
    """Refuses a folder that is known to be something else than a model in transformers' layout.

    Raises:
      UserError: says what the folder is, and what to give or do instead.
    """
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if not names:
        raise UserError(f"{folder}: an empty folder; download the model into it")
    _check_hub_cache(folder, names)
    _check_adapter_and_others(folder, names)
    for name in names:
        if name.endswith((".safetensors", ".json", ".gguf")):
            _check_stand_in(folder / name)
    if "config.json" not in names:
        _check_without_config(folder, names)


def check_weights(folder: Path) -> None:
    """Refuses a folder whose weights are of another kind, quantised, or shards without an index.

    A folder without weights passes: whoever opens it says what is missing.

    Raises:
      UserError: see `check_folder`.
    """
    if not folder.is_dir():
        return
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(NO_WEIGHTS))
    config = read_config(folder / "config.json") if "config.json" in names else {}
    if method := _quantisation(config):
        raise UserError(f"{folder / 'config.json'}: the weights are quantised ({method}); {_ORIGINAL}")
    if _INDEX in names or _SINGLE in names:
        return
    if weights := [name for name in names if name.endswith(".safetensors")]:
        raise _unreachable(folder, weights)
    for pattern, what, advice in _WEIGHTS:
        if fnmatch.filter(names, pattern):
            raise UserError(f"{folder}: {what}; {advice}")


def _check_hub_cache(folder: Path, names: Sequence[str]) -> None:
    models = [name for name in names if name.startswith("models--")]
    if models and "config.json" not in names:
        raise UserError(
            f"{folder}: a cache of the Hugging Face hub; give the folder below snapshots/ of one model: "
            f"{_listed(models)}"
        )
    if "snapshots" not in names or "config.json" in names:
        return
    snapshots = sorted(entry.name for entry in (folder / "snapshots").iterdir() if entry.is_dir())
    if not snapshots:
        raise UserError(
            f"{folder}: a cache of the Hugging Face hub with no snapshots; download the model again"
        )
    reference = folder / "refs" / "main"
    main = reference.read_text(errors="replace").strip()[:64] if reference.is_file() else ""
    chosen = main if main in snapshots else snapshots[-1]
    others = f" (or another of {len(snapshots)})" if len(snapshots) > 1 else ""
    raise UserError(
        f"{folder}: a cache of the Hugging Face hub; give {folder / 'snapshots' / chosen}{others} as --source"
    )


def _check_adapter_and_others(folder: Path, names: Sequence[str]) -> None:
    for pattern, what, advice in _FOLDERS:
        if not fnmatch.filter(names, pattern):
            continue
        if pattern.startswith("adapter") and (_SINGLE in names or _INDEX in names):
            what, advice = (
                "holds a model and an unmerged adapter",
                "merge them, or take the adapter's files away",
            )
        elif pattern in ("params.json", "model.json") and "config.json" in names:
            continue
        raise UserError(f"{folder}: {what}; {advice}")


def _check_stand_in(file: Path) -> None:
    if not file.is_file():
        return
    kind = file_kinds.identify(file)
    if kind in file_kinds.STAND_INS:
        raise file_kinds.refusal(file, kind)


def _check_without_config(folder: Path, names: Sequence[str]) -> None:
    inside = [name for name in names if (folder / name / "config.json").is_file()]
    if any(fnmatch.fnmatch(name, "*.gguf") for name in names):
        return
    if checkpoints := [name for name in inside if re.fullmatch(r"checkpoint-\d+", name)]:
        raise UserError(
            f"{folder}: a training folder; give one of its checkpoints as --source: {_listed(checkpoints)}"
        )
    if len(inside) == 1:
        raise UserError(f"{folder}: the model lies one folder deeper; give {folder / inside[0]} as --source")
    if inside:
        raise UserError(f"{folder}: holds {len(inside)} models; give one as --source: {_listed(inside)}")
    weights = [name for name in names if name.endswith(".safetensors")]
    if weights:
        raise UserError(f"{folder}: holds {_listed(weights)} but no config.json; download it into the folder")
    check_weights(folder)
    if any(name.startswith(("tokenizer", "vocab", "merges")) for name in names):
        raise UserError(f"{folder}: holds a tokenizer and no model; download config.json and the weights")


def _unreachable(folder: Path, weights: Sequence[str]) -> UserError:
    """Why safetensors files are there, but none that would be read."""
    shards = [match for name in weights if (match := _SHARD.fullmatch(name))]
    if not shards:
        return UserError(f"{folder}: holds {_listed(weights)}; rename the model's own file to {_SINGLE}")
    count = int(shards[0][3])
    have = {int(match[2]) for match in shards if int(match[3]) == count}
    if count == 1:
        return UserError(f"{folder}: {shards[0][0]} has no {_INDEX} beside it; rename it to {_SINGLE}")
    missing = f" and {count - len(have)} of {count} shards are missing" if len(have) < count else ""
    return UserError(
        f"{folder}: {shards[0][0]} has no {_INDEX} beside it{missing}; download them into the folder"
    )


def _quantisation(config: Mapping[str, Any]) -> str:
    """How the weights are quantised according to a config.json; "" if they are not."""
    for key in ("quantization_config", "quantization", "compression_config"):
        value = config.get(key)
        if not value:
            continue
        method = value.get("quant_method") if isinstance(value, dict) else None
        bits = value.get("bits", value.get("w_bit")) if isinstance(value, dict) else None
        if (
            method is None
            and isinstance(value, dict)
            and (value.get("load_in_4bit") or value.get("load_in_8bit"))
        ):
            method = "bitsandbytes"
        name = "MLX" if key == "quantization" and method is None else method
        words = [str(word)[:40] for word in (name, f"{bits} bits" if bits else None) if word]
        return ", ".join(word for word in words if word.isprintable()) or key
    return ""


def _listed(names: Sequence[str]) -> str:
    shown = [name if name.isprintable() else repr(name) for name in names[:_SHOWN]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more
