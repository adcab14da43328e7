"""Orientation of NIfTI volumes from the sform and the qform.

Formulas: the comments of nifti1.h, "3D IMAGE (VOLUME) ORIENTATION AND LOCATION IN SPACE".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.quaternions import fillpositive, quat2mat

from vilam3_jax.data import volume_io
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike

_UNITS = {1: (volume_io.METRE, 1e3), 2: (volume_io.MILLIMETRE, 1.0), 3: (volume_io.MICROMETRE, 1e-3)}
_SPACES = {1: "scanner", 2: "aligned", 3: "Talairach", 4: "MNI152", 5: "template"}
_TEMPLATES = (3, 4, 5)

# Differences that float32 rounding leaves between equal transforms: small at the corners of the volume, or an
# angle near half a turn that a quaternion cannot represent (its real part is known to 6e-4).
_SAME_VOXELS = 0.1
_SAME_DEGREES = 0.08
_SAME_SCALE = 1e-4
_SAME_LENGTH = 0.01
_OTHER_LENGTH = 2.0  # maximum ratio of voxel sizes that registration can explain
_OTHER_AXES_DEGREES = 45.0
_QUATERNION_REPAIR = 1e-3
_SINGULAR = 1e-3

Header = nib.Nifti1Header | nib.Nifti2Header


class _Unusable(Exception):
    """The reason why a transform of the header is unusable."""


def read_affine(
    header: Header, shape: Sequence[int], path: PathLike
) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """Computes the affine of a NIfTI header, as stored, for voxels of `shape`.

    Raises `UserError` if neither sform nor qform is usable, or they contradict each other.

    Returns:
      [4, 4] float64, index to RAS millimetres; the stated unit of length; notes.
    """
    code = int(header["xyzt_units"]) & 7  # the other bits are the unit of time
    unit, scale = _UNITS.get(code, (UNKNOWN, 1.0))
    notes = volume_io.unit_notes(unit)
    if code and unit == UNKNOWN:
        notes = [f"its code {code} is not a unit of length; millimetres are assumed"]
    one_slice = shape[2] == 1
    sform, sform_fault = _usable(_sform, header, one_slice)
    qform, qform_fault = _usable(_qform, header, one_slice)
    if sform is None and sform_fault and qform is not None:
        notes.append(f"the sform is not usable ({sform_fault}); the qform is used")
    if qform is None and qform_fault and sform is not None:
        notes.append(f"the qform is not usable ({qform_fault}); the sform is used")
    if sform is None and qform is None:
        faults = [f"{name}: {why}" for name, why in (("sform", sform_fault), ("qform", qform_fault)) if why]
        raise UserError(
            f"{path}: the header has no orientation ({'; '.join(faults) or 'qform and sform codes are 0'}), "
            "and left and right would be a guess; convert the scan again, or set its sform where the "
            "orientation is known"
        )
    if sform is not None and qform is not None:
        notes += _compare(sform, qform, header, shape, scale, path)
    elif sform is not None:
        notes += _compare_lengths(sform, header, scale, path)
    affine = qform if sform is None else sform
    assert affine is not None
    affine[:3] *= scale
    if one_slice and (int(header["dim"][0]) == 2 or not float(header["pixdim"][3]) > 0):
        length = voxel_sizes(affine)[2]
        notes.append(f"the header states no thickness of its one slice; {length:.3g} mm is assumed")
    return affine, unit, tuple(notes)


def _usable(
    read: Callable[[Header, bool], np.ndarray | None], header: Header, one_slice: bool
) -> tuple[np.ndarray | None, str]:
    """(transform, ""), or (None, why it is unusable), or (None, "") if the code declares it absent."""
    try:
        return read(header, one_slice), ""
    except _Unusable as error:
        return None, str(error)


def _sform(header: Header, one_slice: bool) -> np.ndarray | None:
    if int(header["sform_code"]) <= 0:
        return None
    affine = np.eye(4)
    affine[:3] = [header["srow_x"], header["srow_y"], header["srow_z"]]
    if not np.isfinite(affine).all():
        raise _Unusable("its rows are not finite numbers")
    if not affine[:3].any():
        raise _Unusable("its rows are all zero")
    if one_slice and not affine[:3, 2].any():
        affine[:3, 2] = volume_io.unit_normal(affine) * _thickness(header)
    lengths = voxel_sizes(affine)
    if not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < _SINGULAR:
        raise _Unusable("its rows are singular")
    return affine


def _qform(header: Header, one_slice: bool) -> np.ndarray | None:
    if int(header["qform_code"]) <= 0:
        return None
    vector = np.array([float(header[f"quatern_{axis}"]) for axis in "bcd"])
    offset = np.array([float(header[f"qoffset_{axis}"]) for axis in "xyz"])
    handedness, *spacing = (float(n) for n in header["pixdim"][:4])
    if one_slice and not spacing[2] > 0:
        spacing[2] = _thickness(header)
    if not np.isfinite([*vector, *offset, *spacing, handedness]).all():
        raise _Unusable("it has numbers that are not finite")
    if min(spacing) <= 0:
        raise _Unusable(f"pixdim has a voxel size of {min(spacing):g}")
    norm = np.sqrt((vector**2).sum())
    if norm > 1 + _QUATERNION_REPAIR:
        raise _Unusable(f"its quaternion has the length {norm:.3f} instead of 1")
    affine = np.eye(4)
    rotation = quat2mat(fillpositive(vector / max(norm, 1.0), header.quaternion_threshold))
    # nifti1.h: qfac 0 counts as 1.
    affine[:3, :3] = np.asarray(rotation, np.float64) @ np.diag(
        [*spacing[:2], -spacing[2] if handedness < 0 else spacing[2]]
    )
    affine[:3, 3] = offset
    return affine


def _thickness(header: Header) -> float:
    thickness = float(header["pixdim"][3])
    return thickness if np.isfinite(thickness) and thickness > 0 else 1.0


def _compare(
    sform: np.ndarray, qform: np.ndarray, header: Header, shape: Sequence[int], scale: float, path: PathLike
) -> list[str]:
    """Compares two usable transforms and returns notes; the sform wins, as in nibabel, FSL and SPM."""
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(shape) - 1)  # the origin first
    distances = np.sqrt((apply_affine(sform - qform, corners) ** 2).sum(axis=1))
    apart = distances.max()
    lengths, others = voxel_sizes(sform), voxel_sizes(qform)
    cosines = ((sform[:3, :3] / lengths) * (qform[:3, :3] / others)).sum(axis=0)
    angle = float(np.rad2deg(np.arccos(np.clip(cosines.min(), -1, 1))))
    scaled = np.abs(lengths / others - 1).max()
    same = _SAME_VOXELS * lengths.min()
    turned_by_rounding = distances[0] <= same and angle <= _SAME_DEGREES and scaled <= _SAME_SCALE
    if turned_by_rounding or (apart <= same and scaled <= _SAME_LENGTH):
        return []
    if angle > _OTHER_AXES_DEGREES or np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
        codes = ["".join(nib.orientations.aff2axcodes(a)) for a in (sform, qform)]
        raise UserError(
            f"{path}: sform ({codes[0]}) and qform ({codes[1]}) contradict each other by {angle:.0f} degrees "
            "or a mirror image; set the code of the wrong one to 0"
        )
    _check_lengths(lengths, others, "qform", scale, path)
    spaces = [_SPACES.get(int(header[f"{name}_code"]), "unknown space") for name in ("sform", "qform")]
    note = (
        f"sform ({spaces[0]}) and qform ({spaces[1]}) differ by up to {apart * scale:.3g} mm and "
        f"{angle:.2g} degrees; the sform is used"
    )
    if int(header["sform_code"]) in _TEMPLATES and scaled > _SAME_LENGTH:
        note += ", so lengths are those of the template and not of the patient"
    return [note]


def _compare_lengths(sform: np.ndarray, header: Header, scale: float, path: PathLike) -> list[str]:
    """Compares an sform without a usable qform with the redundant voxel sizes in pixdim; returns notes."""
    lengths = voxel_sizes(sform)
    stated = np.abs(np.asarray(header["pixdim"][1:4], np.float64))
    stated = np.where(np.isfinite(stated) & (stated > 0), stated, lengths)
    if np.abs(lengths / stated - 1).max() <= _SAME_LENGTH:
        return []
    if not (header["pixdim"][1:4] == 1).all():  # writers leave 1, 1, 1 where they fill in nothing
        _check_lengths(lengths, stated, "pixdim", scale, path)
    return [
        f"voxels of {_format_size(lengths, scale)} by the sform and of {_format_size(stated, scale)} by "
        "pixdim; the sform is used"
    ]


def _check_lengths(
    lengths: np.ndarray, others: np.ndarray, other_name: str, scale: float, path: PathLike
) -> None:
    ratio = lengths / others
    if max(ratio.max(), 1 / ratio.min()) > _OTHER_LENGTH:
        raise UserError(
            f"{path}: voxels of {_format_size(lengths, scale)} by the sform, but of "
            f"{_format_size(others, scale)} by the {other_name}; correct the wrong one in the header"
        )


def _format_size(lengths: np.ndarray, scale: float) -> str:
    return " x ".join(f"{length * scale:.4g}" for length in lengths) + " mm"
