"""Imported masks: files of many tools are read at the right position, or refused with a reason."""

import hashlib
import json
import shutil
import signal

import highdicom as hd
import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_series import write_series
from pydicom.data import get_testdata_file
from pydicom.sr.codedict import codes
from vilam3_experts.cli import main
from vilam3_experts.imported import dicom_seg, matching
from vilam3_experts.imported.label_tables import read_label_table
from vilam3_experts.imported.masks import to_scan_grid
from vilam3_experts.imported.run import MaskOrigin, Options, import_masks

from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.volumes import Volume, load_volume
from vilam3_jax.datasets.samples import Sample, write_index
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import as_path

TOOL = MaskOrigin("tool", "a network 1.0")
SHAPE = (9, 8, 7)
AFFINE = np.array(
    [[-2.0, 0, 0, 40], [0, -2.0, 0, 30], [0, 0, 3.0, -20], [0, 0, 0, 1.0]]
)  # LPS, as scanners write
NAMES = {1: "liver", 2: "spleen", 7: "left kidney"}


@pytest.fixture(autouse=True)
def _keep_signal_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def save(path, values, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine, dtype=values.dtype), path)
    return path


def labels_of(seed=0):
    """[X, Y, Z] in the index order of AFFINE, with one block per label."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:4, 2:5, 1:3], labels[5:8, 1:3, 4:6], labels[6:8, 5:7, 1:4] = 1, 2, 7
    return np.roll(labels, seed, axis=1)


@pytest.fixture
def case(tmp_path):
    """A scan of noise, its mask, and a label table."""
    noise = np.random.default_rng(3).integers(-1000, 1000, SHAPE).astype(np.int16)
    scan = save(tmp_path / "scans" / "case1_ct.nii.gz", noise)
    mask = save(tmp_path / "masks" / "case1_seg.nii.gz", labels_of())
    (tmp_path / "labels.json").write_text(json.dumps(NAMES))
    return scan, mask, tmp_path


def run(case, expert="MINE", masks=None, source=TOOL, **options):
    _, mask, root = case
    options = {"labels": str(root / "labels.json"), **options}
    return import_masks([masks or mask], root / "scans", expert, root / "store", source, Options(**options))


def record_of(case):
    store = AnnotationStore(case[2] / "store")
    (key,) = store.keys()
    return store.get(*key)


def world_of(labels, affine):
    """Label id to the sorted world coordinates (RAS, mm) of its voxels."""
    out = {}
    for label in np.unique(labels[labels > 0]).tolist():
        points = np.argwhere(labels == label) @ affine[:3, :3].T + affine[:3, 3]
        out[label] = np.array(sorted(np.round(points, 3).tolist()))
    return out


def assert_same_world(record, labels=None, affine=AFFINE):
    expected = world_of(labels_of() if labels is None else labels, affine)
    found = world_of(record.label_map(), record.label_affine)
    assert found.keys() == expected.keys()
    for label, points in expected.items():
        np.testing.assert_allclose(found[label], points, atol=2e-3)


def test_a_mask_becomes_a_record_of_its_scan(case):
    scan, mask, _ = case
    assert run(case).counts == {"imported": 1}
    record = record_of(case)
    assert record.key == (load_volume(scan).content_key, "MINE", "")
    assert record.version == "imported; tool: a network 1.0"
    assert record.weights_sha256 == hashlib.sha256(mask.read_bytes()).hexdigest()
    assert record.label_names == NAMES
    assert_same_world(record)
    (liver,) = [s for s in record.segments if s.name == "liver"]
    assert liver.voxels == 18 and liver.volume_ml == pytest.approx(18 * 12 / 1000)
    assert run(case).counts == {"skipped": 1}


# Types, index orders and formats of other tools.


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_any_type_of_whole_numbers(case, dtype):
    save(case[1], labels_of().astype(dtype))
    assert run(case).counts == {"imported": 1}
    assert_same_world(record_of(case))


@pytest.mark.parametrize("order", ["RAS", "LPS", "SAR", "IPL", "ALI"])
def test_any_index_order(case, order):
    mask = nib.Nifti1Image(labels_of(), AFFINE)
    ornt = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(AFFINE), nib.orientations.axcodes2ornt(tuple(order))
    )
    turned = mask.as_reoriented(ornt)
    assert nib.aff2axcodes(turned.affine) == tuple(order)
    nib.save(turned, case[1])
    assert run(case).counts == {"imported": 1}
    assert_same_world(record_of(case))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd", ".nii"])
def test_other_formats_written_by_itk(case, suffix):
    image = sitk.GetImageFromArray(labels_of().T)  # ITK counts in LPS
    image.SetSpacing((2, 2, 3))
    image.SetOrigin((-40, -30, -20))
    case[1].unlink()
    sitk.WriteImage(image, str(case[1].with_name("case1_seg" + suffix)))
    assert run(case, masks=case[2] / "masks").counts == {"imported": 1}
    assert_same_world(record_of(case))


def test_one_bit_masks_that_count_255(case):
    save(case[1], np.where(labels_of() == 1, 255, 0).astype(np.uint8))
    ((_, reason),) = run(case).problems
    assert "label ids without a name: 255" in reason
    (case[2] / "labels.json").write_text('{"255": "liver"}')
    assert run(case).counts == {"imported": 1}
    assert record_of(case).label_names == {255: "liver"}


def slicer_file(path, layers, fields):
    """A .seg.nrrd as 3D Slicer writes it, in LPS."""
    data = np.stack(layers) if len(layers) > 1 else layers[0]
    directions = np.diag([2.0, 2.0, 3.0])
    spatial = {"space": "left-posterior-superior", "space origin": [-40, -30, -20]}
    many = len(layers) > 1
    header = {
        **spatial,
        "space directions": np.vstack([[np.nan] * 3, directions]) if many else directions,
        "kinds": (["list"] if many else []) + ["domain"] * 3,
        **{f"Segment{i}_{k}": str(v) for i, f in enumerate(fields) for k, v in f.items()},
    }
    nrrd.write(str(path), data, header)


def test_segmentations_of_slicer_in_one_layer(case):
    case[1].unlink()
    fields = [{"Name": n, "LabelValue": i, "Layer": 0} for i, n in NAMES.items()]
    slicer_file(case[1].with_name("case1.seg.nrrd"), [labels_of()], fields)
    assert run(case, masks=case[2] / "masks", labels=None).counts == {"imported": 1}
    assert record_of(case).label_names == NAMES
    assert_same_world(record_of(case))


@pytest.mark.parametrize("overlapping", [False, True])
def test_segmentations_of_slicer_in_two_layers_of_the_same_values(case, overlapping):
    case[1].unlink()
    labels = labels_of()
    second = (labels == (1 if overlapping else 7)).astype(np.uint8)
    fields = [
        {"Name": "liver", "LabelValue": 1, "Layer": 0},
        {"Name": "spleen", "LabelValue": 2, "Layer": 0},
        {"Name": "tumor", "LabelValue": 1, "Layer": 1},
    ]
    slicer_file(case[1].with_name("case1.seg.nrrd"), [np.where(labels < 3, labels, 0), second], fields)
    summary = run(case, masks=case[2] / "masks", labels=None)
    if overlapping:
        ((_, reason),) = summary.problems
        assert "liver and tumor overlap in 18 voxels" in reason and "--overlap later" in reason
        summary = run(case, masks=case[2] / "masks", labels=None, later_wins=True)
        assert any("overlap in 18 voxels" in note for _, note in summary.notes)
    assert summary.counts["imported"] == 1
    record = record_of(case)
    names = {s.name: s.voxels for s in record.segments}
    assert names == ({"tumor": 18, "spleen": 12} if overlapping else {"liver": 18, "spleen": 12, "tumor": 12})


def test_segmentations_of_mitk(case):
    groups = [{"labels": [{"name": n, "value": i, "visible": True} for i, n in NAMES.items()]}]
    header = {"space": "left-posterior-superior", "space origin": [-40, -30, -20], "kinds": ["domain"] * 3}
    header |= {"space directions": np.diag([2.0, 2.0, 3.0])}
    header |= {"org.mitk.multilabel.segmentation.labelgroups": json.dumps(groups)}
    case[1].unlink()
    nrrd.write(str(case[1].with_name("case1.nrrd")), labels_of(), header)
    assert run(case, masks=case[2] / "masks", labels=None).counts == {"imported": 1}
    assert record_of(case).label_names == NAMES


def test_one_file_per_structure(case):
    """As TotalSegmentator writes them; the ids are those of the table."""
    case[1].unlink()
    folder = case[2] / "masks" / "case1" / "segmentations"
    for number, name in {**NAMES, 9: "empty_organ"}.items():
        save(folder / f"{name.replace(' ', '_')}.nii.gz", (labels_of() == number).astype(np.uint8))
    (case[2] / "labels.json").write_text(json.dumps({**NAMES, 9: "empty organ"}))
    assert run(case, masks=case[2] / "masks", per_structure=True).counts == {"imported": 1}
    record = record_of(case)
    assert record.label_names == NAMES and len(record.weights_sha256) == 64
    assert_same_world(record)


def test_structures_without_a_table_get_one_id_a_name_in_the_whole_run(case):
    case[1].unlink()
    for name, organs in (("case1", {1: "liver", 2: "spleen"}), ("case2", {2: "spleen"})):
        noise = np.random.default_rng(len(organs)).integers(-1000, 1000, SHAPE).astype(np.int16)
        save(case[2] / "scans" / f"{name}_ct.nii.gz", noise)
        for number, organ in organs.items():
            save(case[2] / "masks" / name / f"{organ}.nii.gz", (labels_of() == number).astype(np.uint8))
    assert run(case, masks=case[2] / "masks", labels=None, per_structure=True).counts == {"imported": 2}
    store = AnnotationStore(case[2] / "store")
    ids = [{s.name: s.label_id for s in store.get(*key).segments} for key in store.keys()]  # noqa: SIM118
    assert sorted(ids, key=len) == [{"spleen": 2}, {"liver": 1, "spleen": 2}]


# Names.

NNUNET = {"background": 0, "liver": 1, "spleen": "2", "left_kidney": 7}
CHANNELS = {"channel_def": {"0": "background", "1": "liver"}}
SNAP = """# ITK-SNAP
    0     0    0    0        0  0  0    "Clear Label"
    1   255    0    0        1  1  1    "liver"
    7 0 255 0 0.5 1 0 "left kidney"
