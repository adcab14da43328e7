"""Reading one mask, of whatever kind, onto the grid of its scan."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import nibabel as nib
import numpy as np
from etils import epath
from scipy import ndimage

from vilam3_experts.imported import dicom_seg
from vilam3_experts.imported.label_tables import LabelTable, clean_name, make_table, words_of
from vilam3_jax.data import file_kinds
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.nrrd import read_nrrd_layers
from vilam3_jax.data.stored_volume import StoredVolume
from vilam3_jax.data.volumes import (
    GRID_TOLERANCE,
    Volume,
    canonical_volume,
    grid_distance,
    read_volume,
    whole_labels,
)
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import read_bytes

MaskKind = Literal["file", "dicom-seg", "organs"]
_SLICER_NAME = re.compile(r"segment(\d+)_name")
_MITK_GROUPS = "org.mitk.multilabel.segmentation.labelgroups"
# How TotalSegmentator names the labels of a NIfTI file, in a header extension.
_CARET_LABEL = re.compile(r'<Label Key="(\d+)"[^>]*>\s*(?:<!\[CDATA\[(.*?)\]\]>|([^<]*))\s*</Label>')
_MAX_EXTENSION = 1 << 20
_MAX_NAMED_IDS = 8


@dataclasses.dataclass(frozen=True)
class MaskSource:
    """Where one mask lies.

    Attributes:
      name: below the folder of masks, for people.
      kind: a label map in one file, a DICOM Segmentation object, or one file per structure.
      files: one file, or those of the structures.
    """

    name: str
    kind: MaskKind
    files: tuple[epath.Path, ...]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How masks are read.

    Attributes:
      table: what label ids mean; None: what the mask itself states.
      structure_ids: for one file per structure: the id that each name (as `words_of`) gets.
      resample: masks on another grid of the scan's space are resampled, nearest neighbour.
      later_wins: where structures overlap, the later one is kept; else the mask is refused.
    """

    table: LabelTable | None = None
    structure_ids: Mapping[frozenset[str], int] = dataclasses.field(default_factory=dict)
    resample: bool = False
    later_wins: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """A mask on the grid of its scan.

    Attributes:
      labels: [X, Y, Z] uint8 or uint16, 0 is background.
      names: label id to name, of the ids that the mask may hold.
      sha256: of the file, or of the files of its structures.
      notes: what was assumed, repaired or resampled.
    """

    labels: np.ndarray
    names: dict[int, str]
    sha256: str
    notes: tuple[str, ...]


def read_mask(source: MaskSource, scan: Volume, reading: Reading, limits: Limits = DEFAULT_LIMITS) -> Mask:
    """Reads a mask onto the grid of its scan.

    Raises:
      UnavailableError: the disk or the network fails.
      UserError: damaged, too large, no whole numbers, on another grid, an id without a name, or structures
        that overlap.
    """
    if source.kind == "organs":
        mask = _from_structures(source, scan, reading)
    elif source.kind == "dicom-seg":
        mask = _from_dicom(source.files[0], scan, reading, limits)
    else:
        mask = _from_file(source.files[0], scan, reading, limits)
    return _checked(mask, reading.table, source)


def _checked(mask: Mask, table: LabelTable | None, source: MaskSource) -> Mask:
    """Clears ignored voxels and refuses ids without a name."""
    labels, notes = mask.labels, mask.notes
    present = np.flatnonzero(np.bincount(labels.ravel())).tolist()
    ignored = [i for i in present if table is not None and i in table.ignored]
    if ignored:
        count = int(np.isin(labels, ignored).sum())
        labels = np.where(np.isin(labels, ignored), 0, labels).astype(labels.dtype)
        notes += (f"{count} voxels are marked as not labelled by anyone; they count as background",)
    unknown = [i for i in present if i and i not in mask.names and i not in ignored]
    if unknown:
        listed = ", ".join(map(str, unknown[:_MAX_NAMED_IDS])) + (", ..." if len(unknown) > 8 else "")
        raise UserError(
            f"{source.name}: label ids without a name: {listed}; add them to the table in --labels"
        )
    return dataclasses.replace(mask, labels=labels, notes=notes)


