"""MIMIC-CXR reports and mimic_annotation.json, from synthetic copies with invented texts."""

import pytest

from tests.datasets.mimic_twin import FILMS, path_of, release
from tests.datasets.twins import made, write
from vilam3_jax.datasets.mimic_annotation import MimicAnnotation
from vilam3_jax.datasets.mimic_cxr_reports import MimicCxrReports
from vilam3_jax.datasets.report_text import clean
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

SPLIT = "mimic-cxr-2.0.0-split.csv.gz"
FINDINGS = "1. The lungs are\n clear. Compared to ___, no change. "
REPORT = f"FINAL REPORT\n FINDINGS:\n\n {FINDINGS}\n\n IMPRESSION: No acute process.\n"


def texts(**other):
    """Report files by path; `other` replaces those of studies."""
    found = {f"s{film[1]}": path_of(*film[:3]).rpartition("/")[0] + ".txt" for film in FILMS}
    return {
        path: other.get(study, REPORT) for study, path in found.items() if other.get(study, "") is not None
    }


def by_id(examples):
    return {example.id: example for split in examples.values() for example in split}


def test_a_frontal_film_with_its_report(tmp_path):
    examples, skipped = made(MimicCxrReports, release(tmp_path, changes=texts()))
    assert {name: [e.id for e in es] for name, es in examples.items()} == {
        "train": ["a1", "a3", "b1"],
        "validation": ["c1"],
        "test": ["d1", "d2"],
    }
    assert not any(skipped.values())
    example = by_id(examples)["a1"]
    assert [(t.role, t.text, t.supervised) for t in example.turns] == [
        ("user", "<image>\nDescribe the image in detail.", False),
        ("assistant", "The lungs are clear.", True),
    ]
    assert example.meta["raw_report"] == FINDINGS.strip()
    assert example.meta["qa"][0]["type"] == "report"
    assert example.meta["qa"][0]["answer"] == "The lungs are clear."
    assert [(r.expert, r.policy) for r in example.expert_requests] == [("CXR", "optional")]
    assert example.images[0].data == (tmp_path / path_of(*FILMS[0][:3])).read_bytes()


def test_the_target_is_chosen(tmp_path):
    folder = release(tmp_path, changes=texts())
    examples, _ = made(MimicCxrReports, folder, argv=["--target", "impression", "--views", "all"])
    found = by_id(examples)
    assert found["a2"].turns[1].text == "No acute process." and not found["a2"].expert_requests
    examples, _ = made(MimicCxrReports, folder, argv=["--target", "findings_impression"])
    assert by_id(examples)["a1"].turns[1].text == (
        "Findings: The lungs are clear.\nImpression: No acute process."
    )


def test_pairs_are_films_and_reports(tmp_path):
    examples, _ = made(MimicCxrReports, release(tmp_path, changes=texts()), "pairs")
    example = by_id(examples)["a1"]
    assert example.format == "pair" and not example.expert_requests
    assert [t.text for t in example.turns] == ["<image>", "The lungs are clear."]


def test_an_existing_table_of_sections_is_used(tmp_path):
    table = [["study", "impression", "findings", "last_paragraph", "comparison"]]
    table += [["s80000001", "", "Line one,\nline two.", "", ""], ["s80000003", "Normal.", "", "", ""]]
    folder = release(tmp_path, changes={"mimic_cxr_sectioned.csv": table, **texts()})
    examples, skipped = made(MimicCxrReports, folder)
    assert by_id(examples)["a1"].turns[1].text == "Line one, line two."
    assert [s.reason for s in skipped["train"]] == [
        "its study is not in the table of sections",
        "its report has no findings",
    ]


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (None, "its report is missing"),
        (" IMPRESSION: Normal.", "its report has no findings"),
        (" FINDINGS: Seen on ___.", "its findings has no sentence left after cleaning"),
        (b" FINDINGS: \xff\xfe", "its report is not UTF-8 text"),
        (" FINDINGS: " + "long " * 60_000, "its report cannot be read; up to 262144 bytes are"),
        ("", "its report has no findings"),
    ],
)
def test_a_report_that_cannot_be_used(tmp_path, report, reason):
    examples, skipped = made(MimicCxrReports, release(tmp_path, changes=texts(s80000001=report)))
    assert [(s.record, s.reason) for s in skipped["train"]] == [(f"{SPLIT} row 1", reason)]
    assert [e.id for e in examples["train"]] == ["a3", "b1"]


