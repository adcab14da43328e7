"""Fuzzes all file readers: damages small files and checks that each is accepted or rejected cleanly.

    python benchmarks/fuzz_readers.py [--inputs=200000] [--workers=2] [--seed=0] [--only=FORMAT]
    python benchmarks/fuzz_readers.py --reproduce=NUMBER [--seed=0] [--save=FOLDER]

Every input is a seed of `fuzz_seeds.py`, damaged by `fuzz_mutations.py`. It goes through all public entry
points for its kind of file. A finding is

  crash    any exception other than `UserError`
  died     the process ended: a fault in C code
  hang     more than 2 s of processor time in the calling thread, or 60 s of wall time
  memory   a peak of more than 1 GiB
  message  an error or warning with several lines, an object address, or data that identifies a patient
  result   a volume or image that violates the contract of its type

The campaign seed and the number of an input reproduce its bytes. Prints progress, a table by format and the
findings; exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import logging
import mmap
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import fuzz_mutations
import fuzz_seeds
import numpy as np
import pydicom
from fuzz_seed_type import SECRETS, Seed

from vilam3_jax.data import dicom, file_kinds, images
from vilam3_jax.data.deidentify import burned_in
from vilam3_jax.data.deidentify.run import Options, clean_file
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.scan import report
from vilam3_jax.data.scan.collect import collect
from vilam3_jax.data.volumes import Volume, describe_volume, load_volume
from vilam3_jax.errors import UserError
from vilam3_jax.inference.images import open_image

# Low enough that an input within them takes less than a second.
LIMITS = Limits(
    file_bytes=8 << 20, decoded_bytes=64 << 20, pixels=4_000_000, voxels=4_000_000, frames=500, files=100
)
CPU_SECONDS = 2.0
MEMORY_BYTES = 1 << 30
_WALL_SECONDS = 60.0
_ADDRESS_SPACE = 6 << 30
_MESSAGE_LENGTH = 1000

# Entry points without a volume or image as result.
_METADATA_ONLY = ("identify", "image_shape", "survey", "describe_volume", "scan", "deidentify")

EntryPoint = Callable[[Path], object]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A failure of one input.

    Attributes:
      kind: see the module's docstring.
      entry: name of the entry point.
      where: exception and line of a crash, otherwise the measurement; equal findings are counted together.
      detail: the message, or the traceback.
    """

    kind: str
    entry: str
    where: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of all entry points for one input.

    Attributes:
      accepted: whether any returned a volume or image.
      seconds: processor time of the slowest entry point.
      grown: peak memory growth in bytes.
      findings: empty if there was no failure.
    """

    accepted: bool
    seconds: float
    grown: int
    findings: tuple[Finding, ...]


class _TooLong(BaseException):
    """Not an `Exception`, so that no reader catches it."""


def entry_points(seed: Seed) -> dict[str, EntryPoint]:
    """Entry point name → function of the input path."""
    entry: dict[str, EntryPoint] = {"open_image": lambda path: open_image(path, 32), "scan": _scanned}
    if seed.kind != "folder":
        entry["identify"] = file_kinds.identify
    if seed.kind != "image":
        entry["load_volume"] = load_volume
    if seed.kind == "volume":
        entry["describe_volume"] = describe_volume
    if seed.kind in ("dicom", "folder"):
        entry["survey"] = dicom.survey
    if seed.kind in ("dicom", "image"):
        entry["load_image"] = images.load_image
    if seed.kind == "dicom":
        entry["read_image"] = dicom.read_image
        entry["deidentify"] = _deidentified
    if seed.kind == "image":
        entry["decode_image"] = lambda path: images.decode_image(path.read_bytes())
        entry["decode_scaled"] = lambda path: images.decode_scaled(path.read_bytes(), 32)
        entry["image_shape"] = lambda path: images.image_shape(path.read_bytes())
    return entry


def _scanned(path: Path) -> dict[str, Any]:
    result = report.to_json(collect(path if path.is_dir() else path.parent, 1, LIMITS), 0.0)
    return result | {"text": report.to_text(result)}


def _deidentified(path: Path) -> pydicom.Dataset | None:
    """De-identifies without searching pixels for text, where pydicom's decoders may abort."""
    with (
        mock.patch.object(burned_in, "signs_in_pixels", return_value=[]),
        tempfile.TemporaryDirectory() as folder,
    ):
        copy = clean_file(str(path), Options(folder, b"salt" * 8, False, False, LIMITS)).output
        return pydicom.dcmread(Path(folder, copy), stop_before_pixels=True) if copy else None


