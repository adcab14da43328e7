"""TIFF images: one page, decoded by tifffile and converted to L, LA, RGB or RGBA by its tags."""

from __future__ import annotations

import io
import logging
import re
import struct
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from vilam3_jax.data.bit_depth import to_eight_bits, visible_mask, with_alpha
from vilam3_jax.data.image_headers import check_pixels, choose_frame, jpeg_ends_early, jpeg_frame
from vilam3_jax.data.limits import Limits
from vilam3_jax.errors import UserError

# Damage that it logs is either harmless or raised as an error here.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

_MAX_PAGES = 4096  # scanned to separate images from thumbnails
_MAX_SEGMENTS = 100_000
_MCU = 16  # a JPEG tile may exceed its part of the image by less than one block

# TIFF 6.0 and its supplements.
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR, _CIELAB, _ICCLAB = 0, 1, 2, 3, 5, 6, 8, 9
_RAW_PHOTO = (32803, 34892)  # colour filter array, linear raw
_CHANNELS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
_CHANNELS |= {_CIELAB: 3, _ICCLAB: 3}
_ASSOCIATED, _UNASSOCIATED = 1, 2  # values of ExtraSamples; 0 is not alpha
# Tags that affect decoding: size, layout, compression, colours, orientation, predictor, alpha.
_READ_TAGS = frozenset(
    (*range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, 317, 320, *range(322, 326))
)
_READ_TAGS |= {332, 338, 339, 347, 530, 32997, 32998}
_FAX = (2, 3, 4)
_JPEG = (6, 7)
# Codecs with bounded output: none, fax, LZW, JPEG, deflate, PackBits, LZMA, Zstandard.
_COMPRESSIONS = (1, *_FAX, 5, *_JPEG, 8, 32773, 32946, 34925, 50000)


