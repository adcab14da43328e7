"""A folder with VISTA3D: where its parts lie, what its configuration says, and its weights.

Two layouts are known. A MONAI bundle has `configs/metadata.json`, `configs/inference.json` and
`models/model.pt`; VISTA3D-HF has `metadata.json` and `vista3d_pretrained_model/` with `config.json` and
`model.safetensors`. Configurations are read as data: what a bundle would compute with an expression (`$...`)
must be one of the expressions that are known here, and none of its Python files is opened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from etils import epath
from monai.networks.nets.vista3d import VISTA3D, vista3d132
from safetensors.torch import load as load_safetensors

from vilam3_experts.vista3d.windows import WindowSettings
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_MAX_JSON_BYTES = 4 << 20
_MAX_WEIGHT_BYTES = 4 << 30
_MAX_LABEL = 132  # larger ids are those of the CT and MR model, which scales intensities otherwise

_CONFIG = "configs/inference.json"
_YAML_CONFIGS = ("configs/inference.yaml", "configs/inference.yml")
_LABELS = ("configs/metadata.json", "metadata.json", "label_dict.json", "docs/labels.json", "labels.json")
_WEIGHTS = (
    "models/model.safetensors",
    "models/model.pt",
    "vista3d_pretrained_model/model.safetensors",
    "vista3d_pretrained_model/model.pt",
    "model.safetensors",
    "model.pt",
)
_HF_CONFIGS = ("vista3d_pretrained_model/config.json", "config.json")

# Bone, as the bundle writes it in Python; lungs and kidneys are lists.
_BONE = (*range(33, 57), *range(63, 98), 114, 120, 122)
_BONE_EXPRESSION = "$list(range(33,57))+list(range(63,98))+[114,120,122]"
SUBCLASSES: Mapping[int, tuple[int, ...]] = {2: (14, 5), 20: (28, 29, 30, 31, 32), 21: _BONE}

# Transforms that change neither values nor grid of a scan that is already in memory.
_PASSIVE = {"LoadImaged", "EnsureChannelFirstd", "EnsureTyped", "VistaPreTransformd", "CastToTyped"}
_REPLICATE_SINCE = (0, 5, 7)


@dataclasses.dataclass(frozen=True)
class SpacingStep:
    """Resample to `pixdim` millimetres, trilinearly."""

    pixdim: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class CropStep:
    """Crop to the voxels above 0, and `margin` voxels around them."""

    margin: int
    allow_smaller: bool


@dataclasses.dataclass(frozen=True)
class ScaleStep:
    """Map [a_min, a_max] to [b_min, b_max]; `clip` to that range."""

    a_min: float
    a_max: float
    b_min: float
    b_max: float
    clip: bool


@dataclasses.dataclass(frozen=True)
class OrientationStep:
    """Reorder the axes to `axcodes`."""

    axcodes: str


Step = SpacingStep | CropStep | ScaleStep | OrientationStep

# The pre-processing of vista3d 0.5.4, which VISTA3D-HF has in Python only.
DEFAULT_STEPS: tuple[Step, ...] = (
    SpacingStep((1.5, 1.5, 1.5)),
    CropStep(10, True),
    ScaleStep(-963.8247715525971, 1053.678477684517, 0.0, 1.0, True),
    OrientationStep("RAS"),
)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What a folder says, all of it checked.

    Attributes:
      name: of the folder, for messages.
      version: of its metadata, '' if it states none.
      labels: label id to name; 0, the background, is left out.
      subclasses: a label id that is asked as several others, and those.
      steps: pre-processing, in order.
      windows: of the inferer.
      amp: run in half precision where the device has it.
      network: with the folder's weights, float32, in evaluation mode.
      weights_sha256: of the file of weights.
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

    Raises:
      UserError: a part is missing, damaged, over a limit, or asks for something that is not done here.
    """
    folder = paths.as_path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a vista3d bundle or VISTA3D-HF")
    labels, version = read_labels(folder)
    config = _Config(folder)
    told = {
        "subclasses": config.subclasses(),
        "steps": config.steps(),
        "windows": config.windows(version),
        "amp": config.amp(),
    }
    _check_hf_config(folder)
    network, digest = read_weights(folder)  # last, because it is gigabytes
    return Bundle(
        name=folder.name,
        version=version,
        labels=labels,
        network=network,
        weights_sha256=digest,
        **told,
    )


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(paths.read_bytes(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no valid JSON ({error}); copy the folder again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; copy the folder again")
    return value


def read_labels(folder: epath.Path) -> tuple[dict[int, str], str]:
    """The label table of a folder, and the version that its metadata state.

    Raises:
      UserError: no file lists labels, or a list is contradictory.
    """
    version = ""
    for name in _LABELS:
        path = folder / name
        if not path.exists():
            continue
        content = _read_json(path)
        stated = content.get("version")
        version = version or (stated if isinstance(stated, str) else "")
        table = _label_table(content, path)
        if table:
            return table, version
    raise UserError(
        f"{folder}: none of {', '.join(_LABELS)} lists labels; give the folder that has the bundle's metadata"
    )


def _label_table(content: dict[str, Any], path: epath.Path) -> dict[int, str] | None:
    """`channel_def` of MONAI metadata, or a plain object of id and name in either direction."""
    table: Any = content
    if "network_data_format" in content:
        for key in ("network_data_format", "outputs", "pred", "channel_def"):
            table = table.get(key) if isinstance(table, dict) else None
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
    """Refuses a `config.json` that states another network than `vista3d132()`."""
    for name in _HF_CONFIGS:
        path = folder / name
        if not path.exists():
            continue
        content = _read_json(path)
        for key, wanted in (("model_type", "VISTA3D"), ("encoder_embed_dim", 48), ("input_channels", 1)):
            if content.get(key, wanted) != wanted:
                raise UserError(
                    f"{path}: {key} is {content[key]!r}, expected {wanted!r}; use the weights of VISTA3D-HF"
                )


class _Config:
    """`configs/inference.json`, read as data; without the file, what VISTA3D-HF does."""

    def __init__(self, folder: epath.Path) -> None:
        self._path = folder / _CONFIG
        self._content: dict[str, Any] | None = None
        if self._path.exists():
            self._content = _read_json(self._path)
        else:
            for name in _YAML_CONFIGS:
                if (folder / name).exists():
                    raise UserError(f"{folder / name}: only JSON is read; save it as {_CONFIG}")

    def _refuse(self, what: str, fix: str) -> UserError:
        return UserError(f"{self._path}: {what}; {fix}")

    def _get(self, owner: Mapping[str, Any], key: str, default: Any = None) -> Any:
        """An entry, with references to others followed; expressions are refused."""
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
            raise self._refuse(f"{key} is the expression {value[:60]!r}", "write its value")
        return value

    def _section(self, name: str) -> dict[str, Any]:
        value = self._content.get(name) if self._content else None
        return value if isinstance(value, dict) else {}

    def _number(self, owner: Mapping[str, Any], key: str) -> float:
        value = self._get(owner, key)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._refuse(f"{key} is {value!r}, no number", "correct it")
        return float(value)

    def _flag(self, owner: Mapping[str, Any], key: str, default: bool) -> bool:
        value = self._get(owner, key, default)
        if not isinstance(value, bool):
            raise self._refuse(f"{key} is {value!r}, neither true nor false", "correct it")
        return value

    def _triple(self, owner: Mapping[str, Any], key: str) -> list[float]:
        value = self._get(owner, key)
        if type(value) in (int, float):
            value = [value] * 3
        if not isinstance(value, list) or len(value) != 3 or any(type(v) not in (int, float) for v in value):
            raise self._refuse(f"{key} is {value!r}, not three numbers", "correct it")
        return [float(v) for v in value]

    def amp(self) -> bool:
        return self._flag(self._section("evaluator"), "amp", True)

    def windows(self, version: str) -> WindowSettings:
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
        replicate = (
            bool(numbers) and tuple(map(int, cast(re.Match[str], numbers).groups())) >= _REPLICATE_SINCE
        )
        padding = "replicate" if replicate else "constant"
        if self._content is None:
            return WindowSettings((128, 128, 128), 0.3, padding)
        inferer = self._section("inferer")
        roi = self._triple(inferer, "roi_size")
        if any(r % 16 or not 16 <= r <= 512 for r in roi):
            raise self._refuse(f"roi_size {roi} is not in multiples of 16 from 16 to 512", "correct it")
        overlap = self._number(inferer, "overlap")
        if not 0 <= overlap < 1:
            raise self._refuse(f"overlap {overlap} is not from 0 to below 1", "correct it")
        return WindowSettings((int(roi[0]), int(roi[1]), int(roi[2])), overlap, padding)

    def subclasses(self) -> Mapping[int, tuple[int, ...]]:
        if self._content is None or "subclass" not in self._content:
            return SUBCLASSES
        found: dict[int, tuple[int, ...]] = {}
        for key, value in self._section("subclass").items():
            if isinstance(value, str) and "".join(value.split()) == _BONE_EXPRESSION:
                value = list(_BONE)
            if not key.isdigit() or not isinstance(value, list) or any(type(v) is not int for v in value):
                raise self._refuse(
                    f"subclass {key!r} is {str(value)[:60]!r}", "write it as a list of label ids"
                )
            found[int(key)] = tuple(value)
        return found

    def steps(self) -> tuple[Step, ...]:
        if self._content is None:
            return DEFAULT_STEPS
        transforms = self._get(self._section("preprocessing"), "transforms", "@preprocessing_transforms")
        if not isinstance(transforms, list):
            raise self._refuse("no list of preprocessing transforms", "use the bundle's own inference.json")
        steps = [step for entry in transforms if (step := self._step(entry)) is not None]
        kinds = [type(step) for step in steps]
        for kind, name in ((SpacingStep, "Spacingd"), (ScaleStep, "ScaleIntensityRanged")):
            if kinds.count(kind) != 1:
                raise self._refuse(f"{kinds.count(kind)} times {name} in preprocessing", "use it once")
        return tuple(steps)

    def _step(self, entry: Any) -> Step | None:
        if not isinstance(entry, dict) or not isinstance(entry.get("_target_"), str):
            raise self._refuse("a preprocessing transform without _target_", "correct it")
        if entry.get("_disabled_") is True:
            return None
        name = entry["_target_"].rpartition(".")[2]
        if name in _PASSIVE:
            return None
        readers: dict[str, tuple[set[str], Callable[[dict[str, Any]], Step]]] = {
            "Spacingd": ({"pixdim", "mode"}, self._spacing),
            "CropForegroundd": ({"margin", "allow_smaller", "source_key"}, self._crop),
            "ScaleIntensityRanged": ({"a_min", "a_max", "b_min", "b_max", "clip"}, self._scale),
            "Orientationd": ({"axcodes"}, self._orientation),
        }
        if name not in readers:
            raise self._refuse(f"preprocessing has {name}, which is not applied here", "remove it")
        known, read = readers[name]
        unknown = set(entry) - known - {"_target_", "keys", "allow_missing_keys", "_disabled_"}
        if unknown:
            raise self._refuse(f"{name} has {sorted(unknown)[0]!r}, which is not applied here", "remove it")
        return read(entry)

    def _spacing(self, entry: dict[str, Any]) -> Step:
        if self._get(entry, "mode", "bilinear") != "bilinear":
            raise self._refuse(f"Spacingd in mode {entry['mode']!r}", "use 'bilinear'")
        x, y, z = self._triple(entry, "pixdim")
        if any(0 < v < 0.05 or v > 50 for v in (x, y, z)):
            raise self._refuse(f"Spacingd to {[x, y, z]} mm", "use 0.05 to 50 mm, or -1 to keep an axis")
        return SpacingStep((x, y, z))

    def _crop(self, entry: dict[str, Any]) -> Step:
        margin = self._number({"margin": entry.get("margin", 0)}, "margin")
        if margin % 1 or not 0 <= margin <= 1000:
            raise self._refuse(f"CropForegroundd with margin {margin}", "use whole voxels")
        return CropStep(int(margin), self._flag(entry, "allow_smaller", False))

    def _scale(self, entry: dict[str, Any]) -> Step:
        a_min, a_max, b_min, b_max = (
            self._number(entry, key) for key in ("a_min", "a_max", "b_min", "b_max")
        )
        if not (a_min < a_max and b_min < b_max):
            raise self._refuse("ScaleIntensityRanged with an empty range", "correct it")
        return ScaleStep(a_min, a_max, b_min, b_max, self._flag(entry, "clip", False))

    def _orientation(self, entry: dict[str, Any]) -> Step:
        codes = self._get(entry, "axcodes")
        if not isinstance(codes, str) or sorted(codes) not in [
            sorted(x + y + z) for x in "RL" for y in "AP" for z in "SI"
        ]:
            raise self._refuse(f"Orientationd to {codes!r}", "use three axis codes such as 'RAS'")
        return OrientationStep(codes)


def read_weights(folder: epath.Path) -> tuple[VISTA3D, str]:
    """Builds VISTA3D from a folder's weights.

    Returns:
      The network, and the sha256 of the file.

    Raises:
      UserError: no weights, or they are not VISTA3D's in names and shapes.
    """
    path = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"{folder}: no weights; it needs one of {', '.join(_WEIGHTS)}")
    data = paths.read_bytes(path, _MAX_WEIGHT_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    state = _state_dict(data, path)
    with torch.device("meta"):
        network = vista3d132()
    expected = network.state_dict()
    if state and all(key.startswith("network.") for key in state):  # the wrapper class of VISTA3D-HF
        state = {key.removeprefix("network."): value for key, value in state.items()}
    wrong = [key for key in expected if key not in state or state[key].shape != expected[key].shape]
    wrong += [key for key in state if key not in expected]
    wrong += [key for key in expected if key not in wrong and not state[key].is_floating_point()]
    if wrong:
        raise UserError(
            f"{path}: {len(wrong)} tensors are not the {len(expected)} of VISTA3D in name, shape or type, "
            f"such as {wrong[0][:100]!r}; use the weights of a vista3d bundle for MONAI 1.4 or newer"
        )
    whole = {
        key: value.to(torch.float32, memory_format=torch.contiguous_format) for key, value in state.items()
    }
    network.load_state_dict(whole, assign=True)
    return network.eval().requires_grad_(False), digest


def _state_dict(data: bytes, path: epath.Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: asks for more than tensors and is not opened; use other weights") from error
    except Exception as error:  # whatever a damaged or hostile file makes the readers raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}); copy it again") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # as trainers save it
        state = state["model"]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise UserError(f"{path}: holds something else than tensors by name; use the weights of a bundle")
    return state
