"""Imports existing masks as annotations of their scans."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from collections.abc import Sequence, Set
from typing import Literal

import numpy as np
from tqdm import tqdm

from vilam3_experts import descriptors as registry
from vilam3_experts.base import ExpertInputs, KnownAnswer, Output, annotate_one
from vilam3_experts.descriptors import Descriptor
from vilam3_experts.engine.summary import ProblemLists
from vilam3_experts.imported import matching
from vilam3_experts.imported.label_tables import LabelTable, name_words, read_label_table
from vilam3_experts.imported.masks import Mask, MaskFiles, ReadOptions, read_mask, structure_name
from vilam3_experts.inputs import find_inputs
from vilam3_experts.text import listed
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
_MAX_NAME = 120
_LISTED = 5


@dataclasses.dataclass(frozen=True)
class MaskOrigin:
    """Who made the masks: a tool with its version, or people whose labels are the ground truth."""

    kind: Literal["tool", "ground-truth"]
    name: str

    @classmethod
    def parse(cls, text: str) -> MaskOrigin:
        """Parses `tool:NAME VERSION` or `ground-truth:WHO`; raises `UserError` for anything else."""
        kind, _, name = text.partition(":")
        name = re.sub(r"\s+", " ", name).strip()
        if kind not in ("tool", "ground-truth") or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
            raise UserError(
                f"--source {text!r}: say who made the masks, as 'tool:NAME VERSION' or 'ground-truth:WHO'"
            )
        return cls(kind, name)  # type: ignore[arg-type]

    @property
    def version(self) -> str:
        """The version of the annotations."""
        return f"{IMPORTED}; {self.kind}: {self.name}"


@dataclasses.dataclass
class ImportSummary:
    """Counts of masks `imported`, `skipped` (already stored) and `refused`; (mask, problem); (mask, note)."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def refuse(self, name: str, reason: str) -> None:
        self.counts["refused"] += 1
        self.problems.append((name, " ".join(reason.split())))

    def line(self) -> str:
        """The counts as one line of text."""
        return ", ".join(f"{self.counts[n]} {n}" for n in ("imported", "skipped", "refused"))


@dataclasses.dataclass(frozen=True)
class Options:
    """How masks are found and read; the fields are the options of `vilam3-experts import`."""

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
    source: MaskOrigin,
    options: Options = Options(),
) -> ImportSummary:
    """Stores masks as annotations of their scans, under the name of an expert.

    The version of the records is `MaskOrigin.version`, their weights hash is that of the mask's file. Stored
    records are skipped, never replaced. A mask that cannot be used is counted and listed.

    Args:
      masks: files and folders, or one samples folder with the label maps in its index.
      data: the scans: a samples folder, or any folder or file.
      expert: a known expert, or any name in capital letters.

    Raises:
      UserError: a problem of all masks, such as a missing folder or a bad label table.
    """
    descriptor = _descriptor(expert, source)
    chosen = [descriptor.check_args(args) for args in options.args or (None,)]
    table = read_label_table(options.labels) if options.labels is not None else None
    found, tables = _match(masks, data, descriptor, source, options)
    structures = _structure_ids([mask for mask, _ in found.pairs], table, expert)
    summary = ImportSummary()
    for name, reason in found.problems:
        summary.refuse(name, reason)
    summary.notes += found.notes
    with AnnotationWriter(out) as writer, tqdm(found.pairs, desc=expert, unit="mask") as progress:
        for source_files, item in progress:
            name = source_files.name
            progress.set_postfix_str(name[-40:], refresh=False)
            read = ReadOptions(tables.get(name, table), structures, options.resample, options.later_wins)
            try:
                inputs = item.load()
                key = inputs_key(inputs.keys)
                missing = [args for args in chosen if writer.status(key, descriptor.name, args) != "ok"]
                if not missing:
                    summary.counts["skipped"] += 1
                    continue
                mask, notes = _read(source_files, inputs, descriptor, missing, read)
                if not mask.labels.any() and not options.keep_empty:
                    raise UserError("is empty; give --keep-empty if that is the finding")
                known = KnownAnswer(Output(labels=mask.labels, label_names=mask.names))
                for args in missing:
                    record = annotate_one(known, descriptor, inputs, args, weights_sha256=mask.sha256)
                    if record.status == "failed":
                        raise UserError(record.reason)
                    writer.write(record)
                summary.counts["imported"] += 1
                summary.notes += [(name, note) for note in notes]
            except UnavailableError:
                raise
            except UserError as error:
                summary.refuse(name, str(error))
    lists = ProblemLists(out, expert)
    for kind, rows in (("problems", summary.problems), ("notes", summary.notes)):
        for name, text in rows:
            lists.add_row(kind, name, text)
    lists.publish(skipped=summary.counts["skipped"] > 0)
    return summary


