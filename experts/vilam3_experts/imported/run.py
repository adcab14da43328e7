"""`vilam3-experts import`: masks that exist become annotations of their scans."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
from collections.abc import Sequence, Set
from typing import Literal

import numpy as np
from tqdm import tqdm

from vilam3_experts import descriptors as registry
from vilam3_experts.base import Output, annotate_one
from vilam3_experts.descriptors import Descriptor
from vilam3_experts.imported import matching
from vilam3_experts.imported.label_tables import LabelTable, read_label_table, words_of
from vilam3_experts.imported.masks import Mask, MaskSource, Reading, read_mask, structure_name
from vilam3_experts.inputs import Input, find_inputs
from vilam3_experts.weights import is_samples_folder
from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.labels import is_lesion, label_group, label_table
from vilam3_jax.data.experts.store import AnnotationWriter
from vilam3_jax.data.volume_io import wrap_parser_errors
from vilam3_jax.data.volumes import Volume
from vilam3_jax.datasets.samples import read_samples
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

IMPORTED = "imported"
_MAX_SOURCE = 120
_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Source:
    """Who made the masks.

    Attributes:
      kind: a tool (a network, a program), or people whose word is taken for true.
      name: of the tool with its version, or of the people.
    """

    kind: Literal["tool", "ground-truth"]
    name: str

    @classmethod
    def parse(cls, text: str) -> Source:
        """Reads `tool:NAME VERSION` or `ground-truth:WHO`.

        Raises:
          UserError: anything else.
        """
        kind, _, name = text.partition(":")
        name = re.sub(r"\s+", " ", name).strip()
        if kind not in ("tool", "ground-truth") or not 0 < len(name) <= _MAX_SOURCE or not name.isprintable():
            raise UserError(
                f"--source {text!r}: say who made the masks, as 'tool:NAME VERSION' or 'ground-truth:WHO'"
            )
        return cls(kind, name)  # type: ignore[arg-type]

    @property
    def version(self) -> str:
        """The version of the annotations."""
        return f"{IMPORTED}; {self.kind}: {self.name}"


@dataclasses.dataclass
class Summary:
    """What an import did.

    Attributes:
      counts: `imported`, `skipped` (already stored), `refused`, each with its number.
      problems: mask, and why it was refused.
      notes: mask, and what was assumed, repaired or resampled.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def refuse(self, name: str, reason: str) -> None:
        """Counts and names a mask that is left out."""
        self.counts["refused"] += 1
        self.problems.append((name, " ".join(reason.split())))

    def line(self) -> str:
        """One line for people."""
        return ", ".join(f"{self.counts[n]} {n}" for n in ("imported", "skipped", "refused"))


@dataclasses.dataclass(frozen=True)
class Options:
    """How masks are found and read.

    Attributes:
      labels: path of a label table, or None: what the masks themselves state.
      args: arguments of the expert under which the masks are stored; empty for its first.
      manifest: path of a file that says which mask belongs to which scan.
      per_structure: masks are folders with one file per structure.
      resample: masks on another grid of the scan's space are resampled.
      later_wins: where structures overlap, the later one is kept.
      keep_empty: a mask that marks nothing is an answer, too.
    """

    labels: str | None = None
    args: tuple[str, ...] = ()
    manifest: paths.PathLike | None = None
    per_structure: bool = False
    resample: bool = False
    later_wins: bool = False
    keep_empty: bool = False


def import_masks(
    masks: Sequence[paths.PathLike],
    data: paths.PathLike,
    expert: str,
    out: paths.PathLike,
    source: Source,
    options: Options = Options(),
) -> Summary:
    """Stores masks as annotations of their scans, under the name of an expert.

    The version of the records is `Source.version`, the hash of their weights is that of the mask's file. What
    is stored already is skipped, never replaced. A mask that cannot be used is counted and named.

    Args:
      masks: files and folders, or one samples folder with the label maps that its index names.
      data: the scans: a samples folder, or any folder or file.
      expert: a known expert, or any name in capital letters.
      out: the annotation store.
      source: who made the masks.
      options: how they are found and read.

    Raises:
      UserError: what concerns all masks: no such folder, a bad label table or manifest, a name that is not
        for imports.
    """
    descriptor = _descriptor(expert, source)
    chosen = [descriptor.check_args(args) for args in options.args or (None,)]
    table = read_label_table(options.labels) if options.labels is not None else None
    found, tables = _pairs(masks, data, descriptor, source, options)
    structures = _structure_ids([mask for mask, _ in found.pairs], table, expert)
    summary = Summary()
    for name, reason in found.problems:
        summary.refuse(name, reason)
    summary.notes += found.notes
    with AnnotationWriter(out) as writer, tqdm(found.pairs, desc=expert, unit="mask") as progress:
        for mask, item in progress:
            progress.set_postfix_str(mask.name[-40:], refresh=False)
            reading = Reading(tables.get(mask.name, table), structures, options.resample, options.later_wins)
            try:
                _import_one(mask, item, descriptor, chosen, reading, options.keep_empty, writer, summary)
            except UnavailableError:
                raise
            except UserError as error:
                summary.refuse(mask.name, str(error))
    _write_lists(out, expert, summary)
    return summary


