"""Suites of arms on a tiny export: contrasts, resumption, the same bytes, and other sources of answers."""

from __future__ import annotations

import http.server
import json
import threading
from typing import ClassVar

import pytest

from vilam3_jax.cli import guarded
from vilam3_jax.evals import answerers
from vilam3_jax.evals import main as evaluate
from vilam3_jax.evals import rows as row_files


def run(*arguments):
    return guarded("evaluate", evaluate.main, [str(argument) for argument in arguments])


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != row_files.RUN_FILE
    }


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def common(export, world):
    flags = [f"--data={world.data}", f"--checkpoint={export}", f"--annotations={world.annotations}"]
    return [*flags, "--batch_size=4", "--max_length=1536"]


def test_grounding_writes_all_arms_and_contrasts_twice_with_the_same_bytes(common, tmp_path, capsys):
    outs = tmp_path / "first", tmp_path / "second"
    for out in outs:
        assert run("--protocol=grounding@1", *common, "--limit=2", f"--out={out}") == 0
    shown = capsys.readouterr().out
    assert "visual reliance" in shown and "gain over the most frequent answer" in shown
    first, second = map(files_of, outs)
    assert first == second
    arms = {"model", "blank", "other_patient", "region_hidden", "no_image", "majority"}
    assert {name.split("/")[0] for name in first} == arms | {"contrasts.json", "contrasts.md"}
    contrasts = {one["name"]: one for one in json.loads(first["contrasts.json"])}
    # Only questions about a slice with an expert's labels have a region.
    assert contrasts["reliance on the region"]["left_out"] > 0
    assert contrasts["visual reliance"]["left_out"] == 0
    (result,) = [json.loads(first[name]) for name in first if name == "model/result.json"]
    assert result["split"] == "heldout" and len(result["checkpoint_id"]) == 64


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_bytes(
    common, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(row_files, "PART_ROWS", 3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ["--protocol=quickstart@1", *common, "--arm=stage4_experts,stage4_blank"]
    assert run(*command, f"--out={whole}") == 0
    texts = answerers.ModelAnswerer._texts

    def dies(self, agent, protocol, arm, asked, done):
        for number, answer in enumerate(texts(self, agent, protocol, arm, asked, done)):
            if arm.name == "stage4_blank" and number == 8:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(answerers.ModelAnswerer, "_texts", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([*command, f"--out={broken}"])
    partial = broken / "stage4_blank" / row_files.PARTIAL
    assert len(list(partial.glob("0*.jsonl"))) == 2 and not (broken / "stage4_blank/result.json").exists()
    monkeypatch.setattr(answerers.ModelAnswerer, "_texts", texts)
    capsys.readouterr()
    assert run(*command, f"--out={broken}") == 0
    assert "arm stage4_experts: already in" in capsys.readouterr().out
    assert json.loads((broken / "stage4_blank/run.json").read_text())["resumed_after"] == 6
    assert files_of(broken) == files_of(whole)


def test_parts_of_other_settings_are_not_used(common, tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "PART_ROWS", 2)
    settings = {"seed": 0}
    first = row_files.PartialRows(tmp_path, settings)
    assert list(first.keep(iter([{"item": i} for i in range(5)]))) == [{"item": i} for i in range(5)]
    assert row_files.PartialRows(tmp_path, settings).rows == [{"item": i} for i in range(5)]
    assert row_files.PartialRows(tmp_path, {"seed": 1}).rows == []
    assert row_files.PartialRows(tmp_path, settings).rows == []  # removed


def test_experts_that_lie_and_fail(common, tmp_path):
    assert run("--protocol=experts@1", *common, "--limit=2", f"--out={tmp_path}") == 0
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/result.json")}
    assert set(found) >= {
        "experts",
        "model",
        "experts_falsified",
        "experts_failing",
        "experts_other_modality",
    }
    names = {one["metric"] for one in found["experts"]["estimates"]}
    assert {"call_recall", "call_precision", "calls_without_need"} <= names
    other = {row["item"]: row for row in rows_of(tmp_path / "experts_other_modality")}
    true = {row["item"]: row for row in rows_of(tmp_path / "experts")}
    assert other.keys() == true.keys() and all(other[item]["gold"] == true[item]["gold"] for item in true)


def test_probabilities_of_yes_and_no(common, tmp_path):
    assert run("--protocol=findings@1", *common, f"--out={tmp_path}") == 0
    rows = rows_of(tmp_path / "model")
    assert rows and all(sorted(row["probabilities"]) == ["no", "yes"] for row in rows)
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in rows)
    assert all(row["output"] == max(row["probabilities"], key=row["probabilities"].get) for row in rows)
    majority = {row["question_type"]: row for row in rows_of(tmp_path / "majority")}
    assert (
        majority["organ_present"]["probabilities"]["yes"]
        > 0.5
        > majority["pneumonia"]["probabilities"]["yes"]
    )


def test_a_predictions_file_is_scored_like_a_model(common, world, tmp_path, capsys):
    assert run("--protocol=quickstart@1", *common, "--arm=stage3", f"--out={tmp_path / 'model'}") == 0
    rows = rows_of(tmp_path / "model")
    lines = [json.dumps({"question_id": row["item"], "text": row["output"]}) for row in rows[:-1]]
    (tmp_path / "theirs.jsonl").write_text("\n".join(lines))
    command = ["--protocol=quickstart@1", f"--data={world.data}", f"--out={tmp_path / 'theirs'}"]
    assert run(*command, f"--predictions={tmp_path / 'theirs.jsonl'}") == 0
    assert rows_of(tmp_path / "theirs/majority")  # the trivial baseline stands beside
    found = rows_of(tmp_path / "theirs/predictions")
    assert [row["correct"] for row in found[:-1]] == [row["correct"] for row in rows[:-1]]
    assert found[-1]["missing"] and found[-1]["unparsed"] and not found[-1]["correct"]
    assert json.loads((tmp_path / "theirs/predictions/result.json").read_text())["missing"] == 1
    capsys.readouterr()
    (tmp_path / "other.json").write_text(json.dumps({"no such item": "yes"}))
    assert run(*command[:2], f"--out={tmp_path / 'x'}", f"--predictions={tmp_path / 'other.json'}") == 2
    assert "answers none of the 12 questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"item": "a"}', r"record 1: needs an id .* and an answer"),
        ("a.jsonl", '{"item": "a", "text": "x"}\n{"item": "a", "text": "y"}', "record 2: item 'a' has two"),
        ("a.jsonl", "{", "give JSON lines, a JSON list"),
        ("a.json", "[1]", "record 1: is a int, not an object"),
        ("a.csv", "item,other\na,b\n", r"record 1: needs an id"),
    ],
)
def test_bad_predictions_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(Exception, match=message):
        answerers.read_predictions(path)


