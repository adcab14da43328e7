"""DICOM series: which series a folder holds, and the slices of one of them as a volume."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pydicom
from etils import epath

from vilam3_jax.data.dicom import frames, pixels, suv
from vilam3_jax.data.dicom.grouping import (
    CINE,
    PICTURE,
    VOLUME,
    Member,
    Series,
    Skipped,
    group_headers,
    skipped_notes,
)
from vilam3_jax.data.dicom.headers import file_size_of, is_directory, naming, read_dataset, read_header
from vilam3_jax.data.folder_walk import list_files
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.stored_volume import UNKNOWN, StoredVolume
from vilam3_jax.data.volume_io import stated_units
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime.paths import PathLike, as_path

DAMAGED_HEADER = "a damaged DICOM header"
_DAMAGED_SHARE = 0.02
_LISTED = 10  # series or files that a message names
_SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")


def read_series(
    path: PathLike, *, series: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> StoredVolume:
    """Reads the slices of one series as a volume.

    Args:
      path: a folder (subfolders included), a file of one slice or of a multi-frame volume, or a DICOMDIR,
        which stands for its folder.
      series: which series of a folder: its SeriesInstanceUID or `Series.identifier`. None: the only volume.
      limits: bounds on files, their bytes and voxels, checked by the headers before any pixel is decoded.

    Returns:
      values [columns, rows, slices], rescaled; `valid` is False where a file stores padding. Units are "HU"
      for CT and "SUVbw" for PET where the header allows it. `notes` say what was skipped and assumed.

    Raises:
      UnavailableError: the disk or the network fails.
      UserError: no volume, several to choose from (they are listed), missing or doubled slices, no regular
        geometry, damaged files, or over a limit.
    """
    path = as_path(path)
    found, skipped = survey(path, limits=limits)
    chosen, notes = _choose(found, skipped, series, path, limits)
    stored = read_listed(chosen, path, limits=limits)
    return dataclasses.replace(stored, notes=(*notes, *skipped_notes(skipped), *stored.notes))


def read_listed(series: Series, path: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> StoredVolume:
    """Reads a series that `list_series` found in the folder `path`, without listing the folder again.

    Raises:
      UnavailableError: see `read_series`.
      UserError: see `read_series`.
    """
    if series.problem is not None:
        raise UserError(f"{path}: series {series} cannot be read as a volume: {series.problem}")
    return _read(series, as_path(path), limits)


def list_series(path: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> list[Series]:
    """The series of a folder with its subfolders, by their headers.

    Raises:
      UserError: no such folder, or more files than `limits.files`.
    """
    return survey(path, limits=limits)[0]


def survey(path: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> tuple[list[Series], list[Skipped]]:
    """`list_series`, and the files that belong to no series, with the reason."""
    path = as_path(path)
    skipped: list[Skipped] = []
    if not path.is_dir():
        header = read_header(path, limits=limits, frames=True)
        if header is None:
            raise UserError(f"{path}: not a DICOM file; give a DICOM file or folder")
        if not is_directory(header):
            return group_headers([(path, header)]), skipped
        path = path.parent
    listing = list_files(path, limits.files, lambda: None)
    found = group_headers(_headers(listing.files, skipped, limits))
    skipped += [(path, reason) for reason, count in listing.skipped.items() for _ in range(count)]
    return found, skipped


def _headers(
    files: Sequence[PathLike], skipped: list[Skipped], limits: Limits
) -> Iterator[tuple[PathLike, pydicom.Dataset]]:
    for file in files:
        try:
            header = read_header(file, limits=limits, frames=True)
        except UnavailableError:
            raise
        except UserError:
            skipped.append((file, DAMAGED_HEADER))
            continue
        if header is None:
            skipped.append((file, f"not DICOM ({_suffix(file)})"))
        elif is_directory(header):
            skipped.append((file, "a DICOMDIR; its paths are not followed"))
        else:
            yield file, header


def _suffix(file: PathLike) -> str:
    path = as_path(file)
    if path.name.startswith("."):
        return "a hidden file"
    suffix = path.suffix.lower()
    return suffix if _SUFFIX.fullmatch(suffix) else "no suffix"


def _choose(
    found: Sequence[Series], skipped: Sequence[Skipped], wanted: str | None, path: epath.Path, limits: Limits
) -> tuple[Series, list[str]]:
    """The series to read, and notes about the others."""
    if wanted is not None:
        wanted = wanted.strip()
        candidates = [series for series in found if wanted in (series.identifier, *_uids(series))]
        candidates = candidates or [series for series in found if series.uid == wanted]
        candidates = candidates or [s for s in found if s.identifier.partition("/")[0] == wanted]
        if not candidates:
            there = f"choose from {_list(found)}" if found else "no DICOM images are here"
            raise UserError(f"{path}: no series {wanted[:70]!r}; {there}")
    else:
        candidates = _main_volumes(found)
        if not candidates:
            raise UserError(f"{path}: no DICOM volume here{_instead(found, skipped)}")
    chosen = candidates[0]
    if len(candidates) > 1 and not _all_equal(candidates, limits):
        raise UserError(
            f"{path}: {len(candidates)} volumes to choose from; name one of them as the series: "
            f"{_list(candidates)}"
        )
    others = [s for s in found if s is not chosen and s not in candidates]
    notes = [f"{len(candidates) - 1} equal copies of the series skipped"] if len(candidates) > 1 else []
    if wanted is None and others:
        shown = ", ".join(str(series) for series in others[:_LISTED])
        more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
        notes.append(f"{len(others)} other series skipped: {shown}{more}")
    return chosen, notes


def _uids(series: Series) -> tuple[str, ...]:
    """A full UID also with the number of a stack: 1.2.3/2."""
    return (series.uid + series.identifier[12:],) if series.uid else ()


def _main_volumes(found: Sequence[Series]) -> list[Series]:
    """The volumes among which a user would have to choose: no localizers or single slices beside a stack."""
    volumes = [series for series in found if series.kind == VOLUME]
    for worth in (lambda s: not s.localizer, lambda s: s.slices > 1):
        volumes = [series for series in volumes if worth(series)] or volumes
    return volumes


def _list(found: Sequence[Series]) -> str:
    shown = [
        " ".join(
            filter(
                None, [str(series), ascii(series.uid)[1:-1], f"({series.problem})" if series.problem else ""]
            )
        )
        for series in found[:_LISTED]
    ]
    more = [f"{len(found) - _LISTED} more"] if len(found) > _LISTED else []
    return "; ".join([*shown, *more])


def _instead(found: Sequence[Series], skipped: Sequence[Skipped]) -> str:
    """What is there where no volume is, and what to do."""
    reasons = [f"{series}: {series.problem}" for series in found] + skipped_notes(skipped)
    if not reasons:
        return "; the folder is empty"
    more = f"; and {len(reasons) - _LISTED} more" if len(reasons) > _LISTED else ""
    pictures = any(series.kind in (PICTURE, CINE) for series in found)
    advice = "read them as pictures" if pictures else "point at the folder that holds the slices"
    if not found:
        advice = "give one of its files, or a folder of DICOM slices"
    return f" ({'; '.join(reasons[:_LISTED])}{more}); {advice}"


def _all_equal(candidates: Sequence[Series], limits: Limits) -> bool:
    """Whether stacks of one series are copies of each other, slice by slice."""
    first, *others = candidates
    return all(
        other.uid == first.uid
        and other.affine is not None
        and first.affine is not None
        and len(other.members) == len(first.members)
        and np.allclose(other.affine, first.affine, atol=1e-3)
        and not any(True for _ in _differing(zip(first.members, other.members, strict=True), limits))
        for other in others
    )


def _differing(
    pairs: Iterable[tuple[Member, Member]], limits: Limits
) -> Iterator[tuple[Member, Member, bool]]:
    """Pairs of slices whose values differ, and whether the second one is damaged."""
    one, other = _LastFile(limits), _LastFile(limits)
    for first, second in pairs:
        values, copy = one.values(first), other.values(second)
        if values is not None and (copy is None or not np.array_equal(values, copy)):
            yield first, second, copy is None


class _LastFile:
    """Decodes slices and keeps the file of the last one: slices of a multi-frame file follow each other."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._path: PathLike | None = None
        self._dataset = pydicom.Dataset()

    def values(self, member: Member) -> np.ndarray | None:
        """The values of a slice, None if it is damaged."""
        try:
            if member.path != self._path:
                self._dataset = read_dataset(member.path, limits=self._limits)
                self._path = member.path
            return pixels.frame_values(self._dataset, member.frame, member.path, limits=self._limits)[0]
        except UnavailableError:
            raise
        except UserError:
            return None


