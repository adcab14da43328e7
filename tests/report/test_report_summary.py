"""`summary.json` is complete; an invalid document is not written."""

from __future__ import annotations

import copy
import json
import pathlib

import fake_run
import jsonschema
import pytest

from vilam3_jax.errors import UserError
from vilam3_jax.report import main, runs, summary

ROOT = pathlib.Path(__file__).parents[2]
STAGE_KEYS = {"steps", "tokens", "loss_first", "loss_last", "heldout_true", "heldout_swapped", "seconds"}
EVALUATION_KEYS = {"arm", "question_type", "label_source", "n", "clusters", "accuracy", "interval"}


@pytest.fixture(scope="module")
def document(made):
    return summary.summary_of(runs.read_run(made))


def test_docs_and_package_have_the_same_schema():
    packaged = ROOT / "vilam3_jax" / "report" / "summary.schema.json"
    assert packaged.read_bytes() == (ROOT / "docs" / "summary.schema.json").read_bytes()
    jsonschema.Draft202012Validator.check_schema(summary.schema())
    assert summary.schema()["$schema"].endswith("2020-12/schema")


def test_every_field_of_the_schema_is_described():
    def fields(node):
        for name, value in node.get("properties", {}).items():
            yield name, value
            yield from fields(value)

    schema = summary.schema()
    described = [*fields(schema), *(f for d in schema["$defs"].values() for f in fields(d))]
    assert len(described) > 40
    assert [name for name, value in described if "description" not in value and "$ref" not in value] == []


def test_holds_what_the_run_left(document, made):
    assert list(document["stages"]) == list(runs.STAGES)
    for name, stage in document["stages"].items():
        result = json.loads((made / "stages" / name / "result.json").read_text())
        assert set(stage) >= STAGE_KEYS
        assert all(stage[key] == result[key] for key in STAGE_KEYS)
    wanted = {"accuracy": 0.86, "chance": 0.5, "n": 36, "interval": [0.7, 0.95]}
    assert document["retrieval"].items() >= wanted.items() and "protocol" not in document["retrieval"]
    assert {one["arm"] for one in document["evaluation"]} == set(runs.ARMS + runs.FURTHER_ARMS)
    assert all(set(one) >= EVALUATION_KEYS for one in document["evaluation"])
    assert document["machine"]["processor"] == "a processor"
    assert document["versions"]["jax"] == "0.10.2"
    assert document["peak_rss"] == 3 << 30
    assert document["wall_seconds"] == 110.5  # without the 500 s of downloading samples
    assert document["size"] == "default"


def test_accuracies_are_counted_from_the_rows(document, made):
    rows = [
        json.loads(line)
        for line in (made / "eval" / "stage4_experts" / "rows.jsonl").read_text().splitlines()
    ]
    wanted = [row["correct"] for row in rows if row["question_type"] == "pneumonia"]
    (one,) = [
        e
        for e in document["evaluation"]
        if e["arm"] == "stage4_experts" and e["question_type"] == "pneumonia"
    ]
    assert (one["n"], one["clusters"], one["oracle"]) == (12, 12, False)
    assert one["accuracy"] == sum(wanted) / 12
    low, high = one["interval"]
    assert low <= one["accuracy"] <= high


def test_few_volumes_get_values_and_no_interval(document):
    oracle = [one for one in document["evaluation"] if one["oracle"]]
    assert oracle and all(one["interval"] is None and len(one["per_cluster"]) == 2 for one in oracle)
    assert {one["label_source"] for one in oracle} == {"all", "TotalSegmentator reference map"}


def test_comparisons_pair_the_arms_and_keep_the_groups_apart(document):
    found = {(c["group"], c["first"], c["second"]): c for c in document["comparisons"]}
    main, could = (found[g, "stage4_experts", "stage4_no_experts"] for g in ("main", "answerable"))
    oracle = found["oracle", "stage4_falsified", "stage4_experts"]
    assert (main["n"], could["n"], oracle["n"]) == (30, 12, 24)
    totals = {
        (e["arm"], e["oracle"]): e["accuracy"] for e in document["evaluation"] if e["question_type"] == "all"
    }
    difference = totals["stage4_experts", False] - totals["stage4_no_experts", False]
    assert main["difference"] == pytest.approx(difference)
    assert oracle["difference"] < 0


def test_machine_and_versions_are_found_without_a_record(run):
    (run / "quickstart.json").unlink()
    document = summary.summary_of(runs.read_run(run))
    assert document["machine"]["memory_bytes"] > 1 << 28 and document["machine"]["cores"] >= 1
    assert document["versions"]["python"].startswith("3.")
    assert document["peak_rss"] == 2 << 30
    assert "wall_seconds" not in document


def remove(*path):
    def change(document):
        for part in path[:-1]:
            document = document[part]
        del document[path[-1]]

    return change


def put(value, *path):
    def change(document):
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (remove("retrieval", "chance"), r"\$\.retrieval: .*'chance'"),
        (remove("stages", "stage3_instruct"), r"\$\.stages: .*'stage3_instruct'"),
        (
            remove("stages", "stage1_vision", "heldout_swapped"),
            r"\$\.stages\.stage1_vision: .*heldout_swapped",
        ),
        (remove("peak_rss"), r"\$: .*'peak_rss'"),
        (put(1.2, "evaluation", 0, "accuracy"), r"\$\.evaluation\[0\]\.accuracy: 1\.2"),
        (put("12", "evaluation", 3, "n"), r"\$\.evaluation\[3\]\.n"),
        (put([0.1], "evaluation", 0, "interval"), r"\$\.evaluation\[0\]\.interval"),
        (put(1, "stages", "stage1_vision", "lost"), r"\$\.stages\.stage1_vision: .*'lost'"),
        (
            put(float("nan"), "stages", "stage4_expert", "loss_last"),
            r"\$\.stages\.stage4_expert\.loss_last: nan",
        ),
    ],
)
def test_what_does_not_fit_is_named(document, change, where):
    broken = copy.deepcopy(document)
    change(broken)
    with pytest.raises(UserError, match=where):
        summary.check(broken)


def test_written_file_is_the_document(document, tmp_path):
    summary.write_summary(tmp_path, document)
    assert json.loads((tmp_path / "summary.json").read_text()) == document
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_stage_whose_loss_is_not_a_number_is_named_and_nothing_written(run):
    path = run / "stages" / "stage2a_align" / "result.json"
    result = json.loads(path.read_text()) | {"loss_last": float("nan")}
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"stage2a_align\.loss_last"):
        main.write_report(run)
    assert not (run / "summary.json").exists() and not (run / "report.html").exists()


def test_fake_run_is_the_same_every_time(made, tmp_path):
    again = summary.summary_of(runs.read_run(fake_run.make_run(tmp_path / "again")))
    assert again == summary.summary_of(runs.read_run(made))