"""
SLICER = "# Color table file\n0 Background 0 0 0 0\n1 liver 221 130 101 255\n7 left_kidney 185 102 83 255\n"
FREESURFER = "#No. Label Name: R G B A\n0 Unknown 0 0 0 0\n2 Left-White-Matter 245 245 245 0\n"
TWO = {1: "liver", 7: "left kidney"}
TABLES = {
    "ids.json": (json.dumps(NAMES), NAMES),
    "names.json": (json.dumps({n: i for i, n in NAMES.items()} | {"background": 0}), NAMES),
    "dataset.json": (json.dumps({"labels": NNUNET}), NAMES),
    "v1.json": (json.dumps({"labels": {"0": "background", **NAMES}}), NAMES),
    "list.json": (json.dumps(["background", "liver", "spleen"]), {1: "liver", 2: "spleen"}),
    "rows.json": (json.dumps([{"id": i, "name": n} for i, n in NAMES.items()]), NAMES),
    "monai.json": (json.dumps({"network_data_format": {"outputs": {"pred": CHANNELS}}}), {1: "liver"}),
    "snap.txt": (SNAP, TWO),
    "slicer.ctbl": (SLICER, TWO),
    "lut.txt": (FREESURFER, {2: "Left-White-Matter"}),
    "table.csv": ("LabelValue,Name,Color_R\n1,liver,3\n7,left kidney,4\n", TWO),
    "bare.csv": ("liver;1\nspleen;2\n", {1: "liver", 2: "spleen"}),
    "dseg.tsv": ("index\tname\tcolor\n1\tliver\t#fff\n", {1: "liver"}),
    "map.py": ("class_map = {'total': {1: 'liver', 7: 'kidney_left'}}\nimport os; os.abort()\n", TWO),
}


@pytest.mark.parametrize("name", TABLES)
def test_label_tables(tmp_path, name):
    text, expected = TABLES[name]
    (tmp_path / name).write_text(text)
    assert read_label_table(str(tmp_path / name)).names == expected


def test_regions_name_what_lies_between_them(tmp_path):
    """nnU-Net's regions of BraTS: id 1 is the whole tumour without its core."""
    regions = {
        "background": 0,
        "whole tumor": [1, 2, 3],
        "tumor core": [2, 3],
        "enhancing tumor": 3,
        "ignore": 4,
    }
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": regions}))
    table = read_label_table(str(tmp_path / "dataset.json"))
    assert table.names == {
        1: "whole tumor without tumor core", 2: "tumor core without enhancing tumor", 3: "enhancing tumor",
    }  # fmt: skip
    assert table.ignored == {4}


