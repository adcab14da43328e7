"""Matches masks with scans by a manifest, the series that a DICOM object references, name, folder or grid."""

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
from nibabel.affines import voxel_sizes

from vilam3_experts.imported.dicom_seg import is_segmentation, read_seg_header
from vilam3_experts.imported.masks import MaskFiles
from vilam3_experts.inputs import Input
from vilam3_experts.text import listed
from vilam3_jax.data import file_kinds
from vilam3_jax.data.folder_walk import list_files
from vilam3_jax.data.limits import DEFAULT_LIMITS
from vilam3_jax.data.volumes import GRID_TOLERANCE, describe_volume
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

_READERS = ("nifti", "nifti pair", "nrrd", "metaimage")
_MASK_FILE = re.compile(r".+\.(nii|nrrd|nhdr|mha|mhd|hdr)(\.gz)?", re.IGNORECASE)
_SUFFIX = re.compile(r"(\.seg)?\.(nii|nrrd|nhdr|mha|mhd|hdr|img|dcm)(\.gz)?$", re.IGNORECASE)
# Words for the role of a file, at the end of its name; 0000 is nnU-Net's first channel.
_ROLE = re.compile(
    r"(^|[ _.-])(segmentations?|segs?|dseg|masks?|labels?|labelmap|gt|rois?|images?|img|scan|ct|mri?|volume"
    r"|vol|0000)$",
    re.IGNORECASE,
)
_MAX_MANIFEST_BYTES = 64 << 20
_LISTED = 3


@dataclasses.dataclass(frozen=True)
class Matching:
    """(mask, scan) in the order of the masks; (mask, problem); and (mask, note) for matches not by name."""

    pairs: list[tuple[MaskFiles, Input]]
    problems: list[tuple[str, str]]
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def find_masks(
    roots: Sequence[paths.PathLike], *, per_structure: bool, segmentations_only: bool = False
) -> list[MaskFiles]:
    """Lists the masks in files and folders, sorted by name.

    With `per_structure`, each folder with label maps is one mask, a file per structure. `segmentations_only`
    lists only DICOM Segmentation objects, if other volumes are scans. Raises `UserError` if there is no mask.
    """
    places = [paths.as_path(root) for root in roots]
    if missing := [place for place in places if not paths.exists(place)]:
        raise UserError(f"{missing[0]}: no such file or folder; check --masks")
    base = places[0] if len(places) == 1 else epath.Path(os.path.commonpath([os.fspath(p) for p in places]))

    def name(file: epath.Path) -> str:
        return file.name if file == base else file.relative_to(base).as_posix()

    found: list[MaskFiles] = []
    structures: dict[epath.Path, list[epath.Path]] = collections.defaultdict(list)
    for place in places:
        files = [place]
        if place.is_dir():
            files = map(epath.Path, list_files(place, DEFAULT_LIMITS.files, lambda: None).files)
        for file in sorted(files):
            if file.name.startswith("."):
                continue
            if is_segmentation(file):
                found.append(MaskFiles(name(file), "dicom-seg", (file,)))
            elif not segmentations_only and _is_label_map(file):
                if per_structure:
                    structures[file.parent].append(file)
                else:
                    found.append(MaskFiles(name(file), "file", (file,)))
    found += [MaskFiles(name(folder), "structures", tuple(files)) for folder, files in structures.items()]
    if not found:
        what = "DICOM Segmentation object" if segmentations_only else "label map or DICOM Segmentation object"
        raise UserError(f"{roots[0]}: no {what} in it; check --masks")
    return sorted(found, key=lambda mask: mask.name)


def _is_label_map(file: epath.Path) -> bool:
    reader = file_kinds.identify(file).reader
    if reader == "nifti pair":  # listed by its header
        return not file.name.lower().endswith((".img", ".img.gz"))
    # Damaged files are listed by name, so that they are reported.
    return reader in _READERS or (reader is None and _MASK_FILE.fullmatch(file.name) is not None)


def read_manifest(path: paths.PathLike) -> list[tuple[str, str]]:
    """Reads the (scan, mask) rows of a CSV file with these columns, or of a JSON list of such objects."""
    wanted = "give CSV with the columns scan and mask, or a JSON list of {scan, mask}"
    path = paths.as_path(path)
    if not paths.exists(path):
        raise UserError(f"{path}: no such file; check --manifest")
    try:
        text = paths.read_bytes(path, _MAX_MANIFEST_BYTES).decode("utf-8-sig")
        is_json = text.lstrip()[:1] in ("[", "{")
        rows = json.loads(text) if is_json else list(csv.DictReader(io.StringIO(text)))
        if isinstance(rows, dict):
            rows = [{"scan": scan, "mask": mask} for scan, mask in rows.items()]
        pairs = [(str(row["scan"]).strip(), str(row["mask"]).strip()) for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error, RecursionError) as error:
        raise UserError(f"{path}: not a manifest; {wanted}") from error
    if not pairs:
        raise UserError(f"{path}: has no rows; {wanted}")
    return pairs


def match_by_manifest(
    rows: Sequence[tuple[str, str]], masks: Sequence[MaskFiles], scans: Sequence[Input]
) -> Matching:
    """Matches the rows of a manifest: paths below --masks and --data, or the UID of a DICOM series."""
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
    return _one_mask_per_scan(pairs, problems)


