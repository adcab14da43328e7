"""Sentences from labels, and the file of definitions."""

from __future__ import annotations

import importlib.resources
import json
import random
import re

import pytest

from vilam3_jax.datasets import chest_xray14, chexpert
from vilam3_jax.datasets.label_sentences import NORMAL, describe, find

MANY = {name: True for name in chest_xray14.FINDINGS if name != NORMAL}


def content():
    file = importlib.resources.files("vilam3_jax.datasets").joinpath("definitions.json")
    return json.loads(file.read_text("utf-8"))


def test_each_definition_names_a_work_and_an_entry():
    rows, works = content()["findings"], content()["works"]
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    assert {row["source"]["work"] for row in rows} == set(works), "all works are used and listed"
    for row in rows:
        assert set(row) == {"name", "aliases", "terms", "descriptions", "source"}
        assert row["source"]["entry"] and row["terms"] and row["descriptions"]
        assert re.fullmatch("[a-z]+(_[a-z]+)*", row["name"])
        for phrase in (*row["terms"], *row["descriptions"]):
            assert phrase == phrase.strip() and phrase[-1] != "." and phrase[0].islower()
    for work in works.values():
        assert re.search(r"doi:|arXiv:|https://", work), "has a locator"


def test_labels_name_one_definition_each():
    labels = [label for row in content()["findings"] for label in (row["name"], *row["aliases"])]
    assert len({label.replace("_", " ").lower() for label in labels}) == len(labels)


@pytest.mark.parametrize("findings", [chexpert.FINDINGS, chest_xray14.FINDINGS, chest_xray14.FOUR_FINDINGS])
def test_all_findings_of_the_chest_sets_are_defined(findings):
    assert all(find(finding) for finding in findings)


# The labels of CT-RATE.
@pytest.mark.parametrize(
    "label",
    [
        "Medical material",
        "Arterial wall calcification",
        "Cardiomegaly",
        "Pericardial effusion",
        "Coronary artery wall calcification",
        "Hiatal hernia",
        "Lymphadenopathy",
        "Emphysema",
        "Atelectasis",
        "Lung nodule",
        "Lung opacity",
        "Pulmonary fibrotic sequela",
        "Pleural effusion",
        "Mosaic attenuation pattern",
        "Peribronchial thickening",
        "Consolidation",
        "Bronchiectasis",
        "Interlobular septal thickening",
    ],
)
def test_findings_of_chest_ct_are_defined(label):
    assert find(label)


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ({"pneumonia": True}, "inflamed airspaces"),
        (
            {"edema": True, "fracture": True, "mass": False},
            "Chest X-ray with pulmonary edema and a fracture.",
        ),
        ({NORMAL: True, "edema": False}, "Normal chest X-ray."),
        ({"edema": False, "mass": None}, "Chest X-ray without pulmonary edema."),
        (
            {"edema": False, "mass": False, "hernia": False},
            "Chest X-ray without pulmonary edema or a lung mass.",
        ),
        ({"some_new finding": True}, "Chest X-ray with some new finding."),
    ],
)
def test_canonical_sentences(states, text):
    assert text in describe(states)


def test_other_images():
    assert describe({NORMAL: True}, modality="CT") == "Normal chest CT."
    assert describe({"mass": True}, modality="MR").startswith("MR image showing a lung mass")
    assert describe({"drusen": True}, modality="FUNDUS") == "FUNDUS image with drusen."


def test_nothing_known():
    with pytest.raises(ValueError, match="no label"):
        describe({"edema": None, NORMAL: False})


def test_sentences_depend_on_the_generator_alone():
    states = {"edema": True, "mass": False}
    texts = [describe(states, random.Random(seed)) for seed in range(40)]
    assert texts == [describe(states, random.Random(seed)) for seed in range(40)]
    assert len(set(texts)) > 10, "the wording varies"


@pytest.mark.parametrize("states", [MANY, {"edema": True}, {NORMAL: True}, dict.fromkeys(MANY, False)])
def test_sentences_stay_short(states):
    """A text tower reads 64 tokens, about 50 words."""
    for seed in range(100):
        text = describe(states, random.Random(seed))
        assert text.endswith(".") and text[0].isupper() and len(text.split()) <= 50
        assert "  " not in text and "{" not in text


def test_absent_findings_are_denied_or_left_out():
    terms = find("pneumothorax").terms
    for seed in range(100):
        text = describe({"edema": True, "pneumothorax": False}, random.Random(seed))
        told = [sentence for sentence in text.split(". ") if any(term in sentence for term in terms)]
        assert all("no sign of" in sentence or "does not show" in sentence for sentence in told)
