"""The page: one self-contained HTML text made of a run's figures. What comes from files is escaped."""

from __future__ import annotations

import base64
import datetime
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from vilam3_jax.evals import tables
from vilam3_jax.report import captions, plots, runs
from vilam3_jax.report.dialogues import Dialogue
from vilam3_jax.report.pictures import Licence
from vilam3_jax.report.plots import Series

Document = Mapping[str, Any]


def text(value: object) -> str:
    """Escapes for use in text and in quoted attributes."""
    return escape(str(value), quote=True)


def data_uri(png: bytes) -> str:
    """A PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def page(title: str, eyebrow: str, body: Sequence[str], sections: Sequence[tuple[str, str]] = ()) -> str:
    """Puts the parts between head and foot.

    Args:
      title: heading of the page.
      eyebrow: line above it.
      body: HTML parts.
      sections: (anchor, name) of the parts, for the list at the top.
    """
    css = (importlib.resources.files("vilam3_jax.report") / "templates" / "report.css").read_text(
        encoding="utf-8"
    )
    links = "".join(f'<a href="#{text(anchor)}">{text(name)}</a>' for anchor, name in sections)
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    # The policy is a second lock: even a mistake in escaping could not load or run anything.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>\n{css}</style></head>\n"
        f'<body><div class="page"><header><p class="eyebrow">{text(eyebrow)}</p><h1>{text(title)}</h1>'
        f'<p class="banner"><strong>Not for clinical use.</strong> {text(captions.BANNER)}</p>'
        + (f'<nav aria-label="Sections">{links}</nav>' if links else "")
        + "</header>\n<main>"
        + "\n".join(body)
        + f"</main>\n<footer>Made {made} by <code>vilam3 report</code>. One file; it loads nothing from "
        "anywhere.</footer></div></body></html>\n"
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of terms and values; a long value takes a row of its own."""
    items = (
        f'<div class="{"wide" if len(v) > 100 else ""}"><dt>{text(k)}</dt><dd>{text(v)}</dd></div>'
        for k, v in pairs
    )
    return f'<dl class="facts">{"".join(items)}</dl>'


def section(anchor: str, title: str, *parts: str) -> str:
    """A section with a heading."""
    return f'<section id="{text(anchor)}"><h2>{text(title)}</h2>' + "\n".join(parts) + "</section>"


def figure(content: str, caption: str) -> str:
    """A figure with its caption."""
    return f"<figure>{content}<figcaption>{text(caption)}</figcaption></figure>"


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str = "",
    wordy: Sequence[int] = (),
    kind: str = "",
) -> str:
    """A plain table; the first column is the row's name, numbers are flush right.

    Args:
      head: column names.
      rows: cells, escaped here.
      caption: above the table.
      wordy: columns of words, flush left.
      kind: CSS class.
    """
    cells = "".join(f'<th scope="col"{_wordy(i, wordy)}>{text(name)}</th>' for i, name in enumerate(head))
    lines = []
    for row in rows:
        first = f'<th scope="row">{text(row[0])}</th>'
        lines.append(
            f"<tr>{first}"
            + "".join(f"<td{_wordy(i, wordy)}>{text(cell)}</td>" for i, cell in enumerate(row[1:], 1))
            + "</tr>"
        )
    return _table(cells, "".join(lines), caption, kind)


def _wordy(index: int, wordy: Sequence[int]) -> str:
    return ' class="words"' if index in wordy else ""


