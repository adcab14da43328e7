"""Content keys: one key for one decoded input, another one for another decoder or another order."""

import numpy as np
import pytest

from vilam3_jax.data import content_keys
from vilam3_jax.data.content_keys import image_key, inputs_key, volume_key
from vilam3_jax.data.experts.store import Annotation, AnnotationStore, AnnotationWriter
from vilam3_jax.errors import UserError

VOXELS = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
IMAGE = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
SEQUENCES = (("t1c", "a" * 64), ("t1", "b" * 64), ("t2", "c" * 64), ("flair", "d" * 64))


def test_another_decoder_version_gives_other_keys(monkeypatch):
    before = volume_key(VOXELS, np.eye(4)), image_key(IMAGE)
    assert (volume_key(VOXELS.copy(), np.eye(4)), image_key(IMAGE.copy())) == before
    monkeypatch.setattr(content_keys, "DECODER_VERSION", content_keys.DECODER_VERSION + 1)
    after = volume_key(VOXELS, np.eye(4)), image_key(IMAGE)
    assert not set(before) & set(after)


def test_key_does_not_depend_on_memory_layout_or_byte_order():
    swapped = VOXELS.astype(">i2")
    fortran = np.asfortranarray(VOXELS)
    assert len({volume_key(v, np.eye(4)) for v in (VOXELS, swapped, fortran)}) == 1


def test_several_inputs_have_the_key_of_their_ordered_list():
    key = inputs_key(SEQUENCES)
    assert key == inputs_key([list(pair) for pair in SEQUENCES])
    swapped_order = (SEQUENCES[1], SEQUENCES[0], *SEQUENCES[2:])
    swapped_roles = (("t1c", "b" * 64), ("t1", "a" * 64), *SEQUENCES[2:])
    assert len({key, inputs_key(swapped_order), inputs_key(swapped_roles), inputs_key(SEQUENCES[:3])}) == 4


def test_a_single_input_keeps_its_content_key():
    assert inputs_key([("", "a" * 64)]) == "a" * 64
    assert inputs_key([("t1", "a" * 64)]) != "a" * 64


@pytest.mark.parametrize("inputs", [(), (("t1", ""),), (("t1", "a"), ("t1", "b"))])
def test_incomplete_lists_are_refused(inputs):
    with pytest.raises(ValueError, match="distinct roles"):
        inputs_key(inputs)


def test_annotation_of_several_inputs_is_found_by_their_key(tmp_path):
    key = inputs_key(SEQUENCES)
    with AnnotationWriter(tmp_path) as writer:
        writer.write(Annotation(key, "BRATS", probabilities={"tumor": 0.5}, inputs=SEQUENCES))
    found = AnnotationStore(tmp_path).get(key, "BRATS")
    assert found is not None
    assert found.inputs == SEQUENCES
    with pytest.raises(ValueError, match="not the key of the inputs"):
        Annotation("a" * 64, "BRATS", inputs=SEQUENCES)


def test_annotations_of_an_older_decoder_are_refused(tmp_path, monkeypatch):
    with AnnotationWriter(tmp_path) as writer:
        writer.write(Annotation("a" * 64, "CXR", probabilities={"pneumonia": 0.5}))
    assert len(AnnotationStore(tmp_path)) == 1
    monkeypatch.setattr("vilam3_jax.data.experts.index.DECODER_VERSION", content_keys.DECODER_VERSION + 1)
    for opened in (AnnotationStore, AnnotationWriter):
        with pytest.raises(UserError, match=r"keys of decoder version \d+, .* annotate into a new"):
            opened(tmp_path)
