"""VILA-M3's cleaning rules, one by one, and sections."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilam3_jax.evals.reports import cleaning


@pytest.mark.parametrize(
    "report,cleaned",
    [
        ("The heart is\nnormal.  No   effusion.", "The heart is normal. No effusion."),
        ("A 1.5 cm nodule is seen.Stable film.", "A 1.5 cm nodule is seen. Stable film."),
        (
            "Seen at 5 a.m. by Dr. Doe. Film at 6 p.m. today!",
            "Seen at 5 a.m. by Dr. Doe. Film at 6 p.m. today.",
        ),
        ("FINDINGS: Lungs: clear today.", "Lungs: clear today."),
        ("1) the heart is large", "The heart is large."),
        ("Clear. Stable. Stabler.", "Stabler."),
        ("No change. No change.", "No change."),
        ("no change. No change.", "No change."),
        ("Is this an effusion? No effusion.", "No effusion."),
        ("123456789. ---.", ""),
        ("", ""),
    ],
)
def test_rules(report, cleaned):
    assert cleaning.clean(report) == cleaned


@given(st.text())
def test_any_text(text):
    cleaned = cleaning.clean(text)
    assert "\n" not in cleaned and "?" not in cleaned
    assert not cleaned or cleaned.endswith(".")


def test_cleaned_reports_stay_as_they_are(findings):
    """The rules do not apply twice, but for abbreviations at the end of a sentence."""
    cleaned = [cleaning.clean(one) for one in findings]
    assert sum(cleaning.clean(one) != one for one in cleaned) < len(cleaned) / 100
    assert sum(bool(one) for one in cleaned) > 0.99 * len(cleaned)


def test_sections():
    report = " EXAMINATION: Chest.\n FINDINGS: Lungs are clear.\n IMPRESSION: Normal.\n"
    assert cleaning.findings(report) == "Lungs are clear."
    assert cleaning.findings_and_impression(report) == "Lungs are clear. Normal."
    assert cleaning.findings_and_impression(" IMPRESSION: Normal.") == "Normal."
    assert cleaning.findings("Lungs are clear.") == ""
