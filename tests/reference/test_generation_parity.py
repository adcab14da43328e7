"""Greedy generation equals transformers', token for token: random models, prompts of mixed lengths."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from vilam3_jax.configs import models

from tests.reference import decoder_parity, test_gemma3_parity, test_mistral_parity
from tests.reference.test_llama_parity import pair as llama_pair
from vilam3_jax.inference.batching import Batcher, Turn
from vilam3_jax.inference.generate import Chunk, Generator
from vilam3_jax.models import build, model_config, param_paths

NEW, TIE = 200, 1e-3
LENGTHS = (3, 90, 17, 41, 120)  # two sizes of caches; more dialogues than rows


@pytest.fixture(autouse=True)
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


def reference_of(family, tmp_path):
    """transformers' random model and ours."""
    if family == "mistral":
        return test_mistral_parity.pair(tmp_path, sliding_window=33)
    if family == "gemma3":
        return test_gemma3_parity.pair(tmp_path, sliding_window=33)
    reference, *_ = llama_pair(family)
    return decoder_parity.imported(reference, tmp_path / family)


def generator_of(pair):
    """The LLM in a VILA whose tower and projector are not used."""
    config = models.get("tiny")
    config.llm = pair.config.to_dict()
    config = model_config.resolve(config)
    wanted = param_paths.flatten(build.abstract_model(config, "generative")[1])
    llm = {f"llm/{path}": leaf for path, leaf in param_paths.flatten(pair.params).items()}
    rest = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in wanted.items() if path not in llm}
    tokenizer = SimpleNamespace(vocab_size=decoder_parity.VOCAB)
    return Generator(config, param_paths.unflatten(rest | llm), tokenizer, max_length=512, batch_size=3)


def said_by_transformers(reference, prompt):
    """200 tokens, and the difference of the two largest logits at each."""
    reference.generation_config.eos_token_id = None
    out = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(out.logits).topk(2, dim=-1).values
    return out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).numpy()


def dialogue(prompt):
    answer = yield Turn(Chunk.text(prompt), NEW, ())
    return answer.ids


@pytest.mark.parametrize(
    "family", ["grouped", *(pytest.param(f, marks=pytest.mark.slow) for f in ("Qwen3", "mistral", "gemma3"))]
)
def test_200_tokens_of_a_batch_of_mixed_lengths(family, tmp_path):
    pair = reference_of(family, tmp_path)
    head = pair.reference.get_output_embeddings().weight
    tied = head is pair.reference.get_input_embeddings().weight
    if not tied:  # so that the best two tokens differ by more than rounding
        with torch.no_grad():
            head *= 8
        pair = decoder_parity.imported(pair.reference, tmp_path / "scaled")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, decoder_parity.VOCAB, length).tolist() for length in LENGTHS]
    found, compared = list(Batcher(generator_of(pair)).run(map(dialogue, prompts))), 0
    for prompt, ours in zip(prompts, found, strict=True):
        wanted, margins = said_by_transformers(pair.reference, prompt)
        # Up to the first token where rounding could decide.
        certain = int((margins < TIE).argmax()) if margins.min() < TIE else NEW
        assert ours[:certain] == wanted[:certain]
        compared += certain
    assert compared > 0.8 * NEW * len(LENGTHS)
    assert len(set(map(tuple, found))) == len(LENGTHS)  # the answers depend on the prompts
    assert len(set().union(*found)) > 10
