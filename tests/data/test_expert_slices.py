"""`vilam3_jax.datasets.expert_slices`: which slices become studies, and of whom."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from data_worlds import annotate
from dialogue_worlds import CARDS, ROLES, scene, setting

from vilam3_jax.data.content_keys import image_key, inputs_key
from vilam3_jax.data.experts.dialogues.rules import RULES
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment, failed
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.images import encode_png, load_film
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.data.render import ImageReader
from vilam3_jax.data.volumes import read_volume
from vilam3_jax.datasets.expert_slices import find_studies, main, write_slices
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
    """Labels as squares of a side on a run of planes."""
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


def made(world, **settings) -> tuple[dict, list]:
    out = world / "out" / f"slices{len(list((world / 'out').glob('*')))}"
    studies = list(find_studies(world / "data", "CT"))
    info = write_slices(world / "data", world / "said", out, studies, cards=CARDS, **settings)
    return info, [example for split in info["splits"] for example in ExampleSource(out, split)]


def test_slices_with_enough_on_them(world) -> None:
    info, examples = made(world)
    by_scan: dict[str, list[int]] = {}
    for example in examples:
        name, index = example.id.rsplit(":", 1)
        by_scan.setdefault(name, []).append(int(index))
        assert example.images[0].index == int(index) and example.meta["plane"] == "axial"
    body = list(range(2, 18))
    assert by_scan == {
        "a.nii.gz": list(range(2, 8)),  # the liver, as far as there is body
        "b.nii.gz": body,  # lesions were looked for: slices without one count, too
        "c.nii.gz": body,  # it failed: a question that stays open
    }
    assert info["lesions"] == 4 and info["studies"] == 3
    assert info["left_out"] == {"no annotation (first: never.nii.gz)": 1}


def test_a_slice_with_a_doubtful_lesion_is_left_out(world, tmp_path) -> None:
    key = read_volume(world / "data" / "a.nii.gz", modality="CT").content_key
    annotate(world / "said", [said_of(key, "hepatic tumor", {26: ("hepatic tumor", slice(4, 6), 4)})])
    _, examples = made(world)
    indices = {e.images[0].index for e in examples if e.id.startswith("a.")}
    assert indices == set(range(2, 18)) - {4, 5}


def test_size_seed_and_lesion_share(world) -> None:
    info, examples = made(world, size=10, lesion_share=0.4, seed=1)
    assert len(examples) == 10 and info["lesions"] == 4
    assert [e.id for e in made(world, size=10, lesion_share=0.4, seed=1)[1]] == [e.id for e in examples]
    assert [e.id for e in made(world, size=10, lesion_share=0.4, seed=2)[1]] != [e.id for e in examples]
    assert made(world, size=10, lesion_share=0.0)[0]["lesions"] == 0
    assert made(world, size=10, lesion_share=1.0)[0]["lesions"] == 4  # there are no more


def test_split_is_by_patient(world, tmp_path) -> None:
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps({f"{n}.nii.gz": {"patient": "one"} for n in "ab"}))
    studies = list(find_studies(world / "data", "CT", facts=str(facts)))
    assert {s.patient for s in studies} == {"one", "c.nii.gz", "never.nii.gz"}
    for seed in range(6):
        out = tmp_path / f"split{seed}"
        info = write_slices(world / "data", world / "said", out, studies, cards=CARDS, seed=seed, heldout=0.5)
        patients = [{e.meta["patient"] for e in ExampleSource(out, split)} for split in info["splits"]]
        assert len(set.union(*patients)) == sum(map(len, patients))


def test_studies_are_read_and_told(world) -> None:
    """From scan to dialogue: pictures are found below the data root, rules find their annotations."""
    out = world / "slices"
    arguments = ["--data", str(world / "data"), "--annotations", str(world / "said"), "--out", str(out)]
    assert main([*arguments, "--modality", "CT"]) == 0
    source = ExampleSource(out, "train")
    settled = setting(AnnotationStore(world / "said"))
    fitting = {name: 0 for name in ("ct_tumor", "ct_what", "expert_failed", "no_expert", "mri_what")}
    for example in source:
        picture = ImageReader(16).read(example.images[0], source.data_root)
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
    studies = list(find_studies(data, "MR", str(cases), str(facts)))
    info = write_slices(data, tmp_path / "said", tmp_path / "out", studies, cards=CARDS)
    first = ExampleSource(tmp_path / "out", "train")[0]
    assert info["records"] == 16 and info["lesions"] == 4
    assert first.meta["roles"] == ROLES and first.meta["modality"] == "MRI" and len(first.images) == 4
    assert RULES["mri_grade"].unfit(scene(first, setting(AnnotationStore(tmp_path / "said")))) is None


def test_films(tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "film.png").write_bytes(encode_png(np.full((8, 8, 3), 7, np.uint8)))
    key = image_key(load_film(data / "film.png"))
    annotate(tmp_path / "said", [Annotation(key, "CXR", probabilities={"Edema": 0.9})])
    studies = list(find_studies(data, "film"))
    write_slices(data, tmp_path / "said", tmp_path / "out", studies, cards=CARDS)
    (film,) = ExampleSource(tmp_path / "out", "train")
    assert RULES["cxr_finding"].unfit(scene(film, setting(AnnotationStore(tmp_path / "said")))) is None


def test_refusals_name_file_and_fix(world, tmp_path) -> None:
    studies = list(find_studies(world / "data", None))
    with pytest.raises(
        UserError, match=r"no slice with enough on it \(4: states no modality of CT or MR; give"
    ):
        write_slices(world / "data", world / "said", tmp_path / "x", studies, cards=CARDS)
    bad = tmp_path / "bad.json"
    for text, reason in (
        ("{", "is no JSON"),
        ("{}", 'holds no list "cases"'),
        ('{"cases": [{"name": "a"}]}', "has no name or no scan"),
        ('{"cases": [{"name": "a", "t1": "../b"}]}', "leaves the data root"),
        ('{"cases": [{"name": 3}]}', "no object of texts"),
    ):
        bad.write_text(text)
        with pytest.raises(UserError, match=reason):
            list(find_studies(world / "data", None, str(bad)))
    bad.write_text("[]")
    with pytest.raises(UserError, match="must be"):
        list(find_studies(world / "data", None, "", str(bad)))
    key = read_volume(world / "data" / "a.nii.gz", modality="CT").content_key
    other = Annotation(key, "VISTA3D", "muscles", labels=LabelMap.encode(np.zeros((2, 2, 2), int), np.eye(4)))
    annotate(world / "said", [other])
    assert any("another grid" in reason for reason in made(world)[0]["left_out"])
