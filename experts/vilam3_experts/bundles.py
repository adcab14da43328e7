"""MONAI bundles read as data: JSON files and weights. No code of a bundle is run."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch

from vilam3_experts.text import listed
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_MAX_JSON_BYTES = 4 << 20
_LISTED = 3


def read_json_object(path: paths.PathLike) -> dict[str, Any]:
    """Reads a JSON file; raises `UserError` if it is not a JSON object."""
    try:
        content = json.loads(paths.read_bytes(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({str(error)[:100]}); fetch the bundle again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; fetch the bundle again")
    return content


def channel_def(metadata: Mapping[str, Any], side: str, name: str) -> Any:
    """`network_data_format/SIDE/NAME/channel_def` of a bundle's metadata; None if it is missing."""
    node: Any = metadata
    for key in ("network_data_format", side, name, "channel_def"):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def read_state_dict(path: paths.PathLike, max_bytes: int) -> tuple[dict[str, torch.Tensor], str]:
    """Reads a state dict, also one under the key `model` of a training checkpoint.

    Reads .safetensors files, and files of `torch.save` with `weights_only=True`. Returns the tensors on the
    CPU and the sha256 (hex) of the file. Raises `UserError` if it is damaged, hostile, or not a dict of
    tensors.
    """
    path = paths.as_path(path)
    data = paths.read_bytes(path, max_bytes)
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or hostile files make the libraries raise anything
        if type(error).__name__ == "UnpicklingError":
            raise UserError(f"{path}: contains more than tensors, not opened; use other weights") from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}); fetch the bundle again") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise UserError(f"{path}: not a dict of named tensors; fetch the bundle again")
    return state, hashlib.sha256(data).hexdigest()


def check_tensors(
    state: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    where: object,
    fix: str,
    *,
    optional: str = "",
    finite: bool = True,
) -> None:
    """Raises `UserError` unless `state` has the names, shapes and floating-point types of `expected`.

    `where` and `fix` complete the message. Names that end in `optional` may be missing; `finite` also
    requires finite values.
    """
    absent = sorted(expected.keys() - state.keys())
    common = sorted(expected.keys() & state.keys())
    shapes = [
        f"{n}: {list(state[n].shape)}, expected {list(expected[n].shape)}"
        for n in common
        if state[n].shape != expected[n].shape
    ]
    faults = {
        "missing": [n for n in absent if not (optional and n.endswith(optional))],
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": shapes,
        "not floating point": [
            n for n in common if expected[n].is_floating_point() and not state[n].is_floating_point()
        ],
    }
    if finite and not any(faults.values()):
        faults["not finite"] = [n for n in common if not bool(torch.isfinite(state[n]).all())]
    found = [f"{len(n)} {what} ({listed(n, _LISTED)[:150]})" for what, n in faults.items() if n]
    if found:
        raise UserError(f"{where}: tensors do not fit the network: {'; '.join(found)}; {fix}")
