"""2-D images: decode what users have into 8-bit RGB, resize as the vision tower expects, encode, identify."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Literal

import imagecodecs
import numpy as np
from PIL import ExifTags, Image, ImageChops

from vilam3_jax.data import decoded_images, file_kinds
from vilam3_jax.data.bit_depth import to_eight_bits, visible, with_alpha
from vilam3_jax.data.dicom.pixels import read_picture
from vilam3_jax.data.file_kinds import FileKind
from vilam3_jax.data.image_headers import (
    check_pixels,
    choose_frame,
    gif_frames,
    jpeg_ends_early,
    jpeg_frame,
    lacks_rows,
    webp_size,
    without_profiles,
)
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.data.tiff import read_tiff
from vilam3_jax.errors import UserError, warn_of
from vilam3_jax.runtime.paths import PathLike, as_path, read_bytes

Alpha = Literal["white", "ignore"]

_KIND_BYTES = 1 << 16
# Pillow's name of each format; no other decoder is tried.
_PILLOW = {
    file_kinds.PNG: "PNG",
    file_kinds.JPEG: "JPEG",
    file_kinds.WEBP: "WEBP",
    file_kinds.BMP: "BMP",
    file_kinds.GIF: "GIF",
}
_SHORTEST = 26  # bytes of the smallest sound picture, a WebP
_ANIMATED = ("PNG", "WEBP", "GIF")  # an MPO is one photo of a phone, with previews
_MAX_GIF_BYTES = 32 << 20  # its blocks are walked through one by one
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ASIDE = (5, 6, 7, 8)  # orientations that exchange height and width


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedPicture:
    """A picture as the model may see it, with what its file states.

    Attributes:
      pixels: [H, W, 3] uint8.
      modality: DICOM's code as the file states it, or "unknown".
      body_part: as the file states it, upper case, or "unknown".
      frame: which frame or page this is, from 0.
      frames: how many the file holds.
      notes: sentences about what was assumed, repaired or skipped; they name no patient.
    """

    pixels: np.ndarray
    modality: str = UNKNOWN
    body_part: str = UNKNOWN
    frame: int = 0
    frames: int = 1
    notes: tuple[str, ...] = ()


def decode_image(
    data: bytes, *, alpha: Alpha = "white", frame: int | None = None, limits: Limits = DEFAULT_LIMITS
) -> np.ndarray:
    """Decodes PNG, JPEG, WebP, BMP, GIF or TIFF, and `decoded`; docs/formats/pictures.md has the rules.

    8-bit pictures come as they are stored: grey is repeated, CMYK converted, colour profiles are ignored.
    Grey of more bits is stretched between its 0.5 and 99.5 percentiles, colour of more bits is divided by its
    full scale. The EXIF orientation is applied.

    Args:
      data: the whole file.
      alpha: "white" puts transparent pixels on white paper; "ignore" drops the transparency, as VILA does.
      frame: which page of a TIFF or frame of an animation, from 0; needed where there are several.
      limits: judged by the header, before decoding.

    Returns:
      [H, W, 3] uint8 RGB.

    Raises:
      UserError: no picture, damaged, cut short, several frames, or over a limit. The caller adds which record
        or file it was.
    """
    if decoded_images.is_decoded(data):
        return decoded_images.decode(data)
    found = _decode(data, alpha, frame, limits)
    warn_of(found.notes, "picture")
    return np.array(found.image.convert("RGB"))


def decode_scaled(data: bytes, size: int, *, alpha: Alpha = "white") -> np.ndarray:
    """`resize(decode_image(data, alpha=alpha), size)` to the bit, but grey is scaled once, not thrice.

    Returns:
      [size, size, 3] uint8.

    Raises:
      UserError: see `decode_image`; or a picture is stored as pixels of another size, whose own shape and
        details are lost.
    """
    if decoded_images.is_decoded(data):
        height, width = decoded_images.shape(data)
        if (height, width) != (size, size):
            raise UserError(
                f"picture stored as {height} x {width} pixels, the model takes {size} x {size}; prepare the "
                f"dataset again with --decode-images {size}, or without"
            )
        return decoded_images.decode(data)
    found = _decode(data, alpha, None, DEFAULT_LIMITS)
    warn_of(found.notes, "picture")
    image = _one_channel(found.image)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image.convert("RGB"))


def _one_channel(image: Image.Image) -> Image.Image:
    """ "L" of an "RGB" picture whose channels are equal, as films are often saved; others as they are."""
    if image.mode != "RGB":
        return image
    red, green, blue = image.split()
    is_grey = all(ImageChops.difference(red, other).getbbox() is None for other in (green, blue))
    return red if is_grey else image


def image_shape(data: bytes, *, limits: Limits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(H, W) of what `decode_image` returns, from the header where that is enough; raises the same errors."""
    if decoded_images.is_decoded(data):
        return decoded_images.shape(data)
    kind = _picture_kind(data)
    if kind == file_kinds.TIFF:
        width, height = _decode(data, "ignore", None, limits).image.size
        return height, width
    with _one_error(data, kind), _opened(data, kind, limits) as (image, _):
        _choose(image, None, limits)
        width, height = image.size
        return (width, height) if _orientation(image, []) in _ASIDE else (height, width)


