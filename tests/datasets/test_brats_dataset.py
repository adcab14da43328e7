"""`brats`: four sequences become studies of four images, split by patient."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from scan_twins import BODY, SHAPE, box, marked, stored
from twins import made, write

from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.examples import RequestImage
from vilam3_jax.data.experts.cards import load_cards
from vilam3_jax.data.experts.labels import label_table
from vilam3_jax.data.volumes import read_volume
from vilam3_jax.datasets.brats import SHARES, BraTS
from vilam3_jax.datasets.dataset import Split
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

SUFFIXES = ("t1", "t1ce", "t2", "flair")
# Nested edema, core and enhancing tumor; the last is in planes 7 to 9 only.
TUMOR = marked(
    {
        2: box((8, 24), (8, 24), (5, 13)),
        1: box((10, 20), (10, 20), (6, 11)),
        4: box((12, 17), (12, 17), (7, 10)),
    }
)


def head(seed: int) -> np.ndarray:
    """A brain without a skull, [40, 36, 20] int16."""
    voxels = np.zeros(SHAPE, np.int16)
    voxels[BODY] = np.random.default_rng(seed).integers(100, 900, voxels[BODY].shape)
    return voxels


def case(folder: str, seed: int, labels: np.ndarray = TUMOR, codes: str = "LPS") -> dict[str, bytes]:
    name = folder.split("/")[-1]
    files = {f"{folder}/{name}_{s}.nii.gz": stored(head(4 * seed + n), codes) for n, s in enumerate(SUFFIXES)}
    return files | {f"{folder}/{name}_seg.nii.gz": stored(labels, codes)}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Six cases of 2018; one patient has two visits."""
    folder = tmp_path_factory.mktemp("brats")
    names = ("HGG/Brats18_TCIA01_1_1", "HGG/Brats18_TCIA01_1_2", "HGG/Brats18_CBICA_AAB_1",
             "HGG/Brats18_2013_2_1", "LGG/Brats18_TCIA09_3_1", "LGG/Brats18_TCIA10_4_1")  # fmt: skip
    root = "MICCAI_BraTS_2018_Data_Training"
    files: dict = {}
    for seed, name in enumerate(names):
        files |= case(f"{root}/{name}", seed)
    files[f"{root}/survival_data.csv"] = [
        ["BraTS18ID", "Age", "Survival"],
        ["Brats18_TCIA01_1_1", "63.5", "9"],
    ]
    files["MICCAI_BraTS_2018_Data_Validation/HGG/Brats18_X_9_1/readme.txt"] = "no labels"
    return write(folder, files)


def test_studies_of_four_images(source) -> None:
    examples, skipped = made(BraTS, source, argv=["--slices", "30"])
    assert not any(skipped.values()) and set(examples) == {"train", "validation", "test"}
    everything = {e.id: e for found in examples.values() for e in found}
    assert len(everything) == 6 * 16
    one = everything["Brats18_TCIA01_1_1:8"]
    folder = "MICCAI_BraTS_2018_Data_Training/HGG/Brats18_TCIA01_1_1/Brats18_TCIA01_1_1"
    assert one.format == "study"
    assert [i.path for i in one.images] == [f"{folder}_{s}.nii.gz" for s in ("t1ce", "t1", "t2", "flair")]
    assert {(i.axis, i.index, i.modality) for i in one.images} == {(2, 8, "MR")}
    assert one.meta["roles"] == ["t1c", "t1", "t2", "flair"]
    card = next(c for c in load_cards("experts") if c.name == "BRATS")
    assert set(card.roles) <= set(one.meta["roles"])
    keys = [
        (r, read_volume(source / i.path).content_key)
        for r, i in zip(one.meta["roles"], one.images, strict=True)
    ]
    asked = [RequestImage(n, role) for n, (role, _) in enumerate(keys)]
    assert one.input_key(asked) == inputs_key(keys)
    assert (one.meta["grade"], one.meta["age_band"], one.meta["modality"]) == ("HGG", "60-79", "MR")
    assert everything["Brats18_TCIA10_4_1:8"].meta["grade"] == "LGG"
    assert "lesions" not in one.meta