def _write_lists(out: paths.PathLike, expert: str, summary: Summary) -> None:
    """Writes problems and notes beside the store, as `annotate` does."""
    for kind, rows in (("problems", summary.problems), ("notes", summary.notes)):
        path = paths.as_path(out) / f"{kind}-{expert}.json"
        if rows:
            listed = [{"input": name, "reason": reason} for name, reason in rows]
            paths.write_text_atomic(path, json.dumps(listed, indent=1) + "\n")
        elif not summary.counts["skipped"]:
            path.unlink(missing_ok=True)  # of an earlier import


def _descriptor(name: str, source: Source) -> Descriptor:
    """The expert to import for; one that is not known gets a plain card of its own.

    Raises:
      UserError: a bad name, an expert without label maps, or ground truth under the name of a network.
    """
    known = registry.registry().get(name)
    if known is None:
        try:
            card = Card(name, (), "any", "segmentation", "imported masks", "unknown")
        except ValueError as error:
            raise UserError(f"--expert {name}: {error}; choose another name") from error
        known = Descriptor(card, IMPORTED, "volume", "segmentation", "")
    if known.input != "volume" or known.kind != "segmentation" or known.card.roles != ("",):
        raise UserError(f"--expert {name}: gives no label map of one volume; choose another name")
    if source.kind == "ground-truth" and known.version != IMPORTED:
        raise UserError(
            f"--expert {name}: is a network, and what people marked is not its answer; choose another name"
        )
    return dataclasses.replace(known, version=source.version)


def _pairs(
    masks: Sequence[paths.PathLike],
    data: paths.PathLike,
    descriptor: Descriptor,
    source: Source,
    options: Options,
) -> tuple[matching.Matching, dict[str, LabelTable]]:
    """Masks with their scans, and the label tables that are known by mask."""
    if len(masks) == 1 and paths.as_path(masks[0]).is_dir() and is_samples_folder(masks[0]):
        return _from_samples(masks[0], data, descriptor, source)
    mask_places = [paths.as_path(mask) for mask in masks]
    root = paths.as_path(data)
    scans = find_inputs(data, descriptor)
    mixed = any(place == root or _is_below(root, place) for place in mask_places)
    only_dicom = mixed and options.manifest is None
    found = matching.find_masks(masks, per_structure=options.per_structure, segmentations_only=only_dicom)
    if options.manifest is not None:
        rows = matching.read_manifest(options.manifest)
        return matching.match_by_manifest(rows, found, scans), {}
    files = {os.fspath(file) for mask in found for file in mask.files}
    scans = [scan for scan in scans if os.fspath(scan.path) not in files]
    return matching.match(found, scans), {}


