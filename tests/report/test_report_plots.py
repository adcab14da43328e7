"""Charts: ticks cover the data, marks lie where the values say, smoothing keeps the mean."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilam3_jax.report import captions, plots

NUMBERS = st.floats(-1e6, 1e6)


@given(NUMBERS, NUMBERS)
def test_ticks_cover_the_range_with_equal_steps(a, b):
    low, high = min(a, b), max(a, b)
    if 0 < high - low < 1e-6 * max(abs(low), abs(high)):
        return  # steps below the resolution of a float
    found = plots.ticks(low, high)
    slack = 1e-6 * (found[1] - found[0])
    assert found[0] <= low + slack and found[-1] >= high - slack
    assert 2 <= len(found) <= 12
    steps = [y - x for x, y in itertools.pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=200))
def test_smoothing_stays_within_the_values(values):
    smooth = plots.smooth(values)
    assert len(smooth) == len(values)
    assert min(values) - 1e-6 <= min(smooth) and max(smooth) <= max(values) + 1e-6
    assert smooth[0] == pytest.approx(values[0], abs=1e-6) and smooth[-1] == pytest.approx(
        values[-1], abs=1e-6
    )


def test_smoothing_keeps_a_straight_line():
    assert plots.smooth([2.0 * i for i in range(100)]) == pytest.approx([2.0 * i for i in range(100)])


def test_points_lie_where_the_axes_say():
    series = [plots.Series("held-out", [0, 50, 100], [4.0, 2.0, 1.0], "true")]
    svg = plots.line_chart(series, title="t", x_label="step", y_label="loss")
    root = ElementTree.fromstring(svg)
    marks = [(float(m.get("cx")), float(m.get("cy"))) for m in root.iter("circle")]
    ticks = {t.text: float(t.get("y")) - 3.5 for t in root.iter("text") if t.get("text-anchor") == "end"}
    assert [y for _, y in marks] == pytest.approx([ticks["4"], ticks["2"], ticks["1"]], abs=0.2)
    assert marks[1][0] == pytest.approx((marks[0][0] + marks[2][0]) / 2, abs=0.2)
    assert "held-out, step 50: 2" in svg


def test_series_differ_in_shape_and_not_only_in_colour():
    one = plots.line_chart([plots.Series("a", [1, 2], [1, 2], "true")], title="t", x_label="x", y_label="y")
    two = plots.line_chart(
        [plots.Series("a", [1, 2], [1, 2], "swapped")], title="t", x_label="x", y_label="y"
    )
    assert "<circle" in one and "<circle" not in two and 'class="mark swapped"' in two


def test_nothing_logged_is_said():
    chart = plots.line_chart([plots.Series("a", [], [], "train")], title="t", x_label="x", y_label="y")
    assert "Nothing was logged" in chart


@given(st.floats(0.0, 1e-3), st.integers(1, 3))
def test_charts_of_flat_and_single_values_are_drawn(value, count):
    svg = plots.line_chart(
        [plots.Series("a", list(range(count)), [value] * count, "train")], title="t", x_label="x", y_label="y"
    )
    ElementTree.fromstring(svg)
    assert "nan" not in svg


def test_dot_chart_places_value_and_interval():
    dots = [
        plots.Dot("with <experts>", 0.5, (0.25, 0.75), strong=True),
        plots.Dot("b", 0.0, None, (0.0, 1.0)),
    ]
    root = ElementTree.fromstring(plots.dot_chart(dots, title="t", x_label="percent"))
    x = {t.text: float(t.get("x")) for t in root.iter("text")}
    values = [float(c.get("cx")) for c in root.iter("circle") if c.get("class").startswith("value")]
    assert values == pytest.approx([x["50"], x["0"]], abs=0.1)
    parts = [float(c.get("cx")) for c in root.iter("circle") if c.get("class") == "part"]
    assert parts == pytest.approx([x["0"], x["100"]], abs=0.1)
    (whisker,) = [p.get("d") for p in root.iter("path") if p.get("class").startswith("whisker")]
    assert float(re.match(r"M([\d.]+)", whisker)[1]) == pytest.approx(x["25"], abs=0.1)
    assert "with <experts>" in x


@pytest.mark.parametrize("vertical", [True, False])
def test_pipeline_is_inside_its_picture(vertical):
    root = ElementTree.fromstring(plots.pipeline(vertical=vertical))
    width, height = map(float, root.get("viewBox").split()[2:])
    for box in root.iter("rect"):
        assert float(box.get("x")) + float(box.get("width")) <= width
        assert float(box.get("y")) + float(box.get("height")) <= height
    said = {text.text for text in root.iter("text")}
    assert {"Samples", "Experts, offline", "Data", "Five runs", "Evaluation"} <= said


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3.21, "3.2 s"),
        (48.4, "48 s"),
        (725, "12 min 5 s"),
        (3780, "1 h 3 min"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_durations(value, expected):
    assert captions.duration(value) == expected


def test_numbers_in_words():
    assert captions.count(12345.4) == "12\u202f345" and captions.count(True) == "–"
    assert captions.percent(0.125) == "12\u202f%" and captions.points(-0.3) == "−30"
    assert captions.size(3 << 29) == "1.5 GiB" and captions.loss(None) == "–"
