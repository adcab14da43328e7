"""The agent loop: the model reads exactly the sequences of training, and failures are ordinary turns."""

from __future__ import annotations

import dataclasses

import nibabel as nib
import numpy as np
import pytest

from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.examples import Example, ExpertRequest, ImageRef, RequestImage, Turn
from vilam3_jax.data.experts.cards import load_cards, render_cards
from vilam3_jax.data.experts.exchange import call_turn
from vilam3_jax.data.experts.grammar import Call
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment
from vilam3_jax.data.image_processor import ImageProcessor
from vilam3_jax.data.render import ImageReader, Renderer
from vilam3_jax.data.templates import CHATML, encode_conversation
from vilam3_jax.data.volume_slices import SliceRule
from vilam3_jax.data.volumes import load_volume
from vilam3_jax.errors import UserError
from vilam3_jax.inference import agent as agent_lib
from vilam3_jax.inference import batching
from vilam3_jax.inference.generate import Decoded, Generator
from vilam3_jax.inference.images import open_image

SIDE, PER_IMAGE = 32, 4
CARDS = load_cards("quickstart")
KEY = "ab" * 32
QUESTION = "Is the liver visible in this slice?"


class ScriptedModel:
    """Stands in for a generator; `answer` runs a dialogue in which the model says given lines."""

    tokens_per_image, batch_size = PER_IMAGE, 8
    processor = ImageProcessor("resize", SIDE)

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.tokens, self.visual, self.images, self.prefixes = [], [], [], []

    def answer(self, script, lines):
        """Runs a script of the agent; returns its transcript."""
        tokens, visual, images, lines, value = [], [], [], iter(lines), None
        self.prefixes.append(0)
        try:
            while True:
                wanted = script.send(value)
                if isinstance(wanted, batching.Wait):
                    value = wanted.call()
                    continue
                del tokens[len(tokens) - wanted.forget :], visual[len(visual) - wanted.forget :]
                shift = len(images) * PER_IMAGE
                tokens += wanted.chunk.tokens.tolist()
                visual += [v + shift if v >= 0 else -1 for v in wanted.chunk.visual_index.tolist()]
                images += wanted.chunk.images
                self.prefixes[-1] = self.prefixes[-1] or wanted.prefix
                value = Decoded(self.tokenizer.encode(next(lines)), True)
                tokens += value.ids
                visual += [-1] * len(value.ids)
        except StopIteration as end:
            self.tokens.append(tokens)
            self.visual.append(visual)
            self.images.append(images)
            return end.value


class Store(dict):
    def get(self, input_key, expert, args=""):
        return super().get((input_key, expert, args))


def segmentation():
    labels = np.zeros((12, 10, 4), np.int32)
    labels[2:8, 2:8, 1:3] = 1
    labels[9:, 8:, 2] = 3
    segments = (
        Segment(1, "liver", 72, 720.0, 1, (2, 2, 1, 8, 8, 3)),
        Segment(3, "spleen", 6, 60.0, 1, (9, 8, 2, 12, 10, 3)),
    )
    return Annotation(KEY, "ORGANS", "organs", segments=segments, labels=LabelMap.encode(labels, np.eye(4)))


@pytest.fixture
def store():
    classes = {"pneumonia": 0.9, "normal": 0.1}
    return Store(
        {
            (KEY, "ORGANS", "organs"): segmentation(),
            (KEY, "PNEUMONIA", ""): Annotation(KEY, "PNEUMONIA", probabilities=classes),
        }
    )


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def ask(tokenizer, script, queries, provider, **options):
    options = {"cards": CARDS, **options}
    model = ScriptedModel(tokenizer)
    agent = agent_lib.Agent(model, CHATML, provider=provider, **options)
    return model, [
        model.answer(agent.script(query), lines) for query, lines in zip(queries, script, strict=True)
    ]


def trigger(name="ORGANS", args="organs"):
    return f"This looks like a CT image. Let me trigger <{name}({args})>."


