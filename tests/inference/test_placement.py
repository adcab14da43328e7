"""Parameters on a mesh: the head of an odd vocabulary."""

from __future__ import annotations

import copy

import jax
import numpy as np

from vilam3_jax.inference import placement
from vilam3_jax.inference.generate import Chunk, Generator
from vilam3_jax.models import build
from vilam3_jax.models.model_config import resolve
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.sharding.mesh import MeshConfig


def test_the_head_of_an_odd_vocabulary_is_split(model_config, tokenizer):
    """The tokens of one device, while each of two holds half of the padded columns and logits."""
    model = copy.deepcopy(model_config)
    model.llm.vocab_size, model.llm.tie_embeddings = 321, False
    model = resolve(model)
    nested = build.init_params(model, "generative", jax.random.key(0))
    nested = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, nested)
    mesh = mesh_lib.build_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    one = Generator(model, nested, tokenizer, max_length=256, batch_size=2)
    two = Generator(model, nested, tokenizer, max_length=256, batch_size=2, mesh=mesh)
    prompts = [Chunk.text(np.arange(10, 10 + count)) for count in (5, 30)]
    answers = []
    for generator in (one, two):
        session = generator.start(2)
        session.append(prompts)
        answers.append(session.decode(20, []))
    assert [row.ids for row in answers[0]] == [row.ids for row in answers[1]]
    for row, other in zip(*answers, strict=True):
        np.testing.assert_allclose(row.log_probs, other.log_probs, atol=1e-4)
    planned = placement.abstract_params(model, mesh)["llm"]["lm_head"]["kernel"].value
    held = two._params["llm"]["lm_head"]["kernel"].value
    assert held.shape == planned.shape == (model.llm.hidden_size, 512)
    assert held.sharding == planned.sharding and held.addressable_shards[0].data.shape[1] == 256
    assert not np.asarray(held)[:, 321:].any()
    logits = session._state.logits
    assert logits.addressable_shards[0].data.shape == (2, 256)
