"""DICOM files with planted identifiers and their cleaned copies, for tests of de-identification."""

from __future__ import annotations

import io

import numpy as np
import pydicom
import pydicom.config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from vilam3_jax.data.deidentify import run
from vilam3_jax.data.limits import DEFAULT_LIMITS

MARK = "ZQXV"  # part of every planted text
UID_MARK = "1.2.826.0.1.9731640"  # root of every planted UID
DATE = "19470811"
SALT = b"a salt of the tests, long enough"


def picture(rows=16, columns=18, dtype=np.uint16):
    """A smooth ramp, which cannot contain a mark."""
    return (np.add.outer(np.arange(rows), np.arange(columns)) * 3).astype(dtype)


def image(pixels=None, *, sop_class=CTImageStorage, modality="CT", patient="12345", **more):
    pixels = picture() if pixels is None else pixels
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID, d.Modality = sop_class, modality
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(d, keyword, f"{UID_MARK}.{generate_uid()[-20:].lstrip('0.').replace('.', '')}")
    d.PatientID, d.PatientName = patient, f"{MARK}^NAME"
    d.StudyDate, d.StudyTime, d.InstanceNumber = DATE, "101112", 1
    d.Rows, d.Columns = pixels.shape[:2]
    d.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    d.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        d.PlanarConfiguration = 0
    d.BitsAllocated = d.BitsStored = 8 * pixels.itemsize
    d.HighBit, d.PixelRepresentation = d.BitsStored - 1, 0
    d.PixelData = pixels.tobytes()
    for keyword, value in more.items():
        setattr(d, keyword, value)
    return d


def stored(dataset, path=None, *, preamble=bytes(128)):
    """Encodes a data set with arbitrary values as a file."""
    syntax = dataset.file_meta.TransferSyntaxUID
    dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", CTImageStorage)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID", f"{UID_MARK}.1")
    dataset.preamble = preamble
    buffer = io.BytesIO()
    with pydicom.config.disable_value_validation():
        if syntax.is_encapsulated:
            dataset["PixelData"].VR = "OB"
        elif "PixelData" in dataset:
            dataset["PixelData"].VR = "OW"
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def options(tmp_path, **more):
    values = {"keep_characteristics": False, "refuse_suspects": False, "limits": DEFAULT_LIMITS, **more}
    return run.Options(str(tmp_path / "out"), SALT, **values)


def cleaned(data, tmp_path, **more):
    """Returns the bytes of the copy and its `Outcome`."""
    path = tmp_path / "one.dcm"
    path.write_bytes(data)
    outcome = run.clean_file(str(path), options(tmp_path, **more))
    assert outcome.output, outcome.reason
    return (tmp_path / "out" / outcome.output).read_bytes(), outcome


def reread(data):
    return pydicom.dcmread(io.BytesIO(data))


def assert_no_mark(data):
    for text in (MARK, UID_MARK, DATE):
        for coded in (text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be")):
            assert coded not in data, text
