"""Published protocols on synthetic twins of the datasets: what is asked, and that right answers are right."""

import pickle

import pytest
import test_chest_xray14
import test_medical_diff_vqa
import test_path_vqa
import test_slake
import test_vqa_rad
from test_chexpert import test_set as chexpert_twin  # noqa: F401
from test_flare_mllm_2d import flare  # noqa: F401
from twins import made

from vilam3_jax.datasets.chest_xray14 import ChestXray14
from vilam3_jax.datasets.chexpert import CheXpert
from vilam3_jax.datasets.flare_mllm_2d import FlareMllm2d
from vilam3_jax.datasets.medical_diff_vqa import MedicalDiffVqa
from vilam3_jax.datasets.path_vqa import PathVqa
from vilam3_jax.datasets.slake import Slake
from vilam3_jax.datasets.vqa_rad import VqaRad
from vilam3_jax.errors import UserError
from vilam3_jax.evals import protocol as protocols
from vilam3_jax.evals.items import items_of


def path_vqa(folder):
    """The original release, with a yes/no question and an open one in the test split."""
    test_path_vqa.original(folder)
    tested = [
        test_path_vqa.datum(3, "test", answer_type="yes/no", label={"no": 1}),
        test_path_vqa.datum(4, "test"),
    ]
    (folder / "pvqa/qas/test_vqa.pkl").write_bytes(pickle.dumps(tested))
    shown = folder / "pvqa/images/test/test_0003.jpg"
    (folder / "pvqa/images/test/test_0004.jpg").write_bytes(shown.read_bytes())


TWINS = {
    "vqa-rad": (VqaRad, test_vqa_rad.twin, "osf"),
    "slake": (Slake, test_slake.twin, "en"),
    "path-vqa": (PathVqa, path_vqa, "original"),
    "mimic-vqa": (MedicalDiffVqa, test_medical_diff_vqa.source, "questions"),
    "chestxray14": (ChestXray14, test_chest_xray14.four_findings, "four_findings"),
}


def examples_of(dataset, folder, config, parity=True):
    found, _ = made(dataset, folder, config, parity=parity)
    return [one for of_split in found.values() for one in of_split]


def asked(name, examples):
    """(id, question type) of the items, whose own answers must be right."""
    protocol = protocols.get(f"{name}@1")
    items = items_of(examples, protocol)
    for item in items:
        found = protocols.score(protocol, item, item.answer)
        assert found.correct and not found.unparsed
    return [(item.example, item.question_type) for item in items]


def twin(name, folder, parity=True):
    dataset, write, config = TWINS[name]
    written = write(folder)
    return examples_of(dataset, folder if written is None else written, config, parity)


@pytest.mark.parametrize("name", list(TWINS))
def test_parity_and_strict_ask_the_same(tmp_path, name):
    examples = twin(name, tmp_path)
    parity, strict = (asked(f"vila-m3/{kind}/{name}", examples) for kind in ("parity", "strict"))
    assert parity and parity == strict
    tested = {one.id for one in examples if one.meta["split"] == "test"}
    assert {example for example, _ in parity} <= tested


def test_rephrased_closed_questions_of_vqa_rad(tmp_path):
    examples = twin("vqa-rad", tmp_path)
    expected = [("2", "closed"), ("2-rephrase", "closed_rephrased")]
    assert asked("vila-m3/parity/vqa-rad", examples) == expected


def test_yes_no_questions_of_path_vqa(tmp_path):
    examples = twin("path-vqa", tmp_path)
    assert asked("vila-m3/parity/path-vqa", examples) == [("test/3", "closed")]
    assert len(asked("llava-med/path-vqa", examples)) == len(asked("medevalkit/path-vqa", examples)) == 2


@pytest.mark.parametrize("suite", ["medevalkit", "medgemma-card", "llava-med"])
def test_the_official_questions_of_vqa_rad_for_the_others(tmp_path, suite):
    examples = twin("vqa-rad", tmp_path, parity=False)
    assert asked(f"{suite}/vqa-rad", examples) == [("2", "closed"), ("3", "open"), ("4", "closed")]


@pytest.mark.parametrize("name", ["vqa-rad", "slake"])
def test_parity_needs_the_ids_of_the_reference(tmp_path, name):
    examples = twin(name, tmp_path, parity=False)
    with pytest.raises(UserError, match=f"prepare {name.replace('-', '_')} with --parity"):
        asked(f"vila-m3/parity/{name}", examples)


def test_five_findings_of_chexpert(chexpert_twin):  # noqa: F811
    examples = examples_of(CheXpert, chexpert_twin, "test")
    for name in ("vila-m3/parity/chexpert", "vila-m3/strict/chexpert", "medgemma-card/chexpert"):
        assert len(asked(name, examples)) == 3 * 5
    assert len(asked("vila-m3/strict/chexpert-choices", examples)) == 3


def test_families_of_flare(flare):  # noqa: F811
    examples = examples_of(FlareMllm2d, flare, "", parity=False)
    found = {
        name: [example for example, _ in asked(name, examples)]
        for name in (one.removesuffix("@1") for one in protocols.names())
        if name.startswith("flare26/")
    }
    assert found == {
        "flare26/cell_counting": ["test/bone_marrow/row-1"],
        "flare26/detection": ["validation_hidden/chromosome/row-1"],
        "flare26/disease_diagnosis_classification": ["train/dental/row-2"],
        "flare26/multi_label_classification": ["train/dental/row-1"],
        "flare26/regression": ["validation/neojaundice/case7"],
        "flare26/report_generation": ["train/chestdr/row-1"],
    }
