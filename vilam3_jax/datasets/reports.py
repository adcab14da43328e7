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
import xml.parsers.expat
import zlib

from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path, read_bytes

MAX_ARCHIVE_BYTES = 64 << 20
MAX_MEMBERS = 50_000
MAX_REPORT_BYTES = 1 << 20
MAX_TOTAL_BYTES = 512 << 20
MAX_DEPTH = 64
_MASKED = re.compile(r"X{4,}")  # the publisher's replacement of identifying words
_SECTIONS = ("FINDINGS", "IMPRESSION")


@dataclasses.dataclass(frozen=True)
class Report:
    """One report.

    Attributes:
      id: the collection's number, for example `CXR1001`.
      findings: text, may be empty.
      impression: text, may be empty.
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

    @property
    def masked_fraction(self) -> float:
        """Share of words masked by the publisher."""
        words = f"{self.findings} {self.impression}".split()
        return sum(bool(_MASKED.search(word)) for word in words) / len(words) if words else 0.0


class _ReportHandler:
    """Collects the text of the required elements at any depth."""

    def __init__(self, name: str):
        self.name = name
        self.depth = 0
        self.fields: dict[str, list[str]] = {}
        self.report_id = ""
        self.images: list[str] = []
        self.mesh: list[str] = []
        self._open: tuple[str, int] | None = None

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UserError(f"{self.name}: XML nested deeper than {MAX_DEPTH}; not a report")
        if tag == "uId":
            self.report_id = self.report_id or attributes.get("id", "")
        elif tag == "parentImage":
            self.images.append(attributes.get("id", ""))
        elif tag == "licenseURL":
            self._open = (tag, self.depth)
        elif tag == "major":
            self.mesh.append("")
            self._open = (tag, self.depth)
        elif tag == "AbstractText" and attributes.get("Label", "").upper() in _SECTIONS:
            self._open = (attributes["Label"].upper(), self.depth)

    def end(self, tag: str) -> None:
        if self._open is not None and self._open[1] == self.depth:
            self._open = None
        self.depth -= 1

    def text(self, data: str) -> None:
        if self._open is not None and self._open[0] == "major":
            self.mesh[-1] += data
        elif self._open is not None:
            self.fields.setdefault(self._open[0], []).append(data)

    def refuse(self, *_: object) -> None:
        raise UserError(f"{self.name}: declares a document type or an entity; refused, reports have none")

    def field(self, key: str) -> str:
        return " ".join("".join(self.fields.get(key, [])).split())


def parse_report(data: bytes, name: str = "report") -> Report:
    """Parses one report.

    Args:
      data: the XML file.
      name: used in messages, and as the id if the file has none.

    Raises:
      UserError: it is not well-formed, too large, nested too deeply, or has a document type or entities.
    """
    if len(data) > MAX_REPORT_BYTES:
        raise UserError(f"{name}: {len(data)} bytes, more than the limit of {MAX_REPORT_BYTES}")
    handler = _ReportHandler(name)
    parser = xml.parsers.expat.ParserCreate()
    parser.StartElementHandler = handler.start
    parser.EndElementHandler = handler.end
    parser.CharacterDataHandler = handler.text
    parser.StartDoctypeDeclHandler = handler.refuse
    parser.EntityDeclHandler = handler.refuse
    try:
        parser.Parse(data, True)
    except xml.parsers.expat.ExpatError as error:
        raise UserError(f"{name}: not well-formed XML ({error})") from error
    return Report(
        id=handler.report_id or name,
        findings=handler.field("FINDINGS"),
        impression=handler.field("IMPRESSION"),
        licence=handler.field("licenseURL") or "none stated",
        images=tuple(handler.images),
        mesh=tuple(" ".join(heading.split()) for heading in handler.mesh),
    )


def read_reports(
    archive: PathLike, *, max_masked: float = 0.0, min_words: int = 5
) -> tuple[list[Report], collections.Counter[str]]:
    """Reads the usable reports of a `.tgz`, sorted by id.

    Args:
      archive: the archive; only its regular `.xml` members are read, and nothing is written to disk.
      max_masked: largest share of masked words; with 0, a model never learns to write the mask.
      min_words: shorter reports are skipped.

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
                if reason := _unusable(report, reports, max_masked, min_words):
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


def _unusable(report: Report, known: dict[str, Report], max_masked: float, min_words: int) -> str | None:
    words = len(f"{report.findings} {report.impression}".split())
    if not words:
        return "report: no findings and no impression"
    if words < min_words:
        return f"report: fewer than {min_words} words"
    if report.masked_fraction > max_masked:
        return "report: words masked by the publisher"
    if report.id in known:
        return "report: id seen before"
    return None
