"""`vilam3-experts store`: inspect and compact an annotation store."""

from __future__ import annotations

import argparse
import dataclasses
import json

from vilam3_jax.data.experts.store import StoreInfo, compact, store_info


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("store", help="size and content of an annotation store; compact it")
    actions = parser.add_subparsers(dest="action", required=True)
    info = actions.add_parser("info", help="records by expert and status, shards, bytes, digest")
    info.add_argument("store", help="annotation store, local or gs://")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)
    compaction = actions.add_parser(
        "compact",
        help="merge many small shards and indexes",
        description="Rewrites small shards as a few large ones, drops superseded records, and merges the"
        " indexes. Readers and writers may stay active.",
    )
    compaction.add_argument("store", help="annotation store, local or gs://")
    compaction.set_defaults(run=_compact)


def _info(options: argparse.Namespace) -> int:
    info = store_info(options.store)
    if options.json:
        calls = [{**call._asdict(), "records": number} for call, number in info.calls.items()]
        print(json.dumps(dataclasses.asdict(info) | {"calls": calls}))
        return 0
    for call, number in info.calls.items():
        version = f"version {call.version}" if call.version else "no version"
        print(f"{number:9,d}  {call.status:6}  {call.expert}({call.args})  {version}")
    print(describe(info))
    print(f"digest {info.digest}")
    return 0


def _compact(options: argparse.Namespace) -> int:
    before, after = compact(options.store)
    print(f"before: {describe(before)}")
    print(f"after:  {describe(after)}")
    return 0


def describe(info: StoreInfo) -> str:
    """A store as one line of text."""
    replaced = info.stored - info.records
    return (
        f"{info.records:,d} records in {info.shards:,d} shards of {info.shard_bytes / (1 << 20):,.1f} MiB"
        + (f" ({replaced:,d} replaced by later ones)" if replaced else "")
        + f", {info.indexes:,d} index files of {info.index_bytes / (1 << 20):,.1f} MiB"
    )
