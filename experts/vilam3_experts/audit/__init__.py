"""The audit log: every expert call, in hash chains that reveal later changes.

A log is a folder:

    CHAIN-NUMBER.jsonl     lines of one chain from line NUMBER on
    manifest/CHAIN.json    length and last hash of the chain

Each writer has its own chain, so writers need no shared lock. A line is canonical JSON (sorted keys, no
spaces) with its number (`sequence`), the hash of the previous line (`previous`), and its own (`hash`: sha256
of the line without this field). The first line follows the hash of the chain's name. When a writer opens and
closes, its line lists the heads of the other chains, so that a chain which is removed together with its
manifest entry is still missed.

Logged per call: the key of its input (a hash of the decoded pixels), expert, version, hash of its weights,
arguments, status, hash of the answer without its time, seconds, time of day. Paths, file names and reasons of
failures are not logged, because they may identify a patient.

**Durability.** On a disk, a killed process loses no line that `append` returned from. Lines and manifest are
synced at most a second later while calls continue, and by `sync` and `close`; a power failure loses the lines
since. Object stores cannot append: lines are written as one object every `_REMOTE_SECONDS` while calls
continue, and by `sync` and `close`; a killed process loses the lines since.

**Guarantees.** Detected are lines that were changed, removed, moved or inserted, and chains that were
truncated or removed. Whoever can rewrite a whole chain and its manifest can forge it: keep copies of the
folder `manifest` elsewhere and pass them to `verify`.
"""

from vilam3_experts.audit.chain import Call, Head, calls, heads
from vilam3_experts.audit.log import AuditLog
from vilam3_experts.audit.verifier import Problem, ReplayReport, Report, replay, verify

__all__ = [
    "AuditLog",
    "Call",
    "Head",
    "Problem",
    "ReplayReport",
    "Report",
    "calls",
    "heads",
    "replay",
    "verify",
]
