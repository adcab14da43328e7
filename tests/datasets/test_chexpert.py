"""CheXpert from synthetic copies of its release, of CheXlocalize and of the test labels."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import twins

from vilam3_jax.data.examples import Turn
from vilam3_jax.datasets.chest_findings import (
    _NORMAL_WORDINGS,
    _WORDINGS,
    PHRASES,
    FilmOptions,
    answer_weights,
    chosen_findings,
    question,
)
from vilam3_jax.datasets.chexpert import FINDINGS, CheXpert
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

LABELS = [
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
]
HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS]
RELEASE = "CheXpert-v1.0-small"


def row(path, labels, sex="Female", age="68", view="Frontal", projection="AP", release=RELEASE):
    """A row of train.csv; `labels` by name, all others blank."""
    return [f"{release}/{path}", sex, age, view, projection, *(labels.get(name, "") for name in LABELS)]


def dense(positives):
    return {name: "1.0" if name in positives else "0.0" for name in LABELS}


@pytest.fixture
def release(tmp_path):
    """The release: three training films of two patients, one lateral, and a validation film."""
    train = [
        HEADER,
        row("train/patient00001/study1/view1_frontal.jpg", {"No Finding": "1.0", "Support Devices": "1.0"}),
        row(
            "train/patient00002/study1/view1_frontal.jpg",
            {"Edema": "1.0", "Pneumonia": "-1.0", "Fracture": "0.0"},
            sex="Unknown",
            age="0",
            projection="PA",
        ),
        row("train/patient00002/study1/view2_lateral.jpg", {"Edema": "1.0"}, view="Lateral", projection=""),
    ]
    valid = [HEADER, row("valid/patient64541/study1/view1_frontal.jpg", dense({"Edema"}), sex="Male")]
    pictures = {
        f"{RELEASE}/{line[0].split('/', 1)[1]}": twins.picture(number)
        for number, line in enumerate([*train[1:], valid[1]])
    }
    return twins.write(tmp_path, {f"{RELEASE}/train.csv": train, f"{RELEASE}/valid.csv": valid, **pictures})


@pytest.fixture
def test_set(tmp_path):
    """Three test studies; the second begins with a lateral film."""
    rows: list[list] = [["Study", *LABELS]]
    for number, positives in ((64741, {"Edema", "Lung Opacity"}), (64742, set()), (64743, {"No Finding"})):
        marks = [int(name in positives) for name in LABELS]
        rows.append([f"CheXpert-v1.0/test/patient{number}/study1", *marks])
    files: dict[str, Any] = {"groundtruth.csv": rows}
    for number, view in ((64741, "view1"), (64742, "view2"), (64743, "view1")):
        path = f"CheXpert/test/patient{number}/study1/{view}_frontal.jpg"
        files[path] = twins.picture(number)
    files["CheXpert/test/patient64742/study1/view1_lateral.jpg"] = twins.picture(9)
    return twins.write(tmp_path, files)


def answers(example):
    return {q["type"]: q["answer"] for q in example.meta["qa"]}


def test_training_films(release):
    examples, skipped = twins.made(CheXpert, release)
    assert skipped == {"train": [], "validation": []}
    normal, ill = examples["train"]
    assert normal.id == "train/patient00001/study1/view1_frontal"
    assert normal.images[0].data == twins.picture(0)
    assert answers(ill)["edema"] == "yes" and set(answers(ill)) <= {"edema", "fracture", "no_finding"}
    assert ill.meta["view"] == "PA" and "sex" not in ill.meta and "age_band" not in ill.meta
    assert normal.meta["sex"] == "F" and normal.meta["age_band"] == "60-79"
    assert normal.meta["label_source"] == "labeler" and ill.meta["findings"] == ["edema"]
    assert [(r.expert, r.policy, r.before_turn) for r in ill.expert_requests] == [("CXR", "optional", 1)]
    assert "patient00001" not in normal.meta["patient"]
    assert normal.meta["patient"] != ill.meta["patient"]
    for turn, asked in zip(ill.turns[1::2], ill.meta["qa"], strict=True):
        assert turn == Turn("assistant", asked["answer"].capitalize(), True)


def test_golden_validation_film(release):
    examples, _ = twins.made(CheXpert, release)
    (film,) = examples["validation"]
    assert [q["type"] for q in film.meta["qa"]] == list(FINDINGS)
    assert film.turns[:2] == (
        Turn("user", "<image>\nDoes this chest X-ray look normal? Answer yes or no."),
        Turn("assistant", "No", True),
    )
    edema = film.meta["qa"][FINDINGS.index("edema")]
    assert edema == {
        "question": "Does this chest X-ray show pulmonary edema? Answer yes or no.",
        "answer": "yes",
        "type": "edema",
        "label_source": "radiologist",
        "options": ["yes", "no"],
        "expert": "CXR",
        "args": "",
        "oracle": False,
        "image": 0,
    }
    assert film.meta["qa"][-1]["expert"] is None, "the expert does not predict support devices"


def test_lateral_films_are_taken_on_demand(release):
    examples, _ = twins.made(CheXpert, release, argv=["--views", "all"])
    lateral = examples["train"][2]
    assert lateral.id.endswith("view2_lateral") and lateral.meta["view"] == "lateral"
    assert lateral.expert_requests == (), "the film expert reads frontal films"
    assert {q["expert"] for q in lateral.meta["qa"]} == {None}


@pytest.mark.parametrize(
    ("argv", "pneumonia", "cardiomegaly"),
    [
        ([], None, None),
        (["--uncertain", "ones"], "yes", None),
        (["--uncertain", "zeros"], "no", None),
        (["--blank", "zeros"], None, "no"),
    ],
)
def test_uncertain_and_blank_labels(release, argv, pneumonia, cardiomegaly):
    argv = [*argv, "--questions", "14"]
    dataset = CheXpert(options(*argv))
    split = dataset.splits(SourceFolder(release))["train"]
    said = {True: "yes", False: "no", None: None}
    states = split.make.keywords["states_of"](split.items[1].labels)
    assert (said[states["pneumonia"]], said[states["cardiomegaly"]]) == (pneumonia, cardiomegaly)


def options(*argv):
    parser = argparse.ArgumentParser()
    CheXpert.add_arguments(parser)
    return parser.parse_args(argv)


def test_pairs(release):
    examples, _ = twins.made(CheXpert, release, config="pairs")
    assert [example.format for example in examples["train"]] == ["pair", "pair"]
    fixed, _ = twins.made(CheXpert, release, config="pairs", argv=["--wording", "canonical"])
    texts = [example.turns[1].text for example in fixed["train"]]
    assert texts[1] == (
        "Chest X-ray showing pulmonary edema: fluid in the interstitium and airspaces of the lungs."
    )


def test_the_path_prefix_does_not_matter(release):
    (release / RELEASE).rename(release / "CheXpert-v1.0")
    examples, skipped = twins.made(CheXpert, release)
    assert len(examples["train"]) == 2 and not skipped["train"]
    examples, _ = twins.made(CheXpert, release / "CheXpert-v1.0")
    assert len(examples["train"]) == 2


def test_test_studies(test_set):
    examples, skipped = twins.made(CheXpert, test_set, config="test")
    assert skipped == {"test": []}
    first, second, third = examples["test"]
    assert [k for k, v in answers(first).items() if v == "yes"] == ["lung_opacity", "edema"]
    assert second.images[0].data == twins.picture(64742), "the frontal film of the study"
    assert answers(third)["no_finding"] == "yes"
    assert first.id == "test/patient64741/study1"


def test_test_questions_of_the_reference(test_set):
    examples, _ = twins.made(CheXpert, test_set, config="test", parity=True)
    asked = examples["test"][0].meta["qa"]
    assert [q["type"] for q in asked] == [
        "atelectasis",
        "cardiomegaly",
        "consolidation",
        "edema",
        "pleural_effusion",
    ]
    assert asked[-1]["question"] == (
        "The following is a question about findings in chest X-ray in the frontal view. Please reply with "
        "yes or no.\nQuestion: is there pleural effusion according to the provided X-ray image?\n"
    )


def test_swapped_columns_and_another_name(test_set):
    """Some label files have Lung Lesion before Lung Opacity; others use Airspace Opacity."""
    names = list(LABELS)
    lesion, opacity = names.index("Lung Lesion"), names.index("Lung Opacity")
    names[lesion], names[opacity] = "Airspace Opacity", "Lung Lesion"
    marks = [int(name == "Airspace Opacity") for name in names]
    table = [["Study", *names], ["CheXpert-v1.0/test/patient64741/study1", *marks]]
    twins.write(test_set, {"groundtruth.csv": table})
    examples, _ = twins.made(CheXpert, test_set, config="test")
    assert [k for k, v in answers(examples["test"][0]).items() if v == "yes"] == ["lung_opacity"]


def test_labels_of_chexlocalize_by_film(test_set):
    (test_set / "groundtruth.csv").unlink()
    marks = [int(name == "Edema") for name in LABELS]
    rows = [["Path", *LABELS]]
    rows += [[f"test/patient64742/study1/{view}.jpg", *marks] for view in ("view1_lateral", "view2_frontal")]
    twins.write(test_set, {"CheXpert/test_labels.csv": rows})
    examples, _ = twins.made(CheXpert, test_set, config="test")
    (study,) = examples["test"]
    assert study.images[0].data == twins.picture(64742) and answers(study)["edema"] == "yes"


def test_rows_that_cannot_be_used(release):
    frontal = "patient00009/study1/view1_frontal.jpg"
    rows = [
        HEADER,
        row(f"train/{frontal}", {"Edema": "1.0"}),  # no such image
        row("train/patient00001/study1/view1_frontal.jpg", {"Edema": "maybe"}),
        row("train/patient00001/study1/view1_frontal.jpg", {"Edema": "1.0", "No Finding": "1.0"}),
        row("train/patient00002/study1/view2_lateral.jpg", {}),
        row("elsewhere.jpg", {"Edema": "1.0"}),
        ["", "\0"],
        row("train/patient00001/study1/../../../../../../secret.jpg", {"Edema": "1.0"}),
        row("train/patient00002/study1/view1_frontal.jpg", {"Edema": " 1 "}),
        row("train/patient00002/study1/view1_frontal.jpg", {"Edema": "0"}),
        row("train/patient00003/study1/../../patient00002/study1/view1_frontal.jpg", {"Edema": "0"}),
    ]
    twins.write(release, {f"{RELEASE}/train.csv": rows})
    examples, skipped = twins.made(CheXpert, release)
    assert len(examples["train"]) == 1
    reasons = [(one.record.split()[-1], one.reason) for one in skipped["train"]]
    assert [number for number, _ in reasons] == ["2", "3", "4", "5", "6", "7", "8", "10", "11"]
    assert reasons[0][1].endswith("is missing")
    assert reasons[1][1] == "the label edema is none of 1, 0, -1 and blank"
    assert reasons[2][1] == "labelled with no finding and with a finding"
    assert reasons[3][1] == "no finding is labelled present or absent"
    assert reasons[4][1] == "its path names no patient and study"
    assert "leaves the data root" in reasons[6][1]
    assert reasons[7][1] == "is listed twice"


def test_missing_files_are_all_named(tmp_path):
    with pytest.raises(UserError, match=r"train\.csv.*valid\.csv.*missing.*aimi\.stanford"):
        CheXpert().splits(SourceFolder(tmp_path, CheXpert.instructions))
    with pytest.raises(UserError, match=r"groundtruth\.csv.*missing"):
        CheXpert(config="test").splits(SourceFolder(tmp_path))


def test_missing_columns_are_all_named(release):
    twins.write(release, {f"{RELEASE}/train.csv": [["Path", "Sex"]]})
    with pytest.raises(UserError, match=r"no column no finding.*pleural effusion.*it has Path, Sex"):
        CheXpert().splits(SourceFolder(release))


def test_splits_are_picklable_and_the_choices_do_not_depend_on_order(release):
    split = CheXpert().splits(SourceFolder(release))["train"]
    pickle.loads(pickle.dumps(split))  # noqa: S301 (pickled by this test)
    there, _ = twins.made(CheXpert, release)
    table = (release / RELEASE / "train.csv").read_text().splitlines()
    (release / RELEASE / "train.csv").write_text("\n".join([table[0], *reversed(table[1:])]))
    back, _ = twins.made(CheXpert, release)
    assert {e.id: e.turns for e in there["train"]} == {e.id: e.turns for e in back["train"]}


def test_questions_hold_no_negation():
    texts = [*_NORMAL_WORDINGS, *(w.format(phrase=p) for w in _WORDINGS for p in PHRASES.values())]
    for text in texts:
        words = text.lower().replace("?", "").split()
        assert not {"no", "not", "without", "free", "abnormal"} & set(words), text
    assert set(FINDINGS) - {"no_finding"} <= set(PHRASES)
    assert question("edema").endswith("Answer yes or no.")


def test_answers_are_balanced_by_finding():
    films = [(("edema", True), ("fracture", False))] * 900 + [(("edema", False), ("fracture", True))] * 100
    weights = answer_weights(films, dict)
    assert weights == {
        ("edema", True): 100 / 900,
        ("fracture", False): 100 / 900,
        ("edema", False): 1.0,
        ("fracture", True): 1.0,
    }
    ask = FilmOptions(limit=2, weights=weights)
    rare = (("fracture", True), ("edema", False))
    assert sorted(chosen_findings(rare, random.Random(0), ask)) == sorted(rare)
    common = (("edema", True), ("fracture", False))
    numbers = [len(chosen_findings(common, random.Random(seed), ask)) for seed in range(200)]
    assert min(numbers) == 1, "every film has a question"


def _real_table() -> Path | None:
    found = importlib.util.find_spec("torchxrayvision")
    path = Path(found.origin).parent / "data" / "chexpert_train.csv.gz" if found and found.origin else None
    return path if path and path.exists() else None


@pytest.mark.slow
@pytest.mark.skipif(_real_table() is None, reason="torchxrayvision, which has the table, is not installed")
def test_the_real_table(tmp_path):
    """Counts of the official training table, as torchxrayvision ships it."""
    path = _real_table()
    assert path is not None
    with gzip.open(path, "rb") as file:
        twins.write(tmp_path, {"train.csv": file.read(), "valid.csv": [HEADER]})
    for folder in ("train", "valid"):
        (tmp_path / folder).mkdir()
    split = CheXpert(options("--views", "all")).splits(SourceFolder(tmp_path))["train"]
    assert len(split.items) == split.expected == 223_414
    assert len({film.path.partition("/")[0] for film in split.items}) == 64_540
    assert not any("?" in film.labels for film in split.items)
    assert sum(not film.lateral for film in split.items) == 191_027
