"""Geometry of DICOM slices: planes, even spacing, and the affine of a stack.

Positions and directions are in DICOM's patient coordinate system (LPS, millimetres; PS3.3 C.7.6.2.1.1).
highdicom's `get_volume_positions` rejects tilted gantries and rounded positions, and does not report which
slice is missing. The tests compare both for the stacks that it accepts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

_ORTHONORMAL_TOLERANCE = 0.01  # cosines with two decimals; above, the wrong axis cannot be determined
_REPAIR_ABOVE = 1e-6  # smaller errors come from the sixth decimal of a decimal string
_REPAIR_NOTED_ABOVE = 1e-3
_MAIN_AXIS = 0.9  # a normal within 26 degrees of an axis is named after it

_EVEN_MM = 0.01
_EVEN_SHARE = 0.02  # of the slice distance: largest deviation of a slice from even spacing
_EVEN_SHARE_NOTED = 0.005
_ROUNDED_SHARE = 0.1  # the same for positions rounded to few decimals
_ROUNDING_STEPS = 0.55  # of the last decimal: rounding error, with a margin for the fit
_SHIFT_MM = 0.02
_SHIFT_PIXELS = 0.1
_SHIFT_ROUNDED_PIXELS = 0.25
_TILT_NOTED_DEGREES = 0.1
_MAX_TILT_DEGREES = 45.0
_HEADER_TILT_DEGREES = 1.0

_SAME_POSITION_MM = (1e-4, 0.01)
_SAME_POSITION_SHARE = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """Orientation of a slice."""

    across: np.ndarray  # [3] unit vector along a row, in the direction of increasing column index
    down: np.ndarray  # [3] unit vector along a column, in the direction of increasing row index
    normal: np.ndarray  # [3] `across` x `down`
    note: str | None = None  # the correction that was applied

    @property
    def name(self) -> str:
        """axial, coronal, sagittal or oblique."""
        axis = int(np.abs(self.normal).argmax())
        return ("sagittal", "coronal", "axial")[axis] if abs(self.normal[axis]) > _MAIN_AXIS else "oblique"


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """Slices in order along their normal."""

    order: tuple[int, ...]  # indices of the given positions
    affine: np.ndarray | None  # [4, 4] float64, (column, row, slice) to RAS millimetres; None: see `problem`
    spacing: tuple[float, float, float]  # millimetres between columns, rows and slices (along the normal)
    notes: tuple[str, ...]  # assumptions and anomalies
    problem: str | None  # why the slices do not form a volume, or None


def plane_of(cosines: Sequence[float]) -> Plane | str:
    """The plane of ImageOrientationPatient, or the reason why the cosines are invalid.

    Nearly orthonormal cosines are replaced by the nearest orthonormal pair.
    """
    rows = np.asarray(cosines, np.float64).reshape(2, 3)
    if not np.isfinite(rows).all() or not rows.any():
        return "an orientation of zeros"
    error = float(np.abs(rows @ rows.T - np.eye(2)).max())
    if error > _ORTHONORMAL_TOLERANCE:
        return "row and column directions that are not perpendicular unit vectors"
    if error > _REPAIR_ABOVE:
        left, _, right = np.linalg.svd(rows, full_matrices=False)
        rows = left @ right
    note = None
    if error > _REPAIR_NOTED_ABOVE:
        note = f"image orientation is {error:.3f} off perpendicular unit vectors and was corrected"
    return Plane(rows[0], rows[1], np.cross(rows[0], rows[1]), note)


def position_indices(normal: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Numbers the distinct positions ([n, 3] mm) along `normal` ([3] unit vector): [n] int.

    Slices at the same position, up to rounding of the header, have equal numbers.
    """
    distances = positions @ normal
    order = np.argsort(distances, kind="stable")
    gaps = np.diff(distances[order])
    same = float(np.clip(_SAME_POSITION_SHARE * gaps.max(initial=0.0), *_SAME_POSITION_MM))
    indices = np.empty(len(positions), np.int64)
    indices[order] = np.concatenate([[0], np.cumsum(gaps > same)])
    return indices


def stack_slices(
    positions: np.ndarray,
    plane: Plane,
    pixel_spacing: tuple[float, float],
    *,
    distance: float | None,
    thickness: float | None,
    tilt: float | None = None,
) -> Stack:
    """Stacks parallel slices at distinct positions.

    Args:
      positions: [n, 3] mm, ImagePositionPatient in any order.
      plane: orientation of all slices.
      pixel_spacing: PixelSpacing, mm between rows and between columns.
      distance: SpacingBetweenSlices of the header.
      thickness: SliceThickness of the header.
      tilt: GantryDetectorTilt of the header, degrees.

    Returns:
      The stack. Positions take precedence over distance, thickness and tilt of the header.
    """
    order = np.argsort(positions @ plane.normal, kind="stable")
    positions = positions[order]
    notes = [] if plane.note is None else [plane.note]
    problem = None
    if len(positions) == 1:
        if not (stated := distance or thickness):
            notes.append("one slice without a stated thickness; 1 mm is assumed")
        step = plane.normal * abs(stated or 1.0)
    else:
        step = (positions[-1] - positions[0]) / (len(positions) - 1)
        problem = _spacing_problem(positions @ plane.normal, _decimal_step(positions), notes)
        problem = problem or _shift_problem(positions, plane, pixel_spacing)
    along = float(step @ plane.normal)
    sideways = float(np.linalg.norm(step - along * plane.normal))
    if problem is None and sideways > along * math.tan(math.radians(_MAX_TILT_DEGREES)):
        problem = f"each slice is shifted {sideways:.2f} mm sideways but advances only {along:.2f} mm"
    if problem is None and len(positions) > 1:
        _compare_header(along, distance, thickness, notes)
        drifts = sideways * (len(positions) - 1) > _SHIFT_PIXELS * min(pixel_spacing)
        _note_tilt(math.degrees(math.atan2(sideways, along)) if drifts else 0.0, tilt, notes)
    affine = np.eye(4)
    affine[:3, 0] = plane.across * pixel_spacing[1]
    affine[:3, 1] = plane.down * pixel_spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return Stack(
        tuple(int(index) for index in order),
        None if problem else LPS_TO_RAS @ affine,
        (pixel_spacing[1], pixel_spacing[0], along),
        tuple(notes),
        problem,
    )


