"""VQA-RAD from synthetic copies of its three layouts."""

import pytest
from twins import made, picture, write

from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.vqa_rad import VqaRad
from vilam3_jax.errors import UserError

NULL = "NULL"


def row(qid, phrase="freeform", image="synpic1.jpg", **values):
    return {
        "qid": qid,
        "phrase_type": phrase,
        "qid_linked_id": f"0000-{qid}",
        "image_case_url": "https://example.org/case",
        "image_name": image,
        "image_organ": "HEAD",
        "evaluation": "not evaluated",
        "question": f"Is there a made-up finding {qid}?",
        "question_rephrase": NULL,
        "question_relation": NULL,
        "question_frame": NULL,
        "question_type": "PRES, ABN",
        "answer": "Yes ",
        "answer_type": "CLOSED ",
        **values,
    }


ROWS = [
    row("0", question_rephrase="Can a made-up finding 0 be seen?"),
    row(1, image="synpic2.jpg", image_organ="CHEST", answer=3, answer_type="OPEN", question_rephrase=None),
    row("2", "test_freeform", answer_type="CLOSED", question_rephrase="Can finding 2 be seen?", answer="no"),
    row("3", "test_para", image="synpic3.jpg", image_organ="ABD ", answer="liver", answer_type="OPEN"),
    row("4", "test_para", answer="Yes."),
]


def twin(folder, rows=ROWS, table="VQA_RAD Dataset Public.json", images="VQA_RAD Image Folder"):
    pictures = {f"{images}/synpic{number}.jpg": picture(number) for number in (1, 2, 3)}
    return write(folder, {table: rows, **pictures})


@pytest.mark.parametrize(
    ("table", "images"),
    [
        ("VQA_RAD Dataset Public.json", "VQA_RAD Image Folder"),
        ("VQA_RAD_Dataset_Public.json", "VQA_RAD_Image_Folder"),
    ],
)
def test_golden_examples(tmp_path, table, images):
    examples, skipped = made(VqaRad, twin(tmp_path, table=table, images=images))
    assert skipped == {"train": [], "test": []}
    train = {example.id: example for example in examples["train"]}
    assert list(train) == ["0", "0-organ", "0-rephrase", "1", "1-organ"]
    first = train["0"]
    assert [(turn.role, turn.text, turn.supervised) for turn in first.turns] == [
        ("user", "Is there a made-up finding 0?\n<image>", False),
        ("assistant", "Yes", True),
    ]
    assert first.images[0].data == picture(1)
    assert train["0-rephrase"].turns[0].text.startswith("Can a made-up finding 0 be seen?")
    assert train["0-organ"].turns[1].text == "HEAD"
    assert train["0-organ"].turns[0].text.split("\n")[0] in (
        "What is the visible organ?",
        "What organ is it?",
        "Is any organ visible?",
        "Which organ can be seen?",
        "Any visible organs?",
    )
    assert train["1"].turns[1].text == "3"  # the answer is a number
    assert (first.meta["modality"], train["1"].meta["modality"]) == ("", "CXR")
    assert first.meta["question_types"] == ["PRES", "ABN"]
    assert first.meta["qa"][0]["options"] == ["yes", "no"] and first.meta["qa"][0]["answer"] == "yes"
    test = {example.id: example.meta["qa"][0]["type"] for example in examples["test"]}
    assert test == {"2": "closed", "2-rephrase": "closed_rephrased", "3": "open", "4": "closed"}
    assert all(example.meta["split"] == "test" for example in examples["test"])
    assert first.meta["group"] != train["1"].meta["group"]
    assert first.meta["group"] == examples["test"][0].meta["group"]  # one image
    assert VqaRad.shared_images


def test_what_the_reference_makes(tmp_path):
    examples, skipped = made(VqaRad, twin(tmp_path), parity=True)
    assert [example.meta["reference_id"] for example in examples["train"]] == ["0", "1", "2", "3", "4"]
    assert examples["train"][0].turns[1].text == "Yes "
    assert [(example.id, example.meta["reference_id"]) for example in examples["test"]] == [
        ("2", "0"),
        ("2-rephrase", "1"),
    ]
    assert [one.record for one in skipped["test"]] == [
        "VQA_RAD Dataset Public.json row 4",
        "VQA_RAD Dataset Public.json row 5",
    ]


def test_organ_questions_vary_and_repeat(tmp_path):
    rows = [row(number) for number in range(200)]
    folder = twin(tmp_path, rows)
    asked = [e.turns[0].text for e in made(VqaRad, folder)[0]["train"] if e.id.endswith("-organ")]
    assert len(set(asked)) == 5
    assert asked == [e.turns[0].text for e in made(VqaRad, folder)[0]["train"] if e.id.endswith("-organ")]
    parity = {e.turns[0].text for e in made(VqaRad, folder, parity=True)[0]["train"]}
    assert "Which can organ can be seen?\n<image>" in parity
    assert not any("Which can organ can" in text for text in asked)


