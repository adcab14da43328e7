"""After an expert ran: is its result plausible?

Each kind of check is a function in `_KINDS`. The subject of a check may hold `*` and `?` as in file names; a
subject of two, such as `liver/spleen`, compares the first with the second.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from vilam3_jax.data.experts.cards import Check
from vilam3_jax.data.experts.labels import label_universe
from vilam3_jax.data.experts.record import THRESHOLD, Segment, Verdict
from vilam3_jax.data.experts.verify.evidence import Evidence, body_centre, body_threshold
from vilam3_jax.data.experts.verify.measures import LabelMeasures
from vilam3_jax.errors import UserError

# What a healthy patient does not have: a scan without them is no empty result.
_LESIONS = ("*tumor*", "*lesion*", "*cancer*", "*cyst*", "*mass*")
_SIDES = ("left ", "right ")


@dataclasses.dataclass(frozen=True, eq=False)
class Finding:
    """What an expert said, and of what.

    Attributes:
      expert, args: who said it.
      evidence: of the first input, on whose grid the label map lies.
      probabilities: class to probability; calibrated ones where there are any.
      segments: the labels found.
      labels: the label map, integers [X, Y, Z], or None.
      affine: [4, 4], voxel index to RAS millimetres, or None.
    """

    expert: str
    args: str = ""
    evidence: Evidence = dataclasses.field(default_factory=Evidence)
    probabilities: Mapping[str, float] = dataclasses.field(default_factory=dict)
    segments: tuple[Segment, ...] = ()
    labels: np.ndarray | None = None
    affine: np.ndarray | None = None

    @functools.cached_property
    def measures(self) -> dict[str, LabelMeasures]:
        """Name to figures, of every label found."""
        if self.labels is None or self.affine is None:
            return {}
        scan = self.evidence.volume
        voxels = None if scan is None else scan.voxels
        return {s.name: LabelMeasures(s, self.labels, self.affine, voxels) for s in self.segments}

    def matching(self, pattern: str) -> Iterator[LabelMeasures]:
        """The labels found whose name matches."""
        return (m for name, m in self.measures.items() if fnmatch.fnmatchcase(name, pattern))

    def at_border(self, measures: LabelMeasures) -> bool:
        """Whether a label reaches the end of the scan."""
        scan = self.evidence.volume
        return measures.reaches_border(None if scan is None else scan.valid)


def check_result(checks: Sequence[Check], finding: Finding) -> tuple[Verdict, ...]:
    """Judges a result.

    Args:
      checks: as a card states them; those about labels or classes that were not found are left out.
      finding: the result.

    Returns:
      The verdicts, stage 'after', in the order of `checks`: 'pass', 'fail' (implausible), 'warn' (to be told
      with the result), or 'unknown' where the scan does not let it be judged.

    Raises:
      UserError: a check of an unknown kind.
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


def _outside(check: Check, value: float) -> bool:
    return (check.low is not None and value < check.low) or (check.high is not None and value > check.high)


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


def _volume_ml(check: Check, finding: Finding) -> list[Verdict]:
    found = []
    for m in finding.matching(check.subject):
        value = m.segment.volume_ml
        if not _outside(check, value):
            found.append(_verdict(check, "pass", m.name, value))
        elif check.low is not None and value < check.low and finding.at_border(m):
            why = f"{m.name} is cut off by the border of the scan; {_number(value)} ml of it are seen"
            found.append(_verdict(check, "unknown", m.name, value, why))
        else:
            why = f"{m.name} volume {_number(value)} ml {_range(check)} ml"
            found.append(_verdict(check, "fail", m.name, value, why))
    return found


def _border(check: Check, finding: Finding) -> list[Verdict]:
    found = []
    for m in finding.matching(check.subject):
        touches = finding.at_border(m)
        why = f"{m.name} reaches the border of the scan, so its volume is a lower bound" if touches else ""
        found.append(_verdict(check, "warn" if touches else "pass", m.name, float(touches), why))
    return found


def _main_part(check: Check, finding: Finding) -> list[Verdict]:
    found = []
    for m in finding.matching(check.subject):
        wrong = _outside(check, m.main_part)
        why = f"{m.name} lies in {m.segment.components} parts, the largest has {m.main_part:.0%} of it"
        found.append(_verdict(check, "fail" if wrong else "pass", m.name, m.main_part, why if wrong else ""))
    return found


def _components(check: Check, finding: Finding) -> list[Verdict]:
    found = []
    for m in finding.matching(check.subject):
        value = float(m.segment.components)
        why = f"{m.name} lies in {value:.0f} parts" if _outside(check, value) else ""
        found.append(_verdict(check, "warn" if why else "pass", m.name, value, why))
    return found


