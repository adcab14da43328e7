"""User-supplied dialogues: formats, ids, splits, and skipped records."""

import argparse
import base64
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import picture, write

from vilam3_jax.data.examples import Example, ImageRef, Turn
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.datasets import instruction_lists, prepare
from vilam3_jax.datasets.dataset import examples_of
from vilam3_jax.datasets.instructions import Instructions
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError


def dialogue(question="What is it?", answer="A made-up finding."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def built(folder, records, *argv, name="list.json", raw=None):
    """Returns (examples, skipped) by split of a list of records."""
    write(folder, {name: raw if raw is not None else records})
    parser = argparse.ArgumentParser()
    Instructions.add_arguments(parser)
    options = parser.parse_args(["--images", str(folder), *argv])
    options.source_file = name
    maker = Instructions(options)
    source = SourceFolder(folder)
    examples, skipped = {}, {}
    for split, items in maker.splits(source).items():
        items = pickle.loads(pickle.dumps(items))  # noqa: S301  # as in worker processes
        found = list(examples_of(items, maker.context(source, split)))
        examples[split] = [one for one in found if isinstance(one, Example)]
        skipped[split] = [one for one in found if not isinstance(one, Example)]
    return examples, skipped


def reasons(skipped):
    return {one.record: one.reason for some in skipped.values() for one in some}


def everything(examples):
    return {one.id: one for some in examples.values() for one in some}


def with_pictures(folder, count=4):
    return write(folder, {f"im/{i}.jpg": picture(i) for i in range(count)})


def test_one_record_end_to_end(tmp_path):
    with_pictures(tmp_path)
    record = {
        "id": "a1",
        "image": "im/0.jpg",
        "who": "P7",
        "conversations": dialogue("<image>\nIs it there?", "Yes."),
    }
    records = [record, {**record, "id": "a2", "image": "im/1.jpg", "who": "P8"}]
    examples, skipped = built(
        tmp_path,
        records,
        "--split-by",
        "patient",
        "--patient",
        "who",
        "--modality",
        "CXR",
        "--licence",
        "own",
    )
    assert not reasons(skipped)
    one = everything(examples)["a1"]
    assert one.images == (ImageRef(data=picture(0)),)
    assert one.turns == (Turn("user", "<image>\nIs it there?"), Turn("assistant", "Yes.", True))
    assert one.meta["modality"] == "CXR" and one.meta["licence"] == "own"
    assert len(one.meta["patient"]) == 24 and "P7" not in json.dumps(one.meta)
    assert one.meta["qa"] == [
        {
            "question": "Is it there?",
            "answer": "yes",
            "type": "closed",
            "label_source": "dataset",
            "options": ["yes", "no"],
            "expert": None,
            "args": "",
            "oracle": False,
            "image": 0,
        }
    ]
    assert sorted(examples) == ["heldout", "train"], "at least one record is held out"


def test_all_forms_of_dialogues(tmp_path):
    with_pictures(tmp_path)
    stored = base64.b64encode(picture(3)).decode()
    parts = [{"type": "image", "image": "im/0.jpg"}, {"type": "text", "text": "What is it?"}]
    url = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{stored}"}},
        {"type": "text", "text": "?"},
    ]
    answer = {"role": "assistant", "content": "A thing."}
    records = [
        {"id": "roles", "messages": [{"role": "user", "content": "Hé?"}, answer]},
        {"id": "parts", "messages": [{"role": "user", "content": parts}, answer]},
        {"id": "url", "messages": [{"role": "user", "content": url}, answer]},
        {"id": "sic", "image": "im/1.jpg", "conversatons": dialogue()},
        {
            "id": "several",
            "images": ["im/0.jpg", "im/1.jpg"],
            "conversations": dialogue("<image><image> Which?"),
        },
        {"id": "vflan", "question": "Which?", "answer": ["this", "that"], "image": [stored]},
        {"id": "null", "image": None, "conversations": dialogue()},
        {"id": 7, "conversations": dialogue("As a number?")},
        {"conversations": dialogue("No id?")},
    ]
    examples, skipped = built(tmp_path, records, "--heldout", "0")
    assert not reasons(skipped)
    found = everything(examples)
    assert set(found) == {"roles", "parts", "url", "sic", "several", "vflan", "null", "7", "row9"}
    assert [found[name].images for name in ("parts", "url", "vflan")] == [
        (ImageRef(data=picture(number)),) for number in (0, 3, 3)
    ]
    assert found["parts"].turns[0].text.replace("\n", "") == "<image>What is it?"
    assert found["vflan"].turns == (Turn("user", "<image>\nWhich?"), Turn("assistant", "this", True))
    assert len(found["several"].images) == 2 and "qa" not in found["several"].meta
    assert found["roles"].turns[0].text == "Hé?" and not found["null"].images


