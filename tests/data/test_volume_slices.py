"""Whole volumes: selection and numbering of slices, and the display of expert results."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from data_worlds import annotate, build, config, ct_annotation, ct_example, ct_volume, take, write
from hypothesis import given
from hypothesis import strategies as st

from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.data.data_config import DataConfig
from vilam3_jax.data.examples import Example, ExpertRequest, ImageRef, RequestImage, Turn
from vilam3_jax.data.experts.cards import load_cards
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment
from vilam3_jax.data.preprocessing import DEFAULT_PREPROCESSING
from vilam3_jax.data.render import ImageReader, Renderer
from vilam3_jax.data.volume_slices import (
    SliceRule,
    even_slices,
    finding_slices,
    informative_slices,
    labelled_voxels,
    numbered,
)
from vilam3_jax.data.volumes import load_volume
from vilam3_jax.errors import StoppingError, UserError

CARDS = load_cards("quickstart")
SIZE = 8
PLANES = 14


class Store(dict):
    def get(self, input_key: str, expert: str, args: str = "") -> Annotation | None:
        return super().get((input_key, expert, args))


def renderer(*annotations: Annotation, experts: str = "on", **settings) -> Renderer:
    store = Store({a.key: a for a in annotations})
    return Renderer(
        image_reader=ImageReader(SIZE), experts=experts, cards=CARDS, annotations=store, **settings
    )  # type: ignore[arg-type]


@pytest.fixture
def whole(tmp_path):
    """Returns (root, example of a whole volume, its annotation)."""
    key = ct_volume(tmp_path)
    example = ct_example(key)
    image = dataclasses.replace(example.images[0], index=None, modality="CT")
    return tmp_path, dataclasses.replace(example, images=(image,)), ct_annotation(key)


@given(st.integers(1, 400), st.integers(1, 40))
def test_even_slices_are_distinct_rising_and_evenly_spaced(planes: int, count: int) -> None:
    chosen = even_slices(planes, count)
    assert len(chosen) == min(planes, count) and sorted(set(chosen)) == list(chosen)
    assert chosen[0] >= 0 and chosen[-1] < planes
    steps = np.diff(chosen)
    assert len(steps) == 0 or steps.max() - steps.min() <= 1
    assert abs(chosen[0] - (planes - 1 - chosen[-1])) <= 1
    if planes % 2:
        assert even_slices(planes, 1) == (planes // 2,)


def test_slices_are_numbered_from_one() -> None:
    assert numbered([0, 29], 60) == "slice 1 of 60: <image>\nslice 30 of 60: <image>"


def marked(voxels: dict[int, int], axis: int = 2, name: str = "liver", shape=(6, 7, 20)) -> Annotation:
    labels = np.zeros(shape, np.uint8)
    for plane, count in voxels.items():
        np.moveaxis(labels, axis, 0)[plane].flat[:count] = 3
    segment = Segment(3, name, int((labels == 3).sum()), 1.0, 1, (0, 0, 0, 1, 1, 1))
    return Annotation("k", "X", version="1", segments=(segment,), labels=LabelMap.encode(labels, np.eye(4)))


@given(
    st.dictionaries(st.integers(0, 19), st.integers(1, 30), min_size=1),
    st.integers(1, 25),
)
def test_finding_slices_cover_what_is_marked(voxels: dict[int, int], count: int) -> None:
    annotation = marked(voxels)
    chosen = finding_slices(annotation, 2, count)
    assert len(chosen) == min(count, 20) and sorted(set(chosen)) == list(chosen)
    assert chosen[0] >= 0 and chosen[-1] < 20
    first, last = min(voxels), max(voxels)
    if last - first + 1 > count:
        assert first <= chosen[0] and chosen[-1] <= last
        assert max(voxels, key=lambda plane: (voxels[plane], -plane)) in chosen
    else:
        assert set(range(first, last + 1)) <= set(chosen)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_marked_voxels_are_those_of_lesions_if_there_are_any(axis: int) -> None:
    annotation = marked({2: 3, 4: 1}, axis)
    assert labelled_voxels(annotation, axis)[[2, 4]].tolist() == [3, 1]
    labels = annotation.label_map()
    np.moveaxis(labels, axis, 0)[5].flat[:2] = 9
    tumor = Segment(9, "hepatic tumor", 2, 0.1, 1, (0, 0, 0, 1, 1, 1))
    both = dataclasses.replace(
        annotation, segments=(*annotation.segments, tumor), labels=LabelMap.encode(labels, np.eye(4))
    )
    assert np.flatnonzero(labelled_voxels(both, axis)).tolist() == [5]
    nothing = dataclasses.replace(annotation, labels=LabelMap.encode(np.zeros_like(labels), np.eye(4)))
    assert finding_slices(nothing, axis, 3) == ()


def test_informative_slices_show_more_than_background(tmp_path) -> None:
    key = ct_volume(tmp_path)
    volume = load_volume(tmp_path / "ct.nii.gz", modality="CT")
    assert volume.content_key == key
    voxels = np.full_like(volume.voxels, -1000)
    for plane in (1, 6, 12):
        voxels[:, :, plane] = volume.voxels[:, :, plane]
    shown = dataclasses.replace(volume, voxels=voxels)
    assert informative_slices(shown, 2, 3, DEFAULT_PREPROCESSING) == (1, 6, 12)
    assert informative_slices(shown, 2, 99, DEFAULT_PREPROCESSING) == tuple(range(PLANES))
    assert DataConfig(slice_choice="informative").slice_choice == "informative"


def test_a_whole_volume_is_shown_as_numbered_slices(whole) -> None:
    root, example, _ = whole
    out = renderer(experts="off", slices=SliceRule(3)).render(example.validate(), root)
    indices = even_slices(PLANES, 3)
    assert out.turns[0].text == numbered(indices, PLANES) + "\nIs the liver here?"
    volume = load_volume(root / "ct.nii.gz", modality="CT")
    for index, image in zip(indices, out.images, strict=True):
        expected = DEFAULT_PREPROCESSING.slice_image(volume, 2, index, (50.0, 400.0), SIZE)
        assert np.array_equal(image, expected)


def test_the_expert_is_shown_on_the_slice_that_it_marks_most_of(whole) -> None:
    root, example, annotation = whole
    out = renderer(annotation, slices=SliceRule(3)).render(example, root)
    assert [turn.role for turn in out.turns] == ["user", "assistant", "expert", "assistant"]
    assert sum(turn.text.count("<image>") for turn in out.turns) == len(out.images) == 4
    indices = even_slices(PLANES, 3)
    voxels = labelled_voxels(annotation, 2)[list(indices)]
    best = indices[int(np.argmax(voxels))]
    assert f"slice {best + 1} of {PLANES}: <image>" in out.turns[2].text
    assert out.turns[2].text.endswith("prompt:\nIs the liver here?")
    assert not np.array_equal(out.images[3], out.images[indices.index(best)])


def test_slices_around_a_finding(whole) -> None:
    root, example, annotation = whole
    rule = SliceRule(2, "finding")
    out = renderer(annotation, slices=rule).render(example, root)
    assert out.turns[0].text.count("<image>") == 2
    chosen = finding_slices(annotation, 2, 2)
    assert numbered(chosen, PLANES) in out.turns[0].text
    # Without a result, no finding to centre on.
    optional = dataclasses.replace(example.expert_requests[0], policy="optional")
    out = renderer(slices=rule).render(dataclasses.replace(example, expert_requests=(optional,)), root)
    assert numbered(even_slices(PLANES, 2), PLANES) in out.turns[0].text
    other = ct_annotation(annotation.input_key, (10, 12, 15))
    with pytest.raises(UserError, match="has another grid than its volume"):
        renderer(other, slices=rule).render(example, root)
    with pytest.raises(UserError, match=r"slice_choice='finding': needs annotations"):
        Renderer(image_reader=ImageReader(SIZE), slices=rule)


def test_volumes_slices_and_images_stand_side_by_side(whole) -> None:
    root, example, annotation = whole
    plane = dataclasses.replace(example.images[0], index=4)
    turns = (
        Turn("user", "A <image> and <image>?"), Turn("assistant", "Yes.", True),
        Turn("user", "And <image>?"), Turn("assistant", "No.", True),
    )  # fmt: skip
    request = ExpertRequest("ORGANS", "organs", (RequestImage(1),), 3)
    mixed = Example(
        "m", "conversation", (example.images[0], plane, example.images[0]), turns, (request,),
        {"input_key": annotation.input_key},
    )  # fmt: skip
    out = renderer(annotation, slices=SliceRule(2)).render(mixed.validate(), root)
    assert [turn.text.count("<image>") for turn in out.turns] == [3, 0, 2, 0, 1, 0]
    assert len(out.images) == 6 and "slice" not in out.turns[4].text
    assert np.array_equal(out.images[0], out.images[3]) and np.array_equal(out.images[1], out.images[4])


@pytest.mark.parametrize("settings", [{"count": 0}, {"choice": "all"}])
def test_rules_that_choose_nothing_are_refused(settings) -> None:
    with pytest.raises(UserError, match=r"config data\.(volume_slices|slice_choice)="):
        SliceRule(**settings)


def test_what_becomes_of_a_missing_annotation(whole) -> None:
    root, example, _ = whole
    with pytest.raises(UserError, match=r"no annotation of ORGANS\(organs\)") as skipped:
        renderer().render(example, root)
    assert not isinstance(skipped.value, StoppingError)
    plain = renderer(missing="plain").render(example, root)
    assert plain.missing == ("ORGANS",) and plain.experts == ()
    assert [turn.role for turn in plain.turns] == ["user", "assistant"]
    with pytest.raises(StoppingError, match="no annotation of ORGANS"):
        renderer(missing="error").render(example, root)
    # Unset fields of a record are never an error.
    optional = dataclasses.replace(example.expert_requests[0], policy="optional")
    out = renderer(missing="error").render(dataclasses.replace(example, expert_requests=(optional,)), root)
    assert out.missing == ("ORGANS",)
    with pytest.raises(UserError, match=r"missing_annotation='ignore': use one of skip, plain, error"):
        renderer(missing="ignore")


@pytest.fixture
def world(whole):
    root, example, annotation = whole
    examples = [dataclasses.replace(example, id=f"v{n}") for n in range(4)]
    unknown = dataclasses.replace(example, meta={**example.meta, "input_key": "unknown"})
    examples += [dataclasses.replace(unknown, id=f"u{n}") for n in range(4)]
    write(root / "volumes", examples)
    (root / "volumes" / "ct.nii.gz").write_bytes((root / "ct.nii.gz").read_bytes())
    annotate(root / "said", [annotation])
    return root


@pytest.mark.parametrize(("policy", "skipped"), [("skip", {"no annotation"}), ("plain", set())])
def test_the_loader_counts_missing_annotations(world, policy: str, skipped: set[str]) -> None:
    cfg = config(
        world, (("volumes", 1),), annotations=str(world / "said"), experts="on", seq_len=2048,
        missing_annotation=policy, volume_slices=2, global_rows=2, loader_shards=1,
    )  # fmt: skip
    loader = build(cfg)
    batch = take(loader, 2)[0]
    loader.close()
    assert isinstance(batch, PackedBatch) and batch.image_valid.any()
    assert {" ".join(reason.split(": ")[1].split()[:2]) for _, reason in loader.stats.skipped} == skipped
    assert (loader.stats.missing["ORGANS"] > 0) == (policy == "plain")


def test_the_loader_stops_where_the_settings_say_so(world) -> None:
    cfg = config(
        world, (("volumes", 1),), annotations=str(world / "said"), experts="on", seq_len=2048,
        missing_annotation="error", global_rows=2, loader_shards=1,
    )  # fmt: skip
    loader = build(cfg)
    with pytest.raises(StoppingError, match=r"volumes/train record \d \(u\d\): no annotation of ORGANS"):
        take(loader, 4)
    loader.close()


def test_a_reference_to_a_whole_volume_is_no_image(whole) -> None:
    root, example, _ = whole
    with pytest.raises(UserError, match="of which no slice was chosen"):
        ImageReader(SIZE).read(example.images[0], root)
    with pytest.raises(UserError, match="leaves the data root"):
        ImageReader(SIZE).volume(ImageRef(path="../ct.nii.gz", axis=2), root)