def _hounsfield(
    check: Check, finding: Finding, measure: Callable[[LabelMeasures], float], words: str
) -> list[Verdict]:
    found = []
    for m in finding.matching(check.subject):
        if not finding.evidence.is_hounsfield:
            why = "nothing says that the values are Hounsfield units"
            return [Verdict(check.kind, "unknown", message=why)]
        value = measure(m)
        why = (
            f"{words} inside {m.name}, {_number(value)} HU, {_range(check)} HU"
            if _outside(check, value)
            else ""
        )
        found.append(_verdict(check, "fail" if why else "pass", m.name, value, why))
    return found


def _hu_mean(check: Check, finding: Finding) -> list[Verdict]:
    return _hounsfield(check, finding, lambda m: m.mean, "the mean")


def _hu_deviation(check: Check, finding: Finding) -> list[Verdict]:
    return _hounsfield(check, finding, lambda m: m.deviation, "the standard deviation")


def _on_tissue(check: Check, finding: Finding) -> list[Verdict]:
    scan = finding.evidence.volume
    if scan is None:
        return []
    threshold, found = None, []
    for m in finding.matching(check.subject):
        if threshold is None:
            threshold = body_threshold(scan, hounsfield=finding.evidence.is_hounsfield)
        value = m.share_above(threshold)
        why = f"only {value:.0%} of {m.name} lies on tissue" if _outside(check, value) else ""
        found.append(_verdict(check, "fail" if why else "pass", m.name, value, why))
    return found


def _between(check: Check, finding: Finding, axis: int, direction: tuple[str, str]) -> list[Verdict]:
    first, _, second = check.subject.partition("/")
    found = []
    for a, b in itertools.product(finding.matching(first), finding.matching(second)):
        if a is b:
            continue
        value = float(a.centroid_mm[axis] - b.centroid_mm[axis])
        wrong = _outside(check, value)
        why = f"{a.name} lies {_number(abs(value))} mm {direction[value < 0]} {b.name}" if wrong else ""
        found.append(_verdict(check, "fail" if wrong else "pass", f"{a.name}/{b.name}", value, why))
    return found


def _right_of_mm(check: Check, finding: Finding) -> list[Verdict]:
    return _between(check, finding, 0, ("to the right of", "to the left of"))


def _above_mm(check: Check, finding: Finding) -> list[Verdict]:
    return _between(check, finding, 2, ("above", "below"))


def _off_midline_mm(check: Check, finding: Finding) -> list[Verdict]:
    scan, found = finding.evidence.volume, []
    if scan is None:
        return []
    for m in finding.matching(check.subject):
        centre = body_centre(scan, m.box[2], hounsfield=finding.evidence.is_hounsfield)
        if centre is None:
            why = "the scan does not show both sides of the body"
            found.append(_verdict(check, "unknown", m.name, message=why))
            continue
        value = float(m.centroid_mm[0] - centre[0])
        side = "right" if value > 0 else "left"
        why = f"{m.name} lies {_number(abs(value))} mm to the {side} of the body's middle"
        wrong = _outside(check, value)
        found.append(_verdict(check, "fail" if wrong else "pass", m.name, value, why if wrong else ""))
    return found


def _sides_mm(check: Check, finding: Finding) -> list[Verdict]:
    found = []
    for right in finding.matching("right *"):
        left = finding.measures.get(_SIDES[0] + right.name.removeprefix(_SIDES[1]))
        if left is None:
            continue
        value = float(right.centroid_mm[0] - left.centroid_mm[0])
        what = right.name.removeprefix(_SIDES[1])
        why = f"left and right {what} are on each other's side" if _outside(check, value) else ""
        found.append(_verdict(check, "fail" if why else "pass", what, value, why))
    return found


def _probability_margin(check: Check, finding: Finding) -> list[Verdict]:
    found = []
    for name, p in finding.probabilities.items():
        if not fnmatch.fnmatchcase(name, check.subject or "*"):
            continue
        value = abs(p - THRESHOLD)
        near = _outside(check, value)
        shown = name.lower().replace("_", " ")
        why = f"{shown} at {p:.2f} is near the threshold of {THRESHOLD}" if near else ""
        found.append(_verdict(check, "warn" if near else "pass", name, value, why))
    return found


_KINDS: dict[str, Callable[[Check, Finding], list[Verdict]]] = {
    "empty": _empty,
    "volume_ml": _volume_ml,
    "border": _border,
    "main_part": _main_part,
    "components": _components,
    "hu_mean": _hu_mean,
    "hu_deviation": _hu_deviation,
    "on_tissue": _on_tissue,
    "right_of_mm": _right_of_mm,
    "above_mm": _above_mm,
    "off_midline_mm": _off_midline_mm,
    "sides_mm": _sides_mm,
    "probability_margin": _probability_margin,
}
