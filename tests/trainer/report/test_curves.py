"""Charts are valid SVG whose lines lie where the numbers are, whatever stands in the labels."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from trainer.report.curves import Line, find_cuts, line_chart, thin, ticks

SVG = "{http://www.w3.org/2000/svg}"


def draw(lines, **options):
    text = line_chart("Title", lines, **{"x_label": "epochs", "y_label": "error (%)", **options})
    return ET.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def points(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", path.get("d"))]


def paths(svg, kind):
    return [path for path in svg.iter(f"{SVG}path") if kind in path.get("class").split()]


def test_a_line_runs_through_its_values_between_the_axes():
    (path,) = paths(
        draw([Line(np.array([0.0, 5.0, 10.0]), np.array([0.0, 50.0, 100.0]), "smooth", "a")], top=100.0), "smooth"
    )
    (x0, y0), (x1, y1), (x2, y2) = points(path)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert x0 < x2 <= 480 and 0 <= y2 < y0 <= 300


def test_unknown_values_are_gaps_and_not_zeros():
    y = np.array([1.0, np.nan, 3.0, 4.0])
    svg = draw([Line(np.arange(4.0), y, "points", "a")])
    (line,) = [path for path in paths(svg, "points") if "dot" not in path.get("class")]
    assert line.get("d").count("M") == 2 and line.get("d").count("L") == 1
    assert len(paths(svg, "dot")) == 3


def test_a_log_axis_gives_every_decade_the_same_room():
    y = np.array([1e-1, 1e-2, 1e-3])
    (path,) = paths(draw([Line(np.arange(1.0, 4.0), y, "smooth", "a")], log=True), "smooth")
    heights = [height for _, height in points(path)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.15) and heights[1] > heights[0]


def test_labels_are_text_whatever_they_hold():
    wild = '<script>alert(1)</script>"><img onerror=x>'
    line = Line(np.arange(3.0), np.arange(3.0), "points", wild)
    svg = draw([line], x_label=wild, y_label=wild, marks=[(1.0, wild, 0)], level=(1.0, wild))
    assert {node.tag for node in svg.iter()} <= {f"{SVG}{name}" for name in ("svg", "path", "text", "title")}
    assert sum(node.text == wild for node in svg.iter()) == 5  # both axes, the line, the mark, the level


@pytest.mark.parametrize("lines", [[], [Line(np.array([]), np.array([]), "raw", "a")],
                                   [Line(np.array([0.0]), np.array([np.nan]), "points", "a")],
                                   [Line(np.array([0.0]), np.array([0.0]), "smooth", "a")]])  # fmt: skip
@pytest.mark.parametrize("log", [False, True])
def test_nothing_to_draw_is_an_empty_chart(lines, log):
    svg = draw(lines, log=log)
    assert not [
        value for path in svg.iter(f"{SVG}path") for value in [path.get("d")] if "nan" in value or "inf" in value
    ]


def test_thinning_keeps_ends_of_the_range_and_order():
    generator = np.random.default_rng(0)
    x, y = np.arange(45_000.0), generator.normal(size=45_000)
    y[12_345], y[23_456], y[30_000:31_000] = 99.0, -99.0, np.nan
    kept_x, kept_y = thin(x, y, 600)
    assert len(kept_x) <= 600 and (np.diff(kept_x) > 0).all()
    assert np.nanmax(kept_y) == 99.0 and np.nanmin(kept_y) == -99.0
    assert thin(x[:600], y[:600], 600)[0] is not None and len(thin(x[:600], y[:600], 600)[0]) == 600


@pytest.mark.parametrize(
    ("high", "expected"),
    [
        (100, [0, 20, 40, 60, 80, 100]),
        (90, [0, 20, 40, 60, 80]),
        (7, [0, 2, 4, 6]),
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, [0]),
    ],
)
def test_ticks_are_round(high, expected):
    assert ticks(high) == pytest.approx(expected)


def rates(*values):
    return [{"step": 10 * (n + 1), "epoch": n + 1, "lr": value} for n, value in enumerate(values)]


def test_steps_of_the_rate_are_marked_and_a_falling_rate_is_not():
    cuts = find_cuts(rates(0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001), 1, "a")
    assert [(at, run) for at, _, run in cuts] == [(2.0, 1), (4.0, 1)]
    assert cuts[0][1] == "a: learning rate 0.01 → 0.001"
    cosine = 0.01 * (1 + np.cos(np.linspace(0, np.pi, 12))) / 2
    assert find_cuts(rates(*cosine.tolist()), 0, "a") == find_cuts([], 0, "a") == []
