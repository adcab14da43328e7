"""DICOM headers: recognised by content, bounded, and reduced to what reading an image needs.

Nothing that identifies a patient is read: elements outside the lists below are skipped in the file. The lists
hold no names, dates of birth, descriptions or comments, and of private elements only those of PET.
Acquisition times and the patient's weight are in them, because standardized uptake values are computed from
them; they belong in no message. Only `read_mr_header` reads descriptions, from which an MRI sequence is
recognised.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
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
from pydicom.uid import DeflatedExplicitVRLittleEndian, MediaStorageDirectoryStorage
from pydicom.valuerep import VR
from pydicom.values import convert_string

from vilam3_jax.data.dicom import header_walk
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path, check_passing, file_size

_META = """
    MediaStorageSOPClassUID MediaStorageSOPInstanceUID TransferSyntaxUID
"""
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


# The creators and elements from which `suv` computes uptake values: PET scan time (GE), SUV and activity
# factors (Philips).
_PRIVATE_TAGS = frozenset({0x00090010, 0x0009100D, 0x70530010, 0x70531000, 0x70531009})

_META_TAGS = _tags(_META)
# From which an MRI sequence is recognised. Free text, which may identify a patient: `read_mr_header` alone.
_MR_SEQUENCE = """
    SeriesDescription ProtocolName ContrastBolusAgent ContrastBolusAgentSequence CodeMeaning
    MRModifierSequence InversionTimes
"""
_HEADER_TAGS = _tags(_OBJECT, _GEOMETRY, _ACQUISITION, _PIXEL_DESCRIPTION, _DIMENSIONS) | _PRIVATE_TAGS
_FRAME_TAGS = _HEADER_TAGS | _tags(_FUNCTIONAL_GROUPS)
_MR_TAGS = _FRAME_TAGS | _tags(_MR_SEQUENCE)
_OVERLAY_ROWS = frozenset(0x60000010 + (plane << 17) for plane in range(16))
_DATASET_TAGS = _FRAME_TAGS | _tags(_PIXELS) | _OVERLAY_ROWS
_SEQUENCE_TAGS = frozenset(
    tag for tag in _DATASET_TAGS | _MR_TAGS if dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ"
)
# These may be long; any other value is a few numbers or words.
_LONG_TAGS = _tags(_PIXELS)
_MAX_VALUE_BYTES = 1 << 16

_HEAD_BYTES = 1024
_CHARACTER_SET = 0x00080005
_FUNCTIONAL_GROUP = 0x5200
_PIXEL_GROUP = 0x7FE0
_PIXEL_TAGS = _tags("PixelData FloatPixelData DoubleFloatPixelData")

# What a header may cost, by where its reading ends; pydicom reads at most three times for an element or item.
_MAX_FRAME_READS = 4_000_000
_MAX_READS = {_FUNCTIONAL_GROUP: 300_000, _PIXEL_GROUP: _MAX_FRAME_READS}
_MAX_BYTES = {_FUNCTIONAL_GROUP: 64 << 20, _PIXEL_GROUP: 512 << 20}

# What pydicom logs and warns of quotes values of the file, which may identify a patient.
logging.getLogger("pydicom").propagate = False

_VALUE_REPRESENTATIONS = frozenset(str(vr).encode() for vr in VR if len(str(vr)) == 2)


@contextlib.contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Turns damage of any kind into one line that names `path`, and silences pydicom's warnings.

    Raises:
      UnavailableError: the disk or the network fails.
      UserError: anything else that the block raises.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pydicom\.")
            yield
    except UserError:
        raise
    except EOFError as error:
        raise UserError(f"{path}: ends inside an element; the file is cut short, fetch it again") from error
    except RecursionError as error:
        raise UserError(
            f"{path}: damaged DICOM data (sequences nested too deeply); export it again"
        ) from error
    except MemoryError as error:
        raise UserError(
            f"{path}: damaged DICOM data (needs more memory than there is); export it again"
        ) from error
    except Exception as error:  # pydicom and its decoders let through whatever a damaged byte leads to
        check_passing(path, error)
        raise UserError(f"{path}: damaged DICOM data ({short(error)}); export it again") from error


def short(error: BaseException) -> str:
    """What a library's error says, as a part of one line: no line breaks, object addresses or long values."""
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "an object", " ".join(str(error).split()))
    return f"{text:.160}" if text else type(error).__name__