def test_predictions_are_read_in_all_formats(tmp_path):
    formats = {
        "a.json": json.dumps({"q1": "yes", "q2": "no"}),
        "b.json": json.dumps([{"uid": "q1", "prediction": "yes"}, {"uid": "q2", "prediction": "no"}]),
        "c.jsonl": '{"id": "q1", "answer": "yes"}\n\n{"id": "q2", "answer": "no"}\n',
        "d.csv": "item,output\nq1,yes\nq2,no\n",
    }
    for name, content in formats.items():
        (tmp_path / name).write_text(content)
        assert answerers.read_predictions(tmp_path / name) == {"q1": "yes", "q2": "no"}


class _Server(http.server.BaseHTTPRequestHandler):
    """Answers yes to everything, and keeps what it was asked."""

    asked: ClassVar[list[dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        reply = json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments):
        pass


def test_a_local_server_is_asked_with_images(world, tmp_path, capsys):
    server = http.server.HTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = ["--protocol=quickstart@1", f"--data={world.data}", "--limit=1", f"--out={tmp_path / 'out'}"]
    try:
        assert run(*command, f"--endpoint=http://127.0.0.1:{server.server_port}/v1", "--arm=mine") == 0
    finally:
        server.shutdown()
    rows = rows_of(tmp_path / "out")
    assert len(rows) == len(_Server.asked) == 3 and {row["output"] for row in rows} == {"yes"}
    image, text = _Server.asked[0]["messages"][0]["content"]
    assert (
        image["image_url"]["url"].startswith("data:image/png;base64,") and text["text"] == rows[0]["question"]
    )
    capsys.readouterr()
    assert run(*command, "--endpoint=http://example.com/v1", "--arm=mine") == 2
    assert "must be http:// on this machine" in capsys.readouterr().err
