"""A voxel has the same position in the patient for every reader and every order of the file."""

from __future__ import annotations

import itertools
import pathlib

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
from nibabel.testing import data_path
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from vilam3_jax.data.volumes import load_volume

pytestmark = pytest.mark.filterwarnings("ignore::vilam3_jax.errors.InputWarning")

SHAPE = (4, 5, 3)
MARKED = (3, 1, 2)
SPACING = (0.8, 1.2, 2.5)
ORIGIN = (-30.25, 41.5, 107.0)
LPS = np.diag([-1.0, -1, 1, 1])
CODES = [
    "".join(code) for axes in itertools.permutations(("LR", "PA", "IS")) for code in itertools.product(*axes)
]
SAMPLES = pathlib.Path(__file__).parents[2] / ".cache" / "samples"


def oblique_affine(code, seed):
    """Affine (index to RAS mm) of a grid with these axis codes, rotated by up to 20 degrees."""
    straight = np.zeros((3, 3))
    for column, letter in enumerate(code):
        straight["LRPAIS".index(letter) // 2, column] = 1 if letter in "RAS" else -1
    angles = np.random.default_rng(seed).uniform(-0.2, 0.2, 3)
    affine = np.eye(4)
    affine[:3, :3] = nib.eulerangles.euler2mat(*angles) @ straight * SPACING
    affine[:3, 3] = ORIGIN
    return affine


def as_itk(voxels, affine):
    sitk = pytest.importorskip("SimpleITK")
    own = LPS @ affine
    spacing = np.sqrt((own[:3, :3] ** 2).sum(axis=0))
    image = sitk.GetImageFromArray(voxels.T)
    image.SetSpacing(spacing)
    image.SetOrigin(own[:3, 3])
    image.SetDirection((own[:3, :3] / spacing).ravel())
    return image


def save_nifti(folder, voxels, affine, form):
    image = nib.Nifti1Image(voxels, None)
    getattr(image, f"set_{form}")(affine, 1)
    image.to_filename(folder / f"{form}.nii.gz")
    return folder / f"{form}.nii.gz"


def save_nrrd(folder, voxels, affine):
    own = LPS @ affine
    header = {
        "space": "left-posterior-superior",
        "space directions": own[:3, :3].T,
        "space origin": own[:3, 3],
    }
    nrrd.write(str(folder / "a.nrrd"), voxels, header)
    return folder / "a.nrrd"


def save_itk(folder, voxels, affine, name):
    sitk = pytest.importorskip("SimpleITK")
    sitk.WriteImage(as_itk(voxels, affine), str(folder / name))
    return folder / name


def save_dicom(folder, voxels, affine):
    """Writes one file per slice: axis 0 runs along the rows, axis 1 down the columns."""
    own = LPS @ affine
    (folder / "series").mkdir()
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for k in range(voxels.shape[2]):
        d = pydicom.Dataset()
        d.file_meta = FileMetaDataset()
        d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d.SOPClassUID, d.SOPInstanceUID, d.SeriesInstanceUID = CTImageStorage, generate_uid(), series
        d.StudyInstanceUID, d.FrameOfReferenceUID, d.Modality, d.InstanceNumber = study, frame, "CT", k + 1
        d.Columns, d.Rows = voxels.shape[:2]
        d.ImagePositionPatient = [f"{x:.10g}" for x in (own @ [0, 0, k, 1])[:3]]
        d.ImageOrientationPatient = [f"{x:.10g}" for i in (0, 1) for x in own[:3, i] / SPACING[i]]
        d.PixelSpacing, d.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
        d.RescaleSlope, d.RescaleIntercept = 1, 0
        d.SamplesPerPixel, d.PhotometricInterpretation, d.PixelRepresentation = 1, "MONOCHROME2", 1
        d.BitsAllocated, d.BitsStored, d.HighBit = 16, 16, 15
        d.PixelData = np.ascontiguousarray(voxels[:, :, k].T).astype("<i2").tobytes()
        d.save_as(folder / "series" / f"{k}.dcm", enforce_file_format=True)
    return folder / "series"


def world_of(volume, value):
    ((*index,),) = np.argwhere(volume.voxels == value)
    return (volume.affine @ [*index, 1])[:3]


@pytest.mark.parametrize("code", CODES)
def test_a_marked_voxel_lies_at_one_place_in_every_format(tmp_path, code):
    voxels = np.random.default_rng(0).permutation(np.arange(60, dtype=np.int16)).reshape(SHAPE)
    voxels[MARKED] = 1000
    affine = oblique_affine(code, CODES.index(code))
    paths = [
        save_nifti(tmp_path, voxels, affine, "sform"),
        save_nifti(tmp_path, voxels, affine, "qform"),
        save_nrrd(tmp_path, voxels, affine),
        *(save_itk(tmp_path, voxels, affine, name) for name in ("b.mha", "c.nhdr", "d.hdr")),
        save_dicom(tmp_path, voxels, affine),
    ]
    for path in paths:
        volume = load_volume(path)
        np.testing.assert_allclose(world_of(volume, 1000), (affine @ [*MARKED, 1])[:3], atol=1e-3)
        for value in (value for value in (0, 29, 59) if value in voxels):
            (where,) = np.argwhere(voxels == value)
            np.testing.assert_allclose(world_of(volume, value), (affine @ [*where, 1])[:3], atol=1e-3)
        assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert load_volume(paths[0]).stored_orientation == code
    # SimpleITK and nibabel agree on the position.
    point = as_itk(voxels, affine).TransformIndexToPhysicalPoint(MARKED)
    np.testing.assert_allclose(LPS[:3, :3] @ point, (affine @ [*MARKED, 1])[:3], atol=1e-6)
    np.testing.assert_allclose(nib.load(paths[0]).affine, affine, atol=1e-5)


def _converted_alike(path, folder):
    """Whether conversions of a file by ITK have the same content key."""
    sitk = pytest.importorskip("SimpleITK")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    volume = load_volume(path)
    image = sitk.ReadImage(str(path))
    for name in ("a.nrrd", "b.nhdr", "c.mha", "d.mhd", "e.nii.gz", "f.hdr"):
        sitk.WriteImage(image, str(folder / name), name != "d.mhd")
        assert load_volume(folder / name).content_key == volume.content_key, name
    index = [n // 3 for n in volume.voxels.shape]
    point = LPS @ volume.affine @ [*index, 1]
    found = image.TransformPhysicalPointToIndex(point[:3])
    assert image[found] == pytest.approx(volume.voxels[tuple(index)])


@pytest.mark.parametrize("name", ["anatomical.nii", "standard.nii.gz"])
def test_real_volumes_are_one_scan_in_every_format(tmp_path, name):
    _converted_alike(pathlib.Path(data_path) / name, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the sample images that `make quickstart` fetches")
def test_sample_volumes_are_one_scan_in_every_format(tmp_path):
    paths = [*SAMPLES.glob("**/*.nii.gz"), *SAMPLES.glob("pyradiomics-*/data/*.nrrd")]
    smallest = sorted(paths, key=lambda path: path.stat().st_size)[:12]
    assert {path.suffix for path in smallest} == {".gz", ".nrrd"}
    for path in smallest:
        _converted_alike(path, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the sample images that `make quickstart` fetches")
def test_sample_series_is_one_scan_as_itk_stacks_it(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    (folder,) = SAMPLES.glob("totalsegmentator-*/tests/reference_files/example_ct_dicom")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    sitk.WriteImage(reader.Execute(), str(tmp_path / "a.mha"))
    volume, series = load_volume(tmp_path / "a.mha"), load_volume(folder)
    np.testing.assert_array_equal(volume.voxels, series.voxels)
    np.testing.assert_allclose(volume.affine, series.affine, atol=1e-3)
    labels = next(SAMPLES.glob("totalsegmentator-*/tests/reference_files/example_seg_dicom.nii.gz"))
    np.testing.assert_allclose(load_volume(labels).affine, series.affine, atol=1e-2)
