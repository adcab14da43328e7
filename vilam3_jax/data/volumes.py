"""CT, MRI and PET volumes: read any common format into one orientation, and cut the slices people know.

A volume is held in RAS canonical orientation: index 0 grows to the patient's right, index 1 to the front,
index 2 to the head, whatever order the file stores. Voxel values follow one rule, so that a scan has one
`content_key` in all formats: slope and intercept are rounded to float32 (NIfTI can store no more) and applied
in float64; if all results are whole numbers they are int16, or int32 where int16 is too narrow; otherwise
float32.
"""

from __future__ import annotations

import dataclasses
import functools

import nibabel as nib
import numpy as np
from etils import epath

from vilam3_jax.data import content_keys, dicom, file_kinds, nifti
from vilam3_jax.data.intensity import (
    DISPLAY_PERCENTILES,
    as_stored_values,
    percentile_limits,
    usable_values,
)
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.metaimage import read_metaimage
from vilam3_jax.data.nrrd import read_nrrd
from vilam3_jax.data.stored_volume import UNKNOWN, StoredVolume
from vilam3_jax.data.volume_io import check_file_size, declared_modality, naming_damage, stated_units
from vilam3_jax.errors import UserError, warn_of
from vilam3_jax.runtime.paths import PathLike, as_path, exists

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
GRID_TOLERANCE = 0.1  # voxels between grids that count as one
_WHOLE = 1e-3  # how far a stored label may be from a whole number
_SPACING_MM = (1e-4, 1e4)  # microscopes to whole-body scouts; anything else is a damaged header


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """One scan in RAS canonical orientation, with what its file states.

    Attributes:
      voxels: [X, Y, Z], int16, int32 or float32 (see the module's rule), finite. Voxels that measure nothing
        (padding, NaN) hold the smallest valid value.
      affine: [4, 4] float64, voxel index -> RAS millimetres.
      source: name of the file or folder, without its path.
      valid: [X, Y, Z] bool, False where the file stores padding or NaN; None: every voxel is a measurement.
      modality: DICOM's code (CT, MR, PT, NM, ...) as the file or the caller states it, or "unknown". Never
        derived from voxel values.
      body_part: as the file states it, upper case, or "unknown".
      units: of the voxels, such as "HU" or "SUVbw", or "unknown".
      window: the file's own display window (centre, width) in `units`, or None.
      stored_orientation: axis codes of the file's own index order, such as "LPS".
      notes: what the reader assumed, repaired or skipped; for people, without patient data.
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
        return np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))

    @property
    def limits(self) -> tuple[float, float]:
        """The 0.5 and 99.5 percentiles of the valid voxels, the display range where no window is known."""
        return self.percentile_limits(DISPLAY_PERCENTILES)

    def percentile_limits(self, percentiles: tuple[float, float]) -> tuple[float, float]:
        """Two percentiles of the valid voxels; computed once for all slices of the volume."""
        if percentiles not in self._known_limits:
            self._known_limits[percentiles] = _display_limits(self.voxels, self.valid, percentiles)
        return self._known_limits[percentiles]

    @functools.cached_property
    def _known_limits(self) -> dict[tuple[float, float], tuple[float, float]]:
        return {}

    @functools.cached_property
    def content_key(self) -> str:
        """One key a scan, in any file format; see `content_keys.volume_key`."""
        return content_keys.volume_key(self.voxels, self.affine)


@dataclasses.dataclass(frozen=True)
class VolumeSource:
    """Where a volume lies, and what its caller states of it; see `read_volume`."""

    path: str
    series: str | None = None
    modality: str | None = None
    channel: int | None = None

    def read(self, limits: Limits = DEFAULT_LIMITS) -> Volume:
        """`read_volume` of this source."""
        return read_volume(
            self.path, modality=self.modality, series=self.series, channel=self.channel, limits=limits
        )


def load_volume(
    path: PathLike,
    *,
    modality: str | None = None,
    series: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Volume:
    """Reads a 3-D scan. What a file is decides its content, not its name; see `file_kinds`.

    Args:
      path: NIfTI (also either half of a .hdr/.img pair), NRRD, MetaImage, a DICOM file, or a folder with
        DICOM series.
      modality: DICOM's code, for files that state none. A file that states another is refused.
      series: which series of a folder: its UID, or its identifier in the listing of `vilam3 data scan`.
      limits: bounds, judged by headers before anything is decoded.

    Returns:
      The volume. NaN and -inf become the smallest finite value, +inf the largest. Its `notes` are also issued
      as `InputWarning`s.

    Raises:
      UnavailableError: the disk or the network fails.
      UserError: names the file or folder and what is wrong: unknown format, over a limit, damaged, not 3-D,
        no orientation (left and right would be a guess) or a contradictory one, several series in one folder,
        missing or doubled slices.
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
    """`load_volume` without warnings, for callers that show `Volume.notes` themselves.

    `channel` chooses one volume (from 0) of a NIfTI file of several.
    """
    path = as_path(path)
    volume = _canonical(_read(path, series, limits, channel=channel), path)
    if modality is not None:
        volume = _declared(volume, modality, path)
    return volume


