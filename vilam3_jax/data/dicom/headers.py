"""Bounded reading of DICOM headers, restricted to an allow-list of elements.

Elements outside the lists below are skipped in the file, so no identifying data is read: the lists contain no
names, birth dates, descriptions or comments, and only the private elements needed for PET. They do contain
acquisition times and the patient's weight, the inputs of standardized uptake values; never put these in a
message. Only `read_mr_header` reads descriptions, to classify MRI sequences.
"""

from __future__ import annotations

import contextlib
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator, MutableSequence, Sequence
from typing import IO, Any, cast

import pydicom
from etils import epath
from pydicom.charset import convert_encodings, default_encoding
from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileMetaDataset
from pydicom.filereader import data_element_generator, read_partial
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)
from pydicom.valuerep import VR
from pydicom.values import convert_string

from vilam3_jax.data.dicom import header_walk
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.volume_io import check_file_size, one_line, wrap_file_errors
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path, check_passing, file_size

_OBJECT = """
    SpecificCharacterSet ImageType SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID
    FrameOfReferenceUID Modality Manufacturer ManufacturerModelName BodyPartExamined PatientPosition
    ViewPosition ImageLaterality Laterality PatientOrientation AnatomicRegionSequence CodeValue
    CodingSchemeDesignator SeriesNumber AcquisitionNumber InstanceNumber ConversionType BurnedInAnnotation
    RecognizableVisualFeatures ContentLabel LossyImageCompression LossyImageCompressionMethod
"""
_GEOMETRY = """
    ImagePositionPatient ImageOrientationPatient PixelSpacing ImagerPixelSpacing
    NominalScannedPixelSpacing PixelSpacingCalibrationType EstimatedRadiographicMagnificationFactor
    PixelAspectRatio SliceThickness SpacingBetweenSlices SliceLocation GantryDetectorTilt
    VolumetricProperties VolumeBasedCalculationTechnique
"""
_ACQUISITION = """
    ScanningSequence SequenceVariant ScanOptions MRAcquisitionType SequenceName EchoTime EchoNumbers
    RepetitionTime InversionTime FlipAngle ImagingFrequency DiffusionBValue DiffusionGradientOrientation
    TemporalPositionIdentifier NumberOfTemporalPositions TemporalPositionIndex TriggerTime
    NominalPercentageOfCardiacPhase StackID InStackPositionNumber ConvolutionKernel KVP FrameTime
    FrameTimeVector CineRate RecommendedDisplayFrameRate StartTrim StopTrim PhaseNumber
    ComplexImageComponent AcquisitionContrast FrameReferenceTime ActualFrameDuration NumberOfSlices
    NumberOfTimeSlices SeriesType Units CountsSource DecayCorrection DecayFactor CorrectedImage SUVType
    RandomsCorrectionMethod ReconstructionMethod AttenuationCorrectionMethod ScatterCorrectionMethod
    SeriesDate SeriesTime AcquisitionDate AcquisitionTime AcquisitionDateTime ContentDate ContentTime
    PatientWeight RadiopharmaceuticalInformationSequence RadionuclideTotalDose RadionuclideHalfLife
    RadiopharmaceuticalStartTime RadiopharmaceuticalStartDateTime DetectorInformationSequence SliceVector
    EnergyWindowVector DetectorVector RRIntervalVector TimeSlotVector PhaseVector
"""
_PIXEL_DESCRIPTION = """
    SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames FrameIncrementPointer
    Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation SmallestImagePixelValue
    LargestImagePixelValue PixelPaddingValue PixelPaddingRangeLimit RescaleIntercept RescaleSlope
    RescaleType WindowCenter WindowWidth VOILUTFunction PresentationLUTShape PixelIntensityRelationship
    PixelIntensityRelationshipSign PixelPresentation PresentationIntentType QualityControlImage
"""
_DIMENSIONS = """
    DimensionOrganizationType DimensionIndexSequence DimensionIndexPointer FunctionalGroupPointer
    ConcatenationUID InConcatenationNumber InConcatenationTotalNumber ConcatenationFrameOffsetNumber
"""
_FUNCTIONAL_GROUPS = """
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence FrameContentSequence
    FrameAcquisitionNumber DimensionIndexValues PlanePositionSequence PlaneOrientationSequence
    PixelMeasuresSequence PixelValueTransformationSequence FrameVOILUTSequence FrameAnatomySequence
    FrameLaterality MRImageFrameTypeSequence CTImageFrameTypeSequence PETFrameTypeSequence
    XRay3DFrameTypeSequence FrameType MRDiffusionSequence DiffusionDirectionality
    DiffusionGradientDirectionSequence MREchoSequence EffectiveEchoTime
    MRTimingAndRelatedParametersSequence CardiacSynchronizationSequence NominalCardiacTriggerDelayTime
    TemporalPositionSequence TemporalPositionTimeOffset CTAcquisitionDetailsSequence CTPositionSequence
    FrameReferenceDateTime FrameAcquisitionDateTime FrameAcquisitionDuration SegmentIdentificationSequence
    ReferencedSegmentNumber RealWorldValueMappingSequence
"""
_PIXELS = """
    PixelData FloatPixelData DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths
    FloatPixelPaddingValue FloatPixelPaddingRangeLimit DoubleFloatPixelPaddingValue
    DoubleFloatPixelPaddingRangeLimit ModalityLUTSequence ModalityLUTType VOILUTSequence
    PresentationLUTSequence LUTDescriptor LUTData RedPaletteColorLookupTableDescriptor
    GreenPaletteColorLookupTableDescriptor BluePaletteColorLookupTableDescriptor
    RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData
    SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
    SegmentedBluePaletteColorLookupTableData PaletteColorLookupTableUID
"""


