"""Small valid inputs of every format, for `fuzz_readers.py`. All are made in code or ship with pydicom.

Every DICOM file that is made here holds `SECRETS`: the campaign checks that they appear in no message.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import imagecodecs
import nibabel as nib
import nrrd
import numpy as np
import pydicom
import SimpleITK as sitk
import tifffile
from PIL import Image, ImageCms, PngImagePlugin
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.fileset import FileSet
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    JPEG2000,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    UltrasoundMultiFrameImageStorage,
)

SECRETS = ("Doe^Jane", "MRN-4711", "19480229", "Burgdorf")
# Small files of pydicom with what writers in the field do, and what this module does not write.
_PYDICOM_FILES = (
    *("CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_expb.dcm"),
    *(
        "MR_small_padded.dcm",
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
    ),
    *("JPEG2000.dcm", "JPEG-lossy.dcm", "JPGExtended.dcm", "JPEGLSNearLossless_08.dcm", "image_dfl.dcm"),
    *("JPEGLSNearLossless_16.dcm", "SC_rgb_jls_lossy_line.dcm", "SC_rgb_small_odd.dcm", "SC_rgb_rle.dcm"),
    *("SC_rgb_small_odd_big_endian.dcm", "SC_rgb_small_odd_jpeg.dcm", "SC_rgb_rle_16bit_2frame.dcm"),
    *("SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm", "SC_jpeg_no_color_transform.dcm", "test-SR.dcm"),
    *(
        "SC_ybr_full_422_uncompressed.dcm",
        "SC_rgb_rle_32bit.dcm",
        "rtdose.dcm",
        "rtdose_rle.dcm",
        "rtplan.dcm",
    ),
    *("badVR.dcm", "nested_priv_SQ.dcm", "UN_sequence.dcm", "GDCMJ2K_TextGBR.dcm", "liver_1frame.dcm"),
)


@dataclasses.dataclass(frozen=True)
class Seed:
    """One valid input.

    Attributes:
      format: row of the summary.
      name: unique.
      kind: which entry points take it: "volume", "picture", "dicom" or "folder".
      files: path, relative to the folder of the input → content.
      entry: name of the file that is opened; "" opens the folder.
    """

    format: str
    name: str
    kind: str
    files: Mapping[str, bytes]
    entry: str


def all_seeds() -> list[Seed]:
    """Every seed, in a fixed order."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = [
            *_nifti(Path(folder)),
            *_nrrd(Path(folder)),
            *_metaimage(Path(folder)),
            *_dicom_files(),
            *_dicom_folders(Path(folder)),
            *_pictures(),
        ]
    assert len({seed.name for seed in seeds}) == len(seeds)
    return seeds


