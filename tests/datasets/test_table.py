"""User-supplied tables: kinds of labels, wordings, splits, parquet, and skipped rows."""

from __future__ import annotations

import argparse
import io
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import twins

from vilam3_jax.data.examples import Example, Turn
from vilam3_jax.datasets.builder import prepare
from vilam3_jax.datasets.dataset import SkipItem, examples_of
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.table import Table
from vilam3_jax.datasets.table_questions import cell_text, infer_column, one_hot_label, readable
from vilam3_jax.errors import UserError


def built(folder, *argv, name="table.csv", templates=None):
    """Returns (examples, skipped) by split of `table.csv` in `folder`."""
    parser = argparse.ArgumentParser()
    Table.add_arguments(parser)
    if templates is not None:
        twins.write(folder, {"questions.json": templates})
        argv = (*argv, "--questions", str(folder / "questions.json"))
    options = parser.parse_args(argv)
    options.source_file = name
    maker = Table(options)
    source = SourceFolder(folder)
    examples, skipped = {}, {}
    for split, items in maker.splits(source).items():
        items = pickle.loads(pickle.dumps(items))  # noqa: S301 - as in worker processes
        found = list(examples_of(items, maker.context(source, split)))
        examples[split] = [one for one in found if isinstance(one, Example)]
        skipped[split] = [one for one in found if not isinstance(one, Example)]
    return examples, skipped


def write_table(folder, rows, name="table.csv"):
    pictures = {f"im/{number}.png": twins.picture(number, kind="PNG") for number in range(12)}
    return twins.write(folder, {name: rows, **pictures})


HEADER = ["file", "Pleural_Effusion", "grade", "size", "remark", "who", "fold"]
ROWS = [
    ["im/0.png", "1", "II", "12.5", "Small cyst.", "A", "train"],
    ["im/1.png", "0", "I", "3", "", "A", "train"],
    ["im/2.png", "0.0", "ii", "7.25", "Nothing.", "B", "val"],
    ["im/3.png", "", "III", "NaN", "n/a", "C", "Test"],
]
COLUMNS = ("--image", "file", "--label", "Pleural_Effusion", "grade", "size", "remark")


def test_golden_row_of_each_kind(tmp_path):
    templates = {"columns": {"remark": {"kind": "text"}, "size": {"unit": "mm"}}}
    write_table(tmp_path, [HEADER, *ROWS])
    examples, skipped = built(
        tmp_path, *COLUMNS, "--patient", "who", "--split", "fold", "--modality", "US", templates=templates
    )
    assert not any(skipped.values())
    assert {split: [one.id for one in found] for split, found in examples.items()} == {
        "train": ["im/0.png", "im/1.png"],
        "validation": ["im/2.png"],
        "test": ["im/3.png"],
    }
    (one,) = examples["validation"]
    assert one.images[0].data == twins.picture(2, kind="PNG")
    assert one.turns == (
        Turn("user", "<image>\nDoes this image show pleural effusion? Answer yes or no."),
        Turn("assistant", "No", True),
        Turn("user", "What is the grade in this image? Options: I, II, III."),
        Turn("assistant", "II", True),
        Turn("user", "What is the size in this image? Answer with a number, in mm."),
        Turn("assistant", "7.25", True),
        Turn("user", "What is the remark in this image?"),
        Turn("assistant", "Nothing.", True),
    )
    assert one.meta["modality"] == "US" and len(one.meta["patient"]) == 24
    assert one.meta["qa"][1] == {
        "question": "What is the grade in this image? Options: I, II, III.",
        "answer": "II",
        "type": "grade",
        "label_source": "dataset",
        "options": ["I", "II", "III"],
        "expert": None,
        "args": "",
        "oracle": False,
        "image": 0,
    }
    (last,) = examples["test"]
    assert [q["type"] for q in last.meta["qa"]] == ["grade"], "empty cells are not asked about"


@pytest.mark.parametrize("more", [("--patient", "who", "--split-by", "patient"), ()])
def test_rows_of_a_patient_or_an_image_stay_together(tmp_path, more):
    rows = [[f"im/{number}.png", str(number % 2), f"P{number // 3}"] for number in range(12)]
    rows += [["im/0.png", "2", "P0"], ["im/11.png", "2", "P3"]]
    argv = ("--image", "file", "--label", "a", "--heldout", "0.4", *more)
    turns = []
    for name, ordered in (("a", rows), ("b", rows[::-1])):
        folder = write_table(tmp_path / name, [["file", "a", "who"], *ordered])
        examples, _ = built(folder, *argv)
        key = "patient" if more else "group"
        held, train = ({one.meta[key] for one in examples[side]} for side in ("heldout", "train"))
        assert held and train and not held & train
        turns.append({side: {one.id: one.turns for one in found} for side, found in examples.items()})
    assert turns[0] == turns[1], "does not depend on the order of rows"