def _descriptor(name: str, source: MaskOrigin) -> Descriptor:
    """The expert to import for; an unknown name gets a generic card."""
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
            f"--expert {name}: is a network, and ground truth is not its answer; choose another name"
        )
    return dataclasses.replace(known, version=source.version)


def _match(
    masks: Sequence[paths.PathLike],
    data: paths.PathLike,
    descriptor: Descriptor,
    source: MaskOrigin,
    options: Options,
) -> tuple[matching.Matching, dict[str, LabelTable]]:
    """Masks with their scans, and label tables by mask for the masks of a samples folder."""
    if len(masks) == 1 and is_samples_folder(masks[0]):
        return _from_samples(masks[0], data, descriptor, source)
    scans = find_inputs(data, descriptor)
    root = os.fspath(paths.as_path(data))
    folders = [os.fspath(paths.as_path(mask)).rstrip("/") for mask in masks]
    mixed = any(f"{root}/".startswith(f"{folder}/") for folder in folders)  # scans and masks in one folder
    only_dicom = mixed and options.manifest is None
    found = matching.find_masks(masks, per_structure=options.per_structure, segmentations_only=only_dicom)
    if options.manifest is not None:
        rows = matching.read_manifest(options.manifest)
        return matching.match_by_manifest(rows, found, scans), {}
    files = {os.fspath(file) for mask in found for file in mask.files}
    scans = [scan for scan in scans if os.fspath(scan.path) not in files]
    return matching.match(found, scans), {}


def _from_samples(
    masks: paths.PathLike, data: paths.PathLike, descriptor: Descriptor, source: MaskOrigin
) -> tuple[matching.Matching, dict[str, LabelTable]]:
    """The label maps of a samples folder that `source` made, according to its index."""
    all_samples = read_samples(masks)
    samples = {s.name: s for s in all_samples if s.label_names and s.label_source == source.name}
    pairs, tables = [], {}
    for scan in find_inputs(data, descriptor):
        sample = samples.get(scan.name)
        if sample is not None and sample.label_map is not None and sample.path == scan.path:
            pairs.append((MaskFiles(scan.name, "file", (sample.label_map,)), scan))
            tables[scan.name] = LabelTable({i: n for i, n in (sample.label_names or {}).items() if i > 0})
    if not pairs:
        known = sorted({repr(s.label_source) for s in all_samples if s.label_map and s.label_source})
        raise UserError(
            f"{masks}: no label map of {source.name!r} that {descriptor.name} reads; its maps are of "
            f"{', '.join(known) or 'nobody'}, see --source"
        )
    return matching.Matching(pairs, []), tables


def _structure_ids(
    masks: Sequence[MaskFiles], table: LabelTable | None, expert: str
) -> dict[frozenset[str], int]:
    """For masks with one file per structure: the label id of each name, the same in the whole run."""
    names = [structure_name(f) for m in masks if m.kind == "structures" for f in m.files]
    files = {name_words(name): name for name in names}
    known = table.names if table is not None else label_table(expert)
    ids = {name_words(name): number for number, name in known.items()}
    if table is not None and (unknown := sorted(name for words, name in files.items() if words not in ids)):
        raise UserError(f"--labels: the table has no id for files {listed(unknown, _LISTED)}; add them")
    free = max(ids.values(), default=0)
    for words, _ in sorted(files.items(), key=lambda item: item[1]):
        if words not in ids:
            free += 1
            ids[words] = free
    return ids


