"""`ct_rate`: chest CTs with reports and labels; one volume per scan, fixed or original headers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from scan_twins import body, stored
from twins import made, write

from vilam3_jax.data.volumes import read_volume
from vilam3_jax.datasets import labelled_scans
from vilam3_jax.datasets.ct_rate import FINDINGS, CtRate
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import InputWarning, UnavailableError, UserError

# Three scans of two patients; one scan has two volumes.
TRAIN = ("train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_1")
VALID = ("valid_7_a_1", "valid_8_a_2")
REPORTS = ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"]


def report(name: str, findings: str | None = None, impression: str = "Not given.") -> list[str]:
    scan = name.rpartition("_")[0]
    return [
        f"{name}.nii.gz",
        "Cough.",
        "Non-contrast.",
        findings or f"Lungs of {scan} are clear.",
        impression,
    ]


def labels(name: str, positive: Iterable[str] = (), blank: Iterable[str] = ()) -> list[str]:
    return [f"{name}.nii.gz", *("" if f in blank else str(int(f in positive)) for f in FINDINGS)]


def volume(name: str, kind: str = "_fixed", content: bytes | None = None) -> dict[str, bytes]:
    split, patient, letter, _ = name.split("_")
    where = f"dataset/{split}{kind}/{split}_{patient}/{split}_{patient}_{letter}/{name}.nii.gz"
    return {where: stored(body(sum(map(ord, name))), "LPS") if content is None else content}


def world(kind: str = "_fixed") -> dict[str, Any]:
    files: dict[str, Any] = {}
    for name in TRAIN + VALID:
        files |= volume(name, kind)
    return files | {
        "dataset/radiology_text_reports/train_reports.csv": [REPORTS, *map(report, TRAIN)],
        "dataset/radiology_text_reports/validation_reports.csv": [
            REPORTS,
            report("valid_7_a_1", "A  nodule\nof 4 mm.", "Nodule."),
            report("valid_8_a_2", "Not given", "No finding."),
        ],
        "dataset/multi_abnormality_labels/train_predicted_labels.csv": [
            ["VolumeName", *FINDINGS],
            *(labels(name, ("Cardiomegaly", "Lung nodule"), ("Emphysema",)) for name in TRAIN),
        ],
        "dataset/multi_abnormality_labels/valid_predicted_labels.csv": [
            ["VolumeName", *FINDINGS],
            labels("valid_7_a_1", FINDINGS),
            labels("valid_8_a_2", (), FINDINGS),
        ],
        "dataset/metadata/train_metadata.csv": [
            ["Manufacturer", "VolumeName", "PatientSex", "PatientAge", "RescaleSlope", "RescaleIntercept",
             "ImageOrientationPatient", "XYSpacing"],
            *(["x", f"{name}.nii.gz", "F", "045Y", "1", "-1024.0", "[1.0, 0.0, 0, 0.0, 1.0, 0]", "[0.7, 0.7]"]
              for name in TRAIN),
        ],
        "dataset/metadata/no_chest_train.txt": "train_1_b_1.nii.gz\n",
        "dataset/metadata/no_chest_valid.txt": "\n",
    }  # fmt: skip


@pytest.fixture
def source(tmp_path) -> Path:
    return write(tmp_path, world())


def reasons(skipped: Mapping[str, list]) -> list[tuple[str, str]]:
    return [(s.record, s.reason) for found in skipped.values() for s in found]


def test_volumes_with_reports(source) -> None:
    examples, skipped = made(CtRate, source)
    (one, two), (valid, last) = examples["train"], examples["validation"]
    assert one.id in ("train_1_a_1", "train_1_a_2") and two.id == "train_2_a_1"
    (image,) = one.images
    assert (image.axis, image.index, image.modality, image.window) == (2, None, "CT", None)
    assert image.path == f"dataset/train_fixed/train_1/train_1_a/{one.id}.nii.gz"
    assert one.meta["input_key"] == read_volume(source / image.path).content_key
    assert [(t.role, t.text) for t in one.turns] == [
        ("user", "<image>\nDescribe the findings of this chest CT."),
        ("assistant", "Lungs of train_1_a are clear."),
    ]
    assert [t.text for t in valid.turns if t.supervised] == ["A nodule of 4 mm.", "Nodule."]
    assert last.turns[0].text.endswith("What is the impression of this chest CT?")
    assert [q["type"] for q in valid.meta["qa"]] == ["findings", "impression"]
    assert valid.meta["qa"][0]["label_source"] == "radiologist"
    assert (one.meta["sex"], one.meta["age_band"]) == ("F", "40-59") and "sex" not in valid.meta
    assert one.meta["findings"] == ["Cardiomegaly", "Lung nodule"] and "findings" not in last.meta
    assert one.meta["scan"] != two.meta["scan"] and "weight" not in one.meta
    patients = [{e.meta["patient"] for e in found} for found in examples.values()]
    assert not set.intersection(*patients)
    assert "train_1" not in json.dumps({k: v for k, v in one.meta.items() if k != "qa"})
    assert reasons(skipped) == [("train_reports.csv row 3", "shows no chest, by the source's list")]


def test_the_seed_draws_the_volume_of_a_scan(source) -> None:
    drawn = [made(CtRate, source, seed=seed)[0]["train"][0].id for seed in range(12)]
    assert set(drawn) == {"train_1_a_1", "train_1_a_2"}
    assert drawn[0] == made(CtRate, source)[0]["train"][0].id


def test_another_volume_of_the_scan_is_taken_where_the_drawn_one_is_bad(source) -> None:
    write(source, volume("train_1_a_1", content=b"no scan"))
    for seed in range(4):
        examples, _ = made(CtRate, source, seed=seed)
        assert examples["train"][0].id == "train_1_a_2"
    write(source, volume("train_1_a_2", content=b""))
    examples, skipped = made(CtRate, source)
    assert [e.id for e in examples["train"]] == ["train_2_a_1"]
    assert reasons(skipped)[0][0] == "train_reports.csv row 1"


def test_a_disk_that_fails_ends_the_build(source, monkeypatch) -> None:
    def fails(*_args, **_kwargs):
        raise UnavailableError("the disk fails")

    monkeypatch.setattr(labelled_scans, "read_volume", fails)
    with pytest.raises(UnavailableError):
        made(CtRate, source)


def test_all_volumes_with_weights(source) -> None:
    examples, _ = made(CtRate, source, argv=["--reconstructions", "all"])
    weights = {e.id: e.meta.get("weight", 1) for e in examples["train"]}
    assert weights == {"train_1_a_1": 0.5, "train_1_a_2": 0.5, "train_2_a_1": 1}
    assert len({e.meta["scan"] for e in examples["train"]}) == 2


def test_questions_about_findings(source) -> None:
    examples, skipped = made(CtRate, source, "findings")
    qa = examples["train"][0].meta["qa"]
    yes = [q["question"] for q in qa if q["answer"] == "yes"]
    assert len(yes) == 2 and len(qa) == 4
    assert any("cardiomegaly" in q for q in yes) and any("a lung nodule" in q for q in yes)
    assert not any("emphysema" in q["question"] for q in qa)  # has no value
    assert {q["label_source"] for q in qa} == {"labeler"} and qa[0]["options"] == ["yes", "no"]
    assert [q["answer"] for q in examples["validation"][0].meta["qa"]] == ["yes"] * 4
    assert reasons(skipped)[-1] == ("validation_reports.csv row 2", "has no label with a value")
    assert made(CtRate, source, "findings")[0] == examples


def test_studies_of_slices(source) -> None:
    examples, _ = made(CtRate, source, "slices", ["--slices", "3"])
    found = examples["train"]
    assert len(found) == 6 and {e.format for e in found} == {"study"}
    assert found[0].id == f"{found[0].id.split(':')[0]}:{found[0].images[0].index}"


def test_windows_give_an_image_each(source) -> None:
    examples, _ = made(CtRate, source, argv=["--windows", "lung, soft_tissue"])
    one = examples["train"][0]
    assert [i.window for i in one.images] == [(-600, 1500), (50, 400)]
    assert one.meta["windows"] == ["lung", "soft_tissue"] and one.turns[0].text.startswith(
        "<image>\n<image>\n"
    )
    with pytest.raises(UserError, match="'liver' is none of model, soft_tissue, lung"):
        made(CtRate, source, argv=["--windows", "liver"])


def test_volumes_of_both_kinds_are_refused(source) -> None:
    write(source, volume("train_1_a_1", ""))
    with pytest.raises(UserError, match="must not be mixed: move the folders without `_fixed` away"):
        made(CtRate, source)


def test_volumes_that_are_still_to_be_rescaled(tmp_path) -> None:
    """Shifts the window for values 1024 too high; skips a header that contradicts the metadata."""
    write(tmp_path, world("") | volume("train_2_a_1", "", stored(body(1), "RAS")))
    with pytest.raises(UserError, match=r"validation_metadata.csv or .*valid_metadata.csv missing"):
        made(CtRate, tmp_path)
    for name in VALID:
        folder = tmp_path / "dataset/valid" / "_".join(name.split("_")[:2])
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
    (tmp_path / "dataset/valid").rmdir()
    examples, skipped = made(CtRate, tmp_path)
    ((one,),) = examples.values()
    assert one.images[0].window == (50 + 1024, 400)
    assert reasons(skipped)[-1][0] == "train_reports.csv row 4"
    assert "axes RAS, its metadata LPS" in reasons(skipped)[-1][1]
    with pytest.raises(UserError, match="experts cannot read volumes with wrong headers"):
        made(CtRate, tmp_path, "slices")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (report("valid_1_a_1"), "is not train_NUMBER_LETTER_NUMBER"),
        (report("../../etc/passwd"), "is not train_NUMBER_LETTER_NUMBER"),
        (["", "", "", "", ""], "is not train_NUMBER_LETTER_NUMBER"),
        (["train_2_a_1.nii.gz"], "is a duplicate"),
        (report("train_1267_a_4"), "known to be damaged"),
        (report("train_9_a_1"), "is missing"),
        (["train_3_a_1.nii.gz", "", "", "", "not given."], "neither findings nor impression"),
        (["train_3_a_1.nii.gz"], "neither findings nor impression"),
    ],
)
def test_a_bad_row_is_named(source, row, reason) -> None:
    table = [REPORTS, report("train_2_a_1"), row]
    write(source, {"dataset/radiology_text_reports/train_reports.csv": table} | volume("train_3_a_1"))
    examples, skipped = made(CtRate, source, argv=["--reconstructions", "all"])
    assert [e.id for e in examples["train"]] == ["train_2_a_1"]
    ((record, said),) = reasons(skipped)
    assert record == "train_reports.csv row 2" and reason in said


def test_only_the_splits_with_volumes_are_made(tmp_path) -> None:
    files = {name: content for name, content in world().items() if "train_fixed" not in name}
    write(tmp_path, files)
    assert set(made(CtRate, tmp_path)[0]) == {"validation"}


def test_labels_and_metadata_are_optional_and_a_missing_list_is_told(tmp_path) -> None:
    keep = ("fixed", "reports")
    write(tmp_path, {name: content for name, content in world().items() if any(k in name for k in keep)})
    with pytest.warns(InputWarning, match="no_chest_valid.txt, so head scans are not excluded"):
        examples, _ = made(CtRate, tmp_path)
    assert len(examples["train"]) == 3 and "findings" not in examples["train"][0].meta
    with (
        warnings.catch_warnings(),
        pytest.raises(UserError, match=r"train_predicted_labels.csv missing.*Accept"),
    ):
        warnings.simplefilter("ignore")
        made(CtRate, tmp_path, "findings")


def test_missing_columns_and_folders_are_named(source, tmp_path_factory) -> None:
    write(
        source, {"dataset/multi_abnormality_labels/train_predicted_labels.csv": "VolumeName,Cardiomegaly\n"}
    )
    with pytest.raises(
        UserError, match="no column Medical material, Arterial wall calcification, Pericardial"
    ):
        made(CtRate, source)
    (source / "dataset/multi_abnormality_labels/train_predicted_labels.csv").unlink()
    write(source, {"dataset/radiology_text_reports/train_reports.csv": "VolumeName,Findings\n"})
    with pytest.raises(UserError, match="no column Findings_EN, Impressions_EN"):
        made(CtRate, source)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match=r"radiology_text_reports missing\. Accept the terms"):
        made(CtRate, empty)
    (empty / "dataset/radiology_text_reports").mkdir(parents=True)
    with pytest.raises(UserError, match="no folder dataset/train_fixed or dataset/valid_fixed"):
        made(CtRate, empty)


def test_official_counts(source) -> None:
    splits = CtRate().splits(SourceFolder(source))
    assert {name: split.expected for name, split in splits.items()} == {"train": 24_128, "validation": 1_564}