def load_picture(
    path: PathLike, *, frame: int | None = None, alpha: Alpha = "white", limits: Limits = DEFAULT_LIMITS
) -> LoadedPicture:
    """Reads one 2-D image file with what it states.

    Args:
      path: anything `decode_image` reads, or a DICOM file.
      frame: which frame of a DICOM file, page of a TIFF or frame of an animation, from 0. None: the only one,
        or what `dicom.pixels.read_picture` chooses.
      alpha: see `decode_image`.
      limits: see `decode_image`.

    Raises:
      UserError: names the file, what it is and what to do.
    """
    path = as_path(path)
    data = read_bytes(path, limits.file_bytes)
    kind = file_kinds.identify_bytes(data[:_KIND_BYTES], path.name)
    if kind.reader == "dicom":
        return _load_dicom(path, frame, limits)
    if kind.reader != "picture":
        raise file_kinds.refusal(path, kind)
    try:
        found = _decode(data, alpha, frame, limits)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    pixels = np.array(found.image.convert("RGB"))
    return LoadedPicture(pixels, frame=found.frame, frames=found.frames, notes=found.notes)


def load_film(
    path: PathLike, *, frame: int | None = None, alpha: Alpha = "white", limits: Limits = DEFAULT_LIMITS
) -> np.ndarray:
    """The pixels of `load_picture`, [H, W, 3] uint8; its notes become `InputWarning`s."""
    picture = load_picture(path, frame=frame, alpha=alpha, limits=limits)
    warn_of(picture.notes, path)
    return picture.pixels


