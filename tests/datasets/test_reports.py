"""The report reader on handwritten and hostile XML."""

import io
import random
import tarfile

import pytest

from vilam3_jax.datasets import reports
from vilam3_jax.errors import UserError


def make_xml(number: int, findings: str = "", impression: str = "") -> bytes:
    return f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="CXR{number}"/><licenseURL>http://example.org/licence</licenseURL>
<MedlineCitation><Article><Abstract>
<AbstractText Label="INDICATION">never read</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">{impression}</AbstractText>
</Abstract></Article></MedlineCitation></eCitation>""".encode()


def make_archive(path, members: dict[str, bytes]):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_sections_are_found_and_white_space_is_joined():
    report = reports.parse_report(make_xml(7, "Heart size\n   normal &amp; stable.", "No disease."))
    assert report.id == "CXR7"
    assert report.findings == "Heart size normal & stable."
    assert report.text == "Findings: Heart size normal & stable.\nImpression: No disease."
    assert report.licence == "http://example.org/licence"


def test_missing_section_leaves_no_heading():
    assert reports.parse_report(make_xml(1, "", "Clear lungs.")).text == "Impression: Clear lungs."


BOMB = b"""<?xml version="1.0"?><!DOCTYPE r [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>
<eCitation><AbstractText Label="FINDINGS">&b;</AbstractText></eCitation>"""


@pytest.mark.parametrize(
    "data",
    [
        BOMB,
        BOMB.decode().replace('version="1.0"', 'version="1.0" encoding="utf-16"').encode("utf-16"),
        b'<!DOCTYPE r SYSTEM "file:///etc/hostname"><r/>',
        b"<eCitation><open></eCitation>",
        b"",
        b"\x00\xff" * 10,
        b"<a>" * 100 + b"</a>" * 100,
    ],
)
def test_hostile_xml_is_refused(data):
    with pytest.raises(UserError, match=r"bad\.xml"):
        reports.parse_report(data, "bad.xml")


def test_size_limit(monkeypatch):
    monkeypatch.setattr(reports, "MAX_REPORT_BYTES", 100)
    with pytest.raises(UserError, match="limit of 100"):
        reports.parse_report(make_xml(1, "x" * 200))


def test_archive_counts_what_it_leaves_out(tmp_path):
    good = "The heart is of normal size and the lungs are clear."
    path = make_archive(
        tmp_path / "r.tgz",
        {
            "d/2.xml": make_xml(2, good),
            "d/1.xml": make_xml(1, good, "No disease."),
            "d/3.xml": make_xml(3),
            "d/4.xml": make_xml(4, "Too short"),
            "d/5.xml": make_xml(5, good + " Compared with XXXX."),
            "d/6.xml": make_xml(2, good),
            "d/readme.txt": b"not a report",
        },
    )
    found, left_out = reports.read_reports(path)
    assert [r.id for r in found] == ["CXR1", "CXR2"]
    assert sum(left_out.values()) == 4 and len(left_out) == 4
    assert left_out["report: words masked by the publisher"] == 1


def test_damaged_archive_is_named(tmp_path):
    path = make_archive(tmp_path / "r.tgz", {"1.xml": make_xml(1, "a " * 4000)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"r\.tgz"):
        reports.read_reports(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"r\.tgz"):
        reports.read_reports(path)


def test_links_and_too_many_members_are_not_followed(tmp_path, monkeypatch):
    path = tmp_path / "l.tgz"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("1.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    assert reports.read_reports(path)[0] == []
    many = make_archive(tmp_path / "m.tgz", {f"{i}.xml": make_xml(i, "a b c d e f") for i in range(4)})
    monkeypatch.setattr(reports, "MAX_MEMBERS", 3)
    with pytest.raises(UserError, match="more than 3 members"):
        reports.read_reports(many)


def test_generated_reports_have_the_form_of_real_ones_and_their_own_ids():
    made = reports.generated_reports(20, random.Random(0))
    assert len({r.id for r in made}) == 20
    assert all(r.text.startswith("Findings: ") and "\nImpression: " in r.text for r in made)
    assert made == reports.generated_reports(20, random.Random(0))
