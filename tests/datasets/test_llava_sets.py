"""LLaVA's caption lists, LLaVA-Med, ShareGPT4V and MedQA from synthetic copies of their layouts."""

import io
import zipfile

import pytest
from twins import made, picture, write

from vilam3_jax.data.examples import ImageRef, Turn
from vilam3_jax.datasets import registry
from vilam3_jax.datasets.cc3m_595k import Cc3m595k
from vilam3_jax.datasets.llava_med import LlavaMed
from vilam3_jax.datasets.llava_pretrain import LlavaPretrain
from vilam3_jax.datasets.medqa import MedQa
from vilam3_jax.datasets.sharegpt4v import ShareGpt4V
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError


def zipped(files, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def chat(name, image, question="Describe it.\n<image>", answer="a made-up scene"):
    return {
        "id": name,
        "image": image,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


def reasons(skipped, split="train"):
    return {one.record: one.reason for one in skipped[split]}


def ids(examples, split="train"):
    return [one.id for one in examples[split]]


@pytest.mark.parametrize("name", ["cc3m_595k", "llava_pretrain", "llava_med", "sharegpt4v", "medqa"])
def test_registered(name, tmp_path):
    dataset = registry.get(name)
    assert dataset.name == name and dataset.instructions and dataset.licence
    with pytest.raises(UserError, match="missing"):
        dataset().splits(SourceFolder(tmp_path))


CC3M = [chat(f"GCC_train_00000000{i}", f"GCC_train_00000000{i}.jpg", answer=f"scene {i}") for i in range(3)]
CC3M[1] = chat(CC3M[1]["id"], CC3M[1]["image"], question="<image>\nWhat is shown?", answer="scene 1")


@pytest.mark.parametrize("layout", ["folder", "flat zip", "zip with folder"])
def test_cc3m_captions_from_each_layout(tmp_path, layout):
    prefix = "" if layout == "flat zip" else "images/"
    pictures = {f"{prefix}{record['image']}": picture(i) for i, record in enumerate(CC3M)}
    write(tmp_path, {"chat.json": CC3M})
    write(tmp_path, pictures if layout == "folder" else {"images.zip": zipped(pictures)})
    examples, skipped = made(Cc3m595k, tmp_path)
    assert not skipped["train"]
    assert [(one.id, one.format, one.turns[1].text) for one in examples["train"]] == [
        (f"GCC_train_00000000{i}", "caption", f"scene {i}") for i in range(3)
    ]
    assert examples["train"][2].images == (ImageRef(data=picture(2)),)
    dialogues, _ = made(Cc3m595k, tmp_path, "conversation")
    assert [one.turns[0].text for one in dialogues["train"][:2]] == [
        "Describe it.\n<image>",
        "<image>\nWhat is shown?",
    ]
    assert {one.format for one in made(Cc3m595k, tmp_path, "pair")[0]["train"]} == {"pair"}


def test_cc3m_captions_of_blip(tmp_path):
    rows = [
        {"id": r["id"], "image": r["image"], "caption": "alt", "blip_caption": f"blip {i}", "url": "u"}
        for i, r in enumerate(CC3M)
    ]
    rows[1].pop("blip_caption")
    rows[2]["blip_caption"] = ["x"]
    write(
        tmp_path, {"metadata.json": rows} | {f"images/{r['image']}": picture(i) for i, r in enumerate(CC3M)}
    )
    examples, skipped = made(Cc3m595k, tmp_path, "blip")
    assert [one.turns[1].text for one in examples["train"]] == ["blip 0"]
    assert reasons(skipped) == {
        "metadata.json record 2": "has no BLIP caption",
        "metadata.json record 3": "the BLIP caption is a list, not a text",
    }


def test_damaged_archives_and_members(tmp_path):
    files = {record["image"]: picture(i) for i, record in enumerate(CC3M)}
    data = bytearray(zipped(files))
    start = data.index(files[CC3M[1]["image"]])
    data[start + 50 : start + 60] = bytes(10)
    write(
        tmp_path,
        {"chat.json": [*CC3M, chat("gone", "gone.jpg"), chat("out", "../x.jpg")], "images.zip": bytes(data)},
    )
    examples, skipped = made(Cc3m595k, tmp_path)
    assert ids(examples) == [CC3M[0]["id"], CC3M[2]["id"]]
    assert reasons(skipped) == {
        "chat.json record 2": "image GCC_train_000000001.jpg in images.zip is damaged (BadZipFile)",
        "chat.json record 4": "image gone.jpg is not in images.zip",
        "chat.json record 5": "image 0 path '../x.jpg' leaves the data root",
    }
    write(tmp_path, {"images.zip": b"no archive"})
    with pytest.raises(UserError, match=r"images.zip: is not a zip archive"):
        made(Cc3m595k, tmp_path)


def test_an_archive_that_unpacks_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr("vilam3_jax.datasets.image_files.MAX_IMAGE_BYTES", 10_000)
    bomb = zipped({CC3M[0]["image"]: bytes(20_000)}, zipfile.ZIP_DEFLATED)
    write(tmp_path, {"chat.json": CC3M[:1], "images.zip": bomb})
    _, skipped = made(Cc3m595k, tmp_path)
    assert "has 20000 bytes" in skipped["train"][0].reason


def test_llava_pretrain_reads_folders_packed_or_not(tmp_path):
    records = [chat("004539375", "00453/004539375.jpg"), chat("x", "00453/page.jpg")]
    files = {"00453/004539375.jpg": picture(1), "00453/page.jpg": b"<html></html>"}
    for prefix in ("images/", "zip", "00000"):
        folder = tmp_path / prefix.strip("/")
        write(
            folder,
            {"blip_laion_cc_sbu_558k.json": records, "00000/a.jpg": picture(0)}
            if prefix == "00000"
            else {"blip_laion_cc_sbu_558k.json": records},
        )
        if prefix == "zip":
            write(folder, {"images.zip": zipped(files)})
        else:
            write(
                folder,
                {f"{'images/' if prefix == 'images/' else ''}{name}": data for name, data in files.items()},
            )
        examples, skipped = made(LlavaPretrain, folder)
        assert ids(examples) == ["004539375"], prefix
        assert "is not an image file: web page" in skipped["train"][0].reason


def test_llava_med_aliases_domains_and_articles(tmp_path):
    domain = dict.fromkeys(("chest_xray", "mri", "histology", "gross", "ct_scan"), False)
    records = [
        chat("1", "123_F1.jpg") | {"domain": {**domain, "mri": True}},
        chat("2", "123_F2.jpg") | {"domain": {**domain, "mri": True, "ct_scan": True}},
        chat("3", "124_F1.jpg") | {"domain": ["mri"]},
    ]
    records[1]["conversatons"] = records[1].pop("conversations")
    write(tmp_path, {"llava_med_alignment_500k.json": records})
    write(tmp_path, {f"images/{record['image']}": picture(i) for i, record in enumerate(records)})
    examples, skipped = made(LlavaMed, tmp_path)
    assert not skipped["train"]
    assert [one.meta["modality"] for one in examples["train"]] == ["MR", "", ""]
    groups = [one.meta["group"] for one in examples["train"]]
    assert groups[0] == groups[1] != groups[2]
    assert examples["train"][1].turns[0].text == "Describe it.\n<image>"


def test_llava_med_questions_of_the_evaluation(tmp_path):
    rows = [
        {
            "question_id": 0,
            "image": "9_F1.jpg",
            "text": "What is made up?\n<image>",
            "gpt4_answer": "All.",
            "pair_id": "p",
        },
        {"question_id": 1, "image": "9_F1.jpg", "text": None, "gpt4_answer": "x"},
    ]
    write(tmp_path, {"llava_med_eval_qa50_qa.jsonl": rows, "images/9_F1.jpg": picture(0)})
    examples, skipped = made(LlavaMed, tmp_path, "eval")
    (one,) = examples["test"]
    assert one.turns == (Turn("user", "<image>\nWhat is made up?"), Turn("assistant", "All.", True))
    assert one.meta["qa"][0]["question"] == "What is made up?"
    assert one.meta["qa"][0]["label_source"] == "GPT-4" and one.meta["split"] == "test"
    assert skipped["test"][0].reason == "the question is missing"


SHARE = "share-captioner_coco_lcs_sam_1246k_1107.json"


@pytest.mark.parametrize("below", ["", "data/"])
def test_sharegpt4v_needs_its_folders(tmp_path, below):
    records = [
        chat("a", "coco/train2017/1.jpg"),
        chat("b", "sam/images/sa_1.jpg"),
        {"id": "t", "conversations": chat("", "", "Only text?")["conversations"]},
        chat("c", "vg/VG_100K_2/1.jpg"),
        chat("a", "coco/train2017/1.jpg", answer="another description"),
    ]
    write(
        tmp_path,
        {
            SHARE: records,
            f"{below}coco/train2017/1.jpg": picture(0),
            f"{below}vg/VG_100K_2/1.jpg": picture(1),
        },
    )
    with pytest.raises(UserError, match="sam/images missing") as error:
        made(ShareGpt4V, tmp_path)
    assert "vg/VG_100K missing" not in str(error.value)
    examples, skipped = made(ShareGpt4V, tmp_path, argv=["--leave-out", "sam/images"])
    assert not skipped["train"] and len(set(ids(examples))) == 4
    assert [len(one.images) for one in examples["train"]] == [1, 0, 1, 1]
    with pytest.raises(UserError, match="names no such folder"):
        made(ShareGpt4V, tmp_path, argv=["--leave-out", "sam"])


def medqa(**values):
    return {
        "question": "A made-up man asks: which?",
        "answer": "Second",
        "options": {"A": "First", "B": "Second", "C": "Third", "D": "Fourth"},
        "meta_info": "step1",
        "answer_idx": "B",
        "metamap_phrases": ["man"],
    } | values


@pytest.mark.parametrize("folder", ["", "data_clean/questions/US/4_options/"])
def test_medqa(tmp_path, folder):
    bad = [
        medqa(answer_idx="C"),
        medqa(options=["First", "Second"]),
        medqa(answer_idx=None),
        medqa(question=["x"]),
        medqa(options={"A": "First", "B": None}),
        [1],
        medqa(answer_idx="E"),
    ]
    write(
        tmp_path,
        {f"{folder}phrases_no_exclude_train.jsonl": [medqa(), *bad, medqa(answer="Fourth", answer_idx="D")]},
    )
    write(tmp_path, {f"{folder}phrases_no_exclude_test.jsonl": [medqa(meta_info="step2&3")]})
    examples, skipped = made(MedQa, tmp_path)
    assert list(examples) == ["train", "test"]
    assert len(skipped["train"]) == len(bad) and not skipped["test"]
    first, last = examples["train"]
    assert first.turns[0].text.splitlines()[:5] == [
        "A made-up man asks: which?",
        "A. First",
        "B. Second",
        "C. Third",
        "D. Fourth",
    ]
    assert first.turns[1] == Turn("assistant", "B. Second", True) and last.turns[1].text == "D. Fourth"
    qa = first.meta["qa"][0]
    assert qa["answer"] == "Second" and qa["options"] == ["First", "Second", "Third", "Fourth"]
    assert first.id != examples["test"][0].id and examples["test"][0].meta["step"] == "step2&3"
    write(tmp_path, {f"{folder}phrases_no_exclude_dev.jsonl": [medqa()]})
    maker = MedQa()
    splits = maker.splits(SourceFolder(tmp_path))
    assert {name: split.expected for name, split in splits.items()} == {
        "train": 10_178,
        "validation": 1_272,
        "test": 1_273,
    }