def _from_file(path: epath.Path, scan: Volume, reading: Reading, limits: Limits) -> Mask:
    kind = file_kinds.identify(path)
    if kind.reader == "nrrd":
        return _from_nrrd(path, scan, reading, limits)
    volume = read_volume(path, limits=limits)
    labels = whole_labels(volume, path)
    names = (
        reading.table.names if reading.table else _names_in_nifti(path) if kind.reader == "nifti" else None
    )
    placed, notes = place(labels, volume.affine, scan, path, resample=reading.resample)
    return Mask(placed, _need_names(names, path), _digest(path, labels), (*_of(volume), *notes))


def _of(volume: Volume) -> tuple[str, ...]:
    unvalued = ("voxels without a value are background",) if volume.valid is not None else ()
    return (*volume.notes, *unvalued)


def _need_names(names: dict[int, str] | None, path: epath.Path) -> dict[int, str]:
    if not names:
        raise UserError(f"{path}: says nothing of what its label ids mean; give --labels")
    return names


def _names_in_nifti(path: epath.Path) -> dict[int, str] | None:
    """Label names in a header extension, as TotalSegmentator writes them."""
    name = path.name.lower()
    if "://" in str(path) or not name.endswith((".nii", ".nii.gz")):
        return None
    try:
        extensions = getattr(nib.load(path).header, "extensions", ())  # type: ignore[attr-defined]
        texts = [e.get_content() for e in extensions if e.get_sizeondisk() <= _MAX_EXTENSION]
    except Exception:  # what the reader of the voxels made of the file counts
        return None
    found = [
        (int(number), html.unescape(cdata or plain))
        for text in texts
        if isinstance(text, bytes) and b"<LabelTable>" in text
        for number, cdata, plain in _CARET_LABEL.findall(text.decode("utf-8", "replace"))
    ]
    return make_table(found, path).names if found else None


def _digest(path: epath.Path, labels: np.ndarray) -> str:
    """sha256 of the file; of a header with its data elsewhere, also of the labels."""
    digest = hashlib.sha256(read_bytes(path, DEFAULT_LIMITS.file_bytes))
    if path.name.lower().endswith((".mhd", ".nhdr", ".hdr", ".img", ".img.gz")):
        digest.update(np.ascontiguousarray(labels).tobytes())
    return digest.hexdigest()


def _from_nrrd(path: epath.Path, scan: Volume, reading: Reading, limits: Limits) -> Mask:
    """A label map, or the layers of 3D Slicer's and MITK's segmentations."""
    layers, pairs = read_nrrd_layers(path, limits)
    volumes = [canonical_volume(layer, path) for layer in layers]
    maps = [whole_labels(volume, path) for volume in volumes]
    named = _slicer_segments(pairs, path) or _mitk_labels(pairs, path)
    digest = _digest(path, np.stack(maps))
    if not named or (reading.table is not None and len(maps) == 1):
        if len(maps) > 1:
            raise UserError(f"{path}: {len(maps)} layers without segment names; save one label map per file")
        names = _need_names(reading.table.names if reading.table else None, path)
        placed, notes = place(maps[0], volumes[0].affine, scan, path, resample=reading.resample)
        return Mask(placed, names, digest, (*_of(volumes[0]), *notes))
    names = _free_ids(named)
    parts = ((names[part], maps[part[0]] == part[1]) for part in names if part[0] < len(maps))
    labels, overlap = combine(
        parts, maps[0].shape, reading.later_wins, named_by=_name_of(names, named), path=path
    )
    unnamed = [
        int(v)
        for m, k in zip(maps, range(len(maps)), strict=True)
        for v in np.unique(m)
        if v and (k, int(v)) not in names
    ]
    if unnamed:
        raise UserError(
            f"{path}: label ids without a segment: {', '.join(map(str, unnamed[:8]))}; save it again"
        )
    placed, notes = place(labels, volumes[0].affine, scan, path, resample=reading.resample)
    table = {number: named[part] for part, number in names.items()}
    return Mask(placed, table, digest, (*_of(volumes[0]), *overlap, *notes))


_Part = tuple[int, int]  # (layer, label value)


