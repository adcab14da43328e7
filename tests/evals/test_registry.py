"""A protocol from another package: one file, one registration, and the others keep their hashes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from vilam3_jax.cli import guarded
from vilam3_jax.errors import UserError
from vilam3_jax.evals import conditions
from vilam3_jax.evals import main as evaluate
from vilam3_jax.evals import protocol as protocols
from vilam3_jax.evals.estimates import aggregated
from vilam3_jax.evals.items import ITEM_RULES
from vilam3_jax.evals.metrics.base import metric
from vilam3_jax.evals.parsers import PARSERS
from vilam3_jax.evals.prompts import PROMPTS

# The meaning of a name never changes: a changed protocol has another hash, and needs another version.
HASHES = json.loads((Path(__file__).parent / "protocol_hashes.json").read_text())
BUILT_IN = sorted(HASHES)
MODULE = """
from vilam3_jax.evals import protocol

def last_word(text, options):
    words = text.split()
    return words[-1].strip(".").lower() if words else None

MODALITIES = protocol.register(
    protocol.Protocol(
        id="modalities", version=3, items="qa_of_dialogues", split="heldout", question_types=("modality",),
        prompt="single_turn", parser="last_word", parser_of_type=(), metric="accuracy", max_new_tokens=8,
        description="The modality of an image; the last word counts.",
    ),
    parsers={"last_word": last_word},
)
"""


@pytest.fixture
def registry(monkeypatch):
    """Undoes the registrations of a test."""
    protocols.names()
    monkeypatch.setattr(protocols, "_registry", dict(protocols._registry))
    before = dict(PARSERS)
    yield
    PARSERS.clear()
    PARSERS.update(before)


@pytest.fixture
def outside(registry, monkeypatch, tmp_path):
    """A package with an entry point of the group."""
    (tmp_path / "hospital_protocols.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = importlib.metadata.EntryPoint("modalities", "hospital_protocols:MODALITIES", "vilam3.protocols")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [entry] if group == entry.group else []
    )
    yield
    sys.modules.pop("hospital_protocols", None)


def test_the_built_in_protocols_mean_what_they_meant():
    assert {name: protocols.get(name).hash for name in protocols.names()} == HASHES


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_rule_of_a_protocol_exists(name):
    protocol = protocols.get(name)
    if not isinstance(protocol, protocols.Protocol):
        return
    assert protocol.items in ITEM_RULES and protocol.prompt in PROMPTS
    assert {protocol.parser, *(parser for _, parser in protocol.parser_of_type)} <= PARSERS.keys()
    for one in (protocol.metric, *protocol.metrics):
        aggregated(metric(one), protocol.aggregation)
    arms = {arm for _, *pair in protocol.contrasts for arm in pair}
    assert arms <= set(protocol.arms) <= conditions.ARMS.keys()


def test_an_entry_point_adds_a_protocol_and_changes_no_hash(outside):
    hashes = {name: protocols._registry[name].hash for name in BUILT_IN}
    assert protocols.names() == sorted(["modalities@3", *BUILT_IN])
    added = protocols.get("modalities@3")
    assert isinstance(added, protocols.Protocol) and added.parser == "last_word"
    assert {name: protocols.get(name).hash for name in BUILT_IN} == hashes
    assert added.hash not in hashes.values()


def test_the_command_evaluates_a_protocol_of_another_package(outside, world, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--protocol=modalities@3", f"--data={world.data}", "--arm=majority", f"--out={out}"]
    assert guarded("evaluate", evaluate.main, arguments) == 0
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {row["question_type"] for row in rows} == {"modality"} and len(rows) == 6
    # The right answer "chest X-ray" is read as its last word.
    assert {row["gold"] for row in rows} == {"ct", "x-ray"}
    assert json.loads((out / "result.json").read_text())["protocol"]["id"] == "modalities"
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    assert "modalities@3, " in " ".join(capsys.readouterr().out.split())


def test_a_name_has_one_meaning(registry):
    quickstart = protocols.get("quickstart@1")
    assert protocols.register(dataclasses.replace(quickstart)) == quickstart
    with pytest.raises(UserError, match="quickstart@1 exists already with other fields; raise its version"):
        protocols.register(dataclasses.replace(quickstart, max_new_tokens=99))
    other = dataclasses.replace(quickstart, id="other")
    with pytest.raises(UserError, match="protocol other@1: parser 'subset' exists already"):
        protocols.register(other, parsers={"subset": lambda text, options: None})
    assert protocols.names() == BUILT_IN and protocols.get("quickstart@1").hash == quickstart.hash