def test_one_of_several_tables(tmp_path):
    path = tmp_path / "class_map.json"
    path.write_text(json.dumps({"total": {"1": "spleen"}, "body": {"1": "body trunc"}}))
    assert read_label_table(f"{path}#body").names == {1: "body trunc"}
    with pytest.raises(UserError, match=r"several tables \('total', 'body'\).*FILE#NAME"):
        read_label_table(str(path))
    with pytest.raises(UserError, match="no entry 'lungs'"):
        read_label_table(f"{path}#lungs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "not a table of ids and names"),
        ('{"1": "a", "01": "b"}', "label id 1 has two names"),
        ('{"70000": "a"}', "outside 1..65535"),
        ('{"0": "background"}', "names no label"),
        ('{"1": "a", "1": "b"}', "states '1' twice"),
        ('{"1": 5, "2": 6}', "not a table of ids and names"),
        ('["liver", "spleen"]', "label id 0 is 'liver'.*begin a list with 'background'"),
        ('{"0": "Tumor core", "1": "Whole tumor"}', "label id 0 is 'Tumor core'"),
        (json.dumps({"1": "x" * 200}), "too long"),
        (json.dumps({"1": "a\u0007b"}), "not printable"),
        ("once upon a time", "not a known kind of label table"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_tables_cost_one_sentence(tmp_path, text, message):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_label_table(str(tmp_path / "t.txt"))


def test_names_of_a_known_expert_get_its_ids(case):
    (case[2] / "labels.json").write_text(json.dumps({1: "liver", 2: "kidney_right", 7: "tail"}))
    summary = run(case, expert="ORGANS")
    record = record_of(case)
    assert record.args == "organs" and record.label_names == {1: "liver", 5: "right kidney"}
    notes = [note for _, note in summary.notes]
    assert "1 labels are not in the table of ORGANS and are left out: tail" in notes
    (case[2] / "labels.json").write_text(json.dumps({1: "wheel", 2: "door", 7: "roof"}))
    with_new_store = import_masks(
        [case[1]], case[2] / "scans", "ORGANS", case[2] / "other", TOOL, Options(str(case[2] / "labels.json"))
    )
    assert "none of its labels is one of ORGANS's" in with_new_store.problems[0][1]


def test_masks_of_a_network_that_ran_elsewhere_are_stored_under_its_arguments(case):
    assert run(case, expert="VISTA3D", args=("organs", "everything")).counts == {"imported": 1}
    store = AnnotationStore(case[2] / "store")
    records = [store.get(*key) for key in store.keys()]  # noqa: SIM118
    assert [record.args for record in records] == ["everything", "organs"]
    assert records[0].label_names == {1: "liver", 3: "spleen", 14: "left kidney"}
    with pytest.raises(UserError, match="no argument 'nonsense'"):
        run(case, expert="VISTA3D", args=("nonsense",))


def test_a_lesion_that_nobody_looked_for_is_not_absent(case):
    """Records serve as ground truth: a mask of organs must not become "no hepatic tumor"."""
    summary = run(case, expert="VISTA3D", args=("hepatic tumor",))
    assert "no label is named hepatic tumor" in summary.problems[0][1] and summary.counts == {"refused": 1}
    (case[2] / "labels.json").write_text(json.dumps({**NAMES, 9: "hepatic_tumor"}))
    summary = run(case, expert="VISTA3D", args=("hepatic tumor", "organs"))
    assert summary.counts == {"imported": 1}
    assert any("labels of VISTA3D(organs) have no name in the mask" in note for _, note in summary.notes)


def test_ids_of_one_name_are_one_label(case):
    (case[2] / "labels.json").write_text(json.dumps({1: "liver", 2: "kidney", 7: "Kidney"}))
    summary = run(case)
    record = record_of(case)
    assert record.label_names == {1: "liver", 2: "kidney"}
    expected = np.where(labels_of() == 7, 2, labels_of())
    assert_same_world(record, expected)
    assert "several label ids have the name kidney; each name is one label" in [n for _, n in summary.notes]


def test_names_in_the_header_of_a_nifti_file(case):
    """As TotalSegmentator writes them."""
    image = nib.Nifti1Image(labels_of(), AFFINE)
    rows = "".join(f'<Label Key="{i}" Red="1"><![CDATA[{n}]]></Label>\n' for i, n in NAMES.items())
    table = f"<VolumeInformation><LabelTable>\n{rows}</LabelTable></VolumeInformation>"
    text = f"<CaretExtension>{table}</CaretExtension>"
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, text.encode()))
    nib.save(image, case[1])
    assert run(case, labels=None).counts == {"imported": 1}
    assert record_of(case).label_names == NAMES


