"""Which scan a mask belongs to: by a manifest, the scan that a DICOM object names, its name, or its grid."""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Sequence

import nibabel as nib
import numpy as np
from etils import epath

from vilam3_experts.imported.dicom_seg import is_segmentation, read_seg_header
from vilam3_experts.imported.masks import MaskSource
from vilam3_experts.inputs import Input
from vilam3_jax.data import file_kinds
from vilam3_jax.data.folder_walk import list_files
from vilam3_jax.data.limits import DEFAULT_LIMITS
from vilam3_jax.data.volumes import GRID_TOLERANCE, describe_volume
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

_READERS = ("nifti", "nifti pair", "nrrd", "metaimage")
_MASK_FILE = re.compile(r".+\.(nii|nrrd|nhdr|mha|mhd|hdr)(\.gz)?", re.IGNORECASE)
_SUFFIX = re.compile(r"(\.seg)?\.(nii|nrrd|nhdr|mha|mhd|hdr|img|dcm)(\.gz)?$", re.IGNORECASE)
# What names of scans and masks end in beside the name of the case; 0000 is nnU-Net's first channel.
_ROLE = re.compile(
    r"(^|[ _.-])(segmentations?|segs?|dseg|masks?|labels?|labelmap|gt|rois?|images?|img|scan|ct|mri?|volume"
    r"|vol|0000)$",
    re.IGNORECASE,
)
_MAX_MANIFEST_BYTES = 64 << 20
_LISTED = 3


@dataclasses.dataclass(frozen=True)
class Matching:
    """Masks and their scans.

    Attributes:
      pairs: (mask, scan), in the order of the masks.
      problems: name of a mask (or a row of the manifest), and why it has no scan.
      notes: name of a mask, and what speaks for its scan where that is not its name.
    """

    pairs: list[tuple[MaskSource, Input]]
    problems: list[tuple[str, str]]
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def find_masks(
    roots: Sequence[paths.PathLike], *, per_structure: bool, segmentations_only: bool = False
) -> list[MaskSource]:
    """Lists masks, in a fixed order.

    Args:
      roots: files, and folders that are searched with their subfolders.
      per_structure: each folder with label maps is one mask, a file per structure.
      segmentations_only: only DICOM Segmentation objects: the other volumes there are scans.

    Raises:
      UserError: a root does not exist, or there is no mask.
    """
    places = [paths.as_path(root) for root in roots]
    if missing := [place for place in places if not paths.exists(place)]:
        raise UserError(f"{missing[0]}: no such file or folder; check --masks")
    base = places[0] if len(places) == 1 else epath.Path(os.path.commonpath([os.fspath(p) for p in places]))
    found: list[MaskSource] = []
    structures: dict[epath.Path, list[epath.Path]] = collections.defaultdict(list)
    for place in places:
        files = (
            [epath.Path(f) for f in list_files(place, DEFAULT_LIMITS.files, lambda: None).files]
            if place.is_dir()
            else [place]
        )
        for file in sorted(files):
            if file.name.startswith("."):
                continue
            if is_segmentation(file):
                found.append(MaskSource(_name(file, base), "dicom-seg", (file,)))
            elif not segmentations_only and _is_label_map(file):
                if per_structure:
                    structures[file.parent].append(file)
                else:
                    found.append(MaskSource(_name(file, base), "file", (file,)))
    found += [MaskSource(_name(folder, base), "organs", tuple(f)) for folder, f in structures.items()]
    if not found:
        what = "DICOM Segmentation object" if segmentations_only else "label map or DICOM Segmentation object"
        raise UserError(f"{roots[0]}: no {what} in it; check --masks")
    return sorted(found, key=lambda mask: mask.name)


def _is_label_map(file: epath.Path) -> bool:
    reader = file_kinds.identify(file).reader
    # Damaged files are listed, too, so that they are counted and named. A pair is listed by its header.
    if reader == "nifti pair":
        return not file.name.lower().endswith((".img", ".img.gz"))
    return reader in _READERS or (reader is None and _MASK_FILE.fullmatch(file.name) is not None)


def _name(file: epath.Path, base: epath.Path) -> str:
    return file.name if file == base else file.relative_to(base).as_posix()


