"""Small valid inputs of every format for `fuzz_readers.py`, generated or shipped with pydicom.

Every generated DICOM file contains `SECRETS`: the campaign checks that they appear in no message.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz_seeds_dicom
import imagecodecs
import nibabel as nib
import nrrd
import numpy as np
import SimpleITK as sitk
import tifffile
from fuzz_seed_type import SECRETS, Seed, single_file
from PIL import Image, ImageCms, PngImagePlugin


def all_seeds() -> list[Seed]:
    """Every seed, in a fixed order."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = [
            *_nifti(Path(folder)),
            *_nrrd(Path(folder)),
            *_metaimage(Path(folder)),
            *fuzz_seeds_dicom.dicom_files(),
            *fuzz_seeds_dicom.dicom_folders(Path(folder)),
            *_images(),
        ]
    assert len({seed.name for seed in seeds}) == len(seeds)
    return seeds


def _voxels(shape: tuple[int, ...] = (5, 6, 4), dtype: Any = np.int16) -> np.ndarray:
    values = np.random.default_rng(0).integers(-1000, 1500, shape)
    return values.clip(0, 255).astype(dtype) if np.dtype(dtype).kind == "u" else values.astype(dtype)


_AFFINE = np.array([[-0.8, 0, 0, 30.25], [0, 0.8, 0.1, -41.5], [0, -0.1, 2.5, 107.0], [0, 0, 0, 1]])


# Volumes.


