"""Calibration of a classifier's probabilities.

Each class has its own function, fitted to labelled data:

- `temperature`: sigmoid(logit(p) / T), with the T that minimises the log loss (Guo et al., ICML 2017). It
  keeps the threshold of 0.5.
- `isotonic`: the non-decreasing step function nearest to the labels (pool adjacent violators), interpolated
  between its steps. It moves the threshold and needs more data.

Log loss and expected calibration error (ECE, ten bins of equal width) are cross-validated on samples that the
function was not fitted to; a group (a patient) stays on one side of each split. A calibration belongs to one
version of one expert with one set of weights, and contains no patient data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import optimize

from vilam3_jax.data.experts.cards import Check
from vilam3_jax.data.experts.record import Annotation, Verdict
from vilam3_jax.data.experts.verify import Finding, check_result
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

Method = Literal["temperature", "isotonic"]
METHODS: tuple[Method, ...] = ("temperature", "isotonic")
MIN_OF_EACH = {"temperature": 10, "isotonic": 50}  # positives, and negatives
FOLDS = 5
_SCHEMA_VERSION = 1
_BINS = 10
_TEMPERATURES = (0.05, 20.0)
_EDGE = 1e-6  # distance of clipped probabilities from 0 and 1, for a finite log loss
_MAX_FILE_BYTES = 16 << 20
_MAX_STEPS = 100_000


@dataclasses.dataclass(frozen=True)
class ClassCalibration:
    """The function of one class, piecewise linear in the logit (temperature) or the probability (isotonic).

    `steps` are (probability, calibrated probability) of `isotonic`, increasing. `samples` and `positives` are
    the numbers of samples it was fitted to; `log_loss` and `ece` are (before, after) on held-out samples.
    """

    method: Method
    temperature: float = 1.0
    steps: tuple[tuple[float, float], ...] = ()
    samples: int = 0
    positives: int = 0
    log_loss: tuple[float, float] = (0.0, 0.0)
    ece: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r}, expected one of {METHODS}")
        if self.method == "temperature":
            if not _TEMPERATURES[0] <= self.temperature <= _TEMPERATURES[1]:
                raise ValueError(f"temperature {self.temperature}")
            return
        steps = np.array(self.steps, np.float64)
        if steps.ndim != 2 or steps.shape[1] != 2 or len(steps) > _MAX_STEPS:
            raise ValueError("isotonic steps must be pairs")
        inside = (steps >= 0).all() and (steps <= 1).all()
        if not inside or (np.diff(steps[:, 0]) <= 0).any() or (np.diff(steps[:, 1]) < 0).any():
            raise ValueError("isotonic steps must lie in 0..1 and increase")

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        """Calibrates float64 [N]."""
        p = np.asarray(probabilities, np.float64)
        if self.method == "temperature":
            return _sigmoid(_logit(p) / self.temperature)
        steps = np.array(self.steps)
        return np.interp(p, steps[:, 0], steps[:, 1])


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The functions of one expert, version and set of weights, by class; other classes stay uncalibrated."""

    expert: str
    version: str
    weights_sha256: str
    method: Method
    classes: Mapping[str, ClassCalibration]

    def __post_init__(self) -> None:
        if self.method not in METHODS or any(c.method != self.method for c in self.classes.values()):
            raise ValueError(f"method {self.method!r} differs from that of a class")

    @property
    def name(self) -> str:
        """The method and a digest of the content, for `Annotation.calibration`."""
        return f"{self.method} {hashlib.sha256(self.to_json().encode()).hexdigest()}"

    def check(self, expert: str, version: str, weights_sha256: str) -> None:
        """Raises `UserError` unless the calibration is for this expert, version and weights."""
        mine, other = (self.expert, self.version, self.weights_sha256), (expert, version, weights_sha256)
        if mine != other:
            raise UserError(
                f"the calibration is of {_describe(*mine)}, not of {_describe(*other)}; fit one with "
                "`vilam3-experts calibrate`"
            )

    def calibrated(self, probabilities: Mapping[str, float]) -> dict[str, float]:
        """Calibrated probabilities of the classes that have a function."""
        return {
            name: float(np.clip(self.classes[name](np.array([p]))[0], 0.0, 1.0))
            for name, p in probabilities.items()
            if name in self.classes
        }

    def apply(self, annotation: Annotation) -> Annotation:
        """The record with calibrated probabilities; raises `UserError` for records of another expert."""
        self.check(annotation.expert, annotation.version, annotation.weights_sha256)
        if annotation.status != "ok" or not annotation.probabilities:
            return annotation
        values = self.calibrated(annotation.probabilities)
        verdicts = _updated_verdicts(annotation, {**annotation.probabilities, **values})
        return dataclasses.replace(annotation, calibrated=values, calibration=self.name, verdicts=verdicts)

    def to_json(self) -> str:
        """The content of the file, with sorted keys."""
        fields = {"schema_version": _SCHEMA_VERSION, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=1, sort_keys=True)

    def save(self, path: paths.PathLike) -> None:
        """Writes the file; raises `UserError` if it cannot be written."""
        paths.write_text_atomic(path, self.to_json() + "\n")