# Grids.


def test_another_grid_is_refused_or_resampled_when_asked(case):
    fine = np.repeat(np.repeat(labels_of(), 2, axis=0), 2, axis=1)
    affine = AFFINE @ np.diag([0.5, 0.5, 1, 1])
    affine[:3, 3] = (AFFINE @ [-0.25, -0.25, 0, 1])[:3]
    save(case[1], fine, affine)
    ((name, reason),) = run(case).problems
    assert name == "case1_seg.nii.gz" and "18 x 16 x 7 voxels" in reason and "--resample" in reason
    summary = run(case, resample=True)
    assert (
        "case1_seg.nii.gz",
        "was on another grid and was resampled to that of the scan, nearest neighbour",
    ) in (summary.notes)
    assert_same_world(record_of(case))


def test_a_shifted_grid_is_refused_and_rounding_is_not(case):
    moved = AFFINE.copy()
    moved[0, 3] += 0.1  # of 2 mm
    save(case[1], labels_of(), moved)
    assert run(case).counts == {"imported": 1}
    moved[0, 3] += 1
    save(case[2] / "masks" / "case1_seg.nii.gz", labels_of(), moved)
    summary = import_masks(
        [case[1]], case[2] / "scans", "X", case[2] / "store2", TOOL, Options(str(case[2] / "labels.json"))
    )
    assert "is 1.10 mm away" in summary.problems[0][1]


