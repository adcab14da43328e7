"""Checks of experts: what passes on any grid, what is detected, what stays unknown."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from vilam3_jax.data.experts import verify
from vilam3_jax.data.experts.cards import Card, Check, facts, load_cards
from vilam3_jax.data.experts.labels import label_table
from vilam3_jax.data.experts.record import Annotation, Segment
from vilam3_jax.data.experts.verify import Evidence, Finding, after, check_input, check_result, refusal
from vilam3_jax.data.experts.verify.after import LabelMeasures
from vilam3_jax.data.experts.verify.evidence import section_areas, values_of
from vilam3_jax.data.experts.wording import doubts
from vilam3_jax.data.volumes import Volume
from vilam3_jax.errors import UserError

# name: (centre mm, half axes mm, HU); x to the right, y to the front, z to the head
ORGANS = {
    "liver": ((70, 20, 60), (75, 60, 60), 60),
    "spleen": ((-100, -20, 70), (35, 25, 45), 50),
    "right kidney": ((65, -50, -20), (28, 25, 50), 35),
    "left kidney": ((-65, -50, -10), (28, 25, 50), 35),
    "bladder": ((0, 30, -150), (40, 40, 40), 8),
}
NAMES = {i: name for i, name in enumerate(ORGANS, start=1)}
CT_CHECKS = tuple(Check(**row) for row in facts("ORGANS")["checks"])
CARDS = {card.name: card for card in load_cards("quickstart")}


def grid(spacing=(4.0, 4.0, 4.0), angles=(0.0, 0.0, 0.0), half=(220.0, 220.0, 220.0)):
    """(affine, shape) of a grid around the origin, rotated by Euler angles in degrees."""
    shape = tuple(int(np.ceil(2 * h / s)) for h, s in zip(half, spacing, strict=True))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine, shape


def places(affine, shape):
    """RAS millimetres of every voxel, [X, Y, Z, 3]."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def inside(at, centre, radii):
    return (((at - np.array(centre)) / np.array(radii)) ** 2).sum(-1) < 1


def body(affine, shape, **fields):
    """A CT of a trunk with organs in air, without a header, and its label map."""
    at = places(affine, shape)
    noise = np.random.default_rng(0).normal(0, 8, shape)
    voxels = np.full(shape, -1000.0)
    trunk = ((at[..., :2] / (170, 115)) ** 2).sum(-1) < 1
    voxels[trunk] = -80
    labels = np.zeros(shape, np.uint8)
    for i, (centre, radii, value) in enumerate(ORGANS.values(), start=1):
        mask = inside(at, centre, radii)
        voxels[mask], labels[mask] = value, i
    return Volume((voxels + noise).astype(np.int16), affine, "ct.nii", **fields), labels


def segments_of(labels, names, affine):
    """Segments, by an independent plain count."""
    found = []
    ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    for i in np.unique(labels[labels > 0]):
        where = np.argwhere(labels == i)
        box = (*where.min(0), *(where.max(0) + 1))
        parts = ndimage.label(labels == i, np.ones((3, 3, 3)))[1]
        found.append(Segment(int(i), names[int(i)], len(where), len(where) * ml, parts, tuple(map(int, box))))
    return tuple(found)


def judged(volume, labels, checks=CT_CHECKS, names=NAMES, affine=None, expert="ORGANS"):
    affine = volume.affine if affine is None else affine
    evidence = Evidence.of("", volume)
    return check_result(
        checks, Finding(expert, "", evidence, {}, segments_of(labels, names, affine), labels, affine)
    )


def wrong(verdicts):
    """The kinds of checks that failed."""
    return {v.check for v in verdicts if v.status == "fail"}


@pytest.fixture(scope="module")
def trunk():
    return body(*grid())


angles = st.tuples(*[st.floats(-25, 25)] * 3)
spacings = st.tuples(*[st.floats(5, 8)] * 3)


@settings(max_examples=6, deadline=None)
@given(spacings, angles)
def test_a_plausible_result_passes_on_every_grid(spacing, turned):
    volume, labels = body(*grid(spacing, turned))
    verdicts = judged(volume, labels)
    # A tilted grid cuts off a side of this infinite trunk.
    statuses = {v.status for v in verdicts if v.check != "off_midline_mm"}
    assert statuses == {"pass"} and not wrong(verdicts), [v.message for v in verdicts if v.message]
    assert {"volume_ml", "hu_mean", "hu_deviation", "border", "main_part", "right_of_mm", "sides_mm"} <= {
        v.check for v in verdicts
    }
    for name, (_, radii, _) in ORGANS.items():
        (volume_ml,) = (v.value for v in verdicts if (v.check, v.subject) == ("volume_ml", name))
        assert volume_ml == pytest.approx(4 / 3 * np.pi * np.prod(radii) / 1000, rel=0.15)
    (apart,) = (v.value for v in verdicts if v.check == "right_of_mm" and v.subject == "liver/spleen")
    assert apart == pytest.approx(170, abs=4)


