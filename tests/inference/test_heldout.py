"""Answers to held-out examples during training: prompts, and answers of sharded parameters."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vilam3_jax import config as config_lib
from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.data.examples import Turn
from vilam3_jax.data.templates import encode_prompt, model_template
from vilam3_jax.errors import UserError
from vilam3_jax.inference import heldout
from vilam3_jax.models import build, param_paths
from vilam3_jax.models import model_config as model_config_lib
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import evaluation, step_guard
from vilam3_jax.training import program as program_lib
from vilam3_jax.training.train_state import TrainState


@pytest.fixture
def config(model_config, world, tokenizer_dir):
    config = config_lib.base_config()
    config.model = model_config.copy_and_resolve_references()
    config.model.tokenizer = str(tokenizer_dir)
    config.data.path, config.data.mixture = str(world.data), (("instruct", 1.0),)
    config.data.seq_len = 256
    config.mesh.update(dict(data=2, fsdp=2, tensor=2))
    config.eval_every, config.eval_generate = 1, 6
    return config


def read_questions(config, tokenizer):
    run = config_lib.resolve(config)
    return heldout.read_questions(run.data, run.model, run.seed, run.eval_generate, tokenizer)


def prompt_of(config, tokenizer, turns):
    """Encoded like a question to the agent, independently of the trainer."""
    tokens_per_image = model_config_lib.resolve(config.model).tokens_per_image
    return encode_prompt(tokenizer, model_template(config.model), turns, tokens_per_image)


def test_prompts_are_those_of_a_dialogue_and_the_turns_take_turns(config, tokenizer):
    questions = read_questions(config, tokenizer)
    assert len(questions) == 6 and [one.turn for one in questions] == [0, 1, 0, 1, 0, 1]
    asked = {
        "scan": ["Is the liver visible in this slice?", "yes", "What imaging modality is this?", "CT"],
        "film": ["Does this film show pneumonia?", "no", "What imaging modality is this?", "chest X-ray"],
    }
    for one in questions:
        said = asked["scan" if "scan" in one.id else "film"]
        turns = [Turn("user", "<image>\n" + said[0])]
        if one.turn:
            turns += [Turn("assistant", said[1]), Turn("user", said[2])]
        encoded = prompt_of(config, tokenizer, turns)
        np.testing.assert_array_equal(one.prompt.tokens, encoded.tokens)
        assert (one.prompt.visual_index >= 0).sum() == (encoded.image_of_token >= 0).sum() > 0
        assert one.answer == said[2 * one.turn + 1]
        assert len(one.prompt.images) == 1


def test_with_experts_a_call_and_the_answer_to_it_are_asked_for(config, tokenizer, world):
    config.data.experts, config.data.annotations = "on", str(world.annotations)
    config.data.seq_len = 1024
    questions = read_questions(config, tokenizer)
    assert {one.turn for one in questions} == {0, 1, 2}
    assert all("Let me trigger <" in one.answer for one in questions if one.turn == 0)
    assert all(one.answer in ("yes", "no") for one in questions if one.turn == 1)


def test_captions_end_with_their_line(config, tokenizer):
    config.data.mixture = (("pairs", 1.0),)
    questions = read_questions(config, tokenizer)
    assert {one.answer for one in questions} == {"CT image.", "chest X-ray image."}
    (newline,) = {one.stops[0] for one in questions}
    assert tokenizer.decode([newline]) == "\n"


def test_an_example_too_long_for_a_row_is_named_when_none_is_left(config, tokenizer):
    config.data.seq_len = 8
    with pytest.raises(UserError, match=r"eval_generate.*instruct/heldout record.*tokens"):
        read_questions(config, tokenizer)


@pytest.fixture(scope="module")
def say(model_config, params):
    """Greedy answers without cache: the model reads the whole sequence for every token."""
    graphdef, _ = build.abstract_model(model_config, "generative")
    model = build.merge(graphdef, params)

    @jax.jit
    def logits(tokens, visual, images, length):
        positions = jnp.arange(tokens.shape[1])[None]
        segments = (positions < length).astype(jnp.int32)
        valid = jnp.ones((1, images.shape[0]), bool)
        weights = jnp.zeros(tokens.shape, jnp.float32)
        hidden = model(PackedBatch(tokens, segments, positions, weights, visual, images[None], valid))
        return model.llm.logits(hidden[0, length - 1])

    def say(tokenizer, question):
        prompt, said = question.prompt, []
        for _ in range(question.budget):
            tokens = [*prompt.tokens.tolist(), *said]
            room = 128 - len(tokens)
            visual = [*prompt.visual_index.tolist(), *[-1] * (len(said) + room)]
            found = logits(
                np.asarray([tokens + [0] * room], np.int32),
                np.asarray([visual], np.int32),
                np.stack(prompt.images),
                len(tokens),
            )
            token = int(jnp.argmax(found[: tokenizer.vocab_size]))
            if token in question.stops:
                break
            said.append(token)
        return tokenizer.decode(said).strip()

    return say


def test_sharded_parameters_say_what_the_model_says(config, params, tokenizer, say, tmp_path, monkeypatch):
    """8 devices, rows over 4 parts, heads over 2, 6 questions: two rows stay empty."""
    run = config_lib.resolve(config)
    mesh = mesh_lib.build_mesh(run.mesh)
    program = program_lib.build(run, mesh)
    flat = param_paths.flatten(params)
    family_rules = build.parameter_rules(run.model, run.task)
    placed = mesh_lib.parameter_shardings(flat, run.parameter_rules, family_rules, mesh)
    sharded = {path: jax.device_put(leaf, placed[path]) for path, leaf in flat.items()}
    answers = heldout.HeldoutAnswers(
        run.data,
        run.model,
        run.seed,
        run.eval_generate,
        mesh_lib.rows(mesh),
        functools.partial(program.context, whole_rows=True),
        program.annotate,
    )
    programs, encoded, read = answers._generator._programs, [], []
    recording = dataclasses.replace(
        programs,
        encode=lambda *args: encoded.append(args[1:3]) or programs.encode(*args),
        prefill=lambda *args: read.append(args[4:6]) or programs.prefill(*args),
    )
    monkeypatch.setattr(answers._generator, "_programs", recording)
    rows, values = answers(sharded)
    shown = [question.prompt.images[0].tobytes() for question in answers.questions]
    pictures = [len(set(shown[part::4])) for part in range(4)]
    assert len(read) == len(encoded) == 1 and max(pictures) == 2
    for (tokens, visual), (images, valid) in zip(read, encoded, strict=True):
        # Questions go to the parts round-robin; each image is once in the part of its rows.
        assert images.shape[:2] == valid.shape == (4, 2) and tokens.shape[0] == visual.shape[0] == 8
        assert valid.sum(axis=1).tolist() == pictures
        assert all(
            array.addressable_shards[0].data.shape[0] == array.shape[0] // 4 for array in (images, tokens)
        )
    expected = [say(tokenizer, question) for question in answers.questions]
    assert [row["answer"] for row in rows] == expected
    assert len(set(expected)) > 2, "equal texts would prove little"
    assert set(values) == {"generate_exact_match", "generate_token_f1"}
    # Other parameters give other answers.
    other = sharded | {"llm/final_norm/scale": -sharded["llm/final_norm/scale"]}
    assert [row["answer"] for row in answers(other)[0]] != expected
    assert [row["answer"] for row in answers(sharded)[0]] == expected

    state = TrainState(2, None, sharded, {}, None, step_guard.Guard(None, None, None, None))
    evaluate = evaluation.Evaluation(lambda state, swapped: {"heldout_true": 1.0}, answers, tmp_path, 0)
    assert set(evaluate(2, state)) == {"heldout_true", *values}
    evaluate(4, state)
    evaluation.Evaluation(lambda *_: {}, answers, tmp_path, 2)(4, state)
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2] * 6 + [4] * 6
    assert [line["answer"] for line in lines[:6]] == expected


@pytest.mark.parametrize(
    "answer, reference, f1",
    [
        ("yes", "Yes.", 1.0),
        ("the liver", "liver", 1.0),
        ("liver and spleen", "liver, spleen, aorta", 2 / 3),
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        ("", "", 1.0),
        ("liver liver liver", "liver", 0.5),
    ],
)
def test_token_f1(answer, reference, f1):
    assert heldout.token_f1(answer, reference) == pytest.approx(f1)
