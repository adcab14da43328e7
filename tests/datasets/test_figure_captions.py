"""PMC-OA, ROCO and ROCOv2: figures of articles with captions."""

import re

import pytest
from twins import made, picture, write

from vilam3_jax.datasets.figure_captions import modality_of
from vilam3_jax.datasets.pmc_oa import PmcOa
from vilam3_jax.datasets.roco import Roco
from vilam3_jax.datasets.roco_v2 import RocoV2
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

INNER = "caption_T060_filtered_top4_sep_v0_subfigures"


def turns(example):
    return [(turn.role, turn.text, turn.supervised) for turn in example.turns]


@pytest.mark.parametrize(
    "concepts, word",
    [
        (["C0040405", "C0817096"], "CT"),
        (["C1306645", "C0817096"], "CXR"),
        (["C1306645"], "XR"),
        (["C0041618"], "US"),
        (["C0040405", "C0024485"], ""),
        (["C0000000"], ""),
    ],
)
def test_modality_of_concepts(concepts, word):
    assert modality_of(concepts) == word


# --- PMC-OA


@pytest.mark.parametrize(
    "root, argv",
    [(f"images/{INNER}", []), (INNER, []), ("images", []), ("mine/jpg", ["--image-root", "mine/jpg/"])],
)
def test_pmc_oa(tmp_path, root, argv):
    lines = [
        {
            "image": "PMC11_Fig1_2.jpg",
            "caption": " (a) A lung. ",
            "alignment_type": "x",
            "alignment_score": 0.5,
        },
        {"image": "PMC12_Fig3_1.jpg", "caption": "An <image> of a liver", "pmcid": "PMC12"},
    ]
    pictures = {f"{root}/PMC11_Fig1_2.jpg": picture(1), f"{root}/PMC12_Fig3_1.jpg": picture(2)}
    write(tmp_path, {"pmc_oa.jsonl": lines, **pictures})
    examples, skipped = made(PmcOa, tmp_path, argv=argv)
    assert list(examples) == ["train"] and not skipped["train"]
    first, second = examples["train"]
    assert (first.id, first.format, first.images[0].data) == ("PMC11_Fig1_2", "caption", picture(1))
    assert turns(first) == [("user", "<image>", False), ("assistant", "(a) A lung.", True)]
    assert turns(second)[1][1] == "An [image] of a liver"
    assert first.meta["article"] == "PMC11" and first.meta["alignment_score"] == 0.5
    assert first.meta["group"] != second.meta["group"]
    pairs, _ = made(PmcOa, tmp_path, argv=[*argv, "--pairs"])
    assert {one.format for one in pairs["train"]} == {"pair"}


def test_pmc_oa_splits_and_undivided_captions(tmp_path):
    for number, split in enumerate(("train", "valid", "test")):
        row = {"image": f"PMC{number}_F1_1.jpg", "caption": f"caption {number}"}
        write(tmp_path, {f"{split}.jsonl": [row], f"images/PMC{number}_F1_1.jpg": picture(number)})
    write(tmp_path, {"pmc_oa_beta.jsonl": [{"image": "PMC1_F1_1.jpg", "caption": "whole"}]})
    examples, _ = made(PmcOa, tmp_path, "splits")
    assert {name: [one.id for one in found] for name, found in examples.items()} == {
        "train": ["PMC0_F1_1"],
        "validation": ["PMC1_F1_1"],
        "test": ["PMC2_F1_1"],
    }
    assert turns(made(PmcOa, tmp_path, "captions")[0]["train"][0])[1][1] == "whole"
    with pytest.raises(UserError, match=r": pmc_oa\.jsonl missing\. Fetch from"):
        made(PmcOa, tmp_path)
    with pytest.raises(UserError, match=r"figures, pmc_oa\.jsonl missing"):
        made(PmcOa, tmp_path, argv=["--image-root", "figures"])