def _free_ids(named: Mapping[_Part, str]) -> dict[_Part, int]:
    """An id for each part: its value in the file, or the next free one where two layers share a value."""
    values = [value for _, value in named]
    if len(set(values)) == len(values):
        return {part: part[1] for part in named}
    return {part: number for number, part in enumerate(sorted(named), start=1)}


def _name_of(ids: Mapping[_Part, int], named: Mapping[_Part, str]) -> Callable[[int], str]:
    names = {number: named[part] for part, number in ids.items()}
    return lambda number: names[number]


def _slicer_segments(pairs: Mapping[str, str], path: epath.Path) -> dict[_Part, str]:
    """3D Slicer: `Segment0_Name`, `Segment0_LabelValue`, `Segment0_Layer`."""
    named = {}
    for key, name in pairs.items():
        if match := _SLICER_NAME.fullmatch(key):
            value, layer = (pairs.get(f"segment{match[1]}_{word}", "") for word in ("labelvalue", "layer"))
            if not value.isdigit() or not (layer or "0").isdigit():
                raise UserError(f"{path}: a segment states no label value; save it again in 3D Slicer")
            named[int(layer or 0), int(value)] = clean_name(name, path)
    return named


def _mitk_labels(pairs: Mapping[str, str], path: epath.Path) -> dict[_Part, str]:
    """MITK: a JSON list of groups, one a layer, with labels of `name` and `value`."""
    text = pairs.get(_MITK_GROUPS)
    if not text:
        return {}
    try:
        groups = json.loads(text)
        return {
            (layer, int(label["value"])): clean_name(
                str(label.get("name") or f"label {label['value']}"), path
            )
            for layer, group in enumerate(groups)
            for label in group["labels"]
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its MITK label groups cannot be read; save it again in MITK") from error


def _from_structures(source: MaskSource, scan: Volume, reading: Reading) -> Mask:
    """One file per structure, named after it, as TotalSegmentator writes them."""
    digests, notes, names = [], [], {}

    def parts() -> Iterator[tuple[int, np.ndarray]]:
        for path in source.files:
            number = reading.structure_ids[words_of(structure_name(path))]
            names[number] = clean_name(structure_name(path), path.name)
            volume = read_volume(path)
            labels = whole_labels(volume, path)
            values = np.unique(labels)
            if len(values[values > 0]) > 1:
                raise UserError(
                    f"{path}: holds several label ids, one structure a file has one; check the file"
                )
            digests.append(f"{path.name} {_digest(path, labels)}")
            placed, placing = place(labels, volume.affine, scan, path, resample=reading.resample)
            notes.extend(f"{path.name}: {note}" for note in (*_of(volume), *placing))
            yield number, placed > 0

    labels, overlap = combine(
        parts(), scan.voxels.shape, reading.later_wins, named_by=names.__getitem__, path=source.name
    )
    digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return Mask(labels, names, digest, (*dict.fromkeys(notes), *overlap))


def structure_name(path: epath.Path) -> str:
    """The structure that a file's name states: without suffix, blanks instead of underscores."""
    stem = re.sub(r"\.(nii|nrrd|seg|nhdr|mha|mhd|img|hdr|gz)\b", "", path.name, flags=re.IGNORECASE)
    return re.sub(r"[\s_]+", " ", stem).strip() or path.name


def _from_dicom(path: epath.Path, scan: Volume, reading: Reading, limits: Limits) -> Mask:
    header = dicom_seg.read_seg_header(path, limits)
    segments = dicom_seg.open_segments(path, header)
    names = {**header.names, **(reading.table.names if reading.table else {})}
    labels, notes = combine(
        segments.masks(), segments.shape, reading.later_wins, named_by=names.__getitem__, path=path
    )
    if header.kind == "FRACTIONAL":
        notes = (
            *notes,
            f"its segments are fractional; voxels of at least {dicom_seg.FRACTION} count as inside",
        )
    volume = canonical_volume(StoredVolume(labels, segments.affine), path)
    placed, placing = place(
        whole_labels(volume, path), volume.affine, scan, path, resample=reading.resample, partial=True
    )
    digest = hashlib.sha256(read_bytes(path, limits.file_bytes)).hexdigest()
    return Mask(placed, names, digest, (*notes, *placing))


def combine(
    parts: Iterable[tuple[int, np.ndarray]],
    shape: Sequence[int],
    later_wins: bool,
    *,
    named_by: Callable[[int], str],
    path: object,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """One label map out of single structures.

    Args:
      parts: (label id, bool [X, Y, Z]) in order.
      shape: of the map.
      later_wins: where structures overlap, the later one is kept.
      named_by: label id to name, for messages.
      path: what to name in messages.

    Returns:
      (uint16 [X, Y, Z], notes).

    Raises:
      UserError: two structures overlap, and `later_wins` is False.
    """
    labels = np.zeros(tuple(shape), np.uint16)
    overlapping = 0
    for number, mask in parts:
        under = labels[mask]
        if (count := np.count_nonzero(under)) and not later_wins:
            other = int(under[under > 0][0])
            raise UserError(
                f"{path}: {named_by(other)} and {named_by(number)} overlap in {count} voxels, and a label "
                "map holds one label a voxel; give --overlap later to keep the later one"
            )
        overlapping += int(count)
        labels[mask] = number
    note = f"structures overlap in {overlapping} voxels; the later one of each two is kept"
    return labels, (note,) if overlapping else ()


def place(
    labels: np.ndarray,
    affine: np.ndarray,
    scan: Volume,
    path: object,
    *,
    resample: bool = False,
    partial: bool = False,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Brings labels onto the grid of their scan.

    Args:
      labels: [X, Y, Z] in canonical orientation.
      affine: [4, 4], their voxel index to RAS millimetres.
      scan: what they belong to.
      path: what to name in messages.
      resample: another grid is resampled, nearest neighbour; else refused.
      partial: a part of the scan's own grid (some of its slices) is accepted without `resample`.

    Returns:
      (labels on the grid of `scan`, notes).

    Raises:
      UserError: another grid, or labels that lie outside the scan.
    """
    near = GRID_TOLERANCE * scan.spacing.min()
    is_same_shape = labels.shape == scan.voxels.shape
    if is_same_shape and grid_distance(affine, scan) <= near:
        return labels, ()
    to_mask = np.linalg.inv(affine) @ scan.affine  # scan index to mask index
    offset = _offset(to_mask, labels.shape)
    if offset is not None and (partial or resample):
        placed = _pasted(labels, offset, scan.voxels.shape)
        note = "covers a part of the scan's grid; the rest is background"
    elif resample:
        # Nearest neighbour reaches half a voxel beyond the centres at the border.
        placed = ndimage.affine_transform(
            labels, to_mask, output_shape=scan.voxels.shape, order=0, mode="grid-constant"
        )
        note = "lay on another grid and was resampled to that of the scan, nearest neighbour"
    elif is_same_shape:
        distance = grid_distance(affine, scan)
        raise UserError(
            f"{path}: lies {distance:.2f} mm away from the grid of {scan.source}; give --resample if both "
            "are of one space"
        )
    else:
        raise UserError(
            f"{path}: has {_size(labels)} voxels, {scan.source} has {_size(scan.voxels)}; give --resample if "
            "both are of one space"
        )
    if labels.any() and not placed.any():
        raise UserError(f"{path}: all it marks lies outside {scan.source}; check which scan it belongs to")
    return placed, (note,)


def _size(array: np.ndarray) -> str:
    return " x ".join(map(str, array.shape))


def _offset(to_mask: np.ndarray, shape: Sequence[int]) -> np.ndarray | None:
    """Whole voxels between two grids of the same spacing and direction, [3]; None for any other two."""
    shift = np.rint(to_mask[:3, 3])
    drift = np.abs(to_mask[:3, :3] - np.eye(3)).sum(axis=1).max() * max(shape)
    if drift > GRID_TOLERANCE or np.abs(to_mask[:3, 3] - shift).max() > GRID_TOLERANCE:
        return None
    return shift.astype(int)


def _pasted(labels: np.ndarray, offset: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Labels at their place in a larger (or other) part of the same lattice."""
    placed = np.zeros(tuple(shape), labels.dtype)
    low = np.maximum(-offset, 0)
    high = np.minimum(np.array(labels.shape) - offset, shape)
    if (low < high).all():
        here = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        there = tuple(slice(a + o, b + o) for a, b, o in zip(low, high, offset, strict=True))
        placed[here] = labels[there]
    return placed
