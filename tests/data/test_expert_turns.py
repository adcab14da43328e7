"""What the model sees of an expert: text, colours, groups."""

import dataclasses

import numpy as np
import pytest

from vilam3_jax.data.experts.store import Annotation, LabelMap, Segment, failed, falsify
from vilam3_jax.data.experts.turns import (
    PALETTE,
    expert_overlay,
    label_group,
    label_table,
    label_universe,
    legend,
    overlay,
    render_expert_turn,
    restrict_to_group,
    shows_image,
)
from vilam3_jax.data.volumes import slice_2d

NAMES = label_table("VISTA3D")


def ct_annotation():
    """Liver and spleen on plane 1, lung lobes on plane 0, a rib (outside the group) everywhere."""
    labels = np.zeros((4, 5, 2), np.uint8)
    labels[0, 0, 1], labels[1, 1:3, 1] = 3, 1
    labels[0, 0, 0], labels[1, 0, 0] = 28, 32
    labels[3, 4, :] = 63
    millilitres = {1: 1125.4, 3: 261.2, 28: 4.04, 32: 3.0, 63: 9.0}
    segments = tuple(
        Segment(int(i), NAMES[int(i)], int((labels == i).sum()), ml, 1, (0, 0, 0, 4, 5, 2))
        for i, ml in millilitres.items()
    )
    return Annotation("k", "VISTA3D", "organs", segments=segments,
                      labels=LabelMap.encode(labels, np.eye(4)))  # fmt: skip


def test_segmentation_text_is_exact():
    record = ct_annotation()
    assert render_expert_turn(record, "What is it?", axis=2, index=1, kind="segmentation") == (
        "The results are <image>. The colors in this image describe red: liver, blue: spleen. "
        "Volumes in ml: liver 1125, spleen 261. Use this result to respond to this prompt:\nWhat is it?"
    )
    assert "red: lung. Volumes in ml: lung 7.0." in render_expert_turn(
        record, "Q", axis=2, index=0, kind="segmentation"
    )
    empty = render_expert_turn(record, "Q", axis=0, index=2, kind="segmentation")
    assert "No labelled structure is visible" in empty and empty.count("<image>") == 1
    everything = dataclasses.replace(record, args="")
    text = render_expert_turn(everything, "Q", axis=2, index=1, kind="segmentation")
    assert "yellow: left rib 1" in text


def test_classification_text_is_exact():
    record = Annotation("k", "CXR", probabilities={"pneumonia": 0.984, "Pleural_Thickening": 0.5})
    assert render_expert_turn(record, "Is it?", kind="classification") == (
        "The resulting predictions are:\npneumonia: yes (0.98)\npleural thickening: no (0.50)\n"
        "Analyze the image and take these predictions into account when responding to this prompt:\nIs it?"
    )


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_failure_is_told(kind):
    record = failed("k", "CXR", "", "crashed")
    assert render_expert_turn(record, "Q", kind=kind) == (
        "The expert could not analyse this image. Respond to this prompt:\nQ"
    )
    assert not shows_image(record, kind)


def test_marker_and_picture_go_together():
    record = ct_annotation()
    for kind, other in (
        ("segmentation", record),
        ("classification", Annotation("k", "C", probabilities={"a": 1.0})),
    ):
        text = render_expert_turn(other, "Q", axis=2, index=1, kind=kind)
        assert ("<image>" in text) == shows_image(other, kind)


def test_overlay_follows_the_published_formula():
    # By hand: 0.3 * colour + 0.7 * grey, times 255, cut to an integer.
    image = np.full((2, 2, 3), 101, np.uint8)
    labels = np.array([[0, 7], [9, 62]])
    out, described = overlay(image, labels, {7: "seven", 62: "colon"})
    assert out[0, 0].tolist() == [101, 101, 101]
    assert out[0, 1].tolist() == [147, 70, 70]  # red: 76.5 + 70.7
    assert out[1, 0].tolist() == [70, 70, 147]  # blue, taken by a label without a name
    assert out[1, 1].tolist() == [147, 147, 70]  # yellow
    assert described == {"red": "seven", "yellow": "colon"}
    assert image.max() == 101  # the input is not touched


def test_overlay_resizes_labels_only():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    out, _ = overlay(image, np.array([[0, 1], [0, 0]]), {1: "x"})
    changed = (out != image).any(axis=2)
    assert changed[:2, 3:].all() and changed.sum() == 6
    with pytest.raises(ValueError, match="uint8"):
        overlay(image.astype(np.float32), np.zeros((2, 2), int), {})


def test_published_legend_example():
    present = [4, 1, 14, 3, 121]
    assert legend(NAMES, present) == {
        "red": "liver",
        "blue": "spleen",
        "yellow": "pancreas",
        "magenta": "left kidney",
        "green": "spinal cord",
    }


def test_no_name_is_lost_when_colours_repeat():
    names = {i: f"label{i}" for i in range(1, 41)}
    text = " ".join(legend(names, list(names)).values())
    assert all(name in text.split() for name in names.values())
    assert len(PALETTE) == 16


def test_overlay_turns_labels_like_the_picture():
    record = ct_annotation()
    for axis in range(3):
        for index in range(record.label_shape[axis]):
            shown = slice_2d(record.label_map(), axis, index)
            grey = np.zeros((*shown.shape, 3), np.uint8)
            coloured = expert_overlay(record, grey, axis=axis, index=index).any(axis=2)
            np.testing.assert_array_equal(coloured, np.isin(shown, [1, 3, 28, 32]))


def test_groups_hold_known_labels():
    organs = label_group("VISTA3D", "organs")
    assert {"liver", "spleen", "left kidney", "right kidney", "pancreas", "stomach", "gallbladder",
            "aorta", "bladder", "colon", "heart", "lung"} <= set(organs.names.values())  # fmt: skip
    assert "left lung upper lobe" not in organs.names.values()
    assert len(label_group("VISTA3D", "everything").names) == 117
    assert label_group("VISTA3D", "nonsense") is None and label_group("NOSUCH", "") is None
    assert label_universe("BRAINSEG", "") == {1: "brain"}
    assert len(NAMES) == 132 and len(set(NAMES.values())) == 132


def test_restricted_record_tells_the_same_story():
    record = ct_annotation()
    small = restrict_to_group(record)
    assert sorted(s.name for s in small.segments) == ["liver", "lung", "spleen"]
    (lung,) = [s for s in small.segments if s.name == "lung"]
    assert lung.volume_ml == pytest.approx(7.04) and lung.voxels == 2
    for index in range(2):
        assert render_expert_turn(small, "Q", axis=2, index=index, kind="segmentation") == (
            render_expert_turn(record, "Q", axis=2, index=index, kind="segmentation")
        )


def test_falsified_turn_names_other_organs():
    record = restrict_to_group(ct_annotation())
    wrong = falsify(record, 1, label_universe("VISTA3D", "organs"))
    text = render_expert_turn(wrong, "Q", axis=2, index=1, kind="segmentation")
    described = text.split("describe ")[1].split(".")[0]
    assert described.count(":") == 2 and "liver" not in described and "spleen" not in described
