"""Subgroups: a planted gap is found with its sign, small groups are not shown."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vilam3_jax.cli import guarded
from vilam3_jax.errors import UserError
from vilam3_jax.evals import fairness
from vilam3_jax.evals import main as evaluate


def rows_of(patients=300, seed=0):
    """Findings of patients; the model misses 40 % of those of young women, and 10 % of others."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        sex, age = "MF"[patient % 2], ("18-39", "40-64")[patient // 2 % 2]
        miss = 0.4 if (sex, age) == ("F", "18-39") else 0.1
        for question in range(4):
            gold = "yes" if rng.random() < 0.5 else "no"
            said = ("no" if rng.random() < miss else "yes") if gold == "yes" else "no"
            rows.append(
                {
                    "item": f"{patient}/{question}", "cluster": f"p{patient}", "gold": gold, "parsed": said,
                    "correct": said == gold, "unparsed": False, "arm": "model", "question_type": "finding",
                    "groups": {"sex": sex, "age_band": age, **({"race": "rare"} if patient < 10 else {})},
                }
            )  # fmt: skip
    return rows


def test_a_planted_gap_is_found_at_the_intersection():
    found = {(one.group, one.metric): one for one in fairness.gaps(rows_of(), ["sex", "age_band", "race"])}
    assert not any("race" in group for group, _ in found)  # ten patients
    worst = found["sex=F & age_band=18-39", "fnr"]
    assert worst.patients == 75 and worst.gap == pytest.approx(0.3, abs=0.1)
    assert worst.interval[0] > 0.1 and worst.value - worst.others == pytest.approx(worst.gap)
    assert found["sex=F & age_band=18-39", "fpr"].gap == 0
    own = [r for r in rows_of() if r["groups"]["sex"] == "M" and r["gold"] == "yes"]
    assert found["sex=M", "fnr"].value == pytest.approx(1 - np.mean([r["correct"] for r in own]))
    assert found["sex=M", "fnr"].gap == pytest.approx(-found["sex=F", "fnr"].gap)


def test_what_cannot_be_said_is_refused():
    with pytest.raises(UserError, match="no group of race has 20 patients"):
        fairness.gaps(rows_of(), ["race"])
    with pytest.raises(UserError, match="no question is answered by yes or no"):
        fairness.gaps([{**row, "gold": "liver"} for row in rows_of(5)], ["sex"])


def test_the_command_writes_a_table(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of()))
    (tmp_path / "result.json").write_text(json.dumps({"protocol_hash": "x"}))
    command = ["fairness", str(tmp_path), "--by=sex", f"--out={tmp_path / 'gaps.json'}"]
    assert guarded("evaluate", evaluate.main, command) == 0
    assert "not corrected for their number" in capsys.readouterr().out
    (table,) = json.loads((tmp_path / "gaps.json").read_text())
    assert [row[:2] for row in table["rows"]] == [
        ["sex=F", "fnr"], ["sex=F", "fpr"], ["sex=M", "fnr"], ["sex=M", "fpr"],
    ]  # fmt: skip
