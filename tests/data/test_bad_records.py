"""Unusable records are skipped and named everywhere, and the run continues."""

from __future__ import annotations

import dataclasses

import pytest
from data_worlds import annotate, build, config, film, picture, take
from numpy.random import default_rng

from vilam3_jax.data import stream
from vilam3_jax.data.examples import Example, ExpertRequest, ImageRef, RequestImage, Turn
from vilam3_jax.data.experts.store import Annotation
from vilam3_jax.data.records import ExampleSource, ExampleWriter
from vilam3_jax.errors import UserError

GOOD = [
    Example(
        f"g{n}", "conversation", (), (Turn("user", "What?"), Turn("assistant", "a left lung", True))
    )
    for n in range(8)
]  # fmt: skip


def turns(user: str = "What?", answer: str = "ok", role: str = "user") -> tuple[Turn, ...]:
    return Turn(role, user), Turn("assistant", answer, True)


BAD = {
    "starts with an expert turn": Example("bad", "conversation", (), turns(role="expert")),
    "markers for 0 images": Example("bad", "conversation", (), turns("<image> What?")),
    "is for image 3 of 0": Example(
        "bad", "conversation", (), turns(), (ExpertRequest("CXR", images=(RequestImage(3),)),)
    ),
    "meta.input_key is neither": Example("bad", "conversation", (), turns(), (), {"input_key": 5}),
    "no supported image format": Example(
        "bad", "conversation", (ImageRef(data=b"no picture"),), turns("<image> What?")
    ),
}


@pytest.fixture
def unchecked(monkeypatch):
    """A writer without checks, as in other programs."""

    def write_all(folder, examples) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Example, "validate", lambda self: self)
            with ExampleWriter(folder, "train") as writer:
                for example in examples:
                    writer.write(example)

    return write_all


@pytest.mark.parametrize("reason", [reason for reason in BAD if "format" not in reason])
def test_the_writer_refuses_them_by_name(tmp_path, reason: str) -> None:
    with ExampleWriter(tmp_path / "d", "train") as writer:
        writer.write(GOOD[0])
        with pytest.raises(UserError, match="example 'bad'") as error:
            writer.write(BAD[reason])
    assert reason in str(error.value) and len(ExampleSource(tmp_path / "d", "train")) == 1


@pytest.mark.parametrize("text", [[{"type": "text"}], None, 5, {"a": 1}, b"x", "\ud800"])
def test_the_writer_refuses_texts_that_are_none(tmp_path, text) -> None:
    with ExampleWriter(tmp_path / "d", "train") as writer:
        writer.write(GOOD[0])
        for wrong in (turns(user=text), turns(answer=text)):
            with pytest.raises(UserError, match=r"example 'bad': turn \d text"):
                writer.write(Example("bad", "conversation", (), wrong))


@pytest.mark.parametrize("reason", BAD)
def test_the_loader_puts_them_aside(tmp_path, unchecked, reason: str) -> None:
    unchecked(tmp_path / "d", [*GOOD, BAD[reason]])
    annotate(tmp_path / "said", [Annotation("k", "CXR", probabilities={"x": 0.1}, version="1")])
    cfg = config(
        tmp_path / "d", (), seq_len=1024, rows_per_group=1, images_per_group=2, global_rows=2,
        loader_shards=1, experts="on", annotations=str(tmp_path / "said"),
    )  # fmt: skip
    loader = build(cfg)
    take(loader, 6)
    loader.close()
    ((name, why),) = loader.stats.skipped
    assert "record 8" in name and loader.stats.samples > 8
    assert reason in why or "format" in reason


def test_donors_are_chosen_among_the_usable(tmp_path, unchecked) -> None:
    films = [film(n, default_rng(0)) for n in range(4)]
    unchecked(tmp_path / "d", [*films, dataclasses.replace(films[0], id="bad", meta={"input_key": 5})])
    donors = stream.choose_donors([ExampleSource(tmp_path / "d", "train")])
    assert set(donors) == {(0, n) for n in range(4)} and (0, 4) not in donors.values()


@pytest.mark.filterwarnings("ignore::vilam3_jax.errors.InputWarning")
def test_rules_leave_them_out(tmp_path, unchecked) -> None:
    films = [film(n, default_rng(0), policy="optional") for n in range(4)]
    broken = [
        dataclasses.replace(films[0], id="bad", meta={"input_key": 7}),
        dataclasses.replace(films[0], id="worse", images=(ImageRef(data=picture(1)),) * 2),
    ]
    unchecked(tmp_path / "d", [*films, *broken])
    said = [Annotation(f"key{n}", "PNEUMONIA", probabilities={"x": 0.9}, version="1") for n in range(4)]
    annotate(tmp_path / "said", said)
    cfg = config(
        tmp_path, (("d:cxr", 1),), annotations=str(tmp_path / "said"), experts="on", seq_len=2048,
        global_rows=2, loader_shards=1,
    )  # fmt: skip
    loader = build(cfg)
    take(loader, 1)
    made = loader.provenance[0]
    loader.close()
    assert made["records"] == 4
    assert made["provenance"]["dialogues"]["left_out"] == {
        "cannot be used: meta.input_key is neither text nor a list of texts (first: record 4)": 1,
        "cannot be used: 1 <image> markers for 2 images (first: record 5)": 1,
    }
