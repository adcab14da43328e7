"""Preprocessing: windows by declared modality, exported with the model, checked against the input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vilam3_jax.configs import models

from vilam3_jax.data.image_processor import image_processor
from vilam3_jax.data.intensity import CT_WINDOWS
from vilam3_jax.data.preprocessing import Preprocessing, preset_windows
from vilam3_jax.data.volumes import Volume
from vilam3_jax.errors import UserError
from vilam3_jax.models import model_config

RAMP = np.arange(-1024, 1024, dtype=np.int16).reshape(1, 1, 2048).repeat(2, axis=0).transpose(2, 0, 1)


def ramp(**fields) -> Volume:
    """[2048, 2, 1] voxels of -1024..1023 along the first axis."""
    return Volume(np.ascontiguousarray(RAMP), np.eye(4), "ramp.nii.gz", **fields)


def grey_of(values, low, high):
    """The scaling of the reference pipeline, reimplemented."""
    return (np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def shown(preprocessing, volume, window=None):
    """[2048, 3] in voxel order; the display reverses the first axis."""
    return preprocessing.slice_image(volume, 2, 0, window)[0, ::-1]


def test_a_declared_ct_is_shown_in_the_reference_window():
    picture = shown(Preprocessing(), ramp(modality="CT"))
    np.testing.assert_array_equal(picture, np.repeat(grey_of(RAMP[:, 0], -150, 250), 3, axis=1))


@pytest.mark.parametrize("modality", ["MR", "PT", "unknown"])
def test_values_never_decide_the_window(modality):
    volume = ramp(modality=modality)
    picture = shown(Preprocessing(), volume)
    low, high = np.percentile(RAMP, [0.5, 99.5])
    np.testing.assert_array_equal(picture, np.repeat(grey_of(RAMP[:, 0], low, high), 3, axis=1))
    assert "percentiles" in Preprocessing().describe(volume)


def test_three_windows_are_red_green_and_blue():
    rules = Preprocessing(ct_windows=preset_windows("medgemma"))
    picture = shown(rules, ramp(modality="CT"))
    for channel, (low, high) in enumerate([(-1024, 1024), (-135, 215), (0, 80)]):
        np.testing.assert_array_equal(picture[:, channel], grey_of(RAMP[:, 0, 0], low, high))
    text = rules.describe(ramp(modality="CT"))
    assert text == "windows 0, 2048 as red; 40, 350 as green; 40, 80 as blue"
    alone = shown(rules, ramp(modality="CT"), (50.0, 400.0))
    assert (alone == alone[:, :1]).all()


def test_the_wide_window_of_medgemmas_maintainers_is_a_config_value():
    windows = ((-100.0, 2250.0), *CT_WINDOWS["medgemma"][1:])
    picture = shown(Preprocessing.of({"ct_windows": [list(w) for w in windows]}), ramp(modality="CT"))
    np.testing.assert_array_equal(picture[:, 0], grey_of(RAMP[:, 0, 0], -1225, 1025))


def test_percentiles_are_of_the_valid_voxels_and_padding_is_black():
    valid = np.ones(RAMP.shape, bool)
    valid[:1024] = False
    voxels = np.where(valid, RAMP, -30000).astype(np.int16)
    volume = Volume(voxels, np.eye(4), "a", valid=valid, modality="MR")
    picture = shown(Preprocessing(percentiles=(0.0, 100.0)), volume)
    assert not picture[:1024].any()
    np.testing.assert_array_equal(picture[1024:, 0], grey_of(RAMP[1024:, 0, 0], 0, 1023))
    bright = Volume(np.full(RAMP.shape, 500, np.int16), np.eye(4), "a", valid=valid, modality="CT")
    picture = shown(Preprocessing(), bright)
    assert not picture[:1024].any() and (picture[1024:] == 255).all()


def test_notes_tell_how_the_input_differs_from_the_training_data():
    rules = Preprocessing(modalities=("CT", "CR"), spacing=(0.5, 5.0))
    assert rules.notes("CT", ramp(modality="CT")) == []
    (other,) = rules.notes("MR", ramp(modality="MR"))
    assert other == "The image is MR, but this model was trained on CT, CR."
    (unknown,) = rules.notes("unknown", ramp())
    assert "states no modality" in unknown
    assert rules.notes("unknown", ramp(), window=(50.0, 400.0)) == []
    assert rules.notes("unknown") == []  # a PNG states none, and needs no window
    thick = Volume(RAMP, np.diag([1.0, 1.0, 8.0, 1.0]), "a", modality="CT")
    (spacing,) = rules.notes("CT", thick)
    assert spacing == "The voxel spacing is 1 x 1 x 8 mm, but the model was trained on 0.5 to 5 mm."


@pytest.mark.parametrize(
    "section",
    [
        {"ct_windows": ()},
        {"ct_windows": ((50.0, 400.0), (40.0, 80.0))},
        {"ct_windows": ((50.0, 0.0),)},
        {"ct_windows": ((50.0, float("nan")),)},
        {"ct_windows": "lung"},
        {"percentiles": (99.5, 0.5)},
        {"percentiles": (0.5, 101)},
        {"alpha": "black"},
        {"orientation": "LPS"},
        {"plane": "oblique"},
        {"slice": "first"},
        {"modalities": ("ct",)},
        {"spacing": (0.0, 1.0)},
        {"spacing": (2.0, 1.0)},
        {"gamma": 2.0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(section):
    with pytest.raises(UserError, match=rf"model\.preprocessing\.{next(iter(section))}"):
        Preprocessing.of(section)


@settings(max_examples=30)
@given(
    st.sampled_from(sorted(CT_WINDOWS)),
    st.tuples(st.floats(0, 40), st.floats(60, 100)),
    st.sampled_from([(), ("CT",), ("CT", "MR")]),
)
def test_json_round_trip(preset, percentiles, modalities):
    rules = Preprocessing(preset_windows(preset), percentiles, modalities=modalities)
    import json

    assert Preprocessing.of(json.loads(json.dumps(dataclasses.asdict(rules)))) == rules


def test_model_configs_carry_it_and_presets_are_swapped_in():
    plain = models.get("tiny")
    assert image_processor(model_config.resolve(plain)).preprocessing == Preprocessing()
    rgb = model_config.resolve(models.get("tiny,windows=medgemma"))
    assert image_processor(rgb).preprocessing.ct_windows == CT_WINDOWS["medgemma"]
    assert image_processor(rgb, pairs=True).preprocessing.ct_windows == CT_WINDOWS["medgemma"]
    with pytest.raises(UserError, match="presets are bone, brain, lung, medgemma, soft_tissue"):
        models.get("tiny,windows=liver")
    del plain["preprocessing"]  # an older export
    assert image_processor(model_config.resolve(plain)).preprocessing == Preprocessing()
