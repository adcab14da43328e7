"""Exports the label maps of annotations for viewers, as NIfTI or DICOM-SEG."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import hashlib
import io
import json
import re
import uuid
import warnings
from typing import Any, BinaryIO, Literal, cast

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
from nibabel.affines import voxel_sizes
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from tqdm import tqdm

from vilam3_experts import __version__
from vilam3_experts import descriptors as registry
from vilam3_experts.descriptors import Descriptor
from vilam3_experts.inputs import Input, find_inputs
from vilam3_experts.orientation import from_canonical
from vilam3_jax.data import dicom
from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.record import Annotation, Key
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.volume_io import one_line
from vilam3_jax.data.volumes import Volume
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

Format = Literal["nifti", "dicom-seg"]
SCHEME = "99VILAM3"  # of codes for names without a common SNOMED CT code; private schemes start with 99
_ABNORMAL = frozenset(
    ("tumor", "tumour", "lesion", "cyst", "mass", "metastasis", "nodule", "edema", "neoplasm", "aneurysm")
)
_SCT_NAMES = {"Clavicula": "Clavicle", "UrinaryBladder": "Bladder", "SmallBowel": "SmallIntestine"}
_SIDES = ("left", "right")
_SERIES_NUMBER = 900
_RIGID = 1e-5
_MAX_LABEL = 64  # characters of a SegmentLabel
_ANY_VOLUME = Descriptor(
    Card("EXPORT", (), "any", "segmentation", "export", "unknown"), "1", "volume", "segmentation", ""
)


@dataclasses.dataclass
class ExportSummary:
    """(scan, file), (scan, problem), and the number of scans without a label map in the store."""

    files: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    without: int = 0


def export_masks(
    store: paths.PathLike,
    data: paths.PathLike,
    out: paths.PathLike,
    form: Format = "nifti",
    *,
    expert: str | None = None,
) -> ExportSummary:
    """Writes every label map of `store` that belongs to a scan of `data`, named after its record.

    `nifti` writes label maps in the index order of the scan's own file, each with a JSON label table;
    `dicom-seg` writes binary Segmentation objects that reference the scan's series and copy its patient,
    study and geometry. Raises `UserError` if there is no such store or no scan, or `out` cannot be written.
    """
    records = AnnotationStore(store)
    wanted = _by_grid(records, expert)
    if expert is not None and not wanted:
        raise UserError(f"--expert {expert}: {store} has no record of it; see `vilam3-experts store info`")
    summary = ExportSummary()
    folder = paths.as_path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be created ({error.strerror or error}); choose another folder"
        ) from error
    for item in tqdm(find_inputs(data, _ANY_VOLUME), desc="export", unit="scan"):
        try:
            scan = item.load().first
            keys = wanted.get(scan.content_key, ()) if isinstance(scan, Volume) else ()
            annotations = [records.get(*key) for key in keys]
        except UnavailableError:
            raise
        except UserError as error:
            summary.problems.append((item.name, str(error)))
            continue
        found = [a for a in annotations if a is not None and a.labels is not None]
        summary.without += not found
        for annotation in found:
            try:
                files = (_nifti if form == "nifti" else _dicom_seg)(annotation, cast(Volume, scan), item)
            except UnavailableError:
                raise
            except UserError as error:
                summary.problems.append((item.name, str(error)))
                continue
            for name, content in files.items():
                paths.write_bytes_atomic(folder / name, content)
            summary.files.append((item.name, next(iter(files))))
    return summary


def _by_grid(records: AnnotationStore, expert: str | None) -> dict[str, list[Key]]:
    """The records' keys by the content key of the scan on whose grid their label map is."""
    known = registry.registry()
    wanted: dict[str, list[Key]] = collections.defaultdict(list)
    for key in records.keys():  # noqa: SIM118
        input_key, name, _ = key
        if expert is not None and name != expert:
            continue
        if name in known and known[name].card.roles != ("",):
            annotation = records.get(*key)
            if annotation is not None and annotation.inputs:
                input_key = annotation.inputs[0][1]
        wanted[input_key].append(key)
    return wanted