def input_of(campaign: int, number: int, seeds: Sequence[Seed]) -> tuple[Seed, dict[str, bytes]]:
    """The seed of an input and its damaged files."""
    rng = random.Random(f"{campaign}/{number}")
    seed = seeds[number % len(seeds)]
    others = [content for other in rng.sample(seeds, 3) for content in other.files.values()]
    return seed, fuzz_mutations.mutate(seed.files, others, rng)


@contextlib.contextmanager
def written(files: dict[str, bytes], folder: Path) -> Iterator[None]:
    """Writes the files of an input to an empty folder and removes them on exit."""
    made = []
    for name, content in files.items():
        path = folder / name
        if path.parent != folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        made.append(path)
    try:
        yield
    finally:
        for path in made:
            path.unlink()


def try_input(
    seed: Seed, files: dict[str, bytes], folder: Path, mark: Callable[[str], object] = str
) -> Outcome:
    """Runs all entry points on one input.

    Args:
      seed: origin of the input.
      files: its files.
      folder: an empty folder.
      mark: called with the name of each entry point before it runs.
    """
    findings: list[Finding] = []
    accepted, slowest, grown = False, 0.0, 0
    with written(files, folder):
        for name, call in entry_points(seed).items():
            mark(name)
            before = _resident_bytes()
            start = time.thread_time()
            is_accepted, found = _call(name, call, folder / seed.entry)
            seconds, peak = time.thread_time() - start, _peak_bytes() - before
            accepted |= is_accepted and name not in _METADATA_ONLY
            findings += found
            if seconds > CPU_SECONDS and not any(finding.kind == "hang" for finding in found):
                findings.append(Finding("hang", name, "in C code", f"{seconds:.1f} s"))
            if peak > MEMORY_BYTES:
                findings.append(Finding("memory", name, f"{peak / 2**30:.0f} GiB"))
            slowest, grown = max(slowest, seconds), max(grown, peak)
    return Outcome(accepted, slowest, grown, tuple(findings))


def _call(name: str, call: EntryPoint, path: Path) -> tuple[bool, list[Finding]]:
    """Whether an entry point accepted the input, and its findings."""
    texts: list[str] = []
    findings: list[Finding] = []
    is_accepted = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _start_timer()
        try:
            result = call(path)
            signal.setitimer(signal.ITIMER_REAL, 0)
            is_accepted = True
            texts += getattr(result, "notes", ())
            if fault := _fault(result):
                findings.append(Finding("result", name, fault))
        except UserError as error:
            texts.append(str(error))
        except _TooLong:
            findings.append(Finding("hang", name, _where(), traceback.format_exc()))
        except Exception as error:
            where = f"{type(error).__name__} {_where()}"
            findings.append(Finding("crash", name, where, traceback.format_exc()))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    texts += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    for text in texts:
        if fault := _fault_of_text(text):
            findings.append(Finding("message", name, f"{fault}: {_pattern(text, path)}", text))
    return is_accepted, findings


def _fault(result: object) -> str:
    """How a result violates the contract of its type; "" if it does not."""
    if isinstance(result, Volume):
        if result.voxels.ndim != 3 or result.voxels.dtype not in (np.int16, np.int32, np.float32):
            return f"voxels {result.voxels.dtype} {result.voxels.ndim}-D"
        if not (np.isfinite(result.voxels).all() and np.isfinite(result.affine).all()):
            return "numbers that are not finite"
        if np.linalg.det(result.affine[:3, :3]) == 0:
            return "singular affine"
        result.content_key  # noqa: B018  computes
        return ""
    if isinstance(result, dict | pydicom.Dataset):
        return "identifies a patient" if _has_secret(str(result)) else ""
    pixels = result if isinstance(result, np.ndarray) else getattr(result, "pixels", None)
    if pixels is not None and (pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape):
        return f"pixels {pixels.dtype} {pixels.ndim}-D"
    return ""


def _fault_of_text(text: str) -> str:
    if "\n" in text or "\r" in text:
        return "several lines"
    if re.search(r" at 0x[0-9a-f]{6}", text):
        return "an address"
    if _has_secret(text):
        return "identifies a patient"
    if len(text) > _MESSAGE_LENGTH:
        return "long"
    if not text.isprintable():
        return "not printable"
    return ""


def _has_secret(text: str) -> bool:
    return any(secret in text for secret in SECRETS)


def _pattern(text: str, path: Path) -> str:
    """A message without file-specific parts."""
    text = text.replace(str(path), "PATH").replace(str(path.parent), "PATH")
    return re.sub(r"([0-9?][0-9?.]*)+", "N", "".join(c if c.isprintable() else "?" for c in text))[:60]


