"""DICOM pixels: rescaled values, and rendering for display.

Rendering follows the stages of PS3.3 C.7.6.3 and PS3.4 N.2: stored values, Modality LUT or rescale, VOI LUT
or window, polarity. A stage that is not supported is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
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
    ImageError,
    functional_group,
    items,
    numbers,
    overlay_planes,
    read_dataset,
    wrap_dicom_errors,
)
from vilam3_jax.data.dicom.layout import GREY, PALETTE, Layout, read_layout
from vilam3_jax.data.dicom.lookup_tables import apply_palette, read_table
from vilam3_jax.data.intensity import display_limits, usable_values
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.stored_volume import LoadedImage
from vilam3_jax.data.volume_io import one_line, rescale
from vilam3_jax.runtime.paths import PathLike

_ASPECT_TOLERANCE = 0.01
_PIXEL_SHAPES = {
    "PixelAspectRatio": "Pixel Aspect Ratio",
    "PixelSpacing": "Pixel Spacing",
    "ImagerPixelSpacing": "Imager Pixel Spacing",
    "NominalScannedPixelSpacing": "Nominal Scanned Pixel Spacing",
}
_RENDERED_AT_ONCE = 1 << 20  # pixels, in float64
# YCbCr with luma 16..235 and chroma 16..240 to RGB: the inverse of PS3.3 C.7.6.3.1.2.
_FROM_YBR_PARTIAL = np.linalg.inv(
    [[0.2568, 0.5041, 0.0979], [-0.1482, -0.2910, 0.4392], [0.4392, -0.3678, -0.0714]]
)


def read_image(
    path: PathLike, *, frame: int | None = None, voi: int = 0, limits: Limits = DEFAULT_LIMITS
) -> LoadedImage:
    """Reads one frame of a DICOM file, rendered for display: uint8, [H, W] grey or [H, W, 3] RGB.

    Grey values pass the Modality LUT or rescale, then the chosen VOI LUT or window (LINEAR, LINEAR_EXACT,
    SIGMOID). Without a VOI LUT or window, values of up to 8 bits are shown unchanged, deeper values between
    the 0.5 and 99.5 percentiles of the valid pixels. MONOCHROME1 or Presentation LUT Shape INVERSE, or both,
    invert the image once. Padding is black. Colour images are converted to 8-bit RGB.

    Args:
      path: a DICOM file.
      frame: frame index, from 0; None: the only frame, or the middle one.
      voi: index of the display setting, VOI LUTs before windows.
      limits: bounds, checked against the header before decoding.

    Raises:
      UnavailableError: disk or network failure.
      UserError: not DICOM, no pixels, unsupported photometric interpretation or transfer syntax, no such
        frame or display setting, contradictory header, truncated or damaged pixels, or above a limit.
    """
    with wrap_dicom_errors(path):
        dataset = read_dataset(path, limits=limits)
        layout = read_layout(dataset, limits)
        notes = [*layout.notes]
        if frame is None:
            frame = layout.frames // 2
            if layout.frames > 1:
                notes.append(f"frame {frame} of 0 to {layout.frames - 1} is shown, the middle one")
        decoder = _FrameDecoder(dataset, layout, frame, notes)
        if layout.photometric in GREY:
            pixels = decoder.render_grey(voi)
        elif layout.photometric == PALETTE:
            pixels = apply_palette(dataset, decoder.samples().values, notes)
        else:
            pixels = decoder.render_colour()
        notes += _image_notes(dataset)
        return LoadedImage(
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
    """Decodes and rescales one grey frame.

    Args:
      dataset: as returned by `headers.read_dataset`.
      frame: frame index, from 0.
      path: named in errors.
      limits: bounds, checked against the header before decoding.

    Returns:
      values [rows, columns]: stored values after the Modality LUT, or after the frame's slope and intercept,
      rounded to float32 and applied in float64; integers if the transform is the identity. Real World Value
      Mapping is not applied.
      valid [rows, columns] bool, False at Pixel Padding Value (or its range); None: no padding.

    Raises:
      UserError: colour image, no such frame, above a limit, or pixels that cannot be decoded.
    """
    with wrap_dicom_errors(path):
        layout = read_layout(dataset, limits)
        decoder = _FrameDecoder(dataset, layout, frame, [])
        if layout.photometric not in GREY:
            raise ImageError(
                f"pixels of {layout.photometric} are colours, not measurements; read it as an image"
            )
        values, valid, _ = decoder.values()
        return values, valid


def value_notes(
    dataset: pydicom.Dataset, path: PathLike, *, limits: Limits = DEFAULT_LIMITS
) -> tuple[str, ...]:
    """The assumptions of `frame_values` about the first frame, as sentences for the notes of a volume."""
    with wrap_dicom_errors(path):
        layout = read_layout(dataset, limits)
        notes = [*layout.notes]
        _FrameDecoder(dataset, layout, 0, notes).modality_transform()
        mapping = "RealWorldValueMappingSequence"
        if items(dataset, mapping) or functional_group(dataset, 0, mapping):
            notes.append("the Real World Value Mapping is not applied")
        return tuple(dict.fromkeys(notes))


@dataclasses.dataclass(frozen=True, eq=False)
class _Samples:
    """Decoded samples of one frame."""

    values: np.ndarray  # [rows, columns] or [rows, columns, 3]
    photometric: str  # interpretation after decoding
    cells: np.ndarray | None = None  # whole pixel cells, including bits outside the value; None: unknown


_Transform = Callable[[np.ndarray], np.ndarray]
_Range = tuple[float, float]


class _FrameDecoder:
    """Decodes one frame; its methods append assumptions and corrections to `notes`."""

    def __init__(self, dataset: pydicom.Dataset, layout: Layout, frame: int, notes: list[str]) -> None:
        if not 0 <= frame < layout.frames:
            raise ImageError(f"no frame {frame}; choose one of 0 to {layout.frames - 1}")
        self.dataset, self.layout, self.frame, self.notes = dataset, layout, frame, notes

    # Stored samples

    def samples(self) -> _Samples:
        return self._compressed() if self.layout.syntax.is_encapsulated else self._native()

    def _native(self) -> _Samples:
        layout = self.layout
        element = self.dataset[layout.keyword]
        data = cast(bytes, element.value)
        # YBR_PARTIAL_422 is packed like YBR_FULL_422; pydicom unpacks only the latter.
        photometric = layout.photometric.replace("YBR_PARTIAL_422", "YBR_FULL_422")
        if photometric in ("YBR_ICT", "YBR_RCT"):
            raise ImageError(
                f"{photometric} requires JPEG 2000, but the pixels are not compressed; correct the header or "
                "export it again"
            )
        share = 2 / 3 if photometric == "YBR_FULL_422" else 1
        bits = layout.rows * layout.columns * layout.samples * layout.bits_allocated
        expected = math.ceil(bits * layout.frames * share / 8)
        if len(data) < expected:
            raise ImageError(
                f"{len(data)} bytes of pixel data, expected {expected}; it is cut short or its header is "
                "wrong, fetch it again"
            )
        spare = len(data) - expected
        if share < 1 and spare >= expected // 2:
            raise ImageError(
                f"{len(data)} bytes of pixel data, YBR_FULL_422 has {expected}; correct the photometric "
                "interpretation (RGB or YBR_FULL?)"
            )
        if spare > 1:
            self.notes.append(f"{spare} bytes after the last frame of Number of Frames are ignored")
        if layout.bits_allocated == 1:
            return _Samples(self._single_bits(data), layout.photometric)
        options = layout.options(photometric) | {
            "number_of_frames": layout.frames,
            "pixel_keyword": layout.keyword,
            "pixel_vr": str(element.VR),
            "correct_unused_bits": False,  # pydicom assumes High Bit = Bits Stored - 1
            "allow_excess_frames": False,
        }
        raw, _ = get_decoder(layout.syntax).as_array(data, index=self.frame, raw=True, **options)
        raw = raw.astype(raw.dtype.newbyteorder("="), copy=False)
        if raw.dtype.kind == "f":
            return _Samples(raw, layout.photometric)
        return _Samples(self._stored_bits(raw), layout.photometric, raw)

    def _single_bits(self, data: bytes) -> np.ndarray:
        """A frame of single bits, which may start and end inside a byte; pydicom loses its last bits."""
        shape = self.layout.rows, self.layout.columns
        size = math.prod(shape)
        start, offset = divmod(self.frame * size, 8)
        packed = np.frombuffer(data, np.uint8, -(-(offset + size) // 8), start)
        return np.unpackbits(packed, bitorder="little")[offset : offset + size].reshape(shape)

    def _stored_bits(self, cells: np.ndarray) -> np.ndarray:
        """Removes bits above High Bit and below the stored bits (overlays, noise), and applies the sign."""
        layout = self.layout
        if layout.bits_stored == layout.bits_allocated and (cells.dtype.kind == "i") == layout.signed:
            return cells
        return _extract_bits(cells, layout.high_bit, layout.bits_stored, layout.signed)

    def _compressed(self) -> _Samples:
        layout, name = self.layout, self.layout.syntax.name
        if layout.keyword != "PixelData":
            raise ImageError(f"compressed {layout.keyword} is not defined; export it again")
        try:
            coded = self._coded_frame()
            header = codecs.read_frame_header(coded, layout.syntax)
        except ValueError as error:
            raise ImageError(f"damaged pixels of {name} ({one_line(error)}); fetch it again") from error
        photometric = layout.photometric
        if header is not None:
            self._check_frame_header(header)
            is_rgb = photometric in ("RGB", "YBR_ICT", "YBR_RCT")  # the last two after decoding
            if header.colour and (header.colour == "RGB") != is_rgb:
                self.notes.append(f"the compressed frame is {header.colour}, the header states {photometric}")
                photometric = header.colour
        try:
            values = codecs.decode(coded, layout.syntax, layout.options(photometric))
        except codecs.NoDecoderError as error:
            fix = "`pip install 'vilam3-jax[dicom]'`, or export" if error.is_known else "export"
            raise ImageError(
                f"no decoder for the transfer syntax {name}; {fix} it as Explicit VR Little Endian"
            ) from error
        except Exception as error:  # the exception class depends on the codec
            raise ImageError(f"damaged pixels of {name} ({one_line(error)}); fetch it again") from error
        if photometric in ("YBR_ICT", "YBR_RCT"):
            if layout.syntax not in codecs.JPEG_2000:
                raise ImageError(
                    f"{photometric} requires JPEG 2000, but the transfer syntax is {name}; correct the "
                    "header or export it again"
                )
            photometric = "RGB"  # the decoder inverted the transform
        if layout.syntax == RLELossless:
            return _Samples(self._stored_bits(values), photometric, values)
        values = self._with_sign(values, header)
        low, high = layout.stored_range
        if layout.samples == 1 and not low <= values.min() <= values.max() <= high:
            self.notes.append(
                f"values need more than the {layout.bits_stored} bits that the header states; all are kept"
            )
        return _Samples(values, photometric)

    def _coded_frame(self) -> bytes:
        data, frames = cast(bytes, self.dataset.PixelData), self.layout.frames
        offsets = parse_basic_offsets(data)
        if len(offsets) > frames:
            self.notes.append(f"Number of Frames is {frames}, but the pixel data has {len(offsets)} frames")
        extended = None
        tables = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
        if all(table in self.dataset for table in tables):
            extended = cast(tuple[bytes, bytes], tuple(self.dataset[table].value for table in tables))
        return get_frame(data, self.frame, number_of_frames=frames, extended_offsets=extended)

    def _check_frame_header(self, header: codecs.FrameHeader) -> None:
        layout = self.layout
        if (header.rows, header.columns, header.components) != (layout.rows, layout.columns, layout.samples):
            raise ImageError(
                f"a compressed frame of {header.rows} x {header.columns} with {header.components} samples, "
                f"the header states {layout.rows} x {layout.columns} with {layout.samples}; export it again"
            )
        if header.precision > layout.bits_allocated:
            raise ImageError(
                f"a compressed frame of {header.precision} bits, the header allocates "
                f"{layout.bits_allocated}; export it again"
            )

    def _with_sign(self, values: np.ndarray, header: codecs.FrameHeader | None) -> np.ndarray:
        """Applies the sign of the header; JPEG and JPEG-LS store unsigned bit patterns."""
        layout = self.layout
        if (values.dtype.kind == "i") == layout.signed and layout.syntax in codecs.JPEG_2000:
            return values
        precision = header.precision if header is not None else layout.bits_stored
        if layout.syntax in codecs.WHOLE_CELL_CODECS:
            precision = min(precision, layout.bits_stored)
        return _extract_bits(values, precision - 1, precision, layout.signed)

    # Grey values

    def values(self) -> tuple[np.ndarray, np.ndarray | None, _Range]:
        """Values after the modality transform, where they are valid, and their possible range."""
        samples = self.samples()
        valid = self._valid(samples)
        transform, bounds = self.modality_transform()
        return transform(samples.values), valid, bounds

    def modality_transform(self) -> tuple[_Transform, _Range]:
        """The Modality LUT, or slope and intercept, and the range of its output."""
        dataset, layout, notes = self.dataset, self.layout, self.notes
        stated = functional_group(dataset, self.frame, "PixelValueTransformationSequence")
        item = dataset if stated is None else stated
        slope, intercept = (_finite(item, key) for key in ("RescaleSlope", "RescaleIntercept"))
        tables = items(dataset, "ModalityLUTSequence")
        if tables and layout.keyword == "PixelData":
            if slope is not None or intercept is not None:
                notes.append("the file has a Modality LUT and a rescale slope; the LUT is applied")
            table = read_table(tables[0], layout.stored_range, dataset, notes)
            return table.look_up, (0, table.largest)
        if slope == 0:
            notes.append("Rescale Slope is 0; 1 is assumed")
        elif slope is None and intercept is not None:
            notes.append("Rescale Slope is missing beside Rescale Intercept; 1 is assumed")
        transform = functools.partial(rescale, slope=slope or 1, intercept=intercept or 0)
        ends = [float(end) for end in transform(np.array(layout.stored_range))]
        return transform, (min(ends), max(ends))

    def _valid(self, samples: _Samples) -> np.ndarray | None:
        """Where stored values are not padding; None: everywhere."""
        prefix = self.layout.keyword.removesuffix("Data").removesuffix("Pixel")
        stated = numbers(self.dataset, f"{prefix}PixelPaddingValue")[:1]
        if not stated:
            return None
        stated += numbers(self.dataset, f"{prefix}PixelPaddingRangeLimit")[:1]
        if None in stated:
            self.notes.append("Pixel Padding Value is not a number and is ignored")
            return None
        ends, values = cast(list[float], stated), samples.values
        if self.layout.keyword == "PixelData":
            ends, values = self._stored_padding(ends, samples)
        if not ends:
            self.notes.append("Pixel Padding Value is outside the range of the pixels and is ignored")
            return None
        padding = (values >= min(ends)) & (values <= max(ends))
        return ~padding if padding.any() else None

    def _stored_padding(self, stated: list[float], samples: _Samples) -> tuple[list[float], np.ndarray]:
        """Padding values in the representation of the pixels, and the pixels to compare them with.

        A signed value may be written as unsigned and vice versa. Padding may use bits of a cell outside the
        stored bits.
        """

        def within(low: int, high: int) -> list[float]:
            found = [
                next((v for v in (value, value - 65536, value + 65536) if low <= v <= high), None)
                for value in stated
            ]
            return [] if None in found else cast(list[float], found)

        ends = within(*self.layout.stored_range)
        if ends or samples.cells is None:
            return ends, samples.values
        cells = samples.cells.view(f"u{samples.cells.dtype.itemsize}")
        return within(0, (1 << self.layout.bits_allocated) - 1), cells

    # Rendering

    def render_grey(self, voi: int) -> np.ndarray:
        """[rows, columns] uint8."""
        layout = self.layout
        values, valid, bounds = self.values()
        usable = usable_values(values, valid)
        if usable is not None:
            if not usable.any():
                raise ImageError("all pixels are padding or NaN; export it again")
            high = np.isposinf(values) if values.dtype.kind == "f" else False
            values = np.where(usable, values, np.where(high, values[usable].max(), values[usable].min()))
            usable = usable | high
        setting = display.choose(self.dataset, self.frame, voi, bounds, self.notes)
        if setting is None:
            is_display_value = layout.bits_stored <= 8 and bounds == (0, layout.stored_range[1])
            setting = display.between(*(bounds if is_display_value else display_limits(values, usable)))
        grey = np.empty(values.shape, np.uint8)
        step = max(_RENDERED_AT_ONCE // layout.columns, 1)
        for row in range(0, layout.rows, step):
            grey[row : row + step] = np.rint(setting.apply(values[row : row + step]) * 255)
        if self._is_inverted():
            grey = 255 - grey
        if usable is not None:
            grey[~usable] = 0
        return grey

    def _is_inverted(self) -> bool:
        """Whether small values are bright. DX images usually state it twice, which inverts once."""
        is_monochrome1 = self.layout.photometric == "MONOCHROME1"
        shape = str(self.dataset.get("PresentationLUTShape") or "").strip().upper()
        if shape == "IDENTITY" and is_monochrome1:
            self.notes.append(
                "Presentation LUT Shape IDENTITY contradicts MONOCHROME1; the image is inverted"
            )
        elif shape == "INVERSE" and not is_monochrome1:
            self.notes.append("Presentation LUT Shape INVERSE beside MONOCHROME2; the image is inverted")
        elif shape not in ("", "IDENTITY", "INVERSE"):
            self.notes.append("an unknown Presentation LUT Shape is ignored")
        return is_monochrome1 or shape == "INVERSE"

    def render_colour(self) -> np.ndarray:
        """[rows, columns, 3] uint8 RGB."""
        samples = self.samples()
        values, photometric = samples.values, samples.photometric
        stored = self.layout.bits_stored
        if self.layout.signed:
            raise ImageError("colours cannot be signed; export it again")
        if photometric == "YBR_PARTIAL_422":
            values = (values.astype(np.float64) - [16, 128, 128]) @ _FROM_YBR_PARTIAL.T
            values = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        elif photometric != "RGB":
            if values.dtype != np.uint8:
                raise ImageError(f"{photometric} of more than 8 bits is not supported; export it as RGB")
            values = convert_color_space(values, "YBR_FULL", "RGB")
        if values.dtype == np.uint8 and stored >= 8:
            return values
        if stored > 8:
            return (values >> np.uint64(stored - 8).astype(values.dtype)).astype(np.uint8)
        return np.rint(values * (255 / self.layout.stored_range[1])).astype(np.uint8)


def _extract_bits(cells: np.ndarray, high_bit: int, stored: int, signed: bool) -> np.ndarray:
    """The `stored` bits of each cell up to `high_bit`, sign-extended if `signed`."""
    size, kind = cells.dtype.itemsize, "i" if signed else "u"
    left = np.uint64(8 * size - 1 - high_bit).astype(f"u{size}")
    right = np.uint64(8 * size - stored).astype(f"{kind}{size}")
    return (cells.view(f"u{size}") << left).view(f"{kind}{size}") >> right


def _finite(item: pydicom.Dataset, keyword: str) -> float | None:
    """The first number of an element, None if it is absent or empty."""
    found = numbers(item, keyword)
    if not found:
        return None
    if found[0] is None or not math.isfinite(found[0]):
        raise ValueError(f"{keyword} is not a number")
    return found[0]


def _image_notes(dataset: pydicom.Dataset) -> list[str]:
    notes = []
    if overlay_planes(dataset):
        notes.append("overlay planes are not drawn")
    if str(dataset.get("PixelPresentation") or "").strip().upper() in ("COLOR", "MIXED"):
        notes.append("the supplemental colour palette is not applied; the image is grey")
    if "PresentationLUTSequence" in dataset:
        notes.append("the Presentation LUT Sequence is not applied")
    if str(dataset.get("PresentationIntentType") or "").strip().upper() == "FOR PROCESSING":
        notes.append("the image is for processing, not for presentation")
    if dataset.get("SOPClassUID") == VLWholeSlideMicroscopyImageStorage:
        notes.append("a frame of a whole-slide image is one tile of it")
    for keyword, name in _PIXEL_SHAPES.items():
        pair = numbers(dataset, keyword)
        if len(pair) == 2 and None not in pair:
            down, across = cast(list[float], pair)
            if down > 0 and across > 0 and abs(down / across - 1) > _ASPECT_TOLERANCE:
                notes.append(
                    f"pixels are not square ({name} {down:g} to {across:g}); the image is not stretched"
                )
                break
    return notes
