"""The page's charts, as SVG that takes the page's colours and size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

from trainer.report.data import Record, Study
from trainer.report.pictures import Floats, list_values, smooth, steps_per_epoch

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 10, 26, 42
NUM_COLOURS = 5  # of the style sheet, c0 to c4
_MOST_RATIO = 1e5
MOST_POINTS = 600  # of a line: more are not seen at this size, and a page of many runs stays small
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")
_MARKERS = ("circle", "square", "up", "diamond", "down")


@dataclass(frozen=True, eq=False)
class Line:
    """A line of a chart: x (N,) rising, y (N,), NaN where unknown. `kind`: "raw" values, faint; a "smooth" line;
    "points", marked one by one. `colour`, `dash`: from 0, which of the page's; `run`: of which run, from 0."""

    x: Floats
    y: Floats
    kind: Literal["raw", "smooth", "points"]
    label: str
    colour: int = 0
    dash: int = 0
    run: int = 0


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    top: float | None = None,
    log: bool = False,
    marks: Sequence[tuple[float, str, int]] = (),
    level: tuple[float, str] | None = None,
) -> str:
    """An <svg> with all text escaped. y begins at 0 and ends at `top` (None: above all); `log`: both ends by the data.

    marks: (x, what, run), vertical lines; level: (y, what), a horizontal line.
    """
    known = [line for line in lines if np.isfinite(line.y).any()]
    x_end = max([float(line.x[-1]) for line in known] + [x for x, _, _ in marks], default=1.0) or 1.0
    values = [value for line in known for value in line.y[np.isfinite(line.y)].tolist() if not log or value > 0]
    low, high = (min(values, default=0.1), max(values, default=1.0)) if log else (0.0, max(values, default=1.0) or 1.0)
    if log:
        low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) - 1e-9)
        high = high if high > low else 10 * low
        low = max(low, high / _MOST_RATIO)  # the tail of a cosine is of no interest
    elif top is not None:
        high = top
    elif level is not None:
        high = max(high, level[0])

    def across(x: Floats) -> Floats:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / x_end

    def up(y: Floats) -> Floats:
        if log:
            with np.errstate(divide="ignore", invalid="ignore"):
                share = (np.log10(np.maximum(y, low / 10)) - math.log10(low)) / math.log10(high / low)
        else:
            share = y / high
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * np.clip(share, 0.0, 1.0)

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="16">{escape(title)}</text>',
    ]
    for value in _ticks_log(low, high) if log else ticks(high):
        y = float(up(np.array(value)))
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(x_end):
        x = float(across(np.array(value)))
        parts.append(f'<path class="grid" d="M{x:.1f} {_HEIGHT - _BOTTOM}v4"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{value:g}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="translate(13 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)"'
    parts.append(f'<text class="label" {turned} text-anchor="middle">{escape(y_label)}</text>')
    if level is not None:
        y = float(up(np.array(level[0])))
        parts.append(
            f'<path class="level" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"><title>{escape(level[1])}</title></path>'
        )
    for at, what, run in marks:
        x = float(across(np.array(at)))
        parts.append(
            f'<path class="mark run{run}" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"><title>{escape(what)}</title></path>'
        )
    for line in known:
        kept_x, kept_y = thin(line.x, line.y)
        parts += _draw(line, across(kept_x), up(kept_y), kept_x, kept_y)
    return "".join([*parts, "</svg>"])


def swatch(run: int) -> str:
    """A small <svg> of how a run's line and its marks look, for a legend."""
    dash = _DASHES[run % len(_DASHES)]
    style = f' stroke-dasharray="{dash}"' if dash else ""
    look = f"c{run % NUM_COLOURS}"
    return (
        '<svg class="chart swatch" viewBox="0 0 44 14" aria-hidden="true">'
        f'<path class="smooth {look}"{style} d="M0 7H44"/>'
        f'<path class="dot {look}" d="{_marker(run, 22, 7)}"/></svg>'
    )


def _draw(line: Line, across: Floats, up: Floats, x: Floats, y: Floats) -> list[str]:
    look = f"{line.kind} c{line.colour % NUM_COLOURS} run{line.run}"
    dash = _DASHES[line.dash % len(_DASHES)] if line.kind == "smooth" else "1 4" if line.kind == "points" else ""
    style = f' stroke-dasharray="{dash}"' if dash else ""
    drawn = [f'<path class="{look}"{style} d="{_path(across, up, y)}"><title>{escape(line.label)}</title></path>']
    if line.kind == "points" or np.isfinite(y).sum() == 1:
        drawn += [
            f'<path class="dot {look}" d="{_marker(line.dash, a, b)}">'
            f"<title>{escape(line.label)}: {value:.4g} at {at:.4g}</title></path>"
            for a, b, at, value in zip(across.tolist(), up.tolist(), x.tolist(), y.tolist(), strict=True)
            if math.isfinite(value)
        ]
    return drawn


def _path(across: Floats, up: Floats, y: Floats) -> str:
    """Straight between neighbours that are both known."""
    words, pen = [], "M"
    for a, b, is_known in zip(across.tolist(), up.tolist(), np.isfinite(y).tolist(), strict=True):
        if is_known:
            words.append(f"{pen}{a:.1f} {b:.1f}")
        pen = "L" if is_known else "M"
    return "".join(words)


def _marker(number: int, x: float, y: float) -> str:
    shape = _MARKERS[number % len(_MARKERS)]
    if shape == "circle":
        return f"M{x - 3.5:.1f} {y:.1f}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z"
    if shape == "square":
        return f"M{x - 3.2:.1f} {y - 3.2:.1f}h6.4v6.4h-6.4z"
    if shape == "diamond":
        return f"M{x:.1f} {y - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z"
    sign = 1 if shape == "up" else -1
    return f"M{x:.1f} {y - 4.5 * sign:.1f}l4.2 {7.5 * sign:.1f}h-8.4z"


def thin(x: Floats, y: Floats, most: int = MOST_POINTS) -> tuple[Floats, Floats]:
    """At most `most` of the points of a line: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(x) <= most:
        return x, y
    kept = []
    for stretch in np.array_split(np.arange(len(x)), most // 2):
        part = np.where(np.isfinite(y[stretch]), y[stretch], np.nan)
        if np.isnan(part).all():
            kept.append(int(stretch[0]))
        else:
            kept += sorted({int(stretch[np.nanargmin(part)]), int(stretch[np.nanargmax(part)])})
    return x[kept], y[kept]


def ticks(high: float) -> list[float]:
    """Three to six round numbers from 0 to at most `high`."""
    if not high > 0 or not math.isfinite(high):
        return [0.0]
    rough = high / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * (1 - 1e-9))
    return [round(step * number, 12) for number in range(int(high / step + 1e-9) + 1)]


def _ticks_log(low: float, high: float) -> list[float]:
    first, last = round(math.log10(low)), round(math.log10(high))
    return [10.0**power for power in range(first, last + 1, max(1, (last - first) // 5))]


_STEP_DOWN = 2 / 3


def draw_learning(studies: Sequence[Study], labels: Sequence[str]) -> list[str]:
    """Charts over epochs, as <svg>: top-1 error, top-5 error, loss, learning rate."""
    charts = []
    marks = [mark for run, study in enumerate(studies) for mark in find_cuts(study.records("train"), run, labels[run])]
    known = {study.num_classes for study in studies}
    num_classes = known.pop() if len(known) == 1 else None
    for title, field, unit in (
        ("Top-1 error", "top1_error", "error (%)"),
        ("Top-5 error", "top5_error", "error (%)"),
        ("Loss", "loss", "cross-entropy (nats)"),
    ):
        lines: list[Line] = []
        for run, (study, label) in enumerate(zip(studies, labels, strict=True)):
            lines += _lines(study, label, field, run, is_alone=len(studies) == 1)
        level = None
        if num_classes and num_classes > 1 and field != "top5_error":
            guess = 100 * (1 - 1 / num_classes) if field == "top1_error" else float(np.log(num_classes))
            level = (guess, f"guessing: {guess:.4g}")
        top = 100.0 if field == "top1_error" else None
        charts.append(line_chart(title, lines, x_label="epochs", y_label=unit, top=top, marks=marks, level=level))
    rates = [
        Line(_epochs(study), list_values(study.records("train"), "lr"), "smooth", label, run, run, run)
        for run, (study, label) in enumerate(zip(studies, labels, strict=True))
    ]
    return [*charts, line_chart("Learning rate", rates, x_label="epochs", y_label="rate", log=True)]


def draw_speed(studies: Sequence[Study], labels: Sequence[str]) -> list[str]:
    """Charts over the time spent training, as <svg>: images/s, share of the time spent waiting for data."""
    longest_s = max(
        (study.records("train")[-1]["time_s"] or 0.0 for study in studies if study.records("train")), default=0.0
    )
    unit, size_s = ("hours", 3600.0) if longest_s > 7200 else ("minutes", 60.0)
    charts = []
    for title, field, y_label, factor, top in (
        ("Throughput", "images_per_s", "images/s", 1.0, None),
        ("Waiting for data", "data_wait_fraction", "share of the time (%)", 100.0, 100.0),
    ):
        lines: list[Line] = []
        for run, (study, label) in enumerate(zip(studies, labels, strict=True)):
            train = study.records("train")
            if train:
                x, y = list_values(train, "time_s") / size_s, factor * list_values(train, field)
                lines += [
                    Line(x, y, "raw", f"{label}, as logged", run, run, run),
                    Line(x, smooth(y), "smooth", f"{label}, running mean", run, run, run),
                ]
        charts.append(line_chart(title, lines, x_label=f"{unit} of training", y_label=y_label, top=top))
    return charts


def _lines(study: Study, label: str, field: str, run: int, *, is_alone: bool) -> list[Line]:
    train, per_epoch = study.records("train"), steps_per_epoch(study.metrics)
    centre = [record for record in study.records("eval") if record["crops"] == "centre"]
    lines = []
    if train:
        y = list_values(train, field)
        lines += [
            Line(_epochs(study), y, "raw", f"{label}, training, as logged", run, run, run),
            Line(_epochs(study), smooth(y), "smooth", f"{label}, training, running mean", run, run, run),
        ]
    if centre:
        x, colour = list_values(centre, "step") / per_epoch, 1 if is_alone else run
        lines.append(
            Line(x, list_values(centre, field), "points", f"{label}, validation, centre crop", colour, run, run)
        )
    return lines


def _epochs(study: Study) -> Floats:
    return list_values(study.records("train"), "step") / steps_per_epoch(study.metrics)


def find_cuts(train: Sequence[Record], run: int, label: str) -> list[tuple[float, str, int]]:
    """Where the learning rate stepped down: (epochs, what, run)."""
    cuts: list[tuple[float, str, int]] = []
    if not train:
        return cuts
    per_epoch = steps_per_epoch(train)
    rates = list_values(train, "lr")
    for place in range(1, len(rates)):
        old, new = rates[place - 1], rates[place]
        is_level = rates[max(place - 2, 0)] == old and rates[min(place + 1, len(rates) - 1)] == new
        if new < _STEP_DOWN * old and is_level:
            at = train[place - 1]["step"] / per_epoch
            cuts.append((at, f"{label}: learning rate {old:g} → {new:g}", run))
    return cuts
