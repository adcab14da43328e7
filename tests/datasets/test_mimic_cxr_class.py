"""MIMIC-CXR classification from a synthetic copy of the release."""

import hashlib

import pytest

from tests.datasets.mimic_twin import FILMS, LABELS, STUDIES, path_of, release, tables
from tests.datasets.twins import made, write
from vilam3_jax.datasets.dataset import SkipItem
from vilam3_jax.datasets.mimic_cxr import view_named
from vilam3_jax.datasets.mimic_cxr_class import FINDINGS, MimicCxrClass
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

CHEXPERT = "mimic-cxr-2.0.0-chexpert.csv.gz"
SPLIT = "mimic-cxr-2.0.0-split.csv.gz"


def by_id(examples):
    return {example.id: example for split in examples.values() for example in split}


def answers(example):
    return {qa["type"]: qa["answer"] for qa in example.meta["qa"]}


def test_frontal_films_are_asked_about_what_is_known(tmp_path):
    examples, skipped = made(MimicCxrClass, release(tmp_path))
    assert {name: [e.id for e in es] for name, es in examples.items()} == {
        "train": ["a1", "a3", "b1"],
        "validation": ["c1"],
        "test": ["d1"],
    }
    assert not any(skipped.values())
    found = by_id(examples)
    # Uncertain and blank labels do not count as "no".
    known = {"edema": "yes", "pneumothorax": "no", "no_finding": "no"}
    assert answers(found["a1"]) and answers(found["a1"]).items() <= known.items()
    labelled = made(MimicCxrClass, tmp_path, argv=["--test-labels", "labeler"])[0]["test"]
    assert [answers(e) for e in labelled] == [{"edema": "yes", "no_finding": "no"}, {"edema": "no"}]
    everything = {name: "no" for name in FINDINGS if name != "support_devices"} | {"no_finding": "yes"}
    assert answers(found["c1"]) == everything
    # Test labels by radiologists, with "Airspace Opacity" for "Lung Opacity".
    assert answers(found["d1"])["fracture"] == "yes" and answers(found["d1"])["lung_opacity"] == "no"
    assert found["d1"].meta["label_source"] == "radiologist"
    assert {q["label_source"] for q in found["a1"].meta["qa"]} == {"labeler"}
    # A blank ViewPosition falls back to the view code.
    assert found["a3"].meta["view"] == "AP"
    # Answers are supervised, and the image is that of the film.
    turns = found["a1"].turns
    assert [t.supervised for t in turns] == [t.role == "assistant" for t in turns]
    assert found["a1"].images[0].data == (tmp_path / path_of(*FILMS[0][:3])).read_bytes()
    assert [r.policy for r in found["a1"].expert_requests] == ["optional"]
    assert "90000001" not in str(found["a1"].meta)


def test_all_views_and_the_labeler_for_the_test(tmp_path):
    argv = ["--views", "all", "--test-labels", "labeler"]
    examples, _ = made(MimicCxrClass, release(tmp_path), argv=argv)
    found = by_id(examples)
    assert set(found) == {"a1", "a2", "a3", "b1", "c1", "d1", "d2"}
    assert found["a2"].expert_requests == () and found["a2"].meta["view"] == "LATERAL"
    assert found["a1"].meta["study"] == found["a2"].meta["study"] != found["a3"].meta["study"]
    assert answers(found["d2"]) == {"edema": "no"}


def test_training_asks_for_each_finding_where_it_is_there_as_often_as_where_it_is_not(tmp_path):
    films = [("90000001", f"800000{n}", f"x{n}", "train", "AP", "") for n in range(10, 50)]
    studies = []
    for n, (patient, study, *_) in enumerate(films):
        labels = {"Edema": "1.0" if n < 8 else "0.0", "Fracture": "1.0" if n % 2 else "0.0"}
        studies.append((patient, study, labels))
    pictures = {path_of(*f[:3]): b"JPEG" for f in films}
    changes = {CHEXPERT: tables(studies=studies)[CHEXPERT], **pictures}
    examples, _ = made(MimicCxrClass, release(tmp_path, films, changes))
    asked = [answers(example).get("edema") for example in examples["train"]]
    assert asked.count("yes") == 8 and 3 <= asked.count("no") <= 16
    again, _ = made(MimicCxrClass, tmp_path)
    assert examples == again


def test_the_other_labeler(tmp_path):
    negbio = {"mimic-cxr-2.0.0-negbio.csv.gz": tables(studies=STUDIES[3:])[CHEXPERT], CHEXPERT: None}
    examples, skipped = made(MimicCxrClass, release(tmp_path, changes=negbio), argv=["--labels", "negbio"])
    assert [e.id for e in examples["validation"]] == ["c1"] and len(skipped["train"]) == 3