@dataclasses.dataclass
class _Slices:
    """Decoded slices, and what their files state.

    Attributes:
      values: [slices, rows, columns] of the type that holds all slices.
      valid: [slices, rows, columns] bool, or None where no file stores padding.
      failed: why a slice could not be decoded, by its index.
      windows: (centre, width) of each slice.
      rescale_types: how often each RescaleType occurs.
      pet: facts of each file.
      notes: about values and units, without repetitions.
    """

    values: np.ndarray | None = None
    valid: np.ndarray | None = None
    failed: dict[int, UserError] = dataclasses.field(default_factory=dict)
    windows: dict[int, tuple[float, float] | None] = dataclasses.field(default_factory=dict)
    rescale_types: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    pet: list[suv.PetFacts] = dataclasses.field(default_factory=list)
    notes: dict[str, None] = dataclasses.field(default_factory=dict)


def _read(series: Series, path: epath.Path, limits: Limits) -> StoredVolume:
    _check_limits(series, path, limits)
    notes = [*series.notes, *_check_copies(series, path, limits)]
    slices = _Slices()
    for file, members in _by_file(series).items():
        try:
            dataset = read_dataset(file, limits=limits)
            with naming(file):
                for index, member in members:
                    _decode(slices, series, dataset, index, member, limits)
                slices.notes |= dict.fromkeys(pixels.value_notes(dataset, file, limits=limits))
                if series.modality == "PT":
                    slices.pet.append(suv.facts_of(dataset))
        except UnavailableError:
            raise
        except UserError as error:
            slices.failed |= {index: error for index, _ in members}
    kept = _without_failed(slices, len(series.members))
    assert slices.values is not None and series.affine is not None
    affine = series.affine.copy()
    affine[:3, 3] += kept.start * affine[:3, 2]
    factor, units = _units(series, slices)
    values = slices.values[kept] if factor == 1 else slices.values[kept].astype(np.float64) * factor
    window = _window(slices)
    return StoredVolume(
        values.transpose(2, 1, 0),
        affine,
        valid=None if slices.valid is None else slices.valid[kept].transpose(2, 1, 0),
        modality=series.modality,
        body_part=series.body_part,
        units=units,
        window=None if window is None else (window[0] * factor, window[1] * factor),
        notes=(*notes, *slices.notes),
    )


