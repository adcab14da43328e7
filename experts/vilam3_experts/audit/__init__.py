"""The audit log: every expert call, in chains of hashes that show what was changed afterwards.

A log is a folder:

    CHAIN-NUMBER.jsonl     lines of one chain from line NUMBER on
    manifest/CHAIN.json    length and last hash of the chain

Each writer has its own chain, so writers need no common lock. A line is canonical JSON (sorted keys, no
spaces) with its number (`sequence`), the hash of the line before it (`previous`), and its own (`hash`: sha256
of the line without it). The chain begins with the hash of its name. When a writer opens and closes, its line
lists the other chains that it sees, so that one which disappears with its manifest entry is still missed.

What is logged of a call: key of its input (a hash of the decoded pixels), expert, version, hash of its
weights, arguments, status, hash of the answer without its time, seconds, time of day. No path, file name or
reason of a failure, which may hold one.

**What a crash costs.** On a disk, `append` hands each line to the operating system before it returns: a
killed process loses none. Lines and manifest are on the disk (fsync) at most a second later if calls go on,
and after `sync` and `close`; a power cut loses at most what came since. An object store has no append: lines
are written as an object every `_REMOTE_SECONDS` if calls go on, and at `sync` and `close`; a killed process
loses those since.

**What it shows.** Lines that were changed, removed, moved or inserted; a chain that was cut short or removed.
Whoever can rewrite a whole chain and its manifest can forge it: keep copies of the folder `manifest`
elsewhere and give them to `verify`.
"""

from vilam3_experts.audit.chain import Call, Head, calls, heads
from vilam3_experts.audit.log import AuditLog
from vilam3_experts.audit.replayer import Replayed, replay
from vilam3_experts.audit.verifier import Problem, Report, verify

__all__ = ["AuditLog", "Call", "Head", "Problem", "Replayed", "Report", "calls", "heads", "replay", "verify"]