def query(image, **changes):
    question = changes.pop("question", QUESTION)
    if image is None:
        return agent_lib.Query(question)
    return agent_lib.Query(
        question, (agent_lib.Scan(**{"image": image, "input_key": KEY, "axis": 2, "index": 2, **changes}),)
    )


def test_tokens_and_images_are_those_of_training(tokenizer, store, image, tmp_path):
    """The whole dialogue that the cache sees equals the rendered training sequence, token by token."""
    volume_slice = ImageRef(path="scan.nii", axis=2, index=2)
    example = Example(
        "e",
        "conversation",
        (volume_slice,),
        (Turn("user", f"<image>\n{QUESTION}"), Turn("assistant", "yes", True)),
        (ExpertRequest("ORGANS", "organs"),),
        {"input_key": KEY},
    )
    reader = ImageReader(SIDE)
    reader.read = lambda ref, root: image
    rendered = Renderer(image_reader=reader, experts="on", cards=CARDS, annotations=store).render(
        example, tmp_path
    )
    encoded = encode_conversation(tokenizer, CHATML, rendered.turns, PER_IMAGE)
    called = call_turn([CARDS[0]], [Call("ORGANS", "organs")]).text
    session, (transcript,) = ask(
        tokenizer, [[called, "yes"]], [query(image)], agent_lib.AnnotationProvider(store)
    )
    # The dialogue ends with the answer; training appends its stop token and newline.
    tail = len(tokenizer.encode("\n")) + 1
    assert session.tokens[0] == encoded.tokens.tolist()[:-tail]
    where = encoded.image_of_token * PER_IMAGE + encoded.visual_offset
    assert session.visual[0] == np.where(encoded.image_of_token >= 0, where, -1).tolist()[:-tail]
    for fed, trained in zip(session.images[0], rendered.images, strict=True):
        assert np.array_equal(fed, trained)
    assert transcript.answer == "yes"
    assert transcript.trigger == ("ORGANS", "organs")
    assert transcript.trigger_text == called
    assert "liver 720" in transcript.expert_text
    assert np.array_equal(transcript.overlay, rendered.images[1])
    assert [turn.role for turn in transcript.turns] == ["user", "assistant", "expert", "assistant"]


def trained_and_asked(tokenizer, store, example, pictures, script, query, tmp_path, cards=CARDS):
    """(what training reads, what the cache sees, transcript) of one dialogue, as (tokens, visual index)."""
    reader = ImageReader(SIDE)
    reader.read = lambda ref, root: pictures[example.images.index(ref)]
    renderer = Renderer(image_reader=reader, experts="on", cards=cards, annotations=store)
    rendered = renderer.render(example.validate(), tmp_path)
    encoded = encode_conversation(tokenizer, CHATML, rendered.turns, PER_IMAGE)
    where = encoded.image_of_token * PER_IMAGE + encoded.visual_offset
    visual = np.where(encoded.image_of_token >= 0, where, -1)
    provider = agent_lib.AnnotationProvider(store)
    session, (transcript,) = ask(tokenizer, [script], [query], provider, cards=cards)
    tail = len(tokenizer.encode("\n")) + 1
    assert len(session.images[0]) == len(rendered.images)
    for fed, seen in zip(session.images[0], rendered.images, strict=True):
        assert np.array_equal(fed, seen)
    trained = encoded.tokens.tolist()[:-tail], visual.tolist()[:-tail]
    return trained, (session.tokens[0], session.visual[0]), transcript