def numbers(item: pydicom.Dataset, keyword: str) -> list[float | None]:
    """The numbers of an element: empty where it is absent or empty, None in place of what is not a number.

    pydicom gives up the whole element for one bad value of it.
    """
    raw = item.get_item(keyword)
    if raw is None:
        return []
    if (
        isinstance(raw, RawDataElement)
        and raw.VR in ("DS", "IS", None)
        and dictionary_VR(raw.tag) in ("DS", "IS")
    ):
        texts = (raw.value or b"").decode("latin-1").strip(" \0").split("\\")
        values: list[Any] = [] if texts == [""] else texts
    else:
        value = cast(Any, item[keyword].value)
        values = [] if value is None or value == "" else [value]
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            values = list(value)
    return [as_number(value) for value in values]


def as_number(value: Any) -> float | None:
    """A value of a header as a number, None if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def functional_group(dataset: pydicom.Dataset, frame: int, keyword: str) -> pydicom.Dataset | None:
    """The functional group macro of one frame: its own, or the one that all frames share."""
    own = items(dataset, "PerFrameFunctionalGroupsSequence")
    shared = items(dataset, "SharedFunctionalGroupsSequence")
    for groups, place in ((own, frame), (shared, 0)):
        if place < len(groups) and (found := items(groups[place], keyword)):
            return found[0]
    return None


def items(dataset: pydicom.Dataset, keyword: str) -> Sequence[pydicom.Dataset]:
    """The items of a sequence, none where it is absent."""
    return cast(Any, dataset[keyword].value) or () if keyword in dataset else ()


def overlay_planes(dataset: pydicom.Dataset) -> int:
    """How many overlay planes a data set has."""
    return sum(tag in dataset for tag in _OVERLAY_ROWS)


def is_directory(header: pydicom.Dataset) -> bool:
    """Whether a header is a DICOMDIR's, which lists other files and has no pixels."""
    named = _stored_uid(header.file_meta, "MediaStorageSOPClassUID") or _stored_uid(header, "SOPClassUID")
    return named == MediaStorageDirectoryStorage


def _stored_uid(dataset: pydicom.Dataset, keyword: str) -> str:
    """A UID as it is stored: a damaged value representation cannot be decoded."""
    element = dataset.get_item(keyword)
    value = b"" if element is None else element.value
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")
    return text.strip("\0 ")


def read_header(
    path: PathLike, *, limits: Limits = DEFAULT_LIMITS, frames: bool = False
) -> pydicom.Dataset | None:
    """Reads what describes the image, without its pixels.

    Args:
      path: any file. DICOM is recognised by content: with its preamble, or without it (old archives) by the
        first elements, in implicit or explicit VR, little or big endian. The suffix does not matter.
      limits: `nesting` bounds sequences; lengths and the number of elements have bounds of their own.
      frames: also the functional groups of a multi-frame object (shared and per frame).

    Returns:
      The elements of the allow-list, with `file_meta`; None if the file is not DICOM. A DICOMDIR yields a
      header too, see `is_directory`. Values are decoded when they are looked at: do that inside `naming`.

    Raises:
      UnavailableError: the disk or the network fails.
      UserError: no such file, or a damaged header.
    """
    if frames:
        return _read(path, _FRAME_TAGS, _PIXEL_GROUP, limits)
    return _read(path, _HEADER_TAGS, _FUNCTIONAL_GROUP, limits)