def file_stem(annotation: Annotation) -> str:
    """The file name of a record, without suffix. Raises `UserError` for an invalid key or expert name."""
    if not re.fullmatch(r"[0-9a-f]{64}", annotation.input_key) or not re.fullmatch(
        r"[A-Z][A-Z0-9_]{0,31}", annotation.expert
    ):
        raise UserError("the record has an invalid key; annotate again")
    args = hashlib.sha256(annotation.args.encode()).hexdigest()[:8]
    return f"{annotation.input_key[:32]}-{annotation.expert}-{args}"


def _as_stored(annotation: Annotation, axcodes: str) -> tuple[np.ndarray, np.ndarray]:
    """(labels, affine) of a record in the index order of the scan's file, such as "LPS"."""
    affine = annotation.label_affine
    assert affine is not None
    labels, affine = from_canonical(annotation.label_map(), affine, axcodes)
    return np.ascontiguousarray(labels), affine


def _nifti(annotation: Annotation, scan: Volume, item: Input) -> dict[str, bytes]:
    """A label map and its table; voxel (i, j, k) is voxel (i, j, k) of the scan's file."""
    del item
    labels, affine = _as_stored(annotation, scan.stored_orientation)
    image = nib.Nifti1Image(labels, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    # A quaternion cannot represent shear; without a qform, readers use the sform.
    directions = affine[:3, :3] / voxel_sizes(affine)
    is_rigid = np.allclose(directions.T @ directions, np.eye(3), atol=_RIGID)
    image.set_qform(affine if is_rigid else None, code="scanner" if is_rigid else 0)
    stem = file_stem(annotation)
    table = {
        "labels": {str(number): name for number, name in sorted(annotation.label_names.items())},
        "expert": annotation.expert,
        "args": annotation.args,
        "version": annotation.version,
        "weights_sha256": annotation.weights_sha256,
        "input_key": annotation.input_key,
        "index_order": scan.stored_orientation,
    }
    return {
        f"{stem}.nii.gz": gzip.compress(image.to_bytes(), mtime=0),
        f"{stem}.json": (json.dumps(table, indent=1) + "\n").encode(),
    }


def _dicom_seg(annotation: Annotation, scan: Volume, item: Input) -> dict[str, bytes]:
    """A binary Segmentation object with one segment per label, in the planes of the source series."""
    if item.series is None and item.path.is_dir():
        raise UserError(f"{item.name}: the samples index lists no series; give {item.path} as --data")
    if item.series is None:
        raise UserError(f"{item.name}: not a DICOM series, which DICOM-SEG references; export it as nifti")
    if not annotation.segments:
        raise UserError(
            f"{item.name}: the label map of {annotation.expert} is empty, and DICOM-SEG needs a segment"
        )
    sources, order = _sources(item.series, item.name)
    labels, _ = _as_stored(annotation, scan.stored_orientation)
    frames = labels.transpose(2, 1, 0)[order]  # [slice, row, column]
    if frames.shape != (len(item.series.members), item.series.rows, item.series.columns):
        raise UserError(f"{item.name}: its label map is not on the slices of the series; annotate again")
    numbers = np.zeros(int(labels.max()) + 1, np.uint16)
    segments = []
    for number, segment in enumerate(annotation.segments, start=1):
        numbers[segment.label_id] = number
        segments.append(_describe_segment(number, segment.name, annotation))
    frames = numbers[frames]
    frames = frames.astype(np.uint8) if len(segments) < 256 else frames
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = hd.seg.Segmentation(
                source_images=sources,
                pixel_array=frames,
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=segments,
                series_instance_uid=_uid(annotation, "series"),
                series_number=_SERIES_NUMBER,
                sop_instance_uid=_uid(annotation, "instance"),
                instance_number=1,
                manufacturer="vilam3_jax",
                manufacturer_model_name="vilam3-experts",
                software_versions=__version__,
                device_serial_number="1",
                series_description=f"{annotation.expert} segmentation",
                content_label="SEGMENTATION",
            )
            sink = io.BytesIO()
            made.save_as(sink)
    except Exception as error:  # highdicom documents few of its exceptions, and source headers are incomplete
        raise UserError(
            f"{item.name}: DICOM-SEG cannot be made of its headers ({one_line(error)}); export it as nifti"
        ) from error
    return {f"{file_stem(annotation)}.dcm": sink.getvalue()}


def _uid(annotation: Annotation, what: str) -> hd.UID:
    """A UID derived from the record, so that a repeated export is the same object to a viewer."""
    a = annotation
    content = "\0".join((what, a.input_key, a.expert, a.args, a.version, a.weights_sha256))
    digest = hashlib.sha256(content.encode()).digest()
    return hd.UID.from_uuid(str(uuid.UUID(bytes=digest[:16], version=4)))


def _sources(series: dicom.Series, name: str) -> tuple[list[pydicom.Dataset], list[int]]:
    """The headers that the object references, and the matching order of the series' slices."""
    files = list(dict.fromkeys(str(member.path) for member in series.members))
    if len(files) == 1:
        order = np.argsort([member.frame for member in series.members]).tolist()
    elif len(files) == len(series.members):
        order = list(range(len(files)))
    else:
        raise UserError(f"{name}: its slices are in several multi-frame files; export it as nifti")
    return [_source(file, name) for file in files], order


def _source(file: str, name: str) -> pydicom.Dataset:
    path = paths.as_path(file)
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(cast(BinaryIO, stream), stop_before_pixels=True)
            # De-identification may empty these; the file's meta information repeats them.
            for keyword in ("SOPClassUID", "SOPInstanceUID"):
                if not header.get(keyword):
                    setattr(header, keyword, header.file_meta.get(f"MediaStorage{keyword}", ""))
    except Exception as error:  # damaged headers make pydicom raise anything
        paths.check_passing(path, error)
        raise UserError(f"{name}: a header of its series cannot be read again ({one_line(error)})") from error
    return header


def _describe_segment(number: int, name: str, annotation: Annotation) -> hd.seg.SegmentDescription:
    words = name.lower().replace("_", " ").split()
    is_abnormal = bool(_ABNORMAL & set(words))
    category = codes.SCT.MorphologicallyAbnormalStructure if is_abnormal else codes.SCT.AnatomicalStructure
    kind, side = _code(words, name)
    algorithm: dict[str, Any] = {"algorithm_type": hd.seg.SegmentAlgorithmTypeValues.MANUAL}
    if not annotation.version.startswith("imported; ground-truth"):
        algorithm = {
            "algorithm_type": hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            "algorithm_identification": hd.AlgorithmIdentificationSequence(
                name=annotation.expert,
                family=codes.DCM.ArtificialIntelligence,
                version=(annotation.version or "unknown")[:_MAX_LABEL],
            ),
        }
    segment = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:_MAX_LABEL],
        segmented_property_category=category,
        segmented_property_type=kind,
        **algorithm,
    )
    if side is not None:
        coded = segment.SegmentedPropertyTypeCodeSequence[0]
        coded.SegmentedPropertyTypeModifierCodeSequence = [hd.sr.CodedConcept(*side[:3])]
    return segment


def _code(words: list[str], name: str) -> tuple[Code, Code | None]:
    """The SNOMED CT code of a structure and of its side, or a private code with its name."""
    side = next((word for word in words if word in _SIDES), None)
    keyword = "".join(word.capitalize() for word in words if word not in _SIDES)
    try:
        kind = getattr(codes.SCT, _SCT_NAMES.get(keyword, keyword))
    except AttributeError:
        value = hashlib.sha256(name.encode()).hexdigest()[:16]
        return Code(value, SCHEME, name[:_MAX_LABEL]), None
    return kind, getattr(codes.SCT, side.capitalize()) if side else None
