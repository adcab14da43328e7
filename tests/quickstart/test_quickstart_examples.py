"""Examples from phantoms and synthetic volumes: labels against brute force, splits, records."""

import collections
import dataclasses
import re

import nibabel as nib
import numpy as np
import pytest

from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.example_features import encode
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment
from vilam3_jax.data.experts.store import AnnotationStore, AnnotationWriter
from vilam3_jax.data.images import load_pixels
from vilam3_jax.data.volumes import load_label_map, load_volume
from vilam3_jax.datasets.phantoms import make_phantoms
from vilam3_jax.datasets.samples import Sample, load_manifest, read_samples, write_index
from vilam3_jax.datasets.slices import pick
from vilam3_jax.quickstart import examples as quickstart
from vilam3_jax.quickstart import questions
from vilam3_jax.quickstart.films import film_variant
from vilam3_jax.quickstart.volumes import LabelledVolume, merged_name, usable_axes

SIZE = dataclasses.replace(quickstart.SIZES["smoke"], slices=6, heldout_slices=4, films=4)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, seed=0, num=4)
    return folder


@pytest.fixture(scope="module")
def build(phantoms, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    builder = quickstart.ExampleBuilder(as_epath(phantoms), as_epath(out), SIZE, seed=0)
    return out, builder, list(builder.examples())


def as_epath(path):
    from etils import epath

    return epath.Path(path)


def dialogues(build):
    return [(split, e) for name, split, e in build[2] if name == "instruct"]


def test_no_subject_is_on_both_sides(build, phantoms):
    groups = collections.defaultdict(set)
    for _, split, example in build[2]:
        groups[split].add(example.meta["group"])
    assert groups["train"] and groups["heldout"] and not groups["train"] & groups["heldout"]
    by_sample = {s.name: s for s in read_samples(phantoms)}
    for _, _, example in build[2]:
        if example.images:
            sample = by_sample[example.meta["sample"]]
            assert example.meta["patient"] == quickstart.hashed(sample.patient)
            assert sample.patient not in str(example.meta["patient"])


def test_dialogue_turns_and_questions_say_the_same(build):
    assert dialogues(build)
    for split, example in dialogues(build):
        example.validate()
        qa = example.meta["qa"]
        users = [t.text.removeprefix("<image>\n") for t in example.turns[0::2]]
        assert users == [q["question"] for q in qa]
        assert [t.text for t in example.turns[1::2]] == [q["answer"] for q in qa]
        assert example.meta["question_types"] == [q["type"] for q in qa]
        assert example.meta["label_source"] == [q["label_source"] for q in qa]
        assert example.meta["split"] == split
        wanted = {(q["expert"], q["args"]) for q in qa if q["expert"]}
        assert wanted == {(r.expert, r.args) for r in example.expert_requests}
        helped = [2 * i + 1 for i, q in enumerate(qa) if q["expert"]]
        assert [r.before_turn for r in example.expert_requests] == helped[:1]
        assert all(r.policy == "optional" for r in example.expert_requests)


def test_organ_answers_equal_the_label_map(build, phantoms):
    by_sample = {s.name: s for s in read_samples(phantoms)}
    maps, answers = {}, collections.Counter()
    for split, example in dialogues(build):
        sample = by_sample[example.meta["sample"]]
        if sample.kind != "ct":
            continue
        if sample.name not in maps:
            volume = load_volume(sample.path)
            maps[sample.name] = (load_label_map(sample.label_map, volume), volume)
        labels, volume = maps[sample.name]
        assert example.meta["input_key"] == volume.content_key
        image = example.images[0]
        plane = np.take(labels, image.index, axis=image.axis)
        ids = {name: label for label, name in sample.label_names.items()}
        voxel_ml = float(np.prod(volume.spacing)) / 1000
        for q in example.meta["qa"]:
            if q["type"] == "organ_present":
                (name,) = [n for n in ids if re.search(rf"the {n}\b", q["question"])]
                count = int((plane == ids[name]).sum())
                assert count == 0 or count >= 20
                assert q["answer"] == ("yes" if count else "no")
                assert q["oracle"] and q["expert"] == "ORGANS" and q["args"] == "organs"
                answers[split, q["answer"]] += 1
            if q["type"] == "organ_volume_range":
                (name,) = [n for n in ids if re.search(rf"the {n} in", q["question"])]
                ml = float((labels == ids[name]).sum()) * voxel_ml
                limits = [float(x) for x in re.findall(r"\d+", q["options"][1])]
                place = q["options"].index(q["answer"])
                assert place == (0 if ml < limits[0] else 1 if ml < limits[1] else 2)
    for split in quickstart.SPLITS:
        yes, no = answers[split, "yes"], answers[split, "no"]
        assert yes + no > 20 and abs(yes - no) <= 0.3 * (yes + no)


def test_brain_answers_equal_the_label_map(build, phantoms):
    by_sample = {s.name: s for s in read_samples(phantoms)}
    seen = collections.Counter()
    for _, example in dialogues(build):
        sample = by_sample[example.meta["sample"]]
        if sample.kind != "mr":
            continue
        labels = load_label_map(sample.label_map, load_volume(sample.path))
        plane = np.take(labels, example.images[0].index, axis=example.images[0].axis)
        ids = {name: label for label, name in sample.label_names.items()}
        for q in example.meta["qa"]:
            seen[q["type"]] += 1
            if q["type"] == "brain_visible":
                assert q["answer"] == ("yes" if (plane == ids["brain"]).any() else "no")
                assert not q["oracle"]
    # A slice looks like a film, of which an expert would be asked.
    assert seen["brain_visible"] and not seen["tumor_present"]


def test_film_answers_equal_the_class_name(build, phantoms):
    by_sample = {s.name: s for s in read_samples(phantoms)}
    held_out = collections.defaultdict(set)
    for split, example in dialogues(build):
        sample = by_sample[example.meta["sample"]]
        if sample.kind != "film":
            continue
        # Augmented copies share the record of the original film.
        assert example.meta["input_key"] == image_key(load_pixels(sample.path))
        for q in example.meta["qa"]:
            assert not q["oracle"]
            if q["type"] == "pneumonia":
                assert q["answer"] == ("yes" if sample.class_name == "pneumonia" else "no")
            if q["type"] == "tumor_class":
                assert q["answer"] == sample.class_name
        if split == "heldout":
            held_out[sample.body_region].add(sample.split_group)
            assert "_copy" not in example.images[0].path
    assert len(held_out["chest"]) >= 2 and len(held_out["head"]) >= 2


def test_training_scans_are_shown_in_several_windows_and_held_out_ones_in_their_own(build, phantoms):
    by_sample = {s.name: s for s in read_samples(phantoms)}
    windows = collections.defaultdict(set)
    for name, split, example in build[2]:
        sample = by_sample.get(example.meta.get("sample"))
        if name == "pairs" and sample is not None and sample.kind == "ct":
            windows[split, sample.window].add(example.images[0].window)
    assert any(split == "train" and len(seen) > 2 for (split, _), seen in windows.items())
    for (split, own), seen in windows.items():
        assert own in seen and (split == "train" or seen == {own})


def test_pair_captions_name_modality_and_plane_only(build):
    seen = {e.turns[1].text for name, _, e in build[2] if name == "pairs"}
    assert "Axial CT image." in seen
    pattern = r"(Axial|Coronal|Sagittal) (CT|MRI) image\.|(MRI|X-ray) image\."
    assert all(re.fullmatch(pattern, text) for text in seen)


def test_images_are_inside_the_output(build):
    out, _, examples = build
    shown = {image.path for _, _, e in examples for image in e.images}
    assert shown and all((out / path).exists() for path in shown)
    written = {p.relative_to(out).as_posix() for p in (out / "images").iterdir()}
    assert written == shown


def test_same_seed_same_records_other_seed_others(build, phantoms, tmp_path):
    def run(seed, name):
        builder = quickstart.ExampleBuilder(as_epath(phantoms), as_epath(tmp_path / name), SIZE, seed)
        return [(d, s, encode(e)) for d, s, e in builder.examples()]

    first = [(d, s, encode(e)) for d, s, e in build[2]]
    assert run(0, "a") == first
    assert run(1, "b") != first


def test_formats_and_counts(build):
    forms = {name: {e.format for n, _, e in build[2] if n == name} for name in quickstart.DATASETS}
    assert forms == {
        "pairs": {"pair"}, "captions": {"caption"}, "reports": {"document"},
        "lookups": {"conversation"}, "instruct": {"conversation"},
    }  # fmt: skip
    ids = [e.id for _, _, e in build[2]]
    assert len(ids) == len(set(ids))
    assert all(reason for reason in build[1].skipped)


def film(name, class_name, group=None):
    return Sample(
        name, as_epath("x.jpg"), "film", "X-ray", group or name, group or name, "", "test", "chest",
        class_name=class_name, label_source="class name of the film",
    )  # fmt: skip


def test_film_split_leaves_ten_clusters_and_both_classes_on_both_sides():
    samples = [film(f"n{i}", "normal") for i in range(8)]
    samples += [film(f"p{i}", "pneumonia", f"p{max(i, 1)}") for i in range(8)]
    for seed in range(5):
        splits = quickstart.assign_splits(samples, seed)
        assert len(splits) == 15
        held_out = {g for g, side in splits.items() if side == "heldout"}
        assert len(held_out) >= 10
        for letter in "np":
            assert 0 < len([g for g in held_out if g[0] == letter]) < 8


MNI_HEADS = ("mni152_head", "mni152_brain", "nibabel_anatomy")


def test_templates_of_the_same_heads_share_a_side():
    heads = {e.name: e.record["split_group"] for e in load_manifest() if e.name in MNI_HEADS}
    assert heads == dict.fromkeys(MNI_HEADS, "mni152")


def save(path, voxels, spacing):
    nib.save(nib.Nifti1Image(voxels, np.diag([*spacing, 1.0])), path)
    return as_epath(path)


@pytest.fixture
def thick_head(tmp_path):
    """A thick-slice head of 40 x 48 x 9 voxels whose brain fills slices 3 to 6."""
    rng = np.random.default_rng(0)
    voxels = np.zeros((40, 48, 9), np.int16)
    voxels[8:32, 8:40] = rng.integers(200, 400, (24, 32, 9))
    path = save(tmp_path / "head.nii.gz", voxels, (5.0, 5.0, 15.0))
    return Sample(
        "head", path, "mr", "MRI", "someone", "someone", "test licence", "generated", "head"
    )  # fmt: skip


def test_training_heads_are_labelled_from_the_experts_record(thick_head, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "_TRAINING_RANGES", 1.0)
    volume = load_volume(thick_head.path)
    mask = np.zeros(volume.voxels.shape, np.uint8)
    mask[9:31, 10:38, 3:7] = 1  # 924 ml
    ml = float(mask.sum()) * 5 * 5 * 15 / 1000
    record = Annotation(
        input_key=volume.content_key, expert="BRAINSEG", args="", status="ok", reason="", version="1",
        weights_sha256="0" * 64, probabilities={},
        segments=(Segment(1, "brain", int(mask.sum()), ml, 1, (9, 10, 3, 31, 38, 7)),),
        labels=LabelMap.encode(mask, volume.affine), seconds=0.0,
    )  # fmt: skip
    with AnnotationWriter(tmp_path / "store") as writer:
        writer.write(record)
    write_index(tmp_path, [thick_head], {})
    found = {}
    for use, store in (("with", AnnotationStore(tmp_path / "store")), ("without", None)):
        builder = quickstart.ExampleBuilder(as_epath(tmp_path), as_epath(tmp_path / use), SIZE, 0, store)
        found[use] = [q for n, _, e in builder.examples() if n == "instruct" for q in e.meta["qa"]]
        indices = {e.images[0].index for n, _, e in builder.examples() if n == "instruct"}
    assert not [q for q in found["without"] if q["type"].startswith("brain")]
    assert builder.skipped["head: no BRAINSEG record to ask about the brain"]
    brain = [q for q in found["with"] if q["type"].startswith("brain")]
    assert {q["type"] for q in brain} == {"brain_visible", "brain_volume_range"} and len(indices) > 6
    assert all(q["label_source"] == "BRAINSEG record" and q["oracle"] for q in brain)
    assert {q["answer"] for q in brain if q["type"] == "brain_visible"} == {"yes", "no"}


def test_doubtful_structures_are_left_out_and_lobes_are_merged(tmp_path):
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[5:10, 5:10, 20] = 1  # 25 pixels of one lobe
    labels[5:8, 5:8, 10] = 1  # 9 pixels: uncertain
    labels[10:13, 5:10, 10] = 2  # and 15 of another lobe: together 24, the lung is visible
    labels[20:23, 20:23, 15] = 3  # 9 pixels of the spleen
    voxels = np.full(labels.shape, 40, np.int16)
    voxels[:2] = -1000
    sample = Sample(
        "ct", save(tmp_path / "ct.nii.gz", voxels, (3, 3, 3)), "ct", "CT", "p", "p", "l", "test", "chest",
        label_map=save(tmp_path / "l.nii.gz", labels, (3, 3, 3)),
        label_names=dict(enumerate(("left lung upper lobe", "right lung lower lobe", "spleen", "liver"), 1)),
        label_source="TotalSegmentator reference map",
    )  # fmt: skip
    labelled = LabelledVolume.load(sample)
    assert labelled.facts(2, 20).organs == {"lung": True, "spleen": False, "liver": False}
    assert labelled.facts(2, 10).organs["lung"] is True
    assert "spleen" not in labelled.facts(2, 15).organs
    assert labelled.facts(2, 15).plane == "axial" and labelled.facts(0, 15).plane == "sagittal"
    assert labelled.volumes_ml["lung"] == pytest.approx(49 * 27 / 1000)
    assert labelled.structures(2, 20) == ["lung"]


def test_names():
    assert merged_name("heart") == "heart" and merged_name("left kidney") == "left kidney"
    assert merged_name("lung tumor") == "lung tumor"


def test_reformats_of_thick_slices_are_not_used():
    assert usable_axes((512, 512, 48), np.array([0.6, 0.6, 5.0])) == [2]
    assert usable_axes((120, 100, 110), np.array([3.0, 3.0, 3.0])) == [0, 1, 2]
    assert usable_axes((512, 512, 20), np.array([1.0, 1.0, 2.0])) == [2]


def test_pick_is_spread_without_repeats():
    import random

    chosen = pick(list(range(100)), 10, random.Random(0))
    assert chosen == sorted(set(chosen)) and len(chosen) == 10
    assert all(i * 10 <= c < i * 10 + 10 for i, c in enumerate(chosen))
    assert pick([1, 2], 5, random.Random(0)) == [1, 2]


def test_chest_copies_are_never_mirrored():
    import random

    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32] = 200
    for seed in range(20):
        shown = film_variant(image, random.Random(seed), mirror=False)
        assert shown[:, :8].mean() > shown[:, -8:].mean()
    sides = {film_variant(image, random.Random(seed), mirror=True)[:, :8].mean() > 100 for seed in range(20)}
    assert sides == {True, False}
