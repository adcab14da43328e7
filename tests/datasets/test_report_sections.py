"""Sections of reports: golden reports, and properties of any text."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilam3_jax.datasets.report_sections import kind_of, sections_of

COLUMNS = ("impression", "findings", "comparison")  # of mimic_cxr_sectioned.csv

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  Made-up cough.

 COMPARISON:  Chest radiograph ___

 FINDINGS:

 The lungs are clear.  NOTE: none.
 There is no effusion.

 IMPRESSION:

 No acute process.
"""


def columns(report):
    found = sections_of(report)
    return {name: found[name] for name in COLUMNS if name in found}


def test_a_usual_report():
    assert columns(REPORT) == {
        "impression": "No acute process.",
        "findings": "The lungs are clear.  NOTE: none.\n There is no effusion.",
        "comparison": "Chest radiograph ___",
    }


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        # The last section of a kind is used, empty ones are ignored.
        (" FINDINGS: First.\n\n FINDINGS: Second.\n\n FINDINGS:\n", {"findings": "Second."}),
        # A header right below a bare header is text.
        (" FINDINGS:\n CHEST: Clear.\n", {"findings": "CHEST: Clear."}),
        # A title with the views opens the findings; both may be under one header.
        (" PORTABLE AP VIEW: Clear.", {"findings": "Clear."}),
        (" FINDINGS/IMPRESSION: Clear.", {"impression": "Clear."}),
        (
            " CONCLUSION: Clear.\r\n\r\n COMPARISONS: None.\r\n",
            {"impression": "Clear.", "comparison": "None."},
        ),
        # Neither findings nor impression.
        (" WET READ: Done.\n\n COMPARISON: None.\n", {"wet read": "Done.", "comparison": "None."}),
        (" INDICATION: Cough.", {"indication": "Cough."}),
        ("", {}),
        ("FINDINGS: Clear.", {"findings": "Clear."}),
        # Words in capitals within a line, and masks, are not headers.
        (" FINDINGS: Tip in SVC: good.\n ___: seen.", {"findings": "Tip in SVC: good.\n ___: seen."}),
    ],
)
def test_reports_of_other_forms(report, expected):
    assert sections_of(report) == expected


def test_the_columns_are_those_of_the_published_sectioner():
    """Synthetic reports with the output of MIMIC-CXR's `create_section_files.py`."""
    rows = json.loads((Path(__file__).parent / "goldens" / "report_sections.json").read_text())
    assert len(rows) == 120
    for row in rows:
        found = columns(row["report"])
        assert found == {name: row[name] for name in COLUMNS if row[name]}, row["report"]


def test_an_addendum_above_the_report_is_no_part_of_it():
    addendum = " ADDENDUM\n IMPRESSION: The device is a port.\n"
    line = f" {'_' * 60}\n"
    assert sections_of(addendum + line + " FINDINGS: Clear.") == {"findings": "Clear."}
    # Without the word, or without text below, the line is decoration.
    assert sections_of(" FINDINGS: Clear.\n" + line + " IMPRESSION: Normal.")["impression"] == "Normal."
    assert sections_of(addendum + line)["impression"].startswith("The device")


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ("FINIDNGS", "findings"),
        ("IMOREssION".upper(), "impression"),
        ("COMPARRISON", "comparison"),
        ("REFERENCE EXAM", "comparison"),
        ("CHEST, TWO VIEWS", "findings"),
        ("COMPRESSION", "compression"),
        ("CLINICAL INDICATION", "clinical indication"),
        ("NDICATION", "ndication"),
    ],
)
def test_kinds_of_headers(header, kind):
    assert kind_of(header) == kind


_LINES = st.lists(
    st.sampled_from(
        [
            " FINDINGS: Clear.",
            " IMPRESSION:",
            "",
            " ",
            " Text here.",
            " " + "_" * 20,
            " ADDENDUM",
            " ___",
            "A:",
        ]
    )
    | st.text("AB: \r\n_.", max_size=12),
    max_size=12,
)


@given(_LINES)
@settings(max_examples=150, deadline=None)
def test_sections_are_runs_of_the_report_and_survive_the_table(lines):
    report = "\n".join(lines)
    found = sections_of(report)
    assert found == sections_of(report)
    words = " ".join(report.split())
    for text in found.values():
        assert text == text.strip() != "" and " ".join(text.split()) in words
