"""Reads a `brats_mri_segmentation` bundle: its settings, and its network with weights.

Three files of the folder are read: `configs/metadata.json`, `configs/inference.json`, and `models/model.pt`
or `model.safetensors`. The configuration is parsed, never run: an expression ('$…', '@…') in place of a
needed value is refused. Missing settings default to version 0.5.2 of the bundle.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from etils import epath
from monai.networks.nets.segresnet import SegResNet

from vilam3_experts import bundles, sequences
from vilam3_experts.orientation import is_axcodes
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

NAME = "brats_mri_segmentation"
_HINT = f"give the folder of MONAI's {NAME} bundle"
_MAX_WEIGHT_BYTES = 1 << 30
_MAX_FILTERS = 1024  # of the deepest layer
_MAX_BLOCKS = 64
_MAX_WINDOW = 512
_NETWORK_TARGETS = ("SegResNet", "monai.networks.nets.SegResNet")
_NETWORK_ARGUMENTS = set(inspect.signature(SegResNet).parameters) - {"norm_name"}
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
    """The network of a bundle, and how it is applied.

    `network` are arguments of MONAI's `SegResNet`. `channels` are the roles of the input channels, `regions`
    the output channels: `tc` tumor core, `wt` whole tumor, `et` enhancing tumor. `window` is in voxels,
    `overlap` a fraction. `axcodes` is the index order that the network expects (BraTS stores LPS, and the
    bundle takes files as they are), `pixdim` the voxel spacing in millimetres.
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

    Raises `UserError` if neither contains the weights.
    """
    root = paths.as_path(folder)
    for candidate in (root, root / NAME):
        if _weights_file(candidate) is not None:
            return candidate
    raise UserError(f"{root}: neither models/model.pt nor models/model.safetensors in it; {_HINT}")


def read_settings(bundle: epath.Path) -> Settings:
    """Reads `configs/inference.json` and `configs/metadata.json`.

    Raises `UserError` for invalid JSON, an expression instead of a value, a network other than a SegResNet
    with four input channels and three classes, or an unknown preprocessing step.
    """
    config_path, metadata_path = (bundle / "configs" / f"{name}.json" for name in ("inference", "metadata"))
    config = bundles.read_json_object(config_path) if config_path.exists() else {}
    metadata = bundles.read_json_object(metadata_path) if metadata_path.exists() else {}
    found: dict[str, Any] = {}
    # Bundles define the network under either name; `network` of this one only moves it to a device.
    definition = config.get("network_def", config.get("network"))
    if isinstance(definition, dict):
        found["network"] = _network_arguments(definition, config_path)
    elif "network_def" in config:
        raise UserError(f"{config_path}: network_def is not an object; {_HINT}")
    if "inferer" in config:
        found |= _inferer(config["inferer"], config_path)
    if "preprocessing" in config:
        found |= _preprocessing(config["preprocessing"], config_path)
    found |= _channels(metadata, metadata_path)
    settings = Settings(**found)
    step = 2 ** (len(settings.network.get("blocks_down", _NETWORK["blocks_down"])) - 1)
    if any(n % step for n in settings.window):
        raise UserError(
            f"{config_path}: roi_size {list(settings.window)} is not divisible by {step}, as the network "
            "needs; correct it"
        )
    return settings


def load_network(bundle: epath.Path, settings: Settings) -> tuple[SegResNet, str]:
    """Builds the network and loads its weights, whose names and shapes must match exactly.

    Returns the network in evaluation mode, and the sha256 of the weights file.
    """
    path = _weights_file(bundle)
    if path is None:
        raise UserError(f"{bundle}: no weights in models/; {_HINT}")
    state, sha256 = bundles.read_state_dict(path, _MAX_WEIGHT_BYTES)
    try:
        network = SegResNet(**settings.network)
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:  # MONAI, for bad settings
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{bundle}: its config does not build a SegResNet ({reason}); {_HINT}") from error
    bundles.check_tensors(state, network.state_dict(), path, _HINT)
    network.load_state_dict(state)
    return network.eval(), sha256


def _weights_file(bundle: epath.Path) -> epath.Path | None:
    candidates = (bundle / "models" / name for name in ("model.safetensors", "model.pt"))
    return next((path for path in candidates if path.exists()), None)


def _check_no_expression(value: Any, name: str, path: epath.Path) -> None:
    """Refuses expressions of MONAI's configuration language in `value`."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str) and item.startswith(("$", "@", "%")):
            raise UserError(f"{path}: {name} is an expression, which is not run; write its value instead")
        rest += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def _network_arguments(definition: dict[str, Any], path: epath.Path) -> dict[str, Any]:
    _check_no_expression(definition, "network_def", path)
    if definition.get("_target_") not in _NETWORK_TARGETS:
        raise UserError(f"{path}: network_def is not a SegResNet; {_HINT}")
    arguments = {name: value for name, value in definition.items() if not name.startswith("_")}
    if unknown := sorted(set(arguments) - _NETWORK_ARGUMENTS):
        raise UserError(f"{path}: network_def has unknown arguments ({', '.join(unknown)[:100]}); {_HINT}")
    down, up = (arguments.get(name, _NETWORK[name]) for name in ("blocks_down", "blocks_up"))
    filters = arguments.get("init_filters", 8)
    if (
        not all(map(_is_size_list, (down, up, [filters])))
        or len(up) != len(down) - 1
        or sum(down) + sum(up) > _MAX_BLOCKS
        or filters * 2 ** (len(down) - 1) > _MAX_FILTERS
    ):
        raise UserError(f"{path}: blocks and filters of network_def do not define a SegResNet; {_HINT}")
    channels = (arguments.get("in_channels"), arguments.get("out_channels"), arguments.get("spatial_dims", 3))
    if channels != (4, 3, 3):
        raise UserError(
            f"{path}: network_def has input channels, output channels and dimensions {channels}, expected "
            f"(4, 3, 3); {_HINT}"
        )
    return arguments


