"""The page is complete, self-contained and escapes hostile text."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import fake_run
import numpy as np
import pytest
from PIL import Image

from vilam3_jax import cli
from vilam3_jax.errors import UserError
from vilam3_jax.evals import tables
from vilam3_jax.report import dialogues, main, runs
from vilam3_jax.report.samples import SIDE, Samples

VOID = {"meta", "img", "br", "hr", "link", "input"}
ANSWERS = "report_answers.html"
HOSTILE = '</script><img src=x onerror="alert(1)">\'"&<svg/onload=alert(2)>'


class Page(HTMLParser):
    """Collects tags, texts, ids and references; checks that tags nest and images have an alt text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.links, self.images, self.open = [], [], [], [], []
        self.handlers, self.ids, self.cards = [], [], 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.links += [
            value for key, value in attrs.items() if key in ("src", "href", "action", "xlink:href")
        ]
        self.handlers += [key for key in attrs if key.startswith("on")]
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.cards += attrs.get("class") == "dialogue"
        if tag == "img":
            assert attrs["alt"]
            self.images.append(attrs["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def written(made, tmp_path_factory):
    folder = shutil.copytree(made, tmp_path_factory.mktemp("page") / "run")
    assert main.main([f"--workdir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def page(written):
    return Page((written / "report.html").read_text())


def test_loads_nothing_from_anywhere(page, written):
    assert page.links
    assert all(link.startswith(("data:image/png;base64,", "#", ANSWERS)) for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.handlers == []
    text = (written / "report.html").read_text()
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_links_inside_the_page_have_their_target(page):
    assert page.tags.count("a") == 7 + 1 and page.links.count(ANSWERS) == 1
    anchors = {link[1:] for link in page.links if link.startswith("#")}
    assert anchors == set(page.ids) and len(page.ids) == len(set(page.ids))


@pytest.mark.parametrize(
    "words",
    [
        "Not for clinical use.",
        "stand-ins built from public packages",
        tables.MAIN_TITLE,
        tables.ORACLE_TITLE,
        "The model uses its experts: on 12 held-out questions of 12 patients that an expert can",
        "† Too few patients for a 95 % interval: fewer than 10.",
        "Stage 2b, pre-train",
        "tokens per second",
        "Held-out, swapped",
        "Stage 4, falsified",
        "Majority answer",
        "Chance: a random modality 50 %",
        "70 to 95",
        "Peak memory of a process 3.0 GiB",
        "python 3.11.7, jax 0.10.2",
        "a processor, 2 cores, 8.0 GiB",
        "Matmul precision bfloat16",
        "Expert called",
        "Unparsed",
        "Experts, offline PyTorch networks write annotations once",
        "1 vision 2a align 2b pretrain 3 instruct 4 experts",
        "Stage 4, experts − Stage 4, no experts +27",
        "of these, CT 90 %",
        "CC-BY-4.0",
        "Accuracy by volume (4 rows)",
        "patient-ct0",
        "<ORGANS(organs)>",
        "The results are <image>. The colors in this image describe",
        "labels of ORGANS (falsified)",
    ],
)
def test_holds(page, words):
    assert words in page.text


def test_missing_intervals_are_explained_once(page, written):
    assert page.texts.count("†") == 2 + 5  # rows of the oracle table, and differences
    assert page.text.count("Too few patients") == 1
    assert "too few patients for an interval" not in page.text


def test_a_dozen_dialogues_right_and_wrong_with_images(page):
    assert page.cards == 12 + 2  # and the two of the finding
    assert "✓ correct" in page.texts and "✗ wrong" in page.texts
    assert len(page.images) > 15
    for uri in page.images:
        image = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
        assert max(image.size) == SIDE


def test_calls_are_counted_where_experts_were_offered(page, made):
    rows = next(arm for arm in runs.read_run(made).arms if arm.name == "stage4_experts").rows
    called = sum(bool(row["trigger"]) for row in rows)
    could = [row["expert_right"] for row in rows if row["expert"]]
    shares = f"{100 * called / len(rows):.0f} % {100 * sum(could) / len(could):.0f} %"
    assert re.search(rf"Stage 4, experts {len(rows)} \d+ % {shares}", page.text)
    assert re.search(rf"Stage 3 {len(rows)} \d+ % – –", page.text)


def test_five_charts_of_loss_and_of_speed_and_two_of_arms(written):
    text = (written / "report.html").read_text()
    assert text.count('aria-label="Loss of ') == text.count('aria-label="Throughput of ') == 5
    assert text.count("questions, all types: accuracy by arm") == 2
    assert text.count("Questions that an expert can answer: accuracy by arm") == 1
    assert text.count("<title>held-out, swapped images, step") == 25
    assert text.count("<title>held-out, true images, step") == 25
    assert not re.search(r"\bnan\b", re.sub(r'"data:[^"]*"', "", text), re.IGNORECASE)


def test_summary_is_written_beside_the_page(written):
    assert json.loads((written / "summary.json").read_text())["schema_version"] == 2
    assert not [path.name for path in written.iterdir() if path.name.startswith(".")]


def test_hostile_text_is_shown_as_text(run):
    for arm in runs.ARMS + runs.FURTHER_ARMS:
        path = run / "eval" / arm / "rows.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row |= {"output": HOSTILE, "question": HOSTILE, "expert_text": HOSTILE, "gold": HOSTILE}
            row |= {
                "question_type": HOSTILE,
                "label_source": HOSTILE,
                "cluster": HOSTILE,
                "modality": HOSTILE,
            }
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "quickstart.json").write_text(
        json.dumps(
            {
                "steps": {},
                "machine": {"platform": HOSTILE, "processor": HOSTILE, "cores": 1, "memory_bytes": 1},
                "versions": {"python": HOSTILE, "jax": "1"},
            }
        )
    )
    main.main([f"--workdir={run}"])
    text = (run / "report.html").read_text()
    page = Page(text)
    assert HOSTILE in page.text
    assert page.handlers == [] and "script" not in page.tags
    assert all(link.startswith(("data:image/png;base64,", "#", ANSWERS)) for link in page.links)
    assert "<svg/onload" not in text


def test_hostile_names_in_the_data_are_shown_as_text(tmp_path):
    folder = fake_run.make_run(tmp_path / "run", films=1, licence=HOSTILE)
    main.main([f"--workdir={folder}"])
    page = Page((folder / "report.html").read_text())
    assert HOSTILE in page.text and page.handlers == []


@pytest.mark.parametrize(
    "missing",
    [
        "stages/stage2a_align/metrics.jsonl",
        "stages/stage4_expert/result.json",
        "eval/stage4_falsified/rows.jsonl",
        "eval/majority/result.json",
        "eval/retrieval.json",
        "data/instruct/dataset_info.json",
    ],
)
def test_a_missing_file_is_named_and_nothing_is_written(run, capsys, missing):
    (run / missing).unlink()
    assert cli.main(["report", f"--workdir={run}"]) == 2
    error = capsys.readouterr().err.strip()
    assert missing.rsplit("/", 2)[-1] in error and missing.split("/")[0] in error and "\n" not in error
    assert not (run / "report.html").exists() and not (run / "summary.json").exists()


def test_damaged_files_are_named(run):
    path = run / "eval" / "stage3" / "rows.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{oops", *lines[2:]]))
    with pytest.raises(UserError, match=r"stage3/rows\.jsonl: line 2 is damaged"):
        main.write_report(run)
    row = json.loads(lines[0])
    del row["oracle"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl: line 1 lacks oracle"):
        main.write_report(run)
    path.write_text("")
    with pytest.raises(UserError, match=r"rows\.jsonl: no rows"):
        main.write_report(run)
    stage = run / "stages" / "stage3_instruct"
    (stage / "config.json").write_text('{"model": [1]}')
    with pytest.raises(UserError, match=r"config\.json: 'model' is not an object"):
        main.write_report(stage)


@pytest.mark.parametrize("key", ["protocol_hash", "items_hash"])
def test_arms_that_were_asked_different_things_are_not_compared(run, key):
    path = run / "eval" / "stage4_blank" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "another"}))
    with pytest.raises(UserError, match=r"stage4_blank/result\.json: .* than in stage4_experts"):
        main.write_report(run)


