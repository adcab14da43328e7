"""Detection of MRI sequences from file names, BIDS, JSON sidecars and DICOM headers."""

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from vilam3_experts import sequences
from vilam3_experts.sequences import Acquisition, from_acquisition, from_dicom, from_name, from_sidecar

from vilam3_jax.data.dicom.headers import read_header, read_mr_header

NAMES = {
    # BraTS 2018 to 2021, BraTS 2023 and later
    "Brats18_2013_0_1_t1ce.nii.gz": "t1c",
    "Brats18_2013_0_1_t1.nii.gz": "t1",
    "BraTS20_Training_001_t2.nii": "t2",
    "BraTS2021_00000_flair.nii.gz": "flair",
    "BraTS-GLI-00000-000-t1c.nii.gz": "t1c",
    "BraTS-GLI-00000-000-t1n.nii.gz": "t1",
    "BraTS-MET-00002-000-t2w.nii.gz": "t2",
    "BraTS-SSA-00002-000-t2f.nii.gz": "flair",
    # UCSF-PDGM, UPENN-GBM, TCGA, RHUH, LUMIERE, EGD
    "UCSF-PDGM-0004_T1c_bias.nii.gz": "t1c",
    "UCSF-PDGM-0004_T1_bias.nii.gz": "t1",
    "UPENN-GBM-00001_11_T1GD.nii.gz": "t1c",
    "UPENN-GBM-00001_11_FLAIR_unstripped.nii.gz": "flair",
    "TCGA-02-0003_1997.06.08_t1Gd.nii.gz": "t1c",
    "RHUH-0001_0_t1ce.nii.gz": "t1c",
    "CT1.nii.gz": "t1c",
    "T1GD.nii.gz": "t1c",
    # BIDS
    "sub-01_ce-gadolinium_T1w.nii.gz": "t1c",
    "sub-01_ses-1_ce-gd_run-2_T1w.nii.gz": "t1c",
    "sub-01_acq-post_T1w.nii.gz": "t1c",
    "sub-01_ce-none_T1w.nii.gz": "t1",
    "sub-01_T1w.nii.gz": "t1",
    "sub-01_space-T1w_T2w.nii.gz": "t2",
    "sub-01_space-MNI_FLAIR.nii": "flair",
    # clinics
    "AX_T1_POST.nii.gz": "t1c",
    "Ax T1 +C.nii": "t1c",
    "t1_mprage_sag_iso_Gd.nii.gz": "t1c",
    "3D_T1W_KM.nrrd": "t1c",
    "t1w-post-contrast.mha": "t1c",
    "T1 pre contrast.nii": "t1",
    "t1_without_contrast.nii": "t1",
    "T1 w/o contrast": "t1",
    "T1_ohne_KM.nii": "t1",
    "t1 non-enhanced.nii": "t1",
    "mprage.nii": "t1",
    "axT2flair.nii.gz": "flair",
    "T2_FLAIR.nii": "flair",
    "t2_tirm_tra_dark-fluid.nii": "flair",
    "t2_tse_tra.nii": "t2",
    "T1_post-op.nii": "t1",
    "SAG_T1_FLAIR.nii": "t1",
    "AX_FLAIR_POST.nii": "flair",
    "T1_to_MNI.nii": "t1",
    "T2_FLAIR_reg.nii": "flair",
    "T1 W CONTRAST.nii": "t1c",
    "gd_t1.nii": "t1c",
}
OTHERS = [
    "BraTS20_Training_001_seg.nii.gz",
    "case_T1_mask.nii.gz",
    "t2star_tra.nii",
    "T2*_gre.nii",
    "t2_ffe.nii",
    "sub-01_T2starw.nii.gz",
    "sub-01_dwi.nii.gz",
    "sub-01_desc-brain_mask.nii.gz",
    "T1_map.nii",
    "UCSF-PDGM-0004_ADC.nii.gz",
    "UPENN-GBM-00001_11_DSC_ap-rCBV.nii.gz",
    "T1_subtraction.nii.gz",
    "T1_pveseg.nii.gz",
    "t1_seg8.nii.gz",
    "T2_SWI.nii",
]
AMBIGUOUS = [
    "t1_t2.nii",
    "t1_to_t1c.nii",
    "T1_pre_and_post.nii.gz",
    "T1 C.nii",
    "T1-C-.nii",
    "t1_t2_flair.nii",
    "flair_to_t1c.nii.gz",
    "FLAIR_in_T1_space.nii",
    "T2_to_T1.nii",
    "flair_t1.nii",
    "T1 with and without.nii",
    "T1 W-WO.nii",
    "post_T1.nii",
    "pre_t1.nii.gz",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_real_collections(name):
    found = from_name(name)
    assert found.role == NAMES[name], found
    assert not found.problem and not found.other


@pytest.mark.parametrize("name", OTHERS)
def test_other_images_get_no_role(name):
    found = from_name(name)
    assert found.role is None
    assert found.other or not found.problem


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_names_of_two_sequences_are_no_guess(name):
    found = from_name(name)
    assert found.role is None
    assert found.problem


@pytest.mark.parametrize("name", ["scan.nii.gz", "BRATS_457.nii.gz", "image001.nrrd", "patient1.nii"])
def test_names_that_say_nothing(name):
    assert from_name(name) == sequences.Finding()


def test_long_names_cost_no_time():
    assert from_name("fatsat" * 400 + "x.nii") == sequences.Finding()


def test_native_by_assumption_is_marked():
    assert from_name("a_t1.nii").assumed
    assert not from_name("a_t1n.nii").assumed
    assert not from_name("a_t1_native.nii").assumed


def test_rest_of_a_name_tells_the_case():
    names = ["Brats18_2013_0_1_t1ce", "Brats18_2013_0_1_t1", "Brats18_2013_0_1_t2", "Brats18_2013_0_1_flair"]
    assert {sequences.without_sequence(f"{n}.nii.gz") for n in names} == {"brats18_2013_0_1"}
    assert sequences.without_sequence("ax_t1_gd") == sequences.without_sequence("sag T2 tse") == ""
    assert sequences.bids_case("sub-01_ses-2_ce-gd_T1w.nii.gz") == "sub-01_ses-2"
    assert sequences.bids_case("a_t1.nii") is None


SPIN, INVERSION, GRADIENT = frozenset({"SE"}), frozenset({"SE", "IR"}), frozenset({"GR"})
PREPARED = frozenset({"GR", "IR"})
# description, agent, kinds, TE, TR, TI -> role; None if uncertain
HEADERS = [
    ("Ax T1 post GAD", "Dotarem", SPIN, 12, 550, None, "t1c"),
    ("Ax T1", "Gadavist", SPIN, 12, 550, None, "t1c"),
    ("Ax T1", "NONE", SPIN, 12, 550, None, "t1"),
    ("t1_mprage_sag_p2_iso", "", PREPARED, 2.9, 2000, 900, "t1"),
    ("t1_mprage_sag_p2_iso_KM", "", PREPARED, 2.9, 2000, 900, "t1c"),
    ("BRAVO +C", "", PREPARED, 3.2, 8.2, 450, "t1c"),
    ("Ax T1 FLAIR", "", INVERSION, 22, 2100, 780, "t1"),
    ("t2_tse_tra", "Dotarem", SPIN, 96, 5200, None, "t2"),
    ("t2_tirm_tra_dark-fluid", "", INVERSION, 86, 9000, 2500, "flair"),
    ("Sag CUBE T2 FLAIR", "Gadavist", INVERSION, 119, 6000, 1850, "flair"),
    ("FLAIR", "", SPIN, 386, 5000, None, "flair"),
    # no words, times decide
    ("axial", "", SPIN, 11, 500, None, "t1"),
    ("axial", "", INVERSION, 120, 9000, 2500, "flair"),
    ("axial", "", SPIN, 90, 3500, None, "t2"),
    ("axial", "", SPIN, 100, 9000, None, None),
    ("axial", "", GRADIENT, 4, 25, None, None),
    # none of the four
    ("ep2d_diff_b1000", "", frozenset({"EP", "SE"}), 89, 6000, None, None),
    ("axial", "", frozenset({"EP", "SE"}), 89, 6000, None, None),
    ("SWI", "", GRADIENT, 20, 28, None, None),
    ("axial", "", GRADIENT, 20, 600, None, None),
    ("STIR", "", INVERSION, 60, 4000, 160, None),
    # contradictions
    ("T2 FLAIR", "", SPIN, 12, 550, None, None),
    ("Ax T1", "", SPIN, 100, 4000, None, None),
    ("T1 pre contrast", "Dotarem", SPIN, 12, 550, None, None),
]


@pytest.mark.parametrize(("text", "agent", "kinds", "echo", "repetition", "inversion", "role"), HEADERS)
def test_words_times_and_agent_together(text, agent, kinds, echo, repetition, inversion, role):
    found = from_acquisition(Acquisition((text,), agent, "", kinds, echo, repetition, inversion))
    assert found.role == role, found


def test_the_name_of_the_examination_tells_no_contrast():
    native = Acquisition(("Ax T1", "MRI BRAIN WITH AND WITHOUT CONTRAST"), "", "", SPIN, 12, 550)
    assert from_acquisition(native).role == "t1"
    assert from_acquisition(native).assumed
    protocol = Acquisition(("Ax", "t1_se_tra_KM"), "", "", SPIN, 12, 550)
    assert from_acquisition(protocol).role == "t1c"
    both = Acquisition(("Ax T1", "t1_se_tra_KM"), "", "", SPIN, 12, 550)
    assert from_acquisition(both).role == "t1c"


def test_contradictions_are_told():
    found = from_acquisition(Acquisition(("T2 FLAIR",), "", "", SPIN, 12, 550, None))
    assert "described as flair" in found.problem and "t1" in found.problem
    found = from_acquisition(Acquisition(("T1 native",), "Dotarem", "", SPIN, 12, 550, None))
    assert "contrast agent is recorded" in found.problem


def test_evidence_names_no_text_of_the_header():
    found = from_acquisition(Acquisition(("DOE JANE brain T1 +C 1970-01-01",), "", "", SPIN, 12, 550, None))
    assert found.role == "t1c"
    assert "t1, ce" in found.evidence
    assert "doe" not in found.evidence.lower() and "1970" not in found.evidence


def test_sidecar_in_seconds():
    sidecar = {
        "SeriesDescription": "FLAIR tra",
        "EchoTime": 0.12,
        "RepetitionTime": 9,
        "InversionTime": 2.5,
        "ScanningSequence": "SE_IR",
    }
    assert from_sidecar(sidecar).role == "flair"
    assert from_sidecar({"SeriesDescription": "T1", "ContrastBolusIngredient": "GADOLINIUM"}).role == "t1c"
    assert from_sidecar({"SeriesDescription": ["x"], "EchoTime": "y"}).role is None


def write_slice(path, **elements):
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = MRImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
    header.Modality, header.PatientName = "MR", "Doe^Jane"
    header.Rows = header.Columns = 2
    for name, value in elements.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)


