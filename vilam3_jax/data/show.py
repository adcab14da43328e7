"""The `vilam3 data show` command: an example as the model reads it, with images and targets."""

from __future__ import annotations

import argparse
import base64
import html
import itertools
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from vilam3_jax.data.examples import IMAGE_MARKER, Example, ExpertRequest
from vilam3_jax.data.experts.cards import Card, load_cards
from vilam3_jax.data.experts.dialogues.rules import RULES, split_row
from vilam3_jax.data.experts.dialogues.scene import Setting
from vilam3_jax.data.experts.dialogues.source import DialogueSource, dialogue_of
from vilam3_jax.data.experts.exchange import Style
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.experts.wording import wording_named
from vilam3_jax.data.images import encode_png
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.data.render import ImageReader, Outline, Renderer
from vilam3_jax.data.tfds_folder import datasets_in, is_dataset
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "section{border-left:4px solid #bbb;margin:1rem 0;padding:.2rem 1rem;white-space:pre-wrap}"
    "section.target{border-color:#2a7;background:#f1faf5}section.expert{border-color:#57c}"
    "h2{font-size:.85rem;margin:0;color:#555}img{display:block;margin:.5rem 0;max-width:100%}"
    "table{border-collapse:collapse}td{border:1px solid #ddd;padding:.1rem .6rem;vertical-align:top}"
)


def to_text(example: Example, rendered: Outline) -> str:
    """Formats an example for a terminal, one block per turn; `>` marks targets."""
    lines = [f"example {example.id} ({example.format}), {len(rendered.images)} images"]
    lines += [f"  {key}: {value}" for key, value in _facts(example)]
    numbers = itertools.count(1)
    for turn in rendered.turns:
        lines += ["", f"[{turn.role}{', target' if turn.supervised else ''}]"]
        text = re.sub(IMAGE_MARKER, lambda _: f"<image {next(numbers)}>", turn.text)
        lines += [("> " if turn.supervised else "  ") + line for line in text.split("\n")]
    return "\n".join(lines) + "\n"


def to_html(example: Example, rendered: Outline) -> str:
    """Formats an example as one self-contained page; texts are escaped."""
    blocks, images = [], iter(rendered.images)
    for turn in rendered.turns:
        chunks = [html.escape(chunk) for chunk in turn.text.split(IMAGE_MARKER)]
        body = chunks[0] + "".join(_img(next(images)) + chunk for chunk in chunks[1:])
        kind = f"{turn.role}{' target' if turn.supervised else ''}"
        title = f"{turn.role}{' (target)' if turn.supervised else ''}"
        blocks.append(f'<section class="{kind}"><h2>{title}</h2>{body}</section>')
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in _facts(example)
    )
    title = html.escape(f"{example.id} ({example.format})")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{''.join(blocks)}<table>{rows}</table></body></html>\n"
    )


def _img(image: np.ndarray) -> str:
    data = base64.b64encode(encode_png(image)).decode()
    height, width = image.shape[:2]
    return f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="image">'


def _images(request: ExpertRequest) -> str:
    named = [f"{image.image} as {image.role}" if image.role else f"{image.image}" for image in request.images]
    return f"image{'s' if len(named) > 1 else ''} {', '.join(named)}"


