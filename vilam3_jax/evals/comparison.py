"""`vilam3 evaluate compare` and `repeats`: results side by side, and a difference over repeated runs."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

from vilam3_jax.errors import UserError
from vilam3_jax.evals import estimates, fairness, published, statistics, tables
from vilam3_jax.evals.items import GROUP_KEYS
from vilam3_jax.evals.metrics.base import metric
from vilam3_jax.evals.protocol import Protocol
from vilam3_jax.evals.rows import RESULT_FILE, ROWS_FILE, write_json
from vilam3_jax.runtime import paths

_MAX_BYTES = 1 << 30
_MAX_GROUPS = 32  # of one key; more are no groups but names

Row = dict[str, Any]
Result = tuple[str, dict[str, Any], list[Row]]  # name of the folder, `result.json`, rows


def _compare(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vilam3 evaluate compare", description="One table of several results, and paired differences."
    )
    parser.add_argument("results", nargs="+", help="folders written by `vilam3 evaluate --out`, two or more")
    parser.add_argument("--out", help="also write the tables: FILE.html, FILE.md or FILE.json")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    options = parser.parse_args(argv)
    if len(options.results) < 2:
        raise UserError("compare needs two results or more")
    shown = compare([read_result(folder) for folder in options.results], seed=options.seed)
    for table in shown:
        print(table.to_text())
    _write_tables(options.out, shown)
    return 0


def _write_tables(out: str | None, shown: Sequence[tables.Table]) -> None:
    if str(out).endswith(".json"):
        write_json(str(out), [dataclasses.asdict(table) for table in shown])
    elif str(out).endswith(".html"):
        paths.write_text_atomic(str(out), published.to_html("Evaluation", shown))
    elif out:
        paths.write_text_atomic(out, "\n".join(table.to_markdown() for table in shown))


def read_result(folder: paths.PathLike) -> Result:
    """Reads a folder that `vilam3 evaluate --out` wrote."""
    root = paths.as_path(folder)
    if not (root / RESULT_FILE).exists():
        raise UserError(f"{folder}: no {RESULT_FILE}; give a folder that `vilam3 evaluate --out` wrote")
    try:
        result = json.loads(paths.read_bytes(root / RESULT_FILE, _MAX_BYTES))
        lines = paths.read_bytes(root / ROWS_FILE, _MAX_BYTES).decode().splitlines()
        rows = [json.loads(line) for line in lines]
        if not rows or not isinstance(result["protocol_hash"], str):
            raise ValueError("no rows")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: damaged result ({error!r}); evaluate again") from error
    return root.name, result, rows


def compare(results: Sequence[Result], *, seed: int = 0) -> list[tables.Table]:
    """The main table, the oracle table, and differences between the later results and the first.

    Args:
      results: (name, result, rows) of each; names replace the arms if two results have the same arm.
      seed: seed of the bootstrap.

    Raises:
      UserError: different protocols, or no common question.
    """
    hashes = [result["protocol_hash"] for _, result, _ in results]
    for (name, _, _), own in zip(results, hashes, strict=True):
        if own != hashes[0]:
            raise UserError(
                f"{name}: protocol {own[:12]} is not that of {results[0][0]}, {hashes[0][:12]}; figures of "
                "different protocols cannot be compared"
            )
    names = [str(rows[0]["arm"]) for _, _, rows in results]
    if len(set(names)) < len(names):
        names = [name for name, _, _ in results]
    renamed = [
        [{**row, "arm": arm} for row in rows] for arm, (_, _, rows) in zip(names, results, strict=True)
    ]
    summaries = statistics.summarise(itertools.chain(*renamed), seed=seed)
    base, *others = renamed
    differences = statistics.paired_differences([(own, base) for own in others], seed=seed)
    if not differences:
        raise UserError("the results have no question in common; use the same --data and --limit")
    return [*tables.accuracy_tables(summaries), tables.difference_table(differences)]


def _repeats(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vilam3 evaluate repeats",
        description="The difference of two arms in runs that differ in their seed, one by one and pooled.",
    )
    parser.add_argument("runs", nargs="+", help="folders with one result folder per arm, two or more")
    parser.add_argument("--arms", default="stage4_experts,stage4_no_experts", help="A,B: A minus B")
    parser.add_argument("--out", help="also write the table: FILE.html, FILE.md or FILE.json")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    options = parser.parse_args(argv)
    arms = options.arms.split(",")
    if len(arms) != 2 or len(options.runs) < 2:
        raise UserError("repeats needs --arms=A,B and two runs or more")
    found = [tuple(read_result(f"{run}/{arm}") for arm in arms) for run in options.runs]
    table = repeats(options.runs, found, seed=options.seed)
    print(table.to_text())
    _write_tables(options.out, [table])
    return 0


def repeats(names: Sequence[str], runs: Sequence[tuple[Result, ...]], *, seed: int = 0) -> tables.Table:
    """Differences of two arms on the questions that an expert can answer and did not label.

    Pooled, a patient is one cluster with the questions of all runs.

    Args:
      names: of the runs.
      runs: results of the two arms of each run.
      seed: of the bootstrap.

    Raises:
      UserError: different protocols or questions, or nothing to compare.
    """
    first = runs[0][0][1]
    for name, run in zip(names, runs, strict=True):
        for _, result, _ in run:
            if any(result[key] != first[key] for key in ("protocol_hash", "items_hash")):
                raise UserError(f"{name}: has other questions than {names[0]}; evaluate on the same data")
    pooled: tuple[list[Row], list[Row]] = ([], [])
    differences = []
    for name, run in zip(names, runs, strict=True):
        pair = tuple([{**row, "item": f"{name} {row['item']}"} for row in rows] for _, _, rows in run)
        differences += _answerable(name, pair, seed)
        for rows, more in zip(pooled, pair, strict=True):
            rows += more
    return tables.difference_table([*differences, *_answerable("pooled", pooled, seed)])


def _answerable(name: str, pair: tuple[list[Row], ...], seed: int) -> list[tuple[str, statistics.Difference]]:
    found = dict(statistics.paired_differences([(pair[0], pair[1])], seed=seed))
    if "answerable" not in found:
        raise UserError(f"{name}: the arms have no question in common that an expert can answer")
    return [(name, found["answerable"])]


def protocol_estimates(
    protocol: Protocol, arm: str, rows: Sequence[Row], *, seed: int
) -> list[estimates.Estimate]:
    """The metrics of a protocol on all questions, the headline metric by question type and by group."""
    headline, *others = (metric(name) for name in (protocol.metric, *protocol.metrics))
    found = [
        estimates.estimate(estimates.aggregated(one, protocol.aggregation), rows, arm=arm, seed=seed)
        for one in (headline, *others)
    ]
    for key in ("question_type", *GROUP_KEYS):
        groups = estimates.group_rows(rows, key)
        if 1 < len(groups) <= _MAX_GROUPS:
            found += [
                estimates.estimate(headline, own, arm=arm, group=name, seed=seed)
                for name, own in groups.items()
            ]
    return found


def _published(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vilam3 evaluate published",
        description="Published figures by benchmark and protocol, own results beside those of the same "
        "protocol, and the averages that the paper claims.",
    )
    parser.add_argument("results", nargs="*", help="folders written by `vilam3 evaluate --out`")
    parser.add_argument("--out", help="also write the tables: FILE.html, FILE.md or FILE.json")
    options = parser.parse_args(argv)
    results = [read_result(folder)[:2] for folder in options.results]
    shown = [*published.published_tables(results), published.claimed_averages()]
    for table in shown:
        print(table.to_text())
    _write_tables(options.out, shown)
    return 0


def _fairness(argv: Sequence[str]) -> int:
    options = fairness.parser().parse_args(argv)
    _, _, rows = read_result(options.result)
    found = fairness.gaps(rows, options.by.split(","), min_patients=options.min_patients, seed=options.seed)
    table = fairness.gap_table(found)
    print(table.to_text())
    _write_tables(options.out, [table])
    return 0


COMMANDS = {"compare": _compare, "fairness": _fairness, "published": _published, "repeats": _repeats}