def _where() -> str:
    """The innermost line of this package in the traceback, and the innermost of all."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    own = [frame for frame in frames if "vilam3_jax" in frame.filename]
    named = [*own[-1:], *frames[-1:]]
    return " < ".join(dict.fromkeys(f"{Path(frame.filename).name}:{frame.lineno}" for frame in named))


_deadline = 0.0


def _start_timer() -> None:
    global _deadline
    _deadline = time.thread_time() + CPU_SECONDS
    signal.setitimer(signal.ITIMER_REAL, CPU_SECONDS, CPU_SECONDS)


def _expire(number: int, frame: object) -> None:
    """Ends the call if its processor time is used up, but not if the machine is merely busy."""
    if time.thread_time() > _deadline:
        signal.setitimer(signal.ITIMER_REAL, 0)  # or it might interrupt the report of the finding
        raise _TooLong


def prepare_process() -> None:
    """Prepares a process for `try_input`: timer, low default limits, silent libraries."""
    for field in dataclasses.fields(Limits):  # the default argument of every reader
        object.__setattr__(DEFAULT_LIMITS, field.name, getattr(LIMITS, field.name))
    signal.signal(signal.SIGALRM, _expire)
    logging.disable()
    _peak_bytes()


def _resident_bytes() -> int:
    """Memory in use; resets the peak."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


# The campaign: workers that may crash, and the process that watches them.


_MARK = struct.Struct("<qd32s")  # number, time, entry point


def work(campaign: int, first: int, stop: int, step: int, only: str, folder: str) -> None:
    """Worker: tries every `step`-th input and prints a line of JSON for each.

    Files are written below `folder`, which the parent removes; so is the mark of the current entry point.
    """
    tempfile.tempdir = folder
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stderr = os.fdopen(os.dup(2), "w")  # for faults of the campaign; output of decoders is discarded
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    prepare_process()
    seeds = fuzz_seeds.all_seeds()
    with (
        Path(folder, "mark").open("r+b") as file,
        mmap.mmap(file.fileno(), _MARK.size) as marks,
        tempfile.TemporaryDirectory() as place,
    ):
        for seed in {seed.kind: seed for seed in seeds}.values():  # warm-up, so imports do not count
            try_input(seed, dict(seed.files), Path(place))
        _limit_address_space()
        for number in range(first, stop, step):
            if only and seeds[number % len(seeds)].format != only:
                continue
            seed, files = input_of(campaign, number, seeds)

            def mark(entry: str, number: int = number) -> None:
                marks[:] = _MARK.pack(number, time.time(), entry.encode())

            outcome = try_input(seed, files, Path(place), mark)
            answers.write(
                json.dumps({"number": number, "format": seed.format, **dataclasses.asdict(outcome)}) + "\n"
            )
        marks[:] = _MARK.pack(-1, time.time(), b"")


def _limit_address_space() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESS_SPACE, used + _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Worker(threading.Thread):
    """Runs a worker process over its inputs and restarts it after each crash."""

    def __init__(
        self,
        index: int,
        options: argparse.Namespace,
        folder: Path,
        take: Callable[[dict[str, Any]], None],
    ) -> None:
        super().__init__(daemon=True)
        self._index = index
        self._options = options
        self._take = take
        self._process: subprocess.Popen[str] | None = None
        self._folder = folder
        self._folder.mkdir()
        self._put_mark(-1)

    def run(self) -> None:
        options, first = self._options, self._index
        while first < options.inputs:
            self._put_mark(-1)
            range_ = (first, options.inputs, options.workers)
            arguments = [options.seed, *range_, options.only, str(self._folder)]
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--worker", json.dumps(arguments)],
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self._process.stdout is not None
            for line in self._process.stdout:
                self._take(json.loads(line))
            code = self._process.wait()
            number, _, entry = self._read_mark()
            if code == 0:
                return
            if number < 0:
                raise RuntimeError(f"a worker ended with {code} before its first input")
            kind = "hang" if code == -signal.SIGKILL else "died"
            finding = Finding(kind, entry, f"signal {-code}" if code < 0 else f"exit code {code}")
            seeds = fuzz_seeds.all_seeds()
            outcome = Outcome(False, 0.0, 0, (finding,))
            self._take(
                {"number": number, "format": seeds[number % len(seeds)].format, **dataclasses.asdict(outcome)}
            )
            first = number + options.workers

    def kill_if_stuck(self) -> None:
        number, since, _ = self._read_mark()
        if number >= 0 and time.time() - since > _WALL_SECONDS:
            self.kill()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _put_mark(self, number: int) -> None:
        (self._folder / "mark").write_bytes(_MARK.pack(number, time.time(), b""))

    def _read_mark(self) -> tuple[int, float, str]:
        number, since, entry = _MARK.unpack((self._folder / "mark").read_bytes())
        return number, since, entry.rstrip(b"\0").decode()


