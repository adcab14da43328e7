"""Geometry of DICOM slices: planes, their regular stacking, and the affine of the stack.

Positions and directions are in the patient coordinate system of DICOM (LPS, millimetres; PS3.3
C.7.6.2.1.1). highdicom's `get_volume_positions` only answers yes or no: it refuses a tilted gantry and
positions that were rounded, and does not say which slice is missing. The tests compare both where it says
yes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

_ORTHONORMAL_TOLERANCE = 0.01  # cosines of two decimals; beyond, nobody knows which axis is wrong
_REPAIR_ABOVE = 1e-6  # smaller deviations are the sixth decimal of a decimal string
_REPAIR_NOTED_ABOVE = 1e-3
_MAIN_AXIS = 0.9  # a normal within 26 degrees of an axis is called by that axis

_EVEN_MM = 0.01
_EVEN_SHARE = 0.02  # of the slice distance: how far a slice may lie from its place in an even stack
_EVEN_SHARE_NOTED = 0.005
_ROUNDED_SHARE = 0.1  # the same where the positions were rounded to few decimals
_HALF_A_STEP = 0.55  # of the last decimal: what rounding moves a number, and a little for the fit
_SIDEWAYS_MM = 0.02
_SIDEWAYS_PIXELS = 0.1
_SIDEWAYS_ROUNDED_PIXELS = 0.25
_TILT_NOTED_DEGREES = 0.1
_MAX_TILT_DEGREES = 45.0
_HEADER_TILT_DEGREES = 1.0

_SAME_PLACE_MM = (1e-4, 0.01)
_SAME_PLACE_SHARE = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """Directions of a slice.

    Attributes:
      across: [3] unit vector along a row, towards growing columns.
      down: [3] unit vector along a column, towards growing rows.
      normal: [3] `across` x `down`.
      note: what was repaired, or None.
    """

    across: np.ndarray
    down: np.ndarray
    normal: np.ndarray
    note: str | None = None

    @property
    def word(self) -> str:
        """axial, coronal, sagittal or oblique."""
        axis = int(np.abs(self.normal).argmax())
        return ("sagittal", "coronal", "axial")[axis] if abs(self.normal[axis]) > _MAIN_AXIS else "oblique"


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """How slices lie on each other.

    Attributes:
      order: indices of the given positions along the normal.
      affine: [4, 4] float64, index (column, row, slice) to RAS millimetres; None if there is a problem.
      spacing: millimetres between columns, rows and slices (along the normal).
      notes: what was assumed or is unusual.
      problem: why the slices form no volume, or None.
    """

    order: tuple[int, ...]
    affine: np.ndarray | None
    spacing: tuple[float, float, float]
    notes: tuple[str, ...] = ()
    problem: str | None = None


def plane_of(cosines: Sequence[float]) -> Plane | str:
    """The plane of ImageOrientationPatient; a reason if the six numbers are no two perpendicular directions.

    Cosines that are nearly orthonormal are replaced by the nearest orthonormal pair.
    """
    rows = np.asarray(cosines, np.float64).reshape(2, 3)
    if not np.isfinite(rows).all() or not rows.any():
        return "an orientation of zeros"
    error = float(np.abs(rows @ rows.T - np.eye(2)).max())
    if error > _ORTHONORMAL_TOLERANCE:
        return "directions of rows and columns that are not perpendicular unit vectors"
    if error > _REPAIR_ABOVE:
        left, _, right = np.linalg.svd(rows, full_matrices=False)
        rows = left @ right
    note = None
    if error > _REPAIR_NOTED_ABOVE:
        note = f"image orientation is off by {error:.3f} from perpendicular unit vectors and was corrected"
    return Plane(rows[0], rows[1], np.cross(rows[0], rows[1]), note)


def places_along(normal: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Numbers the distinct slice positions along a normal.

    Args:
      normal: [3] unit vector.
      positions: [n, 3] mm.

    Returns:
      [n] int; slices at one position, up to the rounding of headers, have one number.
    """
    distances = positions @ normal
    order = np.argsort(distances, kind="stable")
    gaps = np.diff(distances[order])
    same = float(np.clip(_SAME_PLACE_SHARE * gaps.max(initial=0.0), *_SAME_PLACE_MM))
    places = np.empty(len(positions), np.int64)
    places[order] = np.concatenate([[0], np.cumsum(gaps > same)])
    return places


def stack_slices(
    positions: np.ndarray,
    plane: Plane,
    pixel_spacing: tuple[float, float],
    *,
    distance: float | None,
    thickness: float | None,
    tilt: float | None = None,
) -> Stack:
    """Stacks slices of one plane at distinct positions.

    Args:
      positions: [n, 3] mm, ImagePositionPatient in any order.
      plane: of all slices.
      pixel_spacing: PixelSpacing, mm between rows and between columns.
      distance: SpacingBetweenSlices of the header.
      thickness: SliceThickness of the header.
      tilt: GantryDetectorTilt of the header, degrees.

    Returns:
      The stack. Positions win over what the header says about distances and tilt.
    """
    order = np.argsort(positions @ plane.normal, kind="stable")
    positions = positions[order]
    notes = [] if plane.note is None else [plane.note]
    if len(positions) == 1:
        step = plane.normal * _thickness_of_one(distance, thickness, notes)
        problem = None
    else:
        step = (positions[-1] - positions[0]) / (len(positions) - 1)
        problem = _uneven(positions @ plane.normal, _decimal_step(positions), notes)
        problem = problem or _sideways(positions, plane, pixel_spacing) or _slanted(step, plane)
    if problem is None and len(positions) > 1:
        _compare_header(float(step @ plane.normal), distance, thickness, notes)
    if problem is None:
        _report_tilt(step, plane, tilt, len(positions), pixel_spacing, notes)
    affine = np.eye(4)
    affine[:3, 0] = plane.across * pixel_spacing[1]
    affine[:3, 1] = plane.down * pixel_spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return Stack(
        tuple(int(index) for index in order),
        None if problem else LPS_TO_RAS @ affine,
        (pixel_spacing[1], pixel_spacing[0], float(step @ plane.normal)),
        tuple(notes),
        problem,
    )


