"""Reads a VISTA3D folder: its labels, its configuration and its weights.

Two layouts are supported. A MONAI bundle has `configs/metadata.json`, `configs/inference.json` and
`models/model.pt`; VISTA3D-HF has `metadata.json` and `vista3d_pretrained_model/` with `config.json` and
`model.safetensors`. Configurations are read as data: an expression (`$...`) must be one that is known here,
and no Python file of the folder is opened.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from etils import epath
from monai.networks.nets.vista3d import VISTA3D, vista3d132

from vilam3_experts import bundles
from vilam3_experts.orientation import is_axcodes
from vilam3_experts.vista3d.windows import WindowSettings
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_MAX_WEIGHT_BYTES = 4 << 30
_MAX_LABEL = 132  # larger ids belong to the CT and MR model, which scales intensities differently

_CONFIG = "configs/inference.json"
_YAML_CONFIGS = ("configs/inference.yaml", "configs/inference.yml")
_LABELS = ("configs/metadata.json", "metadata.json", "label_dict.json", "docs/labels.json", "labels.json")
_WEIGHTS = tuple(
    f"{folder}model.{suffix}"
    for folder in ("models/", "vista3d_pretrained_model/", "")
    for suffix in ("safetensors", "pt")
)
_HF_CONFIGS = ("vista3d_pretrained_model/config.json", "config.json")

# Bone, which the bundle writes as an expression; lungs and kidneys are lists.
_BONE = (*range(33, 57), *range(63, 98), 114, 120, 122)
_BONE_EXPRESSION = "$list(range(33,57))+list(range(63,98))+[114,120,122]"
SUBCLASSES: Mapping[int, tuple[int, ...]] = {2: (14, 5), 20: (28, 29, 30, 31, 32), 21: _BONE}

# Transforms that change neither values nor grid of a scan that is already in memory.
_PASSIVE = {"LoadImaged", "EnsureChannelFirstd", "EnsureTyped", "VistaPreTransformd", "CastToTyped"}
# Transform → its known arguments.
_STEPS = {
    "Spacingd": {"pixdim", "mode"},
    "CropForegroundd": {"margin", "allow_smaller", "source_key"},
    "ScaleIntensityRanged": {"a_min", "a_max", "b_min", "b_max", "clip"},
    "Orientationd": {"axcodes"},
}
_REPLICATE_SINCE = (0, 5, 7)


class SpacingStep(NamedTuple):
    """Resample to `pixdim` millimetres, trilinearly."""

    pixdim: tuple[float, float, float]


class CropStep(NamedTuple):
    """Crop to the voxels above 0, with a margin of `margin` voxels."""

    margin: int
    allow_smaller: bool


class ScaleStep(NamedTuple):
    """Map [a_min, a_max] to [b_min, b_max]; `clip` to that range."""

    a_min: float
    a_max: float
    b_min: float
    b_max: float
    clip: bool


class OrientationStep(NamedTuple):
    """Reorder the axes to `axcodes`."""

    axcodes: str


Step = SpacingStep | CropStep | ScaleStep | OrientationStep

# The pre-processing of vista3d 0.5.4, which VISTA3D-HF has only in Python.
DEFAULT_STEPS: tuple[Step, ...] = (
    SpacingStep((1.5, 1.5, 1.5)),
    CropStep(10, True),
    ScaleStep(-963.8247715525971, 1053.678477684517, 0.0, 1.0, True),
    OrientationStep("RAS"),
)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The validated content of a folder.

    `labels` are names by label id without the background 0; `subclasses` maps a label id to the ids that
    replace it as prompts; `network` is float32, in evaluation mode.
    """

    name: str
    version: str
    labels: dict[int, str]
    subclasses: Mapping[int, tuple[int, ...]]
    steps: tuple[Step, ...]
    windows: WindowSettings
    amp: bool
    network: VISTA3D
    weights_sha256: str


def read_bundle(folder: paths.PathLike) -> Bundle:
    """Reads a MONAI bundle or a VISTA3D-HF folder.

    Raises `UserError` if a part is missing, damaged, too large or unsupported.
    """
    folder = paths.as_path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a vista3d bundle or VISTA3D-HF")
    labels, version = read_labels(folder)
    config = _InferenceConfig(folder)
    settings = {
        "subclasses": config.subclasses(),
        "steps": config.steps(),
        "windows": config.windows(version),
        "amp": config.amp(),
    }
    _check_hf_config(folder)
    network, digest = read_weights(folder)  # last, because it is gigabytes
    return Bundle(
        name=folder.name, version=version, labels=labels, network=network, weights_sha256=digest, **settings
    )


def read_labels(folder: epath.Path) -> tuple[dict[int, str], str]:
    """The label table of a folder, and the version in its metadata."""
    version = ""
    for name in _LABELS:
        path = folder / name
        if not path.exists():
            continue
        content = bundles.read_json_object(path)
        stated = content.get("version")
        version = version or (stated if isinstance(stated, str) else "")
        table = _label_table(content, path)
        if table:
            return table, version
    raise UserError(
        f"{folder}: none of {', '.join(_LABELS)} lists labels; give the folder that has the bundle's metadata"
    )


