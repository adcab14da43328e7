"""Generated samples: crude bodies, heads and films, for running the whole system without a network.

Organs are ellipsoids, but left and right, Hounsfield units, label maps and absent organs are consistent, so
that questions about them have correct answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import sys
from collections.abc import Sequence
from typing import Any, cast

import nibabel as nib
import numpy as np
from etils import epath
from scipy import ndimage

from vilam3_jax.data.images import encode_png
from vilam3_jax.datasets.samples import Kind, Sample, write_index
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path, write_bytes_atomic

_LABEL_SOURCE = "generated label map"
_FILM_SIDE = 192
_BRAIN_CLASSES = ("no tumor", "glioma", "meningioma", "pituitary")


@dataclasses.dataclass(frozen=True)
class _Organ:
    """An ellipsoid, in fractions of the body's half axes (+x right, +y front, +z head), and its value."""

    name: str
    center: tuple[float, float, float]
    radii: tuple[float, float, float]
    value: float


_ORGANS = (
    _Organ("liver", (0.42, 0.15, 0.35), (0.40, 0.50, 0.42), 62),
    _Organ("spleen", (-0.58, -0.20, 0.42), (0.20, 0.28, 0.26), 50),
    _Organ("right kidney", (0.42, -0.42, -0.30), (0.16, 0.18, 0.26), 190),
    _Organ("left kidney", (-0.42, -0.42, -0.22), (0.16, 0.18, 0.26), 190),
    _Organ("stomach", (-0.30, 0.40, 0.18), (0.26, 0.24, 0.26), 15),
    _Organ("bladder", (0.00, 0.25, -0.70), (0.26, 0.26, 0.18), 5),
)
_HEAD_LABELS = {1: "brain", 2: "brain tumor"}


def make_phantoms(out: PathLike, seed: int = 0, num: int = 6) -> dict[str, epath.Path]:
    """Generates samples and writes `samples.json`; see `vilam3_jax.datasets.samples.read_samples`.

    Sample i of a kind depends only on `seed` and i, and its files are reproducible bit by bit. Some organs
    are absent, every second head has a tumor, and each patient has two films.

    `num` is the number of CT volumes and of MRI volumes; chest films and brain slices are twice as many.

    Returns:
      sample name → path of its image.

    Raises:
      UserError: `num` is below 1, or `out` cannot be written.
    """
    if num < 1:
        raise UserError(f"num is {num}; ask for at least 1 phantom of each kind")
    out = as_path(out)
    kinds = ((_body, num), (_head, num), (_chest_film, 2 * num), (_brain_slice, 2 * num))
    samples = [make(out, seed, i) for make, count in kinds for i in range(count)]
    write_index(out, samples, {})
    return {sample.name: sample.path for sample in samples}


def _sample(
    name: str, path: epath.Path, kind: Kind, modality: str, patient: str, region: str, **more: Any
) -> Sample:
    terms = {"licence": "Apache-2.0", "origin": "generated"}
    return Sample(name, path, kind, modality, patient, patient, body_region=region, **terms, **more)


