"""`expert_slices`: selection of slices of annotated scans, and splits by patient."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest

from tests.data.data_worlds import annotate
from tests.data.dialogue_worlds import ROLES, scene, setting
from vilam3_jax.data.content_keys import image_key, inputs_key
from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.dialogues.rules import RULES
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment, failed
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.images import encode_png, load_pixels
from vilam3_jax.data.render import ImageReader
from vilam3_jax.data.volumes import read_volume
from vilam3_jax.datasets.dataset import Skipped, examples_of
from vilam3_jax.datasets.expert_slices import ExpertSlices, find_studies
from vilam3_jax.datasets.labelled_scans import held_names
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

SHAPE = (24, 24, 20)


def scan(folder: Path, name: str, seed: int) -> str:
    """A body in planes 2 to 17; returns the content key."""
    voxels = np.full(SHAPE, -1000, np.int16)
    voxels[3:21, 3:21, 2:18] = np.random.default_rng(seed).integers(0, 80, (18, 18, 16))
    folder.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, np.diag([-1.0, -1.0, 2.0, 1.0]))
    image.header.set_xyzt_units("mm")
    nib.save(image, folder / name)
    return read_volume(folder / name, modality="CT").content_key


def said_of(key: str, args: str, planes: dict[int, tuple[str, slice, int]], expert="VISTA3D") -> Annotation:
    """Labels as squares on a range of planes."""
    labels = np.zeros(SHAPE, np.uint8)
    segments = []
    for label_id, (name, z, side) in planes.items():
        labels[4 : 4 + side, 4 : 4 + side, z] = label_id
        voxels = int((labels == label_id).sum())
        segments.append(Segment(label_id, name, voxels, voxels / 500, 1, (0, 0, 0, 1, 1, 1)))
    encoded = LabelMap.encode(labels, np.eye(4))
    return Annotation(key, expert, args, segments=tuple(segments), labels=encoded)


@pytest.fixture
def world(tmp_path):
    data = tmp_path / "data"
    keys = [scan(data, f"{name}.nii.gz", n) for n, name in enumerate("abc")]
    scan(data, "never.nii.gz", 9)
    annotate(
        tmp_path / "said",
        [
            said_of(keys[0], "organs", {1: ("liver", slice(0, 8), 12)}),
            said_of(
                keys[1],
                "hepatic tumor",
                {1: ("liver", slice(4, 12), 12), 26: ("hepatic tumor", slice(6, 10), 6)},
            ),
            failed(keys[2], "VISTA3D", "organs", "out of memory"),
        ],
    )
    return tmp_path


def built(world, variant="ct", *argv, data="data", **settings):
    """Returns (examples by split, [(record, reason)] of skipped ones)."""
    parser = argparse.ArgumentParser()
    ExpertSlices.add_arguments(parser)
    given = ["--annotations", str(world / "said"), *argv]
    maker = ExpertSlices(parser.parse_args(given), variant)
    source = SourceFolder(world / data)
    examples, skipped = {}, []
    for name, split in maker.splits(source).items():
        assert pickle.dumps(split)  # sent to other processes
        found = list(examples_of(split, maker.context(source, name, **settings)))
        examples[name] = [one for one in found if isinstance(one, Example)]
        skipped += [(one.record, one.reason) for one in found if isinstance(one, Skipped)]
    return examples, skipped


def test_slices_with_enough_on_them(world) -> None:
    examples, skipped = built(world, "ct", "--slices", "30")
    by_scan: dict[str, list[int]] = {}
    for example in examples["train"]:
        name, index = example.id.rsplit(":", 1)
        by_scan.setdefault(name, []).append(int(index))
        assert example.images[0].index == int(index) and example.meta["plane"] == "axial"
        assert example.format == "study" and example.meta["modality"] == "CT"
    body = list(range(2, 18))
    assert by_scan == {
        "a.nii.gz": list(range(2, 8)),  # the liver, within the body
        "b.nii.gz": body,  # lesions were searched: slices without one count too
        "c.nii.gz": body,  # failed: the question remains open
    }
    assert skipped == [("never.nii.gz", "no annotation")]


def test_a_slice_with_a_doubtful_lesion_is_left_out(world) -> None:
    key = read_volume(world / "data" / "a.nii.gz", modality="CT").content_key
    annotate(world / "said", [said_of(key, "hepatic tumor", {26: ("hepatic tumor", slice(4, 6), 4)})])
    examples, _ = built(world, "ct", "--slices", "30")
    indices = {e.images[0].index for e in examples["train"] if e.id.startswith("a.")}
    assert indices == set(range(2, 18)) - {4, 5}


def test_half_show_a_lesion_and_the_seed_decides(world) -> None:
    def chosen(**settings):
        examples, _ = built(world, "ct", "--slices", "4", **settings)
        return [e.images[0].index for e in examples["train"] if e.id.startswith("b.")]

    assert len(chosen()) == 4 and sum(6 <= index < 10 for index in chosen()) == 2
    assert chosen() == chosen() and any(chosen(seed=s) != chosen() for s in range(1, 6))


def test_files_of_macos_are_no_studies(world) -> None:
    (world / "data" / "._never.nii.gz").write_bytes(b"\0\5\x16\7")
    names = [study.name for study in find_studies(world / "data", "ct")]
    assert "never.nii.gz" in names and "._never.nii.gz" not in names


def test_split_is_by_patient(world, tmp_path) -> None:
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps({f"{n}.nii.gz": {"patient": "one", "grade": "HGG"} for n in "ab"}))
    studies = list(find_studies(world / "data", "ct", facts=str(facts)))
    assert {s.patient for s in studies} == {"one", "c.nii.gz", "never.nii.gz"}
    for share in ("0.01", "0.99"):
        examples, _ = built(world, "ct", "--facts", str(facts), "--heldout", share)
        patients = [{e.meta["patient"] for e in found} for found in examples.values()]
        assert len(set.union(*patients)) == sum(map(len, patients)) == 2
        grades = {e.meta.get("grade") for found in examples.values() for e in found}
        assert grades == {"HGG", None} and "one" not in patients[0] | patients[1]


def test_a_share_is_about_its_size_and_stable() -> None:
    names = [str(n) for n in range(200)]
    held = held_names(names, 0.25, "toy")
    assert 30 < len(held) < 70 and held_names(names[:100][::-1], 0.25, "toy") == held & set(names[:100])
    assert len(held_names("ab", 0.001, "toy")) == len(held_names("ab", 0.999, "toy")) == 1
    assert not held_names("a", 0.5, "toy") and not held_names("ab", 0, "toy")


def test_other_annotations_are_another_build(world) -> None:
    def digest():
        parser = argparse.ArgumentParser()
        ExpertSlices.add_arguments(parser)
        maker = ExpertSlices(parser.parse_args(["--annotations", str(world / "said")]), "ct")
        return pickle.dumps(maker.splits(SourceFolder(world / "data"))["train"].make)

    before = digest()
    assert digest() == before
    key = read_volume(world / "data" / "never.nii.gz", modality="CT").content_key
    annotate(world / "said", [said_of(key, "organs", {1: ("liver", slice(0, 8), 12)})])
    assert digest() != before


def test_studies_are_read_and_told(world) -> None:
    """End to end: images are found below the source folder, rules find their annotations."""
    examples, _ = built(world, "ct", "--slices", "30")
    settled = setting(cast(Any, AnnotationStore(world / "said")))
    fitting = {name: 0 for name in ("ct_tumor", "ct_what", "expert_failed", "no_expert", "mri_what")}
    for example in examples["train"]:
        picture = ImageReader(16).read(example.images[0], world / "data")
        assert picture.shape == (16, 16, 3) and picture.max() > 0
        for name in fitting:
            fitting[name] += RULES[name].unfit(scene(example, settled)) is None
    assert fitting == {"ct_tumor": 16, "ct_what": 6, "expert_failed": 16, "no_expert": 38, "mri_what": 0}


def test_cases_of_four_sequences(tmp_path) -> None:
    data = tmp_path / "data"
    keys = [scan(data, f"p1_{role}.nii.gz", n) for n, role in enumerate(ROLES)]
    key = inputs_key(list(zip(ROLES, keys, strict=True)))
    annotate(tmp_path / "said", [said_of(key, "", {2: ("edema", slice(5, 9), 8)}, "BRATS")])
    cases, facts = tmp_path / "cases.json", tmp_path / "facts.json"
    cases.write_text(json.dumps({"cases": [{"name": "p1"} | {r: f"p1_{r}.nii.gz" for r in ROLES}]}))
    facts.write_text(json.dumps({"p1": {"grade": "LGG"}}))
    examples, _ = built(tmp_path, "mr", "--cases", str(cases), "--facts", str(facts), "--slices", "30")
    first = examples["train"][0]
    assert len(examples["train"]) == 16
    assert first.meta["roles"] == ROLES and first.meta["modality"] == "MR" and len(first.images) == 4
    assert (
        RULES["mri_grade"].unfit(scene(first, setting(cast(Any, AnnotationStore(tmp_path / "said"))))) is None
    )


def test_films(tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number, name in enumerate(("film.png", "unseen.png")):
        (data / name).write_bytes(encode_png(np.full((8, 8, 3), number, np.uint8)))
    key = image_key(load_pixels(data / "film.png"))
    annotate(tmp_path / "said", [Annotation(key, "CXR", probabilities={"Edema": 0.9})])
    examples, skipped = built(tmp_path, "film")
    (film,) = examples["train"]
    assert film.meta["input_key"] == key and skipped == [("unseen.png", "no annotation")]
    assert (
        RULES["cxr_finding"].unfit(scene(film, setting(cast(Any, AnnotationStore(tmp_path / "said")))))
        is None
    )


def test_refusals_name_file_and_fix(world, tmp_path) -> None:
    with pytest.raises(UserError, match="give --annotations STORE"):
        ExpertSlices().splits(SourceFolder(world / "data"))
    with pytest.raises(UserError, match="must be positive"):
        built(world, "ct", "--slices", "0")
    bad = tmp_path / "bad.json"
    for text, reason in (
        ("{", "not JSON"),
        ("{}", 'has no list "cases"'),
        ('{"cases": [{"name": "a"}]}', "has no name or no scan"),
        ('{"cases": [{"name": "a", "t1": "../b"}]}', "leaves the data root"),
        ('{"cases": [{"name": 3}]}', "not an object of texts"),
    ):
        bad.write_text(text)
        with pytest.raises(UserError, match=reason):
            list(find_studies(world / "data", "ct", str(bad)))
    bad.write_text("[]")
    with pytest.raises(UserError, match="must be"):
        list(find_studies(world / "data", "ct", "", str(bad)))


def test_a_study_that_cannot_be_used_is_named(world) -> None:
    key = read_volume(world / "data" / "a.nii.gz", modality="CT").content_key
    other = Annotation(key, "VISTA3D", "muscles", labels=LabelMap.encode(np.zeros((2, 2, 2), int), np.eye(4)))
    annotate(world / "said", [other])
    (world / "data/d.nii.gz").write_bytes(b"no scan")
    examples, skipped = built(world)
    assert {e.id[0] for e in examples["train"]} == {"b", "c"}
    reasons = dict(skipped)
    assert "another grid" in reasons["a.nii.gz"] and "d.nii.gz" in reasons["d.nii.gz"]