def _label_table(content: dict[str, Any], path: epath.Path) -> dict[int, str] | None:
    """`channel_def` of MONAI metadata, or an object that maps ids to names or names to ids."""
    table: Any = content
    if "network_data_format" in content:
        table = bundles.channel_def(content, "outputs", "pred")
    if not isinstance(table, dict) or not table:
        return None
    pairs: list[tuple[int, str]] = []
    for key, value in table.items():
        if isinstance(value, str) and re.fullmatch(r"\d{1,5}", key):
            pairs.append((int(key), value))
        elif type(value) is int and 0 <= value < 100_000:
            pairs.append((value, key))
        else:
            return None
    labels = {i: " ".join(name.split()) for i, name in pairs if i != 0}
    names = {name.lower() for name in labels.values()}
    if len(names) != len(labels) or len({i for i, _ in pairs}) != len(pairs) or "" in names:
        raise UserError(f"{path}: two labels share an id or a name; copy the file again")
    if any(len(name) > 100 for name in names):
        raise UserError(f"{path}: a label name is longer than 100 characters; correct it")
    if max(labels, default=0) > _MAX_LABEL:
        raise UserError(
            f"{path}: label ids up to {max(labels)}, VISTA3D for CT has {_MAX_LABEL}; use a vista3d bundle"
        )
    return labels


def _check_hf_config(folder: epath.Path) -> None:
    """Refuses a `config.json` of a network other than `vista3d132()`."""
    for path in (folder / name for name in _HF_CONFIGS):
        content = bundles.read_json_object(path) if path.exists() else {}
        for key, wanted in (("model_type", "VISTA3D"), ("encoder_embed_dim", 48), ("input_channels", 1)):
            if content.get(key, wanted) != wanted:
                raise UserError(
                    f"{path}: {key} is {content[key]!r}, expected {wanted!r}; use the weights of VISTA3D-HF"
                )