def test_rows_of_one_image_get_ids_of_their_own(tmp_path):
    rows = [["im/0.png", "1"], ["im/0.png", "0"], ["im/0.png", "1"], ["im/1.png", "1"]]
    write_table(tmp_path, [["file", "a"], *rows])
    examples, skipped = built(tmp_path, "--image", "file", "--label", "a", "--heldout", "0")
    ids = [one.id for one in examples["train"]]
    assert len(set(ids)) == 3 and ids[2] == "im/1.png" and ids[0].startswith("im/0.png#")
    assert [(one.record, one.reason) for one in skipped["train"]] == [
        ("table.csv row 3", "is a copy of an earlier row")
    ]


def test_rows_with_their_own_question(tmp_path):
    rows = [
        ["im/0.png", "Is there an effusion?", "Yes"],
        ["im/0.png", "Is it on the left?", "Yes"],
        ["im/0.png", "Where is it?", "on the right"],
        ["im/0.png", "Where is it?", "on the right"],
        ["im/1.png", "", "no"],
        ["im/1.png", "Is there an effusion?", ""],
    ]
    write_table(tmp_path, [["file", "ask", "reply"], *rows])
    argv = ("--image", "file", "--label", "reply", "--question", "ask", "--heldout", "0")
    examples, skipped = built(tmp_path, *argv)
    found = [(one.turns[0].text, one.turns[1].text, one.meta["qa"][0]) for one in examples["train"]]
    assert [(q.removeprefix("<image>\n"), a) for q, a, _ in found] == [(q, a) for _, q, a in rows[:3]]
    kinds = [(qa["type"], qa["answer"], qa["options"]) for *_, qa in found]
    assert kinds == [("closed", "yes", ["yes", "no"])] * 2 + [("open", "on the right", [])]
    assert len({one.id for one in examples["train"]}) == 3
    assert [one.reason for one in skipped["train"]] == [
        "is a copy of an earlier row", "the ask is empty", "all labels are empty",
    ]  # fmt: skip


def test_one_hot_labels(tmp_path):
    rows = [["im/0.png", 1, 0, 0], ["im/1.png", 0, 0, 1], ["im/2.png", 1, 1, 0], ["im/3.png", "", "", ""]]
    rows += [["im/4.png", 0, 0, 0], ["im/5.png", 0, "x", 1], ["im/6.png", "", 0, 1]]
    write_table(tmp_path, [["file", "MEL", "Nevus", "basal_cell"], *rows])
    argv = ("--image", "file", "--label", "MEL", "Nevus", "basal_cell", "--one-hot", "--heldout", "0")
    examples, skipped = built(tmp_path, *argv, templates={"one_hot": {"ask": ["Which? {options}"]}})
    assert [one.turns[1].text for one in examples["train"]] == ["MEL", "basal cell"]
    assert examples["train"][0].turns[0].text == "<image>\nWhich? MEL, nevus, basal cell"
    assert [one.reason for one in skipped["train"]] == [
        "sets 2 of 3 one-hot labels (3 are filled)",
        "all labels are empty",
        "sets 0 of 3 one-hot labels (3 are filled)",
        "the label Nevus is neither yes nor no",
        "sets 1 of 3 one-hot labels (2 are filled)",
    ]