def test_dicom_header(tmp_path):
    write_slice(
        tmp_path / "a.dcm",
        SeriesDescription="AX T1 3D",
        ContrastBolusAgent="MultiHance",
        ScanningSequence=["GR", "IR"],
        EchoTime="3.1",
        RepetitionTime="1900",
        InversionTime="900",
    )
    header = read_mr_header(tmp_path / "a.dcm")
    assert header is not None
    assert from_dicom(header, "a.dcm").role == "t1c"
    assert "PatientName" not in header
    assert "SeriesDescription" not in read_header(tmp_path / "a.dcm")


def test_enhanced_dicom_header(tmp_path):
    echo, timing, modifier, shared = Dataset(), Dataset(), Dataset(), Dataset()
    echo.EffectiveEchoTime, timing.RepetitionTime, modifier.InversionTimes = 120.0, 9000.0, [2500.0]
    shared.MREchoSequence = [echo]
    shared.MRTimingAndRelatedParametersSequence = [timing]
    shared.MRModifierSequence = [modifier]
    agent = Dataset()
    agent.CodeMeaning = "Gadolinium"
    path = tmp_path / "b.dcm"
    write_slice(path, SharedFunctionalGroupsSequence=[shared], ContrastBolusAgentSequence=[agent])
    assert from_dicom(read_mr_header(path), path).role == "flair"
    write_slice(path, AcquisitionContrast="T1", ContrastBolusAgentSequence=[agent])
    assert from_dicom(read_mr_header(path), path).role == "t1c"
    write_slice(path, AcquisitionContrast="DIFFUSION", SeriesDescription="axial")
    assert from_dicom(read_mr_header(path), path).other


def test_damaged_values_say_nothing(tmp_path):
    write_slice(tmp_path / "c.dcm", SeriesDescription="T2", EchoTime=None, RepetitionTime=None)
    assert from_dicom(read_mr_header(tmp_path / "c.dcm"), "c.dcm").role == "t2"
    header = pydicom.Dataset()
    assert from_dicom(header, "d.dcm") == sequences.Finding()
