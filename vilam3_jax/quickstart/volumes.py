"""Labelled volumes: which slices to use, and the facts that the labels give about each."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np

from vilam3_jax.data.experts.labels import label_universe
from vilam3_jax.data.volumes import Volume, load_label_map, read_volume
from vilam3_jax.datasets.samples import MODALITY_CODES, Sample
from vilam3_jax.datasets.slices import MIN_PIXELS, PLANE_OF_AXIS, body_slices, pick, pick_halves
from vilam3_jax.quickstart.questions import Facts

# Thirds of a scan along each axis, in RAS order.
_POSITIONS = (
    ("left third", "middle", "right third"),
    ("rear third", "middle", "front third"),
    ("lower third", "middle", "upper third"),
)
_MIN_BRAIN_MM2 = 400.0  # brain masks are generous at the rim of the skull
_MIN_SIDE = 32
_MAX_ANISOTROPY = 2.0
_ORACLE_SOURCES = ("TotalSegmentator reference map", "generated label map")
_ORGAN_EXPERT = ("ORGANS", "organs")
BRAIN_EXPERT = "BRAINSEG"
_ORGANS = frozenset(label_universe(*_ORGAN_EXPERT).values())  # dialogues ask only for what ORGANS can name


def merged_name(name: str) -> str:
    """The organ a label counts as: parts of the lung and of the heart are one organ each.

    >>> merged_name("left lung upper lobe"), merged_name("left kidney")
    ('lung', 'left kidney')
    """
    words = set(name.split())
    if not words & {"vessels", "nodules", "tumor"}:
        return next((organ for organ in ("lung", "heart") if organ in words), name)
    return name


def usable_axes(shape: tuple[int, ...], spacing: np.ndarray) -> list[int]:
    """Axes of a RAS volume whose slices look like ordinary scans; reformats of thick slices do not.

    Such slices have at least 32 voxels per side and pixels at most twice as long as wide. `spacing`: mm, [3].
    """
    axes = []
    for axis in range(3):
        rest = [i for i in range(3) if i != axis]
        pixel = [float(spacing[i]) for i in rest]
        if min(shape[i] for i in rest) >= _MIN_SIDE and max(pixel) <= _MAX_ANISOTROPY * min(pixel):
            axes.append(axis)
    return axes


@dataclasses.dataclass
class LabelledVolume:
    """A scan and the pixel counts of its labels per slice.

    Attributes:
      sample: the sample it was read from.
      volume: the scan.
      pixels: per axis, name → [n] labelled pixels in every slice; all zero for a name known to be absent.
      volumes_ml: name → ml in the whole scan.
    """

    sample: Sample
    volume: Volume
    pixels: list[dict[str, np.ndarray]]
    volumes_ml: dict[str, float]

    @classmethod
    def load(cls, sample: Sample) -> LabelledVolume:
        """Reads the scan and its label map, if any.

        Raises:
          UserError: a file cannot be read, or the map has another grid.
        """
        volume = read_volume(sample.path, modality=MODALITY_CODES[sample.kind])
        pixels: list[dict[str, np.ndarray]] = [{}, {}, {}]
        volumes_ml: dict[str, float] = {}
        if sample.label_map is not None and sample.label_names:
            labels = load_label_map(sample.label_map, volume)
            voxel_ml = float(abs(np.linalg.det(volume.affine[:3, :3]))) / 1000.0
            ids: dict[str, list[int]] = {}
            for label, name in sample.label_names.items():
                if label > 0:
                    ids.setdefault(merged_name(name), []).append(label)
            size = max(int(labels.max()), *(max(i) for i in ids.values())) + 1
            for axis in range(3):
                planes = np.moveaxis(labels, axis, 0)
                counts = np.stack([np.bincount(plane.ravel(), minlength=size) for plane in planes])
                for name, members in ids.items():
                    pixels[axis][name] = counts[:, members].sum(axis=1)
            volumes_ml = {name: float(pixels[0][name].sum()) * voxel_ml for name in ids}
        return cls(sample, volume, pixels, volumes_ml)

    def slices(self, count: int, rng: random.Random) -> list[tuple[int, int]]:
        """Picks (axis, index) pairs.

        Args:
          count: slices per plane; doubled for a scan with a single usable plane. Half of them show the tumor
            (or, in a head with a brain mask, the brain) and half do not, as far as the scan has such slices.
          rng: source of the choice.
        """
        axes = usable_axes(self.volume.voxels.shape, self.volume.spacing)
        count = count if len(axes) > 1 else 2 * count
        chosen = []
        for axis in axes:
            candidates = np.flatnonzero(body_slices(self.volume, axis)).tolist()
            focus = self._tumor_pixels(axis)
            if focus is None and self.sample.body_region == "head":
                focus = self.pixels[axis].get("brain")
            if focus is None:
                picked = pick(candidates, count, rng)
            else:
                showing = [i for i in candidates if focus[i] >= MIN_PIXELS]
                picked = pick_halves(showing, [i for i in candidates if focus[i] == 0], count, rng)
            chosen += [(axis, index) for index in picked]
        return chosen

    def structures(self, axis: int, index: int) -> list[str]:
        """Names of the visible organs, largest first."""
        seen = [n for n, visible in self._visible(axis, index).items() if visible and n in _ORGANS]
        return sorted(seen, key=lambda n: (-int(self.pixels[axis][n][index]), n))

    def facts(self, axis: int, index: int) -> Facts:
        """The known facts about one slice."""
        sample, source = self.sample, self.sample.label_source or ""
        is_ct, is_head = sample.kind == "ct", sample.body_region == "head"
        visible = self._visible(axis, index)
        facts: dict[str, Any] = {}
        organs = {n: v for n, v in visible.items() if n in _ORGANS and (is_ct or n != "brain")}
        if organs:
            volumes_ml = {n: self.volumes_ml[n] for n, v in organs.items() if v}
            facts = {"organs": organs, "organ_source": source, "volumes_ml": volumes_ml}
            if is_ct and source in _ORACLE_SOURCES:  # ORGANS is for CT; no expert reads organs in MRI
                facts |= {"organ_oracle": True, "expert": _ORGAN_EXPERT[0], "expert_args": _ORGAN_EXPERT[1]}
        if is_head and not is_ct:
            facts["expert"] = BRAIN_EXPERT
            if "brain" in visible:
                facts |= {"brain": visible["brain"], "brain_source": source}
            if "brain" in self.volumes_ml:
                facts |= {"brain_ml": self.volumes_ml["brain"], "brain_volume_source": source}
        counts = self._tumor_pixels(axis)
        if counts is not None and not 0 < counts[index] < MIN_PIXELS:
            facts |= {"tumor": bool(counts[index]), "tumor_source": source}
            if facts["tumor"] and is_head and "brain" not in facts:
                facts |= {"brain": True, "brain_source": source}  # a brain tumor implies the brain
        return Facts(
            group=sample.split_group,
            modality="CT" if is_ct else "MRI",
            region=sample.body_region,
            plane=PLANE_OF_AXIS[axis],
            position=_POSITIONS[axis][3 * index // self.volume.voxels.shape[axis]],
            **facts,
        )

    def _tumor_pixels(self, axis: int) -> np.ndarray | None:
        """Pixels of any tumor in every slice along `axis`, [n]; None if no label is a tumor."""
        counts = [c for name, c in self.pixels[axis].items() if name.split()[-1] == "tumor"]
        return np.sum(counts, axis=0) if counts else None

    def _visible(self, axis: int, index: int) -> dict[str, bool]:
        """Name → visible in the slice, without structures too small to be certain."""
        brain = int(np.ceil(_MIN_BRAIN_MM2 / np.delete(self.volume.spacing, axis).prod()))
        visible = {}
        for name, counts in self.pixels[axis].items():
            if counts[index] == 0 or counts[index] >= max(MIN_PIXELS, brain if name == "brain" else 0):
                visible[name] = bool(counts[index])
        return visible