def test_slices_of_a_whole_volume_are_those_of_training(tokenizer, tmp_path):
    voxels = np.random.default_rng(0).integers(-200, 300, (12, 10, 4)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "scan.nii")
    volume = load_volume(tmp_path / "scan.nii", modality="CT")
    said = dataclasses.replace(segmentation(), input_key=volume.content_key)
    store = Store({said.key: said})
    example = Example(
        "e",
        "conversation",
        (ImageRef(path="scan.nii", axis=2, modality="CT"),),
        (Turn("user", f"<image>\n{QUESTION}"), Turn("assistant", "yes", True)),
        (ExpertRequest("ORGANS", "organs"),),
        {"input_key": volume.content_key},
    )
    renderer = Renderer(
        image_reader=ImageReader(SIDE), experts="on", cards=CARDS, annotations=store, slices=SliceRule(3)
    )
    rendered = renderer.render(example.validate(), tmp_path)
    encoded = encode_conversation(tokenizer, CHATML, rendered.turns, PER_IMAGE)
    asked = agent_lib.Query(QUESTION, (open_image(volume, SIDE, slices=3),))
    called = call_turn([CARDS[0]], [Call("ORGANS", "organs")]).text
    session, (transcript,) = ask(tokenizer, [[called, "yes"]], [asked], agent_lib.AnnotationProvider(store))
    tail = len(tokenizer.encode("\n")) + 1
    assert session.tokens[0] == encoded.tokens.tolist()[:-tail]
    assert len(session.images[0]) == len(rendered.images) == 4
    for fed, trained in zip(session.images[0], rendered.images, strict=True):
        assert np.array_equal(fed, trained)
    assert "slice 1 of 4: <image>" in transcript.turns[0].text
    assert "slice 3 of 4: <image>" in transcript.turns[2].text  # liver and spleen
    with pytest.raises(UserError, match="give only one of them"):
        open_image(volume, SIDE, slices=3, index=1)
    with pytest.raises(UserError, match="slices 0: must be at least 1"):
        open_image(volume, SIDE, slices=0)
    with pytest.raises(UserError, match="is a 2-D image, which has no slices"):
        open_image(rendered.images[0], SIDE, slices=2)


def test_several_calls_of_one_turn_are_those_of_training(tokenizer, store, image, tmp_path):
    requests = (ExpertRequest("PNEUMONIA", policy="always"), ExpertRequest("ORGANS", "organs"))
    turns = (Turn("user", f"<image>\n{QUESTION}"), Turn("assistant", "yes", True))
    ref = ImageRef(path="scan.nii", axis=2, index=2)
    example = Example("e", "conversation", (ref,), turns, requests, {"input_key": KEY})
    calls = [Call("PNEUMONIA"), Call("ORGANS", "organs")]
    called = call_turn([CARDS[3], CARDS[0]], calls).text
    trained, asked, transcript = trained_and_asked(
        tokenizer, store, example, [image], [called, "yes"], query(image), tmp_path
    )
    assert asked == trained
    assert [a.expert for a in transcript.annotations] == ["PNEUMONIA", "ORGANS"]
    assert (
        not transcript.cut and not transcript.unexecuted_calls and transcript.trigger == ("ORGANS", "organs")
    )