def _one(format_: str, name: str, kind: str, data: bytes) -> Seed:
    return Seed(format_, name, kind, {name: data}, name)


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
            yield _one("nifti", f"nifti{version}{'lb'[order == '>']}.nii", "volume", image.to_bytes())
    first = nib.Nifti1Image(_voxels(dtype=np.float32), _AFFINE)
    first.header.set_slope_inter(2.0, -3.0)
    yield _one("nifti", "scaled.nii.gz", "volume", gzip.compress(first.to_bytes(), 1, mtime=0))
    frames = nib.Nifti1Image(_voxels((5, 6, 4, 1)), _AFFINE)
    frames.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment"))
    yield _one("nifti", "one_frame.nii.gz", "volume", gzip.compress(frames.to_bytes(), 1, mtime=0))
    yield _one("nifti", "series.nii", "volume", nib.Nifti1Image(_voxels((5, 6, 4, 3)), _AFFINE).to_bytes())
    rgb = np.zeros((5, 6, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    yield _one("nifti", "colour.nii", "volume", nib.Nifti1Image(rgb, _AFFINE).to_bytes())
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
    for number in range(3):  # weighs more
        yield Seed("sidecar", f"sidecar{number}", "volume", files, "scan.nii")


def _undated(path: Path) -> bytes:
    """Without the time at which pynrrd wrote it."""
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
        yield _one("nrrd", path.name, "volume", _undated(path))
    big = header | {"endian": "big", "space": "RAS", "space units": ["mm", "mm", "mm"]}
    nrrd.write(str(folder / "big.nrrd"), _voxels().astype(">i2"), big | {"encoding": "raw", "modality": "CT"})
    yield _one("nrrd", "big.nrrd", "volume", _undated(folder / "big.nrrd"))
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
    yield _one("nrrd", "list.nrrd", "volume", _undated(folder / "list.nrrd"))


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


# DICOM.


def _dataset(rows: int = 6, columns: int = 5, bits: int = 16, **attributes: Any) -> Dataset:
    """A CT slice. Attributes replace its elements; None removes one."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, "1.2.826.0.1.3680043.8.498.1"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3.4", "1.2.3.4.5"
    dataset.FrameOfReferenceUID, dataset.StudyID = "1.2.3.4.6", "1"
    dataset.StudyDate, dataset.StudyTime = "20260101", "120000"
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = SECRETS[:3]
    dataset.InstitutionName, dataset.StudyDescription = SECRETS[3], f"{SECRETS[0]} of {SECRETS[3]}"
    dataset.Modality, dataset.BodyPartExamined, dataset.ImageType = (
        "CT",
        "CHEST",
        ["ORIGINAL", "PRIMARY", "AXIAL"],
    )
    dataset.SpecificCharacterSet, dataset.InstanceNumber, dataset.SeriesNumber = "ISO_IR 100", 1, 2
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = rows, columns, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = 0
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [-30.25, 41.5, 107.0], [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.SliceThickness = [0.8, 0.8], 2.5
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    dataset.WindowCenter, dataset.WindowWidth = [40, -600], [400, 1500]
    dataset.add(pydicom.DataElement(0x00091001, "LO", SECRETS[0]))
    dataset.PixelData = _pixel_bytes(dataset)
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def _pixel_bytes(dataset: Dataset, frames: int = 1) -> bytes:
    count = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * dataset.BitsAllocated // 8 * frames
    data = np.random.default_rng(1).integers(0, 256, count).astype(np.uint8).tobytes()
    return data + b"\0" * (len(data) % 2)


def _saved(dataset: Dataset, syntax: str = ExplicitVRLittleEndian, *, preamble: bool = True) -> bytes:
    if not getattr(dataset, "file_meta", None):
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    pydicom.dcmwrite(
        buffer,
        dataset,
        enforce_file_format=preamble,
        implicit_vr=syntax == ImplicitVRLittleEndian,
        little_endian=syntax != ExplicitVRBigEndian,
    )
    return buffer.getvalue()


def _encapsulated(dataset: Dataset, frames: list[bytes], syntax: str) -> bytes:
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    return _saved(dataset, syntax)


def _lut() -> Dataset:
    item = Dataset()
    item.add(pydicom.DataElement(0x00283002, "US", [16, 0, 8]))
    item.add(pydicom.DataElement(0x00283006, "US", list(range(0, 256, 16))))
    item.ModalityLUTType = "OD"
    return item


def _dicom_files() -> Iterator[Seed]:
    def plain(name: str, data: bytes, format_: str = "dicom") -> Seed:
        return _one(format_, name, "dicom", data)

    yield plain("explicit.dcm", _saved(_dataset()))
    yield plain("implicit.dcm", _saved(_dataset(), ImplicitVRLittleEndian))
    yield plain("big.dcm", _saved(_dataset(), ExplicitVRBigEndian))
    yield plain("deflated.dcm", _saved(_dataset(), DeflatedExplicitVRLittleEndian))
    bare = _dataset()
    bare.file_meta = FileMetaDataset()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, bare, implicit_vr=True, little_endian=True, enforce_file_format=False)
    yield plain("bare", buffer.getvalue())
    yield plain(
        "padding.dcm", _saved(_dataset(PixelPaddingValue=63, PixelPaddingRangeLimit=99, Modality="MR"))
    )
    yield plain("signed12.dcm", _saved(_dataset(BitsStored=12, HighBit=11, PixelRepresentation=1)))
    film = _dataset(
        PhotometricInterpretation="MONOCHROME1",
        PresentationLUTShape="INVERSE",
        Modality="DX",
        VOILUTFunction="SIGMOID",
        ImagePositionPatient=None,
        ImageOrientationPatient=None,
    )
    yield plain("film.dcm", _saved(film))
    luts = _dataset(8, 8, 8, RescaleSlope=None, RescaleIntercept=None, Modality="CR")
    luts.ModalityLUTSequence, luts.VOILUTSequence = DicomSequence([_lut()]), DicomSequence([_lut(), _lut()])
    yield plain("luts.dcm", _saved(luts))
    rgb = _dataset(
        6, 6, 8, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=1, Modality="OT"
    )
    rgb.PixelData = _pixel_bytes(rgb)
    yield plain("rgb.dcm", _saved(rgb))
    ybr = _dataset(6, 6, 8, SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL", PlanarConfiguration=0)
    ybr.PixelData = _pixel_bytes(ybr)
    yield plain("ybr.dcm", _saved(ybr))
    half = _dataset(
        6, 6, 8, SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL_422", PlanarConfiguration=0
    )
    half.PixelData = _pixel_bytes(half)[: 6 * 6 * 2]
    yield plain("ybr422.dcm", _saved(half))
    for segmented in (False, True):
        yield plain(f"palette{segmented}.dcm", _saved(_palette(segmented)))
    overlay = _dataset(BitsStored=12, HighBit=11)
    overlay.add(pydicom.DataElement(0x60000010, "US", 6))
    overlay.add(pydicom.DataElement(0x60000011, "US", 5))
    overlay.add(pydicom.DataElement(0x60000050, "SS", [1, 1]))
    overlay.add(pydicom.DataElement(0x60000100, "US", 16))
    overlay.add(pydicom.DataElement(0x60000102, "US", 12))
    yield plain("overlay.dcm", _saved(overlay))
    for keyword, code in (("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")):
        parametric = _dataset(PixelData=None, BitsStored=None, HighBit=None, PixelRepresentation=None)
        parametric.BitsAllocated = np.dtype(code).itemsize * 8
        setattr(parametric, keyword, np.linspace(-1, 1, 30).astype(code).tobytes())
        yield plain(f"{keyword}.dcm", _saved(parametric))
    bits = _dataset(8, 8, 1, BitsStored=1, HighBit=0)
    yield plain("bits.dcm", _saved(bits))
    pet = _dataset(
        Modality="PT",
        Units="BQML",
        DecayCorrection="START",
        CorrectedImage=["ATTN", "DECY"],
        SeriesDate="20260101",
        SeriesTime="120000",
        AcquisitionDate="20260101",
        AcquisitionTime="120500",
        PatientWeight="70",
    )
    dose = Dataset()
    dose.RadionuclideTotalDose, dose.RadionuclideHalfLife, dose.RadiopharmaceuticalStartTime = (
        3.7e8,
        6586.2,
        "110000",
    )
    pet.RadiopharmaceuticalInformationSequence = DicomSequence([dose])
    yield plain("pet.dcm", _saved(pet))
    for name in _PYDICOM_FILES:
        path = get_testdata_file(name, download=False)
        assert path is not None, name
        yield plain(f"pydicom_{name}", Path(path).read_bytes())
    for name, data in _compressed():
        yield plain(name, data, "dicom compressed")
    for name, data in _multi_frame():
        yield plain(name, data, "dicom frames")


def _palette(segmented: bool) -> Dataset:
    dataset = _dataset(6, 6, 8, PhotometricInterpretation="PALETTE COLOR", Modality="US", RescaleSlope=None)
    prefix = "Segmented" if segmented else ""
    for colour in ("Red", "Green", "Blue"):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 16])
        # Segments: one discrete value, then a line to the last.
        values = [0, 1, 0, 1, 255, 0xFFFF] if segmented else range(0, 65536, 256)
        data = struct.pack(f"<{len(values)}H", *values)
        setattr(dataset, f"{prefix}{colour}PaletteColorLookupTableData", data)
    return dataset


def _compressed() -> Iterator[tuple[str, bytes]]:
    grey = np.random.default_rng(2).integers(0, 4096, (6, 6)).astype(np.uint16)
    eight = (grey >> 4).astype(np.uint8)
    colour = np.random.default_rng(3).integers(0, 256, (8, 8, 3)).astype(np.uint8)

    def deep(**more: Any) -> Dataset:
        return _dataset(6, 6, 16, BitsStored=12, HighBit=11, **more)

    def tinted(photometric: str) -> Dataset:
        return _dataset(
            8, 8, 8, SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation=photometric
        )

    yield (
        "j2k.dcm",
        _encapsulated(
            deep(), [imagecodecs.jpeg2k_encode(grey, codecformat="j2k", reversible=True)], JPEG2000Lossless
        ),
    )
    yield (
        "jp2.dcm",
        _encapsulated(deep(), [imagecodecs.jpeg2k_encode(grey, codecformat="jp2", level=80)], JPEG2000),
    )
    yield (
        "j2k_rct.dcm",
        _encapsulated(
            tinted("YBR_RCT"),
            [imagecodecs.jpeg2k_encode(colour, codecformat="j2k", reversible=True)],
            JPEG2000Lossless,
        ),
    )
    yield "jls.dcm", _encapsulated(deep(), [imagecodecs.jpegls_encode(grey)], JPEGLSLossless)
    yield "jls_colour.dcm", _encapsulated(tinted("RGB"), [imagecodecs.jpegls_encode(colour)], JPEGLSLossless)
    yield "lossless.dcm", _encapsulated(deep(), [imagecodecs.ljpeg_encode(grey)], JPEGLossless)
    yield "jpeg.dcm", _encapsulated(_dataset(6, 6, 8), [imagecodecs.jpeg8_encode(eight)], JPEGBaseline8Bit)
    yield (
        "jpeg_colour.dcm",
        _encapsulated(tinted("YBR_FULL_422"), [imagecodecs.jpeg8_encode(colour)], JPEGBaseline8Bit),
    )
    one = deep()
    one.PixelData = grey.tobytes()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.compress(RLELossless, generate_instance_uid=False)
    yield "rle.dcm", _saved(one)
    two = deep(NumberOfFrames=2, SOPClassUID=UltrasoundMultiFrameImageStorage)
    yield "jls_frames.dcm", _encapsulated(two, [imagecodecs.jpegls_encode(grey)] * 2, JPEGLSLossless)


def _multi_frame() -> Iterator[tuple[str, bytes]]:
    cine = _dataset(
        6,
        6,
        8,
        SOPClassUID=UltrasoundMultiFrameImageStorage,
        Modality="US",
        NumberOfFrames=3,
        FrameTime=40,
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=0,
    )
    cine.PixelData = _pixel_bytes(cine, 3)
    yield "cine.dcm", _saved(cine)
    capture = _dataset(6, 6, 16, SOPClassUID=SecondaryCaptureImageStorage, NumberOfFrames=2, Modality="OT")
    capture.PixelData = _pixel_bytes(capture, 2)
    yield "capture.dcm", _saved(capture, ImplicitVRLittleEndian)
    for syntax in (ExplicitVRLittleEndian, ExplicitVRBigEndian):
        yield f"enhanced_{syntax[-1]}.dcm", _saved(_enhanced(), syntax)
    scans = _dataset(6, 6, 16, Modality="NM", NumberOfFrames=3, SliceThickness=3, SpacingBetweenSlices=-3)
    scans.PixelData = _pixel_bytes(scans, 3)
    yield "spect.dcm", _saved(scans)


def _enhanced() -> Dataset:
    dataset = _dataset(
        6,
        5,
        16,
        SOPClassUID=EnhancedCTImageStorage,
        NumberOfFrames=3,
        ImagePositionPatient=None,
        ImageOrientationPatient=None,
        PixelSpacing=None,
        RescaleSlope=None,
        RescaleIntercept=None,
    )
    dataset.PixelData = _pixel_bytes(dataset, 3)
    shared = Dataset()
    shared.PlaneOrientationSequence = DicomSequence([Dataset()])
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence = DicomSequence([Dataset()])
    shared.PixelMeasuresSequence[0].PixelSpacing = [0.8, 0.8]
    shared.PixelMeasuresSequence[0].SliceThickness = 2.5
    dataset.SharedFunctionalGroupsSequence = DicomSequence([shared])
    frames = []
    for number in range(3):
        frame = Dataset()
        frame.FrameContentSequence = DicomSequence([Dataset()])
        frame.FrameContentSequence[0].DimensionIndexValues = [1, number + 1]
        frame.FrameContentSequence[0].StackID = "1"
        frame.FrameContentSequence[0].InStackPositionNumber = number + 1
        frame.PlanePositionSequence = DicomSequence([Dataset()])
        frame.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 2.5 * number]
        frame.PixelValueTransformationSequence = DicomSequence([Dataset()])
        frame.PixelValueTransformationSequence[0].RescaleSlope = 1 + number
        frame.PixelValueTransformationSequence[0].RescaleIntercept = -1024
        frame.PixelValueTransformationSequence[0].RescaleType = "HU"
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    return dataset


def _slices(count: int = 4, **attributes: Any) -> dict[str, bytes]:
    return {
        f"{number:03}.dcm": _saved(
            _dataset(
                SOPInstanceUID=f"1.2.826.0.1.3680043.8.498.{number + 1}",
                InstanceNumber=number + 1,
                ImagePositionPatient=[-30.25, 41.5, 107.0 + 2.5 * number],
                **attributes,
            )
        )
        for number in range(count)
    }


def _dicom_folders(folder: Path) -> Iterator[Seed]:
    series = _slices()
    yield Seed("dicom folder", "series", "folder", series, "")
    packed = _slices(3)
    for name, data in packed.items():
        dataset = pydicom.dcmread(io.BytesIO(data))
        dataset.compress(RLELossless, generate_instance_uid=False)
        packed[name] = _saved(dataset)
    yield Seed("dicom folder", "packed_series", "folder", packed, "")
    other = _slices(2, SeriesInstanceUID="1.2.3.4.7", Modality="MR", Rows=5, Columns=6)
    mixed = series | {f"mr_{name}": data for name, data in other.items()} | {"notes.txt": b"not an image"}
    mixed["report"] = Path(get_testdata_file("test-SR.dcm", download=False) or "").read_bytes()
    yield Seed("dicom folder", "two_series", "folder", mixed, "")
    index = FileSet()
    index.UID = "1.2.826.0.1.3680043.8.498.9"  # type: ignore[assignment]
    for data in series.values():
        index.add(pydicom.dcmread(io.BytesIO(data)))
    index.write(folder / "set")
    indexed = {
        path.relative_to(folder / "set").as_posix(): path.read_bytes()
        for path in sorted((folder / "set").rglob("*"))
        if path.is_file()
    }
    yield Seed("dicom folder", "dicomdir", "folder", indexed, "")
    yield Seed("dicom folder", "dicomdir_itself", "dicom", indexed, "DICOMDIR")


# Pictures.


def _pictures() -> Iterator[Seed]:
    for name, data in (*_pngs(), *_jpegs(), *_tiffs(), *_others()):
        yield _one(name.split(".")[-1], name, "picture", data)


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
    return profile[:24] + bytes(12) + profile[36:]  # without the time


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
    """Adam7, which Pillow does not write: 1 x 1 has one pass."""

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
    yield "ome.tiff", re.sub(rb"(?<=urn:uuid:)[-0-9a-f]{36}", b"0" * 36, ome)  # by the clock


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