def test_templates_decide(tmp_path):
    templates = {
        "columns": {
            "grade": {
                "name": "BI-RADS class",
                "ask": ["Give the {name} of {this}: {options}."],
                "answers": {"1": "benign", "2.0": "malignant", "9": None},
            },
            "SEEN": {"answers": {"-1": None}},
        }
    }
    rows = [["im/0.png", "1", "1"], ["im/1.png", "2", "0"], ["im/2.png", "9", "1"], ["im/3.png", "3", "-1"]]
    write_table(tmp_path, [["file", "grade", "seen"], *rows])
    argv = ("--image", "file", "--label", "grade", "seen", "--heldout", "0")
    examples, skipped = built(tmp_path, *argv, templates=templates)
    asked = [[(q["type"], q["answer"]) for q in one.meta["qa"]] for one in examples["train"]]
    assert asked == [
        [("grade", "benign"), ("seen", "yes")],
        [("grade", "malignant"), ("seen", "no")],
        [("seen", "yes")],
    ]
    assert examples["train"][0].turns[0].text == (
        "<image>\nGive the BI-RADS class of this image: benign, malignant."
    )
    assert [one.reason for one in skipped["train"]] == ["the label grade has a value that is not an option"]


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], r'must be an object of "columns" and "one_hot"'),
        ({"column": {}}, r'must be an object of "columns"'),
        ({"columns": []}, r"must be an object of columns"),
        ({"columns": {"b": {}}}, r"column 'b' is not one of --label a"),
        ({"columns": {"a": {"question": "x"}}}, r"column 'a': must be an object of answers, ask, kind"),
        ({"columns": {"a": {"kind": "binary"}}}, r"kind 'binary' is not one of yes_no"),
        ({"columns": {"a": {"ask": "x"}}}, r"ask must be a list of texts"),
        ({"columns": {"a": {"ask": ["{name.__class__}{size}"]}}}, r"\{size\} is not one of"),
        ({"columns": {"a": {"answers": {"1": 1}}}}, r"answers must map cells to text or null"),
        ({"columns": {"a": {"kind": "yes_no", "answers": {"1": "maybe"}}}}, r"must be yes, no or null"),
        ({"columns": {"a": {"unit": 3}}}, r"unit must be text"),
    ],
)
def test_templates_that_are_refused(tmp_path, templates, message):
    write_table(tmp_path, [["file", "a"], ["im/0.png", "1"]])
    with pytest.raises(UserError, match=message):
        built(tmp_path, "--image", "file", "--label", "a", templates=templates)


def test_a_broken_file_of_questions(tmp_path):
    write_table(tmp_path, [["file", "a"], ["im/0.png", "1"]])
    twins.write(tmp_path, {"questions.json": "{"})
    with pytest.raises(UserError, match=r"questions\.json: not JSON"):
        built(tmp_path, "--image", "file", "--label", "a", "--questions", str(tmp_path / "questions.json"))


@pytest.mark.parametrize(
    ("cells", "kind", "options"),
    [
        ({"0": 5, "1": 3}, "yes_no", ("yes", "no")),
        ({"Yes": 5, "NO": 3, "": 9}, "yes_no", ("yes", "no")),
        ({"True": 1, "false": 1}, "yes_no", ("yes", "no")),
        ({"0": 500, "1": 300, "?": 1}, "yes_no", ("yes", "no")),
        ({"0": 2, "1": 2, "oops": 1}, "yes_no", ("yes", "no")),
        ({"0": 5, "1": 3, "2": 9}, "choice", ("0", "1", "2")),
        ({"-1": 5, "10": 3, "2": 9}, "choice", ("-1", "2", "10")),
        ({"1.5": 5, "10": 3}, "number", ()),
        ({str(n): 1 for n in range(30)}, "number", ()),
        ({**{str(n): 1 for n in range(30)}, "x": 1}, "number", ()),
        ({"Benign": 3, "benign": 1, "malignant": 1}, "choice", ("Benign", "malignant")),
        ({str(n): 1 for n in range(40, 52)}, "number", ()),
        ({str(n): 2 for n in range(6)}, "choice", tuple("012345")),
        ({f"text {n}": 1 for n in range(6)}, "text", ()),
        ({"only": 3}, "text", ()),
        ({f"text {n}": 1 for n in range(21)}, "text", ()),
        ({"a" * 61: 1, "b": 1}, "text", ()),
        ({}, "text", ()),
        ({"nan": 3, "": 1}, "text", ()),
    ],
)
def test_kinds_of_columns(cells, kind, options):
    asked = infer_column("x", cells, {})
    assert (asked.kind, asked.options) == (kind, options)


def test_cells():
    assert [cell_text(v, "x") for v in (None, float("nan"), True, 3.0, 2.5, " a\0 ", "4.00", "v1.0")] == [
        *("", "", "true", "3", "2.5", "a", "4", "v1.0")
    ]
    for value in ([1], {"a": 1}, b"x", "y" * 100_000):
        with pytest.raises(SkipItem, match="the label x"):
            cell_text(value, "x")
    assert readable("BI-RADS") == "BI-RADS" and readable("Tumor_Size.mm") == "tumor size mm"
    assert one_hot_label(["A", "b"], ["", "nan"]) is None


