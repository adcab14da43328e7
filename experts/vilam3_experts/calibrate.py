"""Calibration of a classifier: from what an expert says to how often it is right.

Each class has its own function, fitted on labelled data:

- `temperature`: sigmoid(logit(p) / T), with the T that minimises the log loss (Guo et al., ICML 2017). The
  threshold of 0.5 stays where it is.
- `isotonic`: the non-decreasing step function nearest to the labels (pool adjacent violators), interpolated
  between its steps. It moves the threshold, and needs more data.

How good it is comes from cross-validation: log loss and expected calibration error (ECE, ten bins of equal
width) are taken on samples that the function was not fitted on. What belongs to one group (a patient) stays
on one side of each split. A calibration belongs to one version of one expert with one set of weights. Nothing
of a patient enters it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
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
_EDGE = 1e-6  # probabilities are kept this far from 0 and 1: a log loss must be finite
_MAX_FILE_BYTES = 16 << 20
_MAX_STEPS = 100_000


@dataclasses.dataclass(frozen=True)
class ClassCalibration:
    """The function of one class, piecewise linear in the logit (temperature) or the probability (isotonic).

    Attributes:
      method: which function.
      temperature: T of `temperature`, 1 otherwise.
      steps: (probability, calibrated probability) of `isotonic`, increasing; empty otherwise.
      samples, positives: what it was fitted on.
      log_loss, ece: (before, after) on held-out samples.
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
        """Calibrates, float64 [N] to float64 [N]."""
        p = np.asarray(probabilities, np.float64)
        if self.method == "temperature":
            return _sigmoid(_logit(p) / self.temperature)
        steps = np.array(self.steps)
        return np.interp(p, steps[:, 0], steps[:, 1])


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The functions of one expert.

    Attributes:
      expert, version, weights_sha256: whose probabilities it takes, see `Annotation`.
      method: of all classes.
      classes: class name to its function; a class that is missing stays uncalibrated.
    """

    expert: str
    version: str
    weights_sha256: str
    method: Method
    classes: Mapping[str, ClassCalibration]

    def __post_init__(self) -> None:
        if self.method not in METHODS or any(c.method != self.method for c in self.classes.values()):
            raise ValueError(f"method {self.method!r} is not that of every class")

    @property
    def name(self) -> str:
        """The method and the digest of all its content, as `Annotation.calibration` states it."""
        return f"{self.method} {hashlib.sha256(self.to_json().encode()).hexdigest()}"

    def check(self, expert: str, version: str, weights_sha256: str) -> None:
        """Refuses another expert.

        Raises:
          UserError: says what differs.
        """
        mine = (self.expert, self.version, self.weights_sha256)
        if mine != (expert, version, weights_sha256):
            raise UserError(
                f"the calibration is of {_expert_words(*mine)}, not of "
                f"{_expert_words(expert, version, weights_sha256)}; fit one with `vilam3-experts calibrate`"
            )

    def calibrated(self, probabilities: Mapping[str, float]) -> dict[str, float]:
        """Class name to calibrated probability, of the classes that have a calibration."""
        return {
            name: float(np.clip(self.classes[name](np.array([p]))[0], 0.0, 1.0))
            for name, p in probabilities.items()
            if name in self.classes
        }

    def apply(self, annotation: Annotation) -> Annotation:
        """The record with calibrated probabilities.

        Raises:
          UserError: the record is of another expert, version or weights.
        """
        self.check(annotation.expert, annotation.version, annotation.weights_sha256)
        if annotation.status != "ok" or not annotation.probabilities:
            return annotation
        values = self.calibrated(annotation.probabilities)
        verdicts = _judged_anew(annotation, {**annotation.probabilities, **values})
        return dataclasses.replace(annotation, calibrated=values, calibration=self.name, verdicts=verdicts)

    def to_json(self) -> str:
        """The content of the file, with sorted keys."""
        return json.dumps(
            {"schema_version": _SCHEMA_VERSION, **dataclasses.asdict(self)}, indent=1, sort_keys=True
        )

    def save(self, path: paths.PathLike) -> None:
        """Writes the file.

        Raises:
          UserError: it cannot be written.
        """
        paths.write_text_atomic(path, self.to_json() + "\n")


def _judged_anew(annotation: Annotation, told: Mapping[str, float]) -> tuple[Verdict, ...]:
    """The verdicts, those on probabilities for the ones that will be told."""
    verdicts = []
    for verdict in annotation.verdicts:
        if verdict.check == "probability_margin" and verdict.subject in told:
            check = Check(verdict.check, "", verdict.low, verdict.high)
            one = Finding(annotation.expert, probabilities={verdict.subject: told[verdict.subject]})
            verdicts += check_result([check], one)
        else:
            verdicts.append(verdict)
    return tuple(verdicts)


def load_calibration(path: paths.PathLike) -> Calibration:
    """Reads what `Calibration.save` wrote.

    Raises:
      UserError: no such file, damaged, or of another version of this format.
    """
    try:
        fields = json.loads(paths.read_bytes(path, _MAX_FILE_BYTES))
        if (found := fields.pop("schema_version")) != _SCHEMA_VERSION:
            raise UserError(
                f"{path}: calibration of schema {found}, this version reads {_SCHEMA_VERSION}; fit again"
            )
        classes = {str(name): _class_from(row) for name, row in fields.pop("classes").items()}
        return Calibration(**fields, classes=classes)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: no calibration ({error}); fit it with `vilam3-experts calibrate`"
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
    """Fits the functions of one expert.

    Args:
      annotations: what it said, of one version and with one set of weights.
      truths: for each of them, class name to whether it is so; classes that are not known are missing.
      method: of all classes.
      groups: for each of them, what must stay on one side of a split; its own input by default.

    Returns:
      The calibration, and the classes that have none with the reason.

    Raises:
      UserError: several versions, or no class can be calibrated.
    """
    experts = {(a.expert, a.version, a.weights_sha256) for a in annotations}
    if len(experts) != 1:
        listed = "; ".join(sorted(_expert_words(*e) for e in experts)) or "none"
        raise UserError(
            f"a calibration is of one version of one expert, the labelled records are of: {listed}"
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
        reasons = (
            "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "no class has a label"
        )
        raise UserError(f"nothing can be calibrated: {reasons}")
    return Calibration(*experts.pop(), method, classes), left_out


def _fit_class(p: np.ndarray, y: np.ndarray, folds: np.ndarray, method: Method) -> ClassCalibration | str:
    """The function of one class, or why it has none."""
    least, positives = MIN_OF_EACH[method], int(y.sum())
    if positives < least or y.size - positives < least:
        return (
            f"{positives} positive and {y.size - positives} negative samples, {method} needs {least} of each"
        )
    held_out = np.empty_like(p)
    for fold in np.unique(folds):
        out = folds == fold
        if not 0 < y[~out].sum() < (~out).sum():
            return "all samples of one kind are of one group"
        held_out[out] = _function(p[~out], y[~out], method)(p[out])
    loss, error = (log_loss(p, y), log_loss(held_out, y)), (ece(p, y), ece(held_out, y))
    if loss[1] > loss[0]:
        return f"held-out log loss would grow from {loss[0]:.4f} to {loss[1]:.4f}"
    whole = _function(p, y, method)
    return dataclasses.replace(whole, samples=int(y.size), positives=positives, log_loss=loss, ece=error)


def _function(p: np.ndarray, y: np.ndarray, method: Method) -> ClassCalibration:
    fitting: Callable[[np.ndarray, np.ndarray], ClassCalibration] = (
        fit_temperature if method == "temperature" else fit_isotonic
    )
    return fitting(p, y)


def fit_temperature(p: np.ndarray, y: np.ndarray) -> ClassCalibration:
    """The temperature of least log loss.

    Args:
      p: probabilities, float64 [N].
      y: bool [N].
    """
    logits = _logit(p)
    low, high = np.log(_TEMPERATURES)
    found: Any = optimize.minimize_scalar(
        lambda t: log_loss(_sigmoid(logits / np.exp(t)), y), bounds=(low, high), method="bounded"
    )
    return ClassCalibration("temperature", float(np.clip(np.exp(found.x), *_TEMPERATURES)))


def fit_isotonic(p: np.ndarray, y: np.ndarray) -> ClassCalibration:
    """The non-decreasing function of least squares.

    The share of each step is taken with one positive and one negative sample added (Laplace's rule): a step
    of three positives says 0.8, not 1.

    Args:
      p: probabilities, float64 [N].
      y: bool [N].
    """
    order, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    rates = np.bincount(inverse, y.astype(np.float64)) / counts
    found = optimize.isotonic_regression(rates, weights=counts)
    values = np.asarray(found.x, np.float64)
    first = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    last = np.r_[first[1:] - 1, values.size - 1]
    totals = np.add.reduceat(counts, first)
    smooth = (values[first] * totals + 1.0) / (totals + 2.0)
    smooth = np.maximum.accumulate(smooth)
    ends = np.unique(np.r_[first, last])
    blocks = np.searchsorted(first, ends, side="right") - 1
    steps = tuple((float(order[i]), float(smooth[b])) for i, b in zip(ends, blocks, strict=True))
    return ClassCalibration("isotonic", steps=steps)


def log_loss(p: np.ndarray, y: np.ndarray) -> float:
    """Mean negative log likelihood of `y`, bool [N], under `p`, [N]; nats."""
    inside = np.clip(p, _EDGE, 1 - _EDGE)
    return float(-np.where(y, np.log(inside), np.log1p(-inside)).mean())


def ece(p: np.ndarray, y: np.ndarray) -> float:
    """Expected calibration error: over ten bins of equal width, weighted |mean of p - share of y|."""
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


def _expert_words(expert: str, version: str, weights_sha256: str) -> str:
    weights = f", weights {weights_sha256[:12]}" if weights_sha256 else ""
    return f"{expert} {version}{weights}"