def _facts(example: Example) -> list[tuple[str, str]]:
    facts = [
        ("expert request", f"{r.expert}({r.args}) on {_images(r)} before turn {r.before_turn}, {r.policy}")
        for r in example.expert_requests
    ]
    for key, value in example.meta.items():
        if value not in (None, "", [], {}):
            facts.append((key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return facts


def _open(data: str, dataset: str | None, split: str) -> ExampleSource:
    root = paths.as_path(data)
    if dataset is None:
        found = datasets_in(root)
        if len(found) > 1:
            names = ", ".join(path.relative_to(root).as_posix() for path in found)
            raise UserError(f"{data}: contains {names}; choose one with --dataset")
        return ExampleSource(found[0], split)
    if is_dataset(root) and not (root / dataset).exists():
        return ExampleSource(root, split)  # `data` is the dataset
    return ExampleSource(root / dataset, split)


def _under_rule(
    source: ExampleSource, args: Any, cards: Sequence[Card], store: AnnotationStore | None, style: Style
) -> ExampleSource | DialogueSource:
    rule = split_row(args.dataset or "")[1]
    if rule is None:
        return source
    if store is None:
        raise UserError(f"--dataset {args.dataset}: requires --annotations")
    if args.parity and rule.parity is None:
        raise UserError(f"--parity: the reference has no dialogues of the rule {rule.name}; omit it")
    setting = Setting.of(cards, store, style=style, parity=args.parity)
    # All records, whether the rule fits them or not, so that --index counts stored records.
    return DialogueSource(source, rule, setting, args.seed, np.arange(len(source)), {})


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 data show`; returns 0.

    Raises `UserError` for no such data, example or annotation, or a file that is neither .html nor .png.
    """
    parser = argparse.ArgumentParser(
        prog="vilam3 data show", description="Shows one example of a dataset as the model reads it."
    )
    add = parser.add_argument
    add("--data", required=True, help="folder written by `vilam3 prepare`")
    add(
        "--dataset",
        help=f"one of several datasets, or NAME:RULE for a dialogue by a rule: {', '.join(RULES)}",
    )
    add("--split", default="train", help="split to read (default: %(default)s)")
    example = parser.add_mutually_exclusive_group()
    example.add_argument("--index", type=int, default=0, help="index of the example (default: %(default)s)")
    example.add_argument("--id", help="id of the example")
    add(
        "--annotations", default="", help="annotation store, required by rules and by --experts on, falsified"
    )
    add("--experts", choices=("on", "off", "falsified"), default="off", help="(default: %(default)s)")
    add("--cards", default="quickstart", help="card list: experts, quickstart, vila_m3 or a file")
    add(
        "--position",
        type=int,
        default=0,
        help="stream position, which varies dialogues (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="seed of the run (default: %(default)s)")
    add("--verdicts", action="store_true", help="include doubts from the checks of results")
    add("--parity", action="store_true", help="use the wording of VILA-M3's training data")
    add("--size", type=int, default=384, help="image side in pixels (default: %(default)s)")
    add("--out", help="FILE.html: the example as a page; FILE.png: its images side by side")
    args = parser.parse_args(argv)
    if args.out and not args.out.endswith((".html", ".png")):
        raise UserError(f"--out {args.out}: must end in .html or .png")
    if args.size < 1:
        raise UserError(f"--size {args.size}: must be positive")
    if args.experts != "off" and not args.annotations:
        raise UserError(f"--experts {args.experts}: requires --annotations")
    store = AnnotationStore(args.annotations) if args.annotations else None
    stored = _open(args.data, args.dataset and split_row(args.dataset)[0], args.split)
    cards = load_cards(args.cards)
    style = Style(wording_named("vila_m3" if args.parity else "plain"), args.verdicts)
    source = _under_rule(stored, args, cards, store, style)
    index = args.index if args.id is None else source.find(args.id)
    if not 0 <= index < len(source):
        raise UserError(f"--index {index}: {args.data} has {len(source)} examples in split {args.split}")
    renderer = Renderer(
        image_reader=ImageReader(args.size),
        experts=args.experts,
        cards=cards,
        annotations=store,
        style=style,
        seed=args.seed,
    )
    example = source[index]
    try:
        example = dialogue_of(source, index, args.position, args.experts != "off")
        rendered = renderer.render(example, source.data_root)
    except UserError as error:
        raise UserError(f"example {example.id}: {error}") from error
    text = to_text(example, rendered)
    if args.experts != "off" and example.expert_requests and not rendered.experts:
        text += "\n(no annotation for this example: shown without experts)\n"
    if args.out and args.out.endswith(".html"):
        paths.write_text_atomic(args.out, to_html(example, rendered))
    elif args.out:
        if not rendered.images:
            raise UserError(f"--out {args.out}: example {example.id} has no images; use .html")
        paths.write_bytes_atomic(args.out, encode_png(np.concatenate(rendered.images, axis=1)))
    sys.stdout.write(text + (f"\nwritten: {args.out}\n" if args.out else ""))
    return 0