def _is_size_list(values: Any) -> bool:
    if not isinstance(values, list) or not values:
        return False
    return all(type(n) is int and 0 < n <= _MAX_FILTERS for n in values)


def _inferer(definition: Any, path: epath.Path) -> dict[str, Any]:
    _check_no_expression(definition, "inferer", path)
    if not isinstance(definition, dict) or definition.get("_target_") != "SlidingWindowInferer":
        raise UserError(f"{path}: inferer is not a SlidingWindowInferer; {_HINT}")
    window: Any = definition.get("roi_size")
    overlap = definition.get("overlap", 0.25)
    if not _is_size_list(window) or len(window) != 3 or max(window) > _MAX_WINDOW:
        raise UserError(f"{path}: roi_size of the inferer is not three sizes up to {_MAX_WINDOW}; correct it")
    if not isinstance(overlap, (int, float)) or not 0 <= overlap < 1:
        raise UserError(f"{path}: overlap of the inferer is not between 0 and 1; correct it")
    if definition.get("mode", "constant") != "constant":
        raise UserError(f"{path}: the inferer has an unknown blending mode; {_HINT}")
    return {"window": tuple(window), "overlap": float(overlap)}


def _preprocessing(definition: Any, path: epath.Path) -> dict[str, Any]:
    """Index order and spacing, if the bundle adds such steps to those of 0.5.2."""
    _check_no_expression(definition, "preprocessing", path)
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
        if kind == "Orientation" and is_axcodes(axcodes):
            found["axcodes"] = axcodes
        elif kind == "Spacing" and isinstance(pixdim, list) and _is_pixdim(pixdim):
            found["pixdim"] = tuple(float(p) for p in pixdim)
        else:
            raise UserError(f"{path}: preprocessing has an unknown step {kind[:40]}; {_HINT}")
    return found


def _is_pixdim(pixdim: list[Any]) -> bool:
    return len(pixdim) == 3 and all(isinstance(p, (int, float)) and 0.2 <= p <= 10 for p in pixdim)


def _channels(metadata: dict[str, Any], path: epath.Path) -> dict[str, tuple[str, ...]]:
    """Order of the input and output channels in `network_data_format`."""
    found: dict[str, tuple[str, ...]] = {}
    if (names := _channel_names(metadata, "inputs", "image")) is not None:
        roles = tuple(sequences.from_name(name).role or "" for name in names)
        if sorted(roles) != sorted(sequences.ROLES):
            raise UserError(f"{path}: input channels are not T1c, T1, T2 and FLAIR; {_HINT}")
        found["channels"] = roles
    if (names := _channel_names(metadata, "outputs", "pred")) is not None:
        regions = tuple(_REGIONS.get(name.lower(), "") for name in names)
        if sorted(regions) != sorted(_REGIONS.values()):
            raise UserError(f"{path}: output channels are not tumor core, whole and enhancing tumor; {_HINT}")
        found["regions"] = regions
    return found


def _channel_names(metadata: dict[str, Any], side: str, name: str) -> list[str] | None:
    node = bundles.channel_def(metadata, side, name)
    return [str(node.get(str(n), "")) for n in range(len(node))] if isinstance(node, dict) else None