def _grid(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Coordinates from -1 to 1 along each axis, broadcastable."""
    return tuple(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True))


def _ellipsoid(grid: tuple[np.ndarray, ...], center: np.ndarray, radii: np.ndarray) -> np.ndarray:
    squares = (((g - c) / r) ** 2 for g, c, r in zip(grid, center, radii, strict=True))
    return cast(np.ndarray, sum(squares)) <= 1


def _save_volume(path: epath.Path, voxels: np.ndarray, spacing: float, flips: tuple[bool, ...]) -> None:
    """Writes NIfTI. `flips` reverses stored axes, so that readers cannot assume RAS order."""
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(voxels.shape) - 1) / 2
    orientation = np.array([[axis, -1 if flip else 1] for axis, flip in enumerate(flips)])
    stored = nib.orientations.apply_orientation(voxels, orientation)
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, voxels.shape)
    image = nib.Nifti1Image(np.ascontiguousarray(stored), affine)
    image.header.set_xyzt_units("mm")
    write_bytes_atomic(path, gzip.compress(image.to_bytes(), mtime=0))


def _body(out: epath.Path, seed: int, index: int) -> Sample:
    """A CT of an abdomen: 4 to 6 organs."""
    rng = np.random.default_rng([seed, 1, index])
    shape = tuple(int(n) for n in rng.integers((56, 44, 48), (65, 53, 61)))
    grid = _grid(shape)
    trunk = (grid[0] / 0.92) ** 2 + (grid[1] / 0.86) ** 2 + 0 * grid[2]
    hu = np.where(trunk <= 1, -100.0, -1000.0)  # fat, air
    hu[trunk <= 0.86] = 45  # muscle
    hu[trunk <= 0.66] = -80  # fat between the organs
    spine = _ellipsoid(grid[:2], np.array([0, -0.55]), np.array([0.13, 0.17])) & (trunk <= 1)
    hu[spine] = 420
    labels = np.zeros(shape, np.uint8)
    absent = rng.choice(len(_ORGANS), size=int(rng.integers(0, 3)), replace=False)
    for label, organ in enumerate(_ORGANS, start=1):
        center = np.array(organ.center) + rng.uniform(-0.04, 0.04, 3)
        radii = np.array(organ.radii) * rng.uniform(0.8, 1.15, 3)
        value = organ.value + rng.normal(0, 6)
        if label - 1 in absent:
            continue
        inside = _ellipsoid(grid, center, radii) & (trunk <= 0.86) & ~spine
        hu[inside] = value
        labels[inside] = label
    hu = ndimage.gaussian_filter(hu, 0.5) + rng.normal(0, 9, shape)
    name = f"phantom_ct_{index:03d}"
    spacing, flips = float(rng.uniform(4.0, 5.5)), tuple(rng.random(3) < 0.5)
    path, label_path = out / f"{name}.nii.gz", out / f"{name}_labels.nii.gz"
    _save_volume(path, np.clip(np.round(hu), -1024, 3071).astype(np.int16), spacing, flips)
    _save_volume(label_path, labels, spacing, flips)
    names = {label: organ.name for label, organ in enumerate(_ORGANS, start=1)}
    labelled = {"label_map": label_path, "label_names": names, "label_source": _LABEL_SOURCE}
    patient = f"phantom-{seed}-ct-{index}"
    return _sample(name, path, "ct", "CT", patient, "abdomen", window=(50.0, 400.0), **labelled)


def _head_values(rng: np.random.Generator, grid: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Values and brain mask of a T1-like head on a 2-D or 3-D grid."""
    n = len(grid)
    center = np.zeros(n)
    size = rng.uniform(0.95, 1.0, n)

    def shell(*radii: float) -> np.ndarray:
        return _ellipsoid(grid, center, np.array(radii[:n]) * size)

    values = np.zeros(np.broadcast_shapes(*(g.shape for g in grid)))
    values[shell(0.88, 0.95, 0.92)] = 760  # skin and fat
    values[shell(0.81, 0.88, 0.86)] = 90  # skull
    values[shell(0.75, 0.82, 0.80)] = 160  # liquor
    brain = shell(0.70, 0.78, 0.76)
    values[brain] = 420  # grey matter
    values[shell(0.58, 0.66, 0.62)] = 560  # white matter
    for side in (-1, 1):
        horn = np.array([0.13 * side, 0.02, 0.05])[:n] + rng.uniform(-0.02, 0.02, n)
        values[_ellipsoid(grid, horn, np.array([0.08, 0.28, 0.16])[:n] * rng.uniform(0.7, 1.3))] = 150
    return values, brain


def _head(out: epath.Path, seed: int, index: int) -> Sample:
    """An MRI of a head; every second one has a tumor."""
    rng = np.random.default_rng([seed, 2, index])
    shape = tuple(int(n) for n in rng.integers((44, 52, 44), (55, 63, 55)))
    grid = _grid(shape)
    values, brain = _head_values(rng, grid)
    labels = brain.astype(np.uint8)
    if index % 2:
        center = np.array([rng.choice([-1, 1]) * 0.38, rng.uniform(-0.35, 0.35), rng.uniform(-0.1, 0.35)])
        tumor = _ellipsoid(grid, center, rng.uniform(0.14, 0.26, 3)) & brain
        values[tumor] = 900
        labels[tumor] = 2
    values = ndimage.gaussian_filter(values, 0.6) * rng.uniform(0.6, 1.4) + np.abs(rng.normal(0, 12, shape))
    name = f"phantom_mr_{index:03d}"
    spacing, flips = float(rng.uniform(3.0, 3.6)), tuple(rng.random(3) < 0.5)
    path, label_path = out / f"{name}.nii.gz", out / f"{name}_labels.nii.gz"
    _save_volume(path, np.round(values).astype(np.int16), spacing, flips)
    _save_volume(label_path, labels, spacing, flips)
    labelled = {"label_map": label_path, "label_names": dict(_HEAD_LABELS), "label_source": _LABEL_SOURCE}
    return _sample(name, path, "mr", "MRI", f"phantom-{seed}-mr-{index}", "head", **labelled)


def _film(
    path: epath.Path, image: np.ndarray, rng: np.random.Generator, class_name: str, *subject: str
) -> Sample:
    """Saves `image`, [H, W], 0 black to 1 white, row 0 on top. `subject`: modality, patient, region."""
    noisy = image + rng.normal(0, 0.015, image.shape)
    write_bytes_atomic(path, encode_png(np.clip(noisy * 255, 0, 255).astype(np.uint8)))
    labels = {"label_source": "class name of the film", "class_name": class_name}
    return _sample(path.stem, path, "film", *subject, **labels)


def _chest_film(out: epath.Path, seed: int, index: int) -> Sample:
    """A chest film; every second patient has pneumonia (opacities in one lung)."""
    rng = np.random.default_rng([seed, 3, index])
    patient = index // 2
    down, across = _grid((_FILM_SIDE, _FILM_SIDE))
    trunk = (across / 0.95) ** 4 + (down / 1.3) ** 4 <= 1
    image = np.where(trunk, 0.62, 0.04)
    lungs = np.zeros(trunk.shape, bool)
    for side in (-1, 1):
        center = np.array([-0.08, 0.42 * side]) + rng.uniform(-0.03, 0.03, 2)
        lungs |= _ellipsoid((down, across), center, np.array([0.68, 0.31]) * rng.uniform(0.92, 1.05, 2))
    image[lungs] = 0.24
    ribs = np.sin((down - 0.18 * across**2) * rng.uniform(20, 25) + rng.uniform(0, 6)) > 0.72
    image[ribs & trunk & (np.abs(across) > 0.1)] += 0.12
    heart = _ellipsoid((down, across), np.array([0.22, 0.12]), np.array([0.34, 0.30]) * rng.uniform(0.9, 1.1))
    image[heart | ((np.abs(across) < 0.09) & trunk)] = 0.78
    sick = patient % 2 == 1
    if sick:
        side = rng.choice([-1, 1])
        for _ in range(int(rng.integers(2, 5))):
            center = np.array([rng.uniform(-0.1, 0.4), side * rng.uniform(0.38, 0.52)])
            patch = _ellipsoid((down, across), center, rng.uniform(0.13, 0.24, 2))
            image[patch & lungs & ~heart] = 0.6 + rng.uniform(0, 0.1)
    path, image = out / f"phantom_chest_film_{index:03d}.png", ndimage.gaussian_filter(image, 1.6)
    class_name = "pneumonia" if sick else "normal"
    return _film(path, image, rng, class_name, "X-ray", f"phantom-{seed}-chest-{patient}", "chest")


def _brain_slice(out: epath.Path, seed: int, index: int) -> Sample:
    """An axial head slice of one of four classes."""
    rng = np.random.default_rng([seed, 4, index])
    patient = index // 2
    class_name = _BRAIN_CLASSES[patient % len(_BRAIN_CLASSES)]
    x, y = _grid((_FILM_SIDE, _FILM_SIDE))
    values, brain = _head_values(rng, (x, y))
    side = rng.choice([-1, 1])
    # Typical sites: inside the brain, at its surface, at the midline.
    place, radius = {
        "no tumor": (None, None),
        "glioma": ((0.34 * side, rng.uniform(-0.3, 0.3)), rng.uniform(0.15, 0.22, 2)),
        "meningioma": ((0.60 * side, rng.uniform(-0.2, 0.2)), rng.uniform(0.11, 0.15, 2)),
        "pituitary": ((0.0, 0.18), rng.uniform(0.08, 0.12, 2)),
    }[class_name]
    if place is not None:
        tumor = _ellipsoid((x, y), np.array(place), radius)
        values[tumor & brain] = 960
        if class_name == "glioma":
            values[_ellipsoid((x, y), np.array(place), radius * 0.5)] = 280  # necrotic core
    # Display: columns from the patient's right to the left, rows from the front to the back.
    image = ndimage.gaussian_filter(values, 1.2).T[::-1, ::-1] / 1000
    path, subject = out / f"phantom_brain_slice_{index:03d}.png", f"phantom-{seed}-brain-{patient}"
    return _film(path, image, rng, class_name, "brain MRI slice", subject, "head")


def main(argv: Sequence[str]) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m vilam3_jax.datasets.phantoms", description="Generate small samples without a network."
    )
    parser.add_argument("--out", required=True, help="folder for the files and samples.json")
    parser.add_argument("--seed", type=int, default=0, help="seed of the phantoms")
    parser.add_argument("--num", type=int, default=6, help="CT and MRI volumes; twice as many films")
    options = parser.parse_args(argv)
    paths = make_phantoms(options.out, options.seed, options.num)
    print(f"{len(paths)} phantoms in {options.out}")
    return 0


if __name__ == "__main__":
    from vilam3_jax.cli import guarded

    sys.exit(guarded("phantoms", main, sys.argv[1:]))
