"""Grouping of DICOM headers into series, and of the slices of a series into stacks.

A single odd file does not make a series unreadable: slices are grouped by grid (with a tolerance),
orientation and object type, the clearly largest group is the volume, and the other slices are skipped with a
reason. If no group is clearly the largest, each becomes a series with a numbered identifier.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import pydicom

from vilam3_jax.data.dicom.frames import (
    ORDER_KEYWORDS,
    STACK_KEYWORDS,
    Frame,
    code_of,
    frames_of,
    short_identifier,
    unsupported_reason,
)
from vilam3_jax.data.dicom.geometry import Plane, Stack, plane_of, position_indices, stack_slices
from vilam3_jax.data.dicom.headers import wrap_dicom_errors
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime.paths import PathLike

VOLUME, IMAGE, CINE, NO_IMAGE = "volume", "image", "cine", "not an image"

_CLEARLY_LARGER = 2  # times the size of the next group
_SPACING_TOLERANCE = 5e-3  # relative: 0.49 is 0.488281 rounded
_ORIENTATION_TOLERANCE = 5e-3  # of a direction cosine: two decimals, 0.3 degrees
_NOTED_SPREAD = 1e-3
_MAX_ORIENTATIONS = 8  # above, the slices are radial or rotating
_STRAY_SHARE = 0.05
_MAX_AT_ONE_POSITION = 8  # above, a time series or slices that lost their positions
_SPACES = {"StudyInstanceUID": "study", "FrameOfReferenceUID": "frame of reference"}
_PROJECTIONS = {"MIP", "MINIP", "PROJECTION IMAGE", "MAXIMUM", "MINIMUM"}

Skipped = tuple[PathLike, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """One slice: a frame (from 0) of a file."""

    path: PathLike
    frame: int


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """A series, or one of several stacks in it, as described by its headers."""

    # Short form of the UID for users: the first 12 hexadecimal digits of its sha256, followed by "/2" for the
    # second of several stacks.
    identifier: str
    uid: str  # SeriesInstanceUID, "" if missing
    study: str  # short form of the StudyInstanceUID
    modality: str = UNKNOWN  # DICOM's code (CT, MR, PT, NM, ...), or "unknown"
    body_part: str = UNKNOWN  # as the files state it, upper case, or "unknown"
    kind: str = NO_IMAGE  # "volume" (slices with positions, see `problem`), "image", "cine" or "not an image"
    rows: int = 0  # size of a slice in pixels, with columns
    columns: int = 0
    slices: int = 0  # number of slices of the volume, frames of a cine, or images
    # Millimetres between columns, rows and slices; None unless `kind` is "volume".
    spacing: tuple[float, float, float] | None = None
    orientation: str = UNKNOWN  # "axial", "coronal", "sagittal" or "oblique"; "unknown" unless a volume
    # [4, 4] float64, index (column, row, slice) to RAS millimetres; None unless the series is usable.
    affine: np.ndarray | None = None
    # Slices in the order of `affine`; for images and cines, files in their given order.
    members: tuple[Member, ...] = ()
    label: str = ""  # distinguishes the stacks of a series ("echo 2"), or ""
    localizer: bool = False  # every slice is a localizer (scout)
    notes: tuple[str, ...] = ()  # sentences about assumptions and skipped files; no patient data
    problem: str | None = None  # why the series cannot be read as a volume, or None
    skipped: tuple[Skipped, ...] = ()  # (file, reason) of skipped files
    # (kept, other) slices at one position without distinguishing attributes: their pixels must be equal.
    copies: tuple[tuple[Member, Member], ...] = ()
    # (kept, other) slices with one SOPInstanceUID at one position; differing pixels are noted.
    duplicates: tuple[tuple[Member, Member], ...] = ()

    def __str__(self) -> str:
        """One line for lists: identifier, modality, size and label."""
        slices = f"{self.slices} slice{'s' if self.slices != 1 else ''}"
        words = [self.modality, slices if self.kind == VOLUME else self.kind]
        words += [self.label] if self.label else []
        return f"{self.identifier} ({', '.join(words)})"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FileFrames:
    """The part of a file's header that grouping needs; small enough to send between processes."""

    path: PathLike
    uid: str  # SeriesInstanceUID, or ""
    study: str  # StudyInstanceUID, or ""
    modality: str  # DICOM's code, or "unknown"
    frames: tuple[Frame, ...]  # empty if there is a reason
    reason: str | None  # why the file is skipped, or None


