"""An expert that fails in a live dialogue: an honest turn for the model, and the reason in the transcript."""

import json
import os
import pathlib
import sys

import nibabel
import numpy as np
import pytest
import vilam3_experts

import vilam3_jax
from tests.inference.hostile import Repeater
from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.exchange import Style
from vilam3_jax.data.experts.host_client import ExpertHost
from vilam3_jax.data.templates import CHATML
from vilam3_jax.data.tokenizer import train_bpe
from vilam3_jax.inference.agent import Agent, HostProvider, Query
from vilam3_jax.inference.images import open_image

QUESTION = "Is there a hemorrhage?"
PLUGIN = """
import time
from vilam3_experts.base import Output
from vilam3_experts.descriptors import Descriptor
from vilam3_jax.data.experts.cards import Card

ARGS = ("fine", "hungry", "killed", "slow")
HEAD = Descriptor(
    card=Card("HEAD", ARGS, "MRI", "segmentation", "marks bright voxels", "none", modalities=("MR",)),
    version="1", input="volume", kind="segmentation", factory="head_plugin:Head")

class Head:
    def __init__(self, weights):
        pass

    def run(self, data, args):
        if args == "hungry":
            raise MemoryError
        if args == "killed":  # as by the kernel, when memory runs out
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
        if args == "slow":
            time.sleep(100)
        return Output(labels=(data.voxels > 50).astype("uint8"), label_names={1: "bright"})
"""
CARD = Card(
    "HEAD", ("fine", "hungry", "killed", "slow"), "MRI", "segmentation", "marks bright voxels", "none"
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "head_plugin.py").write_text(PLUGIN)
    info = folder / "head_expert-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: head-expert\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vilam3.experts]\nHEAD = head_plugin:HEAD\n")
    roots = [pathlib.Path(m.__file__).parents[1] for m in (vilam3_jax, vilam3_experts)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*roots, folder)))}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe([QUESTION], 300, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "head.nii"
    voxels = np.random.default_rng(0).integers(0, 100, (12, 10, 4)).astype(np.int16)
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


def dialogue(tokenizer, scan, host, args, *, modality="MR"):
    model = Repeater(tokenizer, f"Let me trigger <HEAD({args})>.", "I cannot tell.")
    style = Style(verdicts=True)
    agent = Agent(model, CHATML, cards=[CARD], provider=HostProvider(host), style=style)
    query = Query(QUESTION, (open_image(scan, 32, modality=modality),))
    return model.answer(agent.script(query))


@pytest.mark.parametrize(
    ("args", "modality", "timeout", "reason", "told"),
    [
        ("hungry", "MR", 60, "out of memory", "could not analyse this image"),
        ("killed", "MR", 60, "exit code -9", "could not analyse this image"),
        ("slow", "MR", 8, "no answer within 8 s", "could not analyse this image"),
        ("fine", "CT", 60, "the image is CT, and HEAD reads MR", "the image is CT, and HEAD reads MR"),
        ("missing", "MR", 60, "does not take the argument", "could not analyse this image"),
    ],
)
def test_a_failure_is_an_honest_turn(tokenizer, scan, environment, args, modality, timeout, reason, told):
    command = (sys.executable, "-m", "vilam3_experts", "host")
    with ExpertHost(command, timeout=timeout, environment=environment) as host:
        transcript = dialogue(tokenizer, scan, host, args, modality=modality)
        assert [turn.role for turn in transcript.turns] == ["user", "assistant", "expert", "assistant"]
        assert told in transcript.expert_text and transcript.expert_text.endswith(QUESTION)
        assert transcript.answer == "I cannot tell." and transcript.overlay is None
        (call,) = json.loads(json.dumps(transcript.to_dict()))["calls"]
        assert call["status"] == "failed" and reason in call["reason"] and call["mask"] is None
        assert call["accepted"] == (args != "missing") and call["turn"] == 2
        again = dialogue(tokenizer, scan, host, "fine")
        assert again.annotation.status == "ok" and "bright" in again.expert_text, "the host works again"


def test_a_missing_expert_is_an_honest_turn(tokenizer, scan, tmp_path):
    with ExpertHost((str(tmp_path / "nothing"),)) as host:
        transcript = dialogue(tokenizer, scan, host, "fine")
    assert "does not start" in transcript.annotation.reason
    assert "could not analyse this image" in transcript.expert_text
