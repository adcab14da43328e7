"""Charts: markers lie where the axes say, themes and shapes; number formats."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilam3_jax.report import formatting, plots


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


def line_chart(*series, **options):
    return ElementTree.fromstring(plots.line_chart(series, title="t", y_label="loss", **options))


def marks(root):
    return [(float(mark.get("x")), float(mark.get("y"))) for mark in root.iter("use")]


def grid_lines(root, axis):
    """Tick label -> position of its grid line."""
    lines = [
        [float(number) for number in re.findall(r"[\d.]+", path.get("d"))]
        for path in root.iter("path")
        if "var(--line)" in path.get("style")
    ]
    anchor = {0: "middle", 1: "end"}[axis]
    labels = [t.text for t in root.iter("text") if f"text-anchor: {anchor}" in t.get("style")]
    return dict(zip(labels, [line[axis] for line in lines], strict=False))


def test_points_lie_where_the_axes_say():
    root = line_chart(plots.Series("held-out", [0, 50, 100], [4.0, 2.0, 1.0], "true"))
    grid = grid_lines(root, 1)
    (x0, y0), (x1, y1), (x2, y2) = marks(root)
    assert [y0, y1, y2] == pytest.approx([grid["4"], grid["2"], grid["1"]], abs=0.01)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.01)
    assert [t.text for t in root.iter("title")] == [
        f"held-out, step {x}: {y}" for x, y in ((0, 4), (50, 2), (100, 1))
    ]


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e6, 1e6)), min_size=1, max_size=30), st.booleans()
)
def test_marks_are_inside_the_chart(points, from_zero):
    xs, ys = zip(*sorted(points), strict=True)
    root = line_chart(plots.Series("a", xs, ys, "true"), from_zero=from_zero and min(ys) >= 0)
    assert len(marks(root)) == len(points)
    for x, y in marks(root):
        assert 3 <= x <= plots.WIDTH - 3 and 3 <= y <= plots.HEIGHT - 20


def test_an_axis_from_zero_starts_there():
    for values in ([5.0, 6.0], [0.0, 0.0]):
        assert (
            next(iter(grid_lines(line_chart(plots.Series("a", [1, 2], values, "true"), from_zero=True), 1)))
            == "0"
        )


def test_series_differ_in_shape_and_not_only_in_colour():
    shapes = set()
    for style in ("train", "part1", "part2", "part3", "part4", "true", "swapped"):
        root = line_chart(plots.Series("a", [1, 2], [1, 2], style))
        (line,) = [
            p
            for p in root.iter("path")
            if p.get("style").startswith("fill: none; stroke") and "--line" not in p.get("style")
        ]
        dashes = re.findall(r"dasharray: ([\d,]+)", line.get("style"))
        marker = [path.get("d") for path in root.iter("path") if path.get("id")]
        shapes.add((*dashes, *marker, re.findall(r"stroke-width: ([\d.]+)", line.get("style"))[0]))
    assert len(shapes) == 7


def test_charts_have_theme_colours_and_equal_bytes():
    series = [plots.Series("a", [1, 2], [1, 2], style) for style in plots._STYLES]
    dots = [plots.Dot("a", 0.5, (0.25, 0.75), strong=True), plots.Dot("b", 0.2, None, (0.1, 0.3))]
    for draw in (
        lambda: plots.line_chart(series, title="t", y_label="y"),
        lambda: plots.dot_chart(dots, title="t", x_label="x"),
        lambda: plots.key_mark.__wrapped__("swapped"),
    ):
        chart = draw()
        assert chart == draw()
        for colour in re.findall(r"(?:fill|stroke|color): ([^;\"]+)", chart):
            assert colour == "none" or colour.startswith("var(--")
        for text in ElementTree.fromstring(chart).iter("text"):
            assert "fill: var(--" in text.get("style") and "font-family: var(--sans)" in text.get("style")
        assert "<style" not in chart and "xmlns" not in chart and "url(" not in chart


def test_charts_are_named_and_keys_are_hidden_from_screen_readers():
    root = line_chart(plots.Series("a", [1, 2], [1, 2], "true"))
    assert (root.get("role"), root.get("aria-label")) == ("img", "t")
    assert ElementTree.fromstring(plots.key_mark("true")).get("aria-hidden") == "true"


def test_nothing_logged_is_said():
    chart = plots.line_chart([plots.Series("a", [], [], "train")], title="t", y_label="y")
    assert "Nothing was logged" in chart


@given(st.floats(0.0, 1e-3), st.integers(1, 3))
def test_charts_of_flat_and_single_values_are_drawn(value, count):
    svg = plots.line_chart(
        [plots.Series("a", list(range(count)), [value] * count, "train")], title="t", y_label="y"
    )
    ElementTree.fromstring(svg)
    assert "nan" not in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.25, "0.25"), (9999, "9999"), (15000, "15k"), (2.5e6, "2.5M"), (3e9, "3G")],
)
def test_tick_labels(value, text):
    assert plots.short(value) == text


def test_dot_chart_places_value_and_interval():
    dots = [
        plots.Dot("with <experts> $x_1$", 0.5, (0.25, 0.75), strong=True),
        plots.Dot("b", 0.0, None, (0.0, 1.0)),
    ]
    root = ElementTree.fromstring(plots.dot_chart(dots, title="t", x_label="percent"))
    grid = grid_lines(root, 0)
    ends = [
        x for x, _ in marks(root)
    ]  # two ends and the value of the first row, two parts and the value of the second
    assert ends == pytest.approx([grid[tick] for tick in ("25", "75", "50", "0", "100", "0")], abs=0.01)
    assert [title.text for title in root.iter("title")] == ["with <experts> $x_1$: 50 %", "b: 0 %"]
    assert "with <experts> $x_1$" in {text.text for text in root.iter("text")}


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
    assert formatting.duration(value) == expected


def test_numbers_in_words():
    assert formatting.whole(12345.4) == "12\u202f345" and formatting.whole(True) == "–"
    assert formatting.percent(0.125) == "12\u202f%" and formatting.points(-0.3) == "−30"
    assert formatting.size(3 << 29) == "1.5 GiB" and formatting.loss(None) == "–"
