"""IU X-ray (OpenI): chest films of Indiana University with reports, and R2Gen's selection of them."""

from __future__ import annotations

import argparse
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import conversations
from vilam3_jax.datasets.chest_findings import NORMAL, question
from vilam3_jax.datasets.conversations import YES_NO, metadata, question_meta, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Skipped, Split
from vilam3_jax.datasets.report_examples import headed
from vilam3_jax.datasets.report_text import clean
from vilam3_jax.datasets.reports import MAX_REPORT_BYTES, Report, parse_report
from vilam3_jax.datasets.rows import Row, rows_of
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.runtime import paths

TARGETS = {
    "findings_impression": ("findings", "impression"),
    "findings": ("findings",),
    "impression": ("impression",),
}
_REQUESTS = {
    ("findings",): "What are the findings of {these}?",
    ("impression",): "What is the impression of {these}?",
    ("findings", "impression"): "Write the findings and the impression of {these}.",
}
_REPORTS = "ecgen-radiology"
_IMAGES = ("NLMCXR_png", "images")
# Tenths of the patients: R2Gen's ratio.
_TENTHS = {"train": range(0, 7), "validation": range(7, 8), "test": range(8, 10)}
# Reports of the release (3,955 in all) by split.
_EXPECTED = {"train": 2_769, "validation": 398, "test": 788}
_R2GEN = {"train": ("train", 2_069), "validation": ("val", 296), "test": ("test", 590)}
_R2GEN_IMAGES = 2  # R2Gen shows the first two of a study
_MASK = re.compile(r"X{4,}", re.IGNORECASE)  # the publisher's mask of a word
_UNINDEXED = "no indexing"
_IMAGE_NAME = re.compile(r"[\w-]+")
_PATIENT = re.compile(r"CXR\d+")
_MAX_REPORT = 64 << 10  # characters; the longest of the release has about 2,000