@settings(max_examples=6, deadline=None)
@given(spacings, angles)
def test_mirrored_labels_swap_sides_on_every_grid(spacing, turned):
    affine, shape = grid(spacing, turned)
    volume, labels = body(affine, shape)
    mirrored = labels[::-1]  # about the central plane of the grid, as a wrong flip does
    found = wrong(judged(volume, mirrored))
    assert {"right_of_mm", "sides_mm"} <= found and "volume_ml" not in found


@settings(max_examples=20, deadline=None)
@given(spacings, angles, st.permutations([0, 1, 2]))
def test_measures_do_not_depend_on_the_order_of_axes(spacing, turned, order):
    affine, shape = grid(spacing, turned, (60.0, 50.0, 40.0))
    labels = inside(places(affine, shape), (5, -7, 9), (25, 20, 15)).astype(np.uint8)
    other = affine[:, [*order, 3]]
    (one,), (two,) = (
        segments_of(labels, {1: "x"}, affine),
        segments_of(labels.transpose(order), {1: "x"}, other),
    )
    first, second = LabelMeasures(one, labels, affine), LabelMeasures(two, labels.transpose(order), other)
    assert one.volume_ml == pytest.approx(two.volume_ml) == pytest.approx(31.4, rel=0.25)
    np.testing.assert_allclose(first.centroid_mm, second.centroid_mm, atol=1e-6)
    np.testing.assert_allclose(first.centroid_mm, (5, -7, 9), atol=1.5)
    true = places(affine, shape)[labels == 1]
    np.testing.assert_allclose(first.centroid_mm, true.mean(0), atol=1e-6)


def exchanged(labels, one, two):
    ids = {name: i for i, name in NAMES.items()}
    table = np.arange(256, dtype=np.uint8)
    table[[ids[one], ids[two]]] = ids[two], ids[one]
    return table[labels]


@pytest.mark.parametrize(
    ("corrupt", "caught"),
    [
        (lambda labels: labels[::-1], {"right_of_mm", "sides_mm"}),
        (lambda labels: labels[:, :, ::-1], {"above_mm"}),
        (lambda labels: np.roll(labels, 15, axis=0), {"hu_deviation"}),
        (lambda labels: np.roll(labels, 40, axis=2), {"hu_deviation", "hu_mean"}),
        (lambda labels: exchanged(labels, "liver", "left kidney"), {"volume_ml", "right_of_mm"}),
        (lambda labels: exchanged(labels, "liver", "spleen"), {"right_of_mm"}),
        (lambda labels: exchanged(labels, "left kidney", "right kidney"), {"sides_mm"}),
        (lambda labels: exchanged(labels, "liver", "bladder"), {"above_mm"}),
        (lambda labels: np.where(labels == 1, 0, labels) + np.roll(labels == 1, 25, 1), {"hu_deviation"}),
    ],
)
def test_corrupted_maps_are_caught(trunk, corrupt, caught):
    volume, labels = trunk
    assert caught & wrong(judged(volume, corrupt(labels).astype(np.uint8)))


@pytest.mark.parametrize("turned", [(25, 0, 0), (20, -20, 20)])
def test_one_organ_on_the_wrong_side_of_the_body_is_caught(turned):
    volume, labels = body(*grid((6, 6, 6), turned))
    liver = (labels == 1).astype(np.uint8)
    for mask, status in ((liver, "pass"), (liver[::-1], "fail")):
        (verdict,) = (v for v in judged(volume, mask) if v.check == "off_midline_mm")
        assert verdict.status == status
        assert abs(verdict.value) == pytest.approx(70, abs=45)  # mirrored about the grid's center


def test_the_middle_of_half_a_body_is_unknown(trunk):
    volume, labels = trunk
    half = slice(labels.shape[0] // 2 - 5, None)
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, 0] * half.start
    part = dataclasses.replace(volume, voxels=volume.voxels[half], affine=affine)
    found = [v for v in judged(part, labels[half]) if v.check == "off_midline_mm"]
    assert found and {v.status for v in found} == {"unknown"}


