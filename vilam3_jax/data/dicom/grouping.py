"""Groups DICOM headers into series, and the slices of a series into stacks, without looking at pixels.

One odd file never stops a series: slices are grouped by grid (as numbers), orientation and kind of object,
the one large group is the volume, and what is skipped is listed with its reason. Where several groups are
equally good, each becomes a series of its own with a numbered identifier, for the user to choose from.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pydicom

from vilam3_jax.data.dicom.frames import (
    MARKS,
    ORDER,
    Frame,
    code_of,
    frames_of,
    not_an_image,
    series_uid,
    short_identifier,
)
from vilam3_jax.data.dicom.geometry import Plane, Stack, places_along, plane_of, stack_slices
from vilam3_jax.data.dicom.headers import naming
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime.paths import PathLike

VOLUME, PICTURE, CINE, NO_IMAGE = "volume", "picture", "cine", "not an image"

_CLEARLY_LARGER = 2  # times the next group
_SPACING_TOLERANCE = 5e-3  # relative: 0.49 is 0.488281 rounded
_ORIENTATION_TOLERANCE = 5e-3  # of a direction cosine: two decimals, 0.3 degrees
_NOTED_SPREAD = 1e-3
_ROTATING_ABOVE = 8  # more orientations than this are no set of stacks
_STRAY_SHARE = 0.05
_ONE_PLACE = 8  # more slices at one position than this are a time series or have lost their positions
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
    """One series, or one of several stacks in it, as its headers describe it.

    Attributes:
      identifier: what people type instead of the UID: the first 12 hexadecimal digits of its sha256, and "/2"
        for the second of several stacks.
      uid: SeriesInstanceUID, "" if the files state none.
      study: the same digits of the StudyInstanceUID.
      modality: DICOM's code (CT, MR, PT, NM, ...), or "unknown".
      body_part: as the files state it, upper case, or "unknown".
      kind: "volume" (slices with positions, see `problem`), "picture", "cine" or "not an image".
      rows: pixels of a slice.
      columns: pixels of a slice.
      slices: slices of the volume, frames of a cine, or pictures.
      spacing: millimetres between columns, rows and slices; None unless `kind` is "volume".
      orientation: "axial", "coronal", "sagittal" or "oblique"; "unknown" unless `kind` is "volume".
      affine: [4, 4] float64, index (column, row, slice) to RAS millimetres; None unless the series is usable.
      members: the slices in the order of `affine`; the files in their own order for pictures and cines.
      label: what tells the stack from the others of its series ("echo 2"), or "".
      localizer: every slice is a localizer (scout).
      notes: sentences about what was assumed or skipped; no patient data.
      problem: why the series cannot be read as a volume, or None.
      skipped: (file, reason) of what was skipped.
      copies: (kept, other) slices at one position which no header tells apart: they must have equal pixels.
      duplicates: (kept, other) slices of one SOPInstanceUID at one position; differing pixels are noted.
    """

    identifier: str
    uid: str
    study: str
    modality: str = UNKNOWN
    body_part: str = UNKNOWN
    kind: str = NO_IMAGE
    rows: int = 0
    columns: int = 0
    slices: int = 0
    spacing: tuple[float, float, float] | None = None
    orientation: str = UNKNOWN
    affine: np.ndarray | None = None
    members: tuple[Member, ...] = ()
    label: str = ""
    localizer: bool = False
    notes: tuple[str, ...] = ()
    problem: str | None = None
    skipped: tuple[Skipped, ...] = ()
    copies: tuple[tuple[Member, Member], ...] = ()
    duplicates: tuple[tuple[Member, Member], ...] = ()

    def __str__(self) -> str:
        """One line for lists: identifier, modality, size and label."""
        slices = f"{self.slices} slice{'s' if self.slices != 1 else ''}"
        words = [self.modality, slices if self.kind == VOLUME else self.kind]
        words += [self.label] if self.label else []
        return f"{self.identifier} ({', '.join(words)})"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FileFrames:
    """What the header of one file says for grouping. It is small and can be pickled.

    Attributes:
      path: the file.
      uid: SeriesInstanceUID, or "".
      study: StudyInstanceUID, or "".
      modality: DICOM's code, or "unknown".
      frames: empty if `reason` is given.
      reason: why the file is skipped, or None.
    """

    path: PathLike
    uid: str
    study: str
    modality: str
    frames: tuple[Frame, ...]
    reason: str | None


@dataclasses.dataclass
class _Found:
    """The files of one SeriesInstanceUID."""

    study: str
    modality: str
    frames: list[Frame] = dataclasses.field(default_factory=list)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Group:
    """Frames that may form a stack, and what was skipped from them."""

    frames: list[Frame]
    label: str = ""
    copies: list[tuple[Frame, Frame]] = dataclasses.field(default_factory=list)
    duplicates: list[tuple[Frame, Frame]] = dataclasses.field(default_factory=list)
    aside: list[tuple[Frame, str]] = dataclasses.field(default_factory=list)


def group_headers(items: Iterable[tuple[PathLike, pydicom.Dataset]]) -> list[Series]:
    """Groups files into series.

    Args:
      items: (path, header) of each file, headers as `headers.read_header(path, frames=True)` returns them.
        Nothing of a header is kept after its turn.

    Returns:
      Series in the order of their first file; several for a series whose slices form several stacks. Files
      whose headers are damaged are in `skipped` of their series.
    """
    return group_files(file_frames(path, header) for path, header in items)


def file_frames(path: PathLike, header: pydicom.Dataset) -> FileFrames:
    """Reduces a header to what `group_files` needs.

    Raises:
      UnavailableError: the disk or the network fails.
    """
    uid = study = ""
    modality = UNKNOWN
    try:
        with naming(path):
            uid, study = series_uid(header), str(header.get("StudyInstanceUID") or "")
            modality = code_of(header.get("Modality"))
            reason = not_an_image(header)
            frames = () if reason else tuple(frames_of(header, path))
            return FileFrames(path, uid, study, modality, frames, reason)
    except UnavailableError:
        raise
    except UserError:
        return FileFrames(path, uid, study, modality, (), "a damaged header")


def group_files(files: Iterable[FileFrames]) -> list[Series]:
    """`group_headers` for headers that `file_frames` has reduced."""
    found: dict[str, _Found] = {}
    for file in files:
        series = found.setdefault(file.uid, _Found(file.study, file.modality))
        series.frames += file.frames
        series.skipped += [(file.path, file.reason)] if file.reason else []
    return [series for uid, series_files in found.items() for series in _series_of(uid, series_files)]


def skipped_notes(skipped: Sequence[Skipped]) -> list[str]:
    """One sentence for each reason, with the number of files."""
    files = collections.Counter(reason for _, reason in dict.fromkeys(skipped))
    return [f"{count} file{'s' if count > 1 else ''} skipped: {reason}" for reason, count in files.items()]


def _series_of(uid: str, found: _Found) -> list[Series]:
    slices = [frame for frame in found.frames if frame.fault is None]
    if not slices:
        return [_without_slices(uid, found)]
    aside = [(frame, frame.fault) for frame in found.frames if frame.fault is not None]
    slices, duplicates = _without_duplicates(slices)
    aside += [(other, "a copy of another file (same SOPInstanceUID)") for _, other in duplicates]
    spaces, others = _main_spaces(_spaces(slices))
    aside += others
    stacks = []
    for space in spaces:
        groups, others = _main_groups(_grids(space.frames))
        aside += others
        if len(groups) > _ROTATING_ABOVE or (len(groups) > 3 and len(groups[0].frames) < 3):
            return [_rotating(uid, found, len(groups))]
        for stack in (stack for group in groups for stack in _stacks(group)):
            stack.label = ", ".join(filter(None, [space.label, stack.label]))
            stacks.append(stack)
    for stack in stacks:
        stack.aside = [*stack.aside, *aside]
        kept = set(map(id, stack.frames))
        stack.duplicates = [pair for pair in duplicates if id(pair[0]) in kept]
    named = len(stacks) > 1
    return [
        _volume(uid, found, stack, f"/{number}" if named else "") for number, stack in enumerate(stacks, 1)
    ]


def _without_slices(uid: str, found: _Found) -> Series:
    base = Series(
        short_identifier(uid),
        uid,
        short_identifier(found.study),
        modality=found.modality,
        skipped=tuple(found.skipped),
    )
    if not found.frames:
        reasons = collections.Counter(reason for _, reason in found.skipped)
        return dataclasses.replace(base, problem=reasons.most_common(1)[0][0])
    first = found.frames[0]
    faults = collections.Counter(frame.fault for frame in found.frames)
    return dataclasses.replace(
        base,
        body_part=first.body_part,
        kind=CINE if first.frames > 1 else PICTURE,
        rows=first.rows,
        columns=first.columns,
        slices=sum({frame.path: frame.frames for frame in found.frames}.values()),
        members=tuple(Member(frame.path, frame.number) for frame in found.frames),
        localizer=all(_is_localizer(frame) for frame in found.frames),
        notes=tuple(skipped_notes(found.skipped)),
        problem=faults.most_common(1)[0][0],
    )


def _rotating(uid: str, found: _Found, orientations: int) -> Series:
    without = _without_slices(uid, found)
    return dataclasses.replace(
        without,
        problem=f"slices of {orientations} different orientations or grids (radial or rotating), not a stack",
    )


def _without_duplicates(slices: list[Frame]) -> tuple[list[Frame], list[tuple[Frame, Frame]]]:
    """The first slice of each instance at each position, and (kept, other) for those that are left out."""
    first: dict[Any, Frame] = {}
    duplicates = []
    for frame in slices:
        # Positions too: there are anonymisers that give all slices one UID.
        key = (frame.uid, frame.number, frame.position, frame.orientation) if frame.uid else id(frame)
        kept = first.setdefault(key, frame)
        duplicates += [(kept, frame)] if kept is not frame else []
    return list(first.values()), duplicates


def _spaces(slices: list[Frame]) -> list[_Group]:
    """Groups of slices whose positions can be compared: of one study and one frame of reference.

    A broken anonymiser gives every file an identifier of its own, so one that a single slice names means
    nothing.
    """
    groups = [_Group(slices)]
    for keyword, word in _SPACES.items():
        groups = [part for group in groups for part in _named_parts(group, keyword, word)]
    return groups


def _named_parts(group: _Group, keyword: str, word: str) -> list[_Group]:
    counts = collections.Counter(frame.marks.get(keyword) for frame in group.frames)
    names = [name for name, count in counts.items() if name is not None and count > 1]
    if len(names) < 2:
        return [group]
    usual = max(names, key=counts.__getitem__)
    parts: dict[Any, list[Frame]] = {name: [] for name in names}
    for frame in group.frames:
        parts.get(frame.marks.get(keyword), parts[usual]).append(frame)
    return [
        _Group(frames, ", ".join(filter(None, [group.label, f"{word} {number} of {len(parts)}"])))
        for number, frames in enumerate(parts.values(), 1)
    ]


def _main_spaces(spaces: list[_Group]) -> tuple[list[_Group], list[tuple[Frame, str]]]:
    if not _clearly_first([len(space.frames) for space in spaces]):
        return spaces, []
    main = max(spaces, key=lambda space: len(space.frames))
    main.label = ""
    reason = "another study or frame of reference"
    return [main], [(frame, reason) for space in spaces if space is not main for frame in space.frames]


def _grids(slices: list[Frame]) -> list[_Group]:
    """Groups of slices that could lie in one stack, the largest first."""
    kinds: dict[Any, list[Frame]] = collections.defaultdict(list)
    for frame in slices:
        kinds[_kind(frame)].append(frame)
    groups = [_Group(group) for frames in kinds.values() for group in _near(frames)]
    return sorted(groups, key=lambda group: -len(group.frames))


def _kind(frame: Frame) -> tuple[Any, ...]:
    return (
        frame.sop_class,
        frame.modality,
        frame.rows,
        frame.columns,
        _is_localizer(frame),
        bool(_PROJECTIONS & set(frame.image_type)),
    )


def _is_localizer(frame: Frame) -> bool:
    return "LOCALIZER" in frame.image_type


def _near(frames: list[Frame]) -> list[list[Frame]]:
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


def _main_groups(groups: list[_Group]) -> tuple[list[_Group], list[tuple[Frame, str]]]:
    """The group that is clearly the volume, or all groups, and what is skipped with its reason."""
    if len(groups) > 1 and not _clearly_first([len(group.frames) for group in groups]):
        for group in groups:
            group.label = _description(group.frames[0])
        return groups, []
    main = groups[0].frames[0]
    return groups[:1], [(frame, _difference(frame, main)) for group in groups[1:] for frame in group.frames]


def _clearly_first(sizes: Sequence[int]) -> bool:
    largest, *rest = sorted(sizes, reverse=True)
    return not rest or largest >= _CLEARLY_LARGER * rest[0]


def _description(frame: Frame) -> str:
    plane = plane_of(frame.orientation or ())
    words = [] if isinstance(plane, str) else [plane.word]
    words += ["localizer"] if _is_localizer(frame) else []
    return " ".join([*words, f"{frame.columns} x {frame.rows}"])


def _difference(frame: Frame, main: Frame) -> str:
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
        return f"another orientation ({plane if isinstance(plane, str) else plane.word})"
    if frame.spacing != main.spacing:
        assert frame.spacing is not None
        return f"another pixel spacing ({frame.spacing[0]:.4g} mm)"
    return "a projection (MIP)"


def _stacks(group: _Group) -> list[_Group]:
    """Splits frames of one grid into stacks with one frame at each position."""
    frames = group.frames
    plane = _plane(frames)
    if isinstance(plane, str):
        return [group]
    places = places_along(plane.normal, np.array([frame.position for frame in frames]))
    most = int(np.bincount(places).max())
    if most > 1:
        parts = [] if places.max() == 0 and most > _ONE_PLACE else _parts_by_marks(frames, places, most)
        parts = parts or (_parts_by_order(frames, places, most) if places.max() else [])
        if not parts:
            return [_with_pending_copies(group, places)]
    else:
        parts = [] if _stacked(frames, plane).problem is None else _mixed_parts(frames, places, plane)
    if not parts:
        return [group]
    for part in parts:
        part.label = ", ".join(filter(None, [group.label, part.label]))
    if not _clearly_first([len(part.frames) for part in parts]):
        return parts
    main = max(parts, key=lambda part: len(part.frames))
    main.aside = [
        (frame, f"another stack ({part.label})")
        for part in parts
        if part is not main
        for frame in part.frames
    ]
    return [main]


def _parts_by_marks(frames: list[Frame], places: np.ndarray, most: int) -> list[_Group]:
    """The fewest parts that header values tell apart, each with one frame at each position; [] if none."""
    varying = _varying(frames)
    best: list[_Group] = []
    for keys in [*((k,) for k in varying), *itertools.combinations(varying, 2), tuple(varying)]:
        parts = _partition(frames, keys)
        if not most <= len(parts) <= 2 * most or (best and len(parts) >= len(best)):
            continue
        place_of = {id(frame): place for frame, place in zip(frames, places, strict=True)}
        if all(len({place_of[id(f)] for f in part.frames}) == len(part.frames) for part in parts):
            best = parts
    return _labelled(best)


def _varying(frames: list[Frame]) -> list[str]:
    return [keyword for keyword in MARKS if len({frame.marks.get(keyword) for frame in frames}) > 1]


def _partition(frames: list[Frame], keys: Sequence[str]) -> list[_Group]:
    parts: dict[Any, list[Frame]] = collections.defaultdict(list)
    for frame in frames:
        parts[tuple(frame.marks.get(key) for key in keys)].append(frame)
    return [_Group(parts[key]) for key in sorted(parts, key=_sortable)]


def _sortable(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key that sorts numbers as numbers, and values of different types at all."""
    return tuple(
        (1, value, "") if isinstance(value, float) else (2 if value else 0, 0.0, str(value))
        for value in values
    )