def test_ids_are_unique_and_stable(tmp_path):
    records = [{"id": "same", "conversations": dialogue(f"Number {i}?")} for i in range(3)]
    records += [records[1], {"id": "copy", "conversations": dialogue("Copied?")}]
    records += [records[-1]]
    examples, skipped = built(tmp_path, records, "--heldout", "0")
    assert reasons(skipped) == {
        "list.json record 4": "is a copy of an earlier record",
        "list.json record 6": "is a copy of an earlier record",
    }
    found = everything(examples)
    assert len(found) == 4 and "copy" in found and "same" not in found
    again, _ = built(tmp_path, records[::-1], "--heldout", "0")
    assert {name: one.turns for name, one in everything(again).items()} == {
        name: one.turns for name, one in found.items()
    }


def test_no_patient_and_no_image_in_two_splits(tmp_path):
    with_pictures(tmp_path, 60)
    rng = np.random.default_rng(0)
    records = [
        {
            "id": f"r{i}",
            "about": {"who": int(rng.integers(60))},
            "images": [f"./im/{rng.integers(60)}.jpg" if i % 2 else f"im//{i % 60}.jpg"],
            "conversations": dialogue(f"Number {i}?"),
        }
        for i in range(45)
    ]
    for argv in ([], ["--split-by", "patient", "--patient", "about.who"]):
        examples, skipped = built(tmp_path, records, "--heldout", "0.3", *argv)
        assert not reasons(skipped) and len(everything(examples)) == 45
        sides = [
            {key(one) for one in examples[side]}
            for side in ("train", "heldout")
            for key in (
                lambda one: one.images[0].data,
                lambda one: one.meta.get("patient", one.meta.get("group")),
            )
        ]
        assert not sides[0] & sides[2] and not sides[1] & sides[3]
        # Held-out records do not depend on the order or on unrelated records.
        more, _ = built(
            tmp_path,
            [{"id": "new", "conversations": dialogue(), "about": {"who": -1}}, *records[::-1]],
            "--heldout",
            "0.3",
            *argv,
        )
        assert {one.id for one in more["heldout"]} - {"new"} == {one.id for one in examples["heldout"]}


def test_the_share_that_is_held_out(tmp_path):
    records = [{"id": str(i), "conversations": dialogue(f"Number {i}?")} for i in range(2000)]
    examples, _ = built(tmp_path, records, "--heldout", "0.2")
    assert 330 < len(examples["heldout"]) < 470
    with pytest.raises(UserError, match="share images or a patient"):
        built(tmp_path, [{"image": "a.png", "conversations": dialogue()}] * 3)


def test_records_that_are_set_aside_are_not_what_is_held_out(tmp_path):
    bad = [7, None, [1], *({"id": f"x{i}", "conversations": dialogue(f"x{i}?")} for i in range(40))]
    good = [{"who": f"P{i}", "id": str(i), "conversations": dialogue(f"{i}?")} for i in range(3)]
    examples, skipped = built(tmp_path, [*bad, *good], "--patient", "who", "--heldout", "0.01")
    assert {side: len(found) for side, found in examples.items()} == {"train": 2, "heldout": 1}
    assert len(skipped["train"]) == len(bad)


def test_reasons_name_no_path(tmp_path):
    (tmp_path / "Doe^John").mkdir()
    records = [
        {"id": "1", "image": "./Doe^Jane/9.png", "conversations": dialogue()},
        {"id": "2", "image": "Doe^John", "conversations": dialogue()},
    ]
    _, skipped = built(tmp_path, records, "--heldout", "0")
    assert list(reasons(skipped).values()) == [
        "its image is missing",
        "its image is a folder, a file was expected",
    ]


def test_an_answer_of_spaces_is_nothing_to_learn(tmp_path):
    _, skipped = built(tmp_path, [{"id": "1", "conversations": dialogue(answer=" \n")}], "--heldout", "0")
    assert reasons(skipped) == {"list.json record 1": "an answer is empty"}