def read_mr_header(path: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> pydicom.Dataset | None:
    """`read_header` with functional groups, descriptions and the contrast agent.

    The descriptions may identify a patient: whoever reads them must neither show nor store them.

    Raises:
      UnavailableError: the disk or the network fails.
      UserError: no such file, or a damaged header.
    """
    return _read(path, _MR_TAGS, _PIXEL_GROUP, limits)


def read_dataset(path: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> pydicom.Dataset:
    """Reads a whole image, pixels as stored included: the elements of the allow-list, for `pixels`.

    Raises:
      UnavailableError: the disk or the network fails.
      UserError: no such file, not DICOM, larger than `limits.file_bytes`, or damaged.
    """
    size = file_size_of(path)
    if size > limits.file_bytes:
        raise UserError(
            f"{path}: {size} bytes, more than the limit of {limits.file_bytes}; split it or raise the limit"
        )
    dataset = _read(path, _DATASET_TAGS, None, limits)
    if dataset is None:
        raise UserError(f"{path}: not a DICOM file; check what it is")
    return dataset


def file_size_of(path: PathLike) -> int:
    """Size of a file in bytes; a `UserError` that names it where it is missing."""
    try:
        return file_size(path)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except OSError as error:
        check_passing(path, error)
        raise UserError(f"{path}: cannot be read ({short(error)}); check the path") from error


def _read(
    path: PathLike, tags: frozenset[int], last_group: int | None, limits: Limits
) -> pydicom.Dataset | None:
    """Reads the elements of `tags` before `last_group`; None: all of them, the pixels too."""
    path = as_path(path)
    with naming(path), _opened(path) as stored:
        head = stored.read(_HEAD_BYTES)
        if not _looks_like_dicom(head):
            return None
        with_preamble = head[128:132] == b"DICM"
        dataset = None
        if with_preamble and last_group is not None:
            dataset = _walk(stored, tags, last_group)
        if dataset is None:
            dataset = _parse(stored, head, tags, last_group, limits)
        for tag in list(dataset.file_meta.keys()):
            if tag in _META_TAGS:
                dataset.file_meta[tag]  # converted here, where damage is named
            else:
                del dataset.file_meta[tag]
        if not len(dataset) and not is_directory(dataset):  # pydicom gives up all where the end surprises it
            raise UserError(
                f"{path}: DICOM without one element of an image; it may be cut short, fetch it again"
            )
        _reduce(dataset, tags, limits.nesting)
        if not (with_preamble or "SOPClassUID" in dataset or "Rows" in dataset):
            return None
        return dataset


def _walk(stored: IO[bytes], tags: frozenset[int], last_group: int) -> pydicom.Dataset | None:
    """Reads an ordinary header; None if it is none."""
    found = header_walk.walk(stored, tags, last_group)
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
    stored: IO[bytes], head: bytes, tags: frozenset[int], last_group: int | None, limits: Limits
) -> pydicom.Dataset:
    """Reads any DICOM data set.

    Raises:
      EOFError: it is cut short.
    """
    reads, most = _MAX_FRAME_READS, limits.decoded_bytes
    if last_group is not None:
        reads, most = _MAX_READS[last_group], _MAX_BYTES[last_group]

    def stop(tag: int, vr: str | None, length: int) -> bool:
        if last_group is None:
            return tag in _PIXEL_TAGS
        return header_walk.ends_header(tag, last_group)

    file, meta = _inflated(stored, head, most)
    file.seek(0)
    guard = cast(Any, _Guard(file, reads, most))
    read = read_partial(guard, cast(Any, stop), force=True, specific_tags=cast(Any, list(tags)))
    dataset = pydicom.Dataset(read)  # without the file, which a FileDataset keeps open
    implicit, little = _encoding(read)
    dataset.set_original_encoding(implicit, little, read.original_character_set)
    dataset.file_meta = read.file_meta if meta is None else meta
    if last_group is None:
        for element in data_element_generator(guard, implicit, little):
            if element.tag in _PIXEL_TAGS:
                dataset[element.tag] = element
                break
    if guard.tell() > guard.size or _is_cut_short(dataset):
        raise EOFError
    return dataset


def _encoding(read: pydicom.FileDataset) -> tuple[bool, bool]:
    """(implicit VR, little endian) as the elements have it, which the transfer syntax may deny."""
    for tag in list(read.keys()):
        raw = read.get_item(tag)
        if isinstance(raw, RawDataElement):
            return raw.is_implicit_VR, raw.is_little_endian
    implicit, little = read.original_encoding
    return bool(implicit), bool(little)


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[IO[bytes]]:
    file_size_of(path)  # says in our words what is missing
    try:
        file = path.open("rb")
    except OSError as error:
        check_passing(path, error)
        raise UserError(f"{path}: cannot be read ({short(error)}); check the path") from error
    with file:
        yield cast(IO[bytes], file)


class _Guard:
    """A file that pydicom may read: as often, and as much at once, as the bounds allow."""

    def __init__(self, file: IO[bytes], max_reads: int, max_bytes: int) -> None:
        self._read = file.read
        self._reads_left = max_reads
        self._max_bytes = max_bytes
        position = file.tell()
        self.size = file.seek(0, io.SEEK_END)
        file.seek(position)
        self.tell = file.tell
        self.seek = file.seek

    def read(self, count: int = -1) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise ValueError("more elements than any header has")
        if count > 8192 or count < 0:
            rest = max(self.size - self.tell(), 0)
            count = rest if count < 0 else min(count, rest)
            if count > self._max_bytes:
                raise ValueError(f"an element of {count} bytes in the header")
        return self._read(count)


def _looks_like_dicom(head: bytes) -> bool:
    if head[128:132] == b"DICM":
        return True
    return any(_plausible_start(head, order) for order in "<>")


def _plausible_start(head: bytes, order: str) -> bool:
    """Whether a file without a preamble starts with two known elements, the first of group 0002 or 0008."""
    place, previous = 0, -1
    for number in range(2):
        if place + 12 > len(head):
            return False
        group, element, vr, length = struct.unpack_from(f"{order}HH2sH", head, place)
        tag = group << 16 | element
        if tag <= previous or not (element == 0 or dictionary_has_tag(tag)):
            return False
        if number == 0 and group not in (0x0002, 0x0008):
            return False
        if vr in _VALUE_REPRESENTATIONS:
            place += 8
        elif order == "<":
            (length,) = struct.unpack_from("<L", head, place + 4)
            place += 8
        else:
            return False
        if length > 256:
            return False
        place, previous = place + length, tag
    return True


def _inflated(file: IO[bytes], head: bytes, max_bytes: int) -> tuple[IO[bytes], FileMetaDataset | None]:
    """The data set of a deflated file and its meta information; any other file as it is, and None.

    pydicom would inflate without a bound.
    """
    if str(DeflatedExplicitVRLittleEndian).encode() not in head:
        return file, None
    if head[128:138] != b"DICM\2\0\0\0UL":
        raise ValueError("deflated, without the length of its meta information")
    (length,) = struct.unpack_from("<L", head, 140)
    start = 144 + length
    file.seek(0)
    meta = pydicom.dcmread(io.BytesIO(file.read(min(start, _MAX_VALUE_BYTES)))).file_meta
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return file, None
    file.seek(start)
    inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), max_bytes)
    return io.BytesIO(inflated), meta


