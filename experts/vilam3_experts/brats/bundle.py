"""A `brats_mri_segmentation` bundle folder: its settings as data, and its network with weights.

Three files of the folder are read: `configs/metadata.json`, `configs/inference.json`, and `models/model.pt`
or `model.safetensors`. The configuration is parsed, never run: an expression in it ('$…', '@…') where a value
is needed is refused. What the files do not say is as in version 0.5.2 of the bundle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any, cast

import safetensors.torch
import torch
from etils import epath
from monai.networks.nets.segresnet import SegResNet

from vilam3_experts import sequences
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

NAME = "brats_mri_segmentation"
_HINT = f"give the folder of MONAI's {NAME} bundle"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_WEIGHT_BYTES = 1 << 30
_MAX_FILTERS = 1024  # of the deepest layer
_MAX_BLOCKS = 64
_MAX_WINDOW = 512
_NETWORK_TARGETS = ("SegResNet", "monai.networks.nets.SegResNet")
_NETWORK_ARGUMENTS = {
    "spatial_dims",
    "init_filters",
    "in_channels",
    "out_channels",
    "dropout_prob",
    "act",
    "norm",
    "num_groups",
    "use_conv_final",
    "blocks_down",
    "blocks_up",
    "upsample_mode",
}
_NETWORK = {
    "blocks_down": [1, 2, 2, 4],
    "blocks_up": [1, 1, 1],
    "init_filters": 16,
    "in_channels": 4,
    "out_channels": 3,
    "dropout_prob": 0.2,
}
_REGIONS = {"tumor core": "tc", "whole tumor": "wt", "enhancing tumor": "et"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a bundle says of its network and of how it is applied.

    Attributes:
      network: arguments of MONAI's `SegResNet`.
      channels: roles of the input channels, in order.
      regions: the output channels in order: `tc` tumor core, `wt` whole tumor, `et` enhancing tumor.
      window: voxels of the sliding window.
      overlap: of neighbouring windows, as a fraction.
      axcodes: index order that the network sees. BraTS stores LPS, and the bundle takes files as they are.
      pixdim: millimetres between voxels that the network expects.
    """

    network: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(_NETWORK))
    channels: tuple[str, ...] = sequences.ROLES
    regions: tuple[str, ...] = ("tc", "wt", "et")
    window: tuple[int, int, int] = (240, 240, 160)
    overlap: float = 0.5
    axcodes: str = "LPS"
    pixdim: tuple[float, float, float] = (1.0, 1.0, 1.0)


def find_bundle(folder: paths.PathLike) -> epath.Path:
    """The bundle in `folder`: the folder itself, or the subfolder with the bundle's name.

    Raises:
      UserError: neither holds the weights.
    """
    root = paths.as_path(folder)
    for candidate in (root, root / NAME):
        if _weights_file(candidate) is not None:
            return candidate
    raise UserError(f"{root}: neither models/model.pt nor models/model.safetensors in it; {_HINT}")


def read_settings(bundle: epath.Path) -> Settings:
    """Reads `configs/inference.json` and `configs/metadata.json`; what they do not say is as in 0.5.2.

    Raises:
      UserError: not JSON, an expression instead of a value, a network that is no SegResNet of four channels
        and three classes, or a step of the preprocessing that is not known here.
    """
    config, config_path = _read_json(bundle / "configs" / "inference.json")
    metadata, metadata_path = _read_json(bundle / "configs" / "metadata.json")
    found: dict[str, Any] = {}
    # Bundles define the network under either name; `network` of this one only moves it to a device.
    definition = config.get("network_def", config.get("network"))
    if isinstance(definition, dict):
        found["network"] = _network_arguments(definition, config_path)
    elif "network_def" in config:
        raise UserError(f"{config_path}: network_def is no object; {_HINT}")
    if "inferer" in config:
        found |= _inferer(config["inferer"], config_path)
    if "preprocessing" in config:
        found |= _preprocessing(config["preprocessing"], config_path)
    found |= _channels(metadata, metadata_path)
    settings = Settings(**found)
    step = 2 ** (len(settings.network.get("blocks_down", _NETWORK["blocks_down"])) - 1)
    if any(n % step for n in settings.window):
        raise UserError(
            f"{config_path}: a window of {settings.window} voxels does not divide by {step}, as the network "
            "needs; correct roi_size"
        )
    return settings