def _table(head: str, body: str, caption: str, kind: str) -> str:
    # Above the table, not in it: a caption inside would scroll away with a wide table.
    above = f'<p class="caption">{text(caption)}</p>' if caption else ""
    return (
        f'{above}<div class="scroll" tabindex="0" role="region" aria-label="{text(caption or "table")}">'
        f'<table class="{text(kind)}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


# --- training


def loss_panels(stages: Sequence[runs.Stage]) -> str:
    """One loss chart for each run."""
    panels = []
    for stage in stages:
        logged = [row for row in stage.metrics if captions.is_number(row.get("loss"))]
        steps, losses = [row["step"] for row in logged], [row["loss"] for row in logged]
        series = [
            Series("training", steps, losses, "raw"),
            Series("training, smoothed", steps, plots.smooth(losses), "train"),
        ]
        for key, name, kind in (
            ("heldout_swapped", "held-out, images exchanged", "swapped"),
            ("heldout_true", "held-out, true images", "true"),
        ):
            points = [row for row in stage.metrics if captions.is_number(row.get(key))]
            series.append(Series(name, [p["step"] for p in points], [p[key] for p in points], kind))
        unit = "loss (nats per pair)" if "vision" in stage.name else "loss (nats per token)"
        chart = plots.line_chart(series, title=f"Loss of {stage.name}", x_label="step", y_label=unit)
        panels.append(f"<div><h4>{text(captions.stage_title(stage.name))}</h4>{chart}</div>")
    legend = "".join(
        f"<li>{plots.key_mark(kind)}{text(name)}</li>"
        for kind, name in (
            ("train", "training (faint: every logged step)"),
            ("true", "held-out, true images"),
            ("swapped", "held-out, images exchanged"),
        )
    )
    return figure(
        f'<ul class="legend">{legend}</ul><div class="panels">{"".join(panels)}</div>', captions.LOSS_CAPTION
    )


def throughput_panels(stages: Sequence[runs.Stage]) -> str:
    """One speed chart for each run."""
    panels = []
    for stage in stages:
        rows = [row for row in stage.metrics if captions.is_number(row.get("tokens_per_second"))]
        series = [Series("speed", [r["step"] for r in rows], [r["tokens_per_second"] for r in rows], "train")]
        chart = plots.line_chart(
            series,
            title=f"Speed of {stage.name}",
            x_label="step",
            y_label="tokens per second",
            from_zero=True,
            height=140,
        )
        panels.append(f"<div><h4>{text(captions.stage_title(stage.name))}</h4>{chart}</div>")
    return figure(f'<div class="panels">{"".join(panels)}</div>', captions.SPEED_CAPTION)


def stage_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Steps, tokens, losses and seconds of each run."""
    head = (
        "Run",
        "Steps",
        "Tokens",
        "Tokens / s",
        "Loss, first",
        "Loss, last",
        "Held-out, true",
        "Held-out, exchanged",
        "Time",
    )
    rows = [
        (
            captions.stage_title(name),
            captions.count(one.get("steps")),
            captions.count(one.get("tokens")),
            captions.count(one.get("tokens_per_second")),
            captions.loss(one.get("loss_first")),
            captions.loss(one.get("loss_last")),
            captions.loss(one.get("heldout_true")),
            captions.loss(one.get("heldout_swapped")),
            captions.duration(one.get("seconds")),
        )
        for name, one in stages.items()
    ]
    return table(head, rows, caption=captions.STAGE_CAPTION)


# --- evaluation


def retrieval_table(retrieval: Mapping[str, Any]) -> str:
    """Retrieval accuracy, as a whole and by modality, beside what guessing gets."""
    rows = [
        (
            "All images",
            captions.percent(retrieval["accuracy"]),
            _interval_words(retrieval.get("interval")) if "interval" in retrieval else "",
            captions.count(retrieval["n"]),
            captions.count(retrieval.get("clusters")),
        )
    ]
    for name, one in (retrieval.get("per_class") or {}).items():
        counts = (captions.count(one["n"]), captions.count(one["clusters"]))
        rows.append((f"of these, {name}", captions.percent(one["accuracy"]), "", *counts))
    if "balanced_accuracy" in retrieval:
        rows.append(("Mean over modalities", captions.percent(retrieval["balanced_accuracy"]), "", "", ""))
    rows.append(
        ("Chance: one of the modalities at random", captions.percent(retrieval["chance"]), "", "", "")
    )
    if "majority" in retrieval:
        rows.append(
            ("Always the most frequent modality", captions.percent(retrieval["majority"]), "", "", "")
        )
    head = ("Stage 1, nearest text", "Right", "95 % interval", "Images", "Volumes")
    return table(head, rows, caption=captions.RETRIEVAL_CAPTION, kind="narrow")


def _interval_words(interval: Sequence[float] | None) -> str:
    return captions.TOO_FEW if interval is None else f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f}"


def arms_figure(entries: Sequence[Document], *, oracle: bool) -> str:
    """The totals of every arm as a dot chart; empty when there are none."""
    totals = [one for one in entries if one["oracle"] == oracle and one["question_type"] == "all"]
    if not totals:
        return ""
    dots = [
        plots.Dot(
            captions.arm_title(one["arm"]),
            one["accuracy"],
            tuple(one["interval"]) if one["interval"] else None,
            tuple(one.get("per_cluster", {}).values()),
            one["arm"] == "stage4_experts",
        )
        for one in totals
    ]
    name = "Oracle questions" if oracle else "Main questions"
    chart = plots.dot_chart(
        dots, title=f"{name}: share of right answers by arm", x_label="right answers, percent"
    )
    return f"<div><h4>{name}, all types ({totals[0]['n']})</h4>{chart}</div>"


def arms_table(entries: Sequence[Document], *, oracle: bool, caption: str) -> str:
    """Question types down, arms across; beneath it the values of single volumes.

    Args:
      entries: `evaluation` of the summary.
      oracle: which of the two tables.
      caption: above the table.
    """
    chosen = [one for one in entries if one["oracle"] == oracle]
    if not chosen:
        return "<p>No question of this kind was asked.</p>"
    arms = list(dict.fromkeys(one["arm"] for one in chosen))
    groups: dict[tuple[str, str], dict[str, Document]] = {}
    for one in chosen:
        groups.setdefault((one["question_type"], one["label_source"]), {})[one["arm"]] = one
    ordered = sorted(groups, key=lambda key: (key[0] != "all", key))
    head = '<th scope="col">Questions</th><th scope="col">n</th><th scope="col">Volumes</th>' + "".join(
        f'<th scope="col"{_strong(arm)}>{text(captions.arm_title(arm))}</th>' for arm in arms
    )
    body, details = [], []
    for key in ordered:
        cells = groups[key]
        sizes = {(one["n"], one["clusters"]) for one in cells.values()}
        same = len(sizes) == 1
        few = all(one["interval"] is None for one in cells.values())
        n, clusters = next(iter(sizes)) if same else ("", "")
        few_words = f'<small class="few">{text(captions.TOO_FEW)}</small>' if few else ""
        source = "" if key[0] == "all" else f"<small>{text(key[1])}</small>"
        kind = ' class="total"' if key[0] == "all" else ""
        line = f'<tr{kind}><th scope="row">{text(captions.type_title(key[0]))}{source}</th>'
        line += f"<td>{text(n)}</td><td>{text(clusters)}{few_words}</td>"
        body.append(line + "".join(_arm_cell(cells.get(arm), arm, few, same) for arm in arms) + "</tr>")
        volumes = sorted({volume for one in cells.values() for volume in one.get("per_cluster") or {}})
        for volume in volumes:
            values = (cells[arm].get("per_cluster", {}).get(volume) if arm in cells else None for arm in arms)
            details.append((captions.type_title(key[0]), volume[:12], *map(captions.percent, values)))
    out = _table(head, "".join(body), caption, "arms")
    if details:
        per_volume = table(
            ("Questions", "Volume", *map(captions.arm_title, arms)),
            details,
            caption=captions.PER_VOLUME_CAPTION,
            wordy=(1,),
            kind="arms",
        )
        title = f"Values of the single volumes ({len(details)} rows)"
        out += f"<details><summary>{title}</summary>{per_volume}</details>"
    return out


def _strong(arm: str) -> str:
    return ' class="strong"' if arm == "stage4_experts" else ""


def _arm_cell(one: Document | None, arm: str, few: bool, same: bool) -> str:
    if one is None:
        return '<td class="cell">not asked</td>'
    share = 100 * one["accuracy"]
    below = "" if few else _interval_words(one["interval"])
    if not same:
        below = f"n {one['n']}, {one['clusters']} volumes" + (f"; {below}" if below else "")
    strong = " strong" if arm == "stage4_experts" else ""
    note = f' title="{text(one["note"])}"' if one.get("note") else ""
    return (
        f'<td class="cell{strong}"{note}>{captions.percent(one["accuracy"])}'
        f'<span class="bar"><i style="--v:{share:.1f}"></i></span>'
        + (f"<small>{text(below)}</small>" if below else "")
        + "</td>"
    )


def comparisons_table(comparisons: Sequence[Document]) -> str:
    """Paired differences, groups of questions across, with interval or the reason why there is none."""
    groups = [name for name in captions.GROUPS if any(one["group"] == name for one in comparisons)]
    if not groups:
        return "<p>No two arms answered a question in common.</p>"
    cells = {(one["first"], one["second"], one["group"]): one for one in comparisons}
    body = []
    for first, second in dict.fromkeys((one["first"], one["second"]) for one in comparisons):
        line = (
            f'<tr><th scope="row">{text(captions.arm_title(first))} − {text(captions.arm_title(second))}</th>'
        )
        for group in groups:
            one = cells.get((first, second, group))
            line += f"<td>{_difference(one) if one else captions.NONE}</td>"
        body.append(line + "</tr>")
    head = '<th scope="col">Arms</th>' + "".join(
        f'<th scope="col">{text(captions.GROUPS[g])}</th>' for g in groups
    )
    return _table(head, "".join(body), captions.COMPARISON_CAPTION, "arms")


def _difference(one: Document) -> str:
    interval = " to ".join(map(captions.points, one["interval"])) if one["interval"] else captions.TOO_FEW
    return (
        f"{captions.points(one['difference'])}<small>{text(interval)}</small>"
        f"<small>n {one['n']}, {one['clusters']} volumes</small>"
    )


def behaviour_table(arms: Sequence[runs.Arm]) -> str:
    """Shares of answers that could not be parsed, and of questions in which an expert was called."""
    rows = []
    for arm in arms:
        n = len(arm.rows)
        offered = (arm.result.get("arm") or {}).get("experts") != "off"
        spoke = [row for row in arm.rows if "trigger" in row and offered]
        could = [row for row in spoke if row.get("expert")]
        rows.append(
            (
                captions.arm_title(arm.name),
                captions.count(n),
                captions.percent(sum(bool(row["unparsed"]) for row in arm.rows) / n),
                _share(spoke, lambda row: bool(row["trigger"])),
                _share(could, lambda row: row.get("expert_right") is True),
            )
        )
    head = ("Arm", "Questions", "Unparsed", "Expert called", "Right expert")
    return table(head, rows, caption=captions.BEHAVIOUR_CAPTION)


def _share(rows: Sequence[Document], holds: Callable[[Document], bool]) -> str:
    return captions.percent(sum(map(holds, rows)) / len(rows)) if rows else captions.NONE


# --- dialogues


def dialogue_card(one: Dialogue) -> str:
    """One question with its pictures and everything that was said."""
    right = one.correct
    mark = (
        '<span class="verdict right">✓ right</span>'
        if right
        else '<span class="verdict wrong">✗ wrong</span>'
    )
    pictures = "".join(
        f'<figure><img alt="{text(said)}" src="{data_uri(png)}">'
        f"<figcaption>{text(said)}</figcaption></figure>"
        for png, said in ((one.image, one.image_words), (one.overlay, one.overlay_words))
        if png
    )
    swatches = "".join(
        f'<li><i style="background:{text(colour)}"></i>{text(name)}</li>' for colour, name in one.legend
    )
    turns = [("Asked", "", one.question)]
    if one.trigger:
        turns.append(("Trigger", "", one.trigger))
    if one.expert_words:
        turns.append(("Expert", "expert false" if one.falsified else "expert", one.expert_words))
    turns += [("Answer", "answer", one.answer or "(nothing)"), ("Right is", "", one.gold)]
    lines = "".join(
        f'<dt>{name}</dt><dd class="{kind}">'
        + (f"<code>{text(said)}</code>" if name == "Trigger" else text(said))
        + "</dd>"
        for name, kind, said in turns
    )
    return (
        '<article class="dialogue"><header>'
        f"<span>{text(captions.arm_title(one.arm))} · {text(one.kind_words)}</span>{mark}</header>"
        + (f'<div class="pictures">{pictures}</div>' if pictures else "")
        + (f'<ul class="swatches">{swatches}</ul>' if swatches else "")
        + f'<dl class="turns">{lines}</dl></article>'
    )


def dialogue_cards(dialogues: Sequence[Dialogue]) -> str:
    """All cards."""
    return f'<div class="dialogues">{"".join(map(dialogue_card, dialogues))}</div>'


def licence_table(licences: Sequence[Licence]) -> str:
    """What was used, under which licence, and where it came from."""
    rows = [(one.origin, one.licence, one.modality, captions.count(len(one.samples))) for one in licences]
    head = ("From", "Licence", "Modality", "Samples")
    return table(head, rows, caption=captions.LICENCE_CAPTION, wordy=(1, 2), kind="sources")


def footnotes(notes: Sequence[tuple[str, str]]) -> str:
    """Terms explained."""
    return (
        '<dl class="footnotes">'
        + "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in notes)
        + "</dl>"
    )


MAIN_HEADING = tables.MAIN_TITLE
ORACLE_HEADING = "Oracle by construction: the expert returns the very map the label came from"
