"""Copies a folder of DICOM files without identifiers, and reports counts and reasons."""

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
import logging
import multiprocessing
import os
import resource
import secrets
import signal
import struct
import warnings
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
from vilam3_jax.data.folder_walk import list_files
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

REPORT_NAME = "report.json"
PATIENT_CHARACTERISTICS = "patient-characteristics"
MIN_SALT_BYTES = 16

_TOOL = "vilam3 data deidentify"
_MAX_FILES = 10_000_000
_MAX_SALT_BYTES = 4096
_MAX_REPORT_BYTES = 256 << 20
_MAX_READS = 12_000_000  # pydicom reads three times per element; a large multi-frame header has millions
_SECONDS_PER_FILE = 300
_WORKER_BYTES = 12 << 30
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything that decides the result for a file.

    Attributes:
      out: folder of the copies.
      salt: secret key of all pseudonyms.
      keep_characteristics: keep age, sex, size and weight.
      refuse_suspects: leave files out that may show identifying text.
      limits: of one file.
    """

    out: str
    salt: bytes
    keep_characteristics: bool
    refuse_suspects: bool
    limits: Limits

    def fingerprint(self) -> str:
        """Changes with the salt and with each option."""
        options = [profile.EDITION, self.keep_characteristics, self.refuse_suspects]
        return _keys(self.salt).token("run", json.dumps(options))[:32]


@dataclasses.dataclass
class Outcome:
    """The result for one file.

    Attributes:
      path: the source. Like `original_patient`, only for the mapping.
      output: the copy, relative to the folder; None if the file was skipped.
      reason: why the file was skipped; a fixed text.
      patient, study, series: new identifiers.
      suspicions, actions, notes: see `cleaning.Cleaned`.
      original_patient: PatientID of the source.
    """

    path: str
    output: str | None = None
    reason: str = ""
    patient: str = ""
    study: str = ""
    series: str = ""
    suspicions: list[str] = dataclasses.field(default_factory=list)
    actions: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    original_patient: str = ""


@functools.lru_cache(maxsize=2)
def _keys(salt: bytes) -> pseudonyms.Pseudonyms:
    return pseudonyms.Pseudonyms(salt)  # remembers patients


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
    """Writes copies of the DICOM images in `source` to `out`, without patient identifiers.

    Files are named `PATIENT/SERIES/FILE.dcm` by keyed hashes. The same salt and options give the same files
    again. docs/deidentify.md lists the attributes that are kept.

    Args:
      source: folder; read with its subfolders, never written. Symbolic links are not followed.
      out: a new or empty folder, or that of a run with the same salt and options, which is written again.
      salt_file: secret key, at least `MIN_SALT_BYTES`. None: a random one, used once and not stored.
      keep_characteristics: also keep age (over 89: 90), sex, size and weight of the patient.
      refuse_suspects: leave out the files whose pixels may show identifying text. Else they are only listed.
      mapping: new file, table of source path, copy, PatientID and pseudonym. None: no such table is written.
      workers: processes; 0: this process, without protection against decoders that crash.
      limits: of one file.
      tick: called for each file, for a progress bar.

    Returns:
      The report, as written to `out`/report.json: counts, reasons, attributes and suspicions, no values.

    Raises:
      UserError: folders or files that cannot be used, or dicognito is not installed.
      UnavailableError: the disk or the network fails.
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
                f"--mapping {mapping}: exists and may be the only key to a run; choose another name"
            )
    options = Options(out, salt, keep_characteristics, refuse_suspects, limits)
    listing = list_files(source, _MAX_FILES, lambda: None)
    _claim(options)

    report = _Report(options, listing.skipped)
    for outcome in _outcomes(listing.files, options, workers):
        report.add(outcome)
        tick()
    if mapping is not None:
        _write_mapping(mapping, report.outcomes)
    result = report.result()
    _write_report(out, result)
    if not result["files"]["written"]:
        reasons = "; ".join(f"{count} {reason}" for reason, count in result["skipped"].items())
        raise UserError(f"{source}: no image was de-identified ({reasons or 'the folder is empty'})")
    return result


def _check_apart(one: str, out: str, option: str) -> None:
    """Neither folder lies in the other; a file must not lie in the folder that is handed on."""
    one, out = (path if "://" in path else os.path.realpath(path) for path in (one, out))
    a, b = one.rstrip("/") + "/", out.rstrip("/") + "/"
    if b.startswith(a) and option == "--out":
        raise UserError(f"--out {out}: lies in the source folder; choose a folder outside of it")
    if a.startswith(b):
        what = (
            "contains the source folder" if option == "--out" else f"contains the file of {option}, a secret"
        )
        raise UserError(f"--out {out}: {what}; choose another folder")


