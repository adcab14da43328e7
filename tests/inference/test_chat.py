"""Asking an export from Python and from the shell."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import sys

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import MRImageStorage

import vilam3_jax
from tests.data.dicom_slices import save_stack
from vilam3_jax.cli import guarded
from vilam3_jax.data.experts.cards import with_card_list
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.image_processor import ImageProcessor
from vilam3_jax.data.images import load_pixels, resize
from vilam3_jax.data.isolation import DecoderProcess
from vilam3_jax.data.preprocessing import DEFAULT_PREPROCESSING, Preprocessing
from vilam3_jax.data.text_rules import TextRules
from vilam3_jax.data.tokenizer import Tokenizer
from vilam3_jax.data.volumes import VolumeSource, load_volume
from vilam3_jax.errors import UserError
from vilam3_jax.inference import agent as agent_lib
from vilam3_jax.inference import assistant as assistant_lib
from vilam3_jax.inference import chat, generate, images, rendering
from vilam3_jax.inference.agent import Message, Transcript
from vilam3_jax.inference.constraints import AnswerForm
from vilam3_jax.inference.loading import load_generator
from vilam3_jax.models import model_config as model_config_lib

PROMPT = "Is the liver visible in this slice?"


@pytest.fixture(scope="module")
def assistant(export, world):
    with vilam3_jax.load(
        export, annotations=world.annotations, expert_host="off", max_length=1024
    ) as assistant:
        yield assistant


def test_load_answers_about_a_scan_and_a_film(assistant, world):
    reply = assistant.ask(world.volume, PROMPT, experts=False, modality="CT", max_new_tokens=4)
    assert isinstance(reply.answer, str) and str(reply) == reply.answer
    assert reply.description == "axial slice 8 of 0 to 15, window 50, 400"
    volume = load_volume(world.volume)
    assert np.array_equal(reply.image, DEFAULT_PREPROCESSING.slice_image(volume, 2, 8, (50.0, 400.0), 32))
    assert assistant_lib.NOT_CLINICAL in reply.notes
    assert reply.transcript.prompt == f"<image>\n{PROMPT}"
    film = assistant.ask(str(world.film), PROMPT, max_new_tokens=4)
    assert film.description == "image of 30 x 40 pixels"
    assert "<ORGANS(args)>" in film.transcript.prompt
    again = assistant.ask(load_pixels(world.film), PROMPT, max_new_tokens=4)
    assert (again.answer, again.notes) == (film.answer, film.notes)


def test_loading_logs_nothing(export, caplog):
    """A warning of a library inside would appear above the first answer in a notebook."""
    caplog.set_level(logging.WARNING, "absl")  # commands silence it
    vilam3_jax.load(export, expert_host="off").close()
    assert [record.getMessage() for record in caplog.records] == []


def test_the_image_has_what_experts_need(world):
    store = AnnotationStore(world.annotations)
    cut = images.open_image(world.volume, 32, axis="coronal", index=3)
    assert (cut.axis, cut.index, cut.volume, cut.png) == (1, 3, VolumeSource(str(world.volume)), b"")
    assert store.get(cut.input_key, "ORGANS", "organs") is not None
    film = images.open_image(world.film, 32)
    assert (film.axis, film.volume) == (None, None) and film.png.startswith(b"\x89PNG")
    assert store.get(film.input_key, "PNEUMONIA") is not None
    assert np.array_equal(film.image, resize(load_pixels(world.film), 32))


def test_the_declared_modality_chooses_the_window(tmp_path):
    path = tmp_path / "scan.nii"
    values = np.arange(-2048, 2048, dtype=np.int16).reshape(16, 16, 16)  # with "air", whatever it is
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    unknown = images.open_image(path, 32)
    assert "between its 0.5 and 99.5 percentiles" in unknown.description
    assert any("states no modality" in note for note in unknown.notes)
    ct = images.open_image(path, 32, modality="ct")
    assert "window 50, 400" in ct.description
    assert (ct.modality, ct.notes) == ("CT", ())
    assert "percentiles" in images.open_image(path, 32, modality="MR").description
    assert "window 40, 80" in images.open_image(path, 32, window=(40, 80)).description
    assert ct.input_key == unknown.input_key  # what is stated about a scan is not its content


@pytest.mark.parametrize(("axis", "plane"), list(enumerate(("sagittal", "coronal", "axial"))))
def test_a_scan_of_one_slice_is_shown_in_its_own_plane(tmp_path, axis, plane):
    path, shape = tmp_path / "scan.nii", [5, 6, 7]
    shape[axis] = 1
    nibabel.save(
        nibabel.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), np.eye(4)), path
    )
    picture = images.open_image(path, None)
    assert (picture.axis, min(picture.image.shape[:2]) > 1) == (axis, True)
    assert picture.description.startswith(f"{plane} slice 0 of 0 to 0")
    asked = "sagittal" if plane == "axial" else "axial"
    assert images.open_image(path, None, axis=asked).description.startswith(asked)


def test_a_decoder_process_gives_the_same_image(world):
    with DecoderProcess() as decoder:
        for image, options in ((world.volume, {"modality": "CT", "index": 3}), (world.film, {})):
            here = images.open_image(image, 32, **options)
            there = images.open_image(image, 32, decoder=decoder, **options)
            assert np.array_equal(here.image, there.image)
            assert (here.input_key, here.description, here.notes) == (
                there.input_key,
                there.description,
                there.notes,
            )


def test_the_models_preprocessing_is_applied_and_checked(world):
    rules = Preprocessing(
        ct_windows=((0.0, 2048.0), (40.0, 350.0), (40.0, 80.0)), plane="coronal", modalities=("MR",)
    )
    picture = images.open_image(world.volume, None, modality="CT", preprocessing=rules)
    assert picture.axis == 1
    volume = load_volume(world.volume, modality="CT")
    assert np.array_equal(picture.image, rules.slice_image(volume, 1, picture.index))
    assert "The image is CT, but this model was trained on MR." in picture.notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": "missing.png"}, "missing.png: no such file"),
        ({"index": 99}, r"scan.nii.gz: slice 99: it has axial slices 0 to 15"),
        ({"axis": "oblique"}, "axis 'oblique'"),
        ({"image": np.zeros((4, 4), np.uint8)}, r"must be uint8 \[H, W, 3\]"),
        ({"image": np.zeros((4, 4, 3), np.uint8), "index": 1}, "is a 2-D image"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "See <image>"}, "leave it out"),
    ],
)
def test_bad_questions_are_named(assistant, world, arguments, message):
    values = {"image": world.volume, "prompt": PROMPT, **arguments}
    with pytest.raises(UserError, match=message):
        assistant.ask(values.pop("image"), values.pop("prompt"), experts=False, **values)


def test_a_damaged_image_is_named(assistant, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG nothing")
    with pytest.raises(UserError, match=r"broken\.png"):
        assistant.ask(path, PROMPT, experts=False)


def test_wrong_checkpoints_are_named(towers_export):
    with pytest.raises(UserError, match="contrastive model, which generates no text"):
        vilam3_jax.load(towers_export)


def test_an_export_carries_its_text_rules(export, tmp_path):
    folder = shutil.copytree(export, tmp_path / "trained")
    config = json.loads((folder / "model.json").read_text())
    assert config["text"] == {"split": "clean", "bos": "clean", "spaces": "clean", "image_end": ""}
    config["text"] |= dict.fromkeys(("split", "bos", "spaces"), "as_trained")
    (folder / "model.json").write_text(json.dumps(config))
    rules = TextRules("as_trained", "as_trained", "as_trained")
    assert load_generator(folder)[1].rules == rules
    changed = load_generator(folder, text="spaces=clean")[1].rules
    assert changed == dataclasses.replace(rules, spaces="clean")


def test_cards_travel_inside_an_export(export, world, tmp_path):
    """The card file of training is not needed."""
    folder = tmp_path / "export"
    shutil.copytree(export, folder)
    model = json.loads((folder / "model.json").read_text())
    row = dict(name="MINE", args=[], modality="CT", task="segmentation", overview="o", accuracy="a")
    (tmp_path / "mine.json").write_text(json.dumps([row]))
    model = with_card_list({**model, "cards": str(tmp_path / "mine.json")})
    (folder / "model.json").write_text(json.dumps(model))
    (tmp_path / "mine.json").unlink()
    with vilam3_jax.load(folder, annotations=world.annotations, expert_host="off") as mine:
        reply = mine.ask(world.film, PROMPT, max_new_tokens=2)
    assert "<MINE(args)>" in reply.transcript.prompt and "ORGANS" not in reply.transcript.prompt


def test_several_sequences_are_shown_with_their_roles(assistant, world, tmp_path, export, capsys):
    volumes = {role: world.volume for role in ("t1c", "flair")}
    reply = assistant.ask(volumes, PROMPT, experts=False, modality="MR", index=3, max_new_tokens=2)
    assert reply.transcript.prompt == f"T1(contrast enhanced): <image>, FLAIR: <image>\n{PROMPT}"
    assert len(reply.transcript.turns[0].images) == 2
    assert reply.description.startswith("t1c: axial slice 3")
    assert "; flair: axial slice 3" in reply.description
    with pytest.raises(UserError, match=r"image flair: .*one grid"):
        assistant.ask({"t1c": world.volume, "flair": world.film}, PROMPT)
    arguments = ["--checkpoint", str(export), "--prompt", PROMPT, "--experts", "off", "--max_new_tokens", "2"]
    images = [f"--image=t1c={world.volume}", f"--image=t2={world.volume}"]
    assert chat.main([*arguments, *images, "--modality=MR"]) == 0
    assert "T1(contrast enhanced): <image>, T2: <image>" in capsys.readouterr().out
    with pytest.raises(UserError, match="each of several images needs its own role"):
        chat.main([*arguments, f"--image={world.volume}", f"--image=t2={world.volume}"])


def test_experts_need_a_source(export, world):
    assistant = vilam3_jax.load(export, expert_host="off")
    with pytest.raises(UserError, match="experts are on, but there are none"):
        assistant.ask(world.film, PROMPT)


def test_host_command(monkeypatch, tmp_path):
    assert assistant_lib.host_command("off", required=True) == []
    assert assistant_lib.host_command("/venv/bin/vilam3-experts host --verbose", required=True)[1:] == [
        "host",
        "--verbose",
    ]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert assistant_lib.host_command("auto", required=False) == []
    with pytest.raises(UserError, match="vilam3-experts is not installed"):
        assistant_lib.host_command("auto", required=True)
    program = tmp_path / "vilam3-experts"
    program.write_text("")
    assert assistant_lib.host_command("auto", required=True) == [str(program), "host"]


class FakeHost:
    def __init__(self, status):
        self.status, self.asked = status, []

    def ask(self, expert, args, **where):
        self.asked.append((expert, args, where))
        if self.status == "ok":
            return agent_lib.Annotation(where["input_key"], expert, args, probabilities={"pneumonia": 0.7})
        return agent_lib.failed(where["input_key"], expert, args, "crashed")


def test_the_store_is_asked_before_the_host(world):
    host = FakeHost("ok")
    stored = agent_lib.AnnotationProvider(AnnotationStore(world.annotations))
    provider = agent_lib.Providers([stored, agent_lib.HostProvider(host)])
    film = images.open_image(world.film, 32)
    query = agent_lib.Query(PROMPT, (agent_lib.Scan(film.image, film.input_key, png=film.png),))
    assert provider.annotate(query, "PNEUMONIA", "").probabilities["pneumonia"] == 0.2
    assert host.asked == []
    assert provider.annotate(query, "BRAINTUMOR", "").probabilities["pneumonia"] == 0.7
    assert host.asked == [("BRAINTUMOR", "", {"input_key": film.input_key, "inputs": [("", film.png)]})]
    cut = images.open_image(world.volume, 32)
    query = agent_lib.Query(PROMPT, (agent_lib.Scan(cut.image, cut.input_key, 2, 8, volume=cut.volume),))
    provider.annotate(query, "BRAINSEG", "")
    assert host.asked[-1][2] == {
        "input_key": cut.input_key,
        "inputs": [("", VolumeSource(str(world.volume)))],
    }
    nothing = agent_lib.Query(PROMPT, (agent_lib.Scan(cut.image, cut.input_key),))
    assert "needs the scan's file" in provider.annotate(nothing, "BRAINSEG", "").reason


def test_a_crashed_host_is_a_failed_annotation(world):
    provider = agent_lib.Providers([agent_lib.HostProvider(FakeHost("failed"))])
    film = images.open_image(world.film, 32)
    query = agent_lib.Query(PROMPT, (agent_lib.Scan(film.image, film.input_key, png=film.png),))
    assert provider.annotate(query, "PNEUMONIA", "").reason == "crashed"


def test_the_dialogue_names_expert_stand_in_failure_and_no_clinical_use(assistant):
    failed = agent_lib.failed("k", "PNEUMONIA", "", "out of memory")
    turns = (
        Message("user", "Q"),
        Message("assistant", "<PNEUMONIA()>"),
        Message("expert", "E"),
        Message("assistant", "A"),
    )
    transcript = Transcript(turns, "A", (failed,), "<PNEUMONIA()>", True)
    notes = assistant_lib._notes(transcript, assistant._cards)
    reply = assistant_lib.Reply("A", transcript, np.zeros((2, 2, 3), np.uint8), None, "film", notes)
    text = rendering.reply_text(reply)
    assert "Expert PNEUMONIA: E" in text and "Model: A" in text and "[image] film" in text
    assert "PNEUMONIA is a stand-in" in text
    assert "The expert PNEUMONIA failed: out of memory." in text
    assert "cut off" in text
    assert text.endswith(assistant_lib.NOT_CLINICAL)


def test_the_command_prints_the_dialogue_and_saves_what_was_seen(export, world, tmp_path, capsys):
    arguments = [f"--checkpoint={export}", f"--image={world.volume}", f"--prompt={PROMPT}", "--experts=off"]
    arguments += ["--max_new_tokens=3", "--slice=5", "--window=40,80", f"--save_images={tmp_path / 'seen'}"]
    assert guarded("chat", chat.main, arguments) == 0
    out = capsys.readouterr().out
    assert "axial slice 5 of 0 to 15, window 40, 80" in out and "Not for clinical use" in out
    assert load_pixels(tmp_path / "seen" / "image.png").shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--window=40"], "must be CENTRE,WIDTH"),
        (["--window=40,-1"], "width must be above 0"),
        (["--max_new_tokens=0"], "at least 1"),
        (["--text=trained"], "'trained': unknown; use clean or as_trained"),
        (["--image=nothing.nii"], "nothing.nii: no such file"),
    ],
)
def test_the_command_fails_in_one_line(export, world, capsys, extra, message):
    arguments = [f"--checkpoint={export}", f"--prompt={PROMPT}", "--experts=off"]
    if not extra[0].startswith("--image"):
        arguments.append(f"--image={world.volume}")
    assert guarded("chat", chat.main, [*arguments, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def inputs_of(monkeypatch, export, tmp_path, image, keys, **asked):
    """(inputs of the vision tower, reply) of an export whose `model.json` has `keys`."""
    folder = tmp_path / "export"
    shutil.copytree(export, folder)
    config = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(config | keys))
    seen = []
    read = generate.Session.read

    def spy(session, chunks):
        seen.extend(chunk for chunk in chunks if chunk is not None)
        return read(session, chunks)

    monkeypatch.setattr(generate.Session, "read", spy)
    with vilam3_jax.load(folder, max_length=1024, **asked) as assistant:
        reply = assistant.ask(image, PROMPT, experts="annotations" in asked, max_new_tokens=2)
    return [chunk for chunk in seen if chunk.images], reply


def test_an_export_that_pads_is_asked_with_padded_images(monkeypatch, export, world, tmp_path):
    film = load_pixels(world.film)  # 40 rows, 30 columns
    keys = {"image_aspect_ratio": "pad"}
    (chunk,), reply = inputs_of(monkeypatch, export, tmp_path, world.film, keys, expert_host="off")
    square = np.full((40, 40, 3), 127, np.uint8)
    square[:, 5:35] = film
    np.testing.assert_array_equal(chunk.images, [resize(square, 32)])
    np.testing.assert_array_equal(reply.image, film)


def test_an_export_that_tiles_is_asked_tile_by_tile(monkeypatch, export, world, tmp_path, model_config):
    film = load_pixels(world.film)  # 40 rows, 30 columns
    keys = {"image_aspect_ratio": "dynamic", "max_tiles": 2}
    asked = dict(expert_host="off", annotations=world.annotations)
    (chunk,), reply = inputs_of(monkeypatch, export, tmp_path, world.film, keys, **asked)
    tall = np.asarray(Image.fromarray(film).resize((32, 64)))
    np.testing.assert_array_equal(chunk.images, [tall[:32], tall[32:], resize(film, 32)])
    per_image = 3 * model_config_lib.resolve(model_config).tokens_per_image
    assert chunk.visual_index[chunk.visual_index >= 0].tolist() == list(range(per_image))
    assert reply.transcript.prompt.endswith(f"<image>\n{PROMPT}")


def test_an_export_that_tiles_shows_tiles_of_overlays(monkeypatch, export, world, tmp_path):
    """The overlay is cut into tiles like the slice."""
    spoken = iter(["This looks like a CT image. Let me trigger <ORGANS(organs)>.", "yes"])
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: next(spoken))
    keys = {"image_aspect_ratio": "dynamic", "max_tiles": 2}
    asked = dict(expert_host="off", annotations=world.annotations)
    chunks, reply = inputs_of(monkeypatch, export, tmp_path, world.volume, keys, **asked)
    assert reply.overlay.shape == reply.image.shape and reply.answer == "yes"
    cut = ImageProcessor("dynamic", 32, max_tiles=2).inputs
    for chunk, picture in zip(chunks, (reply.image, reply.overlay), strict=True):
        np.testing.assert_array_equal(chunk.images, cut(picture))


def test_a_modality_is_a_code_and_no_contradiction(world, tmp_path):
    with pytest.raises(UserError, match="modality 'banana': not a DICOM code"):
        images.open_image(world.volume, 32, modality="banana")
    with pytest.raises(UserError, match="modality 'banana'"):
        images.open_image(world.film, 32, modality="banana")
    assert images.open_image(world.film, 32, modality="dx").modality == "DX"


def test_images_of_every_kind_are_the_same_image(assistant, world):
    film = load_pixels(world.film)
    path = assistant.ask(world.film, PROMPT, experts=False, max_new_tokens=3)
    kinds = (film, Image.fromarray(film), world.film.read_bytes())
    for reply in assistant.ask_batch([(kind, PROMPT) for kind in kinds], experts=False, max_new_tokens=3):
        assert np.array_equal(reply.image, path.image) and reply.answer == path.answer
    with pytest.raises(UserError, match="image bytes"):
        assistant.ask(b"no image at all", PROMPT)
    with pytest.raises(UserError, match="give its path"):
        assistant.ask(world.volume.read_bytes(), PROMPT)
    text = assistant.ask(None, "What is a CT?", experts=False, max_new_tokens=3)
    assert text.image is None and text.transcript.prompt == "What is a CT?"


def test_volumes_of_every_kind_are_the_same_image(assistant, tmp_path):
    """A folder of DICOM slices, one of its series, the `Volume`, and the same scan as NIfTI."""
    folder = save_stack(tmp_path / "study", count=7)
    volume = load_volume(folder)
    image = nibabel.Nifti1Image(volume.voxels, volume.affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "ct.nii.gz")
    asked = dict(experts=False, max_new_tokens=3, index=2)
    expected = assistant.ask(tmp_path / "ct.nii.gz", PROMPT, modality="CT", **asked)
    for one, options in ((folder, {}), (str(folder), {"series": "1.2.3"}), (volume, {})):
        reply = assistant.ask(one, PROMPT, **asked, **options)
        np.testing.assert_array_equal(reply.image, expected.image)
        assert (reply.answer, reply.description) == (expected.answer, expected.description)
    single = assistant.ask(folder / "000.dcm", PROMPT, experts=False, max_new_tokens=3)
    assert single.description.startswith("axial slice 0 of 0 to 0, window 50, 400")


@pytest.fixture(scope="module")
def of_ct(export, tmp_path_factory):
    """A model that was trained on CT alone."""
    folder = shutil.copytree(export, tmp_path_factory.mktemp("ct") / "export")
    config = json.loads((folder / "model.json").read_text())
    config["preprocessing"] = {"modalities": ["CT"]}
    (folder / "model.json").write_text(json.dumps(config))
    with vilam3_jax.load(folder, expert_host="off") as model:
        yield model


def test_an_mr_scan_is_not_shown_to_a_model_of_ct_without_a_word(of_ct, tmp_path):
    """A real MR image, a series, and files that do not say or deny what they are."""
    told = "The image is MR, but this model was trained on CT."
    shown = "so this MR volume is shown between its 0.5 and 99.5 percentiles."
    series = save_stack(tmp_path / "series", Modality="MR", RescaleType=None, SOPClassUID=MRImageStorage)
    for path in (get_testdata_file("MR_small.dcm"), series):
        reply = of_ct.ask(path, PROMPT, experts=False, max_new_tokens=2)
        assert told in reply.notes and any(shown in note for note in reply.notes)
        assert "percentiles" in reply.description and "window" not in reply.description
    ct = of_ct.ask(get_testdata_file("CT_small.dcm"), PROMPT, experts=False, max_new_tokens=2)
    assert not any("trained on" in note or "declared" in note for note in ct.notes)
    brain = np.random.default_rng(0).integers(200, 900, (16, 16, 16)).astype(np.int16)
    brain[:8] = 0
    image = nibabel.Nifti1Image(brain, np.eye(4))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "brain.nii.gz")
    silent = of_ct.ask(tmp_path / "brain.nii.gz", PROMPT, experts=False, max_new_tokens=2)
    assert any("states no modality" in note and "trained on CT" in note for note in silent.notes)
    stated = of_ct.ask(tmp_path / "brain.nii.gz", PROMPT, experts=False, max_new_tokens=2, modality="MR")
    assert told in stated.notes and any(shown in note for note in stated.notes)
    wrong = of_ct.ask(tmp_path / "brain.nii.gz", PROMPT, experts=False, max_new_tokens=2, modality="CT")
    assert any("do not look like Hounsfield units" in note for note in wrong.notes)


def test_probabilities_follow_from_scores(assistant, world):
    scores = assistant.score(world.film, PROMPT, ["yes", "no", "the left kidney"])
    assert list(scores) == ["yes", "no", "the left kidney"] and all(value < 0 for value in scores.values())
    chances = assistant.probabilities(world.film, PROMPT, ["yes", "no"])
    assert sum(chances.values()) == pytest.approx(1)
    expected = 1 / (1 + np.exp(scores["no"] - scores["yes"]))
    assert chances["yes"] == pytest.approx(expected, abs=1e-5)
    for wrong in ([], ["yes", "yes"], [" "]):
        with pytest.raises(UserError, match="one or more different texts"):
            assistant.score(world.film, PROMPT, wrong)


def test_embeddings_tell_images_apart(assistant, world):
    film = assistant.embed(world.film)
    assert film.ndim == 1 and film.dtype == np.float32 and np.isfinite(film).all()
    np.testing.assert_array_equal(film, assistant.embed(load_pixels(world.film)))
    assert np.abs(film - assistant.embed(world.volume, modality="CT")).max() > 1e-3


def test_a_conversation_knows_what_was_said(assistant, world):
    chat_ = assistant.chat(world.film, experts=False, max_new_tokens=3)
    first, second = chat_.ask(PROMPT), chat_.ask("Are you sure?")
    assert len(second.transcript.turns) == 4 and second.transcript.turns[1].text == first.answer
    assert np.array_equal(second.image, first.image) and len(chat_.replies) == 2
    chat_.show(world.volume, modality="CT")
    third = chat_.ask("And here?")
    assert third.description.startswith("axial slice") and "<image>" in third.transcript.turns[4].text


@pytest.mark.parametrize("experts", [False, True])
def test_an_answer_has_the_wanted_form(assistant, world, experts):
    def ask(form, count=30):
        asked = dict(experts=experts, max_new_tokens=count, form=form)
        return assistant.ask(world.film, PROMPT, **asked).answer

    assert ask(AnswerForm.one_of(["perhaps", "certainly not"])) in ("perhaps", "certainly not")
    assert re.fullmatch(r"[0-9]{2,4} ml", ask(AnswerForm.matching(r"[0-9]{2,4} ml")))
    schema = {
        "type": "object",
        "properties": {"finding": {"enum": ["mass", "nodule"]}, "sure": {"type": "boolean"}},
        "required": ["finding", "sure"],
        "additionalProperties": False,
    }
    found = json.loads(ask(AnswerForm.json_of(schema), 120))
    assert found["finding"] in ("mass", "nodule") and isinstance(found["sure"], bool)


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (AnswerForm.one_of, [], "one or more texts"),
        (AnswerForm.one_of, ["yes", ""], "one or more texts"),
        (AnswerForm.matching, "(", "regular expression: "),
        (AnswerForm.json_of, {"type": "no such type"}, "JSON schema: "),
        (AnswerForm.json_of, {"enum": {1, 2}}, "is no JSON"),
    ],
)
def test_impossible_forms_are_refused(make, given, message):
    with pytest.raises(UserError, match=message) as error:
        make(given)
    assert "\n" not in str(error.value)


def test_a_session_is_a_dialogue_with_commands(export, world, tmp_path, capsys, monkeypatch):
    film, kept = f"/image {world.film}", f"/save {tmp_path / 'kept'}"
    before = [PROMPT, "/slice 3", "Are you sure?", "/image nowhere.png", "What now?"]
    lines = iter([*before, film, "/expert on", "And this?", "/nonsense", kept, "/quit", "never read"])

    def read(prompt):
        return next(lines)

    monkeypatch.setattr("builtins.input", read)
    arguments = [f"--checkpoint={export}", f"--image={world.volume}", "--modality=CT", "--max_new_tokens=3"]
    arguments += [f"--annotations={world.annotations}", "--expert_host=off", "--max_length=2000"]
    assert guarded("chat", chat.main, [*arguments, "--experts=off"]) == 0
    shown = capsys.readouterr()
    assert next(lines) == "never read" and shown.err == ""
    assert "nowhere.png: no such file" in shown.out and "/nonsense: not understood" in shown.out
    assert shown.out.count(assistant_lib.NOT_CLINICAL) == 1 and "available expert models" not in shown.out
    transcript = (tmp_path / "kept" / "transcript.txt").read_text()
    assert transcript.count("user: ") == 4 and "nowhere" not in transcript
    assert "[image] axial slice 3 of 0 to 15" in shown.out and f"saved to {tmp_path / 'kept'}" in shown.out
    shown = load_pixels(tmp_path / "kept" / "image.png")
    assert np.array_equal(shown, resize(load_pixels(world.film), 32))
