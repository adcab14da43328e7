"""Reads the Indiana University chest X-ray reports (findings and impression) from their archive.

The archive is untrusted input: XML with a document type or an entity is refused, because declared entities
can expand to gigabytes, and members, sizes and nesting are limited.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import random
import re
import tarfile
import zlib
from collections.abc import Iterable
from xml.etree import ElementTree

from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path, read_bytes

MAX_ARCHIVE_BYTES = 64 << 20
MAX_MEMBERS = 50_000
MAX_REPORT_BYTES = 1 << 20
MAX_TOTAL_BYTES = 512 << 20
MAX_DEPTH = 64
_MASKED = re.compile(r"X{4,}")  # the publisher's replacement of identifying words
_MIN_WORDS = 5


@dataclasses.dataclass(frozen=True)
class Report:
    """One report.

    Attributes:
      id: the collection's number, for example `CXR1001`.
      findings, impression: texts, may be empty.
      licence: as stated in the file.
      images: names of its images, without extension.
      mesh: its main subject headings; only "normal" for a normal study.
    """

    id: str
    findings: str
    impression: str
    licence: str
    images: tuple[str, ...] = ()
    mesh: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Both sections with their headings, without empty sections."""
        parts = [("Findings", self.findings), ("Impression", self.impression)]
        return "\n".join(f"{head}: {body}" for head, body in parts if body)


class _ReportBuilder(ElementTree.TreeBuilder):
    """Refuses document types, and thereby entities, and deep nesting."""

    def __init__(self, name: str):
        super().__init__()
        self._name, self._depth = name, 0

    def doctype(self, *_: object) -> None:
        raise UserError(f"{self._name}: declares a document type; refused, reports have none")

    def start(self, tag: str, attrs: dict[str, str], /) -> ElementTree.Element:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UserError(f"{self._name}: XML nested deeper than {MAX_DEPTH}; not a report")
        return super().start(tag, attrs)

    def end(self, tag: str, /) -> ElementTree.Element:
        self._depth -= 1
        return super().end(tag)


def parse_report(data: bytes, name: str = "report") -> Report:
    """Parses the XML file of a report; `name` is used in messages, and as the id if the file has none.

    Raises:
      UserError: it is not well-formed, too large, nested too deeply, or has a document type or entities.
    """
    if len(data) > MAX_REPORT_BYTES:
        raise UserError(f"{name}: {len(data)} bytes, more than the limit of {MAX_REPORT_BYTES}")
    parser = ElementTree.XMLParser(target=_ReportBuilder(name))
    try:
        parser.feed(data)
        root = parser.close()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{name}: not well-formed XML ({error})") from error

    def section(label: str) -> str:
        return _text(e for e in root.iter("AbstractText") if e.get("Label", "").upper() == label)

    return Report(
        id=next((identifier for e in root.iter("uId") if (identifier := e.get("id"))), name),
        findings=section("FINDINGS"),
        impression=section("IMPRESSION"),
        licence=_text(root.iter("licenseURL")) or "none stated",
        images=tuple(e.get("id", "") for e in root.iter("parentImage")),
        mesh=tuple(_text([e]) for e in root.iter("major")),
    )


def _text(elements: Iterable[ElementTree.Element]) -> str:
    return " ".join("".join(part for element in elements for part in element.itertext()).split())


def read_reports(archive: PathLike) -> tuple[list[Report], collections.Counter[str]]:
    """Reads the usable reports of a `.tgz`, sorted by id.

    Reports with a masked word are skipped, so that a model never learns to write the mask. Only regular
    `.xml` members are read, and nothing is written to disk.

    Returns:
      The reports, and reason → number of skipped reports.

    Raises:
      UserError: it is not an archive, is damaged, or exceeds a limit; names the file.
    """
    path = as_path(archive)
    data = read_bytes(path, MAX_ARCHIVE_BYTES)
    reports: dict[str, Report] = {}
    skipped: collections.Counter[str] = collections.Counter()
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|gz") as members:
            for number, member in enumerate(members):
                total += member.size
                if number >= MAX_MEMBERS or total > MAX_TOTAL_BYTES:
                    raise UserError(
                        f"{path}: more than {MAX_MEMBERS} members or {MAX_TOTAL_BYTES} bytes unpacked; "
                        "not the report collection"
                    )
                if not member.isfile() or not member.name.endswith(".xml"):
                    continue
                if member.size > MAX_REPORT_BYTES:
                    raise UserError(f"{path}: member {member.name} has {member.size} bytes; refused")
                handle = members.extractfile(member)
                content = handle.read() if handle is not None else b""
                report = parse_report(content, f"{path.name}:{member.name}")
                if reason := _unusable(report, reports):
                    skipped[reason] += 1
                else:
                    reports[report.id] = report
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); fetch it again") from error
    return [reports[key] for key in sorted(reports)], skipped


_GENERATED = {
    "findings": (
        "The heart is {size}.",
        "The lungs are {air}.",
        "There is {effusion} pleural effusion.",
        "There is no pneumothorax.",
        "The bony structures are intact.",
    ),
    "size": ("of normal size", "mildly enlarged", "enlarged"),
    "air": ("clear", "hypoinflated", "well expanded"),
    "effusion": ("no", "a small left", "a small right"),
}


def generated_reports(count: int, rng: random.Random) -> list[Report]:
    """Random reports in the form of the real ones, for phantoms; the text describes no image."""
    reports = []
    for number in range(count):
        chosen = {key: rng.choice(_GENERATED[key]) for key in ("size", "air", "effusion")}
        sentences = [sentence.format(**chosen) for sentence in _GENERATED["findings"]]
        rng.shuffle(sentences)
        normal = chosen == {key: _GENERATED[key][0] for key in chosen}
        impression = "No acute disease." if normal else "Changes as described, no acute disease."
        reports.append(Report(f"generated-{number:05d}", " ".join(sentences), impression, "generated"))
    return reports


def _unusable(report: Report, known: dict[str, Report]) -> str | None:
    text = f"{report.findings} {report.impression}"
    words = len(text.split())
    if not words:
        return "report: no findings and no impression"
    if words < _MIN_WORDS:
        return f"report: fewer than {_MIN_WORDS} words"
    if _MASKED.search(text):
        return "report: words masked by the publisher"
    return "report: id seen before" if report.id in known else None
