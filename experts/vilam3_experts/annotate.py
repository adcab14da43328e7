"""Runs one expert over a data set and stores what it says."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable

from tqdm import tqdm

from vilam3_experts.base import Expert, annotate_one
from vilam3_experts.descriptors import Descriptor
from vilam3_experts.inputs import Input, find_inputs
from vilam3_experts.weights import Weights, is_samples_folder, load_weights
from vilam3_jax import paths
from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.experts.store import Annotation, AnnotationWriter
from vilam3_jax.errors import UserError


@dataclasses.dataclass
class Summary:
    """What a run did.

    Attributes:
      counts: `annotated`, `skipped` (already stored), `failed` (stored with their reason), `unreadable`
        (nothing to
        store: the input has no content key), each with its number.
      problems: input name, and why it failed or could not be read.
      notes: input name, and what its reader assumed, repaired or skipped.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def line(self) -> str:
        """One line for people."""
        names = ("annotated", "skipped", "failed", "unreadable")
        return ", ".join(f"{self.counts[n]} {n}" for n in names)


def annotate(
    descriptor: Descriptor,
    data: paths.PathLike,
    out: paths.PathLike,
    *,
    args: str | None = None,
    weights: paths.PathLike | None = None,
    retry_failed: bool = False,
    limit: int | None = None,
    show: Callable[[Input, Annotation], None] | None = None,
) -> Summary:
    """Annotates every input of `data` that `descriptor` is meant for.

    May be stopped at any moment and started again: what is stored is skipped. An input that cannot be read
    or analysed is counted, named in `problems-<EXPERT>.json` of the store, and the run goes on. What readers
    assumed or skipped is in `notes-<EXPERT>.json`.

    Args:
      descriptor: the expert.
      data: a samples folder, or any folder or file.
      out: the annotation store.
      args: the expert's arguments; its first valid one by default.
      weights: folder of the model files; `data` by default if that is a samples folder.
      retry_failed: run again where the store holds a failure.
      limit: at most this many inputs.
      show: called with every new annotation.

    Raises:
      UserError: bad arguments, missing or wrong weights, no inputs, or a store that cannot be written.
    """
    chosen = descriptor.check_args(args)
    inputs = find_inputs(data, descriptor)[:limit]
    if weights is None and paths.as_path(data).is_dir() and is_samples_folder(data):
        weights = data
    loaded = load_weights(descriptor, weights)
    summary = Summary()
    with AnnotationWriter(out) as writer, tqdm(inputs, desc=descriptor.name, unit="scan") as progress:
        runner = _Runner(descriptor, loaded)
        for item in progress:
            progress.set_postfix_str(item.name[-40:], refresh=False)
            try:
                scan = item.load()
                key = inputs_key(scan.keys)
            except Exception as error:  # one bad file must not end a run over a hundred thousand
                summary.counts["unreadable"] += 1
                summary.problems.append((item.name, f"{error}"))
                continue
            summary.notes += [(item.name, note) for note in scan.notes]
            stored = writer.status(key, descriptor.name, chosen)
            if stored == "ok" or (stored == "failed" and not retry_failed):
                summary.counts["skipped"] += 1
                continue
            annotation = annotate_one(runner.expert(), descriptor, scan, chosen, weights_sha256=loaded.sha256)
            writer.write(annotation)
            if annotation.status == "failed":
                summary.counts["failed"] += 1
                summary.problems.append((item.name, annotation.reason))
            else:
                summary.counts["annotated"] += 1
            if show is not None:
                show(item, annotation)
    _write_lists(out, descriptor.name, summary)
    return summary


class _Runner:
    """Builds the expert when the first scan needs it: a run that has nothing to do loads no network."""

    def __init__(self, descriptor: Descriptor, weights: Weights) -> None:
        self._descriptor, self._weights = descriptor, weights
        self._expert: Expert | None = None

    def expert(self) -> Expert:
        if self._expert is None:
            self._expert = create_expert(self._descriptor, self._weights)
        return self._expert


def create_expert(descriptor: Descriptor, weights: Weights) -> Expert:
    """Builds an expert.

    Raises:
      UserError: a library is missing or the weights do not load.
    """
    try:
        return descriptor.create(weights)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{descriptor.name} cannot start ({error}); install what it needs") from error
    except Exception as error:
        raise UserError(f"{descriptor.name} cannot start ({type(error).__name__}: {error})") from error


def _write_lists(out: paths.PathLike, name: str, summary: Summary) -> None:
    """Writes problems and notes beside the store; an earlier run's stay if this one looked at nothing new."""
    for kind, rows in (("problems", summary.problems), ("notes", summary.notes)):
        path = paths.as_path(out) / f"{kind}-{name}.json"
        if rows:
            listed = [{"input": item, "reason": reason} for item, reason in rows]
            paths.write_text_atomic(path, json.dumps(listed, indent=1) + "\n")
        elif summary.counts["skipped"] == 0:
            path.unlink(missing_ok=True)
