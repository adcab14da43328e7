"""IU X-ray from synthetic copies of OpenI's XML and of R2Gen's release."""

from __future__ import annotations

import importlib.util
import tarfile
from pathlib import Path

import pytest
import twins

from vilam3_jax.data.examples import Turn
from vilam3_jax.datasets.iu_xray import IuXray, split_of
from vilam3_jax.datasets.reports import parse_report
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

# Report numbers in each split, by hash.
NUMBERS = {
    split: [number for number in range(1, 90) if split_of(str(number)) == split]
    for split in ("train", "validation", "test")
}


def report(number, findings="", impression="", images=("0001-1001",), mesh=("normal",), uid=None):
    uid = uid or f"CXR{number}"
    shown = "".join(
        f'<parentImage id="{uid}_IM-{name}"><caption>Xray</caption></parentImage>' for name in images
    )
    headings = "".join(f"<major>{heading}</major>" for heading in mesh)
    return f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="{uid}"/><pmcId id="{number}"/><licenseURL>http://example.org/l</licenseURL>
<MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">Made-up.</AbstractText>
<AbstractText Label="INDICATION">Secret indication</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">{impression}</AbstractText>
</Abstract></Article></MedlineCitation><MeSH>{headings}<automatic>other</automatic></MeSH>{shown}</eCitation>"""


def release(folder, reports):
    """`reports`: number → arguments of `report`."""
    files = {}
    for number, told in reports.items():
        files[f"ecgen-radiology/{number}.xml"] = report(number, **told)
        for name in told.get("images", ("0001-1001",)):
            path = f"NLMCXR_png/CXR{number}_IM-{name}.png"
            files[path] = twins.picture(len(files), kind="PNG")
    return twins.write(folder, files)


def test_golden_report(tmp_path):
    number = NUMBERS["train"][0]
    told = {
        "findings": "The heart is small. The XXXX is\n clear &amp; dry.  Lungs are clear.",
        "impression": "No disease.",
        "images": ("0001-1001", "0001-2001"),
    }
    examples, skipped = twins.made(IuXray, release(tmp_path, {number: told}))
    assert not any(skipped.values())
    (one,) = examples["train"]
    assert one.id == f"CXR{number}"
    assert one.images[0].data == twins.picture(1, kind="PNG")
    assert one.turns == (
        Turn(
            "user",
            "<image>\n<image>\nWrite the findings and the impression of these chest X-rays.",
        ),
        Turn("assistant", "Findings: The heart is small. Lungs are clear.\nImpression: No disease.", True),
    )
    assert one.meta["raw_report"] == (
        "Findings: The heart is small. The XXXX is clear & dry. Lungs are clear.\nImpression: No disease."
    )
    assert one.meta["normal"] is True and one.meta["mesh"] == ["normal"]
    assert one.meta["qa"][0]["answer"] == one.turns[1].text and one.meta["qa"][0]["type"] == "report"
    assert one.expert_requests == () and f"CXR{number}" not in one.meta["patient"]


def test_splits_do_not_depend_on_other_reports(tmp_path):
    numbers = [NUMBERS[split][index] for split in NUMBERS for index in (0, 1)]
    every = release(tmp_path / "a", {number: {"impression": "Clear lungs."} for number in numbers})
    some = release(tmp_path / "b", {number: {"impression": "Clear lungs."} for number in numbers[::2]})
    of_all, _ = twins.made(IuXray, every)
    of_some, _ = twins.made(IuXray, some)
    for split, found in of_all.items():
        assert {one.id for one in found} == {f"CXR{number}" for number in NUMBERS[split][:2]}
        assert {one.id for one in of_some[split]} == {f"CXR{NUMBERS[split][0]}"}
    patients = [{one.meta["patient"] for one in found} for found in of_all.values()]
    assert sum(map(len, patients)) == len(set.union(*patients))


@pytest.mark.parametrize(
    ("target", "request_", "answer"),
    [
        ("findings_impression", "What is the impression of this chest X-ray?", "Clear lungs."),
        ("impression", "What is the impression of this chest X-ray?", "Clear lungs."),
        ("findings", None, None),
    ],
)
def test_a_report_without_findings(tmp_path, target, request_, answer):
    number = NUMBERS["test"][0]
    folder = release(tmp_path, {number: {"impression": "Clear lungs."}})
    examples, skipped = twins.made(IuXray, folder, argv=["--target", target])
    if answer is None:
        assert [one.reason for one in skipped["test"]] == ["its report has no findings without masked words"]
        return
    (one,) = examples["test"]
    assert one.turns[0].text == f"<image>\n{request_}" and one.turns[1].text == answer


def test_reports_that_cannot_be_used(tmp_path):
    first, second, third, fourth, fifth, sixth, seventh = NUMBERS["train"][:7]
    told = {"impression": "Clear lungs."}
    folder = release(
        tmp_path,
        {
            first: {"impression": "XXXX."},
            second: {**told, "images": ()},
            third: {**told, "uid": "CXR9999"},
            fourth: told,
            fifth: told,
            sixth: told,
            seventh: told,
        },
    )
    (folder / f"NLMCXR_png/CXR{fourth}_IM-0001-1001.png").unlink()
    bomb = '<!DOCTYPE r [<!ENTITY a "aa">]><eCitation>&a;</eCitation>'
    alien = report(sixth, **told).replace(f'parentImage id="CXR{sixth}_', 'parentImage id="CXR7777_')
    twins.write(
        folder,
        {f"ecgen-radiology/{fifth}.xml": bomb, f"ecgen-radiology/{sixth}.xml": alien},
    )
    examples, skipped = twins.made(IuXray, folder)
    assert [one.id for one in examples["train"]] == [f"CXR{seventh}"]
    found = {one.record: one.reason for one in skipped["train"]}
    reasons = [found[f"ecgen-radiology/{number}.xml"] for number in NUMBERS["train"][:6]]
    assert reasons[0] == "its report has no findings and no impression without masked words"
    assert reasons[1] == "its report names no image"
    assert reasons[2] == "its uId is not that of its file name"
    assert reasons[3].endswith("is missing")
    assert "refused" in reasons[4]
    assert reasons[5] == "names an image that is not of this report"
    assert not any("Clear" in reason or "Secret" in reason for reason in found.values())


def test_image_names_lead_nowhere(tmp_path):
    number = NUMBERS["train"][0]
    folder = release(tmp_path, {number: {"impression": "Clear."}})
    text = report(number, impression="Clear.").replace("_IM-0001-1001", "_/../../../secret")
    twins.write(folder, {f"ecgen-radiology/{number}.xml": text})
    _, skipped = twins.made(IuXray, folder)
    assert [one.reason for one in skipped["train"]] == ["names an image that is not of this report"]


def test_normal_studies(tmp_path):
    normal, ill, unknown, capital = NUMBERS["test"][:4]
    folder = release(
        tmp_path,
        {
            normal: {},
            ill: {"mesh": ("Cardiomegaly/mild", "Lung/hypoinflation")},
            unknown: {"mesh": ("No Indexing",)},
            capital: {"mesh": ("Normal",)},
        },
    )
    examples, skipped = twins.made(IuXray, folder, config="normal")
    assert {one.id: one.meta["qa"][0]["answer"] for one in examples["test"]} == {
        f"CXR{normal}": "yes",
        f"CXR{ill}": "no",
        f"CXR{capital}": "yes",
    }
    assert [one.reason for one in skipped["test"]] == ["its report has no subject headings"]


def test_pairs(tmp_path):
    number = NUMBERS["train"][0]
    told = {"findings": "Large heart.", "images": ("0001-1001", "0001-2001", "0001-3001")}
    folder = release(tmp_path, {number: told})
    (folder / f"NLMCXR_png/CXR{number}_IM-0001-2001.png").unlink()
    examples, skipped = twins.made(IuXray, folder, config="pairs")
    assert [one.id for one in examples["train"]] == [
        f"CXR{number}_IM-0001-1001",
        f"CXR{number}_IM-0001-3001",
    ]
    assert {one.turns[1].text for one in examples["train"]} == {"Large heart."}
    assert [one.record for one in skipped["train"]] == [f"ecgen-radiology/{number}.xml image 2"]


def annotation(folder, **splits):
    pictures = {f"images/CXR1_IM-0001/{k}.png": twins.picture(k, kind="PNG") for k in range(3)}
    content = {"train": [], "val": [], "test": [], **splits}
    return twins.write(folder, {"annotation.json": content, **pictures})


ITEM = {
    "id": "CXR1_IM-0001",
    "report": "The heart is large . No effusion is seen at XXXX .",
    "image_path": [f"CXR1_IM-0001/{k}.png" for k in range(3)],
    "split": "train",
}


def test_golden_r2gen_study(tmp_path):
    examples, skipped = twins.made(IuXray, annotation(tmp_path, train=[ITEM]), config="r2gen")
    assert skipped == {"train": [], "validation": [], "test": []}
    (one,) = examples["train"]
    assert one.id == "train/CXR1_IM-0001"
    assert [image.data for image in one.images] == [twins.picture(k, kind="PNG") for k in (0, 1)]
    assert one.turns[1].text == "The heart is large." and one.meta["raw_report"] == ITEM["report"]


def test_r2gen_rows_that_cannot_be_used(tmp_path):
    rows = [
        None,
        ["a"],
        {**ITEM, "report": None},
        {**ITEM, "report": ["a"]},
        {**ITEM, "image_path": "CXR1_IM-0001/0.png"},
        {**ITEM, "image_path": [3]},
        {**ITEM, "image_path": ["../../../secret.png"]},
        {**ITEM, "image_path": ["CXR1_IM-0001/9.png"]},
        {**ITEM, "id": "CXR2_IM-0002"},
        {"id": 3},
        {**ITEM, "report": "XXXX\0."},
        {**ITEM, "report": "x" * 100_000},
        {**ITEM, "image_path": ITEM["image_path"][:1]},
    ]
    examples, skipped = twins.made(IuXray, annotation(tmp_path, test=rows), config="r2gen")
    assert len(examples["test"]) == 1 and len(skipped["test"]) == 12
    assert skipped["test"][8].reason == "image_path names an image of another report"
    assert skipped["test"][0].record == "annotation.json test row 1"
    assert "xxx" not in " ".join(one.reason for one in skipped["test"])


def test_patients_of_both_releases_are_the_same(tmp_path):
    number = NUMBERS["train"][0]
    openi, _ = twins.made(IuXray, release(tmp_path / "a", {number: {"impression": "Clear."}}))
    item = {**ITEM, "id": f"CXR{number}_IM-0001"}
    r2gen, _ = twins.made(IuXray, annotation(tmp_path / "b", val=[item]), config="r2gen")
    assert openi["train"][0].meta["patient"] == r2gen["validation"][0].meta["patient"]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"ecgen-radiology, NLMCXR_png or images missing"):
        IuXray().splits(SourceFolder(tmp_path))
    with pytest.raises(UserError, match=r"annotation\.json.*missing"):
        IuXray(config="r2gen").splits(SourceFolder(tmp_path))
    twins.write(tmp_path, {"annotation.json": {"train": []}, "images/a": b""})
    with pytest.raises(UserError, match=r"holds no list under 'val'"):
        IuXray(config="r2gen").splits(SourceFolder(tmp_path))


def _archive() -> Path | None:
    found = importlib.util.find_spec("torchxrayvision")
    path = Path(found.origin).parent / "data" / "NLMCXR_reports.tgz" if found and found.origin else None
    return path if path and path.exists() else None


@pytest.mark.slow
@pytest.mark.skipif(_archive() is None, reason="torchxrayvision, which has the reports, is not installed")
def test_the_real_reports(tmp_path):
    """Counts of OpenI's reports, as torchxrayvision ships them."""
    path = _archive()
    assert path is not None
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "NLMCXR_png").mkdir()
    maker = IuXray(config="normal")
    splits = maker.splits(SourceFolder(tmp_path))
    assert {name: len(split.items) for name, split in splits.items()} == {
        name: split.expected for name, split in splits.items()
    }
    assert sum(len(split.items) for split in splits.values()) == 3_955
    read = [
        parse_report((tmp_path / name).read_bytes(), name)
        for split in splits.values()
        for name in split.items
    ]
    assert sum(len(report.images) for report in read) == 7_470
    assert sum(not report.findings for report in read) == 530
    assert sum(not report.impression for report in read) == 34
    assert sum(report.mesh == ("normal",) for report in read) == 1_391
