"""CT, MRI and PET volumes in a common orientation, from any supported format.

Volumes are in RAS canonical orientation: index 0 increases to the patient's right, index 1 to the front,
index 2 to the head, whatever the order in the file. Voxel values follow one rule, so that a scan has the same
`content_key` in all formats: slope and intercept are rounded to float32 (the precision of NIfTI) and applied
in float64; whole numbers become int16, or int32 if int16 is too narrow; all other values become float32.
"""

from __future__ import annotations

import dataclasses
import functools

import nibabel as nib
import numpy as np
from etils import epath
from nibabel.affines import apply_affine, voxel_sizes

from vilam3_jax.data import content_keys, dicom, file_kinds, nifti, volume_io
from vilam3_jax.data.intensity import DISPLAY_PERCENTILES, as_stored_values, percentile_limits, usable_values
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.metaimage import read_metaimage
from vilam3_jax.data.nrrd import read_nrrd
from vilam3_jax.data.stored_volume import UNKNOWN, StoredVolume
from vilam3_jax.errors import UserError, warn_of
from vilam3_jax.runtime.paths import PathLike, as_path, exists

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
GRID_TOLERANCE = 0.1  # maximum distance of equal grids, in voxels
_WHOLE = 1e-3  # maximum distance of a stored label from a whole number
_SPACING_MM = (1e-4, 1e4)  # microscopes to whole-body scouts; other values mean a damaged header


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """One scan in RAS canonical orientation, with the metadata of its file.

    Attributes:
      voxels: [X, Y, Z], int16, int32 or float32 (see the module's rule), finite. Invalid voxels (padding,
        NaN) hold the smallest valid value.
      affine: [4, 4] float64, voxel index -> RAS millimetres.
      source: name of the file or folder, without its path.
      valid: [X, Y, Z] bool, False for padding or NaN in the file; None: all valid.
      modality: the DICOM code (CT, MR, PT, NM, ...) stated by the file or the caller, or "unknown". Never
        derived from voxel values.
      body_part: as in the file, upper case, or "unknown".
      units: units of the voxels, such as "HU" or "SUVbw", or "unknown".
      window: the file's display window (centre, width) in `units`, or None.
      stored_orientation: axis codes of the index order in the file, such as "LPS".
      notes: sentences on what was assumed, repaired or skipped, without patient data.
    """

    voxels: np.ndarray
    affine: np.ndarray
    source: str
    valid: np.ndarray | None = None
    modality: str = UNKNOWN
    body_part: str = UNKNOWN
    units: str = UNKNOWN
    window: tuple[float, float] | None = None
    stored_orientation: str = "RAS"
    notes: tuple[str, ...] = ()

    @property
    def spacing(self) -> np.ndarray:
        """Millimetres between voxels along the three axes, [3] float64."""
        return voxel_sizes(self.affine)

    @property
    def limits(self) -> tuple[float, float]:
        """The 0.5 and 99.5 percentiles of the valid voxels, the default display range."""
        return self.percentile_limits(DISPLAY_PERCENTILES)

    def percentile_limits(self, percentiles: tuple[float, float]) -> tuple[float, float]:
        """Two percentiles of the valid voxels, computed once per volume."""
        if percentiles not in self._known_limits:
            self._known_limits[percentiles] = _display_limits(self.voxels, self.valid, percentiles)
        return self._known_limits[percentiles]

    @functools.cached_property
    def _known_limits(self) -> dict[tuple[float, float], tuple[float, float]]:
        return {}

    @functools.cached_property
    def content_key(self) -> str:
        """A key that is equal in all file formats; see `content_keys.volume_key`."""
        return content_keys.volume_key(self.voxels, self.affine)


@dataclasses.dataclass(frozen=True)
class VolumeSource:
    """The location of a volume and the metadata stated by the caller; see `read_volume`."""

    path: str
    series: str | None = None
    modality: str | None = None
    channel: int | None = None

    def read(self, limits: Limits = DEFAULT_LIMITS) -> Volume:
        """Calls `read_volume` for this source."""
        return read_volume(**dataclasses.asdict(self), limits=limits)


