"""Shared parts of the volume readers: size checks, voxel data, companion files, units, modalities, damage."""

from __future__ import annotations

import contextlib
import gzip
import re
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from etils import epath
from nibabel.affines import voxel_sizes

from vilam3_jax.data.limits import Limits
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, check_passing, children, file_size

# Largest expansion of one compressed byte.
DEFLATE_RATIO = 1032
BZIP2_RATIO = 1 << 21  # a block of about 40 bytes can hold a run of 46 million
MAX_TRAILING_BYTES = 64 << 20  # read after the voxels to reach a checksum

METRE, MILLIMETRE, MICROMETRE = "metre", "millimetre", "micrometre"
# Lower-case singular unit of length in a header -> (name, millimetres).
_LENGTHS = {
    **dict.fromkeys(("m", "meter", "metre"), (METRE, 1e3)),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), ("centimetre", 10.0)),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), (MILLIMETRE, 1.0)),
    **dict.fromkeys(("um", "micron", "micrometer", "micrometre"), (MICROMETRE, 1e-3)),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), ("nanometre", 1e-6)),
    **dict.fromkeys(("", "?", "???", "none", "unknown"), (UNKNOWN, 1.0)),
}
_MODALITIES = frozenset(
    (
        *("BDUS", "BI", "CR", "CT", "DX", "ECG", "EEG", "ES", "GM", "IO", "IVOCT", "IVUS", "MG", "MR", "NM"),
        *("OCT", "OP", "OPT", "OT", "PT", "PX", "RF", "RG", "SC", "SM", "TG", "US", "XA", "XC"),
    )
)
_MODALITY_ALIASES = {"MRI": "MR", "PET": "PT"}


def unit_notes(unit: str) -> list[str]:
    """Notes on a grid stored in `unit`: assumed where unknown, converted where not millimetres."""
    if unit == UNKNOWN:
        return ["the file states no unit of length; millimetres are assumed"]
    return [] if unit == MILLIMETRE else [f"its unit of length is the {unit}; converted to millimetres"]


def length_unit(text: str, field: str, path: PathLike) -> tuple[str, float, list[str]]:
    """Parses a unit of length, such as "mm" or "microns" ("": not stated): name, millimetres, notes.

    Raises `UserError` for a unit in this field that is not known.
    """
    # MICRO SIGN, GREEK SMALL LETTER MU, and the former in Latin-1, which is invalid UTF-8.
    word = re.sub("[\u00b5\u03bc\ufffd]", "u", text.strip().lower())
    if word not in _LENGTHS and len(word) > 3:
        word = word.removesuffix("s")
    if word not in _LENGTHS:
        raise UserError(f"{path}: the unit of length in its field {field} is not known; state mm there")
    unit, scale = _LENGTHS[word]
    return unit, scale, unit_notes(unit)


@contextlib.contextmanager
def wrap_parser_errors(path: PathLike) -> Iterator[None]:
    """Converts any exception to a one-line `UserError` that names `path`, or to `UnavailableError`.

    Third-party parsers document few of their exceptions; damaged files trigger the others.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path}: needs more memory than this machine has; crop or resample it") from error
    except Exception as error:
        check_passing(path, error)
        raise UserError(f"{path}: damaged ({one_line(error)}); fetch or export it again") from error


@contextlib.contextmanager
def wrap_file_errors(path: PathLike) -> Iterator[None]:
    """Converts errors of opening a file to a `UserError` or `UnavailableError` that names `path`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: invalid file name
        raise UserError(f"{path}: no such file; check the path") from error
    except OSError as error:
        check_passing(path, error)
        reason = error.strerror or one_line(error)
        raise UserError(f"{path}: cannot be read ({reason}); check the path") from error


def one_line(error: BaseException) -> str:
    """A third-party error message without line breaks and object addresses."""
    text = re.sub(r" ?(at )?\b0x[0-9a-fA-F]{6,}\b", "", " ".join(str(error).split()))
    return text[:200] or type(error).__name__