class IuXray(Dataset):
    """Chest films with reports, all images of a study together; normal or not; or image-text pairs.

    Where no official file exists:
      - OpenI has no split. Each report is of a different patient; a hash of its number assigns it to train
        (7/10), validation (1/10) or test (2/10). The variant `r2gen` has R2Gen's splits instead.
      - Sentences with a masked word (XXXX) are removed from the target, so that a model does not learn to
        write masks. `meta.raw_report` is the original report.
      - If a report lacks one of two sections, only the other one is requested.
      - The view of a film is unknown, so the film expert is not requested.
      - `r2gen` shows the first two images of a study, as R2Gen does.

    `parity` has no effect.
    """

    name = "iu_xray"
    description = "Chest films of Indiana University with radiologists' reports (OpenI)"
    homepage = "https://openi.nlm.nih.gov"
    citation = (
        "Demner-Fushman D, Kohli MD, Rosenman MB, et al. Preparing a collection of radiology examinations "
        "for distribution and retrieval. J Am Med Inform Assoc 2016;23:304-310. doi:10.1093/jamia/ocv080"
    )
    licence = "CC BY-NC-ND 4.0"
    instructions = (
        "Unpack https://openi.nlm.nih.gov/imgs/collections/NLMCXR_png.tgz to NLMCXR_png/ and "
        "https://openi.nlm.nih.gov/imgs/collections/NLMCXR_reports.tgz to ecgen-radiology/. For the variant "
        "'r2gen', unpack iu_xray.zip of https://github.com/cuhksz-nlp/R2Gen (link in its README): "
        "annotation.json and images/."
    )
    configs: ClassVar[Mapping[str, str]] = {
        "openi": "studies with reports",
        "r2gen": "R2Gen's studies and splits: two images, findings only",
        "normal": "studies with the question whether they look normal",
        "pairs": "each image with the impression of its report",
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--target",
            choices=tuple(TARGETS),
            default="findings_impression",
            help="target sections of the variant openi (default: findings_impression)",
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        if self.config == "r2gen":
            return self._r2gen(source)
        _, images = source.require(_REPORTS, _IMAGES)
        makers = {
            "openi": functools.partial(_report, target=TARGETS[self.options.target]),
            "normal": _normal,
            "pairs": _pairs,
        }
        make = functools.partial(makers[self.config], images=images)
        items: dict[str, list[str]] = {split: [] for split in _TENTHS}
        for name in source.glob(f"{_REPORTS}/*.xml"):
            items[split_of(_stem(name))].append(name)
        if not any(items.values()):
            source.require(f"{_REPORTS}/1.xml")
        per_item = 2 if self.config == "pairs" else 1
        return {
            split: Split(names, make, expected=_EXPECTED[split], per_item=per_item)
            for split, names in items.items()
        }

    def _r2gen(self, source: SourceFolder) -> Mapping[str, Split]:
        (name,) = source.require(["annotation.json", "iu_xray/annotation.json"])
        images = f"{name.removesuffix('annotation.json')}images"
        source.require(images)
        taken: set[str] = set()
        splits = {}
        for split, (key, expected) in _R2GEN.items():
            listed = enumerate(source.json_list(name, key), 1)
            rows = rows_of(name, listed, lambda row: row["id"], prefix=split, taken=taken)
            make = functools.partial(_r2gen_report, images=images)
            splits[split] = Split(rows, make, _row_name, expected)
        return splits


def split_of(number: str) -> str:
    """Returns the split of the report with this number, independently of other reports."""
    tenth = int.from_bytes(hashlib.sha256(f"iu_xray/{number}".encode()).digest()[:8], "big") % 10
    return next(split for split, tenths in _TENTHS.items() if tenth in tenths)


def _stem(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".xml")


def _row_name(row: Row) -> str:
    return f"{row.file} {row.id.partition('/')[0]} row {row.number}"


def _report(path: str, context: Context, images: str, target: Sequence[str]) -> Iterator[Example]:
    report = _read(path, context)
    raw = {head: getattr(report, head) for head in target}
    texts = {head: text for head in target if (text := _cleaned(raw[head]))}
    if not texts:
        raise SkipItem(f"its report has no {' and no '.join(target)} without masked words")
    shown = [_image(name, report, context, images) for name in _names(report)]
    qa = _report_question(tuple(texts), len(shown), headed(texts))
    meta = _meta(report, context, raw_report=headed({head: text for head, text in raw.items() if text}))
    yield conversations.question_conversation(report.id, shown, meta, [qa])


def _report_question(sections: tuple[str, ...], images: int, text: str) -> dict[str, Any]:
    these = "this chest X-ray" if images == 1 else "these chest X-rays"
    request = _REQUESTS[sections].format(these=these)
    return question_meta(request, text, "report", label_source="radiologist")


def _normal(path: str, context: Context, images: str) -> Iterator[Example]:
    report = _read(path, context)
    normal = _is_normal(report)
    if normal is None:
        raise SkipItem("its report has no subject headings")
    shown = [_image(name, report, context, images) for name in _names(report)]
    text, answer = question(NORMAL), YES_NO[0] if normal else YES_NO[1]
    qa = question_meta(text, answer, NORMAL, options=YES_NO, label_source="indexer")
    exchanges = [(text, answer.capitalize())]
    yield conversations.conversation(report.id, shown, exchanges, _meta(report, context), questions=[qa])


def _pairs(path: str, context: Context, images: str) -> Iterator[Example | Skipped]:
    report = _read(path, context)
    caption = _cleaned(report.impression) or _cleaned(report.findings)
    if not caption:
        raise SkipItem("its report has no impression and no findings without masked words")
    for number, name in enumerate(_names(report), 1):
        try:
            image = _image(name, report, context, images)
        except SkipItem as reason:
            yield Skipped(f"{path} image {number}", str(reason))
        else:
            yield conversations.pair(name, image, caption, _meta(report, context), kind="pair")


def _r2gen_report(row: Row, context: Context, images: str) -> Iterator[Example]:
    if not isinstance(row.values, dict):
        raise SkipItem("is not an object")
    raw = text_of(row.values.get("report"), "report")
    listed = row.values.get("image_path")
    if not isinstance(listed, list) or not listed or not all(isinstance(p, str) and p for p in listed):
        raise SkipItem("image_path is not a list of paths")
    text = _cleaned(raw)
    if not text:
        raise SkipItem("its report has no sentence without masked words")
    name = row.id.partition("/")[2]
    patient = _PATIENT.match(name)
    owners = {found[0] for path in listed if (found := _PATIENT.match(path))}
    if patient and owners - {patient[0]}:
        raise SkipItem("image_path names an image of another report")
    shown = [context.image(f"{images}/{path}") for path in listed[:_R2GEN_IMAGES]]
    meta = metadata(
        context,
        modality="CXR",
        patient=patient[0] if patient else name,
        label_source="radiologist",
        raw_report=raw,
    )
    qa = _report_question(("findings",), len(shown), text)
    yield conversations.question_conversation(row.id, shown, meta, [qa])


def _read(path: str, context: Context) -> Report:
    data = paths.read_bytes(paths.as_path(context.root) / path, MAX_REPORT_BYTES)
    report = parse_report(data, path)
    if report.id != f"CXR{_stem(path)}":
        raise SkipItem("its uId is not that of its file name")
    return report


def _names(report: Report) -> Sequence[str]:
    if not report.images:
        raise SkipItem("its report names no image")
    return list(dict.fromkeys(report.images))


def _image(name: str, report: Report, context: Context, folder: str) -> ImageRef:
    if not _IMAGE_NAME.fullmatch(name) or not name.startswith(f"{report.id}_"):
        raise SkipItem("names an image that is not of this report")
    return context.image(f"{folder}/{name}.png")


def _cleaned(text: str) -> str:
    """Removes sentences with a masked word, converted to MIMIC's mask for `report_text.clean`."""
    if len(text) > _MAX_REPORT:
        raise SkipItem(f"its report has {len(text)} characters; up to {_MAX_REPORT} are read")
    return clean(_MASK.sub("___", text))


def _is_normal(report: Report) -> bool | None:
    """Returns whether "normal" is the only main subject heading; None without headings."""
    headings = [heading.casefold() for heading in report.mesh]
    return None if not headings or _UNINDEXED in headings else headings == ["normal"]


def _meta(report: Report, context: Context, **more: object) -> dict:
    return metadata(
        context,
        modality="CXR",
        patient=report.id,
        label_source="radiologist",
        normal=_is_normal(report),
        mesh=list(report.mesh) or None,
        **more,
    )
