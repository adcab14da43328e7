"""Real weights: SmolLM2-135M, imported here and read by transformers.

Downloads 90 MB into `.cache/samples`, the cache of `make quickstart`, unless present.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from vilam3_jax.configs import models

from tests.reference.test_int8_parity import RoundedCache, said_by_transformers, use_int8_weights
from vilam3_jax.checkpoints import exports
from vilam3_jax.checkpoints.exports import StoredModel
from vilam3_jax.convert.importer import import_model
from vilam3_jax.data.tokenizer import load_tokenizer
from vilam3_jax.datasets import reports, samples
from vilam3_jax.inference.generate import Chunk, Generator
from vilam3_jax.models import build
from vilam3_jax.runtime.settings import from_mapping

pytestmark = pytest.mark.slow
SAMPLES = Path(__file__).parents[2] / ".cache" / "samples"
TOKENS, NEW, TIE = 500, 200, 1e-3
CLOSE = 0.1  # logits after caches in int8 differ by less than half of this
QUESTION = "<|im_start|>user\nWhat can a chest X-ray show?<|im_end|>\n<|im_start|>assistant\n"


class Reference(NamedTuple):
    """transformers' results in float32.

    Attributes:
      logits: [500, V] of the reports.
      said: per prompt, the 200 tokens of greedy generation.
      margins: per prompt, the difference of the two largest logits at each token.
    """

    logits: np.ndarray
    said: list[np.ndarray]
    margins: list[np.ndarray]


@pytest.fixture(scope="module")
def files():
    return samples.fetch(SAMPLES, names=["smollm2_gguf", "iu_reports"])


@pytest.fixture(scope="module")
def export(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "export"
    import_model(files["smollm2_gguf"], out)
    return out


@pytest.fixture(scope="module")
def text(files, export):
    """500 tokens of real reports, and two prompts: the start of a report, and a question."""
    tokenizer = load_tokenizer(export / "tokenizer")
    usable, _ = reports.read_reports(files["iu_reports"])
    ids = tokenizer.encode("\n\n".join(report.text for report in usable[:40]))[:TOKENS]
    assert len(ids) == TOKENS and len(set(ids)) > 100
    return ids, [ids[:60], tokenizer.encode(QUESTION, allow_special=True)]


def transformers_model(gguf):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None  # do not stop before 200 tokens
    return model


def reference_of(model, text):
    ids, prompts = text
    said, margins = [], []
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
        for prompt in prompts:
            # Without the mask, the <|im_end|> of the question would count as padding.
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=NEW,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            said.append(out.sequences[0, len(prompt) :].numpy())
            best = torch.cat(out.logits).topk(2, dim=-1).values
            margins.append((best[:, 0] - best[:, 1]).numpy())
    return Reference(logits, said, margins)


@pytest.fixture(scope="module")
def reference(files, text):
    return reference_of(transformers_model(files["smollm2_gguf"]), text)


@pytest.fixture(scope="module")
def ours(export):
    """Config and parameters of a VILA with the imported LLM; its tower and projector are not used."""
    return read_ours(export)


def read_ours(export, dtype=None):
    """See `ours`; the model as `load` reads it in this type."""
    sections = models.get("tiny")
    sections.llm = exports.load_model_config(export).llm.to_dict()
    config = from_mapping(StoredModel, {**sections.to_dict(), "kind": "generative"})

    def read(wanted):
        llm = {path: leaf for path, leaf in wanted.items() if path.startswith("llm/")}
        rest = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in wanted.items() if path not in llm}
        return rest | exports.load_params(export, llm)

    params, config = exports.read_model(config, read, dtype=dtype)
    return config, params


def test_logits_of_real_reports(text, reference, ours, capsys):
    config, params = ours
    graphdef, _ = build.abstract_model(config, "generative")
    ids = jnp.asarray([text[0]])

    @jax.jit
    def logits(params):
        model = build.merge(graphdef, params)
        embedded = model.llm.embed(ids)
        return model.llm.logits(model.llm(embedded, jnp.ones_like(ids), jnp.arange(TOKENS)[None]))[0]

    with jax.default_matmul_precision("highest"):
        got = np.asarray(logits(params))
    error = float(np.abs(got - reference.logits).max())
    with capsys.disabled():
        print(
            f"\nSmolLM2-135M, {TOKENS} tokens of reports: largest difference {error:.2g} in logits "
            f"between {reference.logits.min():.1f} and {reference.logits.max():.1f}"
        )
    np.testing.assert_array_equal(got.argmax(-1), reference.logits.argmax(-1))
    # 30 layers of float32 sums in a different order, logits near 30.
    assert error < 1e-3


def test_greedy_tokens(text, reference, ours, export, capsys):
    config, params = ours
    generator = Generator(config, params, load_tokenizer(export / "tokenizer"), max_length=512)
    with jax.default_matmul_precision("highest"):
        session = generator.start(2)
        session.append([Chunk.text(prompt) for prompt in text[1]])
        said = session.decode(NEW, stop_ids=())
    for name, row, theirs, margins in zip(
        ("report", "question"), said, reference.said, reference.margins, strict=True
    ):
        ties = np.flatnonzero(margins < TIE)
        end = int(ties[0]) if len(ties) else NEW
        with capsys.disabled():
            print(
                f"\n{name}: {len(ties)} of {NEW} positions where transformers' first two tokens are within "
                f"{TIE} (smallest {margins.min():.2g}); compared up to {end}"
            )
        assert len(row.ids) == NEW and end > 20 and len(set(row.ids)) > 20
        np.testing.assert_array_equal(row.ids[:end], theirs[:end])


@pytest.fixture(scope="module")
def in_int8(export):
    return read_ours(export, "int8")


@pytest.fixture(scope="module")
def dequantised(files, text, in_int8):
    """transformers with our int8 weights, dequantised by NumPy."""
    model = transformers_model(files["smollm2_gguf"])
    use_int8_weights(model, in_int8[1])
    return model, reference_of(model, text)


def test_int8_weights(text, reference, dequantised, in_int8, export, capsys):
    """Tokens are those of transformers with the same rounded weights."""
    config, params = in_int8
    generator = Generator(config, params, load_tokenizer(export / "tokenizer"), max_length=512)
    with jax.default_matmul_precision("highest"):
        session = generator.start(2)
        session.append([Chunk.text(prompt) for prompt in text[1]])
        said = session.decode(NEW, stop_ids=())
        whole = generator.start(1)
        whole.append([Chunk.text(text[0])])
    error = np.abs(np.asarray(whole._state.logits)[0] - dequantised[1].logits[-1]).max()
    with capsys.disabled():
        print(f"\nlargest difference from transformers with the same int8 weights: {error:.2g}")
    assert error < 1e-3
    for name, row, theirs, margins in zip(
        ("report", "question"), said, dequantised[1].said, dequantised[1].margins, strict=True
    ):
        ties = np.flatnonzero(margins < TIE)
        end = int(ties[0]) if len(ties) else NEW
        with capsys.disabled():
            print(f"\n{name}: compared with transformers' int8 weights up to {end}")
        assert end > 20
        np.testing.assert_array_equal(row.ids[:end], theirs[:end])
    check_quality(reference.logits, dequantised[1].logits, np.asarray(text[0]), capsys)


def check_quality(exact, rounded, ids, capsys):
    """Rounding changes the next token only where two are nearly equal, and the perplexity hardly."""
    exact, rounded = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (exact, rounded))
    best = np.sort(exact, axis=-1)
    margins = best[:, -1] - best[:, -2]
    other = exact.argmax(-1) != rounded.argmax(-1)
    losses = [-x[np.arange(len(ids) - 1), ids[1:]].mean() for x in (exact, rounded)]
    divergence = (np.exp(exact) * (exact - rounded)).sum(axis=-1).mean()
    with capsys.disabled():
        print(
            f"\nint8 weights: another next token at {other.mean():.1%} of {len(ids)} positions, where the "
            f"best two differ by {margins[other].max():.2g} at most; perplexity "
            f"{np.exp(losses[0]):.3f} → {np.exp(losses[1]):.3f}; divergence {divergence:.2g} nats"
        )
    assert (margins > 0.5).mean() > 0.7 and not other[margins > 0.5].any()
    assert abs(losses[1] - losses[0]) < 0.01 and divergence < 0.01


def test_int8_cache(text, dequantised, in_int8, export, capsys):
    """Beside transformers with a cache that rounds likewise; floats that differ in the last bit may round to
    other integers, so answers agree up to the first close decision."""
    config, params = in_int8
    generator = Generator(
        config, params, load_tokenizer(export / "tokenizer"), max_length=512, cache_dtype="int8"
    )
    with jax.default_matmul_precision("highest"):
        session = generator.start(2)
        session.append([Chunk.text(prompt) for prompt in text[1]])
        said = session.decode(NEW, stop_ids=())
    for name, row, prompt in zip(("report", "question"), said, text[1], strict=True):
        wanted, logits = said_by_transformers(dequantised[0], prompt, RoundedCache(), NEW)
        best = np.sort(logits, axis=-1)[:, -2:]
        close = np.flatnonzero(best[:, 1] - best[:, 0] < CLOSE)
        end = int(close[0]) if len(close) else NEW
        own = np.asarray(row.log_probs[:end])
        theirs = logits[np.arange(end), wanted[:end]] - np.log(np.exp(logits[:end]).sum(-1))
        difference = float(np.abs(own - theirs).max())
        with capsys.disabled():
            print(f"\n{name}: compared up to {end}; log-probabilities differ by {difference:.2g}")
        assert end > 20
        np.testing.assert_array_equal(row.ids[:end], wanted[:end])
        assert difference < CLOSE / 2