def test_letters_are_the_order_of_the_names_not_of_the_columns(tmp_path):
    examples, skipped = made(MimicCxrClass, release(tmp_path), "multiple_choice")
    found = by_id(examples)
    assert found["b1"].turns[1].text == "(H), (I)"
    assert found["c1"].turns[1].text == "(N)" and found["a3"].turns[1].text == "(M)"
    assert "(H) Lung opacity\n(I) Pleural effusion\n(J) Pleural other" in found["b1"].turns[0].text
    assert [s.reason for s in skipped["train"]] == [
        "a label of its study is uncertain, so the list of findings is unknown"
    ]


def test_pairs_have_a_sentence_of_the_labels(tmp_path):
    examples, skipped = made(MimicCxrClass, release(tmp_path), "pairs", ["--wording", "canonical"])
    found = by_id(examples)
    assert set(found) == {"a1", "a3", "b1", "c1", "d1"} and not any(skipped.values())
    assert {e.format for e in found.values()} == {"pair"}
    assert "edema" in found["a1"].turns[1].text and found["a1"].turns[0].text == "<image>"
    assert by_id(made(MimicCxrClass, tmp_path, "pairs", parity=True)[0]).keys() == found.keys()


def test_parity_puts_the_reference_back(tmp_path):
    folder = release(tmp_path)
    examples, _ = made(MimicCxrClass, folder, argv=["--test-labels", "labeler"], parity=True)
    film = [e for e in examples["test"] if e.id.startswith("d2/")]
    assert [e.id for e in film] == [f"d2/{name}" for name in FINDINGS]
    assert {e.turns[1].text for e in film} == {"No"}
    assert film[0].turns[0].text == (
        "<image>\nThe following is a question about findings in chest X-ray in the frontal view. "
        "Please reply with yes or no.\n"
        "Question: is there atelectasis according to the provided X-ray image?\n"
    )
    examples, _ = made(MimicCxrClass, folder, "multiple_choice", ["--test-labels", "labeler"], parity=True)
    assert {e.id: e.turns[1].text for e in examples["test"]} == {
        "d1/letters": "(D)",
        "d1/names": "(D) Edema",
        "d2/letters": "(N)",
        "d2/names": "(N) None of the above",
    }


def test_parity_keeps_rare_findings_and_samples_frequent_ones(tmp_path):
    rare = [("90000001", "80000001", f"x{n}", "train", "LATERAL", "") for n in range(400)]
    frequent = [("90000001", "80000002", f"y{n}", "train", "LATERAL", "") for n in range(400)]
    studies = [
        ("90000001", "80000001", {"Pleural Other": "1.0", "Support Devices": "1.0"}),
        ("90000001", "80000002", {"Support Devices": "1.0"}),
    ]
    source = SourceFolder(release(tmp_path, rare + frequent, {CHEXPERT: tables(studies=studies)[CHEXPERT]}))
    split = MimicCxrClass().splits(source)["train"]
    context = MimicCxrClass().context(source, "train", parity=True)
    kept = [item.film.dicom[0] for item in split.items if _is_kept(split, item, context)]
    assert kept.count("x") == 400 and 10 < kept.count("y") < 60  # of 5000 / 71447
    assert not made(MimicCxrClass, tmp_path)[0]["train"]  # no film is frontal


def _is_kept(split, item, context):
    try:
        return bool(list(split.make(item, context)))
    except SkipItem as reason:
        return str(reason) == "its image is missing"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "its study has only blank labels"),
        ({"Edema": "2.0"}, "a label of its study is none of 1.0, 0.0, -1.0 and blank"),
        ({"Edema": "null"}, "a label of its study is none of 1.0, 0.0, -1.0 and blank"),
        ({"Edema": "1.0", "No Finding": "1.0"}, "its study is labelled both with a finding and with none"),
        (None, "its study has no labels"),
    ],
)
def test_a_study_whose_labels_say_nothing(tmp_path, values, reason):
    studies = STUDIES[1:] if values is None else [("90000001", "80000001", values), *STUDIES[1:]]
    folder = release(tmp_path, changes={CHEXPERT: tables(studies=studies)[CHEXPERT]})
    examples, skipped = made(MimicCxrClass, folder)
    assert [(s.record, s.reason) for s in skipped["train"]] == [(f"{SPLIT} row 1", reason)]
    assert [e.id for e in examples["train"]] == ["a3", "b1"]