@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_a_scaled_affine_is_caught(trunk, scale):
    volume, labels = trunk
    affine = volume.affine @ np.diag([scale, scale, scale, 1])
    found = judged(dataclasses.replace(volume, affine=affine), labels)
    assert {v.subject for v in found if (v.check, v.status) == ("volume_ml", "fail")} >= {"liver"}


def test_an_empty_map_is_doubted_unless_nothing_is_a_good_answer(trunk):
    volume, _ = trunk
    nothing = np.zeros(volume.voxels.shape, np.uint8)
    (doubt,) = judged(volume, nothing)
    assert (doubt.check, doubt.status) == ("empty", "warn")
    evidence = Evidence.of("", volume)
    for args, count in (("bone lesion", 0), ("hepatic tumor", 1)):  # the latter also marks the liver
        finding = Finding("VISTA3D", args, evidence, {}, (), nothing, volume.affine)
        assert len(check_result(CT_CHECKS, finding)) == count


def test_a_brain_of_13_litres_is_no_brain(trunk):
    """The original motivation: a brain mask that covers an abdomen."""
    volume, _ = trunk
    everything = (volume.voxels > -500).astype(np.uint8)
    checks = CARDS["BRAINSEG"].checks
    found = judged(volume, everything, checks, {1: "brain"}, expert="BRAINSEG")
    (doubt,) = (v for v in found if v.status == "fail")
    assert doubt.check == "volume_ml" and doubt.value > 13_000
    assert doubt.message == f"brain volume {doubt.value:.0f} ml is outside 300 to 2400 ml"
    assert doubts([doubt]) == f"Checks doubt this: {doubt.message}. "


def test_cut_off_organs_have_lower_bounds(trunk):
    volume, labels = trunk
    ends = np.flatnonzero((labels == 1).any((0, 1)))
    cut = slice(ends[-1] - 3, None)
    small = dataclasses.replace(volume, voxels=volume.voxels[:, :, cut])
    found = judged(small, labels[:, :, cut])
    of_liver = {v.check: v for v in found if v.subject == "liver"}
    assert of_liver["volume_ml"].status == "unknown" and of_liver["border"].status == "warn"
    assert "lower bound" in of_liver["border"].message and not wrong(found)
    several = [dataclasses.replace(of_liver["border"], subject=n) for n in ("liver", "spleen", "aorta")]
    told = "liver, spleen and aorta reach the border of the scan, so their volumes are lower bounds"
    assert doubts(several) == f"Checks doubt this: {told}. "


def test_voxels_that_measure_nothing_are_a_border_too(trunk):
    volume, labels = trunk
    valid = np.ones(labels.shape, bool)
    right = np.argwhere(labels == 1)[:, 0].max() + 1
    for first, status in ((right, "warn"), (right + 3, "pass")):
        valid[:] = True
        valid[first:] = False
        found = judged(dataclasses.replace(volume, valid=valid), labels)
        assert {v.status for v in found if (v.check, v.subject) == ("border", "liver")} == {status}


