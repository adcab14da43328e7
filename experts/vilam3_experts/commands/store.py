"""`vilam3-experts store`: size and content of an annotation store, and its compaction."""

from __future__ import annotations

import argparse
import dataclasses
import json

from vilam3_jax.data.experts.store import StoreInfo, compact, store_info


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declares the command."""
    parser = commands.add_parser("store", help="size and content of an annotation store; compact it")
    actions = parser.add_subparsers(dest="action", required=True)
    told = actions.add_parser("info", help="records by expert and status, shards, bytes, digest")
    told.add_argument("store", help="annotation store, local or gs://")
    told.add_argument("--json", action="store_true", help="print one JSON object")
    told.set_defaults(run=_info)
    made = actions.add_parser(
        "compact",
        help="few large shards and one index instead of many",
        description="Rewrites small shards as few large ones, drops what later answers replaced, and merges"
        " the indexes. Writers and readers may go on meanwhile.",
    )
    made.add_argument("store", help="annotation store, local or gs://")
    made.set_defaults(run=_compact)


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
    """One line on a store, for people."""
    replaced = info.stored - info.records
    size = info.shard_bytes / (1 << 20)
    index = info.index_bytes / (1 << 20)
    return (
        f"{info.records:,d} records in {info.shards:,d} shards of {size:,.1f} MiB"
        + (f" ({replaced:,d} replaced by later ones)" if replaced else "")
        + f", {info.indexes:,d} index files of {index:,.1f} MiB"
    )