def read_manifest(path: paths.PathLike) -> list[tuple[str, str]]:
    """The (scan, mask) rows of a CSV file with these two columns, or of a JSON list of such objects.

    Raises:
      UserError: no such file, or no such rows.
    """
    wanted = "give CSV with the columns scan and mask, or a JSON list of {scan, mask}"
    path = paths.as_path(path)
    if not paths.exists(path):
        raise UserError(f"{path}: no such file; check --manifest")
    try:
        text = paths.read_bytes(path, _MAX_MANIFEST_BYTES).decode("utf-8-sig")
        rows = (
            json.loads(text) if text.lstrip()[:1] in ("[", "{") else list(csv.DictReader(io.StringIO(text)))
        )
        if isinstance(rows, dict):
            rows = [{"scan": scan, "mask": mask} for scan, mask in rows.items()]
        pairs = [(str(row["scan"]).strip(), str(row["mask"]).strip()) for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error, RecursionError) as error:
        raise UserError(f"{path}: is no manifest; {wanted}") from error
    if not pairs:
        raise UserError(f"{path}: holds no row; {wanted}")
    return pairs


def match_by_manifest(
    rows: Sequence[tuple[str, str]], masks: Sequence[MaskSource], scans: Sequence[Input]
) -> Matching:
    """Pairs what a manifest names: paths below --masks and --data, or the UID of a DICOM series."""
    by_mask = {mask.name: mask for mask in masks}
    by_scan: dict[str, Input] = {}
    for scan in scans:
        by_scan[scan.name] = scan
        if scan.series is not None:
            by_scan.setdefault(scan.series.uid, scan)
            by_scan.setdefault(scan.series.identifier, scan)
    pairs, problems = [], []
    for scan_name, mask_name in rows:
        mask, scan = by_mask.get(mask_name.rstrip("/")), by_scan.get(scan_name.rstrip("/"))
        if mask is None:
            problems.append((mask_name, "no such mask below --masks; correct the manifest"))
        elif scan is None:
            problems.append((mask_name, f"no scan {scan_name} below --data; correct the manifest"))
        else:
            pairs.append((mask, scan))
    return _once_each(pairs, problems)


def match(masks: Sequence[MaskSource], scans: Sequence[Input]) -> Matching:
    """Finds the scan of each mask.

    A DICOM Segmentation object names its series, and belongs to no other series, whatever that one's name and
    grid. Otherwise these are tried, and the first that fits any scan decides: the same name and folder, the
    same name (without words such as `seg` or `_0000` at its end), the same folder, the same grid. Several
    scans of one name are told apart by the grid; a mask that still fits several is a problem, and so are two
    masks of one scan.
    """
    finder = _Finder(scans)
    pairs, problems = [], []
    for mask in masks:
        try:
            pairs.append((mask, finder.find(mask)))
        except UnavailableError:
            raise
        except UserError as error:
            problems.append((mask.name, str(error)))
    found = _once_each(pairs, problems)
    notes = [
        (mask.name, f"only its grid says that it belongs to {scan.name}")
        for mask, scan in found.pairs
        if mask.name in finder.by_grid
    ]
    return dataclasses.replace(found, notes=notes)


def _once_each(pairs: list[tuple[MaskSource, Input]], problems: list[tuple[str, str]]) -> Matching:
    masks_of: dict[str, list[MaskSource]] = collections.defaultdict(list)
    for mask, scan in pairs:
        masks_of[scan.name].append(mask)
    kept = []
    for mask, scan in pairs:
        others = [other.name for other in masks_of[scan.name] if other is not mask]
        if others:
            reason = (
                f"{scan.name} has another mask, {others[0]}; import them as two experts or give --manifest"
            )
            problems.append((mask.name, reason))
        else:
            kept.append((mask, scan))
    return Matching(kept, problems)


_Grid = tuple[tuple[int, ...], np.ndarray]


