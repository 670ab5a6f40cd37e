"""The charts of a report: what runs learned over epochs, how fast, and how long they waited.

The decision that shaped it: of one run, training and validation differ in colour; of several, runs do, and validation
is told by its markers. A line marks where the learning rate falls from one level to less than two thirds of it,
whatever schedule it was; one that falls all the time has no steps to mark. Left out: how a chart is drawn
(svgchart.py).
"""

from collections.abc import Sequence

import numpy as np

from trainer.report.data import Record, Study
from trainer.report.figures import Floats, list_values, smooth, steps_per_epoch
from trainer.report.svgchart import Line, line_chart

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