def _spacing_problem(distances: np.ndarray, rounding: float, notes: list[str]) -> str | None:
    """Why slices at sorted `distances` along the normal are not evenly spaced."""
    gaps = np.diff(distances)
    median = float(np.median(gaps))
    widest = int(gaps.argmax())
    if gaps[widest] > 1.5 * median:
        missing = gaps[widest] / median - 1
        if abs(missing - 1) < 0.1:
            cause = "a slice is missing"
        elif abs(missing - round(missing)) < 0.1:
            cause = f"{missing:.0f} slices are missing"
        else:
            cause = "slices are missing or belong to another stack"
        return (
            f"{gaps[widest]:.2f} mm between slices {widest + 1} and {widest + 2} of {len(distances)}, "
            f"elsewhere {median:.2f} mm; {cause}"
        )
    deviation = _line_deviation(distances)
    spacing = float(gaps.mean())
    rounded = min(_ROUNDING_STEPS * rounding, _ROUNDED_SHARE * spacing)
    if deviation > max(_EVEN_MM, _EVEN_SHARE * spacing, rounded):
        return f"uneven distances of {gaps.min():.2f} to {gaps.max():.2f} mm between slices"
    if deviation > max(_EVEN_MM, _EVEN_SHARE_NOTED * spacing):
        notes.append(f"slice positions are even within {deviation:.2g} mm; {spacing:.4g} mm is used")
    return None


def _shift_problem(positions: np.ndarray, plane: Plane, pixel_spacing: tuple[float, float]) -> str | None:
    """Why in-plane shifts between slices are uneven; a tilted gantry shifts all slices equally."""
    offsets = (positions - positions[0]) @ np.stack([plane.across, plane.down], axis=1)
    pixel = min(pixel_spacing)
    rounded = min(_ROUNDING_STEPS * _decimal_step(positions), _SHIFT_ROUNDED_PIXELS * pixel)
    deviation = max(_line_deviation(offsets[:, 0]), _line_deviation(offsets[:, 1]))
    if deviation <= max(_SHIFT_MM, _SHIFT_PIXELS * pixel, rounded):
        return None
    jumps = np.diff(offsets, axis=0)
    jumps = np.linalg.norm(jumps - np.median(jumps, axis=0), axis=1)
    worst = int(jumps.argmax())
    return (
        f"slices are shifted sideways against each other, by {jumps[worst]:.2f} mm between slices "
        f"{worst + 1} and {worst + 2} of {len(positions)}"
    )


def _line_deviation(values: np.ndarray) -> float:
    """Half the range of the residuals of a linear fit to equally spaced values."""
    steps = np.arange(len(values))
    residuals = values - np.polyval(np.polyfit(steps, values, 1), steps)
    return float(np.ptp(residuals)) / 2


def _note_tilt(angle: float, header: float | None, notes: list[str]) -> None:
    """Notes a tilt of `angle` degrees, and a contradictory GantryDetectorTilt of the header."""
    tilted = angle >= _TILT_NOTED_DEGREES
    if tilted:
        notes.append(f"gantry tilt of {angle:.1f} degrees, kept in the affine as shear")
    if header and abs(abs(header) - (angle if tilted else 0.0)) > _HEADER_TILT_DEGREES:
        found = f"{angle:.1f} degrees" if tilted else "none"
        notes.append(
            f"the header states a gantry tilt of {abs(header):.1f} degrees, the slice positions show "
            f"{found}; the positions are used"
        )


def _compare_header(
    spacing: float, distance: float | None, thickness: float | None, notes: list[str]
) -> None:
    if distance and abs(abs(distance) - spacing) > 0.1 * spacing:
        notes.append(
            f"the header states {abs(distance):.4g} mm between slices, the positions {spacing:.4g} mm; "
            "the positions are used"
        )
    elif thickness and not spacing / 3 < thickness < spacing * 3:
        notes.append(f"slices of {thickness:.4g} mm thickness are {spacing:.4g} mm apart")


def _decimal_step(numbers: np.ndarray) -> float:
    """The rounding step of the numbers: 0.1 for one decimal, 0 for more than three decimals."""
    for digits in range(4):
        if np.abs(numbers - np.round(numbers, digits)).max() < 1e-6:
            return 10.0**-digits
    return 0.0
