"""`vilam3 evaluate` on a tiny export, from datasets to tables."""

from __future__ import annotations

import json

import pytest

from vilam3_jax.cli import guarded
from vilam3_jax.evals import main as evaluate
from vilam3_jax.evals import protocol as protocols
from vilam3_jax.evals import retrieval


def run(*arguments):
    return guarded("evaluate", evaluate.main, [str(argument) for argument in arguments])


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def results(tmp_path_factory, export, world):
    """Folders of three arms."""
    root = tmp_path_factory.mktemp("eval")
    common = ["--protocol=quickstart@1", f"--data={world.data}", "--batch_size=4", "--max_length=1536"]
    given = [f"--checkpoint={export}", f"--annotations={world.annotations}"]
    assert run(*common, *given, "--arm=stage4_no_experts,stage4_blank", f"--out={root}") == 0
    assert run(*common, "--arm=majority", f"--out={root / 'majority'}") == 0
    return root


def test_rows_and_result(results, export):
    rows = rows_of(results / "stage4_no_experts")
    assert len(rows) == 12
    assert {row["question_type"] for row in rows} == {"organ_present", "modality", "pneumonia"}
    assert {row["item"] for row in rows} == {
        f"instruct/heldout/{kind}{person}/q{question}"
        for kind in ("scan", "film")
        for person in range(3)
        for question in range(2)
    }
    oracle = [row for row in rows if row["oracle"]]
    assert len(oracle) == 3 and all(row["question_type"] == "organ_present" for row in oracle)
    assert all(row["prompt"].startswith("<image>\n") and isinstance(row["output"], str) for row in rows)
    result = json.loads((results / "stage4_no_experts" / "result.json").read_text())
    assert result["protocol_hash"] == protocols.get("quickstart@1").hash
    assert protocols.content_hash(result["protocol"]) == result["protocol_hash"]
    assert result["checkpoint"] == str(export) and result["items"] == 12
    assert result["text"] == {"split": "clean", "bos": "clean", "spaces": "clean", "image_end": ""}
    assert {summary["arm"] for summary in result["summaries"]} == {"stage4_no_experts"}
    blank = json.loads((results / "stage4_blank" / "result.json").read_text())
    assert blank["items_hash"] == result["items_hash"]
    assert "Oracle by construction" in (results / "stage4_no_experts" / "tables.md").read_text()


def test_blank_images_reach_the_model(results):
    true, blank = (
        {r["item"]: r["output"] for r in rows_of(results / a)} for a in ("stage4_no_experts", "stage4_blank")
    )
    assert true.keys() == blank.keys()
    # With blank images, answers depend on the question alone.
    assert len({blank[item] for item in blank if item.endswith("/q1")}) == 1


def test_an_arm_alone_has_the_rows_of_an_arm_among_several(results, export, world, tmp_path, capsys):
    arguments = ["--protocol=quickstart@1", f"--data={world.data}", f"--checkpoint={export}"]
    arguments += ["--batch_size=4", "--max_length=1536", f"--out={tmp_path}"]
    assert run(*arguments, "--arm=stage4_blank") == 0
    assert rows_of(tmp_path) == rows_of(results / "stage4_blank")
    assert run(*arguments, "--arm=stage4_blank,majority,stage4_blank") == 2
    assert "'stage4_blank' is given twice" in capsys.readouterr().err


def test_the_majority_arm_needs_no_checkpoint(results):
    rows = rows_of(results / "majority")
    right = {row["question_type"]: row["output"] for row in rows if row["correct"]}
    assert right["organ_present"] == "yes" and right["pneumonia"] == "no"


def test_experts_on_shows_cards_and_limit_is_kept(export, world, tmp_path):
    arguments = [
        "--protocol=quickstart@1",
        f"--data={world.data}",
        f"--checkpoint={export}",
        "--max_length=1536",
    ]
    arguments += [f"--annotations={world.annotations}", "--experts=falsified", "--limit=1", "--seed=5"]
    assert run(*arguments, f"--out={tmp_path / 'falsified'}") == 0
    rows = rows_of(tmp_path / "falsified")
    assert sorted(row["question_type"] for row in rows) == ["modality", "organ_present", "pneumonia"]
    assert all("<ORGANS(args)>" in row["prompt"] and row["falsify_seed"] == 5 for row in rows)
    assert {row["arm"] for row in rows} == {"experts_falsified_images_true"}


