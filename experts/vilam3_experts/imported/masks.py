"""Reads one mask of any kind onto the grid of its scan."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import nibabel as nib
import numpy as np
from etils import epath
from scipy import ndimage

from vilam3_experts.imported import dicom_seg
from vilam3_experts.imported.label_tables import LabelTable, clean_name, make_table, name_words
from vilam3_experts.text import listed
from vilam3_jax.data import file_kinds
from vilam3_jax.data.limits import DEFAULT_LIMITS
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

MaskKind = Literal["file", "dicom-seg", "structures"]
_SLICER_NAME = re.compile(r"segment(\d+)_name")
_MITK_GROUPS = "org.mitk.multilabel.segmentation.labelgroups"
# Label names in a NIfTI header extension, as TotalSegmentator writes them.
_CARET_LABEL = re.compile(r'<Label Key="(\d+)"[^>]*>\s*(?:<!\[CDATA\[(.*?)\]\]>|([^<]*))\s*</Label>')
_MAX_EXTENSION = 1 << 20
_MAX_NAMED_IDS = 8


@dataclasses.dataclass(frozen=True)
class MaskFiles:
    """The files of one mask, and its path below the folder of masks.

    A mask is a label map in one file, a DICOM Segmentation object, or one file per structure.
    """

    name: str
    kind: MaskKind
    files: tuple[epath.Path, ...]


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How masks are read.

    `table` overrides the names in the mask. `structure_ids` has the id of each name (as `name_words`) for one
    file per structure. `resample` accepts other grids in the scan's space, nearest neighbour. `later_wins`
    keeps the later one of overlapping structures, instead of refusing the mask.
    """

    table: LabelTable | None = None
    structure_ids: Mapping[frozenset[str], int] = dataclasses.field(default_factory=dict)
    resample: bool = False
    later_wins: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """A mask on the grid of its scan, [X, Y, Z] uint8 or uint16 with background 0.

    `names` has the ids that the mask may hold; `sha256` is that of the file, or of the files of its
    structures.
    """

    labels: np.ndarray
    names: dict[int, str]
    sha256: str
    notes: tuple[str, ...]

    def present_ids(self) -> list[int]:
        """The label ids in the map, without the background."""
        return (np.flatnonzero(np.bincount(self.labels.ravel())[1:]) + 1).tolist()


def read_mask(source: MaskFiles, scan: Volume, options: ReadOptions) -> Mask:
    """Reads a mask onto the grid of its scan.

    Raises `UserError` for a mask that is damaged, too large, not whole numbers, or on another grid, an id
    without a name, and overlapping structures.
    """
    if source.kind == "structures":
        mask = _from_structures(source, scan, options)
    else:
        path = source.files[0]
        if source.kind == "dicom-seg":
            mask = _from_dicom(path, scan, options)
        elif file_kinds.identify(path).reader == "nrrd":
            mask = _from_nrrd(path, scan, options)
        else:
            mask = _from_file(path, scan, options)
    # Clear unlabelled voxels and refuse ids without a name.
    present, labels, notes = mask.present_ids(), mask.labels, mask.notes
    ignored = [i for i in present if options.table is not None and i in options.table.ignored]
    if ignored:
        unlabelled = np.isin(labels, ignored)
        labels = np.where(unlabelled, 0, labels).astype(labels.dtype)
        notes += (f"{int(unlabelled.sum())} voxels are marked as unlabelled; they count as background",)
    unknown = [i for i in present if i not in mask.names and i not in ignored]
    if unknown:
        raise UserError(
            f"{source.name}: label ids without a name: {listed(unknown, _MAX_NAMED_IDS)}; add them to the "
            "table in --labels"
        )
    return dataclasses.replace(mask, labels=labels, notes=notes)


def _from_file(path: epath.Path, scan: Volume, options: ReadOptions) -> Mask:
    volume = read_volume(path)
    labels = whole_labels(volume, path)
    names = options.table.names if options.table else _names_in_nifti(path)
    placed, notes = to_scan_grid(labels, volume.affine, scan, path, resample=options.resample)
    return Mask(placed, _required(names, path), _digest(path, labels), (*_notes(volume), *notes))


def _notes(volume: Volume) -> tuple[str, ...]:
    invalid = ("voxels without a value are background",) if volume.valid is not None else ()
    return (*volume.notes, *invalid)


def _required(names: dict[int, str] | None, path: epath.Path) -> dict[int, str]:
    if not names:
        raise UserError(f"{path}: does not name its label ids; give --labels")
    return names


def _names_in_nifti(path: epath.Path) -> dict[int, str] | None:
    """Label names in a header extension, as TotalSegmentator writes them."""
    if "://" in str(path) or not path.name.lower().endswith((".nii", ".nii.gz")):
        return None
    try:
        extensions = getattr(nib.load(path).header, "extensions", ())  # type: ignore[attr-defined]
        texts = [e.get_content() for e in extensions if e.get_sizeondisk() <= _MAX_EXTENSION]
    except Exception:  # the reader of the voxels has already accepted the file
        return None
    found = [
        (int(number), html.unescape(cdata or plain))
        for text in texts
        if isinstance(text, bytes) and b"<LabelTable>" in text
        for number, cdata, plain in _CARET_LABEL.findall(text.decode("utf-8", "replace"))
    ]
    return make_table(found, path).names if found else None