@dataclasses.dataclass
class _Group:
    """Frames that may form a stack, and files that were skipped for it."""

    frames: list[Frame]
    label: str = ""
    copies: list[tuple[Frame, Frame]] = dataclasses.field(default_factory=list)
    duplicates: list[tuple[Frame, Frame]] = dataclasses.field(default_factory=list)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)


def file_frames(path: PathLike, header: pydicom.Dataset) -> FileFrames:
    """Extracts the input of `group_files`; raises only `UnavailableError`, if disk or network fail."""
    uid = study = ""
    modality = UNKNOWN
    try:
        with wrap_dicom_errors(path):
            uid = str(header.get("SeriesInstanceUID") or "").strip().strip("\0")
            study = str(header.get("StudyInstanceUID") or "")
            modality = code_of(header.get("Modality"))
            reason = unsupported_reason(header)
            frames = () if reason else tuple(frames_of(header, path))
            return FileFrames(path, uid, study, modality, frames, reason)
    except UnavailableError:
        raise
    except UserError:
        return FileFrames(path, uid, study, modality, (), "a damaged header")


def group_files(files: Iterable[FileFrames]) -> list[Series]:
    """Groups files into series, in the order of their first file.

    A series whose slices form several stacks gives several; files with damaged headers are in `skipped`.
    """
    by_uid: dict[str, list[FileFrames]] = collections.defaultdict(list)
    for file in files:
        by_uid[file.uid].append(file)
    return [series for members in by_uid.values() for series in _series_of(members)]


def skipped_notes(skipped: Sequence[Skipped]) -> list[str]:
    """One sentence per reason, with the number of files."""
    files = collections.Counter(reason for _, reason in dict.fromkeys(skipped))
    return [f"{count} file{'s' if count > 1 else ''} skipped: {reason}" for reason, count in files.items()]


def _series_of(files: list[FileFrames]) -> list[Series]:
    first = files[0]
    base = Series(
        short_identifier(first.uid),
        first.uid,
        short_identifier(first.study),
        modality=first.modality,
        skipped=tuple((file.path, file.reason) for file in files if file.reason),
    )
    frames = [frame for file in files for frame in file.frames]
    slices = [frame for frame in frames if frame.fault is None]
    if not slices:
        return [_without_slices(base, frames)]
    skipped = [(frame.path, frame.fault) for frame in frames if frame.fault is not None]
    # The key includes positions because some anonymisers give all slices the same UID.
    keys = [(f.uid, f.number, f.position, f.orientation) if f.uid else f for f in slices]
    slices, duplicates = _first_by_key(slices, keys)
    skipped += [(other.path, "a copy of another file (same SOPInstanceUID)") for _, other in duplicates]
    spaces, others = _select_main(_spaces(slices), lambda *_: "another study or frame of reference")
    skipped += others
    if len(spaces) == 1:
        spaces[0].label = ""
    stacks = []
    for space in spaces:
        groups, others = _select_main(_grids(space.frames), _difference)
        skipped += others
        if len(groups) > _MAX_ORIENTATIONS or (len(groups) > 3 and len(groups[0].frames) < 3):
            different = f"slices of {len(groups)} different orientations or grids"
            problem = f"{different} (radial or rotating), not a stack"
            return [dataclasses.replace(_without_slices(base, frames), problem=problem)]
        for group in groups:
            group.label = _description(group.frames[0]) if len(groups) > 1 else ""
            for stack in _stacks(group):
                stack.label = _joined(space.label, stack.label)
                stacks.append(stack)
    for stack in stacks:
        stack.skipped = [*stack.skipped, *skipped]
        kept = set(stack.frames)
        stack.duplicates = [pair for pair in duplicates if pair[0] in kept]
    return [
        _volume(base, stack, f"/{number}" if len(stacks) > 1 else "")
        for number, stack in enumerate(stacks, 1)
    ]


def _without_slices(base: Series, frames: list[Frame]) -> Series:
    if not frames:
        return dataclasses.replace(base, problem=_most_common(reason for _, reason in base.skipped))
    first = frames[0]
    return dataclasses.replace(
        base,
        body_part=first.body_part,
        kind=CINE if first.frames > 1 else IMAGE,
        rows=first.rows,
        columns=first.columns,
        slices=sum({frame.path: frame.frames for frame in frames}.values()),
        members=tuple(map(_member, frames)),
        localizer=all(map(_is_localizer, frames)),
        notes=tuple(skipped_notes(base.skipped)),
        problem=_most_common(frame.fault for frame in frames),
    )


