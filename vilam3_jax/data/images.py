"""2-D images: decoding to 8-bit RGB, resizing for the vision tower, augmentation, PNG encoding."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import imagecodecs
import numpy as np
from PIL import ExifTags, Image, ImageChops

from vilam3_jax.data import decoded_images, file_kinds, image_headers
from vilam3_jax.data.bit_depth import to_eight_bits, visible_mask, with_alpha
from vilam3_jax.data.dicom.pixels import read_image
from vilam3_jax.data.file_kinds import FileKind
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.stored_volume import LoadedImage
from vilam3_jax.data.tiff import read_tiff
from vilam3_jax.errors import UserError, warn_of
from vilam3_jax.runtime.paths import PathLike, as_path, read_bytes

Alpha = Literal["white", "ignore"]

_KIND_BYTES = 1 << 16
# Pillow's decoder of each format; no other is tried.
_PILLOW = {
    file_kinds.PNG: "PNG",
    file_kinds.JPEG: "JPEG",
    file_kinds.WEBP: "WEBP",
    file_kinds.BMP: "BMP",
    file_kinds.GIF: "GIF",
}
_SHORTEST = 26  # bytes of the smallest valid image, a WebP
_ANIMATED = ("PNG", "WEBP", "GIF")  # an MPO is one photo with previews
_MAX_GIF_BYTES = 32 << 20  # its blocks are scanned one by one
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPOSED = (5, 6, 7, 8)  # orientations that exchange height and width


def decode_image(
    data: bytes, *, alpha: Alpha = "white", frame: int | None = None, limits: Limits = DEFAULT_LIMITS
) -> np.ndarray:
    """Decodes PNG, JPEG, WebP, BMP, GIF, TIFF or `decoded_images`; docs/formats/images.md has the rules.

    8-bit images are returned as stored: grey is repeated, CMYK converted, colour profiles are ignored. Deeper
    grey is stretched between its 0.5 and 99.5 percentiles, deeper colour is divided by its full scale. The
    EXIF orientation is applied.

    Args:
      data: the whole file.
      alpha: "white" composes transparent images on white; "ignore" drops the transparency, as VILA does.
      frame: page of a TIFF or frame of an animation, from 0; required if there are several.
      limits: checked against the header, before decoding.

    Returns:
      [H, W, 3] uint8 RGB.

    Raises:
      UserError: not an image, damaged, cut short, several frames, or over a limit. The caller adds the record
        or file.
    """
    if decoded_images.is_decoded(data):
        return decoded_images.decode(data)
    found = _decode(data, alpha, frame, limits)
    warn_of(found.notes, "image")
    return np.array(found.image.convert("RGB"))


def decode_scaled(data: bytes, size: int, *, alpha: Alpha = "white") -> np.ndarray:
    """`resize(decode_image(data, alpha=alpha), size)`, bit for bit, but scales grey only once.

    Returns [size, size, 3] uint8. Raises as `decode_image`, and `UserError` for an image stored as pixels of
    another size, whose original is lost.
    """
    if decoded_images.is_decoded(data):
        height, width = decoded_images.shape(data)
        if (height, width) != (size, size):
            raise UserError(
                f"image stored as {height} x {width} pixels, the model takes {size} x {size}; prepare the "
                f"dataset again with --decode-images {size}, or without"
            )
        return decoded_images.decode(data)
    found = _decode(data, alpha, None, DEFAULT_LIMITS)
    warn_of(found.notes, "image")
    image = found.image
    if image.mode == "RGB":  # with equal channels, as radiographs are often saved, one is enough
        red, green, blue = image.split()
        if all(ImageChops.difference(red, other).getbbox() is None for other in (green, blue)):
            image = red
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image.convert("RGB"))


def image_shape(data: bytes, *, limits: Limits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(H, W) of the result of `decode_image`, from the header if possible; raises the same errors."""
    if decoded_images.is_decoded(data):
        return decoded_images.shape(data)
    kind = _image_kind(data)
    if kind == file_kinds.TIFF:
        width, height = _decode(data, "ignore", None, limits).image.size
        return height, width
    with _one_error(data, kind), _opened(data, kind, limits) as (image, _):
        _choose(image, None, limits)
        width, height = image.size
        return (width, height) if _orientation(image, []) in _TRANSPOSED else (height, width)


def load_image(
    path: PathLike, *, frame: int | None = None, alpha: Alpha = "white", limits: Limits = DEFAULT_LIMITS
) -> LoadedImage:
    """Reads a file that `decode_image` supports, or a DICOM file, with its metadata.

    `frame` is the frame of a DICOM file, page of a TIFF or frame of an animation, from 0; None: the only one,
    or the choice of `dicom.read_image`. `alpha` and `limits` are those of `decode_image`. Raises `UserError`
    with the file, its kind and the fix.
    """
    path = as_path(path)
    data = read_bytes(path, limits.file_bytes)
    kind = file_kinds.identify_bytes(data[:_KIND_BYTES], path.name)
    if kind.reader == "dicom":
        image = read_image(path, frame=frame, limits=limits)
        if image.pixels.ndim == 3:
            return image
        return dataclasses.replace(image, pixels=np.repeat(image.pixels[..., None], 3, axis=-1))
    if kind.reader != "image":
        raise file_kinds.refusal(path, kind)
    try:
        found = _decode(data, alpha, frame, limits)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    pixels = np.array(found.image.convert("RGB"))
    return LoadedImage(pixels, frame=found.frame, frames=found.frames, notes=found.notes)


