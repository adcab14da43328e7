"""DICOM series: listing the series of a folder, and reading one as a volume."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pydicom
from etils import epath

from vilam3_jax.data.dicom import frames, pixels, suv
from vilam3_jax.data.dicom.grouping import (
    CINE,
    IMAGE,
    VOLUME,
    FileFrames,
    Member,
    Series,
    Skipped,
    file_frames,
    group_files,
    skipped_notes,
)
from vilam3_jax.data.dicom.headers import is_directory, read_dataset, read_header, wrap_dicom_errors
from vilam3_jax.data.folder_walk import list_files
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.stored_volume import UNKNOWN, StoredVolume
from vilam3_jax.data.volume_io import stated_units, wrap_file_errors
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime.paths import PathLike, as_path, file_size

DAMAGED_HEADER = "a damaged DICOM header"
_DAMAGED_SHARE = 0.02
_LISTED = 10  # series or files named in a message
_SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")


def read_series(
    path: PathLike, *, series: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> StoredVolume:
    """Reads the slices of one series as a volume.

    Args:
      path: a folder (including subfolders), a file of one slice, a multi-frame volume, or a DICOMDIR, which
        stands for its folder.
      series: SeriesInstanceUID or `Series.identifier` of a series in the folder; None: the only volume.
      limits: bounds on files, bytes and voxels, checked against the headers before pixels are decoded.

    Returns:
      values [columns, rows, slices], rescaled; `valid` is False for padding. Units are "HU" for CT and
      "SUVbw" for PET where the header allows it. `notes` list assumptions and skipped files.

    Raises:
      UnavailableError: disk or network failure.
      UserError: no volume, several volumes (listed in the message), missing or duplicate slices, irregular
        geometry, damaged files, or above a limit.
    """
    path = as_path(path)
    found, skipped = survey(path, limits=limits)
    chosen, notes = _choose(found, skipped, series, path, limits)
    stored = read_listed(chosen, path, limits=limits)
    return dataclasses.replace(stored, notes=(*notes, *skipped_notes(skipped), *stored.notes))


def read_listed(series: Series, path: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> StoredVolume:
    """Reads a series found by `survey(path)` without listing the folder again; raises as `read_series`."""
    if series.problem is not None:
        raise UserError(f"{path}: series {series} cannot be read as a volume: {series.problem}")
    path = as_path(path)
    size = 0
    for file in _by_file(series):
        with wrap_file_errors(file):
            size += file_size(file)
    if fault := over_limits(series, size, limits):
        raise UserError(f"{path}: {fault}; crop or resample it, or raise the limit")
    notes = [*series.notes, *_check_copies(series, path, limits)]
    slices = _Slices()
    for file, members in _by_file(series).items():
        try:
            dataset = read_dataset(file, limits=limits)
            with wrap_dicom_errors(file):
                for index, member in members:
                    _decode(slices, series, dataset, index, member, limits)
                slices.notes |= dict.fromkeys(pixels.value_notes(dataset, file, limits=limits))
                if series.modality == "PT":
                    slices.pet.append(suv.facts_of(dataset))
        except UnavailableError:
            raise
        except UserError as error:
            slices.failed |= {index: error for index, _ in members}
    kept = without_damaged(slices.failed, len(series.members))
    if kept is None:
        raise next(iter(slices.failed.values()))
    if slices.failed:
        slices.notes[damaged_note(len(slices.failed))] = None
    assert slices.values is not None and series.affine is not None
    affine = series.affine.copy()
    affine[:3, 3] += kept.start * affine[:3, 2]
    factor, units = _units(series, slices)
    values = slices.values[kept] if factor == 1 else slices.values[kept].astype(np.float64) * factor
    # The common window of all slices, otherwise that of the middle slice.
    windows = set(slices.windows.values())
    window = windows.pop() if len(windows) == 1 else slices.windows[len(slices.windows) // 2]
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


def survey(path: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> tuple[list[Series], list[Skipped]]:
    """The series in a folder and its subfolders, from the headers, and (file, reason) of the other files.

    Raises `UserError` for a missing folder or more than `limits.files` files.
    """
    path = as_path(path)
    skipped: list[Skipped] = []
    if not path.is_dir():
        header = read_header(path, limits=limits)
        if header is None:
            raise UserError(f"{path}: not a DICOM file; give a DICOM file or folder")
        if not is_directory(header):
            return group_files([file_frames(path, header)]), skipped
        path = path.parent
    listing = list_files(path, limits.files, lambda: None)
    found = group_files(_file_frames(listing.files, skipped, limits))
    skipped += [(path, reason) for reason, count in listing.skipped.items() for _ in range(count)]
    return found, skipped


def _file_frames(files: Sequence[PathLike], skipped: list[Skipped], limits: Limits) -> Iterator[FileFrames]:
    for file in files:
        try:
            header = read_header(file, limits=limits)
        except UnavailableError:
            raise
        except UserError:
            skipped.append((file, DAMAGED_HEADER))
            continue
        if header is None:
            name, suffix = as_path(file).name, as_path(file).suffix.lower()
            suffix = suffix if _SUFFIX.fullmatch(suffix) else "no suffix"
            skipped.append((file, f"not DICOM ({'a hidden file' if name.startswith('.') else suffix})"))
        elif is_directory(header):
            skipped.append((file, "a DICOMDIR; its paths are not followed"))
        else:
            yield file_frames(file, header)


def _choose(
    found: Sequence[Series], skipped: Sequence[Skipped], wanted: str | None, path: epath.Path, limits: Limits
) -> tuple[Series, list[str]]:
    """The series to read, and notes about the others."""
    if wanted is not None:
        wanted = wanted.strip()
        # By the identifier, or by the full UID with the number of the stack: 1.2.3/2.
        candidates = [s for s in found if wanted in (s.identifier, f"{s.uid}{s.identifier[12:]}")]
        candidates = candidates or [series for series in found if series.uid == wanted]
        candidates = candidates or [s for s in found if s.identifier.partition("/")[0] == wanted]
        if not candidates:
            choices = f"choose from {_list(found)}" if found else "there are no DICOM images"
            raise UserError(f"{path}: no series {wanted[:70]!r}; {choices}")
    else:
        # Localizers and single slices only if there is no stack.
        volumes = [series for series in found if series.kind == VOLUME]
        volumes = [series for series in volumes if not series.localizer] or volumes
        candidates = [series for series in volumes if series.slices > 1] or volumes
        if not candidates:
            raise UserError(f"{path}: no DICOM volume here{_alternatives(found, skipped)}")
    chosen = candidates[0]
    if len(candidates) > 1 and not _all_equal(candidates, limits):
        raise UserError(
            f"{path}: {len(candidates)} volumes to choose from; select one as the series: {_list(candidates)}"
        )
    others = [s for s in found if s is not chosen and s not in candidates]
    notes = [f"{len(candidates) - 1} equal copies of the series skipped"] if len(candidates) > 1 else []
    if wanted is None and others:
        shown = ", ".join(str(series) for series in others[:_LISTED])
        more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
        notes.append(f"{len(others)} other series skipped: {shown}{more}")
    return chosen, notes


def _list(found: Sequence[Series]) -> str:
    shown = []
    for series in found[:_LISTED]:
        problem = f"({series.problem})" if series.problem else ""
        shown.append(" ".join(filter(None, [str(series), ascii(series.uid)[1:-1], problem])))
    more = [f"{len(found) - _LISTED} more"] if len(found) > _LISTED else []
    return "; ".join([*shown, *more])


def _alternatives(found: Sequence[Series], skipped: Sequence[Skipped]) -> str:
    """The contents of a folder without a volume, and what to do."""
    reasons = [f"{series}: {series.problem}" for series in found] + skipped_notes(skipped)
    if not reasons:
        return "; the folder is empty"
    more = f"; and {len(reasons) - _LISTED} more" if len(reasons) > _LISTED else ""
    images = any(series.kind in (IMAGE, CINE) for series in found)
    advice = "read them as images" if images else "give the folder that contains the slices"
    if not found:
        advice = "give one of its files, or a folder of DICOM slices"
    return f" ({'; '.join(reasons[:_LISTED])}{more}); {advice}"


def _all_equal(candidates: Sequence[Series], limits: Limits) -> bool:
    """Whether all stacks belong to one series and have equal slices."""
    first, *others = candidates
    return all(
        other.uid == first.uid
        and other.affine is not None
        and first.affine is not None
        and len(other.members) == len(first.members)
        and np.allclose(other.affine, first.affine, atol=1e-3)
        and next(_differing(zip(first.members, other.members, strict=True), limits), None) is None
        for other in others
    )


def _differing(
    pairs: Iterable[tuple[Member, Member]], limits: Limits
) -> Iterator[tuple[Member, Member, bool]]:
    """Pairs of slices whose values differ, and whether the second one is damaged."""
    read = functools.lru_cache(maxsize=2)(read_dataset)  # slices of a multi-frame file are consecutive

    def values_of(member: Member) -> np.ndarray | None:
        """The values of a slice, None if it is damaged."""
        try:
            dataset = read(member.path, limits=limits)
            return pixels.frame_values(dataset, member.frame, member.path, limits=limits)[0]
        except UnavailableError:
            raise
        except UserError:
            return None

    for first, second in pairs:
        values, copy = values_of(first), values_of(second)
        if values is not None and (copy is None or not np.array_equal(values, copy)):
            yield first, second, copy is None


@dataclasses.dataclass
class _Slices:
    """Decoded slices, and attributes of their files."""

    values: np.ndarray | None = None  # [slices, rows, columns], of the common type of all slices
    valid: np.ndarray | None = None  # [slices, rows, columns] bool; None without padding
    failed: dict[int, UserError] = dataclasses.field(default_factory=dict)  # by slice index
    windows: dict[int, tuple[float, float] | None] = dataclasses.field(default_factory=dict)
    rescale_types: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    pet: list[suv.PetFacts] = dataclasses.field(default_factory=list)  # per file
    notes: dict[str, None] = dataclasses.field(default_factory=dict)  # an ordered set


def without_damaged(damaged: Collection[int], count: int) -> slice | None:
    """The slices to read of `count` slices, of which those at the indices `damaged` cannot be decoded.

    Damaged slices at the ends of a stack are skipped. None: a slice inside is damaged, or too many slices.
    """
    if not damaged:
        return slice(0, count)
    good = [index for index in range(count) if index not in damaged]
    whole = bool(good) and good[-1] - good[0] + 1 == len(good)
    if not whole or len(damaged) > max(1, _DAMAGED_SHARE * count):
        return None
    return slice(good[0], good[-1] + 1)


def damaged_note(count: int) -> str:
    """The note about `count` slices skipped by `without_damaged`."""
    return f"{count} slice{'s' if count > 1 else ''} at the end of the stack skipped: damaged"


def over_limits(series: Series, size: int, limits: Limits) -> str | None:
    """Why a series of `size` bytes exceeds the limits, or None."""
    voxels = series.rows * series.columns * series.slices
    if voxels > limits.voxels:
        return f"{voxels} voxels, more than the limit of {limits.voxels}"
    if size > limits.file_bytes:
        return f"{size} bytes in one series, more than the limit of {limits.file_bytes}"
    return None


def _by_file(series: Series) -> dict[PathLike, list[tuple[int, Member]]]:
    """(index in the volume, member) of the slices of each file."""
    files: dict[PathLike, list[tuple[int, Member]]] = collections.defaultdict(list)
    for index, member in enumerate(series.members):
        files[member.path].append((index, member))
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
                f"{path}: series {series} has different slices at one position without distinguishing header "
                f"values ({as_path(kept.path).name} and {as_path(other.path).name}); keep one of each"
            )
    counts = {
        "equal to another at its position": len({other for _, other in series.copies} - damaged),
        "a damaged copy of another": len(damaged),
        "different pixels under the SOPInstanceUID of another, which is used": len(unlike),
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
    scopes = frames.frame_scopes(dataset, member.frame)
    slices.windows[index] = _own_window(scopes)
    slices.rescale_types[_rescale_type(scopes)] += 1


def _own_window(scopes: Sequence[Any]) -> tuple[float, float] | None:
    """The first usable linear window (centre, width) of a slice."""
    function = str(frames.find(scopes, "VOILUTFunction") or "LINEAR").strip().upper()
    if function not in ("LINEAR", "LINEAR_EXACT"):
        return None
    centres, widths = (frames.finite_numbers(frames.find(scopes, f"Window{k}")) for k in ("Center", "Width"))
    for centre, width in zip(centres, widths, strict=False):
        if centre is not None and width is not None and width > 1:
            return centre, width
    return None


def _rescale_type(scopes: Sequence[Any]) -> str:
    if frames.find(scopes, "RescaleSlope") is None and frames.find(scopes, "ModalityLUTSequence") is None:
        return "no rescale"
    text = str(frames.find(scopes, "RescaleType") or frames.find(scopes, "ModalityLUTType") or "").strip()
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
    if series.modality == "CT" and stated in ("no rescale", "", "HU"):
        if stated == "no rescale":
            slices.notes["no rescale slope and intercept; stored values are assumed to be HU"] = None
        return 1.0, "HU"
    return 1.0, UNKNOWN if stated in ("no rescale", "", "US", UNKNOWN) else stated  # US: unspecified