def test_reports_may_lie_in_their_own_folder_or_be_missing(tmp_path):
    changes = {f"mimic-cxr-reports/{path}": text for path, text in texts().items()}
    examples, _ = made(MimicCxrReports, release(tmp_path / "a", changes=changes))
    assert len(by_id(examples)) == 6
    with pytest.raises(UserError, match="nor a report of the first 7 films"):
        made(MimicCxrReports, release(tmp_path / "b"))
    with pytest.raises(UserError, match=r"split.*metadata.*missing.*mimic-cxr-reports.zip"):
        made(MimicCxrReports, write(tmp_path / "c", {"a.txt": ""}))


def test_the_pool_is_of_the_training_split_and_with_parity_of_the_test(tmp_path):
    usual, other = "There is no effusion.", "No effusion is seen."
    train, test = (60, usual, 50, other), (1, usual, 30, other)
    films, files = [], {}
    for subject, split, (many, one, few, two) in (("92000000", "train", train), ("93000000", "test", test)):
        for number, text in enumerate([one] * many + [two] * few):
            film = (subject, f"{subject[:5]}{number:03}", f"{split}{number}", split, "PA", "")
            films.append(film)
            files[path_of(*film[:3]).rpartition("/")[0] + ".txt"] = f" FINDINGS: {text}"
            files[path_of(*film[:3])] = b"JPEG"
    folder = release(tmp_path, films, files)
    for parity, expected in ((False, usual), (True, other)):
        examples, _ = made(MimicCxrReports, folder, "pooled", parity=parity)
        assert {e.turns[1].text for e in by_id(examples).values()} == {expected}
    examples, _ = made(MimicCxrReports, folder)
    assert {e.turns[1].text for e in by_id(examples).values()} == {usual, other}


# --- mimic_annotation.json


def entry(film, report: object = "the lungs are clear . no effusion .", **changes):
    subject, study, dicom = film[:3]
    path = path_of(subject, study, dicom).removeprefix("files/")
    made_up = {"id": dicom, "study_id": int(study), "subject_id": int(subject), "report": report}
    return {**made_up, "image_path": [path], "split": "train", **changes}


def annotation(folder, train=(), test=(), **more):
    lists = {"train": [entry(FILMS[0]), entry(FILMS[1]), *train], "val": [entry(FILMS[4])]}
    content = {**lists, "test": [entry(FILMS[5]), *test]}
    return release(folder, changes={"mimic_annotation.json": content, **more})


def test_annotation_all_films_as_the_paper(tmp_path):
    examples, skipped = made(MimicAnnotation, annotation(tmp_path))
    assert {name: [e.id for e in es] for name, es in examples.items()} == {
        "train": ["a1", "a2"],
        "validation": ["c1"],
        "test": ["d1"],
    }
    assert not any(skipped.values())
    found = by_id(examples)
    assert found["a1"].turns[0].text == "<image>\nDescribe the image in detail."
    assert found["a1"].turns[1].text == "The lungs are clear. No effusion."
    assert found["a1"].meta["raw_report"] == "the lungs are clear . no effusion ."
    # Views come from the metadata table; the film expert is requested for frontal films.
    assert found["a1"].expert_requests and not found["a2"].expert_requests
    assert found["a1"].meta["patient"] == found["a2"].meta["patient"]
    frontal, _ = made(MimicAnnotation, tmp_path, argv=["--views", "frontal"])
    assert set(by_id(frontal)) == {"a1", "c1", "d1"}
    splits = MimicAnnotation().splits(SourceFolder(tmp_path))
    assert {n: s.expected for n, s in splits.items()} == {"train": 270790, "validation": 2130, "test": 3858}