def _read_salt(salt_file: paths.PathLike, out: str) -> bytes:
    _check_apart(str(paths.as_path(salt_file)), out, "--salt-file")
    salt = paths.read_bytes(salt_file, _MAX_SALT_BYTES).strip()
    if len(salt) < MIN_SALT_BYTES:
        raise UserError(
            f"--salt-file {salt_file}: {len(salt)} bytes, fewer than {MIN_SALT_BYTES}; make one with "
            "`openssl rand -hex 32`"
        )
    return salt


def _claim(options: Options) -> None:
    """Marks the output folder as ours before the first copy is in it.

    Raises:
      UserError: it holds something else.
    """
    found = paths.children(options.out)
    if not found and paths.as_path(options.out).is_file():
        raise UserError(f"--out {options.out}: is a file; choose a folder")
    if found:
        earlier = _earlier_report(options.out)
        if earlier is None:
            raise UserError(f"--out {options.out}: not empty; choose a new folder")
        if earlier != options.fingerprint():
            raise UserError(
                f"--out {options.out}: holds a run with another salt or other options; choose a new folder, "
                "or give the same --salt-file and options"
            )
    _write_report(options.out, {"tool": _TOOL, "complete": False, "run": options.fingerprint()})


def _earlier_report(out: str) -> str | None:
    path = paths.as_path(out) / REPORT_NAME
    if not path.exists():
        return None
    try:
        stored = json.loads(paths.read_bytes(path, _MAX_REPORT_BYTES))
        return str(stored["run"]) if stored["tool"] == _TOOL else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


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
    before = os.umask(0o077)  # nobody else may read it
    try:
        paths.write_bytes_atomic(mapping, table.getvalue().encode("utf-8", "surrogateescape"))
    finally:
        os.umask(before)


class _Report:
    """Counts of a run. It holds no value of a file, and no name of a source file."""

    def __init__(self, options: Options, not_files: collections.Counter[str]) -> None:
        self.outcomes: list[Outcome] = []
        self._options = options
        self._skipped = collections.Counter(not_files)
        self._not_files = sum(not_files.values())
        self._actions = {name: collections.Counter[str]() for name in ("removed", "emptied", "replaced")}
        self._notes = collections.Counter[str]()
        self._written: set[str] = set()

    def add(self, outcome: Outcome) -> None:
        """Counts a file."""
        if outcome.output in self._written:
            outcome = dataclasses.replace(outcome, output=None, reason="copy of another file", suspicions=[])
        self.outcomes.append(outcome)
        if outcome.output is None:
            self._skipped[outcome.reason] += 1
            return
        self._written.add(outcome.output)
        for action, counts in outcome.actions.items():
            self._actions[action].update(counts)
        self._notes.update(outcome.notes)

    def result(self) -> dict[str, Any]:
        """The whole report."""
        written = [outcome for outcome in self.outcomes if outcome.output is not None]
        suspects = {o.output: o.suspicions for o in written if o.suspicions}
        return {
            "tool": _TOOL,
            "complete": True,
            "run": self._options.fingerprint(),
            "profile": f"DICOM {profile.EDITION}, Basic Application Level Confidentiality Profile",
            "options": {
                "modified dates": "shifted by whole days, a constant for each patient",
                "patient characteristics": self._options.keep_characteristics,
                "suspects": "refused" if self._options.refuse_suspects else "written and listed",
            },
            "files": {
                "seen": len(self.outcomes) + self._not_files,
                "written": len(written),
                "skipped": sum(self._skipped.values()),
                "suspected of burned-in text": len(suspects),
            },
            "patients": len({o.patient for o in written}),
            "studies": len({o.study for o in written}),
            "series": len({o.series for o in written}),
            "skipped": dict(self._skipped.most_common()),
            "notes": dict(self._notes.most_common()),
            "attributes": {name: dict(sorted(counts.items())) for name, counts in self._actions.items()},
            "suspects": dict(sorted(suspects.items())),
        }


# ---- one file ----


def clean_file(path: str, options: Options) -> Outcome:
    """Reads a file, removes identifiers and writes the copy.

    Raises:
      UnavailableError: the disk or the network fails.
      UserError: the copy cannot be written.
    """
    if "://" not in path and os.path.islink(path):
        return Outcome(path, reason="symbolic link, not followed")
    try:
        data = paths.read_bytes(path, options.limits.file_bytes)
    except UnavailableError:
        raise
    except UserError:
        return Outcome(path, reason="cannot be opened, or larger than the limit")
    try:
        cleaned, copy = _cleaned(data, options)
    except cleaning.Skipped as error:
        return Outcome(path, reason=str(error))
    image, keys = cleaned.dataset, _keys(options.salt)
    outcome = Outcome(
        path,
        patient=str(image.PatientID),
        study=str(image.StudyInstanceUID),
        series=str(image.SeriesInstanceUID),
        suspicions=cleaned.suspicions,
        actions=cleaned.actions,
        notes=cleaned.notes,
        original_patient=cleaned.original_patient,
    )
    if cleaned.suspicions and options.refuse_suspects:
        outcome.reason = f"may show identifying text: {cleaned.suspicions[0]}"
        return outcome
    # The name depends on the whole content: two objects with one UID are two files, a copy is one.
    name = keys.token("file", hashlib.sha256(data).hexdigest())[:16]
    outcome.output = f"{outcome.patient}/S{keys.token('series', outcome.series)[:12]}/{name}.dcm"
    paths.write_bytes_atomic(paths.as_path(options.out) / outcome.output, copy)
    return outcome


