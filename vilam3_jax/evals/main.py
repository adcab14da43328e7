"""`vilam3 evaluate`: measure an export on a protocol, and compare results."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from vilam3_jax.checkpoints import exports, run_checkpoints
from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.cards import card_list, load_cards
from vilam3_jax.data.experts.exchange import Style
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.image_processor import image_processor
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.data.render import ImageReader
from vilam3_jax.data.text_rules import TEXT_HELP, TextRules
from vilam3_jax.data.tfds_folder import datasets_in, read_info
from vilam3_jax.data.tokenizer import load_tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.evals import conditions as arm_lib
from vilam3_jax.evals import protocol as protocols
from vilam3_jax.evals import retrieval, statistics, tables
from vilam3_jax.inference.agent import Agent, AnnotationProvider, load_generator
from vilam3_jax.runtime import paths

ROWS_FILE = "rows.jsonl"
RESULT_FILE = "result.json"
TABLES_FILE = "tables.md"
_MAX_BYTES = 1 << 30


def main(argv: Sequence[str]) -> int:
    """Entry of `vilam3 evaluate`."""
    if argv and argv[0] == "compare":
        return _compare(argv[1:])
    options = _parser().parse_args(argv)
    protocol = protocols.get(options.protocol)
    if isinstance(protocol, retrieval.RetrievalProtocol):
        _retrieve(options, protocol)
    else:
        assert isinstance(protocol, protocols.Protocol)
        _evaluate(options, protocol)
    return 0


def _parser() -> argparse.ArgumentParser:
    known = ", ".join(protocols.names())
    parser = argparse.ArgumentParser(
        prog="vilam3 evaluate",
        description="Measure an export on a protocol. `vilam3 evaluate compare A B ...` compares results.",
    )
    add = parser.add_argument
    add("--checkpoint", help="export folder of a training run; not for --arm=majority")
    add("--protocol", required=True, help=f"what is asked and how it is scored: {known}")
    add("--data", required=True, help="folder that `vilam3 prepare` wrote")
    add("--out", required=True, help=f"folder for {ROWS_FILE}, {RESULT_FILE}; retrieval: a JSON file")
    add("--annotations", help="annotation store; needed unless experts are off")
    add("--experts", choices=("on", "off", "falsified"), help="default: the arm's, or off")
    add("--images", choices=("true", "blank"), help="default: the arm's, or true")
    add("--arm", help=f"name on the rows: {', '.join(arm_lib.ARMS)}, or your own")
    add("--limit", type=int, help="maximum questions of each type, spread over patients")
    add("--cards", help="card list shown to the model (default: the one it was trained with)")
    add("--text", help=TEXT_HELP)
    add("--batch_size", type=int, default=32, help="dialogues per batch (default: 32)")
    add("--max_length", type=int, default=2048, help="maximum positions of a dialogue")
    add("--seed", type=int, default=0, help="of bootstrap and falsification")
    return parser


def read_split(folder: paths.PathLike, split: str) -> tuple[list[Example], dict[str, Any]]:
    """The examples of one split of all datasets in `folder`, and example id → data root.

    Raises:
      UserError: no dataset has the split, or a record is damaged.
    """
    found = [path for path in datasets_in(folder) if split in read_info(path)["splits"]]
    if not found:
        raise UserError(f"{folder}: no dataset has a split {split!r}; prepare one")
    sources = [ExampleSource(path, split) for path in found]
    read = [(example, source.data_root) for source in sources for example in source]
    return [example for example, _ in read], {example.id: root for example, root in read}


def _model_config(options: argparse.Namespace, kind: str) -> Any:
    """The model config of the export, which must be of this kind."""
    if not options.checkpoint:
        raise UserError("--checkpoint is missing; give the export folder of a training run")
    config = exports.load_model_config(options.checkpoint)
    if config.get("kind") != kind:
        raise UserError(
            f"{options.checkpoint}: holds a {config.get('kind')} model, protocol {options.protocol} needs a "
            f"{kind} one; give the export of another stage"
        )
    return config


def _evaluate(options: argparse.Namespace, protocol: protocols.Protocol) -> None:
    arm = arm_lib.arm_of(options.arm, options.experts, options.images)
    if options.batch_size < 1:
        raise UserError(f"--batch_size={options.batch_size}: must be at least 1")
    if arm.experts != "off" and not options.annotations:
        raise UserError(
            f"--experts={arm.experts} needs --annotations=DIR, which `vilam3-experts annotate` writes"
        )
    out = paths.as_path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out names a folder here")
    examples, roots = read_split(options.data, protocol.split)
    everything = protocols.items_of(examples, protocol)
    items = protocols.limit_items(everything, options.limit)
    started = time.monotonic()
    if arm.name == arm_lib.MAJORITY:
        rows = arm_lib.majority_rows(protocol, items, read_split(options.data, "train")[0])
        rules = None
    else:
        rules = TextRules.of(_model_config(options, "generative").get("text")).changed(options.text or "")
        agent, reader = _agent(options, arm)

        def load_image(item: protocols.Item) -> np.ndarray:
            return reader.read(item.image, roots[item.id.rsplit("/q", 1)[0]])

        answered = arm_lib.answer_items(agent, protocol, arm, items, load_image, falsify_seed=options.seed)
        rows = list(tqdm(answered, total=len(items), desc=f"evaluating {arm.name}", unit="question"))
    summaries = statistics.summarise(rows, seed=options.seed)
    result = {
        "arm": {"name": arm.name, "experts": arm.experts, "images": arm.images},
        "protocol": dataclasses.asdict(protocol),
        "protocol_hash": protocol.hash,
        "items_hash": arm_lib.item_set_hash(items),
        "items": len(items),
        "items_without_limit": len(everything),
        "limit": options.limit,
        "seed": options.seed,
        "checkpoint": None if arm.name == arm_lib.MAJORITY else str(options.checkpoint),
        "text": rules and dataclasses.asdict(rules),
        "data": str(options.data),
        "annotations": options.annotations,
        "seconds": time.monotonic() - started,
        **_finished(),
        "summaries": [dataclasses.asdict(summary) for summary in summaries],
    }
    shown = tables.accuracy_tables(summaries)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    paths.write_text_atomic(out / ROWS_FILE, "".join(lines))
    paths.write_text_atomic(out / TABLES_FILE, "\n".join(table.to_markdown() for table in shown))
    _write_json(out / RESULT_FILE, result)  # last, as it marks the others as complete
    for table in shown:
        print(table.to_text())
    print(f"protocol {protocol.name} ({protocol.hash[:12]}), arm {arm.name}, {len(rows)} questions: {out}")


def _agent(options: argparse.Namespace, arm: arm_lib.Arm) -> tuple[Agent, ImageReader]:
    config = _model_config(options, "generative")
    provider, cards = None, ()
    if arm.experts != "off":
        store = AnnotationStore(options.annotations)
        seed = options.seed if arm.experts == "falsified" else None
        provider = AnnotationProvider(store, falsify_seed=seed)
        cards = load_cards(options.cards) if options.cards else card_list(config)
    sizes = dict(max_length=options.max_length, batch_size=options.batch_size)
    generator, template = load_generator(options.checkpoint, text=options.text or "", **sizes)
    agent = Agent(generator, template, cards=cards, provider=provider, style=Style.of(config))
    return agent, ImageReader(agent.processor.kept_size, agent.processor.preprocessing)


def _finished() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"finished": now, "versions": run_checkpoints.versions()}


def _write_json(path: paths.PathLike, record: Any) -> None:
    paths.write_text_atomic(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _retrieve(options: argparse.Namespace, protocol: retrieval.RetrievalProtocol) -> None:
    for flag in ("experts", "images", "arm", "limit", "annotations", "cards", "text"):
        if getattr(options, flag) is not None:
            raise UserError(f"--{flag}: has no effect on protocol {protocol.name}; leave it out")
    out = paths.as_path(options.out)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; --out names a JSON file here")
    config = _model_config(options, "contrastive")
    examples, roots = read_split(options.data, protocol.split)
    items = retrieval.retrieval_items(examples, protocol)
    params, config, tokenizer_folder = exports.load_export(options.checkpoint)
    tokenizer = load_tokenizer(tokenizer_folder)
    embedder = retrieval.TwoTowerEmbedder(config, params, tokenizer, options.batch_size)
    processor = image_processor(config, pairs=True)
    reader = ImageReader(processor.kept_size, processor.preprocessing)
    pixels = [
        processor.inputs(reader.read(item.example.images[0], roots[item.example.id]))[0]
        for item in tqdm(items, desc="reading images", unit="image")
    ]
    classes = sorted({item.modality for item in items})
    texts = retrieval.class_embeddings(embedder.texts, classes, protocol.prompts)
    result = retrieval.evaluate_retrieval(items, embedder.images(pixels), classes, texts, seed=options.seed)
    result |= {
        "protocol": dataclasses.asdict(protocol),
        "protocol_hash": protocol.hash,
        "checkpoint": str(options.checkpoint),
        "data": str(options.data),
        "seed": options.seed,
        **_finished(),
    }
    _write_json(out, result)
    print(
        f"zero-shot modality retrieval: {result['accuracy']:.3f} of {result['n']} images from "
        f"{result['clusters']} patients (chance {result['chance']:.3f}, most frequent class "
        f"{result['majority']:.3f}): {out}"
    )


def _compare(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vilam3 evaluate compare", description="One table of several results, and paired differences."
    )
    parser.add_argument("results", nargs="+", help="folders written by `vilam3 evaluate --out`, two or more")
    parser.add_argument("--out", help="also write the tables: FILE.md, or FILE.json")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    options = parser.parse_args(argv)
    if len(options.results) < 2:
        raise UserError("compare needs two results or more")
    shown = compare([_read_result(folder) for folder in options.results], seed=options.seed)
    for table in shown:
        print(table.to_text())
    if str(options.out).endswith(".json"):
        _write_json(options.out, [dataclasses.asdict(table) for table in shown])
    elif options.out:
        paths.write_text_atomic(options.out, "\n".join(table.to_markdown() for table in shown))
    return 0


def _read_result(folder: paths.PathLike) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """(name of the folder, `result.json`, rows)."""
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


def compare(
    results: Sequence[tuple[str, dict[str, Any], list[dict[str, Any]]]], *, seed: int = 0
) -> list[tables.Table]:
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