def test_the_key_of_patients(tmp_path):
    records = [{"patient": f"P{i // 2}", "id": str(i), "conversations": dialogue(f"{i}?")} for i in range(9)]
    examples, skipped = built(tmp_path, [*records, {"id": "x"}], "--split-by", "patient", "--heldout", "0.5")
    found = everything(examples)
    assert len({one.meta["patient"] for one in found.values()}) == 5
    assert found["0"].meta["patient"] == found["1"].meta["patient"]
    assert [one.reason for some in skipped.values() for one in some] == ["the patient is missing"]


def test_stated_splits(tmp_path):
    records = [
        {"id": str(i), "part": part, "conversations": dialogue(f"Number {i}?")}
        for i, part in enumerate(["train", "Val", "test", "heldout", "unknown", None, 5])
    ]
    examples, skipped = built(tmp_path, records, "--split", "part")
    assert {split: [one.id for one in some] for split, some in examples.items()} == {
        "train": ["0"], "validation": ["1"], "test": ["2"], "heldout": ["3"],
    }  # fmt: skip
    assert [one.record for some in skipped.values() for one in some] == [
        f"list.json record {n}" for n in (5, 6, 7)
    ]
    assert "unknown'" not in str(reasons(skipped))
    with pytest.raises(UserError, match="no record has a split"):
        built(tmp_path, records, "--split", "partition")


def test_bad_records_are_named_and_do_not_end_it(tmp_path):
    with_pictures(tmp_path)
    write(
        tmp_path, {"im/page.jpg": "<html>not found</html>", "im/scan.nii.gz": b"x" * 400, "im/empty.jpg": b""}
    )
    good = {"id": "good", "who": "p", "conversations": dialogue()}
    bad = {
        "null": None,
        "a list": [1],
        "id is a list": {**good, "id": ["secret"]},
        "id too long": {**good, "id": "s" * 600},
        "no dialogue": {"id": "b1", "who": "p"},
        "text is a list": {**good, "id": "b2", "conversations": [{"from": "human", "value": ["secret"]}]},
        "text is a number": {**good, "id": "b3", "conversations": [{"from": "human", "value": 5}]},
        "turn is null": {**good, "id": "b4", "conversations": [None]},
        "speaker": {**good, "id": "b5", "conversations": [{"from": "secret", "value": "x"}]},
        "dialogue is text": {**good, "id": "b6", "conversations": "secret"},
        "nothing to learn": {**good, "id": "b7", "conversations": dialogue()[:1]},
        "missing image": {**good, "id": "b8", "image": "im/none.jpg"},
        "web page": {**good, "id": "b9", "image": "im/page.jpg"},
        "empty image": {**good, "id": "b10", "image": "im/empty.jpg"},
        "outside": {**good, "id": "b11", "image": "../etc/passwd"},
        "absolute": {**good, "id": "b12", "image": "/etc/passwd"},
        "image is a number": {**good, "id": "b13", "image": 5},
        "image is an object": {**good, "id": "b14", "image": {"secret": 1}},
        "no patient": {"id": "b15", "conversations": dialogue("secret")},
        "extension": {**good, "id": "b16", "vilam3": {"roles": "secret"}},
        "extension is text": {**good, "id": "b17", "vilam3": "secret"},
        "not base64": {**good, "id": "b18", "image": "secret" * 300 + "!"},
        "broken base64": {**good, "id": "b19", "image": "/9j/" + "!" * 96},
        "no picture": {**good, "id": "b20", "image": "data:image/png;base64,c2VjcmV0"},
        "no such long path": {**good, "id": "b21", "image": "im/" + "x" * 400},
    }
    examples, skipped = built(tmp_path, [good, *bad.values()], "--patient", "who", "--heldout", "0")
    assert list(everything(examples)) == ["good"]
    found = reasons(skipped)
    assert sorted(found) == sorted(f"list.json record {2 + i}" for i in range(len(bad)))
    assert "secret" not in str(found) and all("\n" not in reason for reason in found.values())