def _is_below(path: os.PathLike[str], folder: os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(os.fspath(folder).rstrip("/") + "/")


def _from_samples(
    masks: paths.PathLike, data: paths.PathLike, descriptor: Descriptor, source: Source
) -> tuple[matching.Matching, dict[str, LabelTable]]:
    """The label maps of a samples folder whose index says that `source` made them."""
    samples = {
        sample.name: sample
        for sample in read_samples(masks)
        if sample.label_map is not None and sample.label_names and sample.label_source == source.name
    }
    pairs, tables = [], {}
    for scan in find_inputs(data, descriptor):
        sample = samples.get(scan.name)
        if sample is not None and sample.label_map is not None and sample.path == scan.path:
            pairs.append((MaskSource(scan.name, "file", (sample.label_map,)), scan))
            names = {i: name for i, name in (sample.label_names or {}).items() if i > 0}
            tables[scan.name] = LabelTable(names)
    if not pairs:
        known = sorted({s.label_source for s in read_samples(masks) if s.label_map and s.label_source})
        raise UserError(
            f"{masks}: no label map of {source.name!r} that {descriptor.name} reads; its maps are of "
            f"{', '.join(map(repr, known)) or 'nobody'}, see --source"
        )
    return matching.Matching(pairs, []), tables


def _structure_ids(
    masks: Sequence[MaskSource], table: LabelTable | None, expert: str
) -> dict[frozenset[str], int]:
    """The label id of each structure of masks with one file per structure: one id a name in the whole run."""
    files = {
        words_of(structure_name(f)): structure_name(f) for m in masks if m.kind == "organs" for f in m.files
    }
    known = table.names if table is not None else label_table(expert)
    ids = {words_of(name): number for number, name in known.items()}
    if table is not None and (unknown := sorted(name for words, name in files.items() if words not in ids)):
        listed = ", ".join(unknown[:_LISTED]) + (", ..." if len(unknown) > _LISTED else "")
        raise UserError(f"--labels: the table has no id for the files {listed}; add them to it")
    free = max(ids.values(), default=0)
    for words, _ in sorted(files.items(), key=lambda item: item[1]):
        if words not in ids:
            free += 1
            ids[words] = free
    return ids


class _Given:
    """The expert whose answer is there already."""

    def __init__(self, mask: Mask) -> None:
        self._mask = mask

    def run(self, data: Volume, args: str) -> Output:
        """Returns the mask."""
        del data, args
        return Output(
            labels=self._mask.labels, label_names=self._mask.names, weights_sha256=self._mask.sha256
        )


def _import_one(
    source: MaskSource,
    item: Input,
    descriptor: Descriptor,
    chosen: Sequence[str],
    reading: Reading,
    keep_empty: bool,
    writer: AnnotationWriter,
    summary: Summary,
) -> None:
    inputs = item.load()
    scan = inputs.first
    if not isinstance(scan, Volume):
        raise UserError(f"{item.name}: is no volume; check --data")
    key = inputs_key(inputs.keys)
    missing = [args for args in chosen if writer.status(key, descriptor.name, args) != "ok"]
    if not missing:
        summary.counts["skipped"] += 1
        return
    with wrap_parser_errors(source.name):  # parsers document few of their exceptions
        mask = read_mask(source, scan, reading)
    mask = _one_id_a_name(mask)
    named = {
        words_of(n) for n in (*mask.names.values(), *(reading.table.names if reading.table else {}).values())
    }
    notes = [note for args in missing for note in _silent_on(named, descriptor.name, args, source)]
    mask = _in_expert_ids(mask, descriptor.name, source)
    if not mask.labels.any() and not keep_empty:
        raise UserError("marks nothing; give --keep-empty if that is the finding")
    for args in missing:
        record = annotate_one(_Given(mask), descriptor, inputs, args, weights_sha256=mask.sha256)
        if record.status == "failed":
            raise UserError(record.reason)
        writer.write(record)
    summary.counts["imported"] += 1
    summary.notes += [(source.name, note) for note in (*mask.notes, *notes)]


def _one_id_a_name(mask: Mask) -> Mask:
    """The mask with one id for each name: legends and `compare` know labels by their names."""
    first: dict[str, int] = {}
    targets = {i: first.setdefault(name.lower(), i) for i, name in sorted(mask.names.items())}
    present = np.flatnonzero(np.bincount(mask.labels.ravel())).tolist()
    doubled = [i for i in present if i and targets[i] != i]
    if not doubled:
        return mask
    table = np.arange(present[-1] + 1, dtype=np.uint16)
    table[doubled] = [targets[i] for i in doubled]
    names = {i: name for i, name in mask.names.items() if targets[i] == i}
    shared = sorted({mask.names[targets[i]] for i in doubled})
    note = f"several label ids have the name {', '.join(shared[:_LISTED])}; each name is one label"
    return dataclasses.replace(mask, labels=table[mask.labels], names=names, notes=(*mask.notes, note))


def _silent_on(named: Set[frozenset[str]], expert: str, args: str, source: MaskSource) -> list[str]:
    """A note on labels that `expert` answers for, but the mask cannot hold: they count as absent.

    Args:
      named: the names, as `words_of`, of all that the mask may hold.
      expert, args: under which it is stored.
      source: the mask.

    Raises:
      UserError: `args` asks for a lesion, and the mask cannot hold it. That there is none would be made up.
    """
    known, group = label_table(expert), label_group(expert, args)
    target = group.target if group else {i: i for i in known}
    answered = group.names if group else known
    held = {into for i, into in target.items() if words_of(known[i]) in named}
    silent = [name for i, name in answered.items() if i not in held]
    if is_lesion(args) and (lesions := [name for name in silent if is_lesion(name)]):
        raise UserError(
            f"{source.name}: no label is named {lesions[0]}, so it does not tell that there is none; leave "
            f"{args!r} out of --args, or name the label in --labels if whoever made the masks looked for it"
        )
    if not silent:
        return []
    listed = ", ".join(silent[:_LISTED]) + (", ..." if len(silent) > _LISTED else "")
    call = f"{expert}({args})"
    return [f"{len(silent)} labels of {call} have no name in the mask and count as absent: {listed}"]


def _in_expert_ids(mask: Mask, expert: str, source: MaskSource) -> Mask:
    """The mask under the ids and names of a known expert; names are compared as sets of words.

    Raises:
      UserError: not one name is the expert's.
    """
    known = label_table(expert)
    if not known:
        return mask
    wanted = {words_of(name): number for number, name in known.items()}
    targets = {i: wanted[words_of(n)] for i, n in mask.names.items() if words_of(n) in wanted}
    if not targets:
        raise UserError(
            f"{source.name}: none of its labels is one of {expert}'s; check --labels and --expert"
        )
    table = np.zeros(max(int(mask.labels.max()), *targets) + 1, np.uint16)
    for number, target in targets.items():
        table[number] = target
    present = np.flatnonzero(np.bincount(mask.labels.ravel())).tolist()
    left_out = [mask.names[i] for i in present if i and i not in targets]
    notes = mask.notes
    if left_out:
        listed = ", ".join(left_out[:_LISTED]) + (", ..." if len(left_out) > _LISTED else "")
        notes += (f"{len(left_out)} labels are not in the table of {expert} and are left out: {listed}",)
    names = {target: known[target] for target in targets.values()}
    return dataclasses.replace(mask, labels=table[mask.labels], names=names, notes=notes)