def test_resampling_agrees_with_itk():
    """Nearest neighbour from an oblique grid, except for points halfway between two voxels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (11, 12, 13)).astype(np.uint8)
    c, s = np.cos(0.3), np.sin(0.3)
    oblique = np.array(
        [[1.7 * c, -1.7 * s, 0, -9], [1.7 * s, 1.7 * c, 0, -7], [0, 0, 2.1, -12], [0, 0, 0, 1]]
    )
    scan = Volume(np.zeros((10, 9, 8), np.int16), np.diag([2.0, 2.2, 2.6, 1]) + np.eye(4, k=3) * -8, "scan")
    placed, _ = to_scan_grid(labels, oblique, scan, "mask", resample=True)

    def itk(array, affine):
        lps = np.diag([-1, -1, 1, 1]) @ affine
        image = sitk.GetImageFromArray(array.T)
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(lps[:3, 3].tolist())
        return image

    reference = itk(scan.voxels, scan.affine)
    expected = sitk.Resample(itk(labels, oblique), reference, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    agreement = (placed == sitk.GetArrayFromImage(expected).T).mean()
    assert agreement > 0.99 and placed.any()


def test_a_mask_of_other_places_is_refused(case):
    far = AFFINE.copy()
    far[2, 3] += 500
    save(case[1], labels_of(), far)
    assert "all its labels are outside case1_ct.nii.gz" in run(case, resample=True).problems[0][1]


# Unusable masks are reported, and the others are imported.


def test_bad_masks_are_named_and_the_run_goes_on(case):
    good = labels_of()
    folder = case[2] / "masks"
    bad = {
        "fractional": good * 0.5,
        "negative": -good.astype(np.int16),
        "unknown": np.where(good == 2, 3, good).astype(np.uint8),
        "empty": np.zeros_like(good),
        "huge ids": (good.astype(np.int32) * 70000),
        "four": np.stack([good, good], axis=-1),
        "truncated": good,
    }
    for number, (name, values) in enumerate(bad.items(), start=10):
        noise = np.random.default_rng(number).integers(-1000, 1000, SHAPE).astype(np.int16)
        save(case[2] / "scans" / f"{name}.nii.gz", noise)
        save(folder / f"{name}.nii.gz", values)
    (folder / "truncated.nii.gz").write_bytes((folder / "truncated.nii.gz").read_bytes()[:60])
    (folder / "text.nii.gz").write_text("no mask")
    summary = run(case, masks=folder)
    reasons = dict(summary.problems)
    assert summary.counts == {"imported": 1, "refused": 8}
    expected = {
        "fractional": "whole numbers", "negative": "whole numbers", "unknown": "without a name: 3",
        "empty": "is empty", "huge ids": "whole numbers", "four": "volumes", "truncated": "truncated",
        "text": "no scan has its name",
    }  # fmt: skip
    for name, words in expected.items():
        assert words in reasons[f"{name}.nii.gz"], name
    stored = json.loads((case[2] / "store" / "problems-MINE.json").read_text())
    assert {row["input"] for row in stored} == set(reasons)
    assert run(case, masks=folder, keep_empty=True).counts["imported"] == 1


def test_ground_truth_is_never_an_experts_answer(case):
    people = MaskOrigin("ground-truth", "two radiologists")
    with pytest.raises(UserError, match="BRAINSEG: is a network, and ground truth is not its answer"):
        run(case, expert="BRAINSEG", source=people)
    assert run(case, expert="READERS", source=people).counts == {"imported": 1}
    assert record_of(case).version == "imported; ground-truth: two radiologists"
    for text in ("radiologists", "tool:", "person:me", "tool:a\nb\0"):
        with pytest.raises(UserError, match="say who made the masks"):
            MaskOrigin.parse(text)


@pytest.mark.parametrize(
    ("expert", "message"), [("PNEUMONIA", "no label map of one volume"), ("mine", "upper case")]
)
def test_names_that_cannot_take_masks(case, expert, message):
    with pytest.raises(UserError, match=message):
        run(case, expert=expert)


# Which scan a mask belongs to.


def test_names_folders_and_grids_find_the_scan(tmp_path, monkeypatch):
    root = tmp_path / "data"
    rng = np.random.default_rng(0)

    def scan(path, shape=SHAPE):
        save(root / path, rng.integers(-9, 9, shape).astype(np.int16))

    for name in ("imagesTr/liver_1_0000", "imagesTr/liver_11_0000", "study a/ct", "study b/ct"):
        scan(f"{name}.nii.gz")
    scan("odd.nii.gz", (5, 6, 7))
    masks = tmp_path / "masks"
    for name in ("labelsTr/liver_1", "labelsTr/liver_11", "study a/ct_seg", "nobody"):
        save(masks / f"{name}.nii.gz", labels_of())
    save(masks / "segmentation.nii.gz", np.ones((5, 6, 7), np.uint8))
    (tmp_path / "labels.json").write_text(json.dumps(NAMES))
    options = Options(str(tmp_path / "labels.json"))
    summary = import_masks([masks], root, "MINE", tmp_path / "store", TOOL, options)
    ((name, reason),) = summary.problems
    assert name == "nobody.nii.gz" and "could belong to 4 scans" in reason and "--manifest" in reason
    assert summary.counts["imported"] == 4
    by_grid = [note for note in summary.notes if "only by its grid" in note[1]]
    assert by_grid == [("segmentation.nii.gz", "matched with odd.nii.gz only by its grid")]


def test_two_masks_of_one_scan_are_refused(case):
    save(case[2] / "masks" / "case1_label.nii.gz", labels_of(1))
    summary = run(case, masks=case[2] / "masks")
    assert summary.counts == {"refused": 2}
    assert "another mask, case1_label.nii.gz" in dict(summary.problems)["case1_seg.nii.gz"]


def test_a_name_that_the_grid_contradicts_is_refused(case):
    """The mask has the name of case1 and the grid of case2."""
    noise = np.random.default_rng(8).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    save(case[2] / "scans" / "case2_ct.nii.gz", noise)
    save(case[1], np.ones((5, 6, 7), np.uint8))
    ((_, reason),) = run(case).problems
    assert reason.startswith("its name is that of case1_ct.nii.gz, its grid that of case2_ct.nii.gz")


@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_manifest_decides(case, form):
    case[1].rename(case[1].with_name("zz.nii.gz"))
    rows = [
        ("case1_ct.nii.gz", "zz.nii.gz"),
        ("case9_ct.nii.gz", "zz.nii.gz"),
        ("case1_ct.nii.gz", "../zz.nii.gz"),
    ]
    path = case[2] / f"pairs.{form}"
    if form == "csv":
        path.write_text("scan,mask\n" + "".join(f"{a},{b}\n" for a, b in rows))
    else:
        path.write_text(json.dumps([{"scan": a, "mask": b} for a, b in rows]))
    summary = run(case, masks=case[2] / "masks", manifest=path)
    assert summary.counts == {"imported": 1, "refused": 2}
    assert "no scan case9_ct.nii.gz" in summary.problems[0][1]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="columns scan and mask"):
        run(case, masks=case[2] / "masks", manifest=path)


def test_masks_between_the_scans(tmp_path):
    """TotalSegmentator's dataset: s1/ct.nii.gz beside s1/segmentations/liver.nii.gz."""
    for number in (1, 2):
        noise = np.random.default_rng(number).integers(-1000, 1000, SHAPE).astype(np.int16)
        save(tmp_path / "d" / f"s{number}" / "ct.nii.gz", noise)
        save(
            tmp_path / "d" / f"s{number}" / "segmentations" / "liver.nii.gz",
            (labels_of() == 1).astype(np.uint8),
        )
    masks = sorted((tmp_path / "d").glob("*/segmentations"))
    options = Options(per_structure=True)
    assert import_masks(masks, tmp_path / "d", "X", tmp_path / "s", TOOL, options).counts == {"imported": 2}
    with pytest.raises(UserError, match="no DICOM Segmentation object in it"):
        import_masks([tmp_path / "d"], tmp_path / "d", "X", tmp_path / "s", TOOL, options)


