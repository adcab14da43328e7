"""De-identifies a folder of DICOM files and reports counts and reasons."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import os
import resource
import secrets
import signal
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pydicom
import pydicom.config
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from vilam3_jax.data import file_kinds
from vilam3_jax.data.deidentify import cleaning, pixels, profile, pseudonyms
from vilam3_jax.data.deidentify.cleaning import Outcome
from vilam3_jax.data.deidentify.pixels import Skipped
from vilam3_jax.data.folder_walk import list_files
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.scan.redaction import library_output_suppressed
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

REPORT_NAME = "report.json"
PATIENT_CHARACTERISTICS = "patient-characteristics"
MIN_SALT_BYTES = 16

_TOOL = "vilam3 data deidentify"
_MAX_FILES = 10_000_000
_MAX_SALT_BYTES = 4096
_MAX_REPORT_BYTES = 256 << 20
_MAX_READS = 12_000_000  # pydicom reads three times per element; large multi-frame headers have millions
_SECONDS_PER_FILE = 300
_WORKER_BYTES = 12 << 30
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything that determines the result for a file."""

    out: str  # output folder
    salt: bytes  # secret key of all pseudonyms
    keep_characteristics: bool  # keep age, sex, size and weight
    refuse_suspects: bool  # skip files that may show identifying text
    limits: Limits  # bounds per file

    def fingerprint(self) -> str:
        """Returns a hash of the salt and the options that affect the output."""
        options = [profile.EDITION, self.keep_characteristics, self.refuse_suspects]
        return _pseudonyms(self.salt).token("run", json.dumps(options))[:32]


@functools.lru_cache(maxsize=2)
def _pseudonyms(salt: bytes) -> pseudonyms.Pseudonyms:
    return pseudonyms.Pseudonyms(salt)  # caches patients