def read_tiff(
    data: bytes, page: int | None, limits: Limits, notes: list[str]
) -> tuple[Image.Image, int, int, int]:
    """Decodes one page. Thumbnails and masks do not count as pages.

    Args:
      data: the whole file.
      page: index of the page; None: the only one.
      limits: checked against the tags before decoding.
      notes: gets the assumptions made.

    Returns:
      "L", "LA", "RGB" or "RGBA" image; its orientation tag (1 to 8), not applied yet; index of the page;
      number of pages.

    Raises:
      UserError: several pages and no `page`, over a limit, cut short, or an unsupported layout. Damage may
        raise any other exception.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if file.is_svs or file.is_ndpi or file.is_scn or file.is_bif or file.is_qpi or file.is_philips:
            raise UserError("whole-slide image; export the region to look at as PNG")
        pages = _pages(file)
        _reject_stack(pages)
        number = choose_frame(page, len(pages), "TIFF image", "pages")
        chosen = pages[number]
        _check_tags(chosen, data)
        photometric = _photometric(chosen, notes)
        _check_layout(chosen, photometric, len(data), limits)
        if int(chosen.compression) in _JPEG:
            _check_jpeg(chosen, data)
        try:
            samples = chosen.asarray(squeeze=False, maxworkers=1)
        except Exception as error:
            if _ends_early(chosen, len(data)):
                raise UserError("TIFF image is cut short; fetch it again") from error
            raise
        image = _to_image(chosen, photometric, samples, notes)
        orientation = _number(chosen, 274, 1)
    return image, orientation, number, len(pages)


def _pages(file: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """All pages but thumbnails and masks, unless the file has nothing else."""
    count = len(file.pages)
    if count > _MAX_PAGES:
        raise UserError(f"TIFF image of {count} pages; save the one to look at as PNG")
    pages = [page for page in file.pages if isinstance(page, tifffile.TiffPage) and page.tags]
    if not pages:
        raise UserError("TIFF file without an image; export it again")
    return [page for page in pages if not int(page.subfiletype) & (_REDUCED | _MASK)] or pages


def _reject_stack(pages: list[tifffile.TiffPage]) -> None:
    """Rejects stacks that ImageJ, tifffile or MetaMorph store behind the tags of their first plane."""
    first = pages[0]
    stated = re.search(r"^images=(\d{1,9})$", first.description, re.MULTILINE)
    planes = int(stated[1]) if stated and first.description.startswith("ImageJ=") else 1
    if '"truncated": true' in first.description:
        planes = len(pages) + 1
    if (metamorph := first.tags.get(33629)) is not None:
        planes = max(planes, metamorph.count)
    if planes > len(pages):
        raise UserError("TIFF stack that describes only some of its planes; save the one to look at as PNG")


def _check_tags(page: tifffile.TiffPage, data: bytes) -> None:
    """Rejects a page with tags that tifffile failed to read: it would use wrong defaults for them."""
    layout = page.parent.tiff
    (count,) = struct.unpack_from(layout.tagnoformat, data, page.offset)
    first = page.offset + layout.tagnosize
    offsets = range(first, first + count * layout.tagsize, layout.tagsize)
    stated = {struct.unpack_from(f"{layout.byteorder}H", data, offset)[0] for offset in offsets}
    if stated & _READ_TAGS - set(page.tags.keys()):
        raise UserError("TIFF image is damaged or cut short; fetch it again")


def _photometric(page: tifffile.TiffPage, notes: list[str]) -> int:
    if 262 in page.tags:
        return int(page.photometric)
    if int(page.compression) == 6:
        return _YCBCR  # JPEG of the old kind is nothing else
    if int(page.compression) in _FAX:
        return _WHITE_IS_ZERO
    if page.samplesperpixel >= 3:
        notes.append("the TIFF does not state its colour space; RGB is assumed")
        return _RGB
    notes.append("the TIFF does not state whether 0 is black or white; black is assumed")
    return _BLACK_IS_ZERO


def _check_layout(page: tifffile.TiffPage, photometric: int, file_bytes: int, limits: Limits) -> None:
    height, width, compression = page.imagelength, page.imagewidth, int(page.compression)
    check_pixels(width, height, limits)
    if page.imagedepth != 1:
        raise UserError(f"TIFF volume of {page.imagedepth} slices; convert it to NIfTI (.nii.gz)")
    if photometric in _RAW_PHOTO:
        raise UserError("raw photo of a camera; convert it to PNG or JPEG")
    if photometric not in _CHANNELS:
        raise UserError(f"TIFF image in colour space {photometric}; save it as PNG")
    if compression not in _COMPRESSIONS:
        raise UserError(f"TIFF image with compression {compression}; save it as PNG")
    if page.dtype is None or page.dtype.kind not in "ubif" or not isinstance(page.bitspersample, int):
        raise UserError(f"TIFF image with unsupported {page.bitspersample}-bit samples; save it as PNG")
    if page.samplesperpixel < _CHANNELS[photometric]:
        raise UserError(f"TIFF image of too few samples ({page.samplesperpixel}); export it again")
    subsampling = tuple(page.tags.valueof(530, (2, 2)))
    if photometric == _YCBCR and compression not in _JPEG and subsampling != (1, 1):
        raise UserError("TIFF image with subsampled colour but no JPEG compression; save it as PNG")
    if photometric in (_CIELAB, _ICCLAB) and compression in _JPEG:
        raise UserError("TIFF image in L*a*b* colours with JPEG compression; save it as PNG")
    if photometric == _CMYK and _number(page, 332, 1) != 1:
        raise UserError("TIFF image with inks other than CMYK; save it as RGB")
    sample_bytes = page.dtype.itemsize * page.samplesperpixel
    tile_pixels = page.tilewidth * page.tilelength * page.tiledepth
    if max(height * width, tile_pixels) * sample_bytes > limits.decoded_bytes:
        raise UserError(f"TIFF image of more than {limits.decoded_bytes} bytes when decoded; scale it down")
    segments = len(page.dataoffsets)
    if segments > _MAX_SEGMENTS:
        raise UserError(f"TIFF image in {segments} pieces; save it as PNG")
    counts = (1,) if page.is_contiguous else page.databytecounts  # a single strip need not state it
    if segments < int(np.prod(page.chunked, dtype=object)) or 0 in (*counts, *page.dataoffsets):
        raise UserError("TIFF image with missing strips or tiles; export it again")
    if sum(page.databytecounts) > file_bytes * 2 or len(page.databytecounts) < segments:
        raise UserError("TIFF image is cut short or damaged; fetch it again")
    if compression != 1 and _ends_early(page, file_bytes):
        raise UserError("TIFF image is cut short; fetch it again")


def _ends_early(page: tifffile.TiffPage, file_bytes: int) -> bool:
    ends = zip(page.dataoffsets, page.databytecounts, strict=False)
    return any(offset + count > file_bytes for offset, count in ends)


def _check_jpeg(page: tifffile.TiffPage, data: bytes) -> None:
    """Checks the sizes inside JPEG streams, which the decoder trusts more than the tags."""
    height = page.tilelength or page.rowsperstrip or page.imagelength
    width = page.tilewidth or page.imagewidth
    if page.jpegtables and jpeg_frame(page.jpegtables) is not None:
        raise UserError("TIFF image with damaged JPEG tables; export it again")
    if int(page.compression) == 6 and len(page.dataoffsets) > 1:
        raise UserError("TIFF image in old-style JPEG strips; save it as PNG")
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        segment = data[offset : offset + count]
        header = jpeg_frame(segment)
        if header is None or header.height > height + _MCU or header.width > width + _MCU:
            raise UserError("TIFF image with a damaged JPEG strip or tile; export it again")
        if jpeg_ends_early(segment):
            raise UserError("TIFF image is cut short; fetch it again")


def _number(page: tifffile.TiffPage, code: int, default: int) -> int:
    value: Any = page.tags.valueof(code, default)
    return int(value) if isinstance(value, int | np.integer) else default


def _to_image(
    page: tifffile.TiffPage, photometric: int, samples: np.ndarray, notes: list[str]
) -> Image.Image:
    """Converts samples: [S, 1, H, W, 1] for separate planes, otherwise [1, 1, H, W, S]."""
    samples = np.moveaxis(samples[:, 0, ..., 0], 0, -1) if samples.shape[0] > 1 else samples[0, 0]
    channels, bits = _CHANNELS[photometric], int(page.bitspersample)
    values, alpha = samples[..., :channels], None
    extra = page.tags.valueof(338, ())
    extra = extra if isinstance(extra, tuple | np.ndarray) else (extra,)
    for index, meaning in enumerate(extra[: samples.shape[-1] - channels]):
        if int(meaning) in (_ASSOCIATED, _UNASSOCIATED):
            alpha = samples[..., channels + index]
            full = 1.0 if alpha.dtype.kind == "f" else 2.0 ** (bits - (alpha.dtype.kind == "i")) - 1
            alpha = np.clip(np.nan_to_num(alpha.astype(np.float32)) / np.float32(full), 0, 1)
            if int(meaning) == _ASSOCIATED:
                values = _unpremultiplied(values, alpha)
            break
    unused = samples.shape[-1] - channels - (alpha is not None)
    if unused:
        notes.append(
            f"{unused} of {samples.shape[-1]} samples of each pixel have no stated meaning; left out"
        )
    valid = visible_mask(alpha)
    if photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
        eight = to_eight_bits(values, valid, bits=bits, notes=notes)
        return with_alpha(255 - eight if photometric == _WHITE_IS_ZERO else eight, alpha)
    if photometric == _PALETTE:
        table = np.asarray(page.tags[320].value, np.uint16).reshape(3, -1).T
        if table.max() >= 256:  # 16 bits by the standard; some programs write 8
            table = table >> 8
        return with_alpha(table.astype(np.uint8)[values[..., 0]], alpha)
    if int(page.compression) in _JPEG and photometric == _YCBCR:
        eight = to_eight_bits(values, valid, bits=bits, notes=notes)  # the decoder converts to RGB
        return with_alpha(eight, alpha)
    return with_alpha(np.asarray(_converted(values, photometric, bits)), alpha)


def _unpremultiplied(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    whole = values / np.maximum(alpha, np.float32(1e-6))[..., None]
    whole = np.where(alpha[..., None] > 0, whole, 0)
    if values.dtype.kind == "f":
        return whole
    limits = np.iinfo(values.dtype)
    return np.clip(np.rint(whole), limits.min, limits.max).astype(values.dtype)


def _converted(values: np.ndarray, photometric: int, bits: int) -> Image.Image:
    """Converts CMYK, YCbCr and L*a*b* by Pillow, which supports 8 bits of them."""
    if bits not in (8, 16) or values.dtype.kind != "u":
        raise UserError(f"TIFF image of {bits} bits in a colour space other than RGB; save it as RGB")
    if bits == 16:
        values = values >> 8
    eight = np.ascontiguousarray(values.astype(np.uint8))
    if photometric == _ICCLAB:
        eight[..., 1:] ^= 128  # CIE L*a*b* has signed a and b
    mode = {_CMYK: "CMYK", _YCBCR: "YCbCr"}.get(photometric, "LAB")
    height, width = eight.shape[:2]
    return Image.frombytes(mode, (width, height), eight.tobytes(), "raw", mode).convert("RGB")