def test_compare(results, tmp_path, capsys):
    folders = [results / arm for arm in ("stage4_no_experts", "stage4_blank", "majority")]
    assert run("compare", *folders, f"--out={tmp_path / 'compared.json'}") == 0
    out = capsys.readouterr().out
    assert "majority - stage4_no_experts" in out and "too few patients" in out
    shown = json.loads((tmp_path / "compared.json").read_text())
    assert [table["title"].split(" ")[0] for table in shown] == ["Questions", "Oracle", "Differences"]
    assert run("compare", folders[0], folders[0]) == 0
    assert run("compare", folders[0]) == 2
    assert "two results" in capsys.readouterr().err


def test_repeats_pool_the_questions_that_an_expert_can_answer(tmp_path, capsys):
    def write(run_name, arm, right, protocol="p"):
        folder = tmp_path / run_name / arm
        folder.mkdir(parents=True, exist_ok=True)
        common = {"oracle": False, "unparsed": False, "question_type": "t", "label_source": "s", "arm": arm}
        rows = [
            {**common, "item": f"i{n}", "cluster": f"patient{n % 12}", "correct": right(n), "expert": expert}
            for n, expert in enumerate(["X"] * 24 + [None] * 24)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "result.json").write_text(json.dumps({"protocol_hash": protocol, "items_hash": "i"}))

    for run_name, share in (("one", 4), ("two", 2)):
        write(run_name, "stage4_experts", lambda n: True)
        write(run_name, "stage4_no_experts", lambda n, share=share: n % share > 0)
    folders = [tmp_path / "one", tmp_path / "two"]
    assert run("repeats", *folders, f"--out={tmp_path / 'pooled.json'}") == 0
    (table,) = json.loads((tmp_path / "pooled.json").read_text())
    assert [(row[2], row[4], row[5]) for row in table["rows"]] == [
        ("+0.250", "24", "12"), ("+0.500", "24", "12"), ("+0.375", "48", "12"),
    ]  # fmt: skip
    assert [row[0] for row in table["rows"]] == [*map(str, folders), "pooled"]
    write("two", "stage4_experts", lambda n: True, protocol="q")
    assert run("repeats", *folders) == 2
    assert f"two: has other questions than {folders[0]}" in capsys.readouterr().err


def test_compare_refuses_another_protocol(results, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "rows.jsonl").write_text((results / "majority" / "rows.jsonl").read_text())
    result = json.loads((results / "majority" / "result.json").read_text())
    (other / "result.json").write_text(json.dumps({**result, "protocol_hash": "f" * 64}))
    assert run("compare", results / "majority", other) == 2
    assert "other: protocol ffffffffffff is not that of majority" in capsys.readouterr().err
    (other / "rows.jsonl").write_text("{")
    assert run("compare", results / "majority", other) == 2
    assert "damaged result" in capsys.readouterr().err


def test_retrieval(towers_export, world, tmp_path, capsys):
    out = tmp_path / "retrieval.json"
    arguments = [f"--checkpoint={towers_export}", f"--data={world.data}", "--protocol=retrieval@2"]
    assert run(*arguments, f"--out={out}", "--batch_size=4") == 0
    result = json.loads(out.read_text())
    # Three slices of one scan and one film, which three patients share.
    assert (result["n"], result["chance"]) == (4, 0.5)
    assert result["protocol_hash"] == retrieval.RETRIEVAL.hash
    assert "chance 0.500" in capsys.readouterr().out
    assert run(*arguments, f"--out={out}", "--limit=3") == 2
    assert "--limit: has no effect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--protocol=quickstart@9"], "protocol 'quickstart@9': not known"),
        (["--data=/nowhere"], "/nowhere: no dataset"),
        (["--experts=on"], "needs --annotations"),
        (["--arm=stage4_no_experts", "--experts=on"], "means --experts=off"),
        (["--limit=0"], "limit 0"),
        (["--batch_size=0"], "--batch_size=0"),
        (["--checkpoint=/nowhere"], "/nowhere: no such folder; give a training run"),
        (["--checkpoint="], "--checkpoint is missing"),
        (["--cards=unheard", "--experts=on", "--annotations=ANNOTATIONS"], "no card list 'unheard'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(export, world, tmp_path, capsys, extra, message):
    out = tmp_path / "out"
    arguments = ["--protocol=quickstart@1", f"--data={world.data}", f"--checkpoint={export}", f"--out={out}"]
    extra = [word.replace("ANNOTATIONS", str(world.annotations)) for word in extra]
    assert run(*arguments, *extra) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_a_checkpoint_of_another_kind_is_refused(towers_export, world, tmp_path, capsys):
    arguments = ["--protocol=quickstart@1", f"--data={world.data}", f"--out={tmp_path / 'out'}"]
    assert run(*arguments, f"--checkpoint={towers_export}") == 2
    assert "holds a contrastive model" in capsys.readouterr().err