def test_annotation_shares_patients_and_cleaning_with_the_reports(tmp_path):
    folder = annotation(tmp_path, **texts())
    reports, _ = made(MimicCxrReports, folder)
    other, _ = made(MimicAnnotation, folder, "clean")
    assert by_id(reports)["a1"].meta["patient"] == by_id(other)["a1"].meta["patient"]
    assert by_id(other)["a1"].turns[1].text == clean("the lungs are clear . no effusion .")


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("text", "is a str, not an object"),
        (None, "is a NoneType, not an object"),
        (entry(FILMS[0]), "its id is a duplicate"),
        (entry(FILMS[2], id=7), "its dicom_id is not a file name"),
        (entry(FILMS[2], id=None), "its dicom_id is not a file name"),
        (entry(FILMS[2], subject_id=None, image_path="x.jpg"), "its subject_id is not a number"),
        (entry(FILMS[2], report=None), "its report is a NoneType, not text"),
        (entry(FILMS[2], report=["a"]), "its report is a list, not text"),
        (entry(FILMS[2], report=5), "its report is a int, not text"),
        (entry(FILMS[2], report=" \0"), "its report has no sentence left after cleaning"),
        (entry(FILMS[2], report=" "), "its report is empty"),
        (entry(FILMS[2], report="x" * 300_000), "its report has more than 262144 characters"),
        (entry(FILMS[2], image_path=[]), "its image_path is not a path or a list of one path"),
        (entry(FILMS[2], image_path=["a", "b"]), "its image_path is not a path or a list of one path"),
        (entry(FILMS[2], image_path={"a": 1}), "its image_path is not a path or a list of one path"),
        (
            entry(FILMS[2], image_path=["../../etc/x.jpg"]),
            "its image_path is not relative to the image folder",
        ),
        (entry(FILMS[2], image_path=["p10/none.jpg"]), "its image is missing"),
        (
            entry(FILMS[2], subject_id=91000004, image_path="x.jpg"),
            "its patient is in the test split too",
        ),
        *(
            (entry(FILMS[2], image_path=[path]), "its image_path is of another film than its ids")
            for path in (
                "p91/p91000004/s50000001/a3.jpg",
                "p10/p10000001/s59999999/a3.jpg",
                "01234567-01234567-01234567-01234567-01234567.jpg",
            )
        ),
    ],
)
def test_annotation_items_that_cannot_be_used(tmp_path, item, reason):
    examples, skipped = made(MimicAnnotation, annotation(tmp_path, train=[item]))
    assert [(s.record, s.reason) for s in skipped["train"]] == [("mimic_annotation.json train row 3", reason)]
    assert len(examples["train"]) == 2


def test_annotation_ids_from_the_path_and_a_flat_folder(tmp_path):
    item = entry(FILMS[2], subject_id=None, study_id=None)
    examples, _ = made(MimicAnnotation, annotation(tmp_path / "a", train=[item]))
    assert by_id(examples)["a3"].meta["patient"] == by_id(examples)["a1"].meta["patient"]
    flat = {
        "images/n1.jpg": b"JPEG",
        "annotation.json": {"train": [entry(FILMS[0], image_path=["./n1.jpg"])]},
    }
    examples, skipped = made(MimicAnnotation, write(tmp_path / "b", flat))
    assert [e.images[0].data for e in examples["train"]] == [b"JPEG"] and not skipped["train"]


@pytest.mark.parametrize("content", [[], {"rows": []}, {"train": {}}])
def test_annotation_of_another_form(tmp_path, content):
    with pytest.raises(UserError, match="no list under train, val or test"):
        made(MimicAnnotation, release(tmp_path, changes={"mimic_annotation.json": content}))