def _is_cut_short(dataset: pydicom.Dataset) -> bool:
    """Whether an element has fewer bytes than it promises."""
    values = (dataset.get_item(tag) for tag in list(dataset.keys()))  # to iterate over it would decode all
    return any(
        isinstance(raw, RawDataElement) and raw.value is not None and len(raw.value) < raw.length < 0xFFFFFFFF
        for raw in values
    )


def _reduce(item: pydicom.Dataset, tags: frozenset[int], nesting: int) -> None:
    """Removes from `item` and its sequences, in place, all that is not in `tags`."""
    if nesting < 0:
        raise ValueError("sequences nested too deeply")
    for tag in list(item.keys()):
        if tag not in tags:
            del item[tag]
            continue
        raw = item.get_item(tag)
        is_raw = isinstance(raw, RawDataElement)
        if is_raw and raw.VR != "SQ" and tag not in _SEQUENCE_TAGS:
            if raw.value is not None and len(raw.value) > _MAX_VALUE_BYTES and tag not in _LONG_TAGS:
                raise ValueError(f"an element of {len(raw.value)} bytes in the header")
            continue
        element = item[tag]
        if element.VR != "SQ":
            if tag in _SEQUENCE_TAGS:
                del item[tag]
            continue
        for child in cast(Any, element.value) or ():
            _reduce(child, tags, nesting - 1)