def match(masks: Sequence[MaskFiles], scans: Sequence[Input]) -> Matching:
    """Finds the scan of each mask.

    A DICOM Segmentation object references its series, and never matches another one. For other masks these
    rules are tried in order, and the first with any match decides: the same name and folder, the same name
    (without words such as `seg` or `_0000` at its end), the same folder, the same grid. The grid decides
    between several matches; a mask that still matches several scans is a problem, and so are two masks of one
    scan.
    """
    matcher = _Matcher(scans)
    pairs, problems = [], []
    for mask in masks:
        try:
            pairs.append((mask, matcher.find(mask)))
        except UnavailableError:
            raise
        except UserError as error:
            problems.append((mask.name, str(error)))
    found = _one_mask_per_scan(pairs, problems)
    notes = [
        (mask.name, f"matched with {scan.name} only by its grid")
        for mask, scan in found.pairs
        if mask.name in matcher.by_grid
    ]
    return dataclasses.replace(found, notes=notes)


def _one_mask_per_scan(pairs: list[tuple[MaskFiles, Input]], problems: list[tuple[str, str]]) -> Matching:
    masks_of: dict[str, list[MaskFiles]] = collections.defaultdict(list)
    for mask, scan in pairs:
        masks_of[scan.name].append(mask)
    kept = []
    for mask, scan in pairs:
        others = [other.name for other in masks_of[scan.name] if other is not mask]
        if others:
            reason = f"{scan.name} has another mask, {others[0]}; import as two experts or give --manifest"
            problems.append((mask.name, reason))
        else:
            kept.append((mask, scan))
    return Matching(kept, problems)


_Grid = tuple[tuple[int, ...], np.ndarray]


class _Matcher:
    """Finds scans by series, name, folder and grid.

    Attributes:
      by_grid: names of the masks that were matched only by their grid.
    """

    def __init__(self, scans: Sequence[Input]) -> None:
        self.by_grid: set[str] = set()
        self._scans = scans
        self._by_series: dict[str, list[Input]] = collections.defaultdict(list)
        self._by_path: dict[str, list[Input]] = collections.defaultdict(list)
        self._by_name: dict[str, list[Input]] = collections.defaultdict(list)
        self._by_folder: dict[epath.Path, list[Input]] = collections.defaultdict(list)
        self._grids: dict[str, _Grid | None] = {}
        for scan in scans:
            if scan.series is not None:
                self._by_series[scan.series.uid].append(scan)
            name = scan.name.rpartition("/")[0] if scan.series is not None else scan.name
            folder, _, last = name.rpartition("/")
            case = case_name(last)
            self._by_path[f"{folder}/{case}"].append(scan)
            if case:
                self._by_name[case].append(scan)
            self._by_folder[scan.path if scan.series is not None else scan.path.parent].append(scan)

    def find(self, mask: MaskFiles) -> Input:
        """The scan of a mask; raises `UserError` if there is none or more than one."""
        if mask.kind != "dicom-seg":
            return self._find_by_name(mask)
        referenced = read_seg_header(mask.files[0]).series
        found = [scan for uid in referenced for scan in self._by_series.get(uid, ())]
        if found:
            return _only(found)
        scan = self._find_by_name(mask)
        if referenced and scan.series is not None and scan.series.uid:
            raise UserError(
                f"was made of another series than {scan.name}; give its own as --data, or a --manifest"
            )
        return scan

    def _find_by_name(self, mask: MaskFiles) -> Input:
        """The scan with the same name, folder or grid."""
        folder, _, last = mask.name.rpartition("/")
        case = case_name(last)
        path = f"{folder}/{case}" if folder or case else ""
        if not case:  # case7/segmentation.nii.gz
            case = case_name(folder.rpartition("/")[2])
        place = mask.files[0].parent
        grid = _grid_of(mask.files[0]) if mask.kind != "dicom-seg" else None
        for found in (
            self._by_path.get(path, []),
            self._by_name.get(case, []) if case else [],
            self._by_folder.get(place, []) or self._by_folder.get(place.parent, []),
        ):
            if len(found) == 1:
                self._check_grid(grid, found[0])
                return found[0]
            if found:
                return _only(self._on_grid(grid, found) or found)
        found = self._on_grid(grid, self._scans)
        if not found:
            raise UserError("no scan has its name, folder or grid; check --data or give --manifest")
        self.by_grid.add(mask.name)
        return _only(found)

    def _check_grid(self, grid: _Grid | None, named: Input) -> None:
        """Refuses a mask whose name matches one scan and whose grid matches only another."""
        if grid is None or _is_same(grid, self._grid(named)):
            return
        if others := self._on_grid(grid, self._scans):
            raise UserError(
                f"its name is that of {named.name}, its grid that of {others[0].name}; give --manifest"
            )

    def _on_grid(self, grid: _Grid | None, scans: Sequence[Input]) -> list[Input]:
        return [scan for scan in scans if grid is not None and _is_same(grid, self._grid(scan))]

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


def _only(scans: Sequence[Input]) -> Input:
    if len(scans) > 1:
        names = listed([scan.name for scan in scans], _LISTED)
        raise UserError(f"could belong to {len(scans)} scans ({names}); give --manifest")
    return scans[0]


def case_name(name: str) -> str:
    """The name of the case: a file's name without suffix and words for its role, lower case.

    >>> case_name("case7_ct.nii.gz"), case_name("case7_seg.nrrd"), case_name("segmentations")
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
    except UserError:  # reported when the file is read
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
    spacing = voxel_sizes(a[1]).min()
    return bool(np.abs(corners @ (a[1] - b[1]).T).max() <= GRID_TOLERANCE * spacing)