class _InferenceConfig:
    """`configs/inference.json`, read as data; without the file, the settings of VISTA3D-HF."""

    def __init__(self, folder: epath.Path) -> None:
        self._path = folder / _CONFIG
        self._content: dict[str, Any] | None = None
        if self._path.exists():
            self._content = bundles.read_json_object(self._path)
        elif yaml := [name for name in _YAML_CONFIGS if (folder / name).exists()]:
            raise UserError(f"{folder / yaml[0]}: only JSON is read; save it as {_CONFIG}")

    def _error(self, problem: str, fix: str = "correct it") -> UserError:
        return UserError(f"{self._path}: {problem}; {fix}")

    def _get(self, owner: Mapping[str, Any], key: str, default: Any = None) -> Any:
        """An entry with references resolved; expressions are refused."""
        value = owner.get(key, default)
        for _ in range(8):
            if not isinstance(value, str) or not (match := re.fullmatch(r"\$?\s*@([\w:#]+)\s*", value)):
                break
            value = self._content
            for part in re.split(r"::|#", match[1]):
                if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                    value = value[int(part)]
                else:
                    value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str) and value.lstrip().startswith(("$", "@")):
            raise self._error(f"{key} is the expression {value[:60]!r}", "write its value")
        return value

    def _section(self, name: str) -> dict[str, Any]:
        value = self._content.get(name) if self._content else None
        return value if isinstance(value, dict) else {}

    def _number(self, owner: Mapping[str, Any], key: str, default: Any = None) -> float:
        value = self._get(owner, key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._error(f"{key} is {value!r}, not a number")
        return float(value)

    def _flag(self, owner: Mapping[str, Any], key: str, default: bool) -> bool:
        value = self._get(owner, key, default)
        if not isinstance(value, bool):
            raise self._error(f"{key} is {value!r}, neither true nor false")
        return value

    def _triple(self, owner: Mapping[str, Any], key: str) -> tuple[float, float, float]:
        value = self._get(owner, key)
        if type(value) in (int, float):
            value = [value] * 3
        if not isinstance(value, list) or len(value) != 3 or any(type(v) not in (int, float) for v in value):
            raise self._error(f"{key} is {value!r}, not three numbers")
        x, y, z = map(float, value)
        return x, y, z

    def amp(self) -> bool:
        return self._flag(self._section("evaluator"), "amp", True)

    def windows(self, version: str) -> WindowSettings:
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
        replicate = numbers is not None and tuple(map(int, numbers.groups())) >= _REPLICATE_SINCE
        padding = "replicate" if replicate else "constant"
        if self._content is None:
            return WindowSettings((128, 128, 128), 0.3, padding)
        inferer = self._section("inferer")
        roi = self._triple(inferer, "roi_size")
        if any(r % 16 or not 16 <= r <= 512 for r in roi):
            raise self._error(f"roi_size {list(roi)} is not in multiples of 16 from 16 to 512")
        overlap = self._number(inferer, "overlap")
        if not 0 <= overlap < 1:
            raise self._error(f"overlap {overlap} is not from 0 to below 1")
        return WindowSettings((int(roi[0]), int(roi[1]), int(roi[2])), overlap, padding)

    def subclasses(self) -> Mapping[int, tuple[int, ...]]:
        if self._content is None or "subclass" not in self._content:
            return SUBCLASSES
        found: dict[int, tuple[int, ...]] = {}
        for key, value in self._section("subclass").items():
            if isinstance(value, str) and "".join(value.split()) == _BONE_EXPRESSION:
                value = list(_BONE)
            if not key.isdigit() or not isinstance(value, list) or any(type(v) is not int for v in value):
                raise self._error(f"subclass {key!r} is {str(value)[:60]!r}", "write it as a list of ids")
            found[int(key)] = tuple(value)
        return found

    def steps(self) -> tuple[Step, ...]:
        if self._content is None:
            return DEFAULT_STEPS
        transforms = self._get(self._section("preprocessing"), "transforms", "@preprocessing_transforms")
        if not isinstance(transforms, list):
            raise self._error("no list of preprocessing transforms", "use the bundle's own inference.json")
        steps = [step for entry in transforms if (step := self._step(entry)) is not None]
        kinds = [type(step) for step in steps]
        for kind, name in ((SpacingStep, "Spacingd"), (ScaleStep, "ScaleIntensityRanged")):
            if kinds.count(kind) != 1:
                raise self._error(f"{kinds.count(kind)} times {name} in preprocessing", "use it once")
        return tuple(steps)

    def _step(self, entry: Any) -> Step | None:
        if not isinstance(entry, dict) or not isinstance(entry.get("_target_"), str):
            raise self._error("a preprocessing transform without _target_")
        if entry.get("_disabled_") is True:
            return None
        name = entry["_target_"].rpartition(".")[2]
        if name in _PASSIVE:
            return None
        if name not in _STEPS:
            raise self._error(f"preprocessing has {name}, which is not supported", "remove it")
        unknown = set(entry) - _STEPS[name] - {"_target_", "keys", "allow_missing_keys", "_disabled_"}
        if unknown:
            raise self._error(f"{name} has {sorted(unknown)[0]!r}, which is not supported", "remove it")
        match name:
            case "Spacingd":
                if self._get(entry, "mode", "bilinear") != "bilinear":
                    raise self._error(f"Spacingd in mode {entry['mode']!r}", "use 'bilinear'")
                pixdim = self._triple(entry, "pixdim")
                if any(0 < v < 0.05 or v > 50 for v in pixdim):
                    fix = "use 0.05 to 50 mm, or -1 to keep an axis"
                    raise self._error(f"Spacingd to {list(pixdim)} mm", fix)
                return SpacingStep(pixdim)
            case "CropForegroundd":
                margin = self._number(entry, "margin", 0)
                if margin % 1 or not 0 <= margin <= 1000:
                    raise self._error(f"CropForegroundd with margin {margin}", "use whole voxels")
                return CropStep(int(margin), self._flag(entry, "allow_smaller", False))
            case "ScaleIntensityRanged":
                ends = ("a_min", "a_max", "b_min", "b_max")
                a_min, a_max, b_min, b_max = (self._number(entry, key) for key in ends)
                if not (a_min < a_max and b_min < b_max):
                    raise self._error("ScaleIntensityRanged with an empty range")
                return ScaleStep(a_min, a_max, b_min, b_max, self._flag(entry, "clip", False))
        codes = self._get(entry, "axcodes")
        if not is_axcodes(codes):
            raise self._error(f"Orientationd to {codes!r}", "use three axis codes such as 'RAS'")
        return OrientationStep(codes)


def read_weights(folder: epath.Path) -> tuple[VISTA3D, str]:
    """VISTA3D with a folder's weights, and the sha256 of the weights file.

    Raises `UserError` if there are none, or their names or shapes are not those of VISTA3D.
    """
    path = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"{folder}: no weights; it needs one of {', '.join(_WEIGHTS)}")
    state, digest = bundles.read_state_dict(path, _MAX_WEIGHT_BYTES)
    with torch.device("meta"):
        network = vista3d132()
    if state and all(key.startswith("network.") for key in state):  # the wrapper class of VISTA3D-HF
        state = {key.removeprefix("network."): value for key, value in state.items()}
    fix = "use the weights of a vista3d bundle for MONAI 1.4 or newer"
    bundles.check_tensors(state, network.state_dict(), path, fix, finite=False)
    float32 = {
        key: value.to(torch.float32, memory_format=torch.contiguous_format) for key, value in state.items()
    }
    network.load_state_dict(float32, assign=True)
    return network.eval().requires_grad_(False), digest
