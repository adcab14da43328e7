"""Checks of an expert's result: is it plausible?

Each kind of check is a function in `_KINDS`. The subject of a check is a pattern with `*` and `?`, as in file
names; a pair of patterns, such as `liver/spleen`, compares the first with the second.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np
from scipy import ndimage

from vilam3_jax.data.experts.cards import Check
from vilam3_jax.data.experts.labels import label_universe
from vilam3_jax.data.experts.record import THRESHOLD, Segment, Verdict
from vilam3_jax.data.experts.verify.evidence import Evidence, body_centre, body_threshold
from vilam3_jax.errors import UserError

_NEIGHBOURS = np.ones((3, 3, 3), bool)
# Absent in healthy patients: a result without them is not empty.
_LESIONS = ("*tumor*", "*lesion*", "*cancer*", "*cyst*", "*mass*")


@dataclasses.dataclass(frozen=True, eq=False)
class LabelMeasures:
    """Measurements of one label, computed on first use inside the label's bounding box.

    Sums proceed plane by plane: a float64 copy of a lung, half of a scan, would take twice the scan's memory.
    """

    segment: Segment  # the label
    labels: np.ndarray  # label map, integers [X, Y, Z]
    affine: np.ndarray  # [4, 4], voxel index to RAS millimetres
    voxels: np.ndarray | None = None  # the scan, [X, Y, Z], or None

    @property
    def name(self) -> str:
        """Name of the label."""
        return self.segment.name

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """Bounding box in voxels."""
        b = self.segment.bbox
        return slice(b[0], b[3]), slice(b[1], b[4]), slice(b[2], b[5])

    def _planes(self) -> Iterator[tuple[int, np.ndarray]]:
        """(index along axis 2, mask of the box in that plane, bool)."""
        x, y, z = self.box
        for plane in range(z.start, z.stop):
            yield plane, self.labels[x, y, plane] == self.segment.label_id

    @functools.cached_property
    def centroid_mm(self) -> np.ndarray:
        """Centroid, RAS millimetres, float64 [3]."""
        x, y, _ = self.box
        columns, rows = np.arange(x.start, x.stop), np.arange(y.start, y.stop)
        total = np.zeros(3)
        for plane, mask in self._planes():
            count = np.count_nonzero(mask)
            total += mask.sum(axis=1) @ columns, mask.sum(axis=0) @ rows, count * plane
        return self.affine[:3, :3] @ (total / self.segment.voxels) + self.affine[:3, 3]

    @functools.cached_property
    def main_part(self) -> float:
        """Share of the voxels in the largest 26-connected component."""
        if self.segment.components == 1:
            return 1.0
        mask = self.labels[self.box] == self.segment.label_id
        parts, _ = cast(tuple[np.ndarray, int], ndimage.label(mask, _NEIGHBOURS))
        return float(np.bincount(parts.ravel())[1:].max()) / self.segment.voxels

    @functools.cached_property
    def mean_and_deviation(self) -> tuple[float, float]:
        """Mean and standard deviation of the voxel values."""
        total = squares = 0.0
        for inside in self._inside():
            values = inside.astype(np.float64)
            total, squares = total + values.sum(), squares + (values @ values)
        mean = total / self.segment.voxels
        return float(mean), float(np.sqrt(max(0.0, squares / self.segment.voxels - mean**2)))

    def _inside(self) -> Iterator[np.ndarray]:
        """Voxel values inside the label, plane by plane."""
        assert self.voxels is not None
        x, y, _ = self.box
        return (self.voxels[x, y, plane][mask] for plane, mask in self._planes())

    def share_above(self, threshold: float) -> float:
        """Share of the voxels whose value exceeds `threshold`."""
        above = sum(np.count_nonzero(values > threshold) for values in self._inside())
        return above / self.segment.voxels

    def reaches_border(self, valid: np.ndarray | None) -> bool:
        """Whether the label touches the border of the scan or invalid voxels (`valid` as in `Volume`)."""
        low, high = self.segment.bbox[:3], self.segment.bbox[3:]
        if min(low) == 0 or any(h == n for h, n in zip(high, self.labels.shape, strict=True)):
            return True
        if valid is None:
            return False
        wider = tuple(slice(s.start - 1, s.stop + 1) for s in self.box)  # within the scan, see above
        if valid[wider].all():
            return False
        mask = self.labels[wider] == self.segment.label_id
        return bool((ndimage.binary_dilation(mask, _NEIGHBOURS) & ~valid[wider]).any())


@dataclasses.dataclass(frozen=True, eq=False)
class Finding:
    """An expert's result and the evidence of its input."""

    expert: str
    args: str = ""  # of the call
    # Evidence of the first input, whose grid the label map has.
    evidence: Evidence = dataclasses.field(default_factory=Evidence)
    # Class to probability, calibrated where available.
    probabilities: Mapping[str, float] = dataclasses.field(default_factory=dict)
    segments: tuple[Segment, ...] = ()  # the labels found
    labels: np.ndarray | None = None  # label map, integers [X, Y, Z]
    affine: np.ndarray | None = None  # [4, 4], voxel index to RAS millimetres

    @functools.cached_property
    def measures(self) -> dict[str, LabelMeasures]:
        """Label name to measurements."""
        if self.labels is None or self.affine is None:
            return {}
        scan = self.evidence.volume
        voxels = None if scan is None else scan.voxels
        return {s.name: LabelMeasures(s, self.labels, self.affine, voxels) for s in self.segments}

    @functools.cached_property
    def tissue_threshold(self) -> float:
        """See `body_threshold`; needs a volume."""
        assert self.evidence.volume is not None
        return body_threshold(self.evidence.volume, hounsfield=self.evidence.is_hounsfield)

    def matching(self, pattern: str) -> Iterator[LabelMeasures]:
        """The labels found whose name matches."""
        return (m for name, m in self.measures.items() if fnmatch.fnmatchcase(name, pattern))

    def at_border(self, measures: LabelMeasures) -> bool:
        """Whether a label reaches the border of the scan."""
        scan = self.evidence.volume
        return measures.reaches_border(None if scan is None else scan.valid)


