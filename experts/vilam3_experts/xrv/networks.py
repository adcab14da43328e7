"""MONAI's DenseNet-121 and ResNet-50 with the weights of TorchXRayVision."""

from __future__ import annotations

import re

import safetensors
import safetensors.torch
import torch
from monai.networks.nets import densenet, resnet

from vilam3_experts.bundles import check_tensors
from vilam3_experts.xrv.members import Member
from vilam3_jax.errors import UserError

_THRESHOLDS = "op_threshs"


def build(architecture: str, classes: int) -> torch.nn.Module:
    """An untrained network with one input channel; float32 [B, 1, S, S] to logits [B, classes].

    The architecture is "densenet121" (growth rate 32, blocks of 6, 12, 24 and 16) or "resnet50".
    """
    if architecture == "densenet121":
        network = densenet.DenseNet121(spatial_dims=2, in_channels=1, out_channels=classes)
        network.features.get_submodule("denseblock4").register_forward_pre_hook(_double_single)
        return network
    if architecture == "resnet50":
        # MONAI's defaults are for volumes; torchvision's network has this stride and no biases here.
        return resnet.resnet50(
            spatial_dims=2, n_input_channels=1, num_classes=classes, conv1_t_stride=2, bias_downsample=False
        )
    raise ValueError(f"no architecture {architecture!r}")


def _double_single(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Duplicates a batch of one film; the caller drops the second answer.

    The last block has 49 positions per film. For so few, CPU matrix products sum in another order than for 98
    and more, so the last digits of a film would depend on its batch.
    """
    del module
    (features,) = inputs
    return (torch.cat([features, features]),) if len(features) == 1 else inputs


def monai_name(name: str, architecture: str) -> str:
    """Converts the name of a tensor from torchxrayvision's network to MONAI's."""
    if architecture == "densenet121":
        name = re.sub(r"(denselayer\d+)\.(norm|conv)", r"\1.layers.\2", name)
        return re.sub(r"^classifier\.", "class_layers.out.", name)
    return name.removeprefix("model.")  # torchxrayvision's attribute for torchvision's network


def load(member: Member, content: bytes) -> tuple[torch.nn.Module, torch.Tensor]:
    """Builds the network of `member` from a safetensors file with torchxrayvision's tensor names.

    Returns the network, frozen and in evaluation mode, which may answer a single film twice (see
    `_double_single`); and its thresholds, float32 [classes]. Thresholds in the file take precedence over
    those of the table. Raises `UserError` if the file does not fit.
    """
    try:
        stored = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{member.weights_file}: not a safetensors file ({error}); convert the release file again"
        ) from error
    fix = f"use the release file {member.file}"
    thresholds = torch.tensor(member.thresholds)
    if (own := stored.pop(_THRESHOLDS, None)) is not None:
        own = own.float()
        if own.shape != thresholds.shape or bool(((own <= 0) | (own >= 1)).any()):
            raise UserError(
                f"{member.weights_file}: {_THRESHOLDS} must be {len(thresholds)} numbers between 0 and 1 or"
                f" NaN; {fix}"
            )
        thresholds = own
    state = {monai_name(name, member.architecture): tensor for name, tensor in stored.items()}
    network = build(member.architecture, len(member.thresholds))
    # Files older than PyTorch 0.4.1 lack the counters, which evaluation does not read.
    check_tensors(state, network.state_dict(), member.weights_file, fix, optional="num_batches_tracked")
    network.load_state_dict(state)
    return network.eval().requires_grad_(False), thresholds


def normalise(probabilities: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Maps the operating point of each class to 0.5: torchxrayvision's `op_norm` of [B, classes].

    p / 2t below the threshold t, 1 - (1 - p) / 2(1 - t) from it on; NaN where t is NaN.
    """
    below = probabilities / (thresholds * 2)
    above = 1.0 - (1.0 - probabilities) / ((1.0 - thresholds) * 2)
    return torch.where(probabilities < thresholds, below, above)
