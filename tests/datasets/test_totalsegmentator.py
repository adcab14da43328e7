"""`totalsegmentator`: studies of slices and questions from folders of binary masks."""

from __future__ import annotations

import pytest
from scan_twins import SHAPE, body, box, marked, stored
from twins import made, write

from vilam3_jax.data.experts.labels import label_table
from vilam3_jax.datasets import labelled_scans
from vilam3_jax.datasets.totalsegmentator import STRUCTURES, TotalSegmentator, structure_name
from vilam3_jax.errors import UnavailableError, UserError

# Position of each structure; an empty box is an empty mask.
MASKS = {
    "liver": box((8, 24), (8, 24), (4, 12)),
    "lung_upper_lobe_left": box((6, 16), (6, 16), (12, 18)),
    "urinary_bladder": box((10, 18), (10, 18), (2, 5)),
    "kidney_cyst_left": box((20, 26), (20, 26), (6, 9)),
    "kidney_cyst_right": box((0, 0), (0, 0), (0, 0)),
    "brain": box((0, 0), (0, 0), (0, 0)),
    "vertebrae_L3": box((0, 0), (0, 0), (0, 0)),
    "skull": box((0, 0), (0, 0), (0, 0)),
}
HEADER = (
    "image_id;age;gender;institute;study_type;split;manufacturer;scanner_model;kvp;pathology;"
    "pathology_location"
)


def subject(name, seed, codes="RAS", masks=MASKS):
    files = {f"{name}/ct.nii.gz": stored(body(seed), codes)}
    for mask, block in masks.items():
        files[f"{name}/segmentations/{mask}.nii.gz"] = stored(marked({1: block}), codes)
    return files


def table(*rows):
    """In the format of the release: semicolons, a byte order mark, sometimes CRLF."""
    return "\ufeff" + "\r\n".join([HEADER, *rows]) + "\r\n"


ROWS = (
    "s0000;64;m;C;ct abdomen;train;siemens;x;120;no_pathology;",
    "s0001;17.0;f;B;ct thorax;val;;;;;",
    "s0002;;;A;ct;test",
)


@pytest.fixture
def source(tmp_path):
    files = subject("s0000", 0, "LAS") | subject("s0001", 1) | subject("s0002", 2)
    return write(tmp_path, files | {"meta.csv": table(*ROWS)})


def without_note(skipped):
    return [s for split in skipped.values() for s in split if "masks are missing" not in s.reason]


def test_studies(source) -> None:
    examples, skipped = made(TotalSegmentator, source, argv=["--slices", "30"])
    assert not without_note(skipped)
    assert [s.reason for s in skipped["train"]] == [
        f"{STRUCTURES - len(MASKS)} of {STRUCTURES} masks are missing; nothing is asked about them"
    ]
    # The cyst is a lesion of 36 pixels on each slice, so no slice is excluded.
    assert {split: [e.images[0].index for e in found] for split, found in examples.items()} == {
        split: list(range(2, 18)) for split in ("train", "validation", "test")
    }
    one = examples["train"][0]
    assert one.format == "study" and one.images[0].path == "s0000/ct.nii.gz"
    assert (one.meta["sex"], one.meta["age_band"]) == ("M", "60-79")
    assert one.meta["lesions"] == {"left kidney cyst": 1}
    assert "sex" not in examples["test"][0].meta and "age_band" not in examples["test"][0].meta
    assert len({e.meta["patient"] for found in examples.values() for e in found}) == 3


def test_questions_agree_with_the_masks(source) -> None:
    examples, _ = made(TotalSegmentator, source, argv=["--slices", "30", "--records", "questions"])
    place = {structure_name(mask): block[2] for mask, block in MASKS.items()}
    names, answers = set(), []
    for example in examples["train"]:
        index = example.images[0].index
        for asked in example.meta["qa"]:
            if asked["type"] == "lesion_count":
                assert asked["answer"] == "1" and index is None
                continue
            told = asked["question"].replace("vertebra L3", "vertebrae L3")
            (name,) = [n for n in place if n in told]
            where = range(*place[name].indices(SHAPE[2])) if place[name].stop else ()
            assert asked["answer"] == ("yes" if index in where else "no"), (index, told)
            names.add(name)
            answers.append(asked["answer"])
        assert asked["label_source"] == "segmentation"
    assert names == set(place) - {"right kidney cyst"}  # no scan has one
    assert 0.2 < answers.count("yes") / len(answers) < 0.8


def test_absent_structures_of_this_scan_are_asked_first(source) -> None:
    examples, _ = made(TotalSegmentator, source, argv=["--slices", "30", "--records", "questions"])
    plane = next(e for e in examples["train"] if e.id == "s0000:10")  # liver alone
    no = [q["question"] for q in plane.meta["qa"] if q["answer"] == "no" and q["type"] == "organ_present"]
    assert len(no) == 3 and sum("left lung upper lobe" in q or "bladder" in q for q in no) == 2