def _nifti(folder: Path) -> Iterator[Seed]:
    for version, kind in ((1, nib.Nifti1Image), (2, nib.Nifti2Image)):
        for order in "<>":
            image = kind(_voxels(), _AFFINE, kind.header_class(endianness=order))
            image.set_sform(_AFFINE, 1)
            image.set_qform(_AFFINE, 1)
            image.header.set_xyzt_units("mm", "sec")
            yield single_file("nifti", f"nifti{version}{'lb'[order == '>']}.nii", "volume", image.to_bytes())
    first = nib.Nifti1Image(_voxels(dtype=np.float32), _AFFINE)
    first.header.set_slope_inter(2.0, -3.0)
    yield single_file("nifti", "scaled.nii.gz", "volume", gzip.compress(first.to_bytes(), 1, mtime=0))
    frames = nib.Nifti1Image(_voxels((5, 6, 4, 1)), _AFFINE)
    frames.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment"))
    yield single_file("nifti", "one_frame.nii.gz", "volume", gzip.compress(frames.to_bytes(), 1, mtime=0))
    yield single_file(
        "nifti", "series.nii", "volume", nib.Nifti1Image(_voxels((5, 6, 4, 3)), _AFFINE).to_bytes()
    )
    rgb = np.zeros((5, 6, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    yield single_file("nifti", "colour.nii", "volume", nib.Nifti1Image(rgb, _AFFINE).to_bytes())
    for suffix in ("", ".gz"):
        nib.Nifti1Pair(_voxels(), _AFFINE).to_filename(folder / f"pair.hdr{suffix}")
        files = {name: (folder / name).read_bytes() for name in (f"pair.hdr{suffix}", f"pair.img{suffix}")}
        for entry in files:
            yield Seed("nifti", f"pair_{entry}", "volume", files, entry)
    sidecar = {
        "Modality": "MR",
        "Manufacturer": "Siemens",
        "EchoTime": 0.03,
        "RepetitionTime": 2.0,
        "Units": "HU",
        "BodyPartExamined": "BRAIN",
        "ImageOrientationPatientDICOM": [1, 0, 0, 0, 1, 0],
        "ConversionSoftware": "dcm2niix",
        "PatientName": SECRETS[0],
    }
    scan = nib.Nifti1Image(_voxels(), _AFFINE).to_bytes()
    files = {"scan.nii": scan, "scan.json": json.dumps(sidecar, indent=1).encode()}
    for number in range(3):  # to weigh more
        yield Seed("sidecar", f"sidecar{number}", "volume", files, "scan.nii")


def _undated(path: Path) -> bytes:
    """The file without pynrrd's timestamp."""
    return re.sub(rb"# on [^\n]*", b"#", path.read_bytes())


def _nrrd(folder: Path) -> Iterator[Seed]:
    header = {
        "space": "left-posterior-superior",
        "space directions": _AFFINE[:3, :3].T,
        "space origin": _AFFINE[:3, 3],
        "kinds": ["domain", "domain", "domain"],
    }
    for encoding in ("raw", "gzip", "bzip2", "ascii"):
        path = folder / f"{encoding}.nrrd"
        nrrd.write(str(path), _voxels(), header | {"encoding": encoding})
        yield single_file("nrrd", path.name, "volume", _undated(path))
    big = header | {"endian": "big", "space": "RAS", "space units": ["mm", "mm", "mm"]}
    nrrd.write(str(folder / "big.nrrd"), _voxels().astype(">i2"), big | {"encoding": "raw", "modality": "CT"})
    yield single_file("nrrd", "big.nrrd", "volume", _undated(folder / "big.nrrd"))
    for encoding, data_name in (("raw", "data_apart.raw"), ("gzip", "data_apart.raw.gz")):
        nrrd.write(
            str(folder / "data_apart.nhdr"), _voxels(), header | {"encoding": encoding}, detached_header=True
        )
        files = {name: _undated(folder / name) for name in ("data_apart.nhdr", data_name)}
        yield Seed("nrrd", f"apart_{encoding}", "volume", files, "data_apart.nhdr")
    lists = header | {
        "space directions": np.vstack([[np.nan] * 3, _AFFINE[:3, :3].T]),
        "kinds": ["list", *["domain"] * 3],
    }
    nrrd.write(str(folder / "list.nrrd"), _voxels((1, 5, 6, 4)), lists | {"encoding": "raw"})
    yield single_file("nrrd", "list.nrrd", "volume", _undated(folder / "list.nrrd"))


def _metaimage(folder: Path) -> Iterator[Seed]:
    for name, dtype, packed in (
        ("raw.mha", np.int16, False),
        ("packed.mha", np.int16, True),
        ("float.mha", np.float32, True),
        ("apart.mhd", np.int16, False),
        ("apart_packed.mhd", np.uint8, True),
    ):
        image = sitk.GetImageFromArray(_voxels(dtype=dtype))
        image.SetSpacing((0.8, 0.8, 2.5))
        image.SetOrigin((-30.25, 41.5, 107.0))
        image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
        image.SetMetaData("Modality", "MET_MOD_CT")
        sitk.WriteImage(image, str(folder / name), useCompression=packed)
        parts = sorted(folder.glob(f"{name[:-4]}.*")) if name.endswith("mhd") else [folder / name]
        yield Seed("metaimage", name, "volume", {part.name: part.read_bytes() for part in parts}, name)


# Images.


def _images() -> Iterator[Seed]:
    for name, data in (*_pngs(), *_jpegs(), *_tiffs(), *_others()):
        yield single_file(name.split(".")[-1], name, "image", data)


def _grey(shape: tuple[int, ...] = (9, 7)) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, shape).astype(np.uint8)


def _encoded(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def _exif(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = SECRETS[0]
    return exif


def _profile() -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + bytes(12) + profile[36:]  # without the timestamp


def _pngs() -> Iterator[tuple[str, bytes]]:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield f"{mode}.png", _encoded(Image.fromarray(_grey((9, 7, 4)), "RGBA").convert(mode), "PNG")
    yield "grey16.png", imagecodecs.png_encode(_grey().astype(np.uint16) << 7)
    yield "colour16.png", imagecodecs.png_encode(_grey((9, 7, 3)).astype(np.uint16) << 7)
    yield "alpha16.png", imagecodecs.png_encode(_grey((9, 7, 4)).astype(np.uint16) << 7)
    palette = Image.fromarray(_grey((9, 7, 3))).quantize(16)
    yield "trns.png", _encoded(palette, "PNG", transparency=3, bits=4)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", SECRETS[0], zip=True)
    yield (
        "chunks.png",
        _encoded(
            Image.fromarray(_grey((9, 7, 3))),
            "PNG",
            exif=_exif(),
            icc_profile=_profile(),
            pnginfo=text,
            dpi=(300, 300),
        ),
    )
    frames = [Image.fromarray(_grey((9, 7, 3)) + number) for number in range(3)]
    yield "moving.png", _encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=40)
    yield "interlaced.png", _interlaced()


def _interlaced() -> bytes:
    """An Adam7 PNG, which Pillow cannot write; 1 x 1 pixels have one pass."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 1)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0\1\2\3"))
        + chunk(b"IEND", b"")
    )


def _jpegs() -> Iterator[tuple[str, bytes]]:
    yield "grey.jpeg", _encoded(Image.fromarray(_grey((17, 16))), "JPEG")
    colour = Image.fromarray(_grey((17, 16, 3)))
    yield "colour.jpeg", _encoded(colour, "JPEG", exif=_exif(), subsampling=2)
    yield "progressive.jpeg", _encoded(colour, "JPEG", progressive=True, comment=SECRETS[0], dpi=(96, 96))
    yield "cmyk.jpeg", _encoded(colour.convert("CMYK"), "JPEG")
    yield "profile.jpeg", _encoded(colour, "JPEG", icc_profile=_profile(), restart_marker_blocks=1)
    yield "two.jpeg", _encoded(colour, "MPO", save_all=True, append_images=[colour])


def _tiffs() -> Iterator[tuple[str, bytes]]:
    def written(values: np.ndarray, **options: Any) -> bytes:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, values, **options)
        return buffer.getvalue()

    deep = _grey((20, 18)).astype(np.uint16) << 6
    yield "grey.tiff", written(_grey(), photometric="minisblack")
    yield "white.tiff", written(_grey(), photometric="miniswhite")
    yield "deep.tiff", written(deep)
    yield "signed.tiff", written(deep.astype(np.int16) - 900)
    yield "float.tiff", written(deep.astype(np.float32) / 7, byteorder=">")
    yield "double.tiff", written(deep.astype(np.float64))
    yield "tiled.tiff", written(deep, tile=(16, 16), compression="zlib", predictor=True)
    yield "lzw.tiff", written(_grey((20, 18, 3)), compression="lzw", photometric="rgb")
    yield (
        "packbits.tiff",
        written(_grey((20, 18, 3)), compression="packbits", rowsperstrip=4, photometric="rgb"),
    )
    yield "jpeg.tiff", written(_grey((32, 32, 3)), compression="jpeg", photometric="ycbcr")
    yield "zstd.tiff", written(deep, compression="zstd")
    yield "planar.tiff", written(_grey((3, 9, 7)), photometric="rgb", planarconfig="separate")
    yield "alpha.tiff", written(_grey((9, 7, 4)), photometric="rgb", extrasamples=["unassalpha"])
    yield "pages.tiff", written(_grey((3, 9, 7)), photometric="minisblack")
    yield "bits.tiff", _encoded(Image.fromarray(_grey()).convert("1"), "TIFF", compression="group4")
    yield "palette.tiff", _encoded(Image.fromarray(_grey((9, 7, 3))).quantize(9), "TIFF")
    yield "cmyk.tiff", _encoded(Image.fromarray(_grey((9, 7, 3))).convert("CMYK"), "TIFF")
    yield "turned.tiff", _encoded(Image.fromarray(_grey()), "TIFF", exif=_exif(), description=SECRETS[0])
    yield "bigtiff.tiff", written(deep, bigtiff=True)
    ome = written(_grey((2, 9, 7)), ome=True, photometric="minisblack")
    yield "ome.tiff", re.sub(rb"(?<=urn:uuid:)[-0-9a-f]{36}", b"0" * 36, ome)  # depends on the time


def _others() -> Iterator[tuple[str, bytes]]:
    colour = Image.fromarray(_grey((17, 16, 3)))
    clear = Image.fromarray(_grey((17, 16, 4)), "RGBA")
    yield "lossy.webp", _encoded(colour, "WEBP", exif=_exif())
    yield "lossless.webp", _encoded(clear, "WEBP", lossless=True)
    yield "alpha.webp", _encoded(clear, "WEBP", quality=50)
    yield "moving.webp", _encoded(colour, "WEBP", save_all=True, append_images=[colour.rotate(90)])
    for mode in ("1", "L", "P", "RGB"):
        yield f"{mode}.bmp", _encoded(colour.convert(mode), "BMP")
    yield "clear.bmp", _encoded(clear, "BMP")
    yield "still.gif", _encoded(colour.quantize(16), "GIF")
    yield (
        "moving.gif",
        _encoded(colour.quantize(16), "GIF", save_all=True, append_images=[colour.rotate(90)], loop=0),
    )
    yield "clear.gif", _encoded(colour.quantize(16), "GIF", transparency=2, interlace=True)
