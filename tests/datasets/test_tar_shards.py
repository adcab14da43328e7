"""WebDataset shards and COYO from tar files: grouping, output of img2dataset, hostile members."""

import io
import json
import tarfile

import pytest
from twins import made, picture, write

from vilam3_jax.datasets import tar_shards
from vilam3_jax.datasets.coyo import Coyo
from vilam3_jax.datasets.dataset import Context, Skipped
from vilam3_jax.datasets.webdataset import WebDataset
from vilam3_jax.errors import UserError


def tar(members, form=tarfile.USTAR_FORMAT):
    """Builds a tar of (name, bytes) pairs and prepared members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, data = member
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def special(name, kind, target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def pair(key, number, caption="a made-up scene", **values):
    return [
        (f"{key}.jpg", picture(number)),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", {"key": key, "caption": caption, "status": "success", "url": "u"} | values),
    ]


def reasons(skipped, split="train"):
    return {one.record: one.reason for one in skipped[split]}


def read(tmp_path, members, **kwargs):
    write(tmp_path, {"s.tar": members if isinstance(members, bytes) else tar(members, **kwargs)})
    found = list(tar_shards.samples(Context(str(tmp_path), "own"), "s.tar"))
    samples = [one for one in found if isinstance(one, tar_shards.Sample)]
    return samples, [one for one in found if isinstance(one, Skipped)]


def test_the_grouping_rule(tmp_path):
    samples, skipped = read(
        tmp_path,
        [
            ("a/b.c/one.two.JPG", b"1"),
            ("a/b.c/one.txt", b"2"),
            ("noextension", b"3"),
            (".hidden.txt", b"4"),
            ("./a/one.txt", b"5"),
            ("two.txt", b"6"),
            ("two.txt", b"7"),
            ("three.txt", b"8"),
            ("a/b.c/one.json", b"9"),
        ],
    )
    assert [(one.key, dict(one.parts), one.problem) for one in samples] == [
        ("a/b.c/one", {"two.jpg": b"1", "txt": b"2"}, None),
        ("a/one", {"txt": b"5"}, None),
        ("two", {"txt": b"6"}, "has two members .txt"),
        ("three", {"txt": b"8"}, None),
    ]
    assert skipped == [Skipped("s.tar:a/b.c/one", "its members are not adjacent")]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_tar(tmp_path, form):
    name = "d/" * 30 + "k" * 60
    (one,), _ = read(tmp_path, [(f"{name}.txt", "ü".encode())], form=form)
    assert (one.key, one.parts["txt"]) == (name, "ü".encode())


def test_hostile_members_are_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_shards, "_MAX_MEMBER_BYTES", 5000)
    huge = tarfile.TarInfo("huge.jpg")
    huge.size = 6000
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member in (
            special("link.jpg", tarfile.SYMTYPE),
            special("hard.jpg", tarfile.LNKTYPE),
            special("device.jpg", tarfile.CHRTYPE),
            special("pipe.jpg", tarfile.FIFOTYPE),
        ):
            archive.addfile(member)
        archive.addfile(huge, io.BytesIO(bytes(6000)))
        for name in ("/abs.txt", "../up.txt", "good.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    samples, skipped = read(tmp_path, buffer.getvalue())
    assert not skipped and {one.key: one.problem for one in samples} == {
        "link": "a member is a link, a device or a sparse file",
        "hard": "a member is a link, a device or a sparse file",
        "device": "a member is a link, a device or a sparse file",
        "pipe": "a member is a link, a device or a sparse file",
        "huge": "a member has 6000 bytes; up to 5000 are read",
        "/abs": "a member's path is absolute or leaves the shard",
        "../up": "a member's path is absolute or leaves the shard",
        "good": None,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]


def test_headers_that_would_fill_the_memory(tmp_path):
    info = tarfile.TarInfo("long.txt")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2 << 20
    data = info.tobuf(tarfile.GNU_FORMAT) + b"n" * (2 << 20) + bytes(1024)
    samples, skipped = read(tmp_path, tar([("a.txt", b"1")])[:1024] + data)
    assert skipped == [Skipped("s.tar", "is damaged (ReadError); download it again")]
    assert [one.problem for one in samples] == ["may lack members, because its shard is damaged after it"]


@pytest.mark.parametrize("cut", [700, 1536, 1600, 2048, 2100])
def test_a_shard_that_is_cut_off_says_so(tmp_path, cut):
    whole = tar([("a.txt", b"1"), ("b.txt", b"2" * 600), ("b.json", b"{}")])
    samples, skipped = read(tmp_path, whole[:cut])
    assert len(skipped) == 1 and skipped[0].record == "s.tar"
    assert all(one.problem or one.key == "a" for one in samples)


def test_what_is_no_tar(tmp_path):
    write(tmp_path, {"train.tar": b"<html>", "empty.tar": b"", "fine.tar": tar(pair("a", 1))})
    examples, skipped = made(WebDataset, tmp_path)
    assert [one.id for one in examples["train"]] == ["fine/a"]
    assert [(one.record, one.reason.split(";")[0]) for one in skipped["train"]] == [
        ("empty.tar", "is not a tar file"),
        ("train.tar", "is not a tar file"),
    ]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"contains no \.tar file"):
        made(WebDataset, tmp_path / "none")
    write(tmp_path, {"b.tar.gz": b"x"})
    with pytest.raises(UserError, match=r"b\.tar\.gz: a compressed shard"):
        made(WebDataset, tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    members = [("a.jpg", picture(1)), ("a.txt", "\ufeffa made-up scene".encode())]
    write(tmp_path, {"0.tar": tar(members)})
    examples, _ = made(WebDataset, tmp_path)
    assert examples["train"][0].turns[1].text == "a made-up scene"


def test_webdataset_captions_and_splits(tmp_path):
    bad = [
        *pair("failed", 2, status="failed_to_download"),
        ("nocaption.jpg", picture(3)),
        ("nopicture.txt", b"x"),
        ("two.jpg", picture(4)),
        ("two.png", picture(5, kind="PNG")),
        ("two.txt", b"x"),
        ("page.jpg", b"<html></html>"),
        ("page.txt", b"x"),
        ("badjson.jpg", picture(6)),
        ("badjson.json", b"{"),
        ("listjson.jpg", picture(7)),
        ("listjson.json", [1]),
        ("latin.jpg", picture(8)),
        ("latin.txt", b"\xe9"),
        ("null.jpg", picture(9)),
        ("null.json", {"caption": None}),
        ("number.jpg", picture(10)),
        ("number.json", {"caption": {"x": 1}}),
    ]
    write(
        tmp_path,
        {
            "train-000.tar": tar(
                [*pair("0", 0), *bad, ("laion.jpg", picture(1)), ("laion.json", {"TEXT": "large"})]
            ),
            "val/000.tar": tar(pair("0", 11)),
            "test_1.tar": tar(pair("0", 12)),
            "00001/000010000.jpg": picture(13),
            "00001/000010000.txt": "of a folder",
        },
    )
    examples, skipped = made(WebDataset, tmp_path)
    assert {split: [(one.id, one.turns[1].text) for one in some] for split, some in examples.items()} == {
        "test": [("test_1/0", "a made-up scene")],
        "train": [
            ("00001/000010000", "of a folder"),
            ("train-000/0", "a made-up scene"),
            ("train-000/laion", "large"),
        ],
        "validation": [("val/000/0", "a made-up scene")],
    }
    assert examples["train"][1].images[0].data == picture(0)
    assert set(reasons(skipped)) == {
        f"train-000.tar:{key}"
        for key in (
            "failed",
            "nocaption",
            "nopicture",
            "two",
            "page",
            "badjson",
            "listjson",
            "latin",
            "null",
            "number",
        )
    }
    assert "status" in reasons(skipped)["train-000.tar:failed"]


def test_webdataset_dialogues(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "No."}]
    write(
        tmp_path,
        {
            "a.tar": tar(
                [
                    ("1.jpg", picture(1)),
                    ("1.json", {"image": "old/name.jpg", "conversations": turns, "who": "P1"}),
                    ("2.json", {"conversations": turns, "who": 5}),
                    ("3.json", {"conversations": turns}),
                    ("4.jpg", picture(2)),
                    ("4.json", {"conversations": "x", "who": "P1"}),
                ]
            )
        },
    )
    examples, skipped = made(
        WebDataset, tmp_path, "conversation", argv=["--patient", "who", "--modality", "CT"]
    )
    first, second = examples["train"]
    assert first.turns[0].text == "<image>\nWhat?" and first.images[0].data == picture(1)
    assert first.meta["qa"][0]["options"] == ["yes", "no"] and first.meta["modality"] == "CT"
    assert not second.images and second.meta["patient"] != first.meta["patient"]
    assert reasons(skipped)["a.tar:3"] == "the patient is missing" and "a.tar:4" in reasons(skipped)


def test_coyo_documents_of_four(tmp_path):
    samples = [
        member
        for i in range(7)
        for member in pair(
            f"00000000{i}", i, f"text {i} <image>", clip_similarity_vitl14=i / 10, watermark_score=0.1
        )
    ]
    samples += pair("000000008", 8)
    write(tmp_path, {"00000.tar": tar(samples), "00000.parquet": b"unread", "00000_stats.json": "{}"})
    examples, skipped = made(Coyo, tmp_path)
    assert [len(one.images) for one in examples["train"]] == [4, 4] and not skipped["train"]
    assert [turn.text for turn in examples["train"][0].turns] == [
        f"<image>text {i} [image]" for i in range(4)
    ]
    examples, skipped = made(Coyo, tmp_path, argv=["--min-similarity", "0.3", "--max-watermark", "0.5"])
    assert [one.id for one in examples["train"]] == ["00000/000000003"] and len(skipped["train"]) == 4
    assert "save that column" in reasons(skipped)["00000.tar:000000008"]
    captions, _ = made(Coyo, tmp_path, "caption")
    assert [one.format for one in captions["train"]] == ["caption"] * 8