def test_splits_are_by_patient(source) -> None:
    examples, _ = made(BraTS, source, argv=["--slices", "1"])
    patients = [{e.meta["patient"] for e in found} for found in examples.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 5
    (visits,) = [split for split, found in examples.items() if any("TCIA01_1_1" in e.id for e in found)]
    assert any("TCIA01_1_2" in e.id for e in examples[visits])


def test_questions_agree_with_the_labels(source) -> None:
    examples, _ = made(BraTS, source, argv=["--slices", "30", "--records", "questions"])
    for example in (e for found in examples.values() for e in found):
        index = example.images[0].index or 0
        answers = {
            q["type"] + q["question"].count("enhancing") * "+": q["answer"] for q in example.meta["qa"]
        }
        tumor = 5 <= index < 13
        assert answers["lesion_present"] == ("yes" if tumor else "no")
        assert answers["part_present+"] == ("yes" if 7 <= index < 10 else "no")
        wanted = "high-grade glioma" if example.meta["grade"] == "HGG" else "low-grade glioma"
        assert answers.get("grade") == (wanted if tumor else None)
        assert example.turns[0].text.count("<image>") == 4
        sources = {q["type"]: q["label_source"] for q in example.meta["qa"]}
        assert sources["lesion_present"] == "segmentation" and sources.get("grade", "dataset") == "dataset"


def test_parity_shows_the_contrast_scan_four_times_on_slices_with_all_labels(source) -> None:
    examples, _ = made(BraTS, source, argv=["--slices", "30"], parity=True)
    plain, _ = made(BraTS, source, argv=["--slices", "30"])
    found = [e for split in examples.values() for e in split]
    assert len(found) == 6 * 3 and {e.images[0].index for e in found} == {7, 8, 9}
    keys = {e.id: e.meta["input_key"] for split in plain.values() for e in split}
    for example in found:
        assert len({i.path for i in example.images}) == 1 and "_t1ce" in str(example.images[0].path)
        assert len(example.images) == 4 and example.meta["input_key"] == keys[example.id]


def plain_cases(folder: Path, names: list[str]) -> SourceFolder:
    for name in names:
        (folder / name).mkdir(parents=True)
    return SourceFolder(folder)


def names_of(splits: Mapping[str, Split]) -> dict[str, set[str]]:
    return {split: {case.name for case in found.items} for split, found in splits.items()}


def test_the_complete_set_is_divided_as_vila_m3_does(tmp_path) -> None:
    names = [f"HGG/Brats18_TCIA_{n}_1" for n in range(210)] + [
        f"LGG/Brats18_TCIA_{n}_1" for n in range(210, 285)
    ]
    splits = BraTS().splits(plain_cases(tmp_path, names))
    assert {split: len(found.items) for split, found in splits.items()} == SHARES
    assert {split: found.expected for split, found in splits.items()} == SHARES
    assert {len([c for c in s.items if c.grade == "LGG"]) for s in splits.values()} == {53, 11}
    assert not set.intersection(*names_of(splits).values())


def test_2021_is_flat_and_has_no_grades(tmp_path) -> None:
    files = case("BraTS2021_00003", 3) | case("BraTS2021_00005", 5)
    write(tmp_path, files | {"BraTS2021_Training_Data.tar": b"tar"})
    examples, skipped = made(BraTS, tmp_path, "2021", ["--slices", "3"])
    assert sum(map(len, examples.values())) == 6 and not any(skipped.values())
    assert not any("grade" in e.meta for found in examples.values() for e in found)
    splits = BraTS(config="2021").splits(SourceFolder(tmp_path))
    assert sum(found.expected or 0 for found in splits.values()) == 1251


def test_a_data_list_divides(source, tmp_path) -> None:
    def row(name):
        return {
            "image": [f"training/{name}/{name[4:]}_{s}.nii.gz" for s in ("t1ce", "t1", "t2", "flair")],
            "label": f"training/{name}/{name[4:]}_seg.nii.gz",
        }

    file = tmp_path / "list.json"
    lists = {
        "training": [row("HGG/Brats18_TCIA01_1_1"), row("HGG/Brats18_TCIA01_1_1"), None, {"image": 3}],
        "validation": [row("LGG/Brats18_TCIA10_4_1"), row("HGG/Brats18_GONE_7_1")],
        "testing": [row("HGG/Brats18_2013_2_1")],
    }
    file.write_text(json.dumps(lists))
    examples, skipped = made(BraTS, source, argv=["--slices", "1", "--datalist", str(file)])
    assert {s: [e.id.split(":")[0] for e in found] for s, found in examples.items()} == {
        "train": ["Brats18_TCIA01_1_1"],
        "validation": ["Brats18_TCIA10_4_1"],
        "test": ["Brats18_2013_2_1"],
    }
    assert [(s.record, s.reason) for s in skipped["train"] + skipped["validation"]] == [
        ("training row 2", "its case is a duplicate"),
        ("training row 3", "names no case of BraTS 2018"),
        ("training row 4", "names no case of BraTS 2018"),
        ("validation row 2", "its case has no folder"),
    ]
    lists["testing"].append(row("HGG/Brats18_TCIA01_1_2"))
    for content, reason in (
        (json.dumps(lists), "the patient of testing row 2 is also in train"),
        ("{", "not JSON"),
        ("[]", "must contain the lists"),
        ('{"training": {}}', "must contain the lists"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=reason):
            made(BraTS, source, argv=["--datalist", str(file)])


def test_folders_with_the_name_of_a_file(tmp_path) -> None:
    """Some copies of 2021 have `CASE_t1.nii/anything.nii` instead of `CASE_t1.nii.gz`."""
    files = case("BraTS2021_00003", 3)
    for suffix, inside in (("t1", ["00003_brain_t1.nii"]), ("seg", ["final_seg.nii", "._final_seg.nii"])):
        content = files.pop(f"BraTS2021_00003/BraTS2021_00003_{suffix}.nii.gz")
        files |= {f"BraTS2021_00003/BraTS2021_00003_{suffix}.nii/{name}": content for name in inside}
    write(tmp_path, files)
    examples, skipped = made(BraTS, tmp_path, "2021", ["--slices", "1"])
    ((example,),) = [found for found in examples.values() if found]
    assert str(example.images[1].path).endswith("BraTS2021_00003_t1.nii/00003_brain_t1.nii")
    (tmp_path / "BraTS2021_00003/BraTS2021_00003_t1.nii/other.nii").write_bytes(b"x")
    _, skipped = made(BraTS, tmp_path, "2021")
    assert [s.reason for found in skipped.values() for s in found] == [
        "its folder *_t1.nii holds 2 scans instead of one"
    ]


def damaged(name: str) -> dict[str, bytes]:
    """A case of 2021 with one defect."""
    files, start = case("BraTS2021_00009", 9), "BraTS2021_00009/BraTS2021_00009"
    if name == "missing":
        del files[f"{start}_t2.nii.gz"]
    elif name == "unlabelled":
        del files[f"{start}_seg.nii.gz"]
    elif name == "cut":
        files[f"{start}_flair.nii.gz"] = files[f"{start}_flair.nii.gz"][:5000]
    elif name == "grid":
        files[f"{start}_t2.nii.gz"] = stored(head(1), "LPS", 10)
    elif name == "shape":
        files[f"{start}_t2.nii.gz"] = stored(head(1)[:30], "LPS")
    elif name == "numbering":
        files[f"{start}_seg.nii.gz"] = stored(np.where(TUMOR == 4, 3, TUMOR).astype(np.uint8), "LPS")
    return files


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("missing", "its t2 file is missing"),
        ("unlabelled", "its seg file is missing"),
        ("cut", "flair.nii.gz"),
        ("grid", "its scans have different grids"),
        ("shape", "its scans have different grids"),
        ("numbering", "holds label 3; BraTS 2018 and 2021 have"),
    ],
)
def test_a_damaged_case_is_named_and_the_other_is_made(tmp_path, what, reason) -> None:
    write(tmp_path, damaged(what) | case("BraTS2021_00003", 3))
    examples, skipped = made(BraTS, tmp_path, "2021", ["--slices", "1"])
    assert [e.id.split(":")[0] for found in examples.values() for e in found] == ["BraTS2021_00003"]
    ((record, said),) = [(s.record, s.reason) for found in skipped.values() for s in found]
    assert record == "case 2" and reason in said


def test_other_years_and_empty_folders_are_refused(source, tmp_path) -> None:
    with pytest.raises(UserError, match=r"no folder HGG/Brats18_\* or LGG/Brats18_\*\. 2018: register"):
        made(BraTS, tmp_path)
    (tmp_path / "sub/BraTS-GLI-00000-000").mkdir(parents=True)
    with pytest.raises(UserError, match="BraTS-GLI-00000-000 is not from BraTS 2021"):
        made(BraTS, tmp_path, "2021")
    for copy in ("a", "b"):
        (tmp_path / copy / "BraTS2021_00001").mkdir(parents=True)
    with pytest.raises(UserError, match="a/BraTS2021_00001 and b/BraTS2021_00001 are the same case"):
        made(BraTS, tmp_path, "2021")


def test_regions_are_named_as_the_expert_names_them() -> None:
    assert {"peritumoral edema", "enhancing tumor"} <= set(label_table("BRATS").values())