def _parts_by_order(frames: list[Frame], places: np.ndarray, most: int) -> list[_Group]:
    """Time points, by the order of times or instance numbers at each position; [] if that is not complete."""
    if (np.bincount(places) != most).any():
        return []
    for keyword in ORDER:
        values = [frame.marks.get(keyword) for frame in frames]
        if any(value is None for value in values) or len({type(value) for value in values}) > 1:
            continue
        order = sorted(range(len(frames)), key=lambda i: (places[i], values[i]))
        rows = [order[i : i + most] for i in range(0, len(order), most)]
        if all(len({values[i] for i in row}) == most for row in rows):
            word = "repetition" if keyword == "InstanceNumber" else "time point"
            return [
                _Group([frames[row[n]] for row in rows], f"{word} {n + 1} of {most}") for n in range(most)
            ]
    return []


def _with_pending_copies(group: _Group, places: np.ndarray) -> _Group:
    first: dict[int, Frame] = {}
    copies = []
    for frame, place in zip(group.frames, places.tolist(), strict=True):
        kept = first.setdefault(place, frame)
        copies += [(kept, frame)] if kept is not frame else []
    return dataclasses.replace(group, frames=list(first.values()), copies=copies)


def _mixed_parts(frames: list[Frame], places: np.ndarray, plane: Plane) -> list[_Group]:
    """Explains uneven slices by a stray slice or by interleaved stacks which a header value tells apart."""
    for keyword in _varying(frames):
        parts = _partition(frames, [keyword])
        main = max(parts, key=lambda part: len(part.frames))
        if len(main.frames) < 3 or _stacked(main.frames, plane).problem is not None:
            continue
        place_of = {id(frame): place for frame, place in zip(frames, places.tolist(), strict=True)}
        inside = [place_of[id(frame)] for frame in main.frames]
        rest = [frame for part in parts if part is not main for frame in part.frames]
        few = len(rest) <= max(1, _STRAY_SHARE * len(frames))
        between = all(min(inside) - 1 <= place_of[id(frame)] <= max(inside) + 1 for frame in rest)
        if few or (between and max(inside) - min(inside) >= len(main.frames)):
            return _labelled(parts)
    return []


