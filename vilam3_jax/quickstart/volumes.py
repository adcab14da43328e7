"""Facts about the slices of a labelled volume."""

from __future__ import annotations

import dataclasses
import random

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

ORACLE_SOURCES = ("TotalSegmentator reference map", "generated label map")
ORGAN_EXPERT = ("ORGANS", "organs")
BRAIN_EXPERT = "BRAINSEG"

# Parts that the expert, and so the questions, name as one.
_MERGED = (("lung", "lung"), ("heart", "heart"))
# What dialogues ask for: exactly what ORGANS may name.
ORGANS = frozenset(label_universe(*ORGAN_EXPERT).values())


def merged_name(name: str) -> str:
    """The organ a label counts as: `left lung upper lobe` is part of the lung.

    >>> merged_name("left lung upper lobe"), merged_name("left kidney")
    ('lung', 'left kidney')
    """
    words = name.split()
    for part, whole in _MERGED:
        if part in words and not {"vessels", "nodules", "tumor"} & set(words):
            return whole
    return name


def is_tumor(name: str) -> bool:
    """Whether a label stands for a tumour, of whatever organ."""
    return name.split()[-1] == "tumor"


def usable_axes(shape: tuple[int, ...], spacing: np.ndarray) -> list[int]:
    """Axes along which slices look like the scans people read.

    Args:
      shape: of the volume, RAS.
      spacing: mm along each axis, [3].

    Returns:
      Axes whose slices have both sides of at least 32 voxels and pixels at most twice as long as
      wide; reformats of a thick-slice scan do not.
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
    """A scan with its labels counted per slice.

    Attributes:
      sample: where it comes from.
      volume: the scan.
      pixels: per axis, name -> [n] labelled pixels in every slice. Names known to be absent are there, all
        zero.
      volumes_ml: name -> ml in the whole scan.
    """

    sample: Sample
    volume: Volume
    pixels: list[dict[str, np.ndarray]]
    volumes_ml: dict[str, float]

    @classmethod
    def load(cls, sample: Sample) -> LabelledVolume:
        """Reads the scan and, if there is one, its label map.

        Raises:
          UserError: a file cannot be read, or the map lies on another grid.
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
            counts = [_counts_along(labels, axis, size) for axis in range(3)]
            for name, members in ids.items():
                for axis in range(3):
                    pixels[axis][name] = counts[axis][:, members].sum(axis=1)
                volumes_ml[name] = float(pixels[0][name].sum()) * voxel_ml
        return cls(sample, volume, pixels, volumes_ml)

    def candidates(self, axis: int) -> list[int]:
        """Slices along `axis` that hold enough of the body."""
        return np.flatnonzero(body_slices(self.volume, axis)).tolist()

    def slices(self, count: int, rng: random.Random) -> list[tuple[int, int]]:
        """Picks (axis, index) pairs.

        Args:
          count: slices per plane; twice as many of a scan that is good for one plane only. Half of them show
            the tumour, or the brain of a masked head, and half do not, as far as the scan has such slices.
          rng: source of the choice.
        """
        axes = usable_axes(self.volume.voxels.shape, self.volume.spacing)
        count = count if len(axes) > 1 else 2 * count
        chosen = []
        for axis in axes:
            candidates = self.candidates(axis)
            focus = self.tumor_pixels(axis)
            if focus is None and self.sample.body_region == "head":
                focus = self.pixels[axis].get("brain")
            if focus is None:
                picked = pick(candidates, count, rng)
            else:
                showing = [i for i in candidates if focus[i] >= MIN_PIXELS]
                picked = pick_halves(showing, [i for i in candidates if focus[i] == 0], count, rng)
            chosen += [(axis, index) for index in picked]
        return chosen

    def tumor_pixels(self, axis: int) -> np.ndarray | None:
        """Pixels of any tumour in every slice along `axis`, [n]; None if no label is a tumour."""
        counts = [c for name, c in self.pixels[axis].items() if is_tumor(name)]
        return np.sum(counts, axis=0) if counts else None

    def tumor_visible(self, axis: int, index: int) -> bool | None:
        """Whether a tumour is in the slice; None if nobody looked or it is doubtful."""
        counts = self.tumor_pixels(axis)
        if counts is None or 0 < counts[index] < MIN_PIXELS:
            return None
        return bool(counts[index])

    def least_pixels(self, name: str, axis: int) -> int:
        """How many pixels make a structure visible in a slice along `axis`."""
        if name != "brain":
            return MIN_PIXELS
        pixel = np.delete(self.volume.spacing, axis).prod()
        return max(MIN_PIXELS, int(np.ceil(_MIN_BRAIN_MM2 / pixel)))

    def visible(self, axis: int, index: int) -> dict[str, bool]:
        """Name -> visible in the slice; left out with some pixels, but fewer than `least_pixels`."""
        out = {}
        for name, counts in self.pixels[axis].items():
            if counts[index] == 0 or counts[index] >= self.least_pixels(name, axis):
                out[name] = bool(counts[index])
        return out

    def structures(self, axis: int, index: int) -> list[str]:
        """Names of the visible organs, largest first."""
        seen = [n for n, v in self.visible(axis, index).items() if v and n in ORGANS]
        return sorted(seen, key=lambda n: (-int(self.pixels[axis][n][index]), n))

    def facts(self, axis: int, index: int) -> Facts:
        """What is known of one slice."""
        sample = self.sample
        base = Facts(
            group=sample.split_group,
            modality="CT" if sample.kind == "ct" else "MRI",
            region=sample.body_region,
            plane=PLANE_OF_AXIS[axis],
            position=_POSITIONS[axis][3 * index // self.volume.voxels.shape[axis]],
        )
        visible = self.visible(axis, index)
        facts = self._ct_facts(visible) if sample.kind == "ct" else self._mr_facts(visible)
        tumor = self.tumor_visible(axis, index)
        if tumor is not None:
            facts |= {"tumor": tumor, "tumor_source": sample.label_source or ""}
            if tumor and sample.body_region == "head" and "brain" not in facts:
                # A tumour of the brain lies in the brain.
                facts |= {"brain": True, "brain_source": sample.label_source or ""}
        return dataclasses.replace(base, **facts)

    def _ct_facts(self, visible: dict[str, bool]) -> dict:
        source = self.sample.label_source or ""
        organs = {n: v for n, v in visible.items() if n in ORGANS}
        out: dict = {}
        if organs:
            oracle = source in ORACLE_SOURCES
            out |= {
                "organs": organs,
                "organ_source": source,
                "organ_oracle": oracle,
                "volumes_ml": {n: self.volumes_ml[n] for n, v in organs.items() if v},
            }
            if oracle:
                out |= {"expert": ORGAN_EXPERT[0], "expert_args": ORGAN_EXPERT[1]}
        return out

    def _mr_facts(self, visible: dict[str, bool]) -> dict:
        sample, source = self.sample, self.sample.label_source or ""
        out: dict = {}
        organs = {n: v for n, v in visible.items() if n in ORGANS and n != "brain"}
        if organs:
            # No expert reads these: the card of ORGANS is for CT.
            out |= {
                "organs": organs,
                "organ_source": source,
                "volumes_ml": {n: self.volumes_ml[n] for n, v in organs.items() if v},
            }
        if sample.body_region != "head":
            return out
        out["expert"] = BRAIN_EXPERT
        if "brain" in visible:
            out |= {"brain": visible["brain"], "brain_source": source}
        if "brain" in self.volumes_ml:
            out |= {"brain_ml": self.volumes_ml["brain"], "brain_volume_source": source}
        return out


def _counts_along(labels: np.ndarray, axis: int, size: int) -> np.ndarray:
    """[n, size] pixels of every label id in every slice along `axis`."""
    planes = np.moveaxis(labels, axis, 0)
    return np.stack([np.bincount(plane.ravel(), minlength=size) for plane in planes])