def _load_dicom(path: PathLike, frame: int | None, limits: Limits) -> LoadedPicture:
    picture = read_picture(path, frame=frame, limits=limits)
    pixels = picture.pixels
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    return LoadedPicture(
        pixels, picture.modality, picture.body_part, picture.frame, picture.frames, picture.notes
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Decoded:
    """image: "L" or "RGB", upright; the rest as in `LoadedPicture`."""

    image: Image.Image
    frame: int
    frames: int
    notes: tuple[str, ...]


def _decode(data: bytes, alpha: Alpha, frame: int | None, limits: Limits) -> _Decoded:
    kind = _picture_kind(data)
    notes: list[str] = []
    with _one_error(data, kind):
        if kind == file_kinds.TIFF:
            page = read_tiff(data, frame, limits)
            notes += page.notes
            image = _flat(page.image, alpha, notes)
            return _Decoded(_turned(image, page.orientation), page.page, page.pages, tuple(notes))
        if kind == file_kinds.JPEG and data.endswith(bytes(64)) and jpeg_ends_early(data):
            raise UserError("JPEG picture that is cut short; fetch it again")  # the rest is zero bytes
        with _opened(data, kind, limits) as (image, deep):
            number, count = _choose(image, frame, limits)
            orientation = _orientation(image, notes)
            if deep:
                image = _deep(data, kind, number, notes)
            else:
                _check_png(image, data, number)
                _repair(image, data, notes)
            return _Decoded(_turned(_flat(image, alpha, notes), orientation), number, count, tuple(notes))


def _picture_kind(data: bytes) -> FileKind:
    kind = file_kinds.identify_bytes(data[:_KIND_BYTES], "")
    if kind.reader != "picture":
        raise UserError(file_kinds.sentence(kind))
    return kind


@contextlib.contextmanager
def _one_error(data: bytes, kind: FileKind) -> Iterator[None]:
    """Whatever a decoder raises becomes one line without its words."""
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{kind.name} that needs more memory than there is; scale it down") from error
    except Exception as error:
        fault = (
            "is cut short; fetch it again"
            if _ends_early(data, kind)
            else "is damaged; fetch or export it again"
        )
        raise UserError(f"{kind.name} that {fault}") from error


def _ends_early(data: bytes, kind: FileKind) -> bool:
    if kind == file_kinds.PNG:
        return b"IEND" not in data
    if kind == file_kinds.JPEG:
        return jpeg_ends_early(data)
    if kind == file_kinds.WEBP:
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if kind == file_kinds.BMP:
        return int.from_bytes(data[2:6], "little") > len(data)
    return kind == file_kinds.GIF and not data.rstrip(b"\0").endswith(b";")


@contextlib.contextmanager
def _opened(data: bytes, kind: FileKind, limits: Limits) -> Iterator[tuple[Image.Image, bool]]:
    """A picture whose header is read, and whether it has samples that Pillow would cut down or refuse."""
    deep = False
    if len(data) < _SHORTEST:
        raise UserError(f"{kind.name} that is cut short; fetch it again")
    if kind == file_kinds.PNG:
        check_pixels(int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"), limits)
        deep = data[24:25] == b"\x10"
        data = without_profiles(data)
    elif kind == file_kinds.JPEG and (header := jpeg_frame(data)) is not None:
        check_pixels(header.width, header.height, limits)
        deep = header.precision != 8
        if deep:  # so that Pillow reads the EXIF data
            data = data[: header.place] + b"\x08" + data[header.place + 1 :]
    elif kind == file_kinds.WEBP:
        check_pixels(*webp_size(data), limits)
    elif kind == file_kinds.GIF:
        _check_gif(data, limits)
    try:
        image = Image.open(io.BytesIO(data), formats=(_PILLOW[kind],))
    except Image.DecompressionBombError as error:
        raise UserError(f"{kind.name} of more than {limits.pixels} pixels; scale it down") from error
    with image:
        check_pixels(*image.size, limits)
        yield image, deep


def _check_gif(data: bytes, limits: Limits) -> None:
    """Pillow enlarges a GIF to the size of its frames, and walks through all of them to count them."""
    if len(data) > _MAX_GIF_BYTES:
        raise UserError(f"GIF of {len(data)} bytes; save the frame to look at as PNG")
    frames = gif_frames(data, limits.frames + 1)
    if len(frames) > limits.frames:
        raise UserError(f"GIF animation of more than {limits.frames} frames; save the one to look at as PNG")
    frames.append((int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")))
    rights, bottoms = zip(*frames, strict=True)
    check_pixels(max(rights), max(bottoms), limits)


def _choose(image: Image.Image, frame: int | None, limits: Limits) -> tuple[int, int]:
    """Goes to the chosen frame; returns its number and how many there are."""
    count = int(getattr(image, "n_frames", 1)) if image.format in _ANIMATED else 1
    name = f"{image.format} animation" if count > 1 else f"{image.format} picture"
    number = choose_frame(frame, count, name, "frames")
    if number:
        width, height = image.size
        if (number + 1) * width * height * 4 > limits.decoded_bytes:  # the frames before are decoded, too
            raise UserError(f"{name}: frame {number} lies too far back; save it as PNG")
        image.seek(number)
    return number, count


def _orientation(image: Image.Image, notes: list[str]) -> int:
    """The EXIF orientation, 1 to 8; 1 where it is absent or means nothing."""
    if image.format == "PNG":
        image.load()  # the EXIF data may follow the pixels
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # its parser raises many kinds of errors
        notes.append("the EXIF data are damaged; the picture was taken as upright")
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _deep(data: bytes, kind: FileKind, number: int, notes: list[str]) -> Image.Image:
    """ "L", "LA", "RGB" or "RGBA" of what Pillow cannot decode without loss."""
    if number:
        raise UserError("animation of 16 bits; save the frame to look at as PNG")
    if kind == file_kinds.JPEG:
        if jpeg_ends_early(data):
            raise UserError("JPEG picture that is cut short; fetch it again")  # the decoder would fill up
        header, samples = jpeg_frame(data), imagecodecs.jpeg_decode(data)
        if header is None or samples.shape[:2] != (header.height, header.width):
            raise ValueError("another size than the header states")
        bits = header.precision
    else:
        samples, bits = imagecodecs.png_decode(without_profiles(data)), 16
    samples = samples[..., None] if samples.ndim == 2 else samples
    alpha = samples[..., -1] / np.float32(65535) if samples.shape[-1] in (2, 4) else None
    if kind == file_kinds.JPEG and alpha is not None:
        raise UserError("JPEG picture of more than 8 bits in CMYK; save it as PNG")
    colours = samples if alpha is None else samples[..., :-1]
    return with_alpha(to_eight_bits(colours, visible(alpha), bits=bits, notes=notes), alpha)


def _check_png(image: Image.Image, data: bytes, number: int) -> None:
    """Refuses what Pillow shows as black: missing rows, counted where the last is black, and no palette."""
    if image.format != "PNG" or number:
        return
    image.load()
    last = image.crop((0, image.height - 1, image.width, image.height))
    is_interlaced = data[28] == 1
    if (is_interlaced or last.getbbox(alpha_only=False) is None) and lacks_rows(data):
        raise UserError("PNG picture that is cut short; fetch it again")
    if image.mode == "P" and image.palette is None:
        raise UserError("PNG picture without its palette; export it again")


def _repair(image: Image.Image, data: bytes, notes: list[str]) -> None:
    """Where Pillow takes a file's numbers for something else."""
    transparent = image.info.get("transparency")
    if image.format == "PNG" and image.mode == "L" and isinstance(transparent, int) and data[24] in (2, 4):
        image.info["transparency"] = (
            transparent * 255 // (2 ** data[24] - 1)
        )  # samples are scaled, this is not
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        image.load()
        image.im = ImageChops.invert(image).im  # Pillow takes every CMYK JPEG for an inverted one of Adobe's
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        image.putalpha(255)
        notes.append("the BMP is transparent everywhere; its transparency was ignored, as Windows does")


def _flat(image: Image.Image, alpha: Alpha, notes: list[str]) -> Image.Image:
    """ "L" or "RGB" without transparency."""
    image.load()
    if alpha == "white" and (
        image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info
    ):
        visible = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        least, most = visible.getchannel("A").getextrema()
        if most == 0:
            notes.append("the picture is transparent everywhere, so all of it is white")
        if least != 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), visible)
    if image.mode in ("L", "RGB"):
        return image
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


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