def load_pixels(path: PathLike, *, alpha: Alpha = "white") -> np.ndarray:
    """Returns the pixels of `load_image`, [H, W, 3] uint8; its notes are issued as `InputWarning`."""
    image = load_image(path, alpha=alpha)
    warn_of(image.notes, path)
    return image.pixels


class _Decoded(NamedTuple):
    """image: "L" or "RGB", upright; the rest as in `LoadedImage`."""

    image: Image.Image
    frame: int
    frames: int
    notes: tuple[str, ...]


def _decode(data: bytes, alpha: Alpha, frame: int | None, limits: Limits) -> _Decoded:
    kind = _image_kind(data)
    notes: list[str] = []
    with _one_error(data, kind):
        if kind == file_kinds.TIFF:
            image, orientation, number, count = read_tiff(data, frame, limits, notes)
            return _Decoded(_upright(_opaque(image, alpha, notes), orientation), number, count, tuple(notes))
        if kind == file_kinds.JPEG and data.endswith(bytes(64)) and image_headers.jpeg_ends_early(data):
            raise UserError("JPEG image is cut short; fetch it again")  # zeros follow
        with _opened(data, kind, limits) as (image, deep):
            number, count = _choose(image, frame, limits)
            orientation = _orientation(image, notes)
            if deep:
                image = _decode_deep(data, kind, number, notes)
            else:
                _check_png(image, data, number)
                _repair(image, data, notes)
            return _Decoded(_upright(_opaque(image, alpha, notes), orientation), number, count, tuple(notes))


def _image_kind(data: bytes) -> FileKind:
    kind = file_kinds.identify_bytes(data[:_KIND_BYTES], "")
    if kind.reader != "image":
        raise UserError(file_kinds.explain(kind))
    return kind


@contextlib.contextmanager
def _one_error(data: bytes, kind: FileKind) -> Iterator[None]:
    """Converts any decoder exception to a one-line error without the decoder's message."""
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{kind.name} needs more memory than is available; scale it down") from error
    except Exception as error:
        fault = (
            "is cut short; fetch it again"
            if _ends_early(data, kind)
            else "is damaged; fetch or export it again"
        )
        raise UserError(f"{kind.name} {fault}") from error


def _ends_early(data: bytes, kind: FileKind) -> bool:
    if kind == file_kinds.PNG:
        return b"IEND" not in data
    if kind == file_kinds.JPEG:
        return image_headers.jpeg_ends_early(data)
    if kind == file_kinds.WEBP:
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if kind == file_kinds.BMP:
        return int.from_bytes(data[2:6], "little") > len(data)
    return kind == file_kinds.GIF and not data.rstrip(b"\0").endswith(b";")


@contextlib.contextmanager
def _opened(data: bytes, kind: FileKind, limits: Limits) -> Iterator[tuple[Image.Image, bool]]:
    """Yields the opened image and whether Pillow would truncate or reject its samples."""
    deep = False
    if len(data) < _SHORTEST:
        raise UserError(f"{kind.name} is cut short; fetch it again")
    if kind == file_kinds.PNG:
        image_headers.check_pixels(
            int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"), limits
        )
        deep = data[24:25] == b"\x10"
        data = image_headers.without_profiles(data)
    elif kind == file_kinds.JPEG and (header := image_headers.jpeg_frame(data)) is not None:
        image_headers.check_pixels(header.width, header.height, limits)
        deep = header.precision != 8
        if deep:  # so that Pillow reads the EXIF data
            data = data[: header.offset] + b"\x08" + data[header.offset + 1 :]
    elif kind == file_kinds.WEBP:
        image_headers.check_pixels(*image_headers.webp_size(data), limits)
    elif kind == file_kinds.GIF:
        _check_gif(data, limits)
    try:
        image = Image.open(io.BytesIO(data), formats=(_PILLOW[kind],))
    except Image.DecompressionBombError as error:
        raise UserError(f"{kind.name} of more than {limits.pixels} pixels; scale it down") from error
    with image:
        image_headers.check_pixels(*image.size, limits)
        yield image, deep