def test_four_sequences_are_one_request(tokenizer, image, tmp_path):
    """BRATS reads four scans; its overlay is on the first of its roles, not on the first image."""
    cards = load_cards("experts")
    roles = cards[0].roles
    assert roles == ("t1c", "t1", "t2", "flair")
    pictures = [np.full((SIDE, SIDE, 3), 40 * n, np.uint8) for n in range(1, 5)]
    shown = ("flair", "t1c", "t1", "t2")
    keys = {role: f"{n}" * 64 for n, role in enumerate(roles)}
    labels = np.zeros((12, 10, 4), np.int32)
    labels[2:8, 2:8, 2] = 1
    labels[4:6, 4:6, 2] = 4
    pairs = tuple((role, keys[role]) for role in roles)
    record = Annotation(
        inputs_key(pairs),
        "BRATS",
        segments=(
            Segment(1, "tumor core", 32, 3.2, 1, (2, 2, 2, 8, 8, 3)),
            Segment(4, "enhancing tumor", 4, 0.4, 1, (4, 4, 2, 6, 6, 3)),
        ),
        labels=LabelMap.encode(labels, np.eye(4)),
        inputs=pairs,
    )
    store = Store({record.key: record})
    refs = tuple(ImageRef(path=f"{role}.nii", axis=2, index=2) for role in shown)
    request = ExpertRequest("BRATS", "", tuple(RequestImage(shown.index(role), role) for role in roles))
    text = "FLAIR: <image>, T1(contrast enhanced): <image>, T1: <image>, T2: <image>\nIs there a tumor?"
    turns = (Turn("user", text), Turn("assistant", "yes", True))
    example = Example(
        "e", "conversation", refs, turns, (request,), {"input_key": [keys[role] for role in shown]}
    )
    scans = tuple(
        agent_lib.Scan(picture, keys[role], 2, 2, role=role)
        for picture, role in zip(pictures, shown, strict=True)
    )
    called = call_turn([cards[0]], [Call("BRATS")]).text
    asked_query = agent_lib.Query("Is there a tumor?", scans)
    trained, asked, transcript = trained_and_asked(
        tokenizer, store, example, pictures, [called, "yes"], asked_query, tmp_path, cards
    )
    # The expert's turn repeats the question: training takes it from the user's turn, without its markers.
    assert asked == trained
    assert transcript.annotation.status == "ok" and "tumor core" in transcript.expert_text
    grey = np.unique(transcript.overlay[0, 0]).tolist()
    assert grey == [80], "the overlay lies on T1c"
    alone = agent_lib.Query("Is there a tumor?", scans[1:2])
    provider = agent_lib.AnnotationProvider(store)
    _, (transcript,) = ask(tokenizer, [[called, "no"]], [alone], provider, cards=cards)
    assert "t1, t2, flair is missing" in transcript.annotation.reason


@pytest.mark.parametrize(
    ("said", "cut", "not_made"),
    [
        ("Let me see. <PNEUMONIA()> The results are pneumonia: yes (0.99).", 1, []),
        ("<PNEUMONIA()> says no, so <ORGANS(organs)>", 1, [Call("ORGANS", "organs")]),
    ],
)
def test_results_that_the_model_invents_are_cut(tokenizer, store, image, said, cut, not_made):
    """The cache is the same as if the model had stopped at its call."""
    provider = agent_lib.AnnotationProvider(store)
    kept = said[: said.index(">") + 1]
    session, (clean, _) = ask(tokenizer, [[kept, "no"], ["fine", ""]], [query(image)] * 2, provider)
    wanted = [list(row) for row in session.tokens]
    session, (invented, other) = ask(tokenizer, [[said, "no"], ["fine", ""]], [query(image)] * 2, provider)
    assert session.tokens == wanted
    assert len(invented.cut) == cut and list(invented.unexecuted_calls) == not_made
    assert invented.turns[1].text == kept and "0.99" not in invented.expert_text
    assert invented.answer == clean.answer == "no" and other.answer == "fine" and not other.cut


def test_calls_that_are_not_made_are_noted(tokenizer, store, image):
    provider = agent_lib.AnnotationProvider(store)
    _, (last,) = ask(tokenizer, [["<PNEUMONIA()>", "<BRAINTUMOR()>"]], [query(image)], provider)
    assert last.unexecuted_calls == (Call("BRAINTUMOR"),) and last.trigger == ("PNEUMONIA", "")
    _, (off,) = ask(tokenizer, [["<PNEUMONIA()>"]], [query(image)], None)
    assert off.unexecuted_calls == (Call("PNEUMONIA"),) and off.trigger is None


def test_cards_and_image_are_a_prefix(tokenizer, store, image):
    provider = agent_lib.AnnotationProvider(store)
    queries = [query(image), query(image, question="Which plane?")]
    model, _ = ask(tokenizer, [["no"], ["no"]], queries, provider)
    cards = tokenizer.encode(render_cards(CARDS))
    start = model.tokens[0].index(cards[0], 1)
    assert model.tokens[0][start : start + len(cards)] == cards
    (end,) = set(model.prefixes)
    assert model.tokens[0][:end] == model.tokens[1][:end] and end > start + len(cards)
    assert model.visual[0][end - 1] == PER_IMAGE - 1 and model.visual[0][end] == -1, "it ends with the image"


