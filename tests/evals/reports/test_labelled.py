"""Scorers on given labels, graphs and analyses, against published values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilam3_jax.errors import UserError
from vilam3_jax.evals.reports import graphs, green, labels


def states(*rows, default="blank"):
    """Rows of finding → state."""
    return [[row.get(name, default) for name in labels.FINDINGS_14] for row in rows]


def test_published_label_scores():
    """Labels that give the published values: 2 true positives and 7 errors, of these 1 and 4 in five."""
    given_ = states(
        {"Edema": "positive"},
        {"Support Devices": "positive", "Fracture": "negative"},
        {"Support Devices": "uncertain"},
        {"Cardiomegaly": "positive", "Atelectasis": "positive"},
        {"Pleural Effusion": "positive", "Pneumonia": "positive"},
    )
    wanted = states(
        {"Edema": "uncertain"},
        {"Support Devices": "positive"},
        {"No Finding": "positive"},
        {},
        {"Consolidation": "positive"},
    )
    statistics = labels.label_statistics(labels.presence(wanted), labels.presence(given_))
    found = {name: round(float(value), 4) for name, value in labels.label_value(statistics.sum(0)).items()}
    assert found == {
        "accuracy": 0.6,
        "micro_f1_14": 0.3636,
        "macro_f1_14": 0.119,
        "micro_f1_5": 0.3333,
        "macro_f1_5": 0.2,
    }


def test_uncertain_labels():
    rows = states({"Edema": "uncertain", "Fracture": "negative", "Pneumonia": "positive"})
    assert labels.presence(rows).sum() == 2
    assert labels.presence(rows, uncertain="negative").sum() == 1
    with pytest.raises(ValueError, match="choose 'positive' or 'negative'"):
        labels.presence(rows, uncertain="ignore")
    with pytest.raises(ValueError, match="row 0"):
        labels.presence([["maybe"] * 14])


def test_label_scores_count_by_count():
    rng = np.random.default_rng(0)
    wanted, given_ = rng.random((2, 60, 14)) < 0.3
    found = labels.label_value(labels.label_statistics(wanted, given_).sum(0))
    each = []
    for finding in range(14):
        pairs = list(zip(wanted[:, finding], given_[:, finding], strict=True))
        precision = pairs.count((True, True)) / given_[:, finding].sum()
        recall = pairs.count((True, True)) / wanted[:, finding].sum()
        each.append(2 * precision * recall / (precision + recall))
    assert found["macro_f1_14"] == pytest.approx(np.mean(each), rel=1e-12)
    five = [each[labels.FINDINGS_14.index(name)] for name in labels.FINDINGS_5]
    assert found["macro_f1_5"] == pytest.approx(np.mean(five), rel=1e-12)


def test_label_scores_of_bootstrap_samples():
    rng = np.random.default_rng(1)
    statistics = labels.label_statistics(*(rng.random((2, 30, 14)) < 0.3))
    drawn = rng.integers(30, size=(4, 30))
    together = labels.label_value(statistics[drawn].sum(1))
    for row, indices in enumerate(drawn):
        alone = labels.label_value(statistics[indices].sum(0))
        assert {name: value[row] for name, value in together.items()} == alone
    with pytest.raises(ValueError, match=r"\[n, 14\]"):
        labels.label_statistics(np.zeros((2, 5)), np.zeros((2, 5)))


def graph(*entities):
    """(tokens, label, relations as (kind, number of the entity))."""
    return {
        "entities": {
            str(number): {
                "tokens": tokens,
                "label": label,
                "relations": [[k, str(to)] for k, to in relations],
            }
            for number, (tokens, label, relations) in enumerate(entities, 1)
        }
    }


ANATOMY, PRESENT, ABSENT = "ANAT-DP", "OBS-DP", "OBS-DA"
EFFUSION = graph(("Pleural", ANATOMY, []), ("effusion", PRESENT, [("located_at", 1)]))
NO_EFFUSION = graph(("pleural", ANATOMY, []), ("effusion", ABSENT, [("located_at", 1)]))


def edema(severity):
    return graph(
        (severity, PRESENT, [("modify", 3)]),
        ("pulmonary", ANATOMY, []),
        ("edema", PRESENT, [("located_at", 2)]),
    )


def test_published_graph_scores():
    """Negation 0.50, severity 0.67, paraphrase 0.00, equal texts 1.00."""
    paraphrase = graph(
        ("cardiac", ANATOMY, []), ("silhouette", ANATOMY, [("modify", 1)]), ("enlarged", PRESENT, [])
    )
    cardiomegaly = graph(("mild", PRESENT, [("modify", 2)]), ("cardiomegaly", PRESENT, []))
    pairs = [
        (NO_EFFUSION, EFFUSION),
        (edema("mild"), edema("severe")),
        (cardiomegaly, paraphrase),
        (EFFUSION, EFFUSION),
    ]
    simple = graphs.radgraph_f1(*zip(*pairs, strict=True))[:, 0]
    assert simple.round(2).tolist() == [0.5, 0.67, 0, 1]


def test_levels_of_graphs():
    """Without its relation, an entity matches at the simple level only; with another, not completely."""
    bare = graph(("pleural", ANATOMY, []), ("effusion", PRESENT, []))
    other = graph(("pleural", ANATOMY, []), ("effusion", PRESENT, [("modify", 1)]))
    assert graphs.radgraph_f1([EFFUSION] * 2, [bare, other]).tolist() == [[1, 0.5, 0.5], [1, 1, 0.5]]
    assert graphs.radgraph_f1([EFFUSION, graph()], [graph(), graph()]).tolist() == [[0] * 3] * 2


def test_bad_graphs():
    with pytest.raises(UserError, match=r"annotation 0: KeyError\('7'\)"):
        graphs.radgraph_f1([graph(("a", ANATOMY, [("modify", 7)]))], [graph()])
    with pytest.raises(UserError, match=r"annotation 0: KeyError\('entities'\)"):
        graphs.radgraph_f1([graph()], [{}])
    with pytest.raises(ValueError, match="1 references for 2"):
        graphs.radgraph_f1([graph()], [graph()] * 2)


def analysis(matched, significant):
    errors = "\n".join(
        f"({letter}) A kind of error: {n}." for letter, n in zip("abcdef", significant, strict=True)
    )
    return (
        f"[Explanation]:\nThe candidate differs (a) twice: 7.\n\n[Clinically Significant Errors]:\n"
        f"{errors}\n\n[Clinically Insignificant Errors]:\n(a) A kind of error: 9.\n\n[Matched Findings]:"
        f"\n{matched}\n"
    )


PUBLISHED = [
    ("0.", (3, 3, 0, 0, 0, 0), 0),
    ("1. Clear lungs", (2, 2, 1, 0, 0, 0), 0.1667),
    ("2. Clear lungs; no effusion", (0, 4, 0, 0, 0, 0), 0.3333),
    ("1", (0, 0, 0, 1, 0, 0), 0.5),
    ("1. Normal heart", (1, 1, 0, 0, 0, 1), 0.25),
]


def test_published_green_scores():
    found = green.green([analysis(matched, errors) for matched, errors, _ in PUBLISHED])
    assert found.items.round(4).tolist() == [score for *_, score in PUBLISHED]
    assert found.unscored == ()
    assert green.parse(analysis(*PUBLISHED[1][:2])) == green.Analysis(1, (2, 2, 1, 0, 0, 0))


def test_green_counts_what_it_cannot_read():
    readable = analysis("2.", (0,) * 6)
    found = green.green([readable, "I cannot compare these.", readable, "[Matched Findings]: 3"])
    assert (found.mean, found.unscored) == (0.5, (1, 3))
    with pytest.raises(ValueError, match="no analyses"):
        green.green([])


def test_green_without_counts():
    text = "[Clinically Significant Errors]: None\n[Matched Findings]:\nNo matched findings."
    assert green.parse(text) == green.Analysis(0, (0,) * 6)
    assert green.parse(text.replace("No matched", "Many")) is None
    assert green.parse(text.replace("None", "many")) is None


@given(st.text() | st.text().map(lambda text: analysis(text, (1,) * 6)))
def test_green_reads_any_text(text):
    found = green.parse(text)
    assert found is None or 0 <= found.score <= 1