def test_an_item_that_the_data_does_not_have_is_named(run):
    for arm in runs.ARMS + runs.FURTHER_ARMS:
        path = run / "eval" / arm / "rows.jsonl"
        path.write_text(path.read_text().replace("instruct/film", "instruct/gone"))
    with pytest.raises(UserError, match="instruct/gone"):
        main.write_report(run)


def test_a_run_of_the_default_size_has_four_arms(run):
    for arm in runs.FURTHER_ARMS:
        shutil.rmtree(run / "eval" / arm)
    main.write_report(run)
    document = json.loads((run / "summary.json").read_text())
    assert {one["arm"] for one in document["evaluation"]} == set(runs.ARMS)
    assert {one["second"] for one in document["comparisons"]} == {
        "stage4_no_experts",
        "stage4_experts",
        "majority",
    }


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="has neither stages/"):
        main.write_report(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        main.write_report(tmp_path / "none")


def test_one_training_run_while_it_trains_and_after(made, tmp_path):
    folder = shutil.copytree(made / "stages" / "stage3_instruct", tmp_path / "one")
    (folder / "result.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')  # a line that the trainer is still writing
    out = tmp_path / "elsewhere.html"
    main.main([f"--workdir={folder}", f"--out={out}"])
    before = Page(out.read_text())
    assert "stand-ins" not in before.text  # the banner of the quickstart
    assert "Step 60 of 60" in before.text and "Loss, first" not in before.text
    assert before.tags.count("svg") == 2 + 3  # two charts and the keys of the legend
    assert not (folder / "report.html").exists() and not (folder / "summary.json").exists()
    shutil.copy(made / "stages" / "stage3_instruct" / "result.json", folder)
    main.main([f"--workdir={folder}"])
    assert "Loss, first" in Page((folder / "report.html").read_text()).text


# --- choice and images


def test_choice_is_varied_and_the_same_every_time(made):
    arms = runs.read_run(made).arms
    chosen = dialogues.choose(arms)
    assert [row["arm"] for row in chosen] == [arm for arm, count in dialogues.COUNTS for _ in range(count)]
    assert len({(row["arm"], row["item"]) for row in chosen}) == 12
    first = chosen[:7]
    assert {row["modality"] for row in first} == {"CT", "chest X-ray"}
    assert {row["correct"] for row in first} == {True, False}
    falsified = [row for row in chosen if row["arm"] == "stage4_falsified"]
    assert any(row["item"] in {other["item"] for other in first} for row in falsified)
    assert all(row["trigger"] for row in falsified[:2])
    assert dialogues.choose([*reversed(arms)]) == chosen
    assert dialogues.choose([]) == []


def picked(made, arm, expert):
    (found,) = [a for a in runs.read_run(made).arms if a.name == arm]
    return next(
        row for row in found.rows if (row["expert_called"] == expert and "/axial/20/" in row["item"]) or
        (expert == "PNEUMONIA" and row["expert_called"] == expert)
    )  # fmt: skip


def colours(png):
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int((np.ptp(image, axis=2) > 20).sum())


def test_overlay_and_legend_are_what_the_expert_said(made):
    source = Samples(made / "data", made / "annotations")
    row = picked(made, "stage4_experts", "ORGANS")
    true = source.images(row)
    assert true.caption == "axial slice 20" and colours(true.image) == 0
    assert colours(true.overlay) > 1000
    assert [name for _, name in true.legend] == ["liver", "spleen", "aorta"]
    assert true.legend[0][0] == "#ff0000"
    false = source.images(picked(made, "stage4_falsified", "ORGANS"))
    assert not {"liver", "spleen", "aorta"} & {name for _, name in false.legend}
    assert "falsified" in false.overlay_caption


def test_no_overlay_without_a_label_map_a_call_or_a_result(made):
    source = Samples(made / "data", made / "annotations")
    film = source.images(picked(made, "stage4_experts", "PNEUMONIA"))
    assert film.image and film.overlay is None and film.legend == ()
    row = picked(made, "stage4_experts", "ORGANS")
    assert source.images({**row, "trigger": None}).overlay is None
    assert source.images({**row, "expert_status": "failed"}).overlay is None
    assert source.images({**row, "trigger": "<ORGANS(bones)>"}).overlay is None


def test_slices_keep_their_proportions(made):
    """The phantom's voxels are 8 x 8 x 10 mm: 40 of them are 320 by 400 mm in a coronal slice."""
    source = Samples(made / "data", made / "annotations")
    row = picked(made, "stage4_experts", "ORGANS")
    example, data = source._examples[row["item"].rsplit("/q", 1)[0]]
    ref = fake_run.ImageRef(path=example.images[0].path, axis=1, index=20, window=(50.0, 400.0))
    shown, words = source._render(ref, data)
    assert words == "coronal slice 20"
    assert shown.shape == (SIDE, round(SIDE * 0.8), 3)


def test_licences_are_grouped(made):
    found = Samples(made / "data", made / "annotations").licences()
    assert [(one.modality, one.samples) for one in found] == [("CT", 2), ("chest X-ray", 12)]
