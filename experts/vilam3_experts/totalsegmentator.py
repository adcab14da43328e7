"""TotalSegmentator as an expert: a third-party model behind its own Python API, in its own environment.

Install `TotalSegmentator` and `vilam3-experts` into one virtual environment and use that environment's
`vilam3-experts`. Fetch the weights with TotalSegmentator's own `totalseg_download_weights`; the expert
neither downloads them nor sends usage statistics.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import pathlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np

from vilam3_experts.base import ExpertFailure, Output
from vilam3_experts.imported.label_tables import clean_name
from vilam3_experts.weight_files.lock import pin_of_file
from vilam3_experts.weights import Weights
from vilam3_jax.data.volumes import Volume
from vilam3_jax.errors import UserError

WEIGHTS_VARIABLE = "TOTALSEG_WEIGHTS_PATH"
_CHECKPOINT = "checkpoint_final.pth"
_SAME_AFFINE = 1e-3  # millimetres


class TotalSegmentator:
    """Runs one task per call; the tasks are the arguments of the card."""

    def __init__(self, weights: Weights) -> None:
        """Finds the package and its weights, in `weights.folder` or TotalSegmentator's default folder.

        Raises `UserError` if it is not installed or has no weights.
        """
        if weights.folder is not None:
            os.environ[WEIGHTS_VARIABLE] = os.fspath(weights.folder)
        try:
            config, libs, api, names = (
                importlib.import_module(f"totalsegmentator.{module}")
                for module in ("config", "libs", "python_api", "map_to_binary")
            )
        except ImportError as error:
            raise UserError(
                f"TOTALSEGMENTATOR is not installed here ({error}); install TotalSegmentator and "
                "vilam3-experts into a separate environment and use its vilam3-experts"
            ) from error
        self._api, self._libs = api, libs
        self._class_map: dict[str, dict[int, str]] = names.class_map
        folder = pathlib.Path(config.get_weights_dir())
        checkpoints = sorted(folder.rglob(_CHECKPOINT)) if folder.is_dir() else []
        if not checkpoints:
            raise UserError(
                f"{folder}: no weights of TotalSegmentator; fetch them with `totalseg_download_weights -t "
                "TASK` where there is a network, and give their folder as --weights"
            )
        digest = hashlib.sha256()
        for file in checkpoints:
            digest.update(f"{file.relative_to(folder).as_posix()}\0{pin_of_file(file).sha256}\n".encode())
        self._sha256 = digest.hexdigest()

    def run(self, data: Volume, args: str) -> Output:
        """Segments one CT with the task `args`.

        Raises `ExpertFailure` if the installed version lacks the task or its weights, or its label map is on
        another grid.
        """
        if args not in self._class_map:
            raise ExpertFailure(f"the installed TotalSegmentator has no task {args!r}; update it")
        import torch

        device = "gpu" if torch.cuda.is_available() else "cpu"
        image = nib.Nifti1Image(data.voxels, data.affine)
        with _offline(self._api, self._libs, args):
            try:
                answer = self._api.totalsegmentator(
                    image, None, ml=True, task=args, quiet=True, device=device
                )
            except SystemExit as error:  # its way to refuse a task
                raise ExpertFailure(
                    f"TotalSegmentator refused task {args!r} (exit code {error.code})"
                ) from error
        answer = nib.as_closest_canonical(answer)
        labels = np.asanyarray(answer.dataobj)
        same_grid = np.allclose(answer.affine, data.affine, atol=_SAME_AFFINE)
        if labels.shape != data.voxels.shape or not same_grid:
            raise ExpertFailure(f"its label map of {labels.shape} voxels is not on the grid of the scan")
        names = {int(i): clean_name(name, args) for i, name in self._class_map[args].items()}
        unknown = sorted(set(np.unique(labels).astype(int).tolist()) - {0, *names})
        if unknown:
            raise ExpertFailure(f"its label map holds ids without a name: {unknown[:5]}")
        return Output(labels=labels.astype(np.uint16), label_names=names, weights_sha256=self._sha256)


@contextlib.contextmanager
def _offline(api: ModuleType, libs: ModuleType, task: str) -> Iterator[None]:
    """Prevents the package from downloading weights and sending usage statistics."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ExpertFailure(
            f"no weights of task {task!r}; fetch them with `totalseg_download_weights -t {task}`"
        )

    replaced = [
        (libs, "download_url_and_unpack", refuse),
        (libs, "download_model_with_license_and_unpack", refuse),
        (api, "send_usage_stats", lambda *_, **__: None),
    ]
    kept = [(module, name, getattr(module, name)) for module, name, _ in replaced if hasattr(module, name)]
    if len(kept) != len(replaced):
        raise ExpertFailure("this version of TotalSegmentator is not known to stay offline; use 2.18")
    for module, name, function in replaced:
        setattr(module, name, function)
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)
