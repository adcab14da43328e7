"""Decoders of compressed DICOM frames: imagecodecs, otherwise pydicom's plugins."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import pydicom.uid as uids
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, RLELossless

_PROGRESSIVE_JPEG = (UID("1.2.840.10008.1.2.4.53"), UID("1.2.840.10008.1.2.4.55"))  # retired
_LOSSLESS_JPEG = (uids.JPEGLossless, uids.JPEGLosslessSV1)
_JPEG = (uids.JPEGBaseline8Bit, uids.JPEGExtended12Bit, *_PROGRESSIVE_JPEG, *_LOSSLESS_JPEG)
_JPEG_LS = (uids.JPEGLSLossless, uids.JPEGLSNearLossless)
JPEG_2000 = (uids.JPEG2000Lossless, uids.JPEG2000, uids.HTJ2KLossless, uids.HTJ2KLosslessRPCL, uids.HTJ2K)

_START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_MAX_RLE_PADDING = 256  # bytes; some writers pad segments

# These codecs code whole pixel cells without loss, including the bits outside Bits Stored.
WHOLE_CELL_CODECS = (*_LOSSLESS_JPEG, uids.JPEGLSLossless)

_Decoder = Callable[[bytes, dict[str, Any]], np.ndarray]


class NoDecoderError(Exception):
    """No installed package decodes the transfer syntax; `is_known` if another package does."""

    def __init__(self, *, is_known: bool) -> None:
        super().__init__()
        self.is_known = is_known


@dataclasses.dataclass(frozen=True)
class FrameHeader:
    """Header of a compressed frame.

    `colour` is "RGB" or "YBR_FULL" if a marker, the component names, subsampled chroma or the component
    transform of JPEG 2000 determine it, otherwise None.
    """

    rows: int
    columns: int
    components: int  # samples per pixel
    precision: int  # bits per sample
    colour: str | None = None


def is_decodable(syntax: UID) -> bool:
    """Whether an installed package decodes frames of this transfer syntax."""
    if _decoder(syntax) is not None:
        return True
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def read_frame_header(coded: bytes, syntax: UID) -> FrameHeader | None:
    """Parses the header of a coded frame; None for RLE, which has none, and unknown syntaxes.

    Raises `ValueError` if it is truncated or not in the format of the transfer syntax.
    """
    try:
        if syntax in JPEG_2000:
            return _jpeg_2000_header(coded)
        return _jpeg_header(coded) if syntax in (*_JPEG, *_JPEG_LS) else None
    except (struct.error, IndexError) as error:
        raise ValueError("the compressed frame ends inside its header") from error


def _jpeg_2000_header(coded: bytes) -> FrameHeader:
    start = _codestream_start(coded)
    x1, y1, x0, y0 = struct.unpack_from(">4L", coded, start + 8)
    (components,) = struct.unpack_from(">H", coded, start + 40)
    depth = coded[start + 42]
    marker = start + 2
    while coded[marker : marker + 2] != b"\xff\x52":  # COD (coding style), in every main header
        if coded[marker] != 0xFF or coded[marker + 1] == 0x90:
            raise ValueError("a damaged JPEG 2000 codestream")
        marker += 2 + struct.unpack_from(">H", coded, marker + 2)[0]
    sampling = {coded[start + 43 + 3 * index : start + 45 + 3 * index] for index in range(components)}
    if len(sampling) > 1:  # not allowed in DICOM; the decoder would convert it
        raise ValueError("components of different sampling")
    colour = "RGB" if components == 3 and coded[marker + 8] else None  # the decoder inverts this transform
    return FrameHeader(y1 - y0, x1 - x0, components, (depth & 0x7F) + 1, colour)


def _codestream_start(coded: bytes) -> int:
    start = coded.find(b"\xff\x4f\xff\x51")  # some writers store a JP2 file
    if start < 0:
        raise ValueError("no JPEG 2000 codestream inside")
    return start


def _jpeg_header(coded: bytes) -> FrameHeader:
    if coded[:2] != b"\xff\xd8":
        raise ValueError("no JPEG codestream inside")
    if b"\xff\xd9" not in coded[-10:]:  # libjpeg would fill in the missing pixels
        raise ValueError("the compressed frame is cut short")
    jfif, adobe = False, None
    start = 2
    while True:
        if coded[start] != 0xFF:
            raise ValueError("a damaged JPEG codestream")
        marker = coded[start + 1]
        if marker == 0xFF:  # a fill byte
            start += 1
            continue
        (length,) = struct.unpack_from(">H", coded, start + 2)
        body = coded[start + 4 : start + 2 + length]
        if marker in _START_OF_FRAME:
            break
        if marker == 0xE0 and body.startswith(b"JFIF"):
            jfif = True
        if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = body[11]
        start += 2 + length
    precision, rows, columns, components = struct.unpack_from(">BHHB", body)
    names = bytes(body[6 : 6 + 3 * components : 3])
    sampling = body[7 : 7 + 3 * components : 3]
    colour = None
    if components == 3:
        if names in (b"RGB", b"rgb") or adobe == 0:
            colour = "RGB"
        elif jfif or adobe == 1 or len(set(sampling)) > 1:
            colour = "YBR_FULL"
    return FrameHeader(rows, columns, components, precision, colour)


def decode(coded: bytes, syntax: UID, options: dict[str, Any]) -> np.ndarray:
    """Decodes one frame without converting YCbCr to RGB.

    The component transform of JPEG 2000 is inverted, so YBR_ICT and YBR_RCT are returned as RGB.

    Args:
      coded: the concatenated fragments of the frame.
      syntax: the transfer syntax.
      options: options of pydicom's decoders (rows, columns, samples_per_pixel, ...).

    Returns:
      [rows, columns] or [rows, columns, 3] integers.

    Raises:
      NoDecoderError: no installed package decodes this syntax.
      Exception: damaged data; the class depends on the codec.
    """
    decoder = _decoder(syntax)
    if decoder is not None:
        return decoder(coded, options)
    try:
        plugins = get_decoder(syntax)
    except NotImplementedError as error:
        raise NoDecoderError(is_known=syntax in _PROGRESSIVE_JPEG) from error
    if not plugins.is_available:
        raise NoDecoderError(is_known=True)
    options = options | {"number_of_frames": 1, "pixel_keyword": "PixelData", "extended_offsets": None}
    return plugins.as_array(encapsulate([coded], has_bot=False), index=0, raw=True, **options)[0]


def _decoder(syntax: UID) -> _Decoder | None:
    if syntax in _JPEG and imagecodecs.JPEG8.available:
        return _decode_jpeg
    if syntax in _JPEG_LS and imagecodecs.JPEGLS.available:
        return lambda coded, options: imagecodecs.jpegls_decode(coded)
    if syntax in JPEG_2000 and imagecodecs.JPEG2K.available:
        # The bare codestream: the decoder would apply the colour space of an enclosing JP2 file.
        return lambda coded, options: imagecodecs.jpeg2k_decode(coded[_codestream_start(coded) :])
    if syntax == RLELossless and imagecodecs.PACKBITS.available:
        return _decode_rle
    return None


def _decode_jpeg(coded: bytes, options: dict[str, Any]) -> np.ndarray:
    if options["samples_per_pixel"] == 1:
        return imagecodecs.jpeg8_decode(coded)
    # Equal input and output colour spaces disable libjpeg's conversion, regardless of the markers.
    return imagecodecs.jpeg8_decode(coded, colorspace="YCBCR", outcolorspace="YCBCR")


def _decode_rle(coded: bytes, options: dict[str, Any]) -> np.ndarray:
    """Byte planes, most significant first, each packed as PackBits (PS3.5 annex G)."""
    rows, columns, samples = options["rows"], options["columns"], options["samples_per_pixel"]
    width = max(options["bits_allocated"] // 8, 1)
    count, *offsets = struct.unpack_from("<16L", coded)
    if count != samples * width:
        raise ValueError(f"{count} RLE segments, expected {samples * width}")
    size = rows * columns
    offsets = [*offsets[:count], len(coded)]
    planes = np.empty((samples, width, size), np.uint8)
    for index in range(count):
        segment = coded[offsets[index] : offsets[index + 1]]
        unpacked = imagecodecs.packbits_decode(segment, out=size + _MAX_RLE_PADDING)
        if len(unpacked) < size:
            raise ValueError(f"an RLE segment of {len(unpacked)} bytes, expected {size}")
        planes[index // width, index % width] = np.frombuffer(unpacked, np.uint8, size)
    values = np.moveaxis(planes, 1, -1).copy().view(f">u{width}")[..., 0].astype(f"u{width}")
    grid = np.moveaxis(values.reshape(samples, rows, columns), 0, -1)
    return grid[..., 0] if samples == 1 else np.ascontiguousarray(grid)