def test_rows_that_cannot_be_used(tmp_path):
    rows = [
        ["im/0.png", "1"],
        ["im/99.png", "1"],
        ["", "1"],
        ["../../etc/passwd", "0"],
        ["/etc/passwd", "0"],
        ["im/1.png", ""],
        ["im/text.png", "1"],
        ["im/2.png"],
        ["im/3.png", "0", "surplus"],
        ["im/4.png", "maybe"],
    ]
    write_table(tmp_path, [["file", "a"], *rows])
    (tmp_path / "im/text.png").write_text("<html>")
    examples, skipped = built(tmp_path, "--image", "file", "--label", "a", "--heldout", "0")
    assert [one.id for one in examples["train"]] == ["im/0.png"]
    found = {int(one.record.split()[-1]): one.reason for one in skipped["train"]}
    assert sorted(found) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert found[3] == found[9] == "names no image" and found[6] == found[8] == "all labels are empty"
    assert "leaves the data root" in found[4] and "is not relative" in found[5]
    assert "is not an image file" in found[7] and found[10] == "the label a is neither yes nor no"


def test_a_table_whose_header_lacks_a_column(tmp_path):
    write_table(tmp_path, [["file", "a"], ["1", "im/0.png", "1"], ["2", "im/1.png", "0"]])
    parser = argparse.ArgumentParser()
    Table.add_arguments(parser)
    options = parser.parse_args(["--image", "file", "--label", "a", "--heldout", "0"])
    with pytest.raises(
        UserError, match=r"row 1: names no image; .* has 2 rows with more cells than its header"
    ):
        prepare(Table(options), tmp_path / "table.csv", tmp_path / "out")


def test_rows_without_a_patient_or_a_split(tmp_path):
    rows = [["im/0.png", "1", "A", "train"], ["im/1.png", "0", "", "test"], ["im/2.png", "0", "B", "later"]]
    write_table(tmp_path, [["file", "a", "who", "fold"], *rows])
    argv = ("--image", "file", "--label", "a", "--patient", "who", "--split", "fold")
    examples, skipped = built(tmp_path, *argv)
    reasons = [one.reason for some in skipped.values() for one in some]
    assert reasons == [
        "the patient is empty",
        "states no split in fold (train, validation, test or heldout)",
    ]
    assert [one.id for one in examples["train"]] == ["im/0.png"]
    write_table(tmp_path, [["file", "a", "who", "fold"], ["im/0.png", "1", "A", "1"]])
    with pytest.raises(UserError, match="no row has a split in column fold"):
        built(tmp_path, *argv)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_other_delimiters(tmp_path, mark):
    write_table(tmp_path, [])
    (tmp_path / "table.csv").write_text(f"\ufeffFile{mark}A\nim/0.png{mark}1\n", "utf-8")
    examples, _ = built(tmp_path, "--image", "file", "--label", "a", "--heldout", "0")
    assert len(examples["train"]) == 1


def test_several_images(tmp_path):
    write_table(tmp_path, [["l", "r", "a"], ["im/0.png", "im/1.png", "1"], ["im/2.png", "", "0"]])
    examples, _ = built(tmp_path, "--image", "l", "r", "--label", "a", "--heldout", "0")
    first, second = examples["train"]
    assert len(first.images) == 2 and first.turns[0].text.startswith("<image>\n<image>\n")
    assert len(second.images) == 1


def parquet(folder, columns, **settings):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **settings)
    write_table(folder, [])
    return twins.write(folder, {"table.parquet": buffer.getvalue()})


def test_parquet_with_paths(tmp_path):
    columns = {
        "file": ["im/0.png", "im/1.png", None, "im/3.png"],
        "seen": [True, False, True, None],
        "score": [1.0, 2.5, 3.0, float("nan")],
        "many": [["im/4.png", "im/5.png"], [], [], []],
    }
    parquet(tmp_path, columns, row_group_size=2)
    argv = ("--image", "file", "many", "--label", "seen", "score", "--heldout", "0")
    examples, skipped = built(tmp_path, *argv, name="table.parquet")
    first, second = examples["train"]
    assert len(first.images) == 3
    assert [q["answer"] for q in first.meta["qa"]] == ["yes", "1"]
    assert [q["answer"] for q in second.meta["qa"]] == ["no", "2.5"]
    assert [one.reason for one in skipped["train"]] == ["names no image", "all labels are empty"]