def check_result(checks: Sequence[Check], finding: Finding) -> tuple[Verdict, ...]:
    """Judges a result; raises `UserError` for a check of an unknown kind.

    Args:
      checks: checks of a card; those of labels or classes that were not found are skipped.
      finding: the result.

    Returns:
      Verdicts of stage 'after', in the order of `checks`: 'pass', 'fail' (implausible), 'warn' (reported with
      the result), or 'unknown' (the scan does not allow a judgement).
    """
    verdicts: list[Verdict] = []
    for check in checks:
        if check.kind not in _KINDS:
            raise UserError(f"check {check.kind!r} of {finding.expert}: use one of {', '.join(_KINDS)}")
        verdicts += _KINDS[check.kind](check, finding)
    return tuple(dict.fromkeys(verdicts))


def _verdict(
    check: Check, status: str, subject: str, value: float | None = None, message: str = ""
) -> Verdict:
    return Verdict(check.kind, status, "after", subject, value, check.low, check.high, message)


def _in_range(
    check: Check, subject: str, value: float, message: str, *, unit: str = "", otherwise: str = "fail"
) -> Verdict:
    """'pass' if `value` is in range, else `otherwise` with the message; `unit` appends the range to it."""
    below = check.low is not None and value < check.low
    if not below and (check.high is None or not value > check.high):
        return _verdict(check, "pass", subject, value)
    if unit:
        message += f" {_range(check)} {unit}"
    return _verdict(check, otherwise, subject, value, message)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def _range(check: Check) -> str:
    if check.low is None:
        return f"is above {check.high:g}"
    if check.high is None:
        return f"is below {check.low:g}"
    return f"is outside {check.low:g} to {check.high:g}"


def _empty(check: Check, finding: Finding) -> list[Verdict]:
    if finding.labels is None:
        return []
    asked = label_universe(finding.expert, finding.args).values()
    if asked and all(any(fnmatch.fnmatchcase(n, pattern) for pattern in _LESIONS) for n in asked):
        return []
    if finding.segments:
        return [_verdict(check, "pass", "", float(len(finding.segments)))]
    return [_verdict(check, "warn", "", 0.0, "nothing was found in the whole scan")]


def _volume_ml(check: Check, finding: Finding) -> Iterator[Verdict]:
    for m in finding.matching(check.subject):
        value = m.segment.volume_ml
        if check.low is not None and value < check.low and finding.at_border(m):
            why = f"{m.name} is cut off by the border of the scan; {_number(value)} ml of it are seen"
            yield _verdict(check, "unknown", m.name, value, why)
        else:
            yield _in_range(check, m.name, value, f"{m.name} volume {_number(value)} ml", unit="ml")