def test_training_questions_that_test_asks_are_set_aside(tmp_path):
    rows = [
        row(1, question="is there  A mass?", question_rephrase="Any mass?"),
        row(2, image="synpic2.jpg", question="Is there a mass?"),
        row(3, question="Other?", question_rephrase="Is there a mass?"),
        row(4, "test_freeform", question="Is there a mass?"),
    ]
    examples, skipped = made(VqaRad, twin(tmp_path, rows))
    ids = [example.id for example in examples["train"]]
    assert ids == ["1-organ", "1-rephrase", "2", "2-organ", "3", "3-organ"]
    assert [one.record for one in skipped["train"]] == [
        "VQA_RAD Dataset Public.json row 1 (question)",
        "VQA_RAD Dataset Public.json row 3 (rephrase)",
    ]
    kept = [example.id for example in made(VqaRad, tmp_path, parity=True)[0]["train"]]
    assert {"1", "3-rephrase"} <= set(kept)


BAD = {
    "null": None,
    "list": [1],
    "no keys": {},
    "answer": row(1, answer=None),
    "answer list": row(1, answer=["yes"]),
    "answer NaN": row(1, answer=float("nan")),
    "answer bool": row(1, answer=True),
    "empty question": row(1, question="  "),
    "question object": row(1, question={"a": 1}),
    "rephrase list": row(1, question_rephrase=["x"]),
    "organ list": row(1, image_organ=["HEAD"]),
    "answer type": row(1, answer_type="MAYBE"),
    "answer type null": row(1, answer_type=None),
    "phrase type": row(1, "paraphrase"),
    "phrase type null": row(1, None),
    "no such image": row(1, image="synpic9.jpg"),
    "path": row(1, image="../synpic1.jpg"),
    "absolute": row(1, image="/etc/hostname"),
    "nul": row(1, image="a\0.jpg"),
    "image list": {**row(1), "image_name": [3]},
    "surrogate": row(1, question="a \ud800 b"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_and_skipped(tmp_path, name):
    examples, skipped = made(VqaRad, twin(tmp_path, [row("ok"), BAD[name]]))
    assert "ok" in [example.id for example in examples["train"]]
    (one,) = skipped["train"]
    assert one.record == "VQA_RAD Dataset Public.json row 2"
    assert "\n" not in one.reason and "finding 1" not in one.reason


def test_ids_are_unique_where_the_source_repeats_them(tmp_path):
    examples, _ = made(VqaRad, twin(tmp_path, [row("7"), row("7", question="Again?"), row(None)]))
    ids = [example.id for example in examples["train"]]
    assert len(ids) == len(set(ids)) == 6


def test_spreadsheet_headers_are_known(tmp_path):
    alias = {
        "QID_unique": 5,
        "QID_para": "freeform",
        "IMAGE": "synpic1.jpg",
        "IMAGE_organ": "CHEST",
        "QUESTION": "Seen?",
        "Q_REPHASE": "Visible?",
        "Q_TYPE": "PRES",
        "ANSWER": "No",
        "A_TYPE": "CLOSED",
    }
    examples, skipped = made(VqaRad, twin(tmp_path, [alias]))
    assert [example.id for example in examples["train"]] == ["5", "5-organ", "5-rephrase"] and not skipped[
        "train"
    ]


def test_counts_that_are_agreed_upon(tmp_path):
    splits = VqaRad().splits(SourceFolder(twin(tmp_path)))
    assert (splits["train"].expected, splits["test"].expected) == (None, 451)
    assert (len(splits["train"].items), len(splits["test"].items)) == (2, 3)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"VQA_RAD Dataset Public\.json or .*Image Folder.*osf\.io/89kps"):
        VqaRad().splits(SourceFolder(tmp_path, VqaRad.instructions))
    write(tmp_path, {"VQA_RAD Dataset Public.json": {"rows": []}, "VQA_RAD Image Folder/a.jpg": b"a"})
    with pytest.raises(UserError, match="holds no list"):
        VqaRad().splits(SourceFolder(tmp_path))


def plain(qid, **values):
    kept = ("qid", "image_name", "image_organ", "answer", "answer_type", "question_type", "question")
    found = row(qid, **values)
    return {key: found[key] for key in (*kept, "phrase_type")}


def test_mevf_files(tmp_path):
    write(
        tmp_path,
        {
            "trainset.json": [plain(1, phrase="para"), plain(2)],
            "testset.json": [plain(3, phrase="test_para", answer_type="OPEN", answer="left")],
            "images/synpic1.jpg": picture(1),
        },
    )
    examples, skipped = made(VqaRad, tmp_path, "mevf")
    assert [e.id for e in examples["train"]] == ["1", "1-organ", "2", "2-organ"]
    assert [e.id for e in examples["test"]] == ["3"] and not skipped["test"]
    assert VqaRad(config="mevf").splits(SourceFolder(tmp_path))["train"].expected == 3064
    write(tmp_path, {"valset.json": [plain(4)]})
    examples, _ = made(VqaRad, tmp_path, "mevf")
    assert list(examples) == ["train", "validation", "test"] and examples["validation"][0].id == "4"
