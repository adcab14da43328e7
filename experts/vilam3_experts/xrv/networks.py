"""MONAI's DenseNet-121 and ResNet-50 with the weights of TorchXRayVision."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch
from monai.networks.nets import densenet, resnet

from vilam3_experts.xrv.members import Member
from vilam3_jax.errors import UserError

_THRESHOLDS = "op_threshs"


def build(architecture: str, classes: int) -> torch.nn.Module:
    """An untrained network of one input channel; float32 [B, 1, S, S] to logits [B, classes].

    Args:
      architecture: "densenet121" (growth rate 32, blocks of 6, 12, 24 and 16) or "resnet50".
      classes: outputs.
    """
    if architecture == "densenet121":
        network = densenet.DenseNet121(spatial_dims=2, in_channels=1, out_channels=classes)
        network.features.get_submodule("denseblock4").register_forward_pre_hook(_never_alone)
        return network
    if architecture == "resnet50":
        # MONAI's defaults are for volumes; torchvision's network has stride 2 here and no biases there.
        return resnet.resnet50(
            spatial_dims=2, n_input_channels=1, num_classes=classes, conv1_t_stride=2, bias_downsample=False
        )
    raise ValueError(f"no architecture {architecture!r}")


def _never_alone(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Doubles a batch of one film; whoever calls the network drops the second answer.

    The last block has 49 positions a film. For so few, the CPU's matrix products add in another order than
    for 98 and more, and a film's last digits would depend on whether others were in its batch.
    """
    del module
    (features,) = inputs
    return (torch.cat([features, features]),) if len(features) == 1 else inputs


def monai_name(name: str, architecture: str) -> str:
    """Name of a tensor in MONAI's network, from its name in torchxrayvision's."""
    if architecture == "densenet121":
        name = re.sub(r"(denselayer\d+)\.(norm|conv)", r"\1.layers.\2", name)
        return re.sub(r"^classifier\.", "class_layers.out.", name)
    return name.removeprefix("model.")  # the whole module keeps torchvision's network under this name


def load(member: Member, content: bytes) -> tuple[torch.nn.Module, torch.Tensor]:
    """Builds the network of `member` from its weights.

    Args:
      member: which one.
      content: a safetensors file with torchxrayvision's tensor names.

    Returns:
      The network, frozen and in evaluation mode, and its thresholds, float32 [classes]. It may answer a
      single film twice, see `_never_alone`. Thresholds that the file itself holds go before those of the
      table: they belong to these weights.

    Raises:
      UserError: no safetensors file, or tensors are missing, left over, of another shape or not finite.
    """
    try:
        stored = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{member.weights_file}: is no safetensors file ({error}); convert the release file again"
        ) from error
    thresholds = _thresholds(member, stored.pop(_THRESHOLDS, None))
    state = {monai_name(name, member.architecture): tensor for name, tensor in stored.items()}
    network = build(member.architecture, len(member.thresholds))
    _check(member, state, network.state_dict())
    network.load_state_dict(state)
    return network.eval().requires_grad_(False), thresholds


def _thresholds(member: Member, stored: torch.Tensor | None) -> torch.Tensor:
    table = torch.tensor(member.thresholds)
    if stored is None:
        return table
    found = stored.float()
    if found.shape != table.shape or bool(((found <= 0) | (found >= 1)).any()):
        raise UserError(
            f"{member.weights_file}: {_THRESHOLDS} must be {len(table)} numbers between 0 and 1 or NaN;"
            f" use the release file {member.file}"
        )
    return found


def _check(member: Member, state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    fix = f"use the release file {member.file}"
    # Files older than PyTorch 0.4.1 lack the counters, which evaluation does not read.
    missing = [n for n in sorted(wanted.keys() - state.keys()) if not n.endswith("num_batches_tracked")]
    extra = sorted(state.keys() - wanted.keys())
    if missing or extra:
        told = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which the network has not"
        raise UserError(
            f"{member.weights_file}: {told} ({len(missing)} tensors missing, {len(extra)} left over); {fix}"
        )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{list(tensor.shape)}, expected {list(wanted[name].shape)}"
            raise UserError(f"{member.weights_file}: {name} has shape {shapes}; {fix}")
        if not math.isfinite(float(tensor.double().sum())):
            raise UserError(f"{member.weights_file}: {name} holds values that are not finite; {fix}")


def normalise(probabilities: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Puts each class's operating point at 0.5: torchxrayvision's `op_norm`.

    p / 2t below the threshold t, 1 - (1 - p) / 2(1 - t) from it on; NaN where t is NaN.

    Args:
      probabilities: [B, classes].
      thresholds: [classes].
    """
    below = probabilities / (thresholds * 2)
    above = 1.0 - (1.0 - probabilities) / ((1.0 - thresholds) * 2)
    return torch.where(probabilities < thresholds, below, above)
