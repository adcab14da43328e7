"""DICOM seeds for `fuzz_readers.py`: generated, or from pydicom's test files."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from fuzz_seed_type import SECRETS, Seed, single_file
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

# Small files of pydicom with features of real writers that this module does not generate.
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


def _dataset(rows: int = 6, columns: int = 5, bits: int = 16, **attributes: Any) -> Dataset:
    """A CT slice. `attributes` replace its elements; None removes one."""
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


def dicom_files() -> Iterator[Seed]:
    def plain(name: str, data: bytes, format_: str = "dicom") -> Seed:
        return single_file(format_, name, "dicom", data)

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
        # Segments: one discrete value, then a linear segment.
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


def dicom_folders(folder: Path) -> Iterator[Seed]:
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
