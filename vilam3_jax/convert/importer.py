"""Foreign checkpoint → export folder: which format it is, filling every parameter, writing.

Memory: the imported parameters in their final dtype plus one tensor of the source.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vilam3_jax.config import ConfigDict
from vilam3_jax.convert.gguf import open_gguf
from vilam3_jax.convert.huggingface import open_intern_vit, open_llama, open_siglip, read_config
from vilam3_jax.convert.sources import Checkpoint, Rule, Source
from vilam3_jax.convert.vila import PARTS, open_vila
from vilam3_jax.data.tokenizer import load_tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.paths import PathLike, as_path

FORMATS: dict[str, Callable[[Path], Source | Checkpoint]] = {
    "gguf": open_gguf,
    "hf_llama": open_llama,
    "siglip": open_siglip,
    "intern_vit": open_intern_vit,
    "vila": open_vila,
}
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
_MODEL_TYPES = {
    "llama": "hf_llama",
    "qwen2": "hf_llama",
    "qwen3": "hf_llama",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "intern_vit_6b": "intern_vit",
}
_NAMES_SHOWN = 12

Progress = Callable[[Iterable[tuple[Source, Rule]]], Iterable[tuple[Source, Rule]]]


@dataclass(frozen=True)
class Summary:
    """What an import did.

    Attributes:
      component: 'llm', 'vision_tower', or 'generative' for a whole model.
      tensors: tensors read from the source.
      parameters: numbers in the result.
      bytes: size of the result in memory.
      seconds: wall time.
      dtypes: storage types of the source.
      unused: tensors left out, with the reason.
      tokenizer: a tokenizer was written.
    """

    component: str
    tensors: int
    parameters: int
    bytes: int
    seconds: float
    dtypes: tuple[str, ...]
    unused: dict[str, str]
    tokenizer: bool


def detect_format(source: Path) -> str:
    """Tells a source's format from its content.

    Args:
      source: GGUF file or model folder.

    Returns:
      A key of `FORMATS`.

    Raises:
      UserError: nothing that can be imported.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; check --source")
    if source.is_file():
        with source.open("rb") as handle:
            magic = handle.read(4)
        if magic == b"GGUF":
            return "gguf"
        raise UserError(f"{source}: not a GGUF file; --source is a GGUF file or a Hugging Face model folder")
    if (source / "config.json").exists():
        if any((source / name).is_dir() for name in PARTS.values()):
            return "vila"
        model_type = read_config(source / "config.json").get("model_type")
        if model_type in _MODEL_TYPES:
            return _MODEL_TYPES[model_type]
        known = ", ".join(sorted(_MODEL_TYPES))
        raise UserError(f"{source / 'config.json'}: model_type {model_type!r} is not supported, only {known}")
    if list(source.glob("*.gguf")):
        return "gguf"
    raise UserError(f"{source}: neither config.json nor a .gguf file is here; check --source")


def open_source(source: PathLike, source_format: str = "auto") -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    Args:
      source: GGUF file, folder with one GGUF file, or Hugging Face model folder; on a local disk.
      source_format: a key of `FORMATS`, or 'auto'.

    Raises:
      UserError: missing, damaged, or an architecture that is not supported.
    """
    if "://" in str(source):
        raise UserError(f"{source}: weights are read through memory maps; copy them to a local disk first")
    path = Path(as_path(source))
    chosen = detect_format(path) if source_format == "auto" else source_format
    if chosen not in FORMATS:
        raise UserError(f"--format {chosen}: unknown; choose from auto, {', '.join(FORMATS)}")
    if chosen == "gguf":
        path = _single_gguf(path)
    elif not path.is_dir():
        raise UserError(f"{path}: --format {chosen} needs a model folder")
    opened = FORMATS[chosen](path)
    return opened if isinstance(opened, Checkpoint) else Checkpoint.of(opened)


def target_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Returns path → shape of every parameter that this package's model of `checkpoint` has."""
    from flax import nnx

    from vilam3_jax import compat
    from vilam3_jax.models import trees, vila

    if checkpoint.kind == "generative":
        model = ConfigDict({**checkpoint.config, "param_dtype": "float32"})
        shapes = vila.abstract_model(model, checkpoint.kind)[1]
        return {path: tuple(leaf.shape) for path, leaf in trees.flatten(shapes).items()}
    config = checkpoint.config[checkpoint.kind]
    family = {"llm": vila.LLMS, "vision_tower": vila.VISION_TOWERS}[checkpoint.kind][config["type"]]
    settings = dict(dtype="float32", param_dtype="float32", remat="none")
    model = nnx.eval_shape(lambda: family(ConfigDict(dict(config)), rngs=nnx.Rngs(0), **settings))
    _, shapes = compat.split(model)
    return {f"{checkpoint.kind}/{path}": tuple(leaf.shape) for path, leaf in trees.flatten(shapes).items()}