def _without_failed(slices: _Slices, count: int) -> slice:
    """The stack without damaged slices at its ends."""
    kept = without_damaged(slices.failed, count)
    if kept is None:
        raise next(iter(slices.failed.values()))
    if slices.failed:
        slices.notes[damaged_note(len(slices.failed))] = None
    return kept


def without_damaged(damaged: Collection[int], count: int) -> slice | None:
    """Which of `count` slices are read if those at the indices `damaged` cannot be decoded.

    Damaged slices at the ends of a stack are left out. None: one lies inside, or there are many, and the
    volume is refused.
    """
    if not damaged:
        return slice(0, count)
    good = [index for index in range(count) if index not in damaged]
    whole = bool(good) and good[-1] - good[0] + 1 == len(good)
    if not whole or len(damaged) > max(1, _DAMAGED_SHARE * count):
        return None
    return slice(good[0], good[-1] + 1)


def damaged_note(count: int) -> str:
    """The note that `without_damaged` left out `count` slices."""
    return f"{count} slice{'s' if count > 1 else ''} at the end of the stack skipped: damaged"


def _check_limits(series: Series, path: epath.Path, limits: Limits) -> None:
    voxels = series.rows * series.columns * series.slices
    if voxels > limits.voxels:
        raise UserError(
            f"{path}: {voxels} voxels, more than the limit of {limits.voxels}; crop or resample it"
        )
    size = sum(file_size_of(file) for file in _by_file(series))
    if size > limits.file_bytes:
        raise UserError(
            f"{path}: {size} bytes in one series, more than the limit of {limits.file_bytes}; raise the limit"
        )


