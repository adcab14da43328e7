"""ChestX-ray14 from synthetic copies of the NIH's release and of Google's labels."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
from pathlib import Path

import pytest
import twins

from vilam3_jax.data.examples import Turn
from vilam3_jax.datasets.chest_xray14 import FINDINGS, ChestXray14
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

# Defect of the release: [Width,Height] are two columns.
HEADER = [
    "Image Index",
    "Finding Labels",
    "Follow-up #",
    "Patient ID",
    "Patient Age",
    "Patient Gender",
    "View Position",
    "OriginalImage[Width",
    "Height]",
    "OriginalImagePixelSpacing[x",
    "y]",
]
FOUR = ["Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass", "Set Id"]


def row(image, labels, age="57", sex="M", view="PA"):
    patient = str(int(image[:8])) if image[:8].isdecimal() else "0"
    return [image, labels, "0", patient, age, sex, view, "2682", "2749", "0.143", "0.143"]


ROWS = [
    row("00000001_000.png", "Cardiomegaly|Effusion"),
    row("00000001_001.png", "No Finding", age="058Y", sex="F", view="AP"),
    row("00000002_000.png", "Pleural_Thickening", age="414"),
    row("00000003_000.png", "Hernia|Infiltration"),
]


def release(folder, rows=ROWS, train=("00000001_000.png", "00000001_001.png", "00000002_000.png"), test=None):
    test = ("00000003_000.png",) if test is None else test
    files = {
        "Data_Entry_2017_v2020.csv": [HEADER, *rows],
        "train_val_list.txt": "\n".join(train),
        "test_list.txt": "\r\n".join(test) + "\r\n",
    }
    images = {f"images/{line[0]}": twins.picture(number, kind="PNG") for number, line in enumerate(ROWS)}
    return twins.write(folder, {**files, **images})


def four_findings(folder):
    release(folder)
    rows = {
        "test": [[*ROWS[0], "NO", "YES", "yes", "NO", "test"]],
        "validation": [[*ROWS[2], "YES", "NO", "NO", "YES", "val"]],
    }
    tables = {
        f"four_findings_expert_labels/{name}_labels.csv": [[*HEADER, *FOUR], *lines]
        for name, lines in rows.items()
    }
    return twins.write(folder, tables)


def positives(example):
    return [q["type"] for q in example.meta["qa"] if q["answer"] == "yes"]


def test_golden_test_film(tmp_path):
    examples, skipped = twins.made(ChestXray14, release(tmp_path))
    assert skipped == {"train": [], "test": []}
    (film,) = examples["test"]
    assert film.id == "00000003_000" and film.images[0].data == twins.picture(3, kind="PNG")
    assert [q["type"] for q in film.meta["qa"]] == list(FINDINGS)
    assert positives(film) == ["hernia", "infiltration"] == film.meta["findings"]
    assert film.turns[2:4] == (
        Turn("user", "Does this chest X-ray show atelectasis? Answer yes or no."),
        Turn("assistant", "No", True),
    )
    assert film.meta["label_source"] == "labeler" and film.meta["modality"] == "CXR"
    assert film.expert_requests[0].policy == "optional"


def test_training_films(tmp_path):
    examples, _ = twins.made(ChestXray14, release(tmp_path), argv=["--questions", "15"])
    ill, normal, thick = examples["train"]
    assert ill.meta["findings"] == ["cardiomegaly", "pleural_effusion"]
    assert normal.meta["findings"] == ["no_finding"]
    assert (normal.meta["age_band"], normal.meta["sex"], normal.meta["view"]) == ("40-59", "F", "AP")
    assert "age_band" not in thick.meta, "414 years are a misprint of the first release"
    assert ill.meta["patient"] == normal.meta["patient"] != thick.meta["patient"]
    assert not {e.meta["patient"] for e in examples["train"]} & {e.meta["patient"] for e in examples["test"]}


def test_first_spelling_of_the_table(tmp_path):
    """The first release has an empty last column."""
    release(tmp_path)
    (tmp_path / "Data_Entry_2017_v2020.csv").unlink()
    twins.write(tmp_path, {"Data_Entry_2017.csv": [[*HEADER, ""], *([*line, ""] for line in ROWS)]})
    examples, _ = twins.made(ChestXray14, tmp_path)
    assert len(examples["train"]) == 3


def test_images_in_folders_as_kaggle_has_them(tmp_path):
    release(tmp_path)
    for number, line in enumerate(ROWS):
        folder = tmp_path / f"images_{number % 2 + 1:03d}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / line[0]).rename(folder / line[0])
    (tmp_path / "images").rmdir()
    (tmp_path / "images_001.tar.gz").write_bytes(b"packed")
    examples, skipped = twins.made(ChestXray14, tmp_path)
    assert len(examples["train"]) == 3 and not skipped["train"]
    assert examples["test"][0].images[0].data == twins.picture(3, kind="PNG")


def test_four_findings(tmp_path):
    examples, skipped = twins.made(ChestXray14, four_findings(tmp_path), config="four_findings")
    assert skipped == {"validation": [], "test": []}
    (test,) = examples["test"]
    assert positives(test) == ["pneumothorax", "airspace_opacity"]
    assert len(test.meta["qa"]) == 4 and test.meta["label_source"] == "radiologist"
    assert positives(examples["validation"][0]) == ["fracture", "nodule_or_mass"]


def test_three_findings_in_the_words_of_the_reference(tmp_path):
    examples, _ = twins.made(ChestXray14, four_findings(tmp_path), config="four_findings", parity=True)
    asked = examples["test"][0].meta["qa"]
    assert [q["type"] for q in asked] == ["fracture", "pneumothorax", "airspace_opacity"]
    assert asked[2]["question"].endswith(
        "\nQuestion: is there lung opacity according to the provided X-ray image?\n"
    )


def test_four_findings_that_cannot_be_used(tmp_path):
    four_findings(tmp_path)
    lines = [
        [*ROWS[0], "NO", "YES", "maybe", "NO", "test"],
        [*ROWS[0], "NO", "YES", "NO", "NO", "val"],
        [*ROWS[1], "NO", "YES", "NO", "NO", ""],
        [*ROWS[1], "NO", "YES", "NO", "NO", "test"],
        ["../x.png"],
    ]
    name = "four_findings_expert_labels/test_labels.csv"
    twins.write(tmp_path, {name: [[*HEADER, *FOUR], *lines]})
    examples, skipped = twins.made(ChestXray14, tmp_path, config="four_findings")
    assert len(examples["test"]) == 1
    assert [one.reason for one in skipped["test"]] == [
        "the label airspace opacity is neither YES nor NO",
        "is listed twice",
        "is listed twice",
        "its image index is not a file name of the release, such as 00000001_000.png",
    ]
    assert skipped["test"][0].record == f"{name} row 2"


def test_pairs(tmp_path):
    folder = release(tmp_path)
    examples, _ = twins.made(ChestXray14, folder, config="pairs", argv=["--wording", "canonical"])
    assert [example.turns[1].text for example in examples["train"]] == [
        "Chest X-ray with cardiomegaly and a pleural effusion.",
        "Normal chest X-ray.",
        "Chest X-ray showing pleural thickening: a band of soft tissue along the inner chest wall.",
    ]
    varied, _ = twins.made(ChestXray14, folder, config="pairs")
    again, _ = twins.made(ChestXray14, folder, config="pairs")
    assert varied == again and [e.format for e in varied["test"]] == ["pair"]


def test_lists_that_do_not_fit(tmp_path):
    train = ["00000001_000", "00000001_000", "00000003_000", "00000009_000", "00000003_001"]
    release(
        tmp_path,
        rows=[*ROWS, row("00000004_000.png", "Mass"), row("00000003_000.png", "No Finding")],
        train=[f"{name}.png" for name in train],
        test=("00000003_000.png", "00000002_000.png"),
    )
    examples, skipped = twins.made(ChestXray14, tmp_path)
    assert [example.id for example in examples["train"]] == ["00000001_000"]
    assert [example.id for example in examples["test"]] == ["00000002_000"]
    found = {one.record: one.reason for one in skipped["train"]}
    assert found == {
        "train_val_list.txt row 2": "is listed twice",
        "Data_Entry_2017_v2020.csv row 7": "is in test_list.txt too",
        "train_val_list.txt row 4": "has no row in Data_Entry_2017_v2020.csv",
        "train_val_list.txt row 5": "its patient is in test_list.txt",
        "Data_Entry_2017_v2020.csv row 3": "is in neither list",
        "Data_Entry_2017_v2020.csv row 6": "is in neither list",
    }
    assert skipped["test"][0].reason == "is in Data_Entry_2017_v2020.csv twice"


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ("", "has no finding labels"),
        ("Cardiomegaly|\u0000", "has a finding label that is none of the 15"),
        ("Cardiomegaly|No Finding", "labelled with no finding and with a finding"),
        ("[1, 2]", "has a finding label that is none of the 15"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, labels, reason):
    _, skipped = twins.made(ChestXray14, release(tmp_path, [row("00000001_000.png", labels), *ROWS[1:]]))
    assert [one.reason for one in skipped["train"]] == [reason]


def test_other_spellings_of_labels(tmp_path):
    rows = [row("00000001_000.png", " infiltrate | Pleural Thickening"), *ROWS[1:]]
    examples, _ = twins.made(ChestXray14, release(tmp_path, rows))
    assert examples["train"][0].meta["findings"] == ["infiltration", "pleural_thickening"]


def test_a_missing_image_is_a_skip(tmp_path):
    release(tmp_path)
    (tmp_path / "images" / "00000002_000.png").unlink()
    examples, skipped = twins.made(ChestXray14, tmp_path)
    assert len(examples["train"]) == 2
    assert [one.reason for one in skipped["train"]] == ["image images/00000002_000.png is missing"]


def test_missing_files_are_all_named(tmp_path):
    with pytest.raises(UserError, match=r"images or images_001, Data_Entry.*train_val.*test_list.*missing"):
        ChestXray14().splits(SourceFolder(tmp_path))
    with pytest.raises(UserError, match=r"four_findings_expert_labels/validation_labels\.csv.*missing"):
        ChestXray14(config="four_findings").splits(SourceFolder(tmp_path))


def _table(name: str) -> Path | None:
    found = importlib.util.find_spec("torchxrayvision")
    path = Path(found.origin).parent / "data" / name if found and found.origin else None
    return path if path and path.exists() else None


@pytest.mark.slow
@pytest.mark.skipif(
    _table("Data_Entry_2017_v2020.csv.gz") is None,
    reason="torchxrayvision, which has the tables, is not installed",
)
def test_the_real_tables(tmp_path):
    """Counts of the official tables, as torchxrayvision ships them."""
    entry, four = _table("Data_Entry_2017_v2020.csv.gz"), _table("google2019_nih-chest-xray-labels.csv.gz")
    assert entry is not None and four is not None
    table = gzip.decompress(entry.read_bytes()).decode()
    images = [line.partition(",")[0] for line in table.splitlines()[1:]]
    labels = gzip.decompress(four.read_bytes()).decode().splitlines()
    folder = "four_findings_expert_labels"
    files = {"Data_Entry_2017_v2020.csv": table, "images/x": b"x"}
    files |= {"train_val_list.txt": "\n".join(images), "test_list.txt": ""}
    for name, word in (("test", ",test"), ("validation", ",val")):
        chosen = [line for line in labels[1:] if line.rstrip().lower().endswith(word)]
        files[f"{folder}/{name}_labels.csv"] = "\n".join([labels[0], *chosen])
    twins.write(tmp_path, files)
    split = ChestXray14(_options()).splits(SourceFolder(tmp_path))["train"]
    assert len(split.items) == 112_120 and not any(film.problem for film in split.items)
    assert len({film.image[:8] for film in split.items}) == 30_805
    assert sum(film.labels == "No Finding" for film in split.items) == 60_361
    assert sum("Hernia" in film.labels for film in split.items) == 227
    found = ChestXray14(_options(), "four_findings").splits(SourceFolder(tmp_path))
    for name, counts in {"test": (72, 195, 1_135, 295), "validation": (114, 43, 1_031, 310)}.items():
        assert len(found[name].items) == found[name].expected
        cells = zip(*(film.labels for film in found[name].items), strict=True)
        assert tuple(column.count("YES") for column in cells) == counts


def _options():
    parser = argparse.ArgumentParser()
    ChestXray14.add_arguments(parser)
    return parser.parse_args([])