class _Finder:
    """Looks scans up by series, name, folder and grid.

    Attributes:
      by_grid: names of the masks that were found by their grid alone.
    """

    def __init__(self, scans: Sequence[Input]) -> None:
        self.by_grid: set[str] = set()
        self._scans = scans
        self._by_series: dict[str, list[Input]] = collections.defaultdict(list)
        self._by_place: dict[str, list[Input]] = collections.defaultdict(list)
        self._by_stem: dict[str, list[Input]] = collections.defaultdict(list)
        self._by_folder: dict[epath.Path, list[Input]] = collections.defaultdict(list)
        self._grids: dict[str, _Grid | None] = {}
        for scan in scans:
            if scan.series is not None:
                self._by_series[scan.series.uid].append(scan)
            name = scan.name.rpartition("/")[0] if scan.series is not None else scan.name
            folder, _, last = name.rpartition("/")
            stem = case_of(last)
            self._by_place[f"{folder}/{stem}"].append(scan)
            if stem:
                self._by_stem[stem].append(scan)
            self._by_folder[scan.path if scan.series is not None else scan.path.parent].append(scan)

    def find(self, mask: MaskSource) -> Input:
        """The scan of a mask.

        Raises:
          UserError: none fits, or several do.
        """
        if mask.kind == "dicom-seg":
            named = read_seg_header(mask.files[0]).series
            found = [scan for uid in named for scan in self._by_series.get(uid, ())]
            if len(found) == 1:
                return found[0]
            if len(found) > 1:
                raise UserError(_ambiguous(found))
            scan = self._by_name(mask)
            if named and scan.series is not None and scan.series.uid:
                raise UserError(
                    f"was made of another series than {scan.name}; give its own as --data, or a --manifest"
                )
            return scan
        return self._by_name(mask)

    def _by_name(self, mask: MaskSource) -> Input:
        """The scan of the same name, folder or grid.

        Raises:
          UserError: none fits, or several do.
        """
        folder, _, last = mask.name.rpartition("/")
        stem = case_of(last)
        same_place = f"{folder}/{stem}" if folder or stem else ""
        if not stem:  # case7/segmentation.nii.gz
            stem = case_of(folder.rpartition("/")[2])
        place = mask.files[0].parent
        for found in (
            self._by_place.get(same_place, []),
            self._by_stem.get(stem, []) if stem else [],
            self._by_folder.get(place, []) or self._by_folder.get(place.parent, []),
        ):
            if len(found) == 1:
                return self._undisputed(mask, found[0])
            if found:
                return self._on_grid(mask, found)
        found = self._on_grid(mask, self._scans)
        self.by_grid.add(mask.name)
        return found

    def _undisputed(self, mask: MaskSource, named: Input) -> Input:
        """The scan that a mask's name says, unless its grid says another one."""
        grid = _grid_of(mask.files[0]) if mask.kind != "dicom-seg" else None
        if grid is None or _is_same(grid, self._grid(named)):
            return named
        other = next((scan for scan in self._scans if _is_same(grid, self._grid(scan))), None)
        if other is not None:
            raise UserError(
                f"its name is that of {named.name}, its grid that of {other.name}; give --manifest"
            )
        return named

    def _on_grid(self, mask: MaskSource, scans: Sequence[Input]) -> Input:
        grid = _grid_of(mask.files[0]) if mask.kind != "dicom-seg" else None
        found = [scan for scan in scans if grid is not None and _is_same(grid, self._grid(scan))]
        if len(found) == 1:
            return found[0]
        if found or len(scans) < len(self._scans):
            raise UserError(_ambiguous(found or scans))
        raise UserError("no scan has its name, folder or grid; check --data or give --manifest")

    def _grid(self, scan: Input) -> _Grid | None:
        if scan.name not in self._grids:
            if scan.series is None:
                self._grids[scan.name] = _grid_of(scan.path)
            elif scan.series.affine is None:
                self._grids[scan.name] = None
            else:
                shape = (scan.series.columns, scan.series.rows, scan.series.slices)
                self._grids[scan.name] = _canonical(shape, scan.series.affine)
        return self._grids[scan.name]


def _ambiguous(scans: Sequence[Input]) -> str:
    names = ", ".join(scan.name for scan in scans[:_LISTED]) + (", ..." if len(scans) > _LISTED else "")
    return f"could belong to {len(scans)} scans ({names}); give --manifest"


def case_of(name: str) -> str:
    """What scans and masks of one case have in common: the name without suffix and words for its role.

    >>> case_of("case7_ct.nii.gz"), case_of("case7_seg.nrrd"), case_of("segmentations")
    ('case7', 'case7', '')
    """
    stem = _SUFFIX.sub("", name)
    while (shorter := _ROLE.sub("", stem)) != stem:
        stem = shorter
    return stem.lower()


def _grid_of(path: epath.Path) -> _Grid | None:
    try:
        stored = describe_volume(path)
    except UnavailableError:
        raise
    except UserError:  # what is wrong is told when the file is read
        return None
    return _canonical(stored.values.shape, stored.affine)


def _canonical(shape: tuple[int, ...], affine: np.ndarray) -> _Grid:
    orientation = nib.orientations.io_orientation(affine)
    turned = [0, 0, 0]
    for axis, size in enumerate(shape):
        turned[int(orientation[axis, 0])] = size
    return tuple(turned), affine @ nib.orientations.inv_ornt_aff(orientation, shape)


def _is_same(a: _Grid, b: _Grid | None) -> bool:
    if b is None or a[0] != b[0]:
        return False
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * [*a[0], 1]
    spacing = np.sqrt((a[1][:3, :3] ** 2).sum(axis=0)).min()
    return bool(np.abs(corners @ (a[1] - b[1]).T).max() <= GRID_TOLERANCE * spacing)