def load_network(bundle: epath.Path, settings: Settings) -> tuple[SegResNet, str]:
    """Builds the network and loads its weights; every tensor must be there, with its shape, and no other.

    Returns:
      The network in evaluation mode, and the sha256 of the weights file.

    Raises:
      UserError: names the file and what is wrong with it.
    """
    path = _weights_file(bundle)
    if path is None:
        raise UserError(f"{bundle}: no weights in models/; {_HINT}")
    data = paths.read_bytes(path, _MAX_WEIGHT_BYTES)
    state = _state_dict(path, data)
    try:
        network = SegResNet(**settings.network)
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{bundle}: no SegResNet can be built as its config says ({reason}); {_HINT}"
        ) from error
    _check_state(network, state, path)
    network.load_state_dict(state)
    return network.eval(), hashlib.sha256(data).hexdigest()


def _weights_file(bundle: epath.Path) -> epath.Path | None:
    candidates = (bundle / "models" / name for name in ("model.safetensors", "model.pt"))
    return next((path for path in candidates if path.exists()), None)


def _read_json(path: epath.Path) -> tuple[dict[str, Any], epath.Path]:
    if not path.exists():
        return {}, path
    try:
        content = json.loads(paths.read_bytes(path, _MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON ({str(error)[:100]}); fetch the bundle again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; fetch the bundle again")
    return content, path


def _plain(value: Any, name: str, path: epath.Path) -> Any:
    """`value`, unless it is or holds an expression of MONAI's configuration language."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str) and item.startswith(("$", "@", "%")):
            raise UserError(
                f"{path}: {name} is an expression, which is not run; write its value into the file"
            )
        rest += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return value


def _network_arguments(definition: dict[str, Any], path: epath.Path) -> dict[str, Any]:
    definition = _plain(definition, "network_def", path)
    if definition.get("_target_") not in _NETWORK_TARGETS:
        raise UserError(f"{path}: network_def is no SegResNet; {_HINT}")
    arguments = {name: value for name, value in definition.items() if not name.startswith("_")}
    if unknown := sorted(set(arguments) - _NETWORK_ARGUMENTS):
        raise UserError(
            f"{path}: network_def has arguments not known here ({', '.join(unknown)[:100]}); {_HINT}"
        )
    down, up = (arguments.get(name, _NETWORK[name]) for name in ("blocks_down", "blocks_up"))
    filters = arguments.get("init_filters", 8)
    numbers = [*_whole(down), *_whole(up), *_whole([filters])]
    deepest = filters * 2 ** (len(down) - 1) if numbers else 0
    if (
        not numbers
        or len(up) != len(down) - 1
        or sum(numbers) > _MAX_BLOCKS + filters
        or deepest > _MAX_FILTERS
    ):
        raise UserError(f"{path}: blocks and filters of network_def make no SegResNet; {_HINT}")
    channels = (arguments.get("in_channels"), arguments.get("out_channels"), arguments.get("spatial_dims", 3))
    if channels != (4, 3, 3):
        raise UserError(
            f"{path}: network_def has channels in, channels out and dimensions of {channels}, expected "
            f"(4, 3, 3); {_HINT}"
        )
    return arguments


def _whole(values: Any) -> list[int]:
    """`values` if they are positive whole numbers, else none."""
    good = isinstance(values, list) and all(type(n) is int and 0 < n <= _MAX_FILTERS for n in values)
    return values if good else []


def _inferer(definition: Any, path: epath.Path) -> dict[str, Any]:
    definition = _plain(definition, "inferer", path)
    if not isinstance(definition, dict) or definition.get("_target_") != "SlidingWindowInferer":
        raise UserError(f"{path}: inferer is no SlidingWindowInferer; {_HINT}")
    window, overlap = definition.get("roi_size"), definition.get("overlap", 0.25)
    if len(_whole(window)) != 3 or max(cast(list[int], window)) > _MAX_WINDOW:
        raise UserError(f"{path}: roi_size of the inferer is not three sizes up to {_MAX_WINDOW}; correct it")
    if not isinstance(overlap, (int, float)) or not 0 <= overlap < 1:
        raise UserError(f"{path}: overlap of the inferer is not between 0 and 1; correct it")
    if definition.get("mode", "constant") != "constant":
        raise UserError(f"{path}: the inferer blends windows in a way not known here; {_HINT}")
    return {"window": tuple(cast(list[int], window)), "overlap": float(overlap)}


def _preprocessing(definition: Any, path: epath.Path) -> dict[str, Any]:
    """Index order and spacing, where the bundle prepares its input further than 0.5.2 does."""
    definition = _plain(definition, "preprocessing", path)
    steps = definition.get("transforms") if isinstance(definition, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UserError(f"{path}: preprocessing lists no transforms; {_HINT}")
    found: dict[str, Any] = {}
    for step in steps:
        kind = str(step.get("_target_")).removesuffix("d")
        if kind == "NormalizeIntensity" and step.get("nonzero") is True and step.get("channel_wise") is True:
            continue
        if kind in ("LoadImage", "EnsureChannelFirst", "EnsureType"):
            continue
        axcodes, pixdim = step.get("axcodes"), step.get("pixdim")
        if kind == "Orientation" and isinstance(axcodes, str) and _is_orientation(axcodes):
            found["axcodes"] = axcodes
        elif kind == "Spacing" and isinstance(pixdim, list) and _is_pixdim(pixdim):
            found["pixdim"] = tuple(float(p) for p in pixdim)
        else:
            raise UserError(f"{path}: preprocessing has a step {kind[:40]} not known here; {_HINT}")
    return found


def _is_orientation(axcodes: str) -> bool:
    pairs = ["".join(sorted(pair)) for pair in ("LR", "AP", "IS")]
    return sorted(next((p for p in pairs if letter in p), "") for letter in axcodes) == sorted(pairs)


def _is_pixdim(pixdim: list[Any]) -> bool:
    return len(pixdim) == 3 and all(isinstance(p, (int, float)) and 0.2 <= p <= 10 for p in pixdim)


def _channels(metadata: dict[str, Any], path: epath.Path) -> dict[str, tuple[str, ...]]:
    """Order of the input and output channels, as `network_data_format` states it."""
    found: dict[str, tuple[str, ...]] = {}
    if (stated := _channel_names(metadata, "inputs", "image")) is not None:
        roles = tuple(sequences.from_name(name).role or "" for name in stated)
        if sorted(roles) != sorted(sequences.ROLES):
            raise UserError(f"{path}: input channels are not T1c, T1, T2 and FLAIR; {_HINT}")
        found["channels"] = roles
    if (stated := _channel_names(metadata, "outputs", "pred")) is not None:
        regions = tuple(_REGIONS.get(name.lower(), "") for name in stated)
        if sorted(regions) != sorted(_REGIONS.values()):
            raise UserError(f"{path}: output channels are not tumor core, whole and enhancing tumor; {_HINT}")
        found["regions"] = regions
    return found


def _channel_names(metadata: dict[str, Any], side: str, name: str) -> list[str] | None:
    node: Any = metadata
    for key in ("network_data_format", side, name, "channel_def"):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return None
    return [str(node.get(str(number), "")) for number in range(len(node))]


def _state_dict(path: epath.Path, data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a weights file. A checkpoint of a training run holds them under the key `model`."""
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the libraries raise
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{path}: no weights can be read from it ({reason}); fetch the bundle again"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds something else than a dict of tensors; fetch the bundle again")
    return state


def _check_state(network: torch.nn.Module, state: Mapping[str, torch.Tensor], path: epath.Path) -> None:
    wanted = network.state_dict()
    missing, unknown = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    differing = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    faults = [
        f"{len(names)} {what} ({', '.join(map(str, names[:3]))[:150]})"
        for names, what in (
            (missing, "tensors missing"),
            (unknown, "tensors too many"),
            (differing, "tensors of another shape"),
        )
        if names
    ]
    if not faults and not all(torch.isfinite(value).all() for value in state.values()):
        faults = ["values that are not finite"]
    if faults:
        raise UserError(f"{path}: does not fit the network: {'; '.join(faults)}; {_HINT}")