def _tags(*lists: str) -> frozenset[int]:
    tags = {keyword: tag_for_keyword(keyword) for keyword in " ".join(lists).split()}
    unknown = [keyword for keyword, tag in tags.items() if tag is None]
    assert not unknown, unknown
    return frozenset(cast(dict[str, int], tags).values())


# Private creators and elements used by `suv`: PET scan time (GE), SUV and activity factors (Philips).
_PRIVATE_TAGS = frozenset({0x00090010, 0x0009100D, 0x70530010, 0x70531000, 0x70531009})

_META_TAGS = _tags("MediaStorageSOPClassUID MediaStorageSOPInstanceUID TransferSyntaxUID")
# Used to classify MRI sequences. Free text may identify a patient: only for `read_mr_header`.
_MR_SEQUENCE = """
    SeriesDescription ProtocolName ContrastBolusAgent ContrastBolusAgentSequence CodeMeaning
    MRModifierSequence InversionTimes
"""
_HEADER_TAGS = _PRIVATE_TAGS | _tags(
    _OBJECT, _GEOMETRY, _ACQUISITION, _PIXEL_DESCRIPTION, _DIMENSIONS, _FUNCTIONAL_GROUPS
)
_MR_TAGS = _HEADER_TAGS | _tags(_MR_SEQUENCE)
_OVERLAY_ROWS = frozenset(0x60000010 + (plane << 17) for plane in range(16))
_DATASET_TAGS = _HEADER_TAGS | _tags(_PIXELS) | _OVERLAY_ROWS
_SEQUENCE_TAGS = frozenset(
    tag for tag in _DATASET_TAGS | _MR_TAGS if dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ"
)
# Only these values may exceed `_MAX_VALUE_BYTES`.
_LONG_TAGS = _tags(_PIXELS)
_MAX_VALUE_BYTES = 1 << 16

_HEAD_BYTES = 1024
_CHARACTER_SET = 0x00080005
_PIXEL_TAGS = _tags("PixelData FloatPixelData DoubleFloatPixelData")

_MAX_READS = 4_000_000  # pydicom reads at most three times per element or item
_MAX_BYTES = 512 << 20  # of one header

# pydicom's log messages and warnings quote values of the file, which may identify a patient.
logging.getLogger("pydicom").propagate = False

_VALUE_REPRESENTATIONS = frozenset(str(vr).encode() for vr in VR if len(str(vr)) == 2)


class ImageError(Exception):
    """An image that cannot be read; `wrap_dicom_errors` adds the path to the message."""


