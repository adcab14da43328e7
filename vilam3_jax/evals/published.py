"""Published figures with their sources and protocols, and the averages that the paper's abstract claims.

Figures of different protocols never stand in one column: the same checkpoint has five different "accuracies"
on VQA-RAD. `published.json` holds figures, in percent, as facts; none was measured here.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vilam3_jax.evals.tables import Table

# Protocol of this package ↦ (benchmark, published protocol) that it reproduces.
SAME_AS: Mapping[str, tuple[str, str]] = {
    "vila-m3/parity/vqa-rad@1": ("vqa-rad", "vila-m3 exact match"),
    "vila-m3/parity/slake@1": ("slake", "vila-m3 exact match"),
    "vila-m3/parity/path-vqa@1": ("path-vqa", "vila-m3 exact match"),
    "vila-m3/parity/mimic-vqa@1": ("mimic-vqa", "vila-m3 closed accuracy"),
    "vila-m3/parity/chestxray14@1": ("chestxray14", "F1, without expert"),
    "vila-m3/parity/chexpert@1": ("chexpert", "F1, without expert"),
}
_MED_GEMINI = "Med-Gemini"
_TASKS = ("LLaVA-Med (fine-tuned per dataset)", "LLaVA-Rad", "TorchXRayVision alone")
_CLAIMS = {"Med-Gemini": "~9 %", "models of one task": "~6 %"}


@dataclasses.dataclass(frozen=True)
class Figure:
    """One published figure.

    Attributes:
      system: the model.
      benchmark: the dataset or task.
      protocol: how it was measured.
      value: in percent.
      source: where it was published.
    """

    system: str
    benchmark: str
    protocol: str
    value: float
    source: str


def figures() -> list[Figure]:
    """All figures of `published.json`."""
    text = (Path(__file__).parent / "published.json").read_text(encoding="utf-8")
    return [Figure(**record) for record in json.loads(text)]


def published_tables(results: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> list[Table]:
    """One table per benchmark with a column per protocol; own results stand only below their own protocol.

    Args:
      results: (name, `result.json`) of `vilam3 evaluate`.
    """
    known = figures()
    own: dict[tuple[str, str, str], str] = {}
    for name, result in results:
        protocol = f"{result['protocol']['id']}@{result['protocol']['version']}"
        place = SAME_AS.get(protocol, (protocol, protocol))
        headline = result["estimates"][0]
        own[*place, f"{name} (measured here)"] = _measured(headline)
    benchmarks = dict.fromkeys([one.benchmark for one in known] + [key[0] for key in own])
    return [_benchmark_table(benchmark, known, own) for benchmark in benchmarks]


def _measured(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "undefined"
    text = f"{100 * estimate['value']:.1f}"
    if estimate["interval"]:
        low, high = estimate["interval"]
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{text}, n {estimate['n']}, {estimate['unparsed']} unparsed"


def _benchmark_table(
    benchmark: str, known: Sequence[Figure], own: Mapping[tuple[str, str, str], str]
) -> Table:
    of_benchmark = [one for one in known if one.benchmark == benchmark]
    cells = {(one.system, one.protocol): f"{one.value:g}" for one in of_benchmark}
    cells |= {(name, protocol): text for (place, protocol, name), text in own.items() if place == benchmark}
    protocols = tuple(dict.fromkeys(protocol for _, protocol in cells))
    systems = dict.fromkeys(system for system, _ in cells)
    rows = tuple(
        (system, *(cells.get((system, protocol), "") for protocol in protocols)) for system in systems
    )
    sources = sorted({f"{one.system}: {one.source}" for one in of_benchmark})
    note = "Published figures in percent, without intervals. Do not compare columns: they are protocols."
    return Table(
        benchmark, ("system", *protocols), rows, (note, *(["; ".join(sources) + "."] if sources else []))
    )


def claimed_averages() -> Table:
    """The averages behind "~9 % over Med-Gemini and ~6 % over task-specific models".

    For each benchmark and protocol that both sides have: the best VILA-M3 minus the other, in points, and
    over the other, in percent; then the mean of each.
    """
    known = figures()
    rows = []
    for sizes, systems in (
        ("3B, 8B and 13B", ("VILA-M3 3B", "VILA-M3 8B", "VILA-M3 13B")),
        ("3B to 40B", ("VILA-M3 3B", "VILA-M3 8B", "VILA-M3 13B", "VILA-M3 40B")),
    ):
        for name, others in (("Med-Gemini", (_MED_GEMINI,)), ("models of one task", _TASKS)):
            gains = _gains(known, systems, others)
            points = sum(best - other for _, best, other in gains) / len(gains)
            relative = sum(100 * (best - other) / other for _, best, other in gains) / len(gains)
            reproduced = any(f"{value:.0f}" in _CLAIMS[name] for value in (points, relative))
            rows.append(
                (
                    *(f"best of {sizes}", name, str(len(gains)), f"{points:+.1f}", f"{relative:+.1f} %"),
                    *(_CLAIMS[name], "reproduced" if reproduced else "not reproduced"),
                )
            )
    columns = ("VILA-M3", "against", "figures", "mean, points", "mean, relative", "claimed", "result")
    note = (
        "Formula: over every benchmark and protocol with figures of both, the mean of (best VILA-M3 - other) "
        "and of (best VILA-M3 - other) / other. With or without expert, whichever is better. The paper does "
        "not define its averages."
    )
    return Table("The averages of the paper's abstract", columns, tuple(rows), (note,))


def _gains(
    known: Sequence[Figure], systems: Sequence[str], others: Sequence[str]
) -> list[tuple[str, float, float]]:
    """(benchmark and metric, best of `systems`, best of `others`) where both have a figure."""

    def key(one: Figure) -> tuple[str, str]:
        # The same classes are asked with and without expert.
        protocol = "F1" if one.protocol.startswith("F1, with") else one.protocol
        return one.benchmark, protocol

    best: dict[tuple[str, str], dict[str, float]] = {}
    for one in known:
        side = "own" if one.system in systems else "other" if one.system in others else None
        if side:
            found = best.setdefault(key(one), {})
            found[side] = max(one.value, found.get(side, 0.0))
    return [(" ".join(name), sides["own"], sides["other"]) for name, sides in best.items() if len(sides) == 2]


def to_html(title: str, tables: Sequence[Table]) -> str:
    """One page that loads nothing."""
    parts = [_PAGE_HEAD.format(title=html.escape(title))]
    for table in tables:
        head = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in table.columns)
        body = "".join(
            "<tr>"
            + f"<th scope=row>{html.escape(row[0])}</th>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>\n"
            for row in table.rows
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
        parts.append(
            f"<section><h2>{html.escape(table.title)}</h2><div class=wide><table>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}</section>"
        )
    return "\n".join([*parts, "<footer>Research use only; not for clinical use.</footer></body></html>\n"])


_PAGE_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ margin: 2rem auto; max-width: 75rem; padding: 0 1rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #8886 }}
tbody th {{ font-weight: normal }}
p {{ max-width: 65ch; font-size: .9rem }}
</style></head><body><h1>{title}</h1>"""