def _by_file(series: Series) -> dict[PathLike, list[tuple[int, Member]]]:
    """The slices (index in the volume, member) of each file, so that each is read once."""
    files: dict[PathLike, list[tuple[int, Member]]] = {}
    for index, member in enumerate(series.members):
        files.setdefault(member.path, []).append((index, member))
    return files


def _check_copies(series: Series, path: epath.Path, limits: Limits) -> list[str]:
    same_uid, damaged, unlike = set(series.duplicates), set(), set()
    for kept, other, is_damaged in _differing((*series.copies, *series.duplicates), limits):
        if is_damaged:
            damaged.add(other)
        elif (kept, other) in same_uid:
            unlike.add(other)
        else:
            raise UserError(
                f"{path}: series {series} has different slices at one position which no header value tells "
                f"apart ({as_path(kept.path).name} and {as_path(other.path).name}); keep one of each"
            )
    counts = {
        "equal to another at its position": len({other for _, other in series.copies} - damaged),
        "a damaged copy of another": len(damaged),
        "the SOPInstanceUID of another, which is used, but other pixels": len(unlike),
    }
    return [f"{n} slice{'s' if n > 1 else ''} skipped: {reason}" for reason, n in counts.items() if n]


def _decode(
    slices: _Slices, series: Series, dataset: pydicom.Dataset, index: int, member: Member, limits: Limits
) -> None:
    values, valid = pixels.frame_values(dataset, member.frame, member.path, limits=limits)
    shape = (len(series.members), series.rows, series.columns)
    if values.shape != shape[1:]:
        raise UserError(f"{member.path}: changed while it was read; try again")
    if slices.values is None:
        slices.values = np.empty(shape, values.dtype)
    if (dtype := np.result_type(slices.values, values)) != slices.values.dtype:
        slices.values = slices.values.astype(dtype)
    slices.values[index] = values
    if valid is not None:
        if slices.valid is None:
            slices.valid = np.ones(shape, bool)
        slices.valid[index] = valid
    places = frames.places(dataset, member.frame)
    slices.windows[index] = _own_window(places)
    slices.rescale_types[_rescale_type(places)] += 1


def _own_window(places: Sequence[Any]) -> tuple[float, float] | None:
    """The first usable window (centre, width) of a slice, unless it is no linear one."""
    function = str(frames.find(places, "VOILUTFunction") or "LINEAR").strip().upper()
    if function not in ("LINEAR", "LINEAR_EXACT"):
        return None
    centres, widths = (frames.finite_numbers(frames.find(places, f"Window{k}")) for k in ("Center", "Width"))
    for centre, width in zip(centres, widths, strict=False):
        if centre is not None and width is not None and width > 1:
            return centre, width
    return None


def _rescale_type(places: Sequence[Any]) -> str:
    if frames.find(places, "RescaleSlope") is None and frames.find(places, "ModalityLUTSequence") is None:
        return "no rescale"
    text = str(frames.find(places, "RescaleType") or frames.find(places, "ModalityLUTType") or "").strip()
    return stated_units(text, UNKNOWN) if text else ""


def _units(series: Series, slices: _Slices) -> tuple[float, str]:
    """Factor to the units of the volume, and their name."""
    if series.modality == "PT":
        uptake = suv.uptake(slices.pet)
        slices.notes |= {uptake.note: None} if uptake.note else {}
        return uptake.factor, uptake.units
    if len(slices.rescale_types) > 1:
        slices.notes["slices state different rescale types; units are unknown"] = None
        return 1.0, UNKNOWN
    (stated,) = slices.rescale_types
    if stated == "no rescale":
        if series.modality == "CT":
            slices.notes["no rescale slope and intercept; stored values are taken for HU"] = None
            return 1.0, "HU"
        return 1.0, UNKNOWN
    if series.modality == "CT" and stated in ("", "HU"):
        return 1.0, "HU"
    if stated in ("", "US", UNKNOWN):  # US: unspecified
        return 1.0, UNKNOWN
    return 1.0, stated


def _window(slices: _Slices) -> tuple[float, float] | None:
    """The window that all slices state, otherwise that of the middle slice."""
    windows = set(slices.windows.values())
    return windows.pop() if len(windows) == 1 else slices.windows[len(slices.windows) // 2]