@contextlib.contextmanager
def wrap_dicom_errors(path: PathLike) -> Iterator[None]:
    """Converts every error to a one-line `UserError` that names `path`; silences pydicom's warnings.

    Failures of disk or network become an `UnavailableError`.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pydicom\.")
            yield
    except UserError:
        raise
    except ImageError as error:
        raise UserError(f"{path}: {error}") from error
    except EOFError as error:
        raise UserError(f"{path}: ends inside an element; the file is cut short, fetch it again") from error
    except (RecursionError, MemoryError) as error:
        nested = isinstance(error, RecursionError)
        reason = "sequences nested too deeply" if nested else "more memory needed than available"
        raise UserError(f"{path}: damaged DICOM data ({reason}); export it again") from error
    except Exception as error:  # pydicom and its decoders raise arbitrary exceptions on damaged data
        check_passing(path, error)
        raise UserError(f"{path}: damaged DICOM data ({one_line(error)}); export it again") from error


def as_list(value: Any) -> list[Any]:
    """The values of an element: empty if it is None or "", one item unless it is multi-valued."""
    if value is None or value == "":
        return []
    is_multiple = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return list(value) if is_multiple else [value]


def numbers(item: pydicom.Dataset, keyword: str) -> list[float | None]:
    """The numbers of an element: empty if absent, None for a value that is not a number.

    Parses the raw element, because pydicom rejects all values of an element if one is malformed.
    """
    raw = item.get_item(keyword)
    if raw is None:
        return []
    is_text = isinstance(raw, RawDataElement) and raw.VR in ("DS", "IS", None)
    if is_text and dictionary_VR(raw.tag) in ("DS", "IS"):
        texts = (cast(bytes, raw.value) or b"").decode("latin-1").strip(" \0").split("\\")
        return [] if texts == [""] else [as_number(text) for text in texts]
    return [as_number(value) for value in as_list(item[keyword].value)]


def as_number(value: Any) -> float | None:
    """`value` as a number, None if it is not numeric."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def functional_group(dataset: pydicom.Dataset, frame: int, keyword: str) -> pydicom.Dataset | None:
    """A functional group macro of one frame: per-frame if present, otherwise shared."""
    own = items(dataset, "PerFrameFunctionalGroupsSequence")
    shared = items(dataset, "SharedFunctionalGroupsSequence")
    for groups, index in ((own, frame), (shared, 0)):
        if index < len(groups) and (found := items(groups[index], keyword)):
            return found[0]
    return None


def items(dataset: pydicom.Dataset, keyword: str) -> Sequence[pydicom.Dataset]:
    """The items of a sequence, empty if it is absent."""
    return cast(Any, dataset[keyword].value) or () if keyword in dataset else ()


def stated_encoding(dataset: pydicom.Dataset) -> UID:
    """The native transfer syntax in which the header was read; old archives omit the meta information."""
    implicit, little = dataset.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def overlay_planes(dataset: pydicom.Dataset) -> int:
    """The number of overlay planes in a data set."""
    return sum(tag in dataset for tag in _OVERLAY_ROWS)


def is_directory(header: pydicom.Dataset) -> bool:
    """Whether the header belongs to a DICOMDIR, an index of other files without pixels."""
    uid = _raw_uid(header.file_meta, "MediaStorageSOPClassUID") or _raw_uid(header, "SOPClassUID")
    return uid == MediaStorageDirectoryStorage


def _raw_uid(dataset: pydicom.Dataset, keyword: str) -> str:
    """A UID from its raw value, which also works for a damaged value representation."""
    element = dataset.get_item(keyword)
    value = b"" if element is None else element.value
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")
    return text.strip("\0 ")