def check_file_size(path: PathLike, limits: Limits) -> int:
    """Returns the size of a file in bytes; raises a `UserError` above `limits.file_bytes`."""
    with wrap_file_errors(path):
        size = file_size(path)
    if size > limits.file_bytes:
        raise UserError(
            f"{path}: {size} bytes, more than the limit of {limits.file_bytes}; split it or raise the limit"
        )
    return size


def check_grid(shape: Sequence[int], itemsize: int, path: PathLike, limits: Limits) -> int:
    """Returns the size of all voxels in bytes.

    Raises `UserError` unless the grid is 3-D, not empty, and within `limits.voxels` and `.decoded_bytes`.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"{path}: {len(shape)}-D data of shape {tuple(shape)}, a 3-D volume is needed")
    # Python integers: a hostile header must not overflow the product.
    count = int(shape[0]) * int(shape[1]) * int(shape[2])
    if count > limits.voxels:
        raise UserError(f"{path}: {count} voxels, more than the limit of {limits.voxels}; crop it")
    size = count * itemsize
    if size > limits.decoded_bytes:
        raise UserError(
            f"{path}: {size} bytes of voxels, more than the limit of {limits.decoded_bytes}; crop it"
        )
    return size


def several_volumes(count: int, kind: str, path: PathLike) -> UserError:
    """The error for a file with several values per voxel."""
    return UserError(f"{path}: 4-D data with {count} {kind}; save each 3-D volume to a separate file")


def check_available(count: int, available: int, path: PathLike, *, ratio: int = 1) -> None:
    """Rejects a header that promises more bytes than the file can hold. Call it before allocating.

    `ratio` is the largest expansion of one byte, see `DEFLATE_RATIO`.
    """
    if count > max(0, available) * ratio:
        raise UserError(
            f"{path}: {available} bytes of {'compressed ' if ratio > 1 else ''}data where the header "
            f"promises {count}; it is cut short, fetch it again"
        )


def read_exactly(stream: IO[bytes], count: int, path: PathLike) -> bytes:
    """Reads `count` bytes; raises `UserError` if the stream is shorter."""
    try:
        data = stream.read(count)
    except EOFError as error:  # a compressed stream without its end
        raise UserError(f"{path}: its compressed data is cut short; fetch the file again") from error
    if len(data) < count:
        raise UserError(f"{path}: cut short after {len(data)} of {count} data bytes; fetch it again")
    return data


def read_rest(stream: IO[bytes], path: PathLike) -> tuple[str, ...]:
    """Reads the rest after the voxels, to verify the checksum of a compressed stream; a note unless empty."""
    count = 0
    try:
        while count < MAX_TRAILING_BYTES and (chunk := stream.read(1 << 20)):
            count += len(chunk)
    except gzip.BadGzipFile as error:
        if "Not a gzipped file" not in str(error):  # a wrong checksum or length
            raise
        return ("bytes after the compressed data are ignored",)
    except EOFError as error:
        raise UserError(f"{path}: its compressed data is cut short; fetch the file again") from error
    return trailing_note(count)


def trailing_note(count: int) -> tuple[str, ...]:
    """A note on `count` bytes after the voxels; empty for 0."""
    return (f"at least {count} bytes after the voxels are ignored",) if count > 0 else ()


def data_file(path: epath.Path, name: str) -> epath.Path:
    """Finds the data file that the header `path` names, in the same folder.

    Raises `UserError` if `name` is a path, a list or a pattern, or no such file is beside `path`.
    """
    name = name.removeprefix("./")
    if re.match(r"LIST\b", name) or re.search(r"%\d*[di]", name):
        raise UserError(f"{path}: its voxels are split over several files; save data and header in one file")
    if "/" in name or "\\" in name:
        raise UserError(
            f"{path}: names a data file in another folder; move it beside the header and state its bare name"
        )
    # Search a listing: `name` is text from a file and must not be used as a path.
    siblings = children(path.parent)
    same = [p for p in siblings if p.name == name]
    found = same or [p for p in siblings if p.name.casefold() == name.casefold()]
    if not found or found[0] == path:
        raise UserError(f"{path}: the data file named in its header is missing; put it into the same folder")
    return found[0]


def check_extent(affine: np.ndarray, shape: Sequence[int], unit: str, path: PathLike) -> None:
    """Rejects a grid whose size in millimetres shows that its unit of length is wrong.

    `affine` is [4, 4], index to millimetres; `unit` is METRE, MILLIMETRE, MICROMETRE, or UNKNOWN, which
    counts as millimetres.
    """
    spacing = voxel_sizes(affine)
    extent = spacing * np.asarray(shape)
    stated = "no unit of length" if unit == UNKNOWN else f"{unit} as its unit"
    if unit in (UNKNOWN, MILLIMETRE) and spacing.max() < 0.01 and extent.max() < 3:
        problem = f"its whole grid is {extent.max():.3g} mm long; it is probably in metres"
    elif spacing.min() > 100:
        likely = "millimetres" if unit == METRE else "micrometres"
        problem = f"its voxels are {spacing.min():.4g} mm wide; it is probably in {likely}"
    else:
        return
    raise UserError(f"{path}: states {stated}, and {problem}, correct the unit in the header")


def unit_normal(affine: np.ndarray) -> np.ndarray:
    """Unit vector at right angles to the first two axes of a grid; zeros if they are parallel."""
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    return normal / (np.sqrt((normal**2).sum()) or 1.0)


def geometry_notes(affine: np.ndarray) -> tuple[str, ...]:
    """A note if the axes of a grid are more than 0.5 degrees off right angles."""
    axes = affine[:3, :3] / voxel_sizes(affine)
    skew = np.rad2deg(np.arcsin(min(1.0, float(np.abs(axes.T @ axes - np.eye(3)).max()))))
    if skew <= 0.5:
        return ()
    return (f"its axes are {skew:.1f} degrees off right angles; the geometry is kept as it is",)


def without_voxels(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Zeros of `shape` in the memory of one element, in place of voxels that are not read."""
    return np.broadcast_to(np.zeros((), dtype), tuple(shape))