def test_pmc_oa_lines_that_cannot_be_used(tmp_path):
    good = b'{"image": "PMC1_F1_1.jpg", "caption": "fine", "alignment_score": NaN}\n'
    bad = [
        (b"{", "is not JSON"),
        (b"[1]", "image name is missing|caption is missing"),
        (b'{"image": "PMC1_F1_1.jpg"}', "caption is missing"),
        (b'{"image": "PMC1_F1_1.jpg", "caption": ["x"]}', "caption is a list"),
        (b'{"image": "PMC1_F1_1.jpg", "caption": " "}', "caption is empty"),
        (b'{"image": 4, "caption": "x"}', "4 is missing"),
        (b'{"image": null, "caption": "x"}', "image name is missing"),
        (b'{"image": "../pmc_oa.jsonl", "caption": "x"}', "leaves"),
        (b'{"image": "gone.jpg", "caption": "x"}', "gone.jpg is missing"),
        (b'{"image": "PMC1_F1_1.jpg", "caption": "\\ud800"}', "caption"),
        (b'{"image": "PMC1_F1_1.jpg", "caption": "\xff"}', "is not JSON"),
    ]
    lines = b"".join(line + b"\n" for line, _ in bad)
    write(tmp_path, {"pmc_oa.jsonl": lines + good, "images/PMC1_F1_1.jpg": picture(1)})
    examples, skipped = made(PmcOa, tmp_path)
    assert len(examples["train"]) == 1 and "alignment_score" not in examples["train"][0].meta
    assert [one.record for one in skipped["train"]] == [f"pmc_oa.jsonl row {n}" for n in range(1, 12)]
    for one, (_, reason) in zip(skipped["train"], bad, strict=True):
        assert re.search(reason, one.reason), one
    write(tmp_path, {"pmc_oa.jsonl": b"\n"})
    with pytest.raises(UserError, match=r"pmc_oa\.jsonl: is empty"):
        made(PmcOa, tmp_path)


# --- ROCOv2


def roco_v2(folder, places=("train_images/train", "valid", "test_images")):
    for number, (split, place) in enumerate(zip(("train", "valid", "test"), places, strict=True)):
        names = [f"ROCOv2_2023_{split}_{n:06d}" for n in (1, 2)]
        captions = [["ID", "Caption"], *([name, f"caption, {name}"] for name in names)]
        concepts = [["ID", "CUIs"], [names[1], ""], [names[0], "C1306645;C0817096"]]
        pictures = {f"{place}/{name}.jpg": picture(10 * number + n) for n, name in enumerate(names)}
        write(folder, {f"{split}_captions.csv": captions, f"{split}_concepts.csv": concepts, **pictures})
    return folder


@pytest.mark.parametrize(
    "places",
    [("train_images/train", "valid", "test_images"), ("train", "valid_images/valid", "test_images/test")],
)
def test_roco_v2(tmp_path, places):
    examples, skipped = made(RocoV2, roco_v2(tmp_path, places))
    assert not any(skipped.values())
    assert {name: [one.id for one in found] for name, found in examples.items()} == {
        "train": ["ROCOv2_2023_train_000001", "ROCOv2_2023_train_000002"],
        "validation": ["ROCOv2_2023_valid_000001", "ROCOv2_2023_valid_000002"],
        "test": ["ROCOv2_2023_test_000001", "ROCOv2_2023_test_000002"],
    }
    first, second = examples["validation"]
    assert turns(first) == [
        ("user", "<image>", False),
        ("assistant", "caption, ROCOv2_2023_valid_000001", True),
    ]
    assert first.images[0].data == picture(10) and first.format == "caption"
    assert (first.meta["modality"], first.meta["concepts"]) == ("CXR", ["C1306645", "C0817096"])
    assert second.meta["modality"] == "" and "concepts" not in second.meta
    groups = [{one.meta["group"] for one in found} for found in examples.values()]
    assert len(set.union(*groups)) == 6
    pairs, _ = made(RocoV2, tmp_path, argv=["--pairs"])
    assert pairs["test"][0].format == "pair"


def test_roco_v2_counts_and_missing_files(tmp_path):
    splits = RocoV2().splits(SourceFolder(roco_v2(tmp_path)))
    assert [split.expected for split in splits.values()] == [59_958, 9_904, 9_927]
    (tmp_path / "valid_concepts.csv").unlink()
    (tmp_path / "test_captions.csv").unlink()
    with pytest.raises(UserError, match=r": test_captions\.csv, valid_concepts\.csv missing\. Fetch from"):
        made(RocoV2, tmp_path)