def load_volume(
    path: PathLike, *, modality: str | None = None, series: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> Volume:
    """Reads a 3-D scan. The content decides the format, not the file name; see `file_kinds`.

    Args:
      path: NIfTI (also either half of a .hdr/.img pair), NRRD, MetaImage, a DICOM file, or a folder with
        DICOM series.
      modality: DICOM code, for files that state none. Rejected if it contradicts the file.
      series: a series of the folder: its UID, or its identifier in the listing of `vilam3 data scan`.
      limits: bounds, checked against headers before decoding.

    Returns:
      The volume. NaN and -inf become the smallest finite value, +inf the largest. Its `notes` are also issued
      as `InputWarning`.

    Raises:
      UnavailableError: the disk or the network fails.
      UserError: unknown format, over a limit, damaged, not 3-D, no orientation (left and right would be a
        guess) or a contradictory one, several series in one folder, missing or duplicate slices.
    """
    volume = read_volume(path, modality=modality, series=series, limits=limits)
    warn_of(volume.notes, as_path(path))
    return volume


def read_volume(
    path: PathLike,
    *,
    modality: str | None = None,
    series: str | None = None,
    channel: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Volume:
    """`load_volume` without warnings, for callers that show `Volume.notes`.

    `channel` selects one volume (from 0) of a NIfTI file with several.
    """
    path = as_path(path)
    volume = canonical_volume(_read(path, series, limits, channel=channel), path)
    if modality is None:
        return volume
    modality = volume_io.declared_modality(modality, volume.modality, path)
    units = volume_io.stated_units("", modality) if volume.units == UNKNOWN else volume.units
    return dataclasses.replace(volume, modality=modality, units=units)


def read_listed_series(series: dicom.Series, folder: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> Volume:
    """Reads a series found by `dicom.survey(folder)` without listing the folder again."""
    folder = as_path(folder)
    with volume_io.wrap_parser_errors(folder):
        stored = dicom.read_listed(series, folder, limits=limits)
    return canonical_volume(stored, folder)


def describe_volume(path: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> StoredVolume:
    """Reads the header of a NIfTI, NRRD or MetaImage file and makes all checks that need no voxels.

    `values` are zeros of the stored type that take no memory; raises as `load_volume` for this header.
    """
    path = as_path(path)
    stored = _read(path, None, limits, voxels=False)
    _check_affine(stored.affine, path)
    return stored


def _read(
    path: epath.Path, series: str | None, limits: Limits, *, voxels: bool = True, channel: int | None = None
) -> StoredVolume:
    if not exists(path):
        raise UserError(f"{path}: no such file or folder; check the path")
    if path.is_dir():
        with volume_io.wrap_parser_errors(path):
            return dicom.read_series(path, series=series, limits=limits)
    kind = file_kinds.identify(path)
    if kind.reader is None or kind.reader == "image":
        raise file_kinds.refusal(path, kind)
    volume_io.check_file_size(path, limits)
    if channel is not None and kind.reader not in ("nifti", "nifti pair"):
        raise UserError(f"{path}: channels are supported in NIfTI only; save each to a separate file")
    with volume_io.wrap_parser_errors(path):
        if kind.reader == "dicom":
            return dicom.read_series(path, series=series, limits=limits)
        if kind.reader in ("nrrd", "metaimage"):
            read = read_nrrd if kind.reader == "nrrd" else read_metaimage
            return read(path, limits, voxels=voxels)
        return nifti.read_nifti(path, limits, voxels=voxels, channel=channel)


def load_label_map(path: PathLike, grid: Volume) -> np.ndarray:
    """Reads an integer label volume, in any format of `load_volume`, on the grid of the scan `grid`.

    Whole numbers stored as floats are accepted; voxels without a value (NaN) are 0. Raises `UserError` if
    shape or position differ (by more than a tenth of a voxel), or for negative or fractional ids.

    Returns:
      [X, Y, Z] uint8, or uint16 if ids exceed 255.
    """
    labels = read_volume(path)
    shape, expected = labels.voxels.shape, grid.voxels.shape
    if shape != expected:
        raise UserError(f"{path}: label map of {shape}, but {grid.source} has {expected}; resample it")
    distance = grid_distance(labels.affine, grid)
    if distance > GRID_TOLERANCE * grid.spacing.min():
        raise UserError(f"{path}: label map is {distance:.2f} mm away from {grid.source}; resample it")
    if labels.valid is not None:
        warn_of(("voxels without a value are background",), as_path(path))
    return whole_labels(labels, path)


def grid_distance(affine: np.ndarray, grid: Volume) -> float:
    """The largest distance (mm) of the corners of two grids of one shape; `affine` as in `Volume`."""
    corners = np.array([*np.ndindex(2, 2, 2)]) * grid.voxels.shape
    return float(np.abs(apply_affine(affine - grid.affine, corners)).max())


def whole_labels(labels: Volume, path: PathLike) -> np.ndarray:
    """The label ids of a volume: uint8, or uint16 if they exceed 255; NaN is background.

    Raises `UserError` for negative, fractional or larger ids.
    """
    voxels = labels.voxels if labels.valid is None else np.where(labels.valid, labels.voxels, 0)
    # A stored slope of 0.1 does not reproduce whole numbers exactly.
    whole = voxels if voxels.dtype.kind in "iu" else np.rint(voxels)
    off = 0 if whole is voxels else np.abs(whole - voxels).max()
    if off > _WHOLE or whole.min() < 0 or whole.max() > 65535:
        raise UserError(f"{path}: label ids must be whole numbers from 0 to 65535; store a label map")
    return whole.astype(np.uint8 if whole.max() < 256 else np.uint16)


def slice_2d(voxels: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Extracts one slice in radiological display orientation.

    Args:
      voxels: [X, Y, Z] in RAS canonical orientation (scan or label map).
      axis: 0 sagittal, 1 coronal, 2 axial.
      index: slice number along `axis`.

    Returns:
      [H, W] view. Axial: front at the top, patient's right on the left. Coronal: head at the top, patient's
      right on the left. Sagittal: head at the top, front on the left.

    Raises:
      UserError: `axis` or `index` outside the volume.
    """
    if axis not in (0, 1, 2) or not 0 <= index < voxels.shape[axis]:
        raise UserError(f"slice {index} along axis {axis} is outside of {voxels.shape}; choose another index")
    # In all three planes, both remaining axes run from high to low index; rows are the later axis.
    return np.take(voxels, index, axis=axis).T[::-1, ::-1]


def _display_limits(
    voxels: np.ndarray, valid: np.ndarray | None, percentiles: tuple[float, float]
) -> tuple[float, float]:
    """`percentile_limits`; if nearly all voxels are equal, those of the others, including that value."""
    low, high = percentile_limits(voxels, valid, percentiles)
    if low < high:
        return low, high
    others = voxels != low if valid is None else (voxels != low) & valid
    if not others.any():
        return low, high
    lowest, highest = percentile_limits(voxels, others, percentiles)
    return min(low, lowest), max(high, highest)


def _check_affine(affine: np.ndarray, path: PathLike) -> None:
    spacing = voxel_sizes(affine)
    usable = np.isfinite(affine).all() and ((spacing > _SPACING_MM[0]) & (spacing < _SPACING_MM[1])).all()
    if not usable or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise UserError(f"{path}: its affine is singular or out of range; correct its spacing and direction")


def canonical_volume(stored: StoredVolume, path: PathLike) -> Volume:
    """Reorients a reader's result; raises `UserError` for a singular affine or no finite voxel."""
    affine = stored.affine
    _check_affine(affine, path)
    orientation = nib.orientations.io_orientation(affine)

    def turned(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(nib.orientations.apply_orientation(array, orientation))

    values = turned(stored.values)
    valid = None if stored.valid is None else turned(stored.valid)
    voxels = as_stored_values(values, valid)
    if voxels is None:
        raise UserError(f"{path}: no voxel is a finite number; export it again")
    notes = stored.notes
    if values.dtype.kind in "iu" and voxels.dtype.kind == "f" and (values != voxels.astype(np.float64)).any():
        notes += ("whole numbers beyond 24 bits are rounded to float32",)
    canonical = affine @ nib.orientations.inv_ornt_aff(orientation, stored.values.shape)
    return Volume(
        voxels,
        canonical.astype(np.float64),
        as_path(path).name,
        valid=usable_values(values, valid),
        modality=stored.modality,
        body_part=stored.body_part,
        units=stored.units,
        window=stored.window,
        stored_orientation="".join(nib.orientations.aff2axcodes(affine)),
        notes=notes,
    )