def test_our_own_export_comes_back(tmp_path):
    with_pictures(tmp_path)
    one = Example(
        "mine",
        "conversation",
        (ImageRef(path="im/0.jpg"),),
        (
            Turn("user", "<image>\nWhat?"),
            Turn("assistant", "This.", True),
            Turn("user", "Why?"),
            Turn("assistant", "So."),
        ),
        meta={"region": "chest"},
    )
    item = {
        "id": "mine",
        "image": "im/0.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "This."},
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "So."},
        ],
        "vilam3": {
            "format": "conversation",
            "roles": ["user", "assistant", "user", "assistant"],
            "supervised": [False, True, False, False],
            "slices": [None],
            "experts": [],
            "meta": {"region": "chest"},
        },
    }
    examples, skipped = built(tmp_path, [json.loads(json.dumps(item))], "--heldout", "0")
    assert not reasons(skipped)
    back = everything(examples)["mine"]
    assert back.turns == one.turns and back.meta["region"] == "chest"
    assert back.images == (ImageRef(data=picture(0)),)


def _objects(values):
    names = (
        "id",
        "image",
        "images",
        "conversations",
        "messages",
        "question",
        "answer",
        "from",
        "value",
        "role",
    )
    return st.dictionaries(
        st.sampled_from([*names, "content", "type", "text", "vilam3", "meta", "slices"]), values
    )


_leaf = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["<image>", "im/0.jpg"])
)
_any = st.recursive(_leaf, lambda inner: st.lists(inner, max_size=3) | _objects(inner), max_leaves=6)


@settings(max_examples=25, deadline=None)
@given(records=st.lists(_objects(_any), min_size=1, max_size=6))
def test_whatever_a_record_holds_it_is_used_or_named(tmp_path_factory, records):
    folder = with_pictures(tmp_path_factory.mktemp("any"), 1)
    for argv in ([], ["--patient", "answer"]):
        examples, skipped = built(folder, records, "--heldout", "0", *argv)
        assert len(everything(examples)) + len(reasons(skipped)) == len(records)


def test_options_that_do_not_go_together(tmp_path):
    for argv, words in (
        (["--heldout", "1"], "share of at least 0"),
        (["--images", str(tmp_path / "none")], "no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            built(tmp_path, [{"id": "a", "conversations": dialogue()}], *argv)
    with pytest.raises(UserError, match="no records; export"):
        built(tmp_path, [])


def test_lines_and_broken_lines(tmp_path):
    lines = [json.dumps({"id": str(i), "conversations": dialogue(f"Number {i}?")}) for i in range(3)]
    raw = "\n".join([lines[0], '{"id": "broken", "conver', "", lines[1], lines[2]])
    examples, skipped = built(tmp_path, None, "--heldout", "0", name="list.jsonl", raw=raw)
    assert list(everything(examples)) == ["0", "1", "2"]
    assert reasons(skipped) == {"list.jsonl record 2": "is not JSON"}


def test_the_command(tmp_path, capsys):
    with_pictures(tmp_path / "pictures")
    records = [
        {"id": f"r{i}", "image": f"im/{i % 4}.jpg", "conversations": dialogue(f"{i}?")} for i in range(6)
    ]
    write(
        tmp_path, {"mine.json": [*records, {"id": "bad", "image": "im/9.jpg", "conversations": dialogue()}]}
    )
    arguments = [
        "instructions",
        "--source",
        str(tmp_path / "mine.json"),
        "--images",
        str(tmp_path / "pictures"),
    ]
    assert prepare.main([*arguments, "--out", str(tmp_path / "out"), "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "skipped 1: its image is missing" in said and "vilam3-experts annotate" in said
    found = {
        split: list(ExampleSource(tmp_path / "out/instructions", split)) for split in ("train", "heldout")
    }
    assert {one.id for some in found.values() for one in some} == {f"r{i}" for i in range(6)}
    one = found["heldout"][0]
    assert one.meta["input_key"] and one.meta["qa"] and one.meta["split"] == "heldout"


def test_lists_of_records_are_small_and_divisible(tmp_path):
    write(
        tmp_path, {"l.json": [{"id": str(i), "conversations": dialogue(f"Number {i}?")} for i in range(1000)]}
    )
    items = instruction_lists.RecordList(instruction_lists.scan(str(tmp_path / "l.json")).records)
    assert len(pickle.dumps(items)) < 40 * len(items)
    assert len(pickle.dumps(items[10:20])) < 1000
    assert [item.place.row for item in items[10:13]] == [11, 12, 13] and items[-1] == items[999]
