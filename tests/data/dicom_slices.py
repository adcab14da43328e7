"""Builders of small DICOM series, as single slices or enhanced multi-frame files."""

from __future__ import annotations

import numpy as np
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy.spatial.transform import Rotation

ROWS, COLUMNS = 4, 5
AXIAL = [1, 0, 0, 0, 1, 0]
CORONAL = [1, 0, 0, 0, 0, -1]
SAGITTAL = [0, 1, 0, 0, 0, -1]
LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])


def plain_slice(k=0, z=None, **changes):
    """A CT slice of `ROWS` x `COLUMNS` whose pixels are 100 k, 100 k + 1, ...; None removes an element."""
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID, d.SOPInstanceUID, d.Modality = CTImageStorage, generate_uid(), "CT"
    d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = "1.2.9", "1.2.3", "1.2.8"
    d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = ROWS, COLUMNS, 1, "MONOCHROME2"
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
    d.PixelData = (100 * k + np.arange(ROWS * COLUMNS)).astype("<i2").tobytes()
    d.RescaleSlope, d.RescaleIntercept, d.RescaleType = 1, 0, "HU"
    d.ImagePositionPatient, d.ImageOrientationPatient = [0, 0, k if z is None else z], AXIAL
    d.PixelSpacing, d.SliceThickness, d.InstanceNumber = ["0.5", "0.75"], 1, k + 1
    d.PatientName, d.PatientID, d.PatientBirthDate = "Doe^Jane", "4711", "19700101"
    for keyword, value in changes.items():
        if value is None:
            d.pop(keyword, None)
        elif isinstance(value, bytes) and keyword != "PixelData":  # a raw value, possibly invalid
            tag = Tag(keyword)
            d[tag] = RawDataElement(tag, dictionary_VR(tag), len(value), value, 0, False, True)
        else:
            setattr(d, keyword, value)
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID
    return d


def save(dataset, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def save_stack(folder, count=6, first=0, **changes):
    for k in range(count):
        own = {key: value(k) if callable(value) else value for key, value in changes.items()}
        save(plain_slice(k, **own), folder / f"{first + k:03d}.dcm")
    return folder


def item(**values):
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def assert_same_volume(ours, theirs):
    """`theirs`: highdicom's [slices, rows, columns] in LPS, possibly in reverse slice order."""
    affine = LPS_TO_RAS @ theirs.affine @ np.eye(4)[[2, 1, 0, 3]]
    values = theirs.array.transpose(2, 1, 0)
    if affine[:3, 2] @ ours.affine[:3, 2] < 0:
        affine[:3, 3] += affine[:3, 2] * (values.shape[2] - 1)
        affine[:3, 2] *= -1
        values = values[:, :, ::-1]
    np.testing.assert_allclose(ours.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(ours.values, values)


def only(found):
    (series,) = found
    return series


def positions_of(orientation, count, distance, origin=(-20.5, 31.25, -700.0), sideways=(0.0, 0.0)):
    across, down = np.reshape(orientation, (2, 3))
    step = distance * np.cross(across, down) + sideways[0] * across + sideways[1] * down
    return [(np.array(origin) + k * step).round(9).tolist() for k in range(count)]


ORIENTATIONS = {
    "axial": AXIAL,
    "axial, prone": [-1, 0, 0, 0, -1, 0],
    "axial from above": [1, 0, 0, 0, -1, 0],
    "coronal": CORONAL,
    "sagittal": SAGITTAL,
    "oblique": Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix()[:2].ravel().tolist(),
}


def enhanced(positions, frames, shared=None, orientation=AXIAL, **changes):
    """Enhanced MR; `frames` are the functional groups of each frame other than its position."""
    d = plain_slice(SOPClassUID=EnhancedMRImageStorage, Modality="MR", NumberOfFrames=len(positions))
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(d, keyword)
    for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType"):
        delattr(d, keyword)
    d.PixelData = b"".join(
        (100 * k + np.arange(ROWS * COLUMNS)).astype("<i2").tobytes() for k in range(len(positions))
    )
    d.SharedFunctionalGroupsSequence = [
        shared
        or item(
            PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.75], SliceThickness=2)],
            PlaneOrientationSequence=[item(ImageOrientationPatient=orientation)],
        )
    ]
    d.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=list(position))], **groups)
        for position, groups in zip(positions, frames, strict=True)
    ]
    for keyword, value in changes.items():
        setattr(d, keyword, value)
    return d


def rescale(slope, intercept, kind="US"):
    transformation = item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType=kind)
    return {"PixelValueTransformationSequence": [transformation]}