def test_without_experts_the_prompt_is_that_of_training_without(tokenizer, image):
    turns = (Turn("user", f"<image>\n{QUESTION}"), Turn("assistant", trigger(), True))
    encoded = encode_conversation(tokenizer, CHATML, turns, PER_IMAGE)
    session, (transcript,) = ask(tokenizer, [[trigger()]], [query(image)], None)
    assert session.tokens[0] == encoded.tokens.tolist()[: -len(tokenizer.encode("\n")) - 1]
    assert transcript.answer == trigger() and transcript.trigger is None
    assert "available expert models" not in transcript.prompt


def test_rows_go_their_own_ways(tokenizer, store, image):
    script = [[trigger(), "yes"], ["no", "unused"], [trigger("PNEUMONIA", "anything"), "no"]]
    queries = [query(image), query(image, question="Which plane?"), query(image, axis=None, index=None)]
    _, transcripts = ask(tokenizer, script, queries, agent_lib.AnnotationProvider(store))
    assert [t.answer for t in transcripts] == ["yes", "no", "no"]
    assert [t.trigger for t in transcripts] == [("ORGANS", "organs"), None, ("PNEUMONIA", "")]
    assert "pneumonia: yes (0.90)" in transcripts[2].expert_text
    assert transcripts[2].overlay is None


@pytest.mark.parametrize(
    ("called", "changes", "reason"),
    [
        (("NOBODY", "x"), {}, "no expert NOBODY"),
        (("ORGANS", "feet"), {}, "does not take the argument 'feet'"),
        (("BRAINSEG", ""), {}, "no stored result"),
        (("ORGANS", "organs"), {"input_key": "cd" * 32}, "no stored result"),
        (("ORGANS", "organs"), {"axis": None, "index": None}, "does not fit this image"),
        (("ORGANS", "organs"), {"index": 99}, "does not fit this image"),
        (("ORGANS", "organs"), {"image": None}, "about no image"),
    ],
)
def test_a_failed_call_is_an_ordinary_turn(tokenizer, store, image, called, changes, reason):
    script = [[trigger(*called), "I cannot tell"]]
    asked = query(**{"image": image, **changes})
    _, (transcript,) = ask(tokenizer, script, [asked], agent_lib.AnnotationProvider(store))
    assert transcript.annotation.status == "failed" and reason in transcript.annotation.reason
    assert "could not analyse" in transcript.expert_text and QUESTION in transcript.expert_text
    assert transcript.answer == "I cannot tell"


def test_experts_are_asked_at_most_as_often_as_allowed(tokenizer, store, image):
    script = [[trigger(), trigger(), trigger()]]
    _, (once,) = ask(tokenizer, script, [query(image)], agent_lib.AnnotationProvider(store))
    assert [t.role for t in once.turns].count("expert") == 1 and once.answer == trigger()
    _, (twice,) = ask(tokenizer, script, [query(image)], agent_lib.AnnotationProvider(store), max_rounds=2)
    assert [t.role for t in twice.turns].count("expert") == 2
    _, (never,) = ask(tokenizer, script, [query(image)], agent_lib.AnnotationProvider(store), max_rounds=0)
    assert [t.role for t in never.turns] == ["user", "assistant"]


def test_falsified_experts_say_something_else(tokenizer, store, image):
    script = [[trigger(), "yes"]]
    _, (true,) = ask(tokenizer, script, [query(image)], agent_lib.AnnotationProvider(store))
    _, (false,) = ask(tokenizer, script, [query(image)], agent_lib.AnnotationProvider(store, falsify_seed=0))
    assert "liver" in true.expert_text.split("Use this")[0]
    assert "liver" not in false.expert_text.split("Use this")[0]
    assert false.annotation.version != true.annotation.version


