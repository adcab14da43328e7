"""DICOM pixels: decoded and rescaled values, and pictures as they are meant to be seen.

A picture goes through the stages of PS3.3 C.7.6.3 and PS3.4 N.2: stored values, Modality LUT or rescale, VOI
LUT or window, polarity. Each stage is applied or refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import numpy as np
import pydicom
from pydicom.encaps import get_frame, parse_basic_offsets
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import RLELossless, VLWholeSlideMicroscopyImageStorage

from vilam3_jax.data.dicom import codecs, display
from vilam3_jax.data.dicom.frames import code_of
from vilam3_jax.data.dicom.headers import (
    functional_group,
    items,
    naming,
    numbers,
    overlay_planes,
    read_dataset,
    short,
)
from vilam3_jax.data.dicom.layout import GREY, PALETTE, Layout, check_frame, read_layout
from vilam3_jax.data.dicom.lookup_tables import Table, palette, read_table
from vilam3_jax.data.intensity import percentile_limits, usable_values
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.errors import UserError, warn_of
from vilam3_jax.runtime.paths import PathLike

_ASPECT_TOLERANCE = 0.01
_PIXEL_SHAPES = {
    "PixelAspectRatio": "Pixel Aspect Ratio",
    "PixelSpacing": "Pixel Spacing",
    "ImagerPixelSpacing": "Imager Pixel Spacing",
    "NominalScannedPixelSpacing": "Nominal Scanned Pixel Spacing",
}
_PIXELS_AT_ONCE = 1 << 20  # brought to grey, in float64
# From YCbCr of the range 16..235 (16..240 for chroma) to RGB: the inverse of PS3.3 C.7.6.3.1.2.
_FROM_YBR_PARTIAL = np.linalg.inv(
    [[0.2568, 0.5041, 0.0979], [-0.1482, -0.2910, 0.4392], [0.4392, -0.3678, -0.0714]]
)


@dataclasses.dataclass(frozen=True, eq=False)
class DicomPicture:
    """One frame as it is meant to be seen.

    Attributes:
      pixels: uint8, [H, W] grey or [H, W, 3] RGB.
      modality: DICOM's code as the file states it, or "unknown".
      body_part: as the file states it, upper case, or "unknown".
      frame: which frame this is, from 0.
      frames: how many the file holds.
      notes: what was assumed, chosen or left out; they name no patient.
    """

    pixels: np.ndarray
    modality: str
    body_part: str
    frame: int
    frames: int
    notes: tuple[str, ...] = ()


def read_film(path: PathLike) -> np.ndarray:
    """Reads a DICOM file as a picture: `read_picture(path).pixels`, its notes issued as `InputWarning`s.

    Returns:
      uint8, [H, W] grey or [H, W, 3] RGB.

    Raises:
      UserError: see `read_picture`.
    """
    picture = read_picture(path)
    warn_of(picture.notes, path)
    return picture.pixels


def read_picture(
    path: PathLike, *, frame: int | None = None, voi: int = 0, limits: Limits = DEFAULT_LIMITS
) -> DicomPicture:
    """Reads one frame of a DICOM file as it is meant to be seen.

    Grey goes through Modality LUT or rescale, then the chosen VOI LUT or window (LINEAR, LINEAR_EXACT,
    SIGMOID). A file without either is shown as it is if its values have up to 8 bits, otherwise between the
    0.5 and 99.5 percentiles of the valid pixels. MONOCHROME1 and Presentation LUT Shape INVERSE each ask for
    an inverted picture; where both are stated, it is inverted once. Padding is black. Colour becomes RGB of 8
    bits.

    Args:
      path: a DICOM file.
      frame: which frame, from 0; None: the only one, or the middle one of several.
      voi: which of the file's display settings: its VOI LUTs come first, then its windows.
      limits: bounds, checked by the header before anything is decoded.

    Raises:
      UnavailableError: the disk or the network fails.
      UserError: names the file and what is wrong: not DICOM, no pixels, a photometric interpretation or
        transfer syntax that is not read, no such frame or display setting, a contradictory header, pixel data
        that is cut short or damaged, over a limit.
    """
    with naming(path):
        dataset = read_dataset(path, limits=limits)
        layout = read_layout(dataset, path, limits)
        notes = [*layout.notes]
        if frame is None:
            frame = layout.frames // 2
            if layout.frames > 1:
                notes.append(f"frame {frame} of 0 to {layout.frames - 1} is shown, the middle one")
        check_frame(frame, layout, path)
        if layout.photometric in GREY:
            pixels = _grey_picture(dataset, layout, frame, voi, path, notes)
        elif layout.photometric == PALETTE:
            indices = _samples(dataset, layout, frame, path, notes).values
            pixels = palette(dataset, indices, notes)
        else:
            pixels = _colour_picture(dataset, layout, frame, path, notes)
        notes += _general_notes(dataset)
        return DicomPicture(
            pixels,
            code_of(dataset.get("Modality")),
            code_of(dataset.get("BodyPartExamined")),
            frame,
            layout.frames,
            tuple(dict.fromkeys(notes)),
        )


def frame_values(
    dataset: pydicom.Dataset, frame: int, path: PathLike, *, limits: Limits = DEFAULT_LIMITS
) -> tuple[np.ndarray, np.ndarray | None]:
    """Decodes one grey frame and rescales it.

    Args:
      dataset: what `headers.read_dataset` returns.
      frame: from 0.
      path: named in errors.
      limits: bounds, checked by the header before decoding.

    Returns:
      values [rows, columns]: the stored numbers after the Modality LUT, or after the slope and intercept of
      this frame, rounded to float32 and applied in float64; integers where there is nothing to apply. Real
      World Value Mapping is not applied.
      valid [rows, columns] bool, False at Pixel Padding Value (or its range); None: no padding.

    Raises:
      UserError: colour, no such frame, over a limit, or pixels that cannot be decoded.
    """
    with naming(path):
        layout = read_layout(dataset, path, limits)
        check_frame(frame, layout, path)
        if layout.photometric not in GREY:
            raise UserError(
                f"{path}: pixels of {layout.photometric} are colours, not measurements; read it as a picture"
            )
        values, valid, _ = _grey_values(dataset, layout, frame, path, [])
        return values, valid


def value_notes(
    dataset: pydicom.Dataset, path: PathLike, *, limits: Limits = DEFAULT_LIMITS
) -> tuple[str, ...]:
    """What `frame_values` assumes about the first frame, as sentences for the notes of a volume."""
    with naming(path):
        layout = read_layout(dataset, path, limits)
        notes = [*layout.notes]
        _modality(dataset, layout, 0, notes)
        mapping = "RealWorldValueMappingSequence"
        if items(dataset, mapping) or functional_group(dataset, 0, mapping):
            notes.append("the Real World Value Mapping is not applied")
        return tuple(dict.fromkeys(notes))


# ---- stored samples of one frame


@dataclasses.dataclass(frozen=True, eq=False)
class _Samples:
    """Decoded samples of one frame.

    Attributes:
      values: [rows, columns] or [rows, columns, 3].
      photometric: interpretation of `values`, which a decoder may have changed.
      cells: `values` with all bits of a cell, also those that are not part of the value; None: not kept.
    """

    values: np.ndarray
    photometric: str
    cells: np.ndarray | None = None


def _samples(
    dataset: pydicom.Dataset, layout: Layout, frame: int, path: PathLike, notes: list[str]
) -> _Samples:
    if layout.syntax.is_encapsulated:
        return _compressed_samples(dataset, layout, frame, path, notes)
    return _native_samples(dataset, layout, frame, path, notes)


def _native_samples(
    dataset: pydicom.Dataset, layout: Layout, frame: int, path: PathLike, notes: list[str]
) -> _Samples:
    element = dataset[layout.keyword]
    data = cast(bytes, element.value)
    # YBR_PARTIAL_422 is packed like YBR_FULL_422, the only one of the two that pydicom unpacks.
    photometric = layout.photometric.replace("YBR_PARTIAL_422", "YBR_FULL_422")
    if photometric in ("YBR_ICT", "YBR_RCT"):
        raise UserError(
            f"{path}: {photometric} belongs to JPEG 2000, its pixels are not compressed; correct the header "
            "or export it again"
        )
    share = 2 / 3 if photometric == "YBR_FULL_422" else 1
    bits = layout.rows * layout.columns * layout.samples * layout.bits_allocated
    expected = math.ceil(bits * layout.frames * share / 8)
    if len(data) < expected:
        raise UserError(
            f"{path}: {len(data)} bytes of pixel data, {expected} were expected; it is cut short or its "
            "header is wrong, fetch it again"
        )
    spare = len(data) - expected
    if share < 1 and spare >= expected // 2:
        raise UserError(
            f"{path}: {len(data)} bytes of pixel data, YBR_FULL_422 has {expected}; correct the photometric "
            "interpretation (RGB or YBR_FULL?)"
        )
    if spare > 1:
        notes.append(f"{spare} bytes after the last frame that Number of Frames counts are left out")
    if layout.bits_allocated == 1:
        return _Samples(_packed_bits(data, layout, frame), layout.photometric)
    options = layout.options(photometric) | {
        "number_of_frames": layout.frames,
        "pixel_keyword": layout.keyword,
        "pixel_vr": str(element.VR),
        "correct_unused_bits": False,  # pydicom takes High Bit for granted
        "allow_excess_frames": False,
    }
    raw, _ = get_decoder(layout.syntax).as_array(data, index=frame, raw=True, **options)
    raw = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    if raw.dtype.kind == "f":
        return _Samples(raw, layout.photometric)
    return _Samples(_used_bits(raw, layout), layout.photometric, raw)


def _packed_bits(data: bytes, layout: Layout, frame: int) -> np.ndarray:
    """One frame of single bits; it may start and end inside a byte, where pydicom loses the last bits."""
    size = layout.rows * layout.columns
    start, offset = divmod(frame * size, 8)
    packed = np.frombuffer(data, np.uint8, -(-(offset + size) // 8), start)
    return np.unpackbits(packed, bitorder="little")[offset : offset + size].reshape(
        layout.rows, layout.columns
    )


def _used_bits(raw: np.ndarray, layout: Layout) -> np.ndarray:
    """Drops what lies above High Bit and below the stored bits (overlays, noise), and extends the sign."""
    if layout.bits_stored == layout.bits_allocated:
        return raw
    width = layout.bits_allocated // 8
    moved = raw.view(f"u{width}") << np.uint64(layout.bits_allocated - 1 - layout.high_bit).astype(
        f"u{width}"
    )
    kind = "i" if layout.signed else "u"
    unused = np.uint64(layout.bits_allocated - layout.bits_stored).astype(f"{kind}{width}")
    return moved.view(f"{kind}{width}") >> unused


def _compressed_samples(
    dataset: pydicom.Dataset, layout: Layout, frame: int, path: PathLike, notes: list[str]
) -> _Samples:
    name = layout.syntax.name
    if layout.keyword != "PixelData":
        raise UserError(f"{path}: compressed {layout.keyword} is not defined; export it again")
    try:
        coded = _coded_frame(dataset, layout, frame, notes)
        seen = codecs.inspect(coded, layout.syntax) if codecs.is_known(layout.syntax) else None
    except ValueError as error:
        raise UserError(f"{path}: damaged pixels of {name} ({short(error)}); fetch it again") from error
    photometric = layout.photometric
    if seen is not None:
        if (seen.rows, seen.columns, seen.components) != (layout.rows, layout.columns, layout.samples):
            raise UserError(
                f"{path}: a compressed frame of {seen.rows} x {seen.columns} with {seen.components} samples, "
                f"the header says {layout.rows} x {layout.columns} with {layout.samples}; export it again"
            )
        if seen.precision > layout.bits_allocated:
            raise UserError(
                f"{path}: a compressed frame of {seen.precision} bits, the header allocates "
                f"{layout.bits_allocated}; export it again"
            )
        is_rgb = photometric in ("RGB", "YBR_ICT", "YBR_RCT")  # the last two after decoding
        if seen.colour and (seen.colour == "RGB") != is_rgb:
            notes.append(f"the compressed frame holds {seen.colour}, the header says {photometric}")
            photometric = seen.colour
    try:
        values = codecs.decode(coded, layout.syntax, layout.options(photometric))
    except codecs.NoDecoderError as error:
        fix = "`pip install 'vilam3-jax[dicom]'`, or export" if error.is_known else "export"
        raise UserError(
            f"{path}: no decoder for the transfer syntax {name}; {fix} it as Explicit VR Little Endian"
        ) from error
    except Exception as error:  # each codec has errors of its own
        raise UserError(f"{path}: damaged pixels of {name} ({short(error)}); fetch it again") from error
    if photometric in ("YBR_ICT", "YBR_RCT"):
        if layout.syntax not in codecs.JPEG_2000:
            raise UserError(
                f"{path}: {photometric} belongs to JPEG 2000, the transfer syntax is {name}; correct the "
                "header or export it again"
            )
        photometric = "RGB"  # the decoder undid the transform
    if layout.syntax == RLELossless:
        return _Samples(_used_bits(values, layout), photometric, values)
    values = _signed(values, layout, seen)
    if (
        layout.samples == 1
        and not layout.stored_range[0] <= values.min() <= values.max() <= layout.stored_range[1]
    ):
        notes.append(
            f"values need more than the {layout.bits_stored} bits that the header states; all are kept"
        )
    return _Samples(values, photometric)


def _coded_frame(dataset: pydicom.Dataset, layout: Layout, frame: int, notes: list[str]) -> bytes:
    data = cast(bytes, dataset.PixelData)
    offsets = parse_basic_offsets(data)
    if len(offsets) > layout.frames:
        notes.append(f"Number of Frames counts {layout.frames} of the {len(offsets)} frames that are there")
    extended = None
    if "ExtendedOffsetTable" in dataset and "ExtendedOffsetTableLengths" in dataset:
        extended = (cast(bytes, dataset.ExtendedOffsetTable), cast(bytes, dataset.ExtendedOffsetTableLengths))
    return get_frame(data, frame, number_of_frames=layout.frames, extended_offsets=extended)


def _signed(values: np.ndarray, layout: Layout, seen: codecs.Frame | None) -> np.ndarray:
    """Gives samples the sign that the header states; JPEG and JPEG-LS store bit patterns without one."""
    precision = seen.precision if seen is not None else layout.bits_stored
    if layout.syntax in codecs.KEEPS_CELLS:
        precision = min(precision, layout.bits_stored)
    width = 8 * values.dtype.itemsize
    if (values.dtype.kind == "i") == layout.signed and layout.syntax in codecs.JPEG_2000:
        return values
    bits = np.uint64(width - precision).astype(f"u{width // 8}")
    kind = "i" if layout.signed else "u"
    moved = values.view(f"u{width // 8}") << bits
    return moved.view(f"{kind}{width // 8}") >> bits.astype(f"{kind}{width // 8}")


# ---- from stored values to values that mean something


def _grey_values(
    dataset: pydicom.Dataset, layout: Layout, frame: int, path: PathLike, notes: list[str]
) -> tuple[np.ndarray, np.ndarray | None, tuple[float, float]]:
    """Values after the modality transform, where they are valid, and the range that the header allows."""
    samples = _samples(dataset, layout, frame, path, notes)
    valid = _valid(dataset, layout, samples, notes)
    apply = _modality(dataset, layout, frame, notes)
    values = apply(samples.values)
    return values, valid, apply.range


@dataclasses.dataclass(frozen=True, eq=False)
class _Modality:
    """The Modality LUT, or slope and intercept."""

    slope: np.float64
    intercept: np.float64
    table: Table | None
    range: tuple[float, float]

    @property
    def is_identity(self) -> bool:
        return self.table is None and (self.slope, self.intercept) == (1, 0)

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        if self.table is not None:
            return self.table.look_up(stored)
        return stored if self.is_identity else stored.astype(np.float64) * self.slope + self.intercept


def _modality(dataset: pydicom.Dataset, layout: Layout, frame: int, notes: list[str]) -> _Modality:
    stated = functional_group(dataset, frame, "PixelValueTransformationSequence")
    item = dataset if stated is None else stated
    slope, intercept = (_finite(item, key) for key in ("RescaleSlope", "RescaleIntercept"))
    tables = items(dataset, "ModalityLUTSequence")
    if tables and layout.keyword == "PixelData":
        if slope is not None or intercept is not None:
            notes.append("the file has a Modality LUT and a rescale slope; the LUT is applied")
        table = read_table(tables[0], layout.stored_range, dataset, notes)
        return _Modality(np.float64(1), np.float64(0), table, (0, table.largest))
    if slope == 0:
        notes.append("a Rescale Slope of 0 is taken as 1")
    elif slope is None and intercept is not None:
        notes.append("Rescale Slope is missing beside Rescale Intercept and is taken as 1")
    # float32 first: a NIfTI header can store no more, and both files of one scan must give the same numbers.
    factor, offset = np.float64(np.float32(slope or 1)), np.float64(np.float32(intercept or 0))
    ends = [float(end * factor + offset) for end in layout.stored_range]
    return _Modality(factor, offset, None, (min(ends), max(ends)))


def _valid(
    dataset: pydicom.Dataset, layout: Layout, samples: _Samples, notes: list[str]
) -> np.ndarray | None:
    """Where stored values are not padding; None: everywhere."""
    prefix = layout.keyword.removesuffix("Data").removesuffix("Pixel")
    stated = numbers(dataset, f"{prefix}PixelPaddingValue")[:1]
    if not stated:
        return None
    stated += numbers(dataset, f"{prefix}PixelPaddingRangeLimit")[:1]
    if None in stated:
        notes.append("Pixel Padding Value is not a number and is ignored")
        return None
    if layout.keyword != "PixelData":
        ends, values = [cast(float, value) for value in stated], samples.values
    else:
        ends, values = _as_stored(cast(list[float], stated), layout, samples)
    if not ends:
        notes.append("Pixel Padding Value lies outside what the pixels can store and is ignored")
        return None
    padding = (values >= min(ends)) & (values <= max(ends))
    return ~padding if padding.any() else None


def _as_stored(stated: list[float], layout: Layout, samples: _Samples) -> tuple[list[float], np.ndarray]:
    """Padding values as the pixels store them, and the pixels to compare them with.

    A signed value may be written as unsigned and the other way round; and padding may use the bits of a cell
    that values do not use.
    """

    def within(bounds: tuple[int, int]) -> list[float]:
        found = [
            next((v for v in (value, value - 65536, value + 65536) if bounds[0] <= v <= bounds[1]), None)
            for value in stated
        ]
        return [] if None in found else cast(list[float], found)

    ends = within(layout.stored_range)
    if ends or samples.cells is None:
        return ends, samples.values
    cells = samples.cells.view(f"u{samples.cells.dtype.itemsize}")
    return within((0, (1 << layout.bits_allocated) - 1)), cells


def _finite(item: pydicom.Dataset, keyword: str) -> float | None:
    """The one number of an element, None where it is absent or empty."""
    found = numbers(item, keyword)
    if not found:
        return None
    if found[0] is None or not math.isfinite(found[0]):
        raise ValueError(f"{keyword} is not a number")
    return found[0]


# ---- grey pictures


def _grey_picture(
    dataset: pydicom.Dataset, layout: Layout, frame: int, voi: int, path: PathLike, notes: list[str]
) -> np.ndarray:
    values, valid, bounds = _grey_values(dataset, layout, frame, path, notes)
    usable = usable_values(values, valid)
    if usable is not None:
        if not usable.any():
            raise UserError(f"{path}: not one pixel holds a value (padding or NaN); export it again")
        high = np.isposinf(values) if values.dtype.kind == "f" else False
        values = np.where(usable, values, np.where(high, values[usable].max(), values[usable].min()))
        usable = usable | high
    setting = display.choose(dataset, frame, voi, bounds, path, notes)
    if setting is None:
        is_display_value = layout.bits_stored <= 8 and bounds == (0, layout.stored_range[1])
        low, high = bounds if is_display_value else _limits(values, usable)
        setting = display.between(low, high)
    grey = np.empty(values.shape, np.uint8)
    step = max(_PIXELS_AT_ONCE // layout.columns, 1)
    for row in range(0, layout.rows, step):
        grey[row : row + step] = np.rint(setting.apply(values[row : row + step]) * 255)
    if _is_inverted(dataset, layout, notes):
        grey = 255 - grey
    if usable is not None:
        grey[~usable] = 0
    return grey


def _limits(values: np.ndarray, usable: np.ndarray | None) -> tuple[float, float]:
    low, high = percentile_limits(values, usable)
    if high > low:
        return low, high
    flat = values if usable is None else values[usable]  # nearly all pixels are alike: show what differs
    return float(flat.min()), float(flat.max())


def _is_inverted(dataset: pydicom.Dataset, layout: Layout, notes: list[str]) -> bool:
    """Whether small values are bright. An ordinary DX states it twice, which means once."""
    by_photometric = layout.photometric == "MONOCHROME1"
    shape = str(dataset.get("PresentationLUTShape") or "").strip().upper()
    if shape == "IDENTITY" and by_photometric:
        notes.append("Presentation LUT Shape IDENTITY contradicts MONOCHROME1; the picture is inverted")
    elif shape == "INVERSE" and not by_photometric:
        notes.append("Presentation LUT Shape INVERSE beside MONOCHROME2; the picture is inverted")
    elif shape not in ("", "IDENTITY", "INVERSE"):
        notes.append("an unknown Presentation LUT Shape is ignored")
    return by_photometric or shape == "INVERSE"


# ---- colour pictures


def _colour_picture(
    dataset: pydicom.Dataset, layout: Layout, frame: int, path: PathLike, notes: list[str]
) -> np.ndarray:
    samples = _samples(dataset, layout, frame, path, notes)
    values, photometric = samples.values, samples.photometric
    if layout.signed:
        raise UserError(f"{path}: signed colours make no sense; export it again")
    if photometric == "YBR_PARTIAL_422":
        values = _from_ybr_partial(values)
    elif photometric != "RGB":
        if values.dtype != np.uint8:
            raise UserError(f"{path}: {photometric} of more than 8 bits is not read here; export it as RGB")
        values = convert_color_space(values, "YBR_FULL", "RGB")
    if values.dtype == np.uint8 and layout.bits_stored >= 8:
        return values
    if layout.bits_stored > 8:
        return (values >> np.uint64(layout.bits_stored - 8).astype(values.dtype)).astype(np.uint8)
    return np.rint(values * (255 / layout.stored_range[1])).astype(np.uint8)


def _from_ybr_partial(values: np.ndarray) -> np.ndarray:
    rgb = (values.astype(np.float64) - [16, 128, 128]) @ _FROM_YBR_PARTIAL.T
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


# ---- what else a user should know


def _general_notes(dataset: pydicom.Dataset) -> list[str]:
    notes = []
    if overlay_planes(dataset):
        notes.append("overlay planes are not drawn")
    if str(dataset.get("PixelPresentation") or "").strip().upper() in ("COLOR", "MIXED"):
        notes.append("the supplemental colour palette is not applied; the grey is shown")
    if "PresentationLUTSequence" in dataset:
        notes.append("the Presentation LUT Sequence is not applied")
    if str(dataset.get("PresentationIntentType") or "").strip().upper() == "FOR PROCESSING":
        notes.append("the file holds data for processing, not for presentation")
    if dataset.get("SOPClassUID") == VLWholeSlideMicroscopyImageStorage:
        notes.append("a frame of a whole-slide image is one tile of it")
    for keyword, name in _PIXEL_SHAPES.items():
        pair = numbers(dataset, keyword)
        if len(pair) == 2 and None not in pair:
            down, across = cast(list[float], pair)
            if down > 0 and across > 0 and abs(down / across - 1) > _ASPECT_TOLERANCE:
                notes.append(
                    f"pixels are not square ({name} {down:g} to {across:g}); the picture is not stretched"
                )
                break
    return notes
