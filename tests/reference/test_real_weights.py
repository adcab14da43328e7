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

from vilam3_jax.checkpoints import exports
from vilam3_jax.convert.importer import import_model
from vilam3_jax.data.tokenizer import load_tokenizer
from vilam3_jax.datasets import reports, samples
from vilam3_jax.inference.generate import Chunk, Generator
from vilam3_jax.models import build, model_config, param_paths

pytestmark = pytest.mark.slow
SAMPLES = Path(__file__).parents[2] / ".cache" / "samples"
TOKENS, NEW, TIE = 500, 200, 1e-3
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


@pytest.fixture(scope="module")
def reference(files, text):
    ids, prompts = text
    gguf = files["smollm2_gguf"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None  # do not stop before 200 tokens
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
def ours(export):
    """Config and parameters of a VILA with the imported LLM; its tower and projector are not used."""
    config = models.get("tiny")
    config.llm = exports.load_model_config(export).llm.to_dict()
    config = model_config.resolve(config)
    wanted = param_paths.flatten(build.abstract_model(config, "generative")[1])
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    llm = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for path, leaf in wanted.items()
        if path.startswith("llm/")
    }
    rest = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in wanted.items() if path not in llm}
    return config, param_paths.unflatten(rest | exports.load_params(export, llm))


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