def _border(check: Check, finding: Finding) -> Iterator[Verdict]:
    for m in finding.matching(check.subject):
        touches = finding.at_border(m)
        why = f"{m.name} reaches the border of the scan, so its volume is a lower bound" if touches else ""
        yield _verdict(check, "warn" if touches else "pass", m.name, float(touches), why)


def _main_part(check: Check, finding: Finding) -> Iterator[Verdict]:
    for m in finding.matching(check.subject):
        why = f"{m.name} lies in {m.segment.components} parts, the largest has {m.main_part:.0%} of it"
        yield _in_range(check, m.name, m.main_part, why)


def _components(check: Check, finding: Finding) -> Iterator[Verdict]:
    for m in finding.matching(check.subject):
        value = float(m.segment.components)
        yield _in_range(check, m.name, value, f"{m.name} lies in {value:.0f} parts", otherwise="warn")


def _hounsfield(
    measure: Callable[[LabelMeasures], float], words: str, check: Check, finding: Finding
) -> Iterator[Verdict]:
    for m in finding.matching(check.subject):
        if not finding.evidence.is_hounsfield:
            why = "nothing says that the values are Hounsfield units"
            yield Verdict(check.kind, "unknown", message=why)
            return
        value = measure(m)
        yield _in_range(check, m.name, value, f"{words} inside {m.name}, {_number(value)} HU,", unit="HU")


def _on_tissue(check: Check, finding: Finding) -> Iterator[Verdict]:
    if finding.evidence.volume is None:
        return
    for m in finding.matching(check.subject):
        value = m.share_above(finding.tissue_threshold)
        yield _in_range(check, m.name, value, f"only {value:.0%} of {m.name} lies on tissue")


def _between(axis: int, positive: str, negative: str, check: Check, finding: Finding) -> Iterator[Verdict]:
    first, _, second = check.subject.partition("/")
    for a, b in itertools.product(finding.matching(first), finding.matching(second)):
        if a is not b:
            value = float(a.centroid_mm[axis] - b.centroid_mm[axis])
            direction = negative if value < 0 else positive
            why = f"{a.name} lies {_number(abs(value))} mm {direction} {b.name}"
            yield _in_range(check, f"{a.name}/{b.name}", value, why)


def _off_midline_mm(check: Check, finding: Finding) -> Iterator[Verdict]:
    scan = finding.evidence.volume
    if scan is None:
        return
    for m in finding.matching(check.subject):
        centre = body_centre(scan, m.box[2], finding.tissue_threshold)
        if centre is None:
            why = "the scan does not show both sides of the body"
            yield _verdict(check, "unknown", m.name, message=why)
            continue
        value = float(m.centroid_mm[0] - centre[0])
        side = "right" if value > 0 else "left"
        why = f"{m.name} lies {_number(abs(value))} mm to the {side} of the body's middle"
        yield _in_range(check, m.name, value, why)


def _sides_mm(check: Check, finding: Finding) -> Iterator[Verdict]:
    for right in finding.matching("right *"):
        name = right.name.removeprefix("right ")
        if left := finding.measures.get(f"left {name}"):
            value = float(right.centroid_mm[0] - left.centroid_mm[0])
            yield _in_range(check, name, value, f"left and right {name} are on each other's side")


def _probability_margin(check: Check, finding: Finding) -> Iterator[Verdict]:
    for name, p in finding.probabilities.items():
        if fnmatch.fnmatchcase(name, check.subject or "*"):
            shown = name.lower().replace("_", " ")
            why = f"{shown} at {p:.2f} is near the threshold of {THRESHOLD}"
            yield _in_range(check, name, abs(p - THRESHOLD), why, otherwise="warn")


_KINDS: dict[str, Callable[[Check, Finding], Iterable[Verdict]]] = {
    "empty": _empty,
    "volume_ml": _volume_ml,
    "border": _border,
    "main_part": _main_part,
    "components": _components,
    "hu_mean": functools.partial(_hounsfield, lambda m: m.mean_and_deviation[0], "the mean"),
    "hu_deviation": functools.partial(
        _hounsfield, lambda m: m.mean_and_deviation[1], "the standard deviation"
    ),
    "on_tissue": _on_tissue,
    "right_of_mm": functools.partial(_between, 0, "to the right of", "to the left of"),
    "above_mm": functools.partial(_between, 2, "above", "below"),
    "off_midline_mm": _off_midline_mm,
    "sides_mm": _sides_mm,
    "probability_margin": _probability_margin,
}