def read_header(path: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> pydicom.Dataset | None:
    """Reads the elements that describe an image and its frames, without the pixels.

    Args:
      path: any file. DICOM is recognised by content, not by suffix: by the preamble or, in old archives
        without it, by the first elements (implicit or explicit VR, little or big endian).
      limits: `nesting` bounds the depth of sequences; element lengths and counts have fixed bounds.

    Returns:
      The elements of the allow-list, with `file_meta`; None if the file is not DICOM. A DICOMDIR also yields
      a header, see `is_directory`. Values are decoded on access: access them inside `wrap_dicom_errors`.

    Raises:
      UnavailableError: disk or network failure.
      UserError: missing file or damaged header.
    """
    return _read(path, _HEADER_TAGS, limits)


def read_mr_header(path: PathLike) -> pydicom.Dataset | None:
    """`read_header` with descriptions and the contrast agent; raises the same errors.

    The descriptions may identify a patient: callers must neither show nor store them.
    """
    return _read(path, _MR_TAGS, DEFAULT_LIMITS)


def read_dataset(path: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> pydicom.Dataset:
    """Reads the elements of the allow-list including the encoded pixels, the input of `pixels`.

    Raises:
      UnavailableError: disk or network failure.
      UserError: missing, not DICOM, larger than `limits.file_bytes`, or damaged.
    """
    check_file_size(path, limits)
    dataset = _read(path, _DATASET_TAGS, limits, with_pixels=True)
    if dataset is None:
        raise UserError(f"{path}: not a DICOM file; check what it is")
    return dataset


def _read(
    path: PathLike, tags: frozenset[int], limits: Limits, *, with_pixels: bool = False
) -> pydicom.Dataset | None:
    """Reads the elements of `tags` up to the pixels, or including them."""
    path = as_path(path)
    with wrap_dicom_errors(path), _opened(path) as file:
        head = file.read(_HEAD_BYTES)
        has_preamble = head[128:132] == b"DICM"
        if not has_preamble and not any(_plausible_start(head, order) for order in "<>"):
            return None
        dataset = _walk(file, tags) if has_preamble and not with_pixels else None
        if dataset is None:
            dataset = _parse(file, head, tags, limits, with_pixels)
        for tag in list(dataset.file_meta.keys()):
            if tag in _META_TAGS:
                dataset.file_meta[tag]  # decode here, inside `wrap_dicom_errors`
            else:
                del dataset.file_meta[tag]
        if not len(dataset) and not is_directory(dataset):  # pydicom drops everything at an unexpected end
            raise ImageError("DICOM without any image element; the file may be cut short, fetch it again")
        _reduce(dataset, tags, limits.nesting)
        return dataset if has_preamble or "SOPClassUID" in dataset or "Rows" in dataset else None


def _walk(file: IO[bytes], tags: frozenset[int]) -> pydicom.Dataset | None:
    """Reads a header with `header_walk`; None if it cannot."""
    found = header_walk.walk(file, tags)
    if found is None:
        return None
    meta, elements, implicit = found
    dataset = pydicom.Dataset(cast(Any, elements))
    encoding: str | MutableSequence[str] = default_encoding
    if (named := elements.get(BaseTag(_CHARACTER_SET))) is not None:
        encoding = convert_encodings(cast(str, convert_string(cast(bytes, named.value or b""), True)))
    dataset.set_original_encoding(implicit, True, encoding)
    dataset.file_meta = FileMetaDataset(cast(Any, meta))
    return dataset


def _parse(
    file: IO[bytes], head: bytes, tags: frozenset[int], limits: Limits, with_pixels: bool
) -> pydicom.Dataset:
    """Reads a data set with pydicom; raises `EOFError` if it is cut short."""
    max_bytes = limits.decoded_bytes if with_pixels else _MAX_BYTES

    def stop(tag: int, vr: str | None, length: int) -> bool:
        return tag in _PIXEL_TAGS if with_pixels else header_walk.ends_header(tag)

    file, meta = _inflated(file, head, max_bytes)
    file.seek(0)
    bounded = cast(Any, _BoundedFile(file, max_bytes))
    read = read_partial(bounded, cast(Any, stop), force=True, specific_tags=cast(Any, list(tags)))
    dataset = pydicom.Dataset(read)  # a copy without the open file that a FileDataset keeps
    implicit, little = _encoding(read)
    dataset.set_original_encoding(implicit, little, read.original_character_set)
    dataset.file_meta = read.file_meta if meta is None else meta
    if with_pixels:
        for element in data_element_generator(bounded, implicit, little):
            if element.tag in _PIXEL_TAGS:
                dataset[element.tag] = element
                break
    values = (dataset.get_item(tag) for tag in list(dataset.keys()))  # iterating would decode all elements
    is_cut_short = any(
        isinstance(raw, RawDataElement) and raw.value is not None and len(raw.value) < raw.length < 0xFFFFFFFF
        for raw in values
    )
    if bounded.tell() > bounded.size or is_cut_short:
        raise EOFError
    return dataset


def _encoding(read: pydicom.FileDataset) -> tuple[bool, bool]:
    """(implicit VR, little endian) of the elements, which may contradict the transfer syntax."""
    for tag in list(read.keys()):
        raw = read.get_item(tag)
        if isinstance(raw, RawDataElement):
            return raw.is_implicit_VR, raw.is_little_endian
    implicit, little = read.original_encoding
    return bool(implicit), bool(little)


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[IO[bytes]]:
    with wrap_file_errors(path):
        file_size(path)  # missing object-store files fail here, not on the first read
        file = path.open("rb")
    with file:
        yield cast(IO[bytes], file)


class _BoundedFile:
    """A file that limits the number of reads and the bytes per read."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._read, self._reads_left, self._max_bytes = file.read, _MAX_READS, max_bytes
        position = file.tell()
        self.size = file.seek(0, io.SEEK_END)
        file.seek(position)
        self.tell, self.seek = file.tell, file.seek

    def read(self, count: int = -1) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise ValueError("too many elements in the header")
        if count > 8192 or count < 0:
            rest = max(self.size - self.tell(), 0)
            count = rest if count < 0 else min(count, rest)
            if count > self._max_bytes:
                raise ValueError(f"an element of {count} bytes in the header")
        return self._read(count)


def _plausible_start(head: bytes, order: str) -> bool:
    """Whether a file without preamble starts with two known elements, the first in group 0002 or 0008."""
    start, previous = 0, -1
    for number in range(2):
        if start + 12 > len(head):
            return False
        group, element, vr, length = struct.unpack_from(f"{order}HH2sH", head, start)
        tag = group << 16 | element
        if tag <= previous or not (element == 0 or dictionary_has_tag(tag)):
            return False
        if number == 0 and group not in (0x0002, 0x0008):
            return False
        if vr not in _VALUE_REPRESENTATIONS:  # implicit VR, which is always little endian
            if order == ">":
                return False
            (length,) = struct.unpack_from("<L", head, start + 4)
        if length > 256:
            return False
        start, previous = start + 8 + length, tag
    return True


def _inflated(file: IO[bytes], head: bytes, max_bytes: int) -> tuple[IO[bytes], FileMetaDataset | None]:
    """(inflated data set, meta information) of a deflated file; any other file unchanged, and None.

    Inflated here because pydicom has no size limit.
    """
    if str(DeflatedExplicitVRLittleEndian).encode() not in head:
        return file, None
    if head[128:138] != b"DICM\2\0\0\0UL":
        raise ValueError("deflated file without a meta information length")
    (length,) = struct.unpack_from("<L", head, 140)
    start = 144 + length
    file.seek(0)
    meta = pydicom.dcmread(io.BytesIO(file.read(min(start, _MAX_VALUE_BYTES)))).file_meta
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return file, None
    file.seek(start)
    inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), max_bytes)
    return io.BytesIO(inflated), meta


def _reduce(item: pydicom.Dataset, tags: frozenset[int], nesting: int) -> None:
    """Removes all elements outside `tags` from `item` and its sequences, in place."""
    if nesting < 0:
        raise ValueError("sequences nested too deeply")
    for tag in list(item.keys()):
        if tag not in tags:
            del item[tag]
            continue
        raw = item.get_item(tag)
        if isinstance(raw, RawDataElement) and raw.VR != "SQ" and tag not in _SEQUENCE_TAGS:
            if raw.value is not None and len(raw.value) > _MAX_VALUE_BYTES and tag not in _LONG_TAGS:
                raise ValueError(f"an element of {len(raw.value)} bytes in the header")
        elif (element := item[tag]).VR == "SQ":
            for child in cast(Any, element.value) or ():
                _reduce(child, tags, nesting - 1)
        elif tag in _SEQUENCE_TAGS:
            del item[tag]