def test_words_for_the_role_of_a_file():
    names = ["case7_ct.nii.gz", "case7_seg.nrrd", "case7.seg.nrrd", "CASE7-label.mha", "case7_0000.nii.gz"]
    assert {matching.case_name(name) for name in names} == {"case7"}
    assert matching.case_name("liver_1_0001.nii.gz") == "liver_1_0001"


# Samples folders: the quickstart's organs.


def test_the_maps_of_a_samples_folder_by_their_source(tmp_path):
    """Of two scans, one has a map by a tool and one a mask by a radiologist; only the former is imported."""
    folder = tmp_path / "samples"
    labels = labels_of()
    save(folder / "map.nii.gz", labels)
    rows = []
    for name, source in (("known", "TotalSegmentator reference map"), ("masked", "radiologist mask")):
        noise = np.random.default_rng(len(name)).integers(-1000, 1000, SHAPE).astype(np.int16)
        rows.append(Sample(
            name, as_path(save(folder / f"{name}.nii.gz", noise)), kind="ct", modality="CT", patient=name,
            split_group=name, licence="none stated", origin="generated", body_region="abdomen",
            label_map=as_path(folder / "map.nii.gz"), label_names=NAMES, label_source=source,
        ))  # fmt: skip
    write_index(folder, rows, {})
    source = MaskOrigin("tool", "TotalSegmentator reference map")
    assert import_masks([folder], folder, "ORGANS", tmp_path / "s", source).counts == {"imported": 1}
    store = AnnotationStore(tmp_path / "s")
    (key,) = store.keys()
    record = store.get(*key)
    assert key == (load_volume(folder / "known.nii.gz").content_key, "ORGANS", "organs")
    assert record.label_names == {1: "liver", 3: "spleen", 14: "left kidney"}
    with pytest.raises(UserError, match=r"no label map of 'nobody'.*'radiologist mask'"):
        import_masks([folder], folder, "ORGANS", tmp_path / "s", MaskOrigin("tool", "nobody"))