def _digest(path: epath.Path, labels: np.ndarray) -> str:
    """sha256 of the file, and of the labels if the file is a header with detached data."""
    digest = hashlib.sha256(read_bytes(path, DEFAULT_LIMITS.file_bytes))
    if path.name.lower().endswith((".mhd", ".nhdr", ".hdr", ".img", ".img.gz")):
        digest.update(np.ascontiguousarray(labels).tobytes())
    return digest.hexdigest()


def _from_nrrd(path: epath.Path, scan: Volume, options: ReadOptions) -> Mask:
    """A label map, or the layers of a segmentation of 3D Slicer or MITK."""
    layers, pairs = read_nrrd_layers(path, DEFAULT_LIMITS)
    volumes = [canonical_volume(layer, path) for layer in layers]
    maps = [whole_labels(volume, path) for volume in volumes]
    named = _slicer_segments(pairs, path) or _mitk_labels(pairs, path)
    overlap: tuple[str, ...] = ()
    if not named or (options.table is not None and len(maps) == 1):
        if len(maps) > 1:
            raise UserError(f"{path}: {len(maps)} layers without segment names; save one label map per file")
        labels, names = maps[0], _required(options.table.names if options.table else None, path)
    else:
        # Ids are the values in the file, unless two layers share a value.
        ids = {part: part[1] for part in named}
        if len(set(ids.values())) < len(ids):
            ids = {part: n for n, part in enumerate(sorted(named), start=1)}
        names = {number: named[part] for part, number in ids.items()}
        parts = ((ids[part], maps[part[0]] == part[1]) for part in ids if part[0] < len(maps))
        labels, overlap = combine(parts, maps[0].shape, options.later_wins, names=names, path=path)
        unnamed = [
            int(v) for layer, m in enumerate(maps) for v in np.unique(m) if v and (layer, int(v)) not in named
        ]
        if unnamed:
            raise UserError(
                f"{path}: label ids without a segment: {listed(unnamed, _MAX_NAMED_IDS)}; save it again"
            )
    placed, notes = to_scan_grid(labels, volumes[0].affine, scan, path, resample=options.resample)
    return Mask(placed, names, _digest(path, np.stack(maps)), (*_notes(volumes[0]), *overlap, *notes))


_Part = tuple[int, int]  # (layer, label value)


def _slicer_segments(pairs: Mapping[str, str], path: epath.Path) -> dict[_Part, str]:
    """3D Slicer: `Segment0_Name`, `Segment0_LabelValue`, `Segment0_Layer`."""
    named = {}
    for key, name in pairs.items():
        if match := _SLICER_NAME.fullmatch(key):
            value, layer = (pairs.get(f"segment{match[1]}_{word}", "") for word in ("labelvalue", "layer"))
            if not value.isdigit() or not (layer or "0").isdigit():
                raise UserError(f"{path}: a segment has no label value; save it again in 3D Slicer")
            named[int(layer or 0), int(value)] = clean_name(name, path)
    return named