def rescale(values: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """`values * slope + intercept` in float64, with both factors rounded to float32 as NIfTI stores them."""
    factor, offset = np.float32(slope), np.float32(intercept)
    if factor == 1 and offset == 0:
        return values
    return values.astype(np.float64) * np.float64(factor) + np.float64(offset)


def modality_code(text: str) -> str:
    """The DICOM code of a modality stated by a file; "unknown" if unrecognised."""
    code = text.strip().upper()
    code = _MODALITY_ALIASES.get(code, code)
    return code if code in _MODALITIES else UNKNOWN


def declared_modality(declared: str, stated: str, path: PathLike) -> str:
    """The DICOM code of a modality that the caller declares as a code or common name.

    Raises `UserError` if it is unrecognised or contradicts `stated`, the code in the file.
    """
    code = modality_code(declared)
    if code == UNKNOWN:
        raise UserError(f"modality {declared!r}: not a DICOM code; use CT, MR, PT or another one")
    if stated not in (UNKNOWN, code):
        raise UserError(f"{path}: declared as {code}, but the file states {stated}; leave the modality out")
    return code


def stated_units(text: str, modality: str) -> str:
    """Units of the voxels as the file states them; HU for a CT without any."""
    text = text.strip()
    if re.fullmatch(r"hu|hounsfield( units?)?", text.lower()) or (not text and modality == "CT"):
        return "HU"
    if text.lower() == "bq/ml":
        return "Bq/ml"
    return text if re.fullmatch(r"[A-Za-z0-9/%^*. ()-]{1,16}", text) else UNKNOWN


def body_part_name(text: str) -> str:
    """Body part as the file states it, upper case; "unknown" if malformed."""
    name = " ".join(text.split()).upper()
    return name if re.fullmatch(r"[A-Z][A-Z0-9 _/&-]{1,31}", name) else UNKNOWN
