"""Recognises sources that `vilam3 convert import` cannot read, and says what to do."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from vilam3_jax.convert.config_checks import ORIGINAL, check_quantisation
from vilam3_jax.convert.safetensors_files import INDEX, SINGLE, read_config
from vilam3_jax.data import file_kinds
from vilam3_jax.errors import UserError

logger = logging.getLogger(__name__)

NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # files of trainers
_HUGGING_FACE = "give the Hugging Face folder of that model (config.json and safetensors)"
_TORCH_FILES = "save it as safetensors, or import with --torch_files"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_ADAPTER = "is an adapter (PEFT or LoRA) without its base model"
# Folders recognised by one file: pattern of its name, what the folder is, what to do.
_FOLDERS = (
    ("adapter_config.json", _ADAPTER, "merge both with `merge_and_unload()` and give the merged folder"),
    ("adapter_model.*", _ADAPTER, "give the merged model"),
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
    ("quant_config.json", "holds quantised weights", ORIGINAL),
    ("quantize_config.json", "holds weights quantised by GPTQ", ORIGINAL),
    ("hf_quant_config.json", "holds weights quantised by ModelOpt", ORIGINAL),
    ("*scales.json", "holds scales of quantised weights or caches", ORIGINAL),
    ("*scales.safetensors", "holds scales of quantised weights or caches", ORIGINAL),
)
_SAVE = "save the model as safetensors"
_ORIGIN = "give the model that it was made from"
# Weights and graphs of other programs: pattern, what they are, what to do.
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
_UNFINISHED = tuple(
    (pattern, "is an unfinished download", "download it again")
    for pattern in ("*.incomplete", "*.crdownload", "*.part")
)
# Folders without safetensors, by their other weights.
_WEIGHTS = (
    ("*.gguf", "its weights are in a GGUF file", "give that file as --source"),
    ("pytorch_model*.bin", "has only pytorch_model.bin, which can run code when opened", _TORCH_FILES),
    *((kind, "has only PyTorch weights, which can run code when opened", _TORCH_FILES) for kind in _PICKLES),
    *((pattern, f"has only {what}", advice) for pattern, what, advice in _FOREIGN),
    ("saved_model.pb", "is a TensorFlow SavedModel", _SAVE),
    *_UNFINISHED,
)
_FILES = (
    ("*.safetensors", "is one file of weights", "give the folder that also holds its config.json"),
    ("*.index.json", "is the index of a model", "give its folder"),
    ("config.json", "is the config of a model", "give its folder"),
    *((kind, "is a file of PyTorch weights", "give its folder with --torch_files") for kind in _PICKLES),
    *((pattern, f"is a file of {what}", advice) for pattern, what, advice in _FOREIGN),
    *_UNFINISHED,
)
# Files beside the weights that are read, or that do not change results.
_NEIGHBOURS = re.compile(
    r"\..*|runs|original|onnx|(tokenizer|vocab|merges|chat_template|LICEN[CS]E|COPYING|NOTICE|events\.out).*"
    r"|(config|generation_config|(.*pre)?processor_config|special_tokens_map|added_tokens|trainer_state"
    r"|.*_results|.*\.index)\.json|.*\.(model|md|txt|rst|pdf|png|jpe?g|gif|svg|webp|html|py|log|jsonl|lock"
    r"|gguf|bin|pth?|ckpt|h5|keras|msgpack|onnx|xml|engine|tflite)"
)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def refuse_file(file: Path) -> UserError:
    """The error for a file that is not GGUF."""
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
    """Refuses a folder that is not a model in transformers' layout.

    Raises:
      UserError: says what the folder is and what to give instead.
    """
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if not names:
        raise UserError(f"{folder}: an empty folder; download the model into it")
    _check_hub_cache(folder, names)
    _check_adapter_and_others(folder, names)
    for file in (folder / name for name in names if name.endswith((".safetensors", ".json", ".gguf"))):
        if file.is_file() and (kind := file_kinds.identify(file)) in file_kinds.STAND_INS:
            raise file_kinds.refusal(file, kind)
    if "config.json" not in names:
        _check_without_config(folder, names)


def check_weights(folder: Path) -> None:
    """Refuses weights of another format, quantised weights, shards without an index, and adapters.

    Logs a warning for unknown files. A folder without weights passes; opening it reports what is missing.

    Raises:
      UserError: see `check_folder`.
    """
    if not folder.is_dir():
        return
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(NO_WEIGHTS))
    config = read_config(folder / "config.json") if "config.json" in names else {}
    check_quantisation(config, (), folder / "config.json")
    _check_adapter_and_others(folder, names)
    if INDEX in names or SINGLE in names:
        _check_neighbours(folder, names)
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
            f"{listed(models)}"
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
        if pattern.startswith("adapter") and (SINGLE in names or INDEX in names):
            what, advice = "holds a model and an unmerged adapter", "merge them or remove the adapter's files"
        elif pattern in ("params.json", "model.json") and "config.json" in names:
            continue
        raise UserError(f"{folder}: {what}; {advice}")


def _check_without_config(folder: Path, names: Sequence[str]) -> None:
    inside = [name for name in names if (folder / name / "config.json").is_file()]
    if any(fnmatch.fnmatch(name, "*.gguf") for name in names):
        return
    if checkpoints := [name for name in inside if re.fullmatch(r"checkpoint-\d+", name)]:
        raise UserError(
            f"{folder}: a training folder; give one of its checkpoints as --source: {listed(checkpoints)}"
        )
    if len(inside) == 1:
        raise UserError(f"{folder}: the model is one folder deeper; give {folder / inside[0]} as --source")
    if inside:
        raise UserError(f"{folder}: holds {len(inside)} models; give one as --source: {listed(inside)}")
    weights = [name for name in names if name.endswith(".safetensors")]
    if weights:
        raise UserError(f"{folder}: holds {listed(weights)} but no config.json; download it into the folder")
    check_weights(folder)
    if any(name.startswith(("tokenizer", "vocab", "merges")) for name in names):
        raise UserError(f"{folder}: holds a tokenizer but no model; download config.json and the weights")


def _unreachable(folder: Path, weights: Sequence[str]) -> UserError:
    """The error for safetensors files that neither an index nor their name makes readable."""
    shards = [match for name in weights if (match := _SHARD.fullmatch(name))]
    if not shards:
        return UserError(f"{folder}: holds {listed(weights)}; rename the model's own file to {SINGLE}")
    count = int(shards[0][3])
    have = {int(match[2]) for match in shards if int(match[3]) == count}
    if count == 1:
        return UserError(f"{folder}: {shards[0][0]} has no {INDEX} beside it; rename it to {SINGLE}")
    missing = f" and {count - len(have)} of {count} shards are missing" if len(have) < count else ""
    return UserError(
        f"{folder}: {shards[0][0]} has no {INDEX} beside it{missing}; download them into the folder"
    )


def _check_neighbours(folder: Path, names: Sequence[str]) -> None:
    """Logs a warning for files that are neither read nor known to be harmless."""
    index = read_config(folder / INDEX).get("weight_map") if INDEX in names else None
    own = [*index.values()] if isinstance(index, dict) else [SINGLE]
    if unknown := [name for name in names if name not in own and not _NEIGHBOURS.fullmatch(name)]:
        logger.warning("%s: ignores %s; check that they do not change results", folder, listed(unknown))


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Names for a message; those of a damaged file may hold line breaks or terminal codes."""
    shown = [name if name.isprintable() else repr(name) for name in names[:limit]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more