def test_crumbs_are_caught(trunk):
    volume, labels = trunk
    crumbled = labels.copy()
    crumbled[(labels == 1) & (np.indices(labels.shape)[2] // 2 % 2 == 1)] = 0
    (verdict,) = (v for v in judged(volume, crumbled) if (v.check, v.subject) == ("main_part", "liver"))
    assert verdict.status == "fail" and "parts" in verdict.message and 0 < verdict.value < 0.3
    two = np.zeros((9, 9, 9), np.uint8)
    two[:2], two[5:6] = 1, 1
    (segment,) = segments_of(two, {1: "x"}, np.eye(4))
    assert LabelMeasures(segment, two, np.eye(4)).main_part == pytest.approx(2 / 3)


def test_hounsfield_units_are_not_assumed(trunk):
    volume, labels = trunk
    scaled = dataclasses.replace(volume, voxels=((volume.voxels + 1000) // 8).astype(np.int16))
    found = judged(scaled, labels)
    assert {v.status for v in found if v.check.startswith("hu_")} == {"unknown"}
    assert len([v for v in found if v.check == "hu_mean"]) == 1 and not wrong(found)


def test_probabilities_near_the_threshold():
    said = Finding("PNEUMONIA", probabilities={"normal": 0.02, "Lung_Opacity": 0.52})
    certain, near = check_result(CARDS["PNEUMONIA"].checks, said)
    assert (certain.status, near.status, near.subject) == ("pass", "warn", "Lung_Opacity")
    assert near.message == "lung opacity at 0.52 is near the threshold of 0.5"


def test_tumors_in_air_are_caught():
    checks = Card.from_dict(
        {
            "name": "BRATS",
            "args": (),
            "modality": "MRI",
            "task": "segmentation",
            "overview": "x",
            "accuracy": "x",
        }
    ).checks
    affine, shape = grid((3, 3, 3), half=(100, 110, 100))
    at = places(affine, shape)
    head = np.where(inside(at, (0, 0, 0), (70, 90, 75)), 500, 5).astype(np.int16)
    volume = Volume(head, affine, "t1c.nii", modality="MR")
    names = label_table("BRATS")
    for centre, caught in (((20, 10, 10), set()), ((75, 85, 75), {"on_tissue"})):
        labels = inside(at, centre, (20, 20, 20)).astype(np.uint8) * 4
        assert wrong(judged(volume, labels, checks, names, expert="BRATS")) == caught


def test_an_unknown_kind_of_check_is_named():
    with pytest.raises(UserError, match="check 'magic' of X: use one of empty, volume_ml"):
        check_result([Check("magic")], Finding("X"))


# Before


def card(name="CARD", modalities=(), regions=()):
    return Card(
        name, (), "CT", "segmentation", "x", "x", modalities=tuple(modalities), regions=tuple(regions)
    )


def states(card, volume):
    return {v.check: v.status for v in check_input(card, [Evidence.of("", volume)])}


@pytest.fixture(scope="module")
def head():
    """An MR volume of a head, without a header."""
    affine, shape = grid((2, 2, 2), half=(100, 120, 110))
    at = places(affine, shape)
    values = np.where(inside(at, (0, 0, 0), (75, 95, 85)), 800.0, 0.0)
    values += np.abs(np.random.default_rng(0).normal(0, 20, shape))
    return Volume(values.astype(np.int16), affine, "t1.nii")


def test_a_ct_is_refused_by_an_mr_expert_with_or_without_header(trunk):
    volume, _ = trunk
    brain = CARDS["BRAINSEG"]
    for scan, reason in (
        (dataclasses.replace(volume, modality="CT"), "the image is CT, and BRAINSEG reads MR"),
        (volume, "the values are those of a CT, and BRAINSEG reads MR"),
    ):
        verdicts = check_input(brain, [Evidence.of("", scan)])
        sentence = refusal(brain, verdicts)
        assert reason in sentence and "no head" in sentence and ".nii" not in sentence
        assert {(v.stage, v.status) for v in verdicts} == {("before", "fail")}


def test_an_mr_is_refused_by_a_ct_expert(head):
    organs = CARDS["ORGANS"]
    assert states(organs, dataclasses.replace(head, modality="MR")) == {"modality": "fail"}
    assert "no Hounsfield units" in refusal(organs, check_input(organs, [Evidence.of("", head)]))
    assert states(organs, dataclasses.replace(head, modality="PT")) == {"modality": "fail"}


@pytest.mark.parametrize("modality", ["unknown", "OT", "SC"])
def test_without_evidence_the_verdict_is_unknown_and_the_expert_runs(head, modality):
    scan = dataclasses.replace(head, modality=modality)
    verdicts = check_input(CARDS["BRAINSEG"], [Evidence.of("", scan)])
    assert {v.check: v.status for v in verdicts} == {"modality": "unknown", "region": "unknown"}
    assert all(v.message.startswith("nothing states") for v in verdicts)
    assert refusal(CARDS["BRAINSEG"], verdicts) is None and not doubts(verdicts)


def test_what_is_stated_beats_the_values_and_the_contradiction_is_told(trunk, head):
    stated_ct, stated_mr = (
        dataclasses.replace(head, modality="CT"),
        dataclasses.replace(trunk[0], modality="MR"),
    )
    assert states(CARDS["ORGANS"], stated_ct) == {"modality": "pass", "intensities": "warn"}
    assert states(card(modalities=["MR"]), stated_mr) == {"modality": "pass", "intensities": "warn"}
    assert not Evidence.of("", stated_ct).is_hounsfield


def test_a_ct_without_its_offset_is_no_ct(trunk):
    volume, _ = trunk
    shifted = dataclasses.replace(volume, voxels=volume.voxels + 1024)
    assert (values_of(volume), values_of(shifted)) == ("hounsfield", "not hounsfield")
    assert states(CARDS["ORGANS"], shifted) == {"modality": "fail"}


def test_values_alone_refuse_nothing_that_could_be_right():
    rng = np.random.default_rng(1)
    shape = (40, 40, 40)
    for values in (
        rng.integers(0, 80, shape),  # a CT of a brain, clipped to its window
        rng.normal(40, 20, shape),  # a CT cropped inside an organ
        rng.normal(0, 1, shape),  # any modality, standardized
        rng.uniform(0, 1, shape),  # any modality, scaled
        np.zeros(shape),
    ):
        volume = Volume(values.astype(np.float32), np.eye(4), "x")
        for modality in ("CT", "MR"):
            assert states(card(modalities=[modality]), volume) == {"modality": "unknown"}


@pytest.mark.parametrize(
    ("body_part", "status"),
    [
        ("HEAD", "pass"),
        ("BRAIN", "pass"),
        ("HEAD_NECK", "pass"),
        ("WHOLEBODY", "pass"),
        ("ABDOMEN", "fail"),
        ("CHEST", "fail"),
        ("KNEE", "fail"),
        ("PARTIALBODY", "unknown"),
        ("unknown", "unknown"),
        ("X-Y/Z", "unknown"),
    ],
)
def test_stated_body_parts(head, body_part, status):
    scan = dataclasses.replace(head, modality="MR", body_part=body_part)
    assert states(CARDS["BRAINSEG"], scan) == {"modality": "pass", "region": status}


def test_a_trunk_is_no_head_but_a_whole_body_may_hold_one():
    affine, shape = grid((6, 6, 6), half=(220, 160, 300))
    at = places(affine, shape)
    trunk = ((at[..., :2] / (170, 115)) ** 2).sum(-1) < 1
    trunk_volume = Volume(np.where(trunk, 300, 0).astype(np.int16), affine, "x", modality="MR")
    with_head = np.where(at[..., 2] > 200, inside(at, (0, 0, 260), (75, 95, 90)), trunk)
    whole = dataclasses.replace(trunk_volume, voxels=np.where(with_head, 300, 0).astype(np.int16))
    region = card(regions=["head"])
    assert states(region, trunk_volume) == {"region": "fail"}
    assert states(region, whole) == {"region": "unknown"}
    areas = section_areas(trunk_volume, hounsfield=False)
    assert areas.mean() == pytest.approx(np.pi * 17 * 11.5, rel=0.03)
    assert "cm²" in check_input(region, [Evidence.of("", trunk_volume)])[0].message


def test_an_image_is_judged_by_what_its_file_states_alone():
    film = np.full((64, 64, 3), 200, np.uint8)
    expert = CARDS["PNEUMONIA"]
    for said, expected in (
        (("CR", "CHEST"), {"pass"}),
        (("DX", "unknown"), {"pass", "unknown"}),
        ((), {"unknown"}),
        (("CR", "FOOT"), {"pass", "fail"}),
        (("MG", "CHEST"), {"pass", "fail"}),
    ):
        verdicts = check_input(expert, [Evidence.of("", film, *said)])
        assert {v.status for v in verdicts} == expected and len(verdicts) == 2


def test_the_wrong_one_of_several_inputs_is_named_by_its_role(head):
    four = [
        Evidence.of(role, dataclasses.replace(head, modality="CT" if role == "t2" else "MR"))
        for role in ("t1c", "t1", "t2", "flair")
    ]
    brats = card("BRATS", ["MR"], ["head"])
    verdicts = check_input(brats, four)
    assert {v.subject for v in verdicts if v.status == "fail"} == {"t2"} and len(verdicts) == 8
    assert "t2: the image is CT" in refusal(brats, verdicts)


# The table


def test_every_fact_is_usable_and_has_its_source():
    path = pathlib.Path(verify.__file__).parents[1] / "tables" / "facts.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    labels = {n for e in ("VISTA3D", "ORGANS", "BRAINSEG", "BRATS") for n in label_table(e).values()}
    for rows in table["check_sets"].values():
        assert len({(r["kind"], r["subject"]) for r in rows}) == len(rows)
        for row in rows:
            assert row["source"] and row["kind"] in after._KINDS
            assert row.get("low", -np.inf) < row.get("high", np.inf)
            for pattern in filter(None, row["subject"].split("/")):
                assert any(after.fnmatch.fnmatchcase(n, pattern) for n in labels), row
    regions = {r for parts in table["body_parts"].values() for r in parts}
    assert regions == {"head", "neck", "chest", "abdomen", "pelvis", "limb"}
    used = {r for e in table.values() if isinstance(e, dict) for r in e.get("regions", ())}
    assert used <= regions


def test_verdicts_travel_with_the_record(trunk):
    verdicts = judged(*trunk)
    record = Annotation("k", "ORGANS", verdicts=verdicts)
    assert Annotation.from_bytes(record.to_bytes()).verdicts == verdicts
    assert len({(v.check, v.subject) for v in verdicts}) == len(verdicts)