def test_a_mask_that_cannot_be_read_is_named_and_not_asked_for(source) -> None:
    folder = source / "s0000/segmentations"
    packed = (folder / "liver.nii.gz").read_bytes()
    (folder / "liver.nii.gz").write_bytes(packed[: len(packed) // 2])
    write(source, {"s0000/segmentations/brain.nii.gz": stored(marked({1: MASKS["liver"]})[:20])})
    write(source, {"s0000/segmentations/left_wing.nii.gz": stored(marked({1: MASKS["liver"]}))})
    write(source, {"s0000/segmentations/._liver.nii.gz": b"apple"})
    examples, skipped = made(TotalSegmentator, source, argv=["--slices", "30", "--records", "questions"])
    said = {s.record: s.reason for s in without_note(skipped)}
    assert list(said) == [f"meta.csv row 1, mask {m}" for m in ("brain", "left_wing", "liver")]
    assert "none of the structures" in said["meta.csv row 1, mask left_wing"]
    questions = [q["question"] for e in examples["train"] for q in e.meta["qa"]]
    assert questions and not any("liver" in q or "brain" in q for q in questions)


def test_a_disk_that_fails_ends_the_build(source, monkeypatch) -> None:
    def fails(*_args, **_kwargs):
        raise UnavailableError("the disk fails")

    monkeypatch.setattr(labelled_scans, "load_label_map", fails)
    with pytest.raises(UnavailableError):
        made(TotalSegmentator, source)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (";64;m;C;ct;train", "states no image_id"),
        ("../s0001;64;m;C;ct;train", "states no image_id"),
        ("s0001;64;m;C;ct;val", "is a duplicate"),
        ("s0000;64;m;C;ct;fold3", "none of train, val and test"),
        ("s0000;64", "none of train, val and test"),
        ("s0404;64;m;C;ct;train", "is missing"),
    ],
)
def test_a_bad_row_is_named(source, row, reason) -> None:
    write(source, {"meta.csv": table(ROWS[1], row)})
    examples, skipped = made(TotalSegmentator, source, argv=["--slices", "1"])
    assert len(examples["validation"]) == 1
    ((record, said),) = [(s.record, s.reason) for s in without_note(skipped)]
    assert record == "meta.csv row 2" and reason in said


def test_a_subject_without_masks_or_with_a_cut_scan(source) -> None:
    scan = source / "s0000/ct.nii.gz"
    scan.write_bytes(scan.read_bytes()[:2000])
    for mask in (source / "s0001/segmentations").iterdir():
        mask.unlink()
    examples, skipped = made(TotalSegmentator, source, argv=["--slices", "1"])
    assert [len(found) for found in examples.values()] == [0, 0, 1]
    assert [s.record for s in without_note(skipped)] == ["meta.csv row 1", "meta.csv row 2"]


def test_a_subject_of_which_no_mask_can_be_read(source) -> None:
    for mask in (source / "s0000/segmentations").iterdir():
        mask.write_bytes(b"no mask")
    _, skipped = made(TotalSegmentator, source, argv=["--records", "questions"])
    assert skipped["train"][-1].reason == "has no label map that answers questions"
    assert len(without_note(skipped)) == len(MASKS) + 1
    examples, _ = made(TotalSegmentator, source, argv=["--slices", "2"])
    assert len(examples["train"]) == 2 and "qa" not in examples["train"][0].meta


def test_other_versions_are_named(source) -> None:
    write(source, {"meta.csv": table(*(f"s{n:04};1;m;C;ct;train" for n in range(1939)))})
    with pytest.raises(UserError, match=r"1939 subjects, as v3.0.0 has.*10047292"):
        made(TotalSegmentator, source)
    write(source, {"meta.csv": table(*(f"s{n:04};1;m;C;ct;train" for n in range(1204)))})
    with pytest.raises(UserError, match="1204 subjects, as v1 has"):
        made(TotalSegmentator, source)
    write(source, {"meta.csv": table(*ROWS), "s0000/segmentations/heart_myocardium.nii.gz": b"x"})
    with pytest.raises(UserError, match="masks of v1, such as heart_myocardium"):
        made(TotalSegmentator, source)


def test_missing_columns_and_files_are_named(source, tmp_path) -> None:
    write(source, {"meta.csv": "image_id,split\ns0000,train\n"})
    with pytest.raises(UserError, match=r"no column image_id, split; it has image_id,split"):
        made(TotalSegmentator, source)
    (source / "meta.csv").unlink()
    with pytest.raises(UserError, match=r"meta.csv.*missing.*zenodo.org/records/10047292"):
        made(TotalSegmentator, source)


def test_the_unpacked_archive_and_any_order_of_columns(tmp_path) -> None:
    files = subject("s0001", 1) | {"meta.csv": "split;Gender;image_id\nVAL;F;s0001\n"}
    write(tmp_path, {f"Totalsegmentator_dataset_v201/{name}": content for name, content in files.items()})
    examples, _ = made(TotalSegmentator, tmp_path, argv=["--slices", "2"])
    assert [e.meta["sex"] for e in examples["validation"]] == ["F", "F"]
    assert examples["validation"][0].images[0].path == "Totalsegmentator_dataset_v201/s0001/ct.nii.gz"


def test_every_structure_of_the_experts_has_a_name() -> None:
    table = set(label_table("VISTA3D").values())
    for name in ("vertebrae_S1", "rib_left_12", "portal_vein_and_splenic_vein", "atrial_appendage_left"):
        assert structure_name(name) in table
    assert structure_name("heart_myocardium") is None