def _first_by_key(
    frames: Sequence[Frame], keys: Sequence[Hashable]
) -> tuple[list[Frame], list[tuple[Frame, Frame]]]:
    """The first frame of each key, and (first, other) for all other frames."""
    first: dict[Hashable, Frame] = {}
    pairs = [(first.setdefault(key, frame), frame) for frame, key in zip(frames, keys, strict=True)]
    return list(first.values()), [(kept, other) for kept, other in pairs if kept is not other]


def _select_main(
    groups: list[_Group], reason: Callable[[Frame, _Group, _Group], str]
) -> tuple[list[_Group], list[Skipped]]:
    """The clearly largest group and the frames skipped for it, or all groups.

    `reason` maps a skipped frame, its group and the largest group to the reason for skipping.
    """
    largest, *rest = sorted((len(group.frames) for group in groups), reverse=True)
    if rest and largest < _CLEARLY_LARGER * rest[0]:
        return groups, []
    main = max(groups, key=lambda group: len(group.frames))
    others = [group for group in groups if group is not main]
    return [main], [(frame.path, reason(frame, group, main)) for group in others for frame in group.frames]


def _joined(*labels: str) -> str:
    return ", ".join(filter(None, labels))


def _spaces(slices: list[Frame]) -> list[_Group]:
    """Groups of slices with comparable positions: of one study and one frame of reference.

    Identifiers of a single slice are ignored, because broken anonymisers give every file a new one.
    """
    groups = [_Group(slices)]
    for keyword, word in _SPACES.items():
        groups = [part for group in groups for part in _split_space(group, keyword, word)]
    return groups


def _split_space(group: _Group, keyword: str, word: str) -> list[_Group]:
    counts = collections.Counter(frame.attributes.get(keyword) for frame in group.frames)
    names = [name for name, count in counts.items() if name is not None and count > 1]
    if len(names) < 2:
        return [group]
    usual = max(names, key=counts.__getitem__)
    parts: dict[Any, list[Frame]] = {name: [] for name in names}
    for frame in group.frames:
        parts.get(frame.attributes.get(keyword), parts[usual]).append(frame)
    return [
        _Group(frames, _joined(group.label, f"{word} {number} of {len(parts)}"))
        for number, frames in enumerate(parts.values(), 1)
    ]


def _grids(slices: list[Frame]) -> list[_Group]:
    """Groups of slices with one object type, grid and orientation, the largest first."""
    types: dict[Any, list[Frame]] = collections.defaultdict(list)
    for frame in slices:
        is_projection = bool(_PROJECTIONS & set(frame.image_type))
        size = frame.rows, frame.columns
        types[frame.sop_class, frame.modality, size, _is_localizer(frame), is_projection].append(frame)
    groups = [_Group(group) for frames in types.values() for group in _cluster(frames)]
    return sorted(groups, key=lambda group: -len(group.frames))


def _is_localizer(frame: Frame) -> bool:
    return "LOCALIZER" in frame.image_type


def _cluster(frames: list[Frame]) -> list[list[Frame]]:
    """Groups frames whose spacing and orientation are equal up to rounding."""
    counts = collections.Counter((frame.spacing, frame.orientation) for frame in frames)
    seeds = np.empty((0, 8))
    group_of: dict[Any, int] = {}
    for key, _ in counts.most_common():
        spacing, orientation = key
        assert spacing is not None and orientation is not None
        numbers = np.array([*spacing, *orientation])
        tolerance = np.array([_SPACING_TOLERANCE * s for s in spacing] + [_ORIENTATION_TOLERANCE] * 6)
        near = (np.abs(seeds - numbers) <= tolerance).all(axis=1)
        if not near.any():
            seeds, near = np.vstack([seeds, numbers]), np.append(near, True)
        group_of[key] = int(near.argmax())
    groups: dict[int, list[Frame]] = collections.defaultdict(list)
    for frame in frames:
        groups[group_of[frame.spacing, frame.orientation]].append(frame)
    return list(groups.values())


def _description(frame: Frame) -> str:
    plane = plane_of(frame.orientation or ())
    words = [] if isinstance(plane, str) else [plane.name]
    words += ["localizer"] if _is_localizer(frame) else []
    return " ".join([*words, f"{frame.columns} x {frame.rows}"])