def _read(
    source: MaskFiles,
    inputs: ExpertInputs,
    descriptor: Descriptor,
    chosen: Sequence[str],
    options: ReadOptions,
) -> tuple[Mask, list[str]]:
    """The mask with the expert's ids, and notes."""
    if not isinstance(inputs.first, Volume):
        raise UserError("its scan is not a volume; check --data")
    with wrap_parser_errors(source.name):  # parsers document few of their exceptions
        mask = _unique_names(read_mask(source, inputs.first, options))
    possible = [*mask.names.values(), *(options.table.names.values() if options.table else ())]
    words = set(map(name_words, possible))
    notes = [note for args in chosen for note in _missing_labels(words, descriptor.name, args, source)]
    mask = _with_expert_ids(mask, descriptor.name, source)
    return mask, [*mask.notes, *notes]


def _relabelled(mask: Mask, targets: dict[int, int], names: dict[int, str], note: str | None) -> Mask:
    """The mask with its ids replaced by `targets`; ids without a target become background."""
    table = np.zeros(max(int(mask.labels.max()), *targets, *targets.values()) + 1, np.uint16)
    table[list(targets)] = list(targets.values())
    notes = mask.notes if note is None else (*mask.notes, note)
    return dataclasses.replace(mask, labels=table[mask.labels], names=names, notes=notes)


def _unique_names(mask: Mask) -> Mask:
    """The mask with one id per name, because legends and `compare` identify labels by name."""
    first: dict[str, int] = {}
    targets = {i: first.setdefault(name.lower(), i) for i, name in sorted(mask.names.items())}
    doubled = [i for i in mask.present_ids() if targets[i] != i]
    if not doubled:
        return mask
    names = {i: name for i, name in mask.names.items() if targets[i] == i}
    shared = sorted({mask.names[targets[i]] for i in doubled})
    note = f"several label ids have the name {', '.join(shared[:_LISTED])}; each name is one label"
    return _relabelled(mask, targets, names, note)


def _missing_labels(words: Set[frozenset[str]], expert: str, args: str, source: MaskFiles) -> list[str]:
    """Notes labels that `expert(args)` covers but the mask, with the names `words`, cannot contain.

    They count as absent. Raises `UserError` if `args` asks for such a lesion: its absence would be invented.
    """
    known, group = label_table(expert), label_group(expert, args)
    target = group.target if group else {i: i for i in known}
    covered = group.names if group else known
    held = {into for i, into in target.items() if name_words(known[i]) in words}
    absent = [name for i, name in covered.items() if i not in held]
    if is_lesion(args) and (lesions := [name for name in absent if is_lesion(name)]):
        raise UserError(
            f"{source.name}: no label is named {lesions[0]}, so its absence is unknown; omit {args!r} from "
            "--args, or name the label in --labels if the annotators looked for it"
        )
    if not absent:
        return []
    call = f"{expert}({args})"
    return [
        f"{len(absent)} labels of {call} have no name in the mask and count as absent: "
        + listed(absent, _LISTED)
    ]


def _with_expert_ids(mask: Mask, expert: str, source: MaskFiles) -> Mask:
    """The mask with the ids and names of a known expert; names are compared by `name_words`."""
    known = label_table(expert)
    if not known:
        return mask
    wanted = {name_words(name): number for number, name in known.items()}
    targets = {i: wanted[name_words(n)] for i, n in mask.names.items() if name_words(n) in wanted}
    if not targets:
        raise UserError(f"{source.name}: none of its labels is one of {expert}'s; check --labels, --expert")
    left_out = [mask.names[i] for i in mask.present_ids() if i not in targets]
    note = None
    if left_out:
        names = listed(left_out, _LISTED)
        note = f"{len(left_out)} labels are not in the table of {expert} and are left out: {names}"
    return _relabelled(mask, targets, {target: known[target] for target in targets.values()}, note)