def _check_gif(data: bytes, limits: Limits) -> None:
    """Checks all frames: Pillow enlarges a GIF to their size and scans them to count them."""
    if len(data) > _MAX_GIF_BYTES:
        raise UserError(f"GIF of {len(data)} bytes; save the frame to look at as PNG")
    frames = image_headers.gif_frames(data, limits.frames + 1)
    if len(frames) > limits.frames:
        raise UserError(f"GIF animation of more than {limits.frames} frames; save the one to look at as PNG")
    frames.append((int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")))
    rights, bottoms = zip(*frames, strict=True)
    image_headers.check_pixels(max(rights), max(bottoms), limits)


def _choose(image: Image.Image, frame: int | None, limits: Limits) -> tuple[int, int]:
    """Seeks to the chosen frame; returns its index and the number of frames."""
    count = int(getattr(image, "n_frames", 1)) if image.format in _ANIMATED else 1
    name = f"{image.format} {'animation' if count > 1 else 'image'}"
    number = image_headers.choose_frame(frame, count, name, "frames")
    if number:
        width, height = image.size
        if (number + 1) * width * height * 4 > limits.decoded_bytes:  # earlier frames are decoded, too
            raise UserError(f"{name}: frame {number} is too far from the first; save it as PNG")
        image.seek(number)
    return number, count


def _orientation(image: Image.Image, notes: list[str]) -> int:
    """The EXIF orientation, 1 to 8; 1 if absent or invalid."""
    if image.format == "PNG":
        image.load()  # the EXIF data may follow the pixels
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # its parser raises many kinds of errors
        notes.append("the EXIF data are damaged; the image is assumed to be upright")
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _decode_deep(data: bytes, kind: FileKind, number: int, notes: list[str]) -> Image.Image:
    """Decodes 16-bit PNG and deep JPEG to "L", "LA", "RGB" or "RGBA"."""
    if number:
        raise UserError("animation of 16 bits; save the frame to look at as PNG")
    if kind == file_kinds.JPEG:
        if image_headers.jpeg_ends_early(data):
            raise UserError("JPEG image is cut short; fetch it again")  # the decoder fills the rest
        header, samples = image_headers.jpeg_frame(data), imagecodecs.jpeg_decode(data)
        if header is None or samples.shape[:2] != (header.height, header.width):
            raise ValueError("size differs from the header")
        bits = header.precision
    else:
        samples, bits = imagecodecs.png_decode(image_headers.without_profiles(data)), 16
    samples = samples[..., None] if samples.ndim == 2 else samples
    alpha = samples[..., -1] / np.float32(65535) if samples.shape[-1] in (2, 4) else None
    if kind == file_kinds.JPEG and alpha is not None:
        raise UserError("JPEG image of more than 8 bits in CMYK; save it as PNG")
    colours = samples if alpha is None else samples[..., :-1]
    return with_alpha(to_eight_bits(colours, visible_mask(alpha), bits=bits, notes=notes), alpha)


def _check_png(image: Image.Image, data: bytes, number: int) -> None:
    """Rejects what Pillow decodes to black: missing rows (checked if the last is black), no palette."""
    if image.format != "PNG" or number:
        return
    image.load()
    last = image.crop((0, image.height - 1, image.width, image.height))
    is_interlaced = data[28] == 1
    if (is_interlaced or last.getbbox(alpha_only=False) is None) and image_headers.lacks_rows(data):
        raise UserError("PNG image is cut short; fetch it again")
    if image.mode == "P" and image.palette is None:
        raise UserError("PNG image without its palette; export it again")


def _repair(image: Image.Image, data: bytes, notes: list[str]) -> None:
    """Corrects values that Pillow misinterprets."""
    transparent = image.info.get("transparency")
    if image.format == "PNG" and image.mode == "L" and isinstance(transparent, int) and data[24] in (2, 4):
        scaled = transparent * 255 // (2 ** data[24] - 1)  # Pillow scales the samples, but not this value
        image.info["transparency"] = scaled
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        image.load()
        image.im = ImageChops.invert(image).im  # Pillow inverts every CMYK JPEG, as Adobe stores them
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        image.putalpha(255)
        notes.append("the BMP is fully transparent; its transparency was ignored, as Windows does")


def _opaque(image: Image.Image, alpha: Alpha, notes: list[str]) -> Image.Image:
    """Removes transparency; returns "L" or "RGB"."""
    image.load()
    if alpha == "white" and (
        image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info
    ):
        visible = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        least, most = visible.getchannel("A").getextrema()
        if most == 0:
            notes.append("the image is fully transparent and therefore all white")
        if least != 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), visible)
    if image.mode in ("L", "RGB"):
        return image
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


def resize(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resizes by PIL's bicubic filter on 8-bit values, ignoring the aspect ratio (VILA's `resize` mode).

    `size` is the side of the square result in pixels, or its (height, width); both images are uint8
    [height, width, 3].
    """
    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def pad_to_square(image: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Centres an image, [H, W, 3] uint8, in a square of its longer side (VILA's `pad` mode).

    An odd remaining row or column goes below or to the right; `background` is the RGB of the padding.
    """
    height, width = image.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), background, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def augment(images: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Randomly shifts, rotates, scales and re-tones the images of one sample, all with the same parameters.

    The ranges are small, so captions and answers stay true: at most 15 degrees, 20 % in size, 8 % of the
    side, 30 % in contrast and brightness. Never mirrors: left and right carry meaning. Images are uint8
    [H, W, 3] and keep their sizes; regions from outside are black.
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
        toned = values * contrast + offset * (values > 10.0)  # keeps the black around the body
        out.append(np.clip(toned, 0.0, 255.0).astype(np.uint8))
    return tuple(out)


def encode_png(image: np.ndarray) -> bytes:
    """Encodes [H, W, 3] or [H, W] uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