def _difference(frame: Frame, _: _Group, main_group: _Group) -> str:
    main = main_group.frames[0]
    if frame.sop_class != main.sop_class:
        return f"{frame.sop_class or 'an object of another class'} beside {main.sop_class or 'the slices'}"
    if _is_localizer(frame) != _is_localizer(main):
        return "a localizer (scout)"
    if frame.modality != main.modality:
        return f"another modality ({frame.modality})"
    if (frame.rows, frame.columns) != (main.rows, main.columns):
        return f"another grid ({frame.columns} x {frame.rows} pixels)"
    assert frame.orientation is not None and main.orientation is not None
    if not np.allclose(frame.orientation, main.orientation, atol=_ORIENTATION_TOLERANCE, rtol=0):
        plane = plane_of(frame.orientation)
        return f"another orientation ({plane if isinstance(plane, str) else plane.name})"
    if frame.spacing != main.spacing:
        assert frame.spacing is not None
        return f"another pixel spacing ({frame.spacing[0]:.4g} mm)"
    return "a projection (MIP)"


def _stacks(group: _Group) -> list[_Group]:
    """Splits frames of one grid into stacks with one frame per position."""
    plane = _plane(group.frames)
    if isinstance(plane, str):
        return [group]
    indices = position_indices(plane.normal, np.array([frame.position for frame in group.frames])).tolist()
    index = dict(zip(group.frames, indices, strict=True))
    counts = collections.Counter(indices)
    if max(counts.values()) > 1:
        parts = []
        if len(counts) > 1 or max(counts.values()) <= _MAX_AT_ONE_POSITION:
            parts = _split_by_attributes(index, counts)
        if len(counts) > 1:
            parts = parts or _split_by_order(index, counts)
        if not parts:
            frames, copies = _first_by_key(group.frames, indices)
            return [dataclasses.replace(group, frames=frames, copies=copies)]
    else:
        parts = [] if _stacked(group.frames, plane).problem is None else _split_interleaved(index, plane)
    if not parts:
        return [group]
    for part in parts:
        part.label = _joined(group.label, part.label)
    selected, skipped = _select_main(parts, lambda frame, part, main: f"another stack ({part.label})")
    if len(selected) == 1:
        selected[0].skipped = skipped
    return selected


def _split_by_attributes(index: dict[Frame, int], counts: collections.Counter[int]) -> list[_Group]:
    """The fewest parts with different attributes and one frame per position; [] if there are none."""
    most = max(counts.values())
    varying = _varying(index)
    best: list[_Group] = []
    for keys in [*((k,) for k in varying), *itertools.combinations(varying, 2), tuple(varying)]:
        parts = _partition(index, keys)
        if not most <= len(parts) <= 2 * most or (best and len(parts) >= len(best)):
            continue
        if all(len({index[frame] for frame in part.frames}) == len(part.frames) for part in parts):
            best = parts
    return _labelled(best)


def _varying(frames: Iterable[Frame]) -> list[str]:
    return [keyword for keyword in STACK_KEYWORDS if len({f.attributes.get(keyword) for f in frames}) > 1]


def _partition(frames: Iterable[Frame], keys: Sequence[str]) -> list[_Group]:
    parts: dict[Any, list[Frame]] = collections.defaultdict(list)
    for frame in frames:
        parts[tuple(frame.attributes.get(key) for key in keys)].append(frame)

    def order(key: tuple[Any, ...]) -> list[tuple[Any, ...]]:  # numbers numerically, among mixed types
        return [(1, v, "") if isinstance(v, float) else (2 if v else 0, 0.0, str(v)) for v in key]

    return [_Group(parts[key]) for key in sorted(parts, key=order)]


def _split_by_order(index: dict[Frame, int], counts: collections.Counter[int]) -> list[_Group]:
    """Time points by time or instance number at each position; [] if positions differ in their number."""
    most = max(counts.values())
    if set(counts.values()) != {most}:
        return []
    for keyword in ORDER_KEYWORDS:
        values = {frame: frame.attributes.get(keyword) for frame in index}
        if None in values.values() or len(set(map(type, values.values()))) > 1:
            continue
        order = sorted(index, key=lambda frame: (index[frame], frame.attributes[keyword]))
        rows = [order[i : i + most] for i in range(0, len(order), most)]
        if all(len({values[frame] for frame in row}) == most for row in rows):
            word = "repetition" if keyword == "InstanceNumber" else "time point"
            columns = enumerate(zip(*rows, strict=True), 1)
            return [_Group([*frames], f"{word} {number} of {most}") for number, frames in columns]
    return []


def _split_interleaved(index: dict[Frame, int], plane: Plane) -> list[_Group]:
    """Splits unevenly spaced slices by an attribute: interleaved stacks, or a stack and stray slices."""
    for keyword in _varying(index):
        parts = _partition(index, [keyword])
        main = max(parts, key=lambda part: len(part.frames))
        if len(main.frames) < 3 or _stacked(main.frames, plane).problem is not None:
            continue
        inside = [index[frame] for frame in main.frames]
        rest = [frame for part in parts if part is not main for frame in part.frames]
        few = len(rest) <= max(1, _STRAY_SHARE * len(index))
        between = all(min(inside) - 1 <= index[frame] <= max(inside) + 1 for frame in rest)
        if few or (between and max(inside) - min(inside) >= len(main.frames)):
            return _labelled(parts)
    return []


