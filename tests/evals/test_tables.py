"""The main table, the oracle table, and the text in place of missing intervals."""

from __future__ import annotations

import dataclasses
import json

from vilam3_jax.evals import statistics, tables


def rows(arm, oracle, right, clusters=12, question_type="organ_present"):
    return [
        {
            "item": f"{question_type}-{oracle}-{i}",
            "cluster": f"p{i % clusters}",
            "correct": i % 4 < right,
            "unparsed": i == 3,
            "arm": arm,
            "question_type": question_type,
            "label_source": "TotalSegmentator | map",
            "oracle": oracle,
        }
        for i in range(24)
    ]


ROWS = rows("stage3", False, 2) + rows("stage4_experts", False, 3, question_type="modality")
ROWS += rows("stage4_experts", True, 4) + rows("stage4_falsified", True, 1)
SUMMARIES = statistics.summarise(ROWS)


def test_oracle_questions_stand_in_their_own_table_beside_the_falsified_row():
    main, oracle = tables.accuracy_tables(SUMMARIES)
    assert {row[2] for row in main.rows} == {"stage3", "stage4_experts"}
    assert "Oracle by construction" in oracle.title and "Oracle" not in main.title
    organ = [row for row in oracle.rows if row[0] == "organ_present"]
    assert [(row[2], row[3]) for row in organ] == [("stage4_experts", "1.000"), ("stage4_falsified", "0.250")]
    assert len(main.rows) + len(oracle.rows) == len(SUMMARIES)


def test_all_comes_first_then_types():
    assert [row[0] for row in tables.accuracy_tables(SUMMARIES)[0].rows] == [
        "all",
        "all",
        "modality",
        "organ_present",
    ]


def test_few_volumes_give_the_words_and_each_value():
    few = statistics.summarise(rows("stage3", False, 2, clusters=2))
    cell = tables.accuracy_tables(few)[0].rows[0][4]
    assert cell == "too few patients for an interval: 0.50, 0.50"


def test_markdown_has_one_cell_per_column_even_with_a_bar_in_a_name():
    text = tables.accuracy_tables(SUMMARIES)[0].to_markdown()
    body = [line for line in text.splitlines() if line.startswith("|")]
    assert len(body) == 2 + len(tables.accuracy_tables(SUMMARIES)[0].rows)
    assert all(line.replace("\\|", "").count("|") == len(tables.COLUMNS) + 1 for line in body)


def test_text_is_aligned_and_json_is_plain():
    table = tables.accuracy_tables(SUMMARIES)[1]
    lines = table.to_text().splitlines()
    start = lines[2].index("arm")
    assert all(line[start:].startswith("stage4_") for line in lines[4 : 4 + len(table.rows)])
    assert json.loads(json.dumps(dataclasses.asdict(table)))["columns"] == list(tables.COLUMNS)


def test_differences():
    first = [row for row in ROWS if row["arm"] == "stage4_experts" and row["oracle"]]
    second = [row for row in ROWS if row["arm"] == "stage4_falsified"]
    table = tables.difference_table([("oracle", statistics.paired_difference(first, second))])
    assert table.rows[0][:3] == ("oracle", "stage4_experts - stage4_falsified", "+0.750")
    assert " to " in table.rows[0][3]