def _thickness_of_one(distance: float | None, thickness: float | None, notes: list[str]) -> float:
    for stated in (distance, thickness):
        if stated:
            return abs(stated)
    notes.append("one slice without a stated thickness; 1 mm is assumed")
    return 1.0


def _uneven(distances: np.ndarray, rounding: float, notes: list[str]) -> str | None:
    """Why slices at sorted `distances` along the normal are not evenly spaced."""
    gaps = np.diff(distances)
    middle = float(np.median(gaps))
    widest = int(gaps.argmax())
    slices = len(distances)
    if gaps[widest] > 1.5 * middle:
        missing = gaps[widest] / middle - 1
        what = (
            "a slice is missing"
            if abs(missing - 1) < 0.1
            else f"{missing:.0f} slices are missing"
            if abs(missing - round(missing)) < 0.1
            else "slices are missing or belong to another stack"
        )
        return (
            f"{gaps[widest]:.2f} mm between slices {widest + 1} and {widest + 2} of {slices}, "
            f"elsewhere {middle:.2f} mm; {what}"
        )
    off = _off_line(distances)
    spacing = float(gaps.mean())
    rounded = min(_HALF_A_STEP * rounding, _ROUNDED_SHARE * spacing)
    if off > max(_EVEN_MM, _EVEN_SHARE * spacing, rounded):
        return f"uneven distances of {gaps.min():.2f} to {gaps.max():.2f} mm between slices"
    if off > max(_EVEN_MM, _EVEN_SHARE_NOTED * spacing):
        notes.append(f"slice positions are even within {off:.2g} mm; {spacing:.4g} mm is used")
    return None


def _sideways(positions: np.ndarray, plane: Plane, pixel_spacing: tuple[float, float]) -> str | None:
    """Why slices do not slide evenly within their plane, as a tilted gantry makes them do."""
    offsets = (positions - positions[0]) @ np.stack([plane.across, plane.down], axis=1)
    pixel = min(pixel_spacing)
    rounded = min(_HALF_A_STEP * _decimal_step(positions), _SIDEWAYS_ROUNDED_PIXELS * pixel)
    if max(_off_line(offsets[:, 0]), _off_line(offsets[:, 1])) <= max(
        _SIDEWAYS_MM, _SIDEWAYS_PIXELS * pixel, rounded
    ):
        return None
    jumps = np.diff(offsets, axis=0)
    jumps = np.linalg.norm(jumps - np.median(jumps, axis=0), axis=1)
    worst = int(jumps.argmax())
    return (
        f"slices are shifted sideways against each other, by {jumps[worst]:.2f} mm between slices "
        f"{worst + 1} and {worst + 2} of {len(positions)}"
    )


def _slanted(step: np.ndarray, plane: Plane) -> str | None:
    along, sideways = _parts(step, plane)
    if sideways > along * math.tan(math.radians(_MAX_TILT_DEGREES)):
        return f"each slice is shifted {sideways:.2f} mm sideways but advances {along:.2f} mm only"
    return None


def _parts(step: np.ndarray, plane: Plane) -> tuple[float, float]:
    """How far a step goes along the normal, and within the plane."""
    along = float(step @ plane.normal)
    return along, float(np.linalg.norm(step - along * plane.normal))


def _off_line(numbers: np.ndarray) -> float:
    """How far evenly numbered values lie from a straight line: half the range about it."""
    steps = np.arange(len(numbers))
    residuals = numbers - np.polyval(np.polyfit(steps, numbers, 1), steps)
    return float(np.ptp(residuals)) / 2


def _report_tilt(
    step: np.ndarray,
    plane: Plane,
    header: float | None,
    slices: int,
    pixel_spacing: tuple[float, float],
    notes: list[str],
) -> None:
    along, sideways = _parts(step, plane)
    angle = math.degrees(math.atan2(sideways, along))
    drifts = sideways * (slices - 1) > _SIDEWAYS_PIXELS * min(pixel_spacing)
    tilted = drifts and angle >= _TILT_NOTED_DEGREES
    if tilted:
        notes.append(f"gantry tilt of {angle:.1f} degrees, kept in the affine as shear")
    if slices > 1 and header and abs(abs(header) - (angle if tilted else 0.0)) > _HEADER_TILT_DEGREES:
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
        notes.append(f"slices of {thickness:.4g} mm thickness lie {spacing:.4g} mm apart")


def _decimal_step(numbers: np.ndarray) -> float:
    """The step to which numbers were rounded when they were written: 0.1 for one decimal; 0 for many."""
    for digits in range(4):
        if np.abs(numbers - np.round(numbers, digits)).max() < 1e-6:
            return 10.0**-digits
    return 0.0