def _labelled(parts: list[_Group]) -> list[_Group]:
    """Names each part by the header values that are one within it and differ between parts."""
    for number, part in enumerate(parts, 1):
        words = []
        for keyword, word in MARKS.items():
            values = [{frame.marks.get(keyword) for frame in other.frames} for other in parts]
            own = {frame.marks.get(keyword) for frame in part.frames}
            if word and len(own) == 1 and len(set().union(*values)) > 1 and None not in own:
                words.append(f"{word} {_shown(next(iter(own)))}")
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


def _volume(uid: str, found: _Found, group: _Group, suffix: str) -> Series:
    frames = group.frames
    first = frames[0]
    plane = _plane(frames)
    skipped = [*((frame.path, reason) for frame, reason in group.aside), *found.skipped]
    series = Series(
        short_identifier(uid) + suffix,
        uid,
        short_identifier(found.study),
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
    notes = [*stack.notes, *_inconsistencies(frames), *skipped_notes(skipped)]
    return dataclasses.replace(
        series,
        spacing=stack.spacing,
        orientation=plane.word,
        affine=stack.affine,
        members=tuple(_member(frames[index]) for index in stack.order),
        notes=tuple(notes),
        problem=_missing_parts(frames) or stack.problem or _one_place(group),
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
        notes.append("the files ask for an inverted display (MONOCHROME1); the values are as stored")
    for keyword, words in (("StudyInstanceUID", "studies"), ("FrameOfReferenceUID", "frames of reference")):
        names = {frame.marks.get(keyword) for frame in frames} - {None}
        if len(names) > 1:
            notes.append(f"the slices name {len(names)} {words}")
    return notes


def _one_place(group: _Group) -> str | None:
    if len(group.frames) == 1 and len(group.copies) >= _ONE_PLACE:
        return f"{len(group.copies) + 1} slices at one position (one slice over time, or lost positions)"
    return None


def _missing_parts(frames: list[Frame]) -> str | None:
    parts = {frame.parts for frame in frames if frame.parts}
    if parts and len(parts) < (total := max(total for total, _ in parts)):
        return f"{len(parts)} of {total} files of a concatenation; the others are missing"
    return None