# DICOM Segmentation objects.


def segmentation(series, arrays, names, kind="BINARY"):
    """An object made by highdicom: arrays [segments] of [slice, row, column]."""
    algorithm = hd.AlgorithmIdentificationSequence("n", codes.DCM.ArtificialIntelligence, "1")
    described = [
        hd.seg.SegmentDescription(
            i, label, codes.SCT.AnatomicalStructure, code, "AUTOMATIC", algorithm_identification=algorithm
        )
        for i, (label, code) in enumerate(names, start=1)
    ]
    pixels = arrays if isinstance(arrays, np.ndarray) else np.stack(arrays, axis=-1)
    uids = {"series_instance_uid": hd.UID(), "sop_instance_uid": hd.UID(), "series_number": 9}
    device = {"manufacturer": "m", "manufacturer_model_name": "m", "device_serial_number": "1"}
    made = {"instance_number": 1, "software_versions": "1", **uids, **device}
    return hd.seg.Segmentation(series, pixels, kind, described, **made)


@pytest.fixture
def dicom_case(tmp_path):
    series = write_series(tmp_path / "scans" / "study")
    first, second = np.zeros((2, 6, 8, 9), np.uint8)
    first[2:4, 1:3, 2:6], second[3:5, 5:7, 1:4] = 1, 1
    return series, first, second, tmp_path


LIVER, SPLEEN = ("Liver", codes.SCT.Liver), ("Segment_2", codes.SCT.Spleen)


def import_seg(root, **options):
    places = [root / "masks"], root / "scans", "MINE", root / "store"
    return import_masks(*places, TOOL, Options(**options))


def save_seg(root, made):
    (root / "masks").mkdir(exist_ok=True)
    made.save_as(root / "masks" / "any name.dcm")


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_dicom_seg_of_a_series(dicom_case, kind):
    series, first, second, root = dicom_case
    if kind == "FRACTIONAL":
        arrays = [first * 0.7, second * 0.9]
        arrays[0][0, 0, 0] = 0.3  # below one half
        made = segmentation(series, arrays, [LIVER, SPLEEN], kind)
    elif kind == "LABELMAP":
        made = segmentation(series, first + 2 * second, [LIVER, SPLEEN], kind)
    else:
        made = segmentation(series, [first, second], [LIVER, SPLEEN], kind)
    save_seg(root, made)
    summary = import_seg(root)
    assert summary.problems == [] and summary.counts == {"imported": 1}
    store = AnnotationStore(root / "store")
    (key,) = store.keys()
    record = store.get(*key)
    assert record.label_names == {1: "Liver", 2: "Spleen"}  # a generic label is replaced by the coded name
    expected = world_of((first + 2 * second).transpose(2, 1, 0), AFFINE)
    found = world_of(record.label_map(), record.label_affine)
    for label in (1, 2):
        np.testing.assert_allclose(found[label], expected[label], atol=1e-6)
    if kind == "FRACTIONAL":
        assert any("fractional" in note for _, note in summary.notes)


