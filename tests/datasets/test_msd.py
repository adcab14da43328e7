"""`msd`: studies of slices, and questions answered by the label maps."""

from __future__ import annotations

import json

import pytest
from scan_twins import body, box, marked, stored
from twins import made, write

from vilam3_jax import cli
from vilam3_jax.data.experts.cards import load_cards
from vilam3_jax.data.volumes import read_volume
from vilam3_jax.datasets.msd import MSD
from vilam3_jax.datasets.registry import get
from vilam3_jax.errors import UserError

LIVER = box((8, 24), (8, 24), (4, 14))
BIG = box((10, 17), (10, 17), (5, 8))  # 147 voxels of 4.5 mm³: 0.66 ml
SMALL = box((20, 24), (20, 24), (10, 12))  # 32 voxels: 0.14 ml, 16 pixels a slice
SPECK = box((8, 10), (22, 24), (4, 6))  # 8 voxels: 0.04 ml
LABELS = {"0": "background", "1": "liver", "2": "cancer"}


def listing(training, test=(), labels=LABELS):
    return {
        "name": "Liver", "relase": "2.0", "modality": {"0": "CT"}, "labels": labels,
        "numTraining": len(training), "numTest": len(test), "training": training, "test": list(test),
    }  # fmt: skip


def row(name):
    return {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}


@pytest.fixture
def source(tmp_path):
    files = {
        # Two counted components and one too small; the stored orientation is not canonical.
        "imagesTr/liver_0.nii.gz": stored(body(0), "LPS", 20),
        "labelsTr/liver_0.nii.gz": stored(marked({1: LIVER, 2: [BIG, SMALL, SPECK]}), "LPS", 20),
        "imagesTr/liver_12.nii.gz": stored(body(1), "SRA"),
        "labelsTr/liver_12.nii.gz": stored(marked({1: LIVER}), "SRA"),
        "imagesTr/._liver_0.nii.gz": b"\0\5\x16\7apple",
        "imagesTs/liver_132.nii.gz": stored(body(2)),
        "dataset.json": listing([row("liver_0"), row("liver_12")], ["./imagesTs/liver_132.nii.gz"]),
    }
    return write(tmp_path, {f"Task03_Liver/{name}": content for name, content in files.items()})


def test_studies_of_slices(source) -> None:
    examples, skipped = made(MSD, source, argv=["--slices", "30"])
    assert not skipped["train"] and not skipped["test"] and set(examples) == {"train", "test"}
    by_case: dict[str, list[int]] = {}
    for example in examples["train"] + examples["test"]:
        assert example.format == "study" and not example.turns
        (image,) = example.images
        assert (image.axis, image.modality, image.data) == (2, "CT", None)
        assert example.id == f"{example.id.split(':')[0]}:{image.index}"
        by_case.setdefault(example.id.split(":")[0], []).append(image.index or 0)
    # Planes of the body without those with 1 to 19 lesion pixels. BIG covers plane 5 of SPECK.
    assert by_case == {
        "liver_0": [2, 3, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17],
        "liver_12": list(range(2, 18)),
        "liver_132": list(range(2, 18)),
    }
    first = examples["train"][0]
    assert first.images[0].path == "Task03_Liver/imagesTr/liver_0.nii.gz"
    key = read_volume(source / "Task03_Liver/imagesTr/liver_0.nii.gz").content_key
    assert first.meta["input_key"] == key and first.meta["plane"] == "axial"
    assert first.meta["modality"] == "CT" and first.meta["licence"] == "CC-BY-SA-4.0"
    assert first.meta["lesions"] == {"hepatic tumor": 2} and first.meta["split"] == "train"
    assert "qa" not in examples["test"][0].meta
    assert len({e.meta["patient"] for e in examples["train"]}) == 2
    assert "liver_0" not in json.dumps(first.meta)