def _updated_verdicts(annotation: Annotation, shown: Mapping[str, float]) -> tuple[Verdict, ...]:
    """The verdicts, with those on probabilities recomputed for the probabilities that will be shown."""
    verdicts = []
    for verdict in annotation.verdicts:
        if verdict.check == "probability_margin" and verdict.subject in shown:
            check = Check(verdict.check, "", verdict.low, verdict.high)
            one = Finding(annotation.expert, probabilities={verdict.subject: shown[verdict.subject]})
            verdicts += check_result([check], one)
        else:
            verdicts.append(verdict)
    return tuple(verdicts)


def load_calibration(path: paths.PathLike) -> Calibration:
    """Reads a file of `Calibration.save`; raises `UserError` for another schema version or damage."""
    try:
        fields = json.loads(paths.read_bytes(path, _MAX_FILE_BYTES))
        if (found := fields.pop("schema_version")) != _SCHEMA_VERSION:
            raise UserError(
                f"{path}: calibration schema {found}, this version reads {_SCHEMA_VERSION}; fit again"
            )
        classes = {str(name): _class_from(row) for name, row in fields.pop("classes").items()}
        return Calibration(**fields, classes=classes)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a calibration ({error}); fit one with `vilam3-experts calibrate`"
        ) from error


def _class_from(row: Mapping[str, Any]) -> ClassCalibration:
    pairs = {name: tuple(map(float, row[name])) for name in ("log_loss", "ece")}
    steps = tuple((float(a), float(b)) for a, b in row["steps"])
    return ClassCalibration(**{**row, **pairs, "steps": steps})


def fit(
    annotations: Sequence[Annotation],
    truths: Sequence[Mapping[str, bool]],
    method: Method,
    groups: Sequence[str] | None = None,
) -> tuple[Calibration, dict[str, str]]:
    """Fits the functions of one expert; returns them, and the reason for each class without one.

    For each answer, `truths` maps the classes that are known to whether they are present, and `groups` has
    the group that stays on one side of a split, by default its own input. Raises `UserError` for answers of
    several versions, or if no class can be calibrated.
    """
    experts = {(a.expert, a.version, a.weights_sha256) for a in annotations}
    if len(experts) != 1:
        found = "; ".join(sorted(_describe(*e) for e in experts)) or "none"
        raise UserError(
            f"a calibration needs records of one version of one expert, the labelled ones are of: {found}"
        )
    names = list(dict.fromkeys(name for a in annotations for name in a.probabilities))
    folds = np.array([_fold(g) for g in (groups or [a.input_key for a in annotations])])
    classes: dict[str, ClassCalibration] = {}
    left_out: dict[str, str] = {}
    for name in names:
        rows = [
            i
            for i, (a, t) in enumerate(zip(annotations, truths, strict=True))
            if name in t and name in a.probabilities
        ]
        p = np.array([annotations[i].probabilities[name] for i in rows], np.float64)
        y = np.array([truths[i][name] for i in rows], bool)
        found = _fit_class(p, y, folds[rows], method)
        if isinstance(found, str):
            left_out[name] = found
        else:
            classes[name] = found
    if not classes:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UserError(f"nothing can be calibrated: {reasons or 'no class has a label'}")
    return Calibration(*experts.pop(), method, classes), left_out