def fill(checkpoint: Checkpoint, dtype: Any = np.float32, progress: Progress = iter) -> dict[str, np.ndarray]:
    """Makes every parameter of the target model.

    Args:
      checkpoint: opened.
      dtype: dtype of the result.
      progress: wraps the rules as they are worked off (a progress bar).

    Returns:
      Parameter path → array.

    Raises:
      UserError: a tensor is left over, a parameter is left empty, a shape differs, or a value is not finite.
    """
    expected = target_shapes(checkpoint)
    for part in checkpoint.parts:
        own = {path for path in expected if path.split("/")[0] == part.component}
        _check_coverage(part, own)
    work = [(part, rule) for part in checkpoint.parts for rule in part.rules]
    params: dict[str, np.ndarray] = {}
    for part, rule in progress(work):
        _fill_one(part, rule, expected[rule.target], dtype, params)
    return params


def _fill_one(
    source: Source, rule: Rule, shape: tuple[int, ...], dtype: Any, params: dict[str, np.ndarray]
) -> None:
    for index, name in enumerate(rule.sources):
        tensor = rule.transform(source.reader(name))
        needed = shape[1:] if rule.stacked else shape
        if tensor.shape != needed:
            raise UserError(
                f"{source.files[-1]}: {name} gives shape {tensor.shape}, but {rule.target} needs "
                f"{needed}; config and weights are of different models"
            )
        # Only now, so that a config that lies cannot make us ask for absurd memory.
        if rule.target not in params:
            params[rule.target] = np.empty(shape, dtype)
        place = params[rule.target][index] if rule.stacked else params[rule.target]
        # Beyond the range of the new dtype means infinite: the check below reports it.
        with np.errstate(over="ignore"):
            place[...] = tensor
        if not np.isfinite(place).all():
            raise UserError(
                f"{source.files[-1]}: {name} holds values that are not finite as {np.dtype(dtype)}; "
                "the file is damaged, download it again"
            )


def import_model(
    source: PathLike,
    out: PathLike,
    *,
    source_format: str = "auto",
    dtype: str = "float32",
    tokenizer: PathLike | None = None,
    progress: Progress = iter,
) -> Summary:
    """Imports a checkpoint into a new export folder, complete or not at all.

    Args:
      source: see `open_source`.
      out: folder to create; must not exist or be empty.
      source_format: see `open_source`.
      dtype: a key of `DTYPES`.
      tokenizer: Hugging Face tokenizer folder to use instead of the one in the source.
      progress: see `fill`.

    Raises:
      UserError: bad source, `out` in use, or disk full.
    """
    from vilam3_jax.checkpoints import export_model

    start = time.perf_counter()
    target = as_path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: already exists; choose another --out or remove it")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown; choose from {', '.join(DTYPES)}")
    opened = open_source(source, source_format)
    # First, because it fails fast.
    words = load_tokenizer(tokenizer) if tokenizer else opened.tokenizer() if opened.tokenizer else None
    llm = opened.config.get("llm")
    if words is not None and llm is not None and words.vocab_size > llm["vocab_size"]:
        raise UserError(
            f"{tokenizer or source}: the tokenizer has {words.vocab_size} tokens, the model only "
            f"{llm['vocab_size']}; use the tokenizer this model was trained with"
        )
    params = fill(opened, DTYPES[dtype], progress)
    provenance = {"parts": {part.component: _provenance(part) for part in opened.parts}}
    model_config = {
        "name": Path(as_path(source)).stem,
        "kind": opened.kind,
        "param_dtype": dtype,
        **opened.config,
    }
    with tempfile.TemporaryDirectory() as folder:
        if words is not None:
            words.save(folder)
        export_model(target, params, model_config, folder if words is not None else None, provenance)
    return Summary(
        component=opened.kind,
        tensors=len(
            {(id(part), name) for part in opened.parts for rule in part.rules for name in rule.sources}
        ),
        parameters=sum(value.size for value in params.values()),
        bytes=sum(value.nbytes for value in params.values()),
        seconds=time.perf_counter() - start,
        dtypes=tuple(sorted({dtype for part in opened.parts for dtype in part.dtypes})),
        unused={name: reason for part in opened.parts for name, reason in part.unused.items()},
        tokenizer=words is not None,
    )


def _provenance(part: Source) -> dict[str, Any]:
    return {
        "source": [
            {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)} for file in part.files
        ],
        "storage": list(part.dtypes),
        "licence": part.licence,
        "unused_tensors": part.unused,
    }


def sha256(path: Path) -> str:
    """Returns the hash of a file as hex, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check_coverage(source: Source, expected: Set[str]) -> None:
    wanted = {name for rule in source.rules for name in rule.sources}
    missing = wanted - set(source.tensors)
    made = {rule.target for rule in source.rules if missing.isdisjoint(rule.sources)}
    empty = expected - made
    left_over = set(source.tensors) - wanted - set(source.unused)
    if empty or left_over or missing:
        raise UserError(
            f"{source.files[-1]}: does not fit this package's {source.component}; parameters not filled: "
            f"{_names(empty)}; tensors missing: {_names(missing)}; tensors not used: {_names(left_over)}"
        )


def _names(names: Set[str]) -> str:
    # A damaged file may name its tensors with line breaks or terminal codes.
    shown = [name if name.isprintable() else repr(name) for name in sorted(names)[:_NAMES_SHOWN]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return (", ".join(shown) or "none") + more


def _single_gguf(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{path}: holds {len(files)} .gguf files; give one of them as --source")
    return files[0]
