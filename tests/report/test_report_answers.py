"""The page of all answers: complete, bounded, self-contained, with text that is only text."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil

import fake_run
import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from test_report_page import HOSTILE, Page

from vilam3_jax import cli
from vilam3_jax.data.examples import ImageRef
from vilam3_jax.data.records import ExampleWriter
from vilam3_jax.errors import UserError
from vilam3_jax.report import answers, main, runs

ARMS = ("majority", "stage4_no_experts", "stage4_falsified", "stage4_experts")


@pytest.fixture
def own(made, tmp_path):
    """One training run with evaluations, written in the order of a table that has the expert arm last."""
    folder = shutil.copytree(made / "stages" / "stage4_expert", tmp_path / "own")
    for arm in ARMS:
        shutil.copytree(made / "eval" / arm, folder / "eval" / arm)
    return folder


def rows_of(folder, arm):
    return [json.loads(line) for line in (folder / "eval" / arm / "rows.jsonl").read_text().splitlines()]


def change(folder, arm, edit):
    """Applies `edit` to every row of an arm."""
    rows = rows_of(folder, arm)
    for row in rows:
        edit(row)
    path = folder / "eval" / arm / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def note(folder, arm, **values):
    """Changes `result.json` of an arm."""
    path = folder / "eval" / arm / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def written(folder, *flags):
    assert main.main([f"--workdir={folder}", *flags]) == 0
    return (folder / "report_answers.html").read_text()


def test_every_question_with_every_answer_and_every_image_once(own, made):
    text = written(own)
    page = Page(text)
    rows = {arm: rows_of(own, arm) for arm in ARMS}
    assert text.count('class="question"') == len(rows["majority"]) == 54
    assert text.count('class="reply"') == 4 * 54
    for arm in ARMS:
        outcomes = re.findall(rf'data-arm="{arm}" data-called="(.*?)"\s+data-outcome="(.*?)"', text)
        wanted = [
            (f"={row.get('expert_called') or ''}", "wrong unparsed" if row["unparsed"] else
             "correct" if row["correct"] else "wrong") for row in rows[arm]
        ]  # fmt: skip
        assert sorted(outcomes) == sorted(wanted)
    # 6 slices and 12 films; the labels of a slice as the expert gave them, and falsified ones.
    assert page.text.count("axial slice") == 6 and page.text.count("2-D image") == 12
    assert page.text.count("labels of ORGANS") == page.text.count("labels of ORGANS (falsified)") + 6
    assert len(page.images) == 18 + page.text.count("labels of ORGANS")
    for uri in page.images:
        assert Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).format == "JPEG"
    called = next(row for row in rows["stage4_experts"] if row["trigger"])
    assert " ".join(called["expert_text"].split()) in page.text
    assert "All 54 questions are shown." in page.text
    assert "This page contains images and answers." in page.text


def test_the_expert_arm_is_first_and_there_is_no_banner_of_the_quickstart(own):
    page = Page(written(own))
    assert "stand-ins" not in page.text and "quickstart" not in page.text.split("Right answer")[0]
    assert [arm.name for arm in runs.read_evaluations(runs.evaluations_in(own / "eval"))] == [
        "stage4_experts", "stage4_no_experts", "stage4_falsified", "majority",
    ]  # fmt: skip
    assert re.search(r"Arm Correct 95 % interval Oracle Stage 4, experts with experts \d+ % of 30", page.text)


def test_only_the_script_of_the_page_may_run(own):
    text = written(own)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy"\s+content="(.*?)"', text)
    assert policy.endswith(f"script-src 'sha256-{digest}'") and policy.startswith("default-src 'none'")
    page = Page(text)
    assert page.handlers == [] and page.tags.count("script") == 1
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    for name in re.findall(r"chosen\.(\w+)", script):  # the filters that the script reads
        assert f'name="{name}"' in text


def test_any_text_is_shown_as_text(own):
    def edit(row):
        row |= dict.fromkeys(("output", "parsed", "question", "gold", "modality", "question_type"), HOSTILE)
        row |= {"trigger": HOSTILE, "expert_text": HOSTILE, "expert_called": HOSTILE, "not_made": [HOSTILE]}
        row |= {"label_source": HOSTILE}

    for arm in ARMS:
        change(own, arm, edit)
    change(own, "majority", lambda row: row.update(output="half \ud83d, \0 and " + "x" * 5000))
    text = written(own)
    page = Page(text)
    assert HOSTILE in page.text and page.handlers == [] and page.tags.count("script") == 1
    assert "<svg/onload" not in text and not [link for link in page.links if not link.startswith("data:")]
    assert "half ?" in page.text and "x" * 4001 not in text and "more characters)" in page.text
    assert "the dataset was changed since" in page.text  # no image beside a question that the data do not ask


def test_more_questions_than_the_limit(own):
    text = written(own, "--questions=7")
    assert text.count('class="question"') == 7
    assert "7 of 54 questions are shown" in Page(text).text and "--questions=54" in text
    for arm in ARMS:  # the choice does not depend on the answers
        change(own, arm, lambda row: row.update(correct=not row["correct"], output="else"))
    again = written(own, "--questions=7")
    items = re.compile(r"<code>(instruct/.*?)</code>")
    assert items.findall(again) == items.findall(text)
    with pytest.raises(UserError, match="--questions=0"):
        main.write_report(own, questions=0)


def test_without_the_folder_of_the_data_one_sentence_stands_for_the_images(own, capsys):
    for arm in ARMS:
        note(own, arm, data="moved/data", annotations="moved/annotations")
    text = written(own)
    sentence = "moved/data: no such folder, so images are left out"
    assert Page(text).text.count(sentence) == 1 and text.count("<img") == 0
    assert capsys.readouterr().out.count(sentence) == 1
    assert text.count('class="question"') == 54


def test_without_the_annotations_only_their_labels_are_missing(own):
    for arm in ARMS:
        note(own, arm, annotations="moved/annotations")
    page = Page(written(own))
    assert page.text.count("moved/annotations: no such folder, so the labels of experts are left out") == 1
    assert len(page.images) == 18


def test_data_that_were_prepared_again_cost_only_their_images(own, made, tmp_path):
    data = shutil.copytree(made / "data", tmp_path / "data")
    (data / "images" / "ct0.nii.gz").unlink()
    for arm in ARMS:
        note(own, arm, data=str(data))
        change(own, arm, lambda row: row.update(item=row["item"].replace("film3/", "gone/")))
    page = Page(written(own))
    assert page.text.count("No image:") == 3 + 2  # three slices, two questions about the film
    assert page.text.count("ct0.nii.gz: no such file") == 3
    assert "'instruct/gone/0/q0': no such example in the dataset" in page.text
    assert page.text.count("2-D image") == 11


def test_slices_are_shown_as_the_model_saw_them(own, tmp_path):
    """Three windows as red, green and blue, by the config of the export."""
    voxels, _ = fake_run.phantom(0)
    folder = tmp_path / "ct"
    folder.mkdir()
    nib.save(nib.Nifti1Image(voxels, np.diag([8.0, 8.0, 8.0, 1.0])), folder / "ct.nii.gz")
    qa = [fake_run.question("Which modality is this?", "CT", "modality", "image header")]
    ref = ImageRef(path="ct.nii.gz", axis=2, index=20, modality="CT")
    with ExampleWriter(folder, "heldout") as writer:
        writer.write(fake_run.example("instruct/ct/axial/20", ref, "key", "CT", qa, "CC0"))
    shutil.rmtree(own / "eval")
    evaluation = own / "eval" / "mine"
    evaluation.mkdir(parents=True)
    row = fake_run.make_row("majority", fake_run.example("instruct/ct/axial/20", ref, "key", "CT", qa, ""), 0,
                            qa[0], None)  # fmt: skip
    (evaluation / "rows.jsonl").write_text(json.dumps(row) + "\n")
    settings = {"arm": {"name": "mine"}, "data": str(folder), "checkpoint": str(tmp_path / "export")}
    (evaluation / "result.json").write_text(json.dumps(settings))

    def spread():
        (uri,) = Page(written(own)).images
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))).astype(int)
        return np.ptp(image, axis=2).max()

    assert spread() < 10
    (tmp_path / "export").mkdir()
    windows = [[-600, 1500], [50, 400], [300, 200]]
    (tmp_path / "export" / "model.json").write_text(json.dumps({"preprocessing": {"ct_windows": windows}}))
    assert spread() > 100


def test_given_evaluations_replace_those_of_the_run(own, made, tmp_path):
    other = shutil.copytree(own / "eval" / "majority", tmp_path / "elsewhere" / "majority")
    page = Page(written(own, f"--evaluation={other}", f"--evaluation={own / 'eval' / 'majority'}"))
    assert page.tags.count("article") == 18
    assert str(other) in page.text and str(own / "eval" / "majority") in page.text  # equal names
    text = written(own, f"--evaluation={own / 'eval'}")  # a folder with one folder per arm
    assert text.count('class="reply"') == 4 * 54
    with pytest.raises(UserError, match=r"no rows\.jsonl and result\.json"):
        main.write_report(own, evaluations=[tmp_path])
    with pytest.raises(UserError, match="is a quickstart run"):
        main.write_report(made, evaluations=[other])


def test_an_evaluation_without_a_run_has_only_this_page(own, made):
    folder = own / "eval" / "stage4_experts"
    found = main.write_report(folder)
    assert found.pages == (str(folder / "report.html"),)
    assert (folder / "report.html").read_text().count('class="reply"') == 54


def test_an_unfinished_evaluation_is_not_shown(own):
    for arm in ARMS:
        (own / "eval" / arm / "result.json").unlink()
    assert main.write_report(own).pages == (str(own / "report.html"),)
    assert "report_answers" not in (own / "report.html").read_text()


def test_evaluations_that_do_not_belong_together_are_refused(own, capsys):
    note(own, "majority", protocol_hash="q")
    assert cli.main(["report", f"--workdir={own}"]) == 2
    assert "stage4_experts/result.json: another protocol than in majority" in capsys.readouterr().err
    note(own, "majority", protocol_hash="p")
    change(own, "majority", lambda row: row.update(gold="else"))
    with pytest.raises(UserError, match="is another question in"):
        main.write_report(own)
    assert not (own / "report.html").exists()


def test_figures_are_those_of_the_evaluation(own):
    (arm,) = [arm for arm in runs.read_evaluations(runs.evaluations_in(own / "eval" / "majority"))]
    stored = {
        "arm": "first name", "question_type": "all", "label_source": "all", "oracle": False, "n": 30,
        "clusters": 3, "accuracy": 0.123, "unparsed": 0, "interval": None, "per_cluster": {}, "note": "",
    }  # fmt: skip
    note(own, "majority", summaries=[stored])
    page = Page(written(own, f"--evaluation={own / 'eval' / 'majority'}"))
    assert "Majority answer without a model 12 % of 30 †" in page.text
    assert page.text.count("† Too few patients") == 1
    note(own, "majority", summaries=[{"arm": 1}])
    with pytest.raises(UserError, match="'summaries' is damaged"):
        main.write_report(own)
    assert len(answers.collect([arm]).entries) == 18