def _fit_class(p: np.ndarray, y: np.ndarray, folds: np.ndarray, method: Method) -> ClassCalibration | str:
    """The function of one class, or the reason why it has none."""
    least, positives = MIN_OF_EACH[method], int(y.sum())
    negatives = int(y.size) - positives
    if positives < least or negatives < least:
        return f"{positives} positive and {negatives} negative samples, {method} needs {least} of each"
    fit_function = fit_temperature if method == "temperature" else fit_isotonic
    held_out = np.empty_like(p)
    for fold in np.unique(folds):
        out = folds == fold
        if not 0 < y[~out].sum() < (~out).sum():
            return "all positive or all negative samples are of one group"
        held_out[out] = fit_function(p[~out], y[~out])(p[out])
    loss, error = (log_loss(p, y), log_loss(held_out, y)), (ece(p, y), ece(held_out, y))
    if loss[1] > loss[0]:
        return f"held-out log loss would grow from {loss[0]:.4f} to {loss[1]:.4f}"
    whole = fit_function(p, y)
    return dataclasses.replace(whole, samples=int(y.size), positives=positives, log_loss=loss, ece=error)


def fit_temperature(p: np.ndarray, y: np.ndarray) -> ClassCalibration:
    """Minimises the log loss over the temperature; `p` are probabilities, float64 [N], `y` is bool [N]."""
    logits = _logit(p)
    low, high = np.log(_TEMPERATURES)
    found: Any = optimize.minimize_scalar(
        lambda t: log_loss(_sigmoid(logits / np.exp(t)), y), bounds=(low, high), method="bounded"
    )
    return ClassCalibration("temperature", float(np.clip(np.exp(found.x), *_TEMPERATURES)))


def fit_isotonic(p: np.ndarray, y: np.ndarray) -> ClassCalibration:
    """Least-squares non-decreasing function; `p` are probabilities, float64 [N], `y` is bool [N].

    The rate of each step includes one additional positive and negative sample (Laplace's rule), so a step of
    three positives has 0.8, not 1.
    """
    order, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    rates = np.bincount(inverse, y.astype(np.float64)) / counts
    found = optimize.isotonic_regression(rates, weights=counts)
    values = np.asarray(found.x, np.float64)
    first = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    last = np.r_[first[1:] - 1, values.size - 1]
    totals = np.add.reduceat(counts, first)
    smooth = np.maximum.accumulate((values[first] * totals + 1.0) / (totals + 2.0))
    ends = np.unique(np.r_[first, last])
    blocks = np.searchsorted(first, ends, side="right") - 1
    steps = tuple((float(order[i]), float(smooth[b])) for i, b in zip(ends, blocks, strict=True))
    return ClassCalibration("isotonic", steps=steps)


def log_loss(p: np.ndarray, y: np.ndarray) -> float:
    """Mean negative log likelihood of `y`, bool [N], under `p`, [N], in nats."""
    inside = np.clip(p, _EDGE, 1 - _EDGE)
    return float(-np.where(y, np.log(inside), np.log1p(-inside)).mean())


def ece(p: np.ndarray, y: np.ndarray) -> float:
    """Expected calibration error: weighted mean of `|mean(p) - mean(y)|` over ten bins of equal width."""
    bins = np.minimum((p * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, p - y, minlength=_BINS)
    return float(np.abs(gaps).sum() / p.size)


def _logit(p: np.ndarray) -> np.ndarray:
    inside = np.clip(p, _EDGE, 1 - _EDGE)
    return np.log(inside) - np.log1p(-inside)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _fold(group: str) -> int:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") % FOLDS


def _describe(expert: str, version: str, weights_sha256: str) -> str:
    weights = f", weights {weights_sha256[:12]}" if weights_sha256 else ""
    return f"{expert} {version}{weights}"