def test_two_rows_of_a_study_that_differ(tmp_path):
    studies = [*STUDIES, ("90000001", "80000001", {"Edema": "0.0"})]
    folder = release(tmp_path, changes={CHEXPERT: tables(studies=studies)[CHEXPERT]})
    _, skipped = made(MimicCxrClass, folder)
    assert "rows of labels with different values" in skipped["train"][0].reason


@pytest.mark.parametrize(
    ("film", "reason"),
    [
        (("x", "80000001", "n1", "train", "PA", ""), "its subject_id is not a number"),
        (("90000001", "", "n1", "train", "PA", ""), "its study_id is not a number"),
        (("90000001", "80000001", "../a", "train", "PA", ""), "its dicom_id is not a file name"),
        (("90000001", "80000001", "a1", "train", "PA", ""), "its dicom_id is a duplicate"),
        (
            ("90000001", "80000001", "n1", "holdout", "PA", ""),
            "its split is unknown",
        ),
        (("91000004", "80000005", "n1", "train", "PA", ""), "its patient is in the test split too"),
        (("90000001", "80000001", "n1", "train", "PA", ""), "its image is missing"),
    ],
)
def test_a_row_that_cannot_be_used(tmp_path, film, reason):
    examples, skipped = made(MimicCxrClass, release(tmp_path, [*FILMS, film]))
    assert [(s.record, s.reason) for s in skipped["train"]] == [(f"{SPLIT} row 8", reason)]
    assert len(examples["train"]) == 3


def test_no_reason_names_a_patient(tmp_path):
    folder = release(tmp_path)
    first, second = (folder / path_of(*FILMS[place][:3]) for place in (0, 2))
    first.unlink()
    first.mkdir()
    second.write_bytes(b"")
    _, skipped = made(MimicCxrClass, folder)
    assert [s.reason for s in skipped["train"]] == [
        "its image cannot be read",
        "its image has 0 bytes; up to 67108864 are read",
    ]


def test_every_missing_file_and_column_is_named(tmp_path):
    gone = {SPLIT: None, CHEXPERT: None}
    with pytest.raises(UserError, match=r"split.*chexpert.*missing.*physionet"):
        made(MimicCxrClass, release(tmp_path / "a", changes=gone))
    short = [["study_id", *LABELS[2:]], ["80000001", *["0.0"] * 12]]
    with pytest.raises(UserError, match=r"no column atelectasis.*, cardiomegaly"):
        made(MimicCxrClass, release(tmp_path / "b", changes={CHEXPERT: short}))


def test_tables_are_compared_with_the_manifest(tmp_path):
    folder = release(tmp_path)
    digest = hashlib.sha256((folder / CHEXPERT).read_bytes()).hexdigest()
    write(folder, {"SHA256SUMS.txt": f"{'0' * 64} files/p10/other.jpg\n{digest} {CHEXPERT}\n"})
    assert made(MimicCxrClass, folder)[0]["train"]
    write(folder, {"SHA256SUMS.txt": f"{digest} *./{SPLIT}\n"})
    with pytest.raises(UserError, match=r"split.csv.gz: its sha256 is not that of SHA256SUMS.txt; download"):
        made(MimicCxrClass, folder)


def test_columns_and_rows_in_another_order_give_the_same_records(tmp_path):
    first, _ = made(MimicCxrClass, release(tmp_path / "a"))
    rows = tables()
    changed = {name: [row[::-1] for row in [rows[name][0], *rows[name][:0:-1]]] for name in rows}
    second, _ = made(MimicCxrClass, release(tmp_path / "b", changes=changed))
    assert by_id(first) == by_id(second)


def test_the_official_counts_are_of_images(tmp_path):
    splits = MimicCxrClass().splits(SourceFolder(release(tmp_path)))
    assert {n: (len(s.items), s.expected) for n, s in splits.items()} == {
        "train": (4, 368_960),
        "validation": (1, 2_991),
        "test": (2, 5_159),
    }


def test_the_release_may_lie_in_the_folders_of_its_download(tmp_path):
    release(tmp_path / "physionet.org/files/mimic-cxr-jpg/2.1.0")
    examples, skipped = made(MimicCxrClass, tmp_path)
    assert len(examples["train"]) == 3 and not any(skipped.values())


def test_views():
    assert view_named("AP AXIAL", "lateral") == "AP AXIAL"
    assert view_named(" ", "Postero-Anterior") == "PA"
    assert view_named("", "Erect") == ""