def _cleaned(data: bytes, options: Options) -> tuple[cleaning.Cleaned, bytes]:
    """The object without identifiers, and its file.

    Raises:
      cleaning.Skipped: it cannot be cleaned.
    """
    with _silent():
        try:
            source = _read(data, options.limits)
            cleaned = cleaning.clean(
                source, _keys(options.salt), options.keep_characteristics, options.limits
            )
            copy = io.BytesIO()
            pydicom.dcmwrite(copy, cleaned.dataset, enforce_file_format=True)
        except (cleaning.Skipped, UserError):
            raise
        except MemoryError:
            raise cleaning.Skipped("damaged or too large: needs more memory than there is") from None
        # pydicom lets through whatever a damaged byte leads to, and its errors quote values.
        except Exception:
            raise cleaning.Skipped("damaged: cannot be read as DICOM") from None
    return cleaned, copy.getvalue()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without warnings and log messages: they quote values of the file."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class _BoundedFile(io.BytesIO):
    """Bytes that pydicom may read a bounded number of times: an element of no bytes costs memory, too."""

    reads_left = _MAX_READS

    def read(self, size: int | None = -1) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise cleaning.Skipped("damaged: more elements than any image has")
        return super().read(size)


def _read(data: bytes, limits: Limits) -> Dataset:
    kind = file_kinds.identify_bytes(data[: 1 << 16], "")
    if kind == file_kinds.DICOMDIR:
        raise cleaning.Skipped("DICOMDIR, an index of other files")
    if kind not in (file_kinds.DICOM, file_kinds.DICOM_WITHOUT_PREAMBLE):
        raise cleaning.Skipped("not a DICOM file")
    _check_deflated(data, limits)
    source = pydicom.dcmread(_BoundedFile(data), force=True)
    cut_short = {tag for tag in source.keys() if _is_cut_short(source.get_item(tag))}  # noqa: SIM118
    has_pixels = any(tag in source for tag in pixels.TAGS)
    if cut_short and (not has_pixels or cut_short & pixels.TAGS):  # else they are bytes behind the image
        raise cleaning.Skipped("damaged: ends inside an element")
    return source


def _is_cut_short(raw: object) -> bool:
    return isinstance(raw, RawDataElement) and len(raw.value or b"") < raw.length < 0xFFFFFFFF


def _check_deflated(data: bytes, limits: Limits) -> None:
    """pydicom inflates without a bound."""
    if str(DeflatedExplicitVRLittleEndian).encode() not in data[:1024] or data[128:138] != b"DICM\2\0\0\0UL":
        return
    (length,) = struct.unpack_from("<L", data, 140)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflater.decompress(data[144 + length :], limits.file_bytes)
    if inflater.unconsumed_tail:
        raise cleaning.Skipped("larger than the limits of frames or bytes")


# ---- many files ----


def _outcomes(files: list[str], options: Options, workers: int) -> Iterator[Outcome]:
    """The outcome of each file, in order."""
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
            # The file that broke it is in the first batch without an answer, or in one beside it.
            for path in waiting[done]:
                yield _clean_alone(path, options)
            done += 1
        waiting = waiting[done:]


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_limit_worker
    )


def _limit_worker() -> None:
    """A decoder that takes too much time or memory costs its process, and then only its file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # a lower limit is in force
        resource.setrlimit(resource.RLIMIT_AS, (_WORKER_BYTES, _WORKER_BYTES))


def _clean_batch(files: list[str], options: Options) -> list[Outcome]:
    outcomes = []
    for path in files:
        signal.alarm(_SECONDS_PER_FILE)
        outcomes.append(clean_file(path, options))
    signal.alarm(0)
    return outcomes


def _clean_alone(path: str, options: Options) -> Outcome:
    try:
        with _pool(1) as pool:
            return pool.submit(_clean_batch, [path], options).result()[0]
    except BrokenProcessPool:
        return Outcome(path, reason=f"damaged: crashed a decoder, or took more than {_SECONDS_PER_FILE} s")