def test_questions_have_the_answers_of_the_label_map(source) -> None:
    examples, skipped = made(MSD, source, argv=["--slices", "30", "--records", "questions"])
    assert not skipped["train"] and set(examples) == {"train"}
    asked = {e.id: {q["type"]: q for q in e.meta["qa"]} for e in examples["train"]}
    for name, questions in asked.items():
        case, _, index = name.partition(":")
        if not index:
            continue
        liver, tumor = questions["organ_present"], questions["lesion_present"]
        assert liver["answer"] == ("yes" if 4 <= int(index) < 14 else "no") and "liver" in liver["question"]
        wanted = case == "liver_0" and 5 <= int(index) < 8
        assert tumor["answer"] == ("yes" if wanted else "no") and "a hepatic tumor" in tumor["question"]
        assert tumor["label_source"] == "segmentation" and tumor["options"] == ["yes", "no"]
    for example in examples["train"]:
        assert example.format == "conversation" and example.turns[0].text.startswith("<image>\n")
        assert [t.text for t in example.turns if t.supervised] == [q["answer"] for q in example.meta["qa"]]
    counts = {name: q["lesion_count"] for name, q in asked.items() if ":" not in name}
    assert {name: q["answer"] for name, q in counts.items()} == {"liver_0": "2", "liver_12": "0"}
    whole = next(e for e in examples["train"] if e.id == "liver_0")
    assert (whole.images[0].axis, whole.images[0].index) == (2, None)


def test_half_of_the_slices_show_a_lesion_and_the_seed_decides(source) -> None:
    def chosen(*argv, **settings):
        examples, _ = made(MSD, source, argv=argv, **settings)
        return [e for e in examples["train"] if e.id.startswith("liver_0:")]

    four = chosen("--slices", "4")
    tumors = [q["answer"] for e in four for q in e.meta["qa"] if q["type"] == "lesion_present"]
    assert sorted(tumors) == ["no", "no", "yes", "yes"]
    assert [e.id for e in chosen("--slices", "4")] == [e.id for e in four]
    assert any([e.id for e in chosen("--slices", "4", seed=s)] != [e.id for e in four] for s in range(1, 5))
    assert len(chosen("--slices", "1")) == 1
    labelled = chosen("--slices", "30", "--labelled-only")
    assert [e.images[0].index for e in labelled] == [5, 6, 7, 8, 9, 12, 13]