def deidentify(
    source: paths.PathLike,
    out: paths.PathLike,
    *,
    salt_file: paths.PathLike | None = None,
    keep_characteristics: bool = False,
    refuse_suspects: bool = False,
    mapping: paths.PathLike | None = None,
    workers: int = 0,
    limits: Limits = DEFAULT_LIMITS,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Copies the DICOM images of a folder without patient identifiers.

    Files are named `PATIENT/SERIES/FILE.dcm` by keyed hashes. The same salt and options reproduce them.

    Args:
      source: folder, read recursively and never modified. Symbolic links are not followed.
      out: new or empty folder, or the output of a run with the same salt and options, which is overwritten.
      salt_file: secret key of at least `MIN_SALT_BYTES`. None: a random key that is not stored.
      keep_characteristics: also keep age (above 89: 90), sex, size and weight of the patient.
      refuse_suspects: skip files whose pixels may show identifying text, instead of listing them.
      mapping: new file for a table of source path, copy, PatientID and pseudonym. None: no table.
      workers: number of processes; 0: this process, without protection against decoder crashes.
      limits: bounds per file.
      tick: called once per file, for a progress bar.

    Returns:
      The report written to `out`/report.json: counts, reasons, attributes and suspicions, no values.

    Raises:
      UserError: an unusable folder or file, or dicognito is not installed.
      UnavailableError: disk or network failure.
    """
    pseudonyms.check_installed()
    source, out = str(paths.as_path(source)), str(paths.as_path(out))
    _check_apart(source, out, "--out")
    salt = _read_salt(salt_file, out) if salt_file is not None else secrets.token_bytes(32)
    if mapping is not None:
        mapping = str(paths.as_path(mapping))
        _check_apart(mapping, out, "--mapping")
        if paths.as_path(mapping).exists():
            raise UserError(
                f"--mapping {mapping}: exists and may be the only key to an earlier run; choose another name"
            )
    options = Options(out, salt, keep_characteristics, refuse_suspects, limits)
    listing = list_files(source, _MAX_FILES, lambda: None)
    _claim(options)

    outcomes, written = [], set()
    for outcome in _outcomes(listing.files, options, workers):
        if outcome.output in written:
            outcome = dataclasses.replace(outcome, output=None, reason="copy of another file", suspicions=[])
        elif outcome.output is not None:
            written.add(outcome.output)
        outcomes.append(outcome)
        tick()
    if mapping is not None:
        _write_mapping(mapping, outcomes)
    report = _report(outcomes, options, listing.skipped)
    _write_report(out, report)
    if not written:
        reasons = "; ".join(f"{count} {reason}" for reason, count in report["skipped"].items())
        raise UserError(f"{source}: no image was de-identified ({reasons or 'the folder is empty'})")
    return report


def _check_apart(one: str, out: str, option: str) -> None:
    """Checks that `out` neither contains `one`, nor is inside `one` if that is the source folder."""
    one, out = (path if "://" in path else os.path.realpath(path) for path in (one, out))
    a, b = one.rstrip("/") + "/", out.rstrip("/") + "/"
    if b.startswith(a) and option == "--out":
        raise UserError(f"--out {out}: is inside the source folder; choose a folder outside it")
    if a.startswith(b):
        what = "contains the source folder" if option == "--out" else f"contains the secret file of {option}"
        raise UserError(f"--out {out}: {what}; choose another folder")


def _read_salt(salt_file: paths.PathLike, out: str) -> bytes:
    _check_apart(str(paths.as_path(salt_file)), out, "--salt-file")
    salt = paths.read_bytes(salt_file, _MAX_SALT_BYTES).strip()
    if len(salt) < MIN_SALT_BYTES:
        raise UserError(
            f"--salt-file {salt_file}: {len(salt)} bytes, fewer than {MIN_SALT_BYTES}; create one with "
            "`openssl rand -hex 32`"
        )
    return salt


def _claim(options: Options) -> None:
    """Writes an incomplete report to the output folder; raises `UserError` if it contains anything else."""
    path, earlier = paths.as_path(options.out) / REPORT_NAME, None
    if path.exists():
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            stored = json.loads(paths.read_bytes(path, _MAX_REPORT_BYTES))
            earlier = str(stored["run"]) if stored["tool"] == _TOOL else None
    if earlier is None and paths.children(options.out):
        raise UserError(f"--out {options.out}: not empty; choose a new folder")
    if earlier not in (None, options.fingerprint()):
        raise UserError(
            f"--out {options.out}: contains a run with another salt or other options; choose a new "
            "folder, or give the same --salt-file and options"
        )
    if paths.as_path(options.out).is_file():
        raise UserError(f"--out {options.out}: is a file; choose a folder")
    _write_report(options.out, {"tool": _TOOL, "complete": False, "run": options.fingerprint()})


def _write_report(out: str, report: dict[str, Any]) -> None:
    paths.write_text_atomic(paths.as_path(out) / REPORT_NAME, json.dumps(report, indent=1) + "\n")


def _write_mapping(mapping: str, outcomes: Iterable[Outcome]) -> None:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["source", "copy", "reason", "original PatientID", "new PatientID"])
    for outcome in outcomes:
        writer.writerow(
            [outcome.path, outcome.output or "", outcome.reason, outcome.original_patient, outcome.patient]
        )
    before = os.umask(0o077)  # readable only by the owner
    try:
        paths.write_bytes_atomic(mapping, table.getvalue().encode("utf-8", "surrogateescape"))
    finally:
        os.umask(before)


def _report(outcomes: list[Outcome], options: Options, not_files: collections.Counter[str]) -> dict[str, Any]:
    """Summarizes a run, without values of files and names of source files."""
    written = [outcome for outcome in outcomes if outcome.output is not None]
    skipped = collections.Counter(not_files)
    skipped.update(outcome.reason for outcome in outcomes if outcome.output is None)
    actions = {name: collections.Counter[str]() for name in ("removed", "emptied", "replaced")}
    for outcome in written:
        for action, counts in outcome.actions.items():
            actions[action].update(counts)
    suspects = {str(outcome.output): outcome.suspicions for outcome in written if outcome.suspicions}
    return {
        "tool": _TOOL,
        "complete": True,
        "run": options.fingerprint(),
        "profile": f"DICOM {profile.EDITION}, Basic Application Level Confidentiality Profile",
        "options": {
            "modified dates": "shifted by whole days, a constant for each patient",
            "patient characteristics": options.keep_characteristics,
            "suspects": "refused" if options.refuse_suspects else "written and listed",
        },
        "files": {
            "seen": len(outcomes) + not_files.total(),
            "written": len(written),
            "skipped": skipped.total(),
            "suspected of burned-in text": len(suspects),
        },
        "patients": len({outcome.patient for outcome in written}),
        "studies": len({outcome.study for outcome in written}),
        "series": len({outcome.series for outcome in written}),
        "skipped": dict(skipped.most_common()),
        "notes": dict(collections.Counter(note for o in written for note in o.notes).most_common()),
        "attributes": {name: dict(sorted(counts.items())) for name, counts in actions.items()},
        "suspects": dict(sorted(suspects.items())),
    }


def clean_file(path: str, options: Options) -> Outcome:
    """Reads a file, removes identifiers and writes the copy; raises `UserError` if that cannot be written."""
    if "://" not in path and os.path.islink(path):
        return Outcome(path, reason="symbolic link, not followed")
    try:
        data = paths.read_bytes(path, options.limits.file_bytes)
    except UnavailableError:
        raise
    except UserError:
        return Outcome(path, reason="unreadable, or larger than the limit")
    try:
        outcome, copy = _cleaned(data, options)
    except Skipped as error:
        return Outcome(path, reason=str(error))
    outcome.path = path
    if outcome.suspicions and options.refuse_suspects:
        outcome.reason = f"may show identifying text: {outcome.suspicions[0]}"
        return outcome
    # The name depends on the content: objects with the same UID give two files, copies of a file give one.
    keys = _pseudonyms(options.salt)
    name = keys.token("file", hashlib.sha256(data).hexdigest())[:16]
    outcome.output = f"{outcome.patient}/S{keys.token('series', outcome.series)[:12]}/{name}.dcm"
    paths.write_bytes_atomic(paths.as_path(options.out) / outcome.output, copy)
    return outcome


def _cleaned(data: bytes, options: Options) -> tuple[Outcome, bytes]:
    """Returns the outcome and the file without identifiers; raises `Skipped` if it cannot be cleaned."""
    # Library output and exceptions quote values of the file.
    with library_output_suppressed(), pydicom.config.disable_value_validation():
        try:
            image, outcome = cleaning.clean(
                _read(data, options.limits),
                _pseudonyms(options.salt),
                options.keep_characteristics,
                options.limits,
            )
            copy = io.BytesIO()
            pydicom.dcmwrite(copy, image, enforce_file_format=True)
        except (Skipped, UserError):
            raise
        except MemoryError:
            raise Skipped("damaged or too large: out of memory") from None
        except Exception:  # pydicom raises arbitrary exceptions for damaged bytes
            raise Skipped("damaged: cannot be read as DICOM") from None
    return outcome, copy.getvalue()


class _BoundedFile(io.BytesIO):
    """Bounds the number of reads, because even empty elements cost memory."""

    reads_left = _MAX_READS

    def read(self, size: int | None = -1) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise Skipped("damaged: too many elements")
        return super().read(size)


def _read(data: bytes, limits: Limits) -> Dataset:
    kind = file_kinds.identify_bytes(data[: 1 << 16], "")
    if kind == file_kinds.DICOMDIR:
        raise Skipped("DICOMDIR, an index of other files")
    if kind not in (file_kinds.DICOM, file_kinds.DICOM_WITHOUT_PREAMBLE):
        raise Skipped("not a DICOM file")
    _check_deflated(data, limits)
    source = pydicom.dcmread(_BoundedFile(data), force=True)
    raws = ((tag, source.get_item(tag)) for tag in source.keys())  # noqa: SIM118
    raws = ((tag, raw) for tag, raw in raws if isinstance(raw, RawDataElement))
    truncated = {tag for tag, raw in raws if len(raw.value or b"") < raw.length < 0xFFFFFFFF}
    has_pixels = any(tag in source for tag in pixels.TAGS)
    if truncated and (not has_pixels or truncated & pixels.TAGS):  # otherwise bytes after the image
        raise Skipped("damaged: truncated inside an element")
    return source


def _check_deflated(data: bytes, limits: Limits) -> None:
    """Bounds the inflated size, which pydicom does not."""
    if str(DeflatedExplicitVRLittleEndian).encode() not in data[:1024] or data[128:138] != b"DICM\2\0\0\0UL":
        return
    (length,) = struct.unpack_from("<L", data, 140)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflater.decompress(data[144 + length :], limits.file_bytes)
    if inflater.unconsumed_tail:
        raise Skipped("larger than the limits of frames or bytes")


def _outcomes(files: list[str], options: Options, workers: int) -> Iterator[Outcome]:
    """Yields the outcome of each file, in order."""
    if workers == 0:
        for path in files:
            yield clean_file(path, options)
        return
    waiting = [files[start : start + _BATCH] for start in range(0, len(files), _BATCH)]
    while waiting:
        done = 0
        try:
            with _pool(min(workers, len(waiting))) as pool:
                for outcomes in pool.map(_clean_batch, waiting, [options] * len(waiting)):
                    yield from outcomes
                    done += 1
        except BrokenProcessPool:
            # The file that broke the pool is in the first unanswered batch, or in one that ran beside it.
            for path in waiting[done]:
                try:
                    with _pool(1) as pool:
                        yield pool.submit(_clean_batch, [path], options).result()[0]
                except BrokenProcessPool:
                    reason = f"damaged: a decoder crashed or took more than {_SECONDS_PER_FILE} s"
                    yield Outcome(path, reason=reason)
            done += 1
        waiting = waiting[done:]


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_limit_worker
    )


def _limit_worker() -> None:
    """Limits memory. A decoder that exceeds a limit ends its process, which costs only its file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # a lower limit applies
        resource.setrlimit(resource.RLIMIT_AS, (_WORKER_BYTES, _WORKER_BYTES))


def _clean_batch(files: list[str], options: Options) -> list[Outcome]:
    outcomes = []
    for path in files:
        signal.alarm(_SECONDS_PER_FILE)
        outcomes.append(clean_file(path, options))
    signal.alarm(0)
    return outcomes