class Tally:
    """Counts outcomes by format, and equal findings."""

    def __init__(self) -> None:
        self.formats: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.slowest: dict[str, tuple[float, int]] = {}
        self.grown: dict[str, int] = collections.defaultdict(int)
        self.findings: dict[tuple[str, str, str], list[tuple[int, str, str]]] = collections.defaultdict(list)
        self.inputs = 0
        self._lock = threading.Lock()

    def add(self, row: dict[str, Any]) -> None:
        with self._lock:
            self.inputs += 1
            counts, format_ = self.formats[row["format"]], row["format"]
            counts["inputs"] += 1
            counts["accepted" if row["accepted"] else "refused"] += 1
            self.slowest[format_] = max(self.slowest.get(format_, (0.0, 0)), (row["seconds"], row["number"]))
            self.grown[format_] = max(self.grown[format_], row["grown"])
            for finding in row["findings"]:
                counts["findings"] += 1
                alike = self.findings[finding["kind"], finding["entry"], finding["where"]]
                alike.append((row["number"], format_, finding["detail"]))
                if len(alike) == 1:
                    about = f"{finding['kind']} in {finding['entry']} ({finding['where']})"
                    print(f"finding: {about}, input {row['number']}", flush=True)

    def table(self) -> str:
        columns = ("inputs", "accepted", "refused", "findings")
        rows = [f"{'format':18}{''.join(f'{name:>10}' for name in columns)}{'slowest':>20}{'memory':>10}"]
        for name, counts in sorted(self.formats.items()):
            seconds, number = self.slowest[name]
            numbers = "".join(f"{counts[column]:10}" for column in columns)
            slowest = f"{seconds * 1000:.0f} ms ({number})"
            rows.append(f"{name:18}{numbers}{slowest:>20}{self.grown[name] >> 20:6} MiB")
        return "\n".join(rows)


def watch(workers: Sequence[Worker], tally: Tally, start: float) -> None:
    """Starts all workers, prints progress, and waits for them to end."""
    for worker in workers:
        worker.start()
    shown = time.monotonic()
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.5)
        for worker in workers:
            worker.kill_if_stuck()
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            rate = tally.inputs / (shown - start)
            print(f"{tally.inputs} inputs, {rate:.0f}/s, {len(tally.findings)} findings", flush=True)


def run(options: argparse.Namespace) -> int:
    """Runs the whole campaign.

    Returns:
      Exit code: 1 if there are findings.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # removes the folder
    tally, start = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        workers = [
            Worker(index, options, Path(folder, str(index)), tally.add) for index in range(options.workers)
        ]
        try:
            watch(workers, tally, start)
        finally:
            for worker in workers:
                worker.kill()
    seconds = time.monotonic() - start
    print(
        f"\nseed {options.seed}: {tally.inputs} inputs in {seconds:.0f} s, {tally.inputs / seconds:.0f}/s\n"
    )
    print(tally.table())
    for (kind, entry, where), alike in sorted(tally.findings.items()):
        number, format_, detail = alike[0]
        print(f"\n{kind} in {entry} ({where}): {len(alike)} inputs, such as {number} ({format_})")
        for line in detail.strip().splitlines()[-8:]:
            print(f"    {repr(line)[1:-1]}")
        print(f"    python {sys.argv[0]} --seed={options.seed} --reproduce={number}")
    return 1 if tally.findings else 0


def reproduce(options: argparse.Namespace) -> int:
    """Tries one input in this process and prints the result.

    Returns:
      Exit code: 1 if there is a finding.
    """
    prepare_process()
    seed, files = input_of(options.seed, options.reproduce, fuzz_seeds.all_seeds())
    sizes = ", ".join(f"{name} of {len(content)} bytes" for name, content in files.items())
    print(f"input {options.reproduce}: {seed.format} {seed.name}, {sizes}")
    if options.save:
        for name, content in files.items():
            path = Path(options.save, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    with tempfile.TemporaryDirectory() as folder:
        outcome = try_input(seed, files, Path(folder), lambda entry: print(f"  {entry}", flush=True))
    for finding in outcome.findings:
        print(f"{finding.kind} in {finding.entry} ({finding.where})\n{finding.detail}")
    print(f"accepted: {outcome.accepted}, {outcome.seconds * 1000:.0f} ms, {outcome.grown >> 20} MiB")
    return 1 if outcome.findings else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="one format of the table")
    parser.add_argument("--reproduce", type=int, metavar="NUMBER", help="try one input in this process")
    parser.add_argument("--save", help="folder for the files of --reproduce")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*json.loads(options.worker))
        return 0
    return run(options) if options.reproduce is None else reproduce(options)


if __name__ == "__main__":
    sys.exit(main())