def test_an_image_marker_in_a_question_is_refused(tokenizer, image):
    with pytest.raises(UserError, match="holds <image>"):
        ask(tokenizer, [["yes"]], [query(image, question="What is <image>?")], None)


def test_experts_without_cards_are_refused(tokenizer, store):
    with pytest.raises(UserError, match="no cards"):
        agent_lib.Agent(ScriptedModel(tokenizer), CHATML, provider=agent_lib.AnnotationProvider(store))


def test_a_real_model_holds_a_dialogue(model_config, params, tokenizer, store, image):
    generator = Generator(model_config, params, tokenizer, max_length=1024, batch_size=2)
    agent = agent_lib.Agent(generator, CHATML, cards=CARDS, provider=agent_lib.AnnotationProvider(store))
    queries = [query(image), query(None)]
    transcripts = list(agent.run(queries, max_new_tokens=5))
    assert [t.turns[0].role for t in transcripts] == ["user", "user"]
    assert next(agent.run(queries, max_new_tokens=5)).answer == transcripts[0].answer


def test_a_follow_up_knows_the_results(tokenizer, store, image):
    """A second question neither runs the expert again nor loses the overlay; the reference does both."""
    asked = []

    class Counting(agent_lib.AnnotationProvider):
        def annotate(self, *args):
            asked.append(args)
            return super().annotate(*args)

    model = ScriptedModel(tokenizer)
    agent = agent_lib.Agent(model, CHATML, cards=CARDS, provider=Counting(store))
    first = model.answer(agent.script(query(image)), [trigger(), "yes"])
    plain = model.answer(agent.script(query(None, question="Are you sure?"), earlier=first), ["yes, I am"])
    again = model.answer(agent.script(query(None, question="And now?"), earlier=plain), [trigger(), "still"])
    assert len(asked) == 1 and again.annotations == first.annotations
    assert np.array_equal(plain.overlay, first.overlay) and plain.answer == "yes, I am"
    roles = [turn.role for turn in plain.turns]
    assert roles == ["user", "assistant", "expert", "assistant", "user", "assistant"]
    # The model reads the dialogue so far as one text; only the first question has cards and the image.
    count = len(model.tokens[0])
    assert model.tokens[1][:count] == model.tokens[0]
    assert plain.turns[4].text == "Are you sure?" and plain.turns[4].images == ()
    assert plain.first_turn == 4 and len(model.images[1]) == 2
    other = np.full_like(image, 7)
    fresh = model.answer(
        agent.script(query(other, input_key="cd" * 32), earlier=first), [trigger(), "cannot tell"]
    )
    assert len(asked) == 2 and fresh.annotation.status == "failed", "another image has no result yet"


def test_events_tell_the_text_and_the_calls(tokenizer, model_config, params, store, image):
    generator = Generator(model_config, params, tokenizer, max_length=1024, batch_size=2)
    agent = agent_lib.Agent(generator, CHATML, cards=CARDS, provider=agent_lib.AnnotationProvider(store))
    events = []
    script = agent.script(query(image), max_new_tokens=9, on_event=events.append)
    (transcript,) = batching.Batcher(generator).run([script])
    told = "".join(event.text for event in events if event.kind == "text")
    assert told.strip() == transcript.answer and len(events) > 1

    model, events = ScriptedModel(tokenizer), []
    agent = agent_lib.Agent(model, CHATML, cards=CARDS, provider=agent_lib.AnnotationProvider(store))
    model.answer(agent.script(query(image), on_event=events.append), [trigger(), "yes"])
    assert [(event.kind, event.text) for event in events] == [
        ("call", "<ORGANS(organs)>"),
        ("result", "<ORGANS(organs)>"),
    ]
    assert events[1].annotation.status == "ok"
