"""MMC4 from synthetic shards: position and selection of images, and skipped records."""

import io
import json
import zipfile

import pytest
from twins import made, picture, write

from vilam3_jax.datasets.mmc4 import Mmc4
from vilam3_jax.errors import UserError

SHARD = "docs_no_face_shard_12_v3.jsonl"


def image(name: object, sentence: object, similarity: object = 0.3):
    return {
        "image_name": name,
        "raw_url": "https://example.org/x.jpg",
        "matched_text_index": sentence,
        "matched_sim": similarity,
        "face_detections": None,
    }


def page(images, sentences=("One.", "Two <image>.", "Three."), **values):
    return {
        "text_list": list(sentences),
        "url": "https://example.org/page",
        "image_info": images,
        "similarity_matrix": [],
        "could_have_url_duplicate": 0,
    } | values


def reasons(skipped):
    return {one.record: one.reason for one in skipped["train"]}


def test_images_stand_before_their_sentences(tmp_path):
    documents = [
        page([image("c.jpg", 2), image("a.jpg", 0), image("b.jpg", 0), image("gone.jpg", 1)]),
        page([image("gone.jpg", 0)]),
        page([image("d.png", 1, 0.1), image("a.jpg", 2, 0.4)]),
    ]
    write(tmp_path, {SHARD: documents, "images/a.jpg": picture(1), "images/b.jpg": picture(2)})
    write(tmp_path, {"images/12/c.jpg": picture(3), "images/d.png": picture(4, kind="PNG")})
    examples, skipped = made(Mmc4, tmp_path)
    first, second = examples["train"]
    assert first.format == "document" and first.id == "docs_no_face_shard_12_v3/1"
    assert [turn.text for turn in first.turns] == ["<image><image>One. Two [image]. <image>Three."]
    assert [one.data for one in first.images] == [picture(1), picture(2), picture(3)]
    assert first.meta["images_left_out"] == 1 and second.id.endswith("/3")
    assert reasons(skipped) == {f"{SHARD} record 2": "none of its 1 images can be used"}
    examples, _ = made(Mmc4, tmp_path, argv=["--min-similarity", "0.2"])
    assert [len(one.images) for one in examples["train"]] == [3, 1]


def test_the_most_similar_six_are_taken(tmp_path):
    listed = [image(f"{i}.jpg", i, [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6][i]) for i in range(8)]
    write(tmp_path, {SHARD: [page(listed, [f"S{i}." for i in range(8)])]})
    write(tmp_path, {f"images/{i}.jpg": picture(i) for i in range(8)})
    examples, _ = made(Mmc4, tmp_path)
    (one,) = examples["train"]
    assert one.turns[0].text == "S0. <image>S1. S2. <image>S3. <image>S4. <image>S5. <image>S6. <image>S7."
    examples, _ = made(Mmc4, tmp_path, argv=["--max-images", "2"])
    (one,) = examples["train"]
    assert [ref.data for ref in one.images] == [picture(1), picture(3)]


def test_packed_shards_and_bad_lines(tmp_path):
    good = page([image("a.jpg", 0)])
    bad = [
        page([image("a.jpg", 3)]),
        page([image("a.jpg", -1)]),
        page([image("a.jpg", "0")]),
        page([image("a.jpg", 0, None)]),
        page([image("a.jpg", 0, float("nan"))]),
        page([image("../a.jpg", 0)]),
        page([image(5, 0)]),
        page([None, "x"]),
        page([]),
        page(None),
        page([image("a.jpg", 0)], sentences=["One.", None, "x"]),
        page([image("a.jpg", 0)], text_list="One."),
        [1],
        None,
    ]
    lines = [json.dumps(line) for line in [*bad, good]]
    lines.insert(0, "{broken")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("docs_shard_3_v2.jsonl", "\n".join(lines))
    write(tmp_path, {"docs_shard_3_v2.jsonl.zip": buffer.getvalue(), "images/a.jpg": picture(0)})
    write(tmp_path, {"docs_shard_4_v2.jsonl.zip": b"no archive"})
    examples, skipped = made(Mmc4, tmp_path)
    assert [one.id for one in examples["train"]] == ["docs_shard_3_v2/16"]
    assert len(skipped["train"]) == len(bad) + 2
    assert reasons(skipped)["docs_shard_4_v2.jsonl.zip"].startswith("is damaged")


def test_archives_of_macos_and_shards_that_were_unpacked_too(tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(SHARD, json.dumps(page([image("a.jpg", 0)])))
        archive.writestr(f"__MACOSX/._{SHARD}", b"\0\5\x16\7")
    write(tmp_path, {f"{SHARD}.zip": packed.getvalue(), "images/a.jpg": picture(1)})
    for _ in range(2):
        examples, skipped = made(Mmc4, tmp_path)
        assert len(examples["train"]) == 1 and not skipped["train"]
        write(tmp_path, {SHARD: [page([image("a.jpg", 0)])]})


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"docs_.*missing"):
        made(Mmc4, tmp_path)
    write(tmp_path, {SHARD: []})
    with pytest.raises(UserError, match=r"images or images.zip missing|images, images.zip missing"):
        made(Mmc4, tmp_path)