def test_overlapping_segments_are_named(dicom_case):
    series, first, _, root = dicom_case
    save_seg(root, segmentation(series, [first, first], [LIVER, ("Tumor", codes.SCT.Neoplasm)]))
    ((_, reason),) = import_seg(root).problems
    assert "Liver and Tumor overlap in 16 voxels" in reason
    assert import_seg(root, later_wins=True).counts == {"imported": 1}


def test_a_segmentation_beside_its_series_is_no_scan(dicom_case):
    series, first, second, root = dicom_case
    segmentation(series, [first, second], [LIVER, SPLEEN]).save_as(root / "scans" / "study" / "seg.dcm")
    found = import_masks([root / "scans"], root / "scans", "MINE", root / "store", TOOL)
    assert found.problems == [] and found.counts == {"imported": 1}


def test_a_segmentation_belongs_to_no_other_series(dicom_case):
    """Another patient's series is in the same folder, on the same grid."""
    series, first, second, root = dicom_case
    shutil.rmtree(root / "scans")
    write_series(root / "scans" / "other")
    segmentation(series, [first, second], [LIVER, SPLEEN]).save_as(root / "scans" / "other" / "other.dcm")
    summary = import_masks([root / "scans"], root / "scans", "MINE", root / "store", TOOL, Options())
    assert summary.counts == {"refused": 1} and "was made of another series" in summary.problems[0][1]


def test_the_sides_of_coded_names(dicom_case):
    series, first, _, root = dicom_case
    made = segmentation(series, [first], [("1", codes.SCT.Kidney)])
    coded = made.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0]
    coded.SegmentedPropertyTypeModifierCodeSequence = [hd.sr.CodedConcept("7771000", "SCT", "Left")]
    save_seg(root, made)
    assert dicom_seg.read_seg_header(root / "masks" / "any name.dcm").names == {1: "Left Kidney"}


def test_a_segmentation_that_highdicom_did_not_write():
    """pydicom's liver.dcm, from another vendor."""
    path = get_testdata_file("liver.dcm")
    header = dicom_seg.read_seg_header(path)
    assert dicom_seg.is_segmentation(path) and header.names == {1: "Liver"} and header.kind == "BINARY"
    shape, affine, masks = dicom_seg.open_segments(path, header)
    ((number, mask),) = masks
    stored = pydicom.dcmread(path)
    frames = {
        float(f.PlanePositionSequence[0].ImagePositionPatient[2]): image
        for f, image in zip(stored.PerFrameFunctionalGroupsSequence, stored.pixel_array, strict=True)
    }
    assert number == 1 and shape == (3, 512, 512)
    for index in range(3):
        z = (affine @ [index, 0, 0, 1])[2]
        np.testing.assert_array_equal(mask[index], frames[min(frames, key=lambda known: abs(known - z))] > 0)


def test_damaged_and_other_dicom_files_are_no_masks(dicom_case):
    series, first, _, root = dicom_case
    save_seg(root, segmentation(series, [first], [LIVER]))
    path = root / "masks" / "any name.dcm"
    path.write_bytes(path.read_bytes()[:-40])
    ((_, reason),) = import_seg(root).problems
    assert "any name.dcm" in reason
    assert not dicom_seg.is_segmentation(root / "scans" / "study" / "00.dcm")
    # An invalid value representation of SOPClassUID; found by fuzzing.
    data = path.read_bytes()
    place = data.index(b"\x08\x00\x16\x00UI")
    path.write_bytes(data[: place + 4] + b"U\xff" + data[place + 6 :])
    assert not dicom_seg.is_segmentation(path)


def test_the_command(case, capsys):
    root = case[2]
    (root / "masks" / "other.nii.gz").write_text("no mask")
    command = ["import", "--masks", str(root / "masks"), "--data", str(root / "scans"), "--expert", "MINE"]
    command += ["--labels", str(root / "labels.json"), "--out", str(root / "store")]
    assert main([*command, "--source", "tool:a network 1.0"]) == 0
    captured = capsys.readouterr()
    assert "MINE: 1 imported, 0 skipped, 1 refused" in captured.out
    assert "problem: other.nii.gz: no scan has its name" in captured.err
    assert main([*command, "--source", "me"]) == 2
    assert capsys.readouterr().err.startswith("error: --source 'me'")