def test_own_validation_split_is_by_case_and_stable(source) -> None:
    task = source / "Task03_Liver"
    rows = [row(f"liver_{n}") for n in range(200)]
    write(task, {"dataset.json": listing(rows)})
    maker = MSD(_options("--validation", "0.25"))
    held = {c.image for c in maker.splits(_source(source))["validation"].items}
    kept = {c.image for c in maker.splits(_source(source))["train"].items}
    assert 30 < len(held) < 70 and not held & kept and len(held | kept) == 200
    write(task, {"dataset.json": listing(rows[:50][::-1])})
    again = {c.image for c in maker.splits(_source(source))["validation"].items}
    assert again == held & {r["image"] for r in rows[:50]}
    for few, count in ((3, 1), (1, 0)):
        write(task, {"dataset.json": listing(rows[:few])})
        split = MSD(_options("--validation", "0.001")).splits(_source(source))["validation"]
        assert len(split.items) == count, "at least one case, but never all"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "states no image file"),
        ([1], "states no image file"),
        ({"image": 7, "label": "x"}, "states no image file"),
        ({"image": "./imagesTr/liver_0.nii.gz", "label": None}, "states no label file"),
        ({"image": "./imagesTr/._liver_0.nii.gz", "label": "x"}, "AppleDouble"),
        ({"image": "../../secret.nii.gz", "label": "./labelsTr/liver_0.nii.gz"}, "leaves the data root"),
        ({"image": "./imagesTr/liver_9.nii.gz", "label": "./labelsTr/liver_0.nii.gz"}, "is missing"),
        ({"image": "./imagesTr/liver_12.nii.gz", "label": "./labelsTr/nope.nii.gz"}, "is missing"),
        ({"image": "./imagesTr/cut.nii.gz", "label": "./labelsTr/liver_0.nii.gz"}, "cut.nii.gz"),
        ({"image": "./imagesTr/small.nii.gz", "label": "./labelsTr/liver_0.nii.gz"}, "label map"),
        ({"image": "./imagesTr/liver_12.nii.gz", "label": "./labelsTr/three.nii.gz"}, "holds label 3"),
        ({"image": "./imagesTr/a\0b.nii.gz", "label": "./labelsTr/liver_0.nii.gz"}, "leaves the data root"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_made(source, bad, reason) -> None:
    files = {
        "imagesTr/cut.nii.gz": stored(body(5))[:3000],
        "imagesTr/small.nii.gz": stored(body(5)[:20]),
        "labelsTr/three.nii.gz": stored(marked({3: LIVER})),
        "dataset.json": listing([bad, row("liver_0")]),
    }
    write(source / "Task03_Liver", files)
    examples, skipped = made(MSD, source, argv=["--slices", "2"])
    assert len(examples["train"]) == 2
    ((name, said),) = [(s.record, s.reason) for s in skipped["train"]]
    assert name == "training row 1" and reason in said, said


def test_doubled_and_leaking_cases_are_set_aside(source) -> None:
    write(
        source / "Task03_Liver",
        {"dataset.json": listing([row("liver_0"), row("liver_0")], ["./imagesTr/liver_0.nii.gz", None])},
    )
    examples, skipped = made(MSD, source, argv=["--slices", "2"])
    assert len(examples["train"]) == 2 and not examples["test"]
    assert [s.record for s in skipped["train"] + skipped["test"]] == [
        "training row 2", "test row 1", "test row 2",
    ]  # fmt: skip


def test_refusals(source, tmp_path) -> None:
    with pytest.raises(UserError, match=r"Task07_Pancreas/dataset.json or dataset.json missing.*unpack"):
        made(MSD, source, "task07_pancreas")
    with pytest.raises(UserError, match="its labels are not those of Task09_Spleen"):
        made(MSD, source / "Task03_Liver", "task09_spleen")
    with pytest.raises(UserError, match="--slices 0: must be"):
        made(MSD, source, argv=["--slices", "0"])
    write(source / "Task03_Liver", {"dataset.json": "[]"})
    with pytest.raises(UserError, match="not an object"):
        made(MSD, source)
    with pytest.raises(UserError, match="no variant 'task01'"):
        MSD(config="task01")


def test_the_task_folder_itself_and_the_official_counts(source) -> None:
    inside, _ = made(MSD, source / "Task03_Liver", argv=["--slices", "1"])
    assert inside["train"][0].images[0].path == "imagesTr/liver_0.nii.gz"
    splits = get("msd")(config="task03_liver").splits(_source(source))
    assert {name: split.expected for name, split in splits.items()} == {"train": 131, "test": 70}


def test_names_are_those_that_experts_use() -> None:
    from vilam3_jax.data.experts.labels import label_table
    from vilam3_jax.datasets.msd import TASKS

    known = set(label_table("VISTA3D").values())
    assert {t.organ for t in TASKS.values()} | {t.lesion for t in TASKS.values() if t.lesion} <= known
    assert {t.lesion for t in TASKS.values() if t.lesion} <= set(
        next(c for c in load_cards("experts") if c.name == "VISTA3D").args
    )


def _options(*argv):
    import argparse

    parser = argparse.ArgumentParser()
    MSD.add_arguments(parser)
    return parser.parse_args(argv)


def _source(folder):
    from vilam3_jax.datasets.source_files import SourceFolder

    return SourceFolder(folder)


def test_the_command_says_that_studies_are_shown_under_a_rule(source, tmp_path, capsys) -> None:
    argv = ["prepare", "msd", "--source", str(source), "--out", str(tmp_path / "out"), "--processes", "1"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    name = "msd/task03_liver:RULE"
    assert f"--dataset={name} --annotations=ANNOTATIONS" in said and f"('{name}', 1.0)" in said
    assert cli.main([*argv[:-3], f"{tmp_path}/asked", *argv[-2:], "--records", "questions"]) == 0
    assert "--dataset=msd/task03_liver\n" in capsys.readouterr().out
