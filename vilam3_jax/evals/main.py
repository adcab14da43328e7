"""`vilam3 evaluate`: measure a model on a protocol, and compare results."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
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
from vilam3_jax.errors import UserError
from vilam3_jax.evals import comparison, retrieval, statistics, tables
from vilam3_jax.evals import conditions as arm_lib
from vilam3_jax.evals import protocol as protocols
from vilam3_jax.evals.comparison import RESULT_FILE, ROWS_FILE, TABLES_FILE, write_json
from vilam3_jax.inference.agent import Agent, AnnotationProvider
from vilam3_jax.inference.loading import ModelSource, check_kind, load_generator, open_model
from vilam3_jax.inference.model_flags import CHECKPOINT_HELP, add_model_flags, model_options
from vilam3_jax.runtime import paths, process_flags, processes


def main(argv: Sequence[str]) -> int:
    """Entry of `vilam3 evaluate`."""
    if argv and argv[0] in comparison.COMMANDS:
        return comparison.COMMANDS[argv[0]](argv[1:])
    options = _parser().parse_args(argv)
    protocol = protocols.get(options.protocol)
    with processes.group("vilam3 evaluate", **process_flags.argument_values(options)):
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
        description="Measure a model on a protocol. `vilam3 evaluate compare A B ...` compares results, "
        "`vilam3 evaluate repeats --arms=A,B DIR ...` pools a difference over repeated runs.",
    )
    add = parser.add_argument
    add("--checkpoint", help=f"{CHECKPOINT_HELP}; not for --arm=majority")
    add("--protocol", required=True, help=f"what is asked and how it is scored: {known}")
    add("--data", required=True, help="folder that `vilam3 prepare` wrote")
    add(
        "--out",
        required=True,
        help=f"folder for {ROWS_FILE}, {RESULT_FILE} (per arm); retrieval: a JSON file",
    )
    add("--annotations", help="annotation store; needed unless experts are off")
    add("--experts", choices=("on", "off", "falsified"), help="default: the arm's, or off")
    add("--images", choices=("true", "blank"), help="default: the arm's, or true")
    add("--arm", help=f"name on the rows: {', '.join(arm_lib.ARMS)}, or your own; several with commas")
    add("--limit", type=int, help="maximum questions of each type, spread over patients")
    add(
        "--limit_other",
        type=int,
        help="the same for questions that no expert can answer, or that the expert itself labelled "
        "(default: they share --limit)",
    )
    add("--cards", help="card list shown to the model (default: the one it was trained with)")
    add("--text", help=TEXT_HELP)
    add("--batch_size", type=int, default=32, help="dialogues per batch (default: 32)")
    add("--max_length", type=int, default=2048, help="maximum positions of a dialogue")
    add("--seed", type=int, default=0, help="of bootstrap and falsification")
    add_model_flags(parser)
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


def _open(options: argparse.Namespace, kind: str) -> ModelSource:
    """The model of the command line, which must be of this kind."""
    if not options.checkpoint:
        raise UserError("--checkpoint is missing; give the export folder of a training run")
    source = open_model(options.checkpoint)
    needed = f"protocol {options.protocol} needs a {kind} one; give the export of another stage"
    check_kind(source, kind, needed)
    return source


def _evaluate(options: argparse.Namespace, protocol: protocols.Protocol) -> None:
    names = (options.arm or "").split(",")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--arm: {repeated[0]!r} is given twice")
    arms = [arm_lib.arm_of(name, options.experts, options.images) for name in names]
    if options.batch_size < 1:
        raise UserError(f"--batch_size={options.batch_size}: must be at least 1")
    if not options.annotations and (needing := [arm for arm in arms if arm.experts != "off"]):
        raise UserError(
            f"--experts={needing[0].experts} needs --annotations=DIR, which `vilam3-experts annotate` writes"
        )
    out = paths.as_path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out names a folder here")
    examples, roots = read_split(options.data, protocol.split)
    everything = protocols.items_of(examples, protocol)
    items = protocols.limit_items(everything, options.limit, options.limit_other)
    model = None if all(arm.name == arm_lib.MAJORITY for arm in arms) else _Model(options)

    def load_image(item: protocols.Item) -> np.ndarray:
        assert model is not None
        return model.reader.read(item.image, roots[item.id.rsplit("/q", 1)[0]])

    for arm in arms:
        started = time.monotonic()
        if model is None or arm.name == arm_lib.MAJORITY:
            rows = arm_lib.majority_rows(protocol, items, read_split(options.data, "train")[0])
        else:
            answered = arm_lib.answer_items(
                model.agent(arm), protocol, arm, items, load_image, falsify_seed=options.seed
            )
            name, quiet = f"evaluating {arm.name}", not processes.is_primary_process()
            rows = list(tqdm(answered, total=len(items), desc=name, unit="question", disable=quiet))
        if not processes.is_primary_process():
            continue
        result = {
            "arm": {"name": arm.name, "experts": arm.experts, "images": arm.images},
            "protocol": dataclasses.asdict(protocol),
            "protocol_hash": protocol.hash,
            "items_hash": arm_lib.item_set_hash(items),
            "items": len(items),
            "items_without_limit": len(everything),
            "limit": options.limit,
            "limit_other": options.limit_other,
            "seed": options.seed,
            "checkpoint": None if arm.name == arm_lib.MAJORITY else model and model.source.name,
            "text": None if arm.name == arm_lib.MAJORITY else model and dataclasses.asdict(model.rules),
            **model_options(options),
            "data": str(options.data),
            "annotations": options.annotations,
            "seconds": time.monotonic() - started,
            **_finished(),
        }
        folder = out if len(arms) == 1 else out / arm.name
        shown = _write_result(folder, result, rows, options.seed)
        for table in shown:
            print(table.to_text())
        print(f"{protocol.name} ({protocol.hash[:12]}), arm {arm.name}, {len(rows)} questions: {folder}")


def _write_result(
    folder: epath.Path, result: dict[str, Any], rows: list[dict[str, Any]], seed: int
) -> list[tables.Table]:
    """Writes the files of one arm; returns its tables."""
    summaries = statistics.summarise(rows, seed=seed)
    shown = tables.accuracy_tables(summaries)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    paths.write_text_atomic(folder / ROWS_FILE, "".join(lines))
    paths.write_text_atomic(folder / TABLES_FILE, "\n".join(table.to_markdown() for table in shown))
    result |= {"summaries": [dataclasses.asdict(summary) for summary in summaries]}
    write_json(folder / RESULT_FILE, result)  # last, as it marks the others as complete
    return shown


class _Model:
    """The model of a command line, loaded once for all arms."""

    def __init__(self, options: argparse.Namespace):
        self._options, self.source = options, _open(options, "generative")
        self._config = self.source.config.to_dict()
        self.rules = TextRules.of(self._config.get("text")).changed(options.text or "")
        self._generator, self._template = load_generator(
            self.source,
            max_length=options.max_length,
            batch_size=options.batch_size,
            text=options.text or "",
            **model_options(options),
        )
        processor = self._generator.processor
        self.reader = ImageReader(processor.kept_size, processor.preprocessing)

    def agent(self, arm: arm_lib.Arm) -> Agent:
        """The model with the experts of an arm."""
        provider, cards = None, ()
        if arm.experts != "off":
            store = AnnotationStore(self._options.annotations)
            seed = self._options.seed if arm.experts == "falsified" else None
            provider = AnnotationProvider(store, falsify_seed=seed)
            cards = load_cards(self._options.cards) if self._options.cards else card_list(self._config)
        style = Style.of(self._config)
        return Agent(self._generator, self._template, cards=cards, provider=provider, style=style)


def _finished() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"finished": now, "versions": run_checkpoints.versions()}


def _retrieve(options: argparse.Namespace, protocol: retrieval.RetrievalProtocol) -> None:
    of_dialogues = ("experts", "images", "arm", "limit", "limit_other", "annotations", "cards", "text")
    for flag in (*of_dialogues, *model_options(options)):
        if getattr(options, flag) is not None:
            raise UserError(f"--{flag}: has no effect on protocol {protocol.name}; leave it out")
    if jax.process_count() > 1:
        raise UserError(f"protocol {protocol.name} is measured by one process; start one")
    out = paths.as_path(options.out)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; --out names a JSON file here")
    source = _open(options, "contrastive")
    examples, roots = read_split(options.data, protocol.split)
    items = retrieval.retrieval_items(examples, protocol)
    params, config = exports.read_model(source.config, source.read)
    embedder = retrieval.TwoTowerEmbedder(config, params, source.tokenizer(), options.batch_size)
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
        "checkpoint": source.name,
        "data": str(options.data),
        "seed": options.seed,
        **_finished(),
    }
    write_json(out, result)
    print(
        f"zero-shot modality retrieval: {result['accuracy']:.3f} of {result['n']} images from "
        f"{result['clusters']} patients (chance {result['chance']:.3f}, most frequent class "
        f"{result['majority']:.3f}): {out}"
    )
