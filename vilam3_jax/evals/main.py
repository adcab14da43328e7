"""`vilam3 evaluate`: measure a model on a protocol, and compare results."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
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
from vilam3_jax.evals import (
    answerers,
    changes,
    comparison,
    estimates,
    items,
    regions,
    retrieval,
    statistics,
    tables,
)
from vilam3_jax.evals import conditions as arm_lib
from vilam3_jax.evals import protocol as protocols
from vilam3_jax.evals import rows as row_files
from vilam3_jax.evals.metrics.base import metric as metric_named
from vilam3_jax.evals.rows import RESULT_FILE, ROWS_FILE, RUN_FILE, TABLES_FILE, write_json
from vilam3_jax.inference.agent import Agent, AnnotationProvider, Provider
from vilam3_jax.inference.loading import ModelSource, check_kind, load_generator, open_model
from vilam3_jax.inference.model_flags import CHECKPOINT_HELP, add_model_flags, model_options
from vilam3_jax.runtime import paths, process_flags, processes

_USUAL_SPLITS = ("test", "heldout")
_DEFAULT_ARMS = ("model", "no_image", arm_lib.MAJORITY)  # no figure without trivial baselines beside it


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
        "`vilam3 evaluate repeats --arms=A,B DIR ...` pools a difference over repeated runs, "
        "`vilam3 evaluate published` shows published figures.",
    )
    add = parser.add_argument
    add("--checkpoint", help=f"{CHECKPOINT_HELP}; not for --arm=majority")
    add("--predictions", help="answers of another model instead: JSON lines, JSON or CSV, by item id")
    add(
        "--endpoint",
        help="OpenAI-compatible server on this machine instead, such as http://127.0.0.1:8000/v1",
    )
    add("--endpoint_model", default="default", help="name of the model on that server")
    add("--protocol", required=True, help=f"what is asked and how it is scored: {known}")
    add("--data", required=True, help="folder that `vilam3 prepare` wrote")
    add("--split", help="split to ask, of protocols that leave it open (default: test, or heldout)")
    add(
        "--out",
        required=True,
        help=f"folder for {ROWS_FILE}, {RESULT_FILE} (per arm); retrieval: a JSON file",
    )
    add("--annotations", help="annotation store; needed unless experts are off")
    add("--experts", choices=("on", "off", "falsified", "failing"), help="default: the arm's, or off")
    add("--images", choices=tuple(changes.IMAGE_CHANGES), help="default: the arm's, or true")
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


def _split(options: argparse.Namespace, protocol: protocols.Protocol) -> str:
    """The split to ask.

    Raises:
      UserError: --split contradicts the protocol, or neither names one and the data has none of the usual.
    """
    if protocol.split:
        if options.split not in (None, protocol.split):
            raise UserError(f"--split={options.split}: protocol {protocol.name} asks {protocol.split!r}")
        return protocol.split
    if options.split:
        return options.split
    for name in _USUAL_SPLITS:
        if _has_split(options.data, name):
            return name
    raise UserError(f"{options.data}: has no split {' or '.join(_USUAL_SPLITS)}; name one by --split")


def _has_split(folder: paths.PathLike, split: str) -> bool:
    return any(split in read_info(path)["splits"] for path in datasets_in(folder))


def _open(options: argparse.Namespace, kind: str) -> ModelSource:
    """The model of the command line, which must be of this kind."""
    if not options.checkpoint:
        raise UserError("--checkpoint is missing; give the export folder of a training run")
    source = open_model(options.checkpoint)
    needed = f"protocol {options.protocol} needs a {kind} one; give the export of another stage"
    check_kind(source, kind, needed)
    return source


def _evaluate(options: argparse.Namespace, protocol: protocols.Protocol) -> None:
    arms = _arms(options, protocol)
    out = paths.as_path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out names a folder here")
    split = _split(options, protocol)
    examples, roots = read_split(options.data, split)
    everything = items.items_of(examples, protocol)
    asked = items.limit_items(everything, options.limit, options.limit_other)
    if options.annotations and any(changes.IMAGE_CHANGES[arm.images].needs_region for arm in arms):
        asked = regions.with_regions(asked, AnnotationStore(options.annotations))
    source = None if all(arm.is_majority for arm in arms) else _Source(options, roots, protocol)
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        if arm.is_majority and not options.arm and not _has_split(options.data, "train"):
            print(f"arm {arm.name}: left out, {options.data} has no training split")
            continue
        settings = {
            "arm": arm.record,
            "protocol": protocol.record,
            "protocol_hash": protocol.hash,
            **({} if protocol.split else {"split": split}),
            "items_hash": items.item_set_hash(asked),
            "items": len(asked),
            "items_without_limit": len(everything),
            "limit": options.limit,
            "limit_other": options.limit_other,
            "seed": options.seed,
            **({"checkpoint": None, "text": None} if source is None or arm.is_majority else source.settings),
            **model_options(options),
            "data": str(options.data),
            "annotations": options.annotations,
        }
        folder = out if len(arms) == 1 else out / arm.name
        rows = _answer(options, protocol, arm, asked, source, folder, settings)
        if rows is not None:
            found[arm.name] = rows
    if protocol.contrasts and processes.is_primary_process():
        _write_contrasts(out, protocol, found, options.seed)


def _arms(options: argparse.Namespace, protocol: protocols.Protocol) -> list[arm_lib.Arm]:
    """The arms of the command line, or else of the protocol."""
    if options.batch_size < 1:
        raise UserError(f"--batch_size={options.batch_size}: must be at least 1")
    given = [flag for flag in ("checkpoint", "predictions", "endpoint") if getattr(options, flag)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]}: give one source of answers")
    names: list[str] = str(options.arm or "").split(",")
    if not options.arm and options.experts is None and options.images is None:
        names = list(protocol.arms or _DEFAULT_ARMS)
        if options.predictions:
            names = ["predictions", *(name for name in names if name == arm_lib.MAJORITY)]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--arm: {repeated[0]!r} is given twice")
    arms = [arm_lib.arm_of(name, options.experts, options.images) for name in names]
    needing = [arm for arm in arms if arm.experts not in ("off", "failing")]
    if needing and not options.annotations and not options.endpoint:
        raise UserError(
            f"--experts={needing[0].experts} needs --annotations=DIR, which `vilam3-experts annotate` writes"
        )
    changed = [arm for arm in arms if not arm.is_majority and (arm.images, arm.experts) != ("true", "off")]
    if options.predictions and changed:
        raise UserError(f"--arm={changed[0].name}: --predictions are answers to the questions as they are")
    if options.endpoint and (with_experts := [arm for arm in arms if arm.experts != "off"]):
        raise UserError(
            f"--arm={with_experts[0].name}: the server has its own experts; choose an arm without"
        )
    return arms


def _answer(
    options: argparse.Namespace,
    protocol: protocols.Protocol,
    arm: arm_lib.Arm,
    asked: list[items.Item],
    source: _Source | None,
    folder: epath.Path,
    settings: dict[str, Any],
) -> list[dict[str, Any]] | None:
    """Answers an arm, or goes on with it, and writes its files; the rows, on the primary process."""
    primary, started = processes.is_primary_process(), time.monotonic()
    finished = processes.made_by_primary_process(
        lambda: row_files.read_finished(folder, settings) is not None
    )
    if finished:
        if primary:
            print(f"{protocol.name}, arm {arm.name}: already in {folder}")
        return row_files.read_finished(folder, settings) if primary else None
    partial = row_files.PartialRows(folder, settings) if primary else None
    done = processes.from_primary_process(len(partial.rows) if partial else 0)
    if source is None or arm.is_majority:
        rows = arm_lib.majority_rows(protocol, asked, read_split(options.data, "train")[0])
    else:
        answers = source.answerer.answers(protocol, arm, asked, done)
        new = (arm_lib.row_of(protocol, arm, answer) for answer in answers)
        if partial is not None:
            new = partial.keep(new)
        name = f"evaluating {arm.name}"
        shown = tqdm(new, total=len(asked), initial=done, desc=name, unit="question", disable=not primary)
        rows = [*(partial.rows if partial else []), *shown]
    if partial is None:
        return None
    if not rows:
        print(f"{protocol.name}, arm {arm.name}: applies to none of the {len(asked)} questions")
        return None
    for table in _write_result(folder, protocol, arm, settings, rows):
        print(table.to_text())
    write_json(
        folder / RUN_FILE, {"seconds": time.monotonic() - started, "resumed_after": done, **_finished()}
    )
    partial.remove()
    print(f"{protocol.name} ({protocol.hash[:12]}), arm {arm.name}, {len(rows)} questions: {folder}")
    return rows


def _write_result(
    folder: epath.Path,
    protocol: protocols.Protocol,
    arm: arm_lib.Arm,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
) -> list[tables.Table]:
    """Writes the files of one arm; returns its tables."""
    seed = settings["seed"]
    summaries = statistics.summarise(rows, seed=seed)
    found = comparison.protocol_estimates(protocol, arm.name, rows, seed=seed)
    shown = tables.accuracy_tables(summaries) if protocol.metric == "accuracy" else []
    if protocol.metric != "accuracy" or protocol.metrics or protocol.aggregation != "pooled":
        shown.append(tables.estimate_table(found))
    paths.write_text_atomic(folder / ROWS_FILE, row_files.to_lines(rows))
    paths.write_text_atomic(folder / TABLES_FILE, "\n".join(table.to_markdown() for table in shown))
    result = {
        **settings,
        "asked": len(rows),
        "missing": sum(bool(row.get("missing")) for row in rows),
        "summaries": [dataclasses.asdict(summary) for summary in summaries],
        "estimates": [dataclasses.asdict(one) for one in found],
    }
    write_json(folder / RESULT_FILE, result)  # last, as it marks the others as complete
    return shown


def _write_contrasts(
    out: epath.Path, protocol: protocols.Protocol, rows: dict[str, list[dict[str, Any]]], seed: int
) -> None:
    """Writes the paired differences that the protocol names, of the arms that were asked."""
    metric = estimates.aggregated(metric_named(protocol.metric), protocol.aggregation)
    found = [
        estimates.contrast(metric, rows[first], rows[second], name=name, arms=(first, second), seed=seed)
        for name, first, second in protocol.contrasts
        if first in rows and second in rows
    ]
    contrasts = [one for one in found if one is not None]
    if contrasts:
        table = tables.contrast_table(contrasts)
        print(table.to_text())
        paths.write_text_atomic(out / "contrasts.md", table.to_markdown())
        write_json(out / "contrasts.json", [dataclasses.asdict(one) for one in contrasts])


class _Source:
    """Where the answers of a command line are from, opened once for all arms.

    Attributes:
      answerer: gives answers.
      settings: keys of `result.json` that name the source.
    """

    answerer: arm_lib.Answerer
    settings: dict[str, Any]

    def __init__(self, options: argparse.Namespace, roots: dict[str, Any], protocol: protocols.Protocol):
        """Opens a predictions file, a server, or a model.

        Raises:
          UserError: it is missing or unusable.
        """
        store = AnnotationStore(options.annotations) if options.annotations else None
        context = answerers.StoredContext(store)
        if options.predictions:
            self.answerer = answerers.PredictionsAnswerer(options.predictions)
            self.settings = {
                "predictions": options.predictions,
                "predictions_sha256": _sha256(options.predictions),
            }
            return
        if options.endpoint:
            reader = ImageReader(None)

            def load_whole(item: items.Item) -> list[np.ndarray]:
                return [reader.read(image, roots[item.example]) for image in item.images]

            self.answerer = answerers.EndpointAnswerer(
                options.endpoint, options.endpoint_model, load_whole, context=context
            )
            self.settings = {"endpoint": options.endpoint, "endpoint_model": options.endpoint_model}
            return
        model = _Model(options)

        def load(item: items.Item) -> list[np.ndarray]:
            return [model.reader.read(image, roots[item.example]) for image in item.images]

        self.answerer = answerers.ModelAnswerer(model.agent, load, context=context, seed=options.seed)
        self.settings = {
            "checkpoint": model.source.name,
            "checkpoint_id": processes.made_by_primary_process(
                lambda: row_files.fingerprint(model.source.name)
            ),
            "text": dataclasses.asdict(model.rules),
            "batch_size": options.batch_size,
            "max_length": options.max_length,
        }


def _sha256(path: paths.PathLike) -> str:
    return hashlib.sha256(paths.read_bytes(path, 1 << 30)).hexdigest()


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
        provider: Provider | None = None
        cards = ()
        if arm.experts == "failing":
            provider = answerers.FailingProvider()
        elif arm.experts != "off":
            store = AnnotationStore(self._options.annotations)
            seed = self._options.seed if arm.experts == "falsified" else None
            provider = AnnotationProvider(store, falsify_seed=seed)
        if provider is not None:
            cards = load_cards(self._options.cards) if self._options.cards else card_list(self._config)
        style = Style.of(self._config)
        return Agent(self._generator, self._template, cards=cards, provider=provider, style=style)


def _finished() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"finished": now, "versions": run_checkpoints.versions()}


def _retrieve(options: argparse.Namespace, protocol: retrieval.RetrievalProtocol) -> None:
    of_dialogues = (
        "predictions",
        "endpoint",
        "experts",
        "images",
        "arm",
        "limit",
        "limit_other",
        "annotations",
        "cards",
        "text",
    )
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
