"""Deliberately false annotations, which measure how far a model trusts its experts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np

from vilam3_jax.data.experts.labels import label_universe, restrict_to_group
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment


def falsified(annotation: Annotation, seed: int) -> Annotation:
    """`falsify` within the labels that the annotation's own call selects; raises the same errors."""
    universe = label_universe(annotation.expert, annotation.args) or None
    return falsify(restrict_to_group(annotation), seed, universe)


def falsify(annotation: Annotation, seed: int, label_universe: Mapping[int, str] | None = None) -> Annotation:
    """Returns a plausible record whose answers differ from those of `annotation`.

    Class probabilities, raw and calibrated, are exchanged so that another class ranks first (for independent
    findings: so that the set of positive ones differs). Within `label_universe`, present labels become absent
    and vice versa, in the label map too, and volumes leave the range [1/2, 2] of the truth. Labels outside
    the universe and failed annotations stay unchanged.

    Args:
      annotation: the true record.
      seed: determines the result, together with the key of the record.
      label_universe: label id to name of all labels that the expert could have reported; by default, the
        labels present in the record.

    Raises:
      ValueError: the record states nothing that could be falsified.
    """
    if annotation.status == "failed":
        return annotation
    digest = hashlib.sha256("\n".join((*annotation.key, str(seed))).encode()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
    universe = dict(annotation.label_names if label_universe is None else label_universe)
    if not annotation.probabilities and not universe:
        raise ValueError(f"{annotation.expert} on {annotation.input_key[:12]}: nothing to falsify")
    changes: dict[str, object] = {"version": f"{annotation.version}+falsified.{seed}"}
    # Checks of the result and other experts refer to the true result. Checks of the input remain valid.
    changes["verdicts"] = tuple(v for v in annotation.verdicts if v.stage == "before")
    changes["disagreements"] = ()
    if annotation.probabilities:
        changes["probabilities"] = _falsify_probabilities(annotation.probabilities, rng)
    if annotation.calibrated:
        changes["calibrated"] = _falsify_probabilities(annotation.calibrated, rng)
    if universe and (annotation.labels is not None or annotation.segments or not annotation.probabilities):
        changes["segments"], changes["labels"] = _falsify_segments(annotation, universe, rng)
    return dataclasses.replace(annotation, **changes)


def _flip(p: float) -> float:
    """Mirrors a probability at one half, and moves it away from one half."""
    if abs(p - 0.5) < 0.05:
        return 0.1 if p > 0.5 else 0.9
    return 1.0 - p


def _falsify_probabilities(truth: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
    names = sorted(truth)
    if len(names) == 1:
        return {names[0]: _flip(truth[names[0]])}
    result = dict(truth)
    top = max(names, key=lambda n: truth[n])
    others = [n for n in names if n != top]
    # Exchanging a positive with a negative finding changes the most.
    negative = [n for n in others if (truth[n] > 0.5) != (truth[top] > 0.5)]
    pool = negative or others
    chosen = pool[int(rng.integers(len(pool)))]
    exclusive = abs(sum(truth.values()) - 1.0) < 0.01
    if exclusive:
        result[top], result[chosen] = truth[chosen], truth[top]
        rest = [n for n in others if n != chosen]
        for name, source in zip(rest, rng.permutation(len(rest)), strict=True):
            result[name] = truth[rest[int(source)]]
        if any(result[n] >= result[chosen] for n in names if n != chosen):  # ties: the exchange is void
            result = {n: 0.9 if n == chosen else 0.1 / len(others) for n in truth}
    elif negative:
        result[top], result[chosen] = truth[chosen], truth[top]
    elif truth[top] > 0.5:
        result[top] = _flip(truth[top])
    else:
        result[chosen] = _flip(truth[chosen])
    return result


def _falsify_segments(
    annotation: Annotation, universe: Mapping[int, str], rng: np.random.Generator
) -> tuple[tuple[Segment, ...], LabelMap | None]:
    present = [s for s in annotation.segments if s.label_id in universe]
    kept = [s for s in annotation.segments if s.label_id not in universe]
    taken = {s.label_id for s in annotation.segments}
    absent = [i for i in sorted(universe) if i not in taken]
    labels = annotation.label_map() if annotation.labels is not None else None
    if not present:
        label_id = absent[int(rng.integers(len(absent)))]
        made, labels = _invent(label_id, universe[label_id], labels, annotation)
        segments = [*kept, made]
    else:
        order = [present[i] for i in rng.permutation(len(present))]
        targets = [absent[i] for i in rng.permutation(len(absent))]
        # Without absent labels, falsify presence: drop half of the present labels, at least one.
        renamed, dropped = order[: len(targets)], order[len(targets) :]
        survivors = dropped[: len(dropped) // 2] if not targets else []
        table = np.arange(65536, dtype=np.uint16)
        table[[s.label_id for s in dropped[len(survivors) :]]] = 0
        segments = [*kept, *(_rescale(s, s.label_id, s.name, rng) for s in survivors)]
        for segment, label_id in zip(renamed, targets, strict=False):
            table[segment.label_id] = label_id
            segments.append(_rescale(segment, label_id, universe[label_id], rng))
        labels = table[labels] if labels is not None else None
    segments.sort(key=lambda s: s.label_id)
    affine = annotation.label_affine
    if labels is None or affine is None:
        return tuple(segments), None
    return tuple(segments), LabelMap.encode(labels, affine)


def _rescale(segment: Segment, label_id: int, name: str, rng: np.random.Generator) -> Segment:
    factor = float(rng.uniform(2.5, 4.0))
    factor = factor if rng.random() < 0.5 else 1.0 / factor
    return dataclasses.replace(
        segment,
        label_id=label_id,
        name=name,
        voxels=max(1, round(segment.voxels * factor)),
        volume_ml=segment.volume_ml * factor,
    )


def _invent(
    label_id: int, name: str, labels: np.ndarray | None, annotation: Annotation
) -> tuple[Segment, np.ndarray | None]:
    """Draws an absent label as a box of half the volume's extent, on background where possible."""
    affine = annotation.label_affine
    if labels is None or affine is None:
        return Segment(label_id, name, 20000, 20.0, 1, (0, 0, 0, 1, 1, 1)), None
    low = [n // 4 for n in labels.shape]
    high = [max(a + 1, a + n // 2) for a, n in zip(low, labels.shape, strict=True)]
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    out = labels.astype(np.uint16)
    target = out[box]
    free = target == 0
    target[free if free.any() else ...] = label_id
    voxels = int((out == label_id).sum())
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000.0
    return Segment(label_id, name, voxels, voxels * voxel_ml, 1, (*low, *high)), out
