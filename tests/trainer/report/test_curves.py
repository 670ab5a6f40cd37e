"""The page's charts are SVG whose lines lie where the numbers are, in the page's colours, whatever labels hold."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from trainer.report import page
from trainer.report.curves import LEARNING, SPEED, chart_figure, thin
from trainer.report.pictures import shorten, swatch_figure, to_svg

TOP1, _, LOSS, RATE = LEARNING


def train(step, epoch, **changed):
    record = {"step": step, "epoch": epoch, "loss": 2.0, "top1_error": 80.0, "top5_error": 30.0, "lr": 0.01}
    return {"kind": "train", **record, "images_per_s": 200.0, "data_wait_fraction": 0.01, "time_s": 1.0, **changed}


def evaluation(epoch, **changed):
    record = {"step": 10 * epoch, "epoch": epoch, "crops": "centre", "num_images": 200}
    return {"kind": "eval", **record, "loss": 1.5, "top1_error": 60.0, "top5_error": 20.0, **changed}


def rates(*values):
    return [train(10 * epoch, epoch, lr=rate) for epoch, rate in enumerate(values, start=1)]


def draw(chart, *runs, num_classes=None, names="abc"):
    named = dict(zip(names, runs, strict=False))
    return ET.fromstring(to_svg(chart_figure(chart, named, num_classes), chart.title))


def groups(svg, *classes):
    return [group for group in svg.iter("g") if set(classes) <= set(group.get("class", "").split())]


def points(group):
    (path,) = [path for path in group.iter("path") if path.get("clip-path")]
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d"))], path.get("d")


def test_a_line_runs_through_its_values_within_the_picture():
    svg = draw(TOP1, [train(10 * n, n, top1_error=value) for n, value in enumerate((0.0, 50.0, 100.0), start=1)])
    ((x0, y0), (x1, y1), (x2, y2)), _ = points(groups(svg, "smooth")[0])
    _, _, width, height = map(float, svg.get("viewBox").split())
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert 0 <= x0 < x2 <= width and 0 <= y2 < y0 <= height


def test_unknown_values_are_gaps_and_not_zeros_and_every_dot_tells_its_value():
    known = (80.0, None, 40.0, 30.0)
    svg = draw(TOP1, [evaluation(epoch, top1_error=error) for epoch, error in enumerate(known, start=1)])
    (group,) = groups(svg, "points")
    _, path = points(group)
    assert path.count("M") == 2 and path.count("L") == 1
    said = [marker.find("title").text for marker in group.iter("use")]
    assert said == [f"validation, centre crop: {value}" for value in ("80 at 1", "40 at 3", "30 at 4")]


def test_a_log_axis_gives_every_decade_the_same_room():
    (places, _) = points(groups(draw(RATE, rates(1e-1, 1e-2, 1e-3)), "smooth")[0])
    heights = [height for _, height in places]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.15) and heights[1] > heights[0]
    assert {"0.1", "0.01", "0.001"} <= {text.text for text in draw(RATE, rates(1e-1, 1e-2, 1e-3)).iter("text")}


def test_labels_are_text_whatever_they_hold():
    wild = '<script>a(1)</script>"><img onerror=x>\x00$\\frac{#0072b2'
    cut = {"kind": "event", "name": "lr_cut", "step": 10, "epoch": 1, "text": wild}
    svg = draw(TOP1, [train(10, 1), cut, evaluation(1)], rates(0.1), names=[wild, "b"])
    known = {"svg", "g", "path", "text", "title", "defs", "use", "clipPath", "rect"}
    assert {node.tag for node in svg.iter()} <= known
    titles = [title.text for title in svg.iter("title")]
    assert {text.split(", ")[0] for text in titles if "script" in text} == {shorten(wild, 40)}
    assert sum(text.endswith(shorten(wild, 40)) for text in titles) == 1  # the cut


@pytest.mark.parametrize("metrics", [[], rates(0.0), [train(0, 0)], [evaluation(1, top1_error=None, loss=None)],
                                     [train(10, 1, lr=None, images_per_s=None, time_s=None)]])  # fmt: skip
@pytest.mark.parametrize("chart", LEARNING + SPEED, ids=lambda chart: chart.field)
def test_nothing_to_draw_is_an_empty_chart(metrics, chart):
    svg = draw(chart, metrics, num_classes=4)
    assert not [path for path in svg.iter("path") if re.search("nan|inf", path.get("d", ""), re.IGNORECASE)]


@pytest.mark.parametrize("chart", LEARNING[:3] + SPEED, ids=lambda chart: chart.field)
def test_no_dot_is_cut_at_the_top_however_flat_a_line_is(chart):
    flat = {"images_per_s": 52.0, "data_wait_fraction": 1.0, "top1_error": 100.0, "top5_error": 53.0, "loss": 2.3}
    run = [train(10, 1, **flat), train(20, 2, **flat), evaluation(1, top1_error=100.0, top5_error=53.3, loss=2.3)]
    axes = chart_figure(chart, {"a": run}).axes[0]
    highest = max(max(line.get_ydata()) for line in axes.lines)
    assert axes.get_ylim()[0] == 0 and highest <= axes.get_ylim()[1] / 1.015


def test_a_value_that_stands_alone_is_a_dot():
    (group,) = groups(draw(TOP1, rates(0.1)), "smooth")
    assert len(list(group.iter("use"))) == 1


def test_thinning_keeps_ends_of_the_range_and_order():
    generator = np.random.default_rng(0)
    x, y = np.arange(45_000.0), generator.normal(size=45_000)
    y[12_345], y[23_456], y[30_000:31_000] = 99.0, -99.0, np.nan
    kept_x, kept_y = thin(x, y, 600)
    assert len(kept_x) <= 600 and (np.diff(kept_x) > 0).all()
    assert np.nanmax(kept_y) == 99.0 and np.nanmin(kept_y) == -99.0
    assert np.isnan(kept_y).any()
    assert len(thin(x[:600], y[:600], 600)[0]) == 600


def test_cuts_of_the_rate_are_marked_in_the_charts_of_what_they_change():
    cut = {"kind": "event", "name": "lr_cut", "step": 20, "epoch": 2, "text": "rate 0.001 from epoch 3"}
    run = [*rates(0.01, 0.01, 0.001), cut, {**cut, "step": 30, "text": "rate 0.0001 from epoch 4"}]
    for chart in LEARNING[:3]:
        said = [group.find("title").text for group in groups(draw(chart, run), "mark", "run0")]
        assert said == ["rate 0.001 from epoch 3", "rate 0.0001 from epoch 4"]
    assert groups(draw(RATE, run), "mark") == groups(draw(TOP1, rates(0.01, 0.001)), "mark") == []


def test_a_chart_takes_its_size_from_the_page_and_its_colours_from_the_style_sheet():
    runs = [[*rates(0.1, 0.1), evaluation(1), evaluation(2, crops="ten")] for _ in range(5)]
    declared = set(re.findall(r"--([\w-]+): #", page._TEMPLATE.read_text(encoding="utf-8")))
    for chart in LEARNING + SPEED:
        svg = draw(chart, *runs, names="abcde", num_classes=10)
        assert set(svg.attrib) == {"class", "viewBox", "role", "aria-label"}
        style = " ".join(node.get("style", "") for node in svg.iter())
        used = set(re.findall(r"var\(--([\w-]+)\)", style))
        assert used <= declared and {"ink", "rule", "c0", "c4"} <= used
        assert not re.search("#[0-9a-f]{3}", style.replace("url(#", "")), "a colour that dark mode does not change"
        assert any(text.text == chart.unit for text in svg.iter("text"))  # letters, and not their outlines


def test_charts_on_one_page_share_no_ids_and_the_same_runs_give_the_same_bytes():
    run = [*rates(0.1, 0.1), evaluation(1)]
    drawn = [to_svg(chart_figure(chart, {"a": run}), chart.title) for chart in LEARNING + SPEED]
    drawn += [to_svg(swatch_figure(number), f"run {number}") for number in range(3)]
    ids = [name for text in drawn for name in re.findall(r' id="([^"]+)"', text)]
    assert len(ids) == len(set(ids)) > 6
    for text in drawn:  # what is referred to is there
        assert set(re.findall(r'(?:href="|url\()#(\w+)', text)) <= set(re.findall(r' id="([^"]+)"', text))
    assert drawn[0] == to_svg(chart_figure(TOP1, {"a": run}), TOP1.title)
