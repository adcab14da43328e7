"""Loading of back ends, and BERTScore with a tiny random encoder."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest

from vilam3_jax.errors import UserError
from vilam3_jax.evals.reports import backends


@pytest.fixture
def entry(monkeypatch):
    """Registers the back end of vilam3_experts, as its installation does."""
    point = importlib.metadata.EntryPoint(
        "bertscore", "vilam3_experts.report_scores:BertScore", backends.GROUP
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "pleural", "effusion", "heart", "large", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=24,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_bertscore(entry, encoder):
    pytest.importorskip("vilam3_experts")
    metric = backends.load("bertscore", encoder)
    wanted = ["no pleural effusion", "heart large", "heart large"]
    found = metric.score(wanted, ["pleural effusion .", "heart large", ""])
    assert found[1] == pytest.approx(1, abs=1e-6) and found[2] == 0 and found[0] < 0.999
    reference, hypothesis = metric.embed(wanted[0]), metric.embed("pleural effusion .")
    assert reference.shape == hypothesis.shape == (3, 16)
    cosine = [
        [one @ other / np.linalg.norm(one) / np.linalg.norm(other) for other in reference]
        for one in hypothesis
    ]
    precision = np.mean([max(row) for row in cosine])
    recall = np.mean([max(row[k] for row in cosine) for k in range(3)])
    assert found[0] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)
    assert metric.embed("heart " * 100).shape == (22, 16)


def test_greedy_match_by_hand():
    """Cosines of the hypothesis's tokens: (1, 0) and (0.6, 0.8)."""
    found = backends.greedy_match(np.eye(2) * 3, np.asarray([[2, 0], [3, 4]]))
    assert found == pytest.approx((0.9, 0.9, 0.9))
    assert backends.greedy_match(np.eye(2), np.asarray([[1, 0]])) == pytest.approx((1, 0.5, 2 / 3))


@pytest.mark.parametrize("name", ["chexbert", "radgraph", "green", "ratescore"])
def test_no_back_end(name, tmp_path):
    with pytest.raises(UserError, match=rf"no back end for '{name}' is installed"):
        backends.load(name, tmp_path)


def test_what_cannot_be_loaded(entry, tmp_path):
    with pytest.raises(UserError, match="unknown metric 'spice'"):
        backends.load("spice", tmp_path)
    with pytest.raises(UserError, match=r"none: no such folder; bertscore needs its weights there"):
        backends.load("bertscore", tmp_path / "none")
    with pytest.raises(UserError, match="no weights"):
        backends.load("bertscore", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"only pickles \(pytorch_model.bin\)"):
        backends.load("bertscore", tmp_path)


def test_damaged_weights(entry, tmp_path):
    pytest.importorskip("vilam3_experts")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read as an encoder"):
        backends.load("bertscore", tmp_path)