def test_parquet_with_images_in_it(tmp_path):
    pictures = [{"bytes": twins.picture(n, kind="PNG"), "path": "x.png"} for n in range(3)]
    pictures += [{"bytes": None, "path": "/etc/passwd"}, {"bytes": b"<html>", "path": None}]
    labels = [["a"], ["b"], [], ["a"], ["b"]]
    parquet(
        tmp_path, {"image": pictures, "grade": ["1", "2", "3", "1", "2"], "odd": labels}, row_group_size=2
    )
    argv = ("--image", "image", "--label", "grade", "--heldout", "0")
    examples, skipped = built(tmp_path, *argv, name="table.parquet")
    assert [one.images[0].data for one in examples["train"]] == [p["bytes"] for p in pictures[:3]]
    assert [one.id for one in examples["train"]] == ["row-1", "row-2", "row-3"]
    assert skipped["train"][0].reason == "the image column holds no bytes"
    assert "is not an image file" in skipped["train"][1].reason
    _, skipped = built(tmp_path, "--image", "image", "--label", "odd", "--heldout", "0", name="table.parquet")
    assert {one.reason for one in skipped["train"]} == {"the label odd is a list, not a value"}


def test_rows_of_a_parquet_file_that_hold_the_same_image_stay_together(tmp_path):
    pictures = [{"bytes": twins.picture(n // 2, kind="PNG"), "path": f"{n}.png"} for n in range(40)]
    parquet(tmp_path, {"image": pictures, "grade": ["1", "2"] * 20})
    argv = ("--image", "image", "--label", "grade", "--heldout", "0.5")
    examples, _ = built(tmp_path, *argv, name="table.parquet")
    train, heldout = ({one.images[0].data for one in examples[side]} for side in ("train", "heldout"))
    assert len(train) + len(heldout) == 20 and not train & heldout and train and heldout


def test_options_that_do_not_go_together(tmp_path):
    write_table(tmp_path, [["file", "a"], ["im/0.png", "1"]])
    for argv, message in (
        (("--label", "a"), "give --image COLUMN and --label COLUMN"),
        (("--image", "file"), "give --image COLUMN and --label COLUMN"),
        (("--image", "file", "--label", "a", "A"), "a column is named twice"),
        (("--image", "file", "--label", "a", "--one-hot"), "needs two --label columns"),
        (("--image", "file", "--label", "a", "b", "--question", "c"), "needs one --label COLUMN"),
        (("--image", "file", "--label", "a", "--question", "c"), "no column c"),
        (("--image", "file", "--label", "a", "--split-by", "patient"), "needs --patient COLUMN"),
        (("--image", "file", "--label", "a", "--heldout", "1"), "give a share"),
        (("--image", "file", "--label", "a", "--images", str(tmp_path / "no")), "no such folder"),
        (("--image", "picture", "--label", "b", "a"), r"no column picture, b; it has file, a"),
        (("--image", "file", "--label", "a", "--heldout", "0.5"), "none can be held out"),
    ):
        with pytest.raises(UserError, match=message):
            built(tmp_path, *argv)
    with pytest.raises(UserError, match="no rows; export it again"):
        built(write_table(tmp_path / "b", [["file", "a"]]), "--image", "file", "--label", "a")
    with pytest.raises(UserError, match="is not a parquet file"):
        twins.write(tmp_path, {"table.parquet": b"PAR1"})
        built(tmp_path, "--image", "file", "--label", "a", name="table.parquet")


def test_markers_in_cells_are_text(tmp_path):
    write_table(tmp_path, [["file", "a"], ["im/0.png", "see <image> there"]])
    examples, _ = built(tmp_path, "--image", "file", "--label", "a", "--heldout", "0")
    assert examples["train"][0].turns[1].text == "see [image] there"


CARDS = [
    {"name": "SIDES", "args": ["left", "right"], "modality": "CXR", "task": "classification"},
    {"name": "PLAIN", "args": [], "modality": "CXR", "task": "classification"},
    {"name": "MASKS", "args": [], "modality": "CT", "task": "segmentation"},
    {"name": "PAIRS", "args": [], "modality": "CXR", "task": "classification", "roles": ["a", "b"]},
]


def with_experts(folder, cells, *argv, labels=("a", "b")):
    """Builds a table with the cells of an expert column."""
    cards = [{"overview": "looks", "accuracy": "unknown", **card} for card in CARDS]
    rows = [[f"im/{number}.png", "1", "0", cell] for number, cell in enumerate(cells)]
    write_table(folder, [["file", "a", "b", "call"], *rows])
    twins.write(folder, {"cards.json": cards})
    argv = ("--image", "file", "--label", *labels, "--heldout", "0", "--expert", "call", *argv)
    return built(folder, *argv, "--cards", str(folder / "cards.json"))


def test_an_expert_column_calls_before_the_stated_answer(tmp_path):
    cells = ["SIDES(left)", "", "<PLAIN()> before B", "SIDES(right) before b; PLAIN(); SIDES(left) before a"]
    examples, skipped = with_experts(tmp_path, cells)
    assert not skipped["train"]
    requests = [
        [(one.expert, one.args, one.before_turn, one.policy) for one in example.expert_requests]
        for example in examples["train"]
    ]
    assert requests == [
        [("SIDES", "left", 1, "always")],
        [],
        [("PLAIN", "", 3, "always")],
        [("SIDES", "right", 3, "always"), ("PLAIN", "", 1, "always"), ("SIDES", "left", 1, "always")],
    ]
    named = [[(q["expert"], q["args"]) for q in example.meta["qa"]] for example in examples["train"]]
    assert named[0] == [("SIDES", "left"), (None, "")] and named[1] == [(None, ""), (None, "")]
    assert named[3] == [("PLAIN", ""), ("SIDES", "right")]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            "SIDEZ(left)",
            r"table\.csv, column call: row 2: expert SIDEZ has no card; the list has MASKS, PAIRS,",
        ),
        (
            "SIDES(up)",
            r"row 2: .* no argument 'up'; write SIDES\(left\) or SIDES\(right\); correct the table",
        ),
        ("PLAIN(left)", r"PLAIN has no argument 'left'; write PLAIN\(\)"),
        ("SIDES", r"is not NAME\(arguments\), or NAME\(arguments\) before LABEL"),
        ("Jane Doe", r"is not NAME\(arguments\)"),
        ("PLAIN() SIDES(left)", r"is not NAME\(arguments\)"),
        ("PLAIN() before c", r"PLAIN is called before 'c', which is not one of the label columns"),
        ("MASKS()", r"MASKS reads scans, not single images; use `vilam3 prepare expert_slices`"),
        ("PAIRS()", r"PAIRS reads scans"),
    ],
)
def test_a_wrong_expert_cell_is_one_sentence_before_anything_is_written(tmp_path, cell, message):
    with pytest.raises(UserError, match=message) as caught:
        with_experts(tmp_path, ["PLAIN()", cell])
    assert "Jane" not in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_cells_are_counted(tmp_path):
    with pytest.raises(UserError, match=r"row 1 and 4 more: expert NONE has no card; .*; correct"):
        with_experts(tmp_path, ["NONE()"] * 5)
    cells = ["A()", "B()", "C()", "D()", "E()", "A()"]
    with pytest.raises(
        UserError, match=r"row 1 and 1 more: .* A .*; row 2: .*; row 3: .* C .*; and 2 more; c"
    ):
        with_experts(tmp_path, cells)
    folder = write_table(tmp_path, [["file", "a"], ["im/0.png", "1"]])
    with pytest.raises(UserError, match=r"call"):
        built(folder, "--image", "file", "--label", "a", "--expert", "call")


def test_rows_that_cannot_make_their_call_are_skipped(tmp_path):
    twins.write(tmp_path, {"cards.json": [{"overview": "", "accuracy": "", **CARDS[1]}]})
    rows = [["", "1", "1", "PLAIN()"], ["im/0.png", "1", "", "PLAIN() before b"], ["im/1.png", "1", "", ""]]
    write_table(tmp_path, [["file", "a", "b", "call"], *rows])
    argv = ("--image", "file", "--label", "a", "b", "--heldout", "0", "--expert", "call")
    examples, skipped = built(tmp_path, *argv, "--cards", str(tmp_path / "cards.json"))
    assert [one.id for one in examples["train"]] == ["im/1.png"]
    assert [one.reason for one in skipped["train"]] == [
        "calls PLAIN, but names no image",
        "calls PLAIN before b, whose cell is empty",
    ]


def test_one_hot_labels_take_calls_without_a_label(tmp_path):
    examples, _ = with_experts(tmp_path, ["PLAIN()"], "--one-hot")
    assert [one.before_turn for one in examples["train"][0].expert_requests] == [1]
    with pytest.raises(UserError, match="not one of the label columns"):
        with_experts(tmp_path, ["PLAIN() before a"], "--one-hot")