def _mitk_labels(pairs: Mapping[str, str], path: epath.Path) -> dict[_Part, str]:
    """MITK: a JSON list of groups, one per layer, with labels of `name` and `value`."""
    text = pairs.get(_MITK_GROUPS)
    if not text:
        return {}
    try:
        return {
            (layer, int(label["value"])): clean_name(
                str(label.get("name") or f"label {label['value']}"), path
            )
            for layer, group in enumerate(json.loads(text))
            for label in group["labels"]
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its MITK label groups cannot be read; save it again in MITK") from error


def _from_structures(source: MaskFiles, scan: Volume, options: ReadOptions) -> Mask:
    """One file per structure, named after it, as TotalSegmentator writes them."""
    digests, notes, names = [], [], {}

    def parts() -> Iterator[tuple[int, np.ndarray]]:
        for path in source.files:
            number = options.structure_ids[name_words(structure_name(path))]
            names[number] = clean_name(structure_name(path), path.name)
            volume = read_volume(path)
            labels = whole_labels(volume, path)
            values = np.unique(labels)
            if len(values[values > 0]) > 1:
                raise UserError(f"{path}: has several label ids, expected one structure; check the file")
            digests.append(f"{path.name} {_digest(path, labels)}")
            placed, found = to_scan_grid(labels, volume.affine, scan, path, resample=options.resample)
            notes.extend(f"{path.name}: {note}" for note in (*_notes(volume), *found))
            yield number, placed > 0

    labels, overlap = combine(parts(), scan.voxels.shape, options.later_wins, names=names, path=source.name)
    digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return Mask(labels, names, digest, (*dict.fromkeys(notes), *overlap))


def structure_name(path: epath.Path) -> str:
    """The structure in a file's name: without suffix, blanks instead of underscores."""
    stem = re.sub(r"\.(nii|nrrd|seg|nhdr|mha|mhd|img|hdr|gz)\b", "", path.name, flags=re.IGNORECASE)
    return re.sub(r"[\s_]+", " ", stem).strip() or path.name


def _from_dicom(path: epath.Path, scan: Volume, options: ReadOptions) -> Mask:
    header = dicom_seg.read_seg_header(path)
    shape, affine, masks = dicom_seg.open_segments(path, header)
    names = {**header.names, **(options.table.names if options.table else {})}
    labels, notes = combine(masks, shape, options.later_wins, names=names, path=path)
    if header.kind == "FRACTIONAL":
        notes += (f"its segments are fractional; voxels of at least {dicom_seg.FRACTION} count as inside",)
    volume = canonical_volume(StoredVolume(labels, affine), path)
    placed, placing = to_scan_grid(
        whole_labels(volume, path), volume.affine, scan, path, resample=options.resample, partial=True
    )
    digest = hashlib.sha256(read_bytes(path, DEFAULT_LIMITS.file_bytes)).hexdigest()
    return Mask(placed, names, digest, (*notes, *placing))


def combine(
    parts: Iterable[tuple[int, np.ndarray]],
    shape: Sequence[int],
    later_wins: bool,
    *,
    names: Mapping[int, str],
    path: object,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Combines single structures, (label id, bool [X, Y, Z]), into one label map.

    `names` are for messages, and read after a part was drawn. Returns (uint16 [X, Y, Z], notes). Raises
    `UserError` if two structures overlap, unless `later_wins`.
    """
    labels = np.zeros(tuple(shape), np.uint16)
    overlapping = 0
    for number, mask in parts:
        under = labels[mask]
        if (count := np.count_nonzero(under)) and not later_wins:
            other = int(under[under > 0][0])
            raise UserError(
                f"{path}: {names[other]} and {names[number]} overlap in {count} voxels, and a label map has "
                "one label per voxel; give --overlap later to keep the later one"
            )
        overlapping += int(count)
        labels[mask] = number
    note = f"structures overlap in {overlapping} voxels; the later one of each two is kept"
    return labels, (note,) if overlapping else ()


def to_scan_grid(
    labels: np.ndarray,
    affine: np.ndarray,
    scan: Volume,
    path: object,
    *,
    resample: bool = False,
    partial: bool = False,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Brings labels, [X, Y, Z] in canonical orientation, onto the grid of their scan.

    `affine` is [4, 4], voxel index of the labels to RAS millimetres. `resample` resamples labels on another
    grid, nearest neighbour, instead of refusing them; `partial` accepts a part of the scan's own grid, such
    as some of its slices. Returns the labels and notes. Raises `UserError` if all labels are outside the
    scan.
    """
    is_same_shape = labels.shape == scan.voxels.shape
    distance = grid_distance(affine, scan)
    if is_same_shape and distance <= GRID_TOLERANCE * scan.spacing.min():
        return labels, ()
    to_mask = np.linalg.inv(affine) @ scan.affine  # scan index to mask index
    offset = _lattice_offset(to_mask, labels.shape)
    if offset is not None and (partial or resample):
        placed = _pasted(labels, offset, scan.voxels.shape)
        note = "covers a part of the scan's grid; the rest is background"
    elif resample:
        # 'grid-constant' extends nearest neighbour by half a voxel beyond the outermost centres.
        placed = ndimage.affine_transform(
            labels, to_mask, output_shape=scan.voxels.shape, order=0, mode="grid-constant"
        )
        note = "was on another grid and was resampled to that of the scan, nearest neighbour"
    else:
        size, scan_size = (" x ".join(map(str, array.shape)) for array in (labels, scan.voxels))
        problem = f"has {size} voxels, {scan.source} has {scan_size}"
        if is_same_shape:
            problem = f"is {distance:.2f} mm away from the grid of {scan.source}"
        raise UserError(f"{path}: {problem}; give --resample if both are in the same space")
    if labels.any() and not placed.any():
        raise UserError(f"{path}: all its labels are outside {scan.source}; check which scan it belongs to")
    return placed, (note,)


def _lattice_offset(to_mask: np.ndarray, shape: Sequence[int]) -> np.ndarray | None:
    """Offset in whole voxels between two grids of one lattice, [3]; None for other grids."""
    shift = np.rint(to_mask[:3, 3])
    drift = np.abs(to_mask[:3, :3] - np.eye(3)).sum(axis=1).max() * max(shape)
    if drift > GRID_TOLERANCE or np.abs(to_mask[:3, 3] - shift).max() > GRID_TOLERANCE:
        return None
    return shift.astype(int)


def _pasted(labels: np.ndarray, offset: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Copies labels to another part of the same lattice."""
    placed = np.zeros(tuple(shape), labels.dtype)
    low = np.maximum(-offset, 0)
    high = np.minimum(np.array(labels.shape) - offset, shape)
    if (low < high).all():
        here = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        there = tuple(slice(a + o, b + o) for a, b, o in zip(low, high, offset, strict=True))
        placed[here] = labels[there]
    return placed