def test_roco_v2_rows_that_cannot_be_used(tmp_path):
    roco_v2(tmp_path)
    name = "ROCOv2_2023_train_000001"
    rows = [
        ["Caption", "ID"],
        ["x", ""],
        ["", name],
        ["x", "ROCOv2_2023_train_000009"],
        ["x", "../x"],
        ["ok", name],
    ]
    write(tmp_path, {"train_captions.csv": rows})
    examples, skipped = made(RocoV2, tmp_path)
    assert [one.record for one in skipped["train"]] == [f"train_captions.csv row {n}" for n in range(1, 5)]
    for one, words in zip(
        skipped["train"], ["name is empty", "caption is empty", "is missing", "leaves"], strict=True
    ):
        assert words in one.reason
    assert [one.id for one in examples["train"]] == [f"{name}/2"]
    write(tmp_path, {"train_captions.csv": [["name", "text"], [name, "x"]]})
    with pytest.raises(UserError, match=r"train_captions\.csv: no column ID, Caption; it has name, text"):
        made(RocoV2, tmp_path)


# --- ROCO


def roco(folder, base="data/", kind="radiology"):
    for number, split in enumerate(("train", "validation", "test")):
        here = f"{base}{split}/{kind}"
        names = [f"ROCO_{10 * number + n:05d}" for n in (1, 2)]
        write(
            folder,
            {
                f"{here}/captions.txt": "".join(f"{name}\t Caption of {name}\n" for name in names),
                f"{here}/cuis.txt": f"{names[0]}\t\tC0040405\tC0001\n{names[1]}\t\n",
                f"{here}/licences.txt": f"ROCO_ID,PMC_ID,CC\n{names[0]},PMC{number}_fig-g001.jpg,CC BY\n",
                **{f"{here}/images/{name}.jpg": picture(10 * number + n) for n, name in enumerate(names)},
            },
        )
    return folder


@pytest.mark.parametrize("base, kind", [("data/", "radiology"), ("", "non-radiology")])
def test_roco(tmp_path, base, kind):
    examples, skipped = made(Roco, roco(tmp_path, base, kind), kind)
    assert not any(skipped.values())
    assert [one.id for one in examples["validation"]] == ["ROCO_00011", "ROCO_00012"]
    first, second = examples["validation"]
    assert turns(first)[1] == ("assistant", "Caption of ROCO_00011", True)
    assert first.images[0].data == picture(10)
    assert first.meta["concepts"] == ["C0040405", "C0001"] and "concepts" not in second.meta
    assert first.meta["modality"] == ("CT" if kind == "radiology" else "")
    assert (first.meta["licence"], first.meta["article"]) == ("CC BY", "PMC1")
    assert second.meta["licence"] == Roco.licence and "article" not in second.meta


def test_roco_lines_that_cannot_be_used(tmp_path):
    roco(tmp_path)
    lines = "private words of a caption\nROCO_00001\nROCO_00001\t \n../x\tcaption\n\nROCO_00002\t ok\n"
    write(tmp_path, {"data/train/radiology/captions.txt": lines})
    examples, skipped = made(Roco, tmp_path)
    assert [one.id for one in examples["train"]] == ["ROCO_00002"]
    assert [one.reason for one in skipped["train"]] == [
        "the line has no ROCO id",
        "the caption is empty",
        "the caption is empty",
        "the line has no ROCO id",
    ]


def test_roco_without_images(tmp_path):
    roco(tmp_path)
    (tmp_path / "data/test/radiology/images/ROCO_00022.jpg").unlink()
    examples, skipped = made(Roco, tmp_path)
    assert [one.id for one in examples["test"]] == ["ROCO_00021"]
    assert skipped["test"][0].reason.endswith("images/ROCO_00022.jpg is missing")
    assert skipped["test"][0].record == "data/test/radiology/captions.txt row 2"
    for folder in (tmp_path / "data").glob("*/radiology/images"):
        folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(
        UserError, match=r"data/train/radiology/images, .*data/test/radiology/images missing\. Clone"
    ):
        made(Roco, tmp_path)
    expected = {kind: 0 for kind in Roco.configs}
    for kind in expected:
        splits = Roco(config=kind).splits(SourceFolder(roco(tmp_path, kind=kind)))
        expected[kind] = sum(split.expected or 0 for split in splits.values())
    assert expected == {"radiology": 81_807, "non-radiology": 6_118}
