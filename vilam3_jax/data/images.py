"""2-D images: decode what users have into 8-bit RGB, resize as the vision tower expects, encode, identify."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vilam3_jax.data import dicom
from vilam3_jax.data.intensity import as_stored_values, window_to_uint8
from vilam3_jax.errors import UserError
from vilam3_jax.paths import PathLike, as_path, read_bytes

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # no format whose decoder starts another program
_MAX_FILM_BYTES = 512 << 20
_MAX_PIXELS = 64e6


def decode_image(data: bytes, *, max_pixels: float = _MAX_PIXELS) -> np.ndarray:
    """Decodes PNG, JPEG, WebP, BMP or TIFF.

    Args:
      data: the whole file.
      max_pixels: larger images are refused by their header, before decoding.

    Returns:
      [H, W, 3] uint8 RGB, what PIL's `convert("RGB")` gives (grey is repeated, CMYK converted, transparency
      ignored), but for two things: 16-bit, 32-bit and float grey is stretched from its own smallest to its
      largest value, where PIL cuts all above 255; and the EXIF orientation is applied.

    Raises:
      UserError: not an image, damaged, or too large. The caller adds which record it was.
    """
    with _opened(data, max_pixels) as image:
        if _is_deep(image):
            return np.repeat(_stretch(np.asarray(image))[..., None], 3, axis=-1)
        return np.array(_upright(image).convert("RGB"))


def decode_scaled(data: bytes, size: int) -> np.ndarray:
    """`resize(decode_image(data), size)` to the bit, but 8-bit grey is scaled once, not thrice.

    Returns:
      [size, size, 3] uint8.
    """
    with _opened(data, _MAX_PIXELS) as image:
        if not _is_deep(image):
            upright = _upright(image)
            upright = upright if upright.mode == "L" else upright.convert("RGB")
            if upright.size != (size, size):
                upright = upright.resize((size, size), Image.Resampling.BICUBIC)
            return np.array(upright.convert("RGB"))
    return resize(decode_image(data), size)


def image_shape(data: bytes, *, max_pixels: float = _MAX_PIXELS) -> tuple[int, int]:
    """(H, W) of what `decode_image` returns, from the header where that is enough; raises the same errors."""
    with _opened(data, max_pixels) as image:
        if image.format != "TIFF":  # whose size Pillow may have turned already
            width, height = image.size
            turned = not _is_deep(image) and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (width, height) if turned else (height, width)
    height, width = decode_image(data, max_pixels=max_pixels).shape[:2]
    return height, width


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: float) -> Iterator[Image.Image]:
    """An image whose header is read; what goes wrong in the block is a `UserError` too."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(
                    f"image of {width} x {height} pixels, more than the limit of {max_pixels:.0f}; scale "
                    "it down"
                )
            yield image
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(
            f"not a readable PNG, JPEG, WebP, BMP or TIFF image ({error}); save it again as PNG"
        ) from error


def _is_deep(image: Image.Image) -> bool:
    """Whether its grey has more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data says, in a mode that PIL brings to RGB in one go."""
    ImageOps.exif_transpose(image, in_place=True)  # which copies nothing where nothing is to be turned
    return image.convert("LA") if image.mode == "La" else image


def _stretch(values: np.ndarray) -> np.ndarray:
    stored = as_stored_values(values)
    if stored is None:
        raise UserError("image without one finite pixel; save it again as PNG")
    return window_to_uint8(stored, None, (float(stored.min()), float(stored.max())))


def load_film(path: PathLike) -> np.ndarray:
    """Reads one 2-D image file, a DICOM film (CR, DX) included.

    Args:
      path: anything `decode_image` reads, or a DICOM file of one grey frame; MONOCHROME1 is inverted.

    Returns:
      [H, W, 3] uint8.

    Raises:
      UserError: names the file.
    """
    path = as_path(path)
    data = read_bytes(path, _MAX_FILM_BYTES)
    if data[128:132] == b"DICM":
        return np.repeat(dicom.read_film(path)[..., None], 3, axis=-1)
    try:
        return decode_image(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Scales to a square by PIL's bicubic filter on 8-bit values, without keeping the aspect ratio (VILA's
    `resize` mode).

    Args:
      image: [H, W, 3] uint8.
      size: side of the result in pixels.

    Returns:
      [size, size, 3] uint8.
    """
    return resize_to(image, (size, size))


def resize_to(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`resize` to (height, width)."""
    if image.shape[:2] == shape:
        return image
    height, width = shape
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def pad_to_square(image: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Puts an image in the middle of a square of its longer side (VILA's `pad` mode); an odd row or column of
    the rest goes below or right of it.

    Args:
      image: [H, W, 3] uint8.
      background: RGB of the rest.

    Returns:
      [max(H, W), max(H, W), 3] uint8.
    """
    height, width = image.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), background, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def augment(images: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Moves, turns, scales and re-tones the pictures of one sample, all of them alike.

    Small enough that what captions and answers say stays true: at most 15 degrees, 20 % in size, 8 % of the
    side; contrast and brightness by at most 30 %. Never mirrored: left and right are part of the meaning.

    Args:
      images: [H, W, 3] uint8 each.
      rng: source of the choice.

    Returns:
      Pictures of the same size; what comes in from outside is black.
    """
    angle = np.deg2rad(rng.uniform(-15.0, 15.0))
    stretch = np.exp(rng.uniform(-0.18, 0.18, size=2))
    shift = rng.uniform(-0.08, 0.08, size=2)
    contrast, offset = rng.uniform(0.7, 1.3), rng.uniform(-30.0, 30.0)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / stretch
    out = []
    for image in images:
        size = image.shape[1::-1]
        middle = np.array(size) / 2
        origin = middle - turn @ middle + shift * size
        moved = Image.fromarray(image).transform(
            size,
            Image.Transform.AFFINE,
            tuple(np.concatenate([turn, origin[:, None]], axis=1).ravel()),
            Image.Resampling.BILINEAR,
        )
        values = np.asarray(moved, np.float32)
        toned = values * contrast + offset * (values > 10.0)  # what is black around the body stays black
        out.append(np.clip(toned, 0.0, 255.0).astype(np.uint8))
    return tuple(out)


def encode_png(image: np.ndarray) -> bytes:
    """Encodes [H, W, 3] or [H, W] uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