def _labelled(parts: list[_Group]) -> list[_Group]:
    """Labels each part with the attributes that are constant within it and differ between parts."""
    for number, part in enumerate(parts, 1):
        words = []
        for keyword, word in STACK_KEYWORDS.items():
            own = {frame.attributes.get(keyword) for frame in part.frames}
            every = {frame.attributes.get(keyword) for other in parts for frame in other.frames}
            if word and len(own) == 1 and len(every) > 1 and None not in own:
                words.append(f"{word} {_shown(own.pop())}")
        part.label = ", ".join(words[:3]) or f"stack {number} of {len(parts)}"
    return parts


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = " ".join(str(value).replace("\\", "/").split())
    return text if len(text) <= 48 and text.isascii() else "(long)"


def _plane(frames: list[Frame]) -> Plane | str:
    return plane_of(_most_common(frame.orientation for frame in frames))


def _stacked(frames: list[Frame], plane: Plane) -> Stack:
    return stack_slices(
        np.array([frame.position for frame in frames]),
        plane,
        _most_common(frame.spacing for frame in frames),
        distance=_most_common(frame.distance for frame in frames),
        thickness=_most_common(frame.thickness for frame in frames),
        tilt=_most_common(frame.tilt for frame in frames),
    )


def _most_common(values: Iterable[Any]) -> Any:
    return collections.Counter(values).most_common(1)[0][0]


def _volume(base: Series, group: _Group, suffix: str) -> Series:
    frames = group.frames
    first = frames[0]
    plane = _plane(frames)
    skipped = [*group.skipped, *base.skipped]
    series = dataclasses.replace(
        base,
        identifier=base.identifier + suffix,
        modality=first.modality,
        body_part=_most_common(frame.body_part for frame in frames),
        kind=VOLUME,
        rows=first.rows,
        columns=first.columns,
        slices=len(frames),
        label=group.label,
        localizer=_is_localizer(first),
        skipped=tuple(skipped),
        copies=tuple((_member(kept), _member(other)) for kept, other in group.copies),
        duplicates=tuple((_member(kept), _member(other)) for kept, other in group.duplicates),
    )
    if isinstance(plane, str):
        return dataclasses.replace(series, problem=plane, members=tuple(map(_member, frames)))
    stack = _stacked(frames, plane)
    problem, parts = stack.problem, {frame.part for frame in frames if frame.part}
    if len(parts) < (total := max((total for total, _ in parts), default=0)):
        problem = f"{len(parts)} of {total} files of a concatenation; the others are missing"
    elif problem is None and len(frames) == 1 and (copies := len(group.copies)) >= _MAX_AT_ONE_POSITION:
        problem = f"{copies + 1} slices at one position (one slice over time, or lost positions)"
    return dataclasses.replace(
        series,
        spacing=stack.spacing,
        orientation=plane.name,
        affine=stack.affine,
        members=tuple(_member(frames[index]) for index in stack.order),
        notes=(*stack.notes, *_inconsistencies(frames), *skipped_notes(skipped)),
        problem=problem,
    )


def _member(frame: Frame) -> Member:
    return Member(frame.path, frame.number)


def _inconsistencies(frames: list[Frame]) -> list[str]:
    notes = []
    spacings = np.array([frame.spacing for frame in frames])
    spread = float((np.ptp(spacings, axis=0) / spacings.min(axis=0)).max())
    if spread > _NOTED_SPREAD:
        notes.append(f"pixel spacings differ by {spread:.1%} between slices; the most common one is used")
    turn = float(np.ptp(np.array([frame.orientation for frame in frames]), axis=0).max())
    if turn > _NOTED_SPREAD:
        notes.append(
            f"slice orientations differ by {np.degrees(turn):.2f} degrees; the most common one is used"
        )
    if any(frame.inverted for frame in frames):
        notes.append("the files request an inverted display (MONOCHROME1); the values are not inverted")
    for keyword, words in (("StudyInstanceUID", "studies"), ("FrameOfReferenceUID", "frames of reference")):
        names = {frame.attributes.get(keyword) for frame in frames} - {None}
        if len(names) > 1:
            notes.append(f"the slices name {len(names)} {words}")
    return notes