def read_listed_series(series: dicom.Series, folder: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> Volume:
    """`read_volume` of a series that `dicom.survey(folder)` found; the folder is not listed again."""
    folder = as_path(folder)
    with naming_damage(folder):
        stored = dicom.read_listed(series, folder, limits=limits)
    return _canonical(stored, folder)


def describe_volume(path: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> StoredVolume:
    """Reads the header of a NIfTI, NRRD or MetaImage file, and makes every check that needs no voxel.

    Returns:
      What the file states. `values` are zeros of the stored type, without memory.

    Raises:
      What `load_volume` raises for this header.
    """
    path = as_path(path)
    stored = _read(path, None, limits, voxels=False)
    _check_affine(stored.affine, path)
    return stored


def _read(
    path: epath.Path,
    series: str | None,
    limits: Limits,
    *,
    voxels: bool = True,
    channel: int | None = None,
) -> StoredVolume:
    if not exists(path):
        raise UserError(f"{path}: no such file or folder; check the path")
    if path.is_dir():
        with naming_damage(path):
            return dicom.read_series(path, series=series, limits=limits)
    kind = file_kinds.identify(path)
    if kind.reader is None or kind.reader == "picture":
        raise file_kinds.refusal(path, kind)
    check_file_size(path, limits)
    if channel is not None and kind.reader not in ("nifti", "nifti pair"):
        raise UserError(f"{path}: channels are read from NIfTI alone; save each to a file of its own")
    with naming_damage(path):
        if kind.reader == "nrrd":
            return read_nrrd(path, limits, voxels=voxels)
        if kind.reader == "metaimage":
            return read_metaimage(path, limits, voxels=voxels)
        if kind.reader == "dicom":
            return dicom.read_series(path, series=series, limits=limits)
        return nifti.read_nifti(path, limits, voxels=voxels, channel=channel)


def _declared(volume: Volume, declared: str, path: PathLike) -> Volume:
    modality = declared_modality(declared, volume.modality, path)
    units = stated_units("", modality) if volume.units == UNKNOWN else volume.units
    return dataclasses.replace(volume, modality=modality, units=units)


def load_label_map(path: PathLike, grid: Volume) -> np.ndarray:
    """Reads an integer label volume that lies on the grid of `grid`.

    Args:
      path: any format that `load_volume` reads; whole numbers stored as floats are accepted.
      grid: the scan that the labels belong to.

    Returns:
      [X, Y, Z] uint8, or uint16 where ids exceed 255. Voxels without a value (NaN) are 0.

    Raises:
      UserError: other shape or position than `grid` (more than a tenth of a voxel apart), negative or
        fractional ids.
    """
    labels = read_volume(path)
    if labels.voxels.shape != grid.voxels.shape:
        raise UserError(
            f"{path}: label map of {labels.voxels.shape} voxels, {grid.source} has {grid.voxels.shape}; "
            "resample it"
        )
    distance = grid_distance(labels.affine, grid)
    if distance > GRID_TOLERANCE * grid.spacing.min():
        raise UserError(
            f"{path}: label map lies {distance:.2f} mm away from {grid.source}; resample it to that grid"
        )
    if labels.valid is not None:
        warn_of(("voxels without a value are background",), as_path(path))
    return whole_labels(labels, path)


def grid_distance(affine: np.ndarray, grid: Volume) -> float:
    """How far apart two grids of one shape lie, at most: millimetres between their corners, along an axis.

    Args:
      affine: [4, 4], voxel index to RAS millimetres.
      grid: the scan to compare with.
    """
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    return float(np.abs(corners * [*grid.voxels.shape, 1] @ (affine - grid.affine).T).max())


def whole_labels(labels: Volume, path: PathLike) -> np.ndarray:
    """The label ids of a volume that was read: uint8, or uint16 where they exceed 255; NaN is background.

    Raises:
      UserError: negative, fractional or larger ids.
    """
    voxels = labels.voxels if labels.valid is None else np.where(labels.valid, labels.voxels, 0)
    # A stored slope of 0.1 does not give whole numbers to the last digit.
    whole = voxels if voxels.dtype.kind in "iu" else np.rint(voxels)
    off = 0 if whole is voxels else np.abs(whole - voxels).max()
    if off > _WHOLE or whole.min() < 0 or whole.max() > 65535:
        raise UserError(
            f"{path}: label ids must be whole numbers from 0 to 65535; store a label map, not probabilities"
        )
    return whole.astype(np.uint8 if whole.max() < 256 else np.uint16)


def canonical_volume(stored: StoredVolume, path: PathLike) -> Volume:
    """Turns what a format's reader returned into a `Volume`.

    Raises:
      UserError: a singular affine, or no voxel that is a finite number.
    """
    return _canonical(stored, path)


def slice_2d(voxels: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Cuts one slice as radiologists look at it.

    Args:
      voxels: [X, Y, Z] in RAS canonical orientation (scan or label map).
      axis: 0 sagittal, 1 coronal, 2 axial.
      index: slice number along `axis`.

    Returns:
      [H, W] view. Axial: front on top, patient's right on the image's left. Coronal: head on top, patient's
      right on the left. Sagittal: head on top, front on the left.

    Raises:
      UserError: `axis` or `index` outside the volume.
    """
    if axis not in (0, 1, 2) or not 0 <= index < voxels.shape[axis]:
        raise UserError(
            f"slice {index} along axis {axis} is outside a volume of {voxels.shape}; choose another index"
        )
    # All three planes are read from high to low index along both remaining axes; rows are the higher one.
    return np.take(voxels, index, axis=axis).T[::-1, ::-1]


def _display_limits(
    voxels: np.ndarray, valid: np.ndarray | None, percentiles: tuple[float, float]
) -> tuple[float, float]:
    """`percentile_limits`; where nearly all voxels have one value, those of the others and that value."""
    low, high = percentile_limits(voxels, valid, percentiles)
    if low < high:
        return low, high
    others = voxels != low if valid is None else (voxels != low) & valid
    if not others.any():
        return low, high
    lowest, highest = percentile_limits(voxels, others, percentiles)
    return min(low, lowest), max(high, highest)


def _check_affine(affine: np.ndarray, path: PathLike) -> None:
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    usable = np.isfinite(affine).all() and ((spacing > _SPACING_MM[0]) & (spacing < _SPACING_MM[1])).all()
    if not usable or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise UserError(
            f"{path}: its affine is singular or absurd; correct the header's spacing and direction"
        )


def _canonical(stored: StoredVolume, path: PathLike) -> Volume:
    affine = stored.affine
    _check_affine(affine, path)
    orientation = nib.orientations.io_orientation(affine)

    def turned(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(nib.orientations.apply_orientation(array, orientation))

    values = turned(stored.values)
    valid = None if stored.valid is None else turned(stored.valid)
    voxels = as_stored_values(values, valid)
    if voxels is None:
        raise UserError(f"{path}: not one voxel is a finite number; export it again")
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
