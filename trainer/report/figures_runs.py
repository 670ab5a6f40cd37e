"""Several runs in one picture: the paper's figure 1 (training error, ReLU or tanh), and training beside validation.

The decision that shaped it: runs are told apart by the fields of their recipes that differ and by nothing else, so a
comparison says itself what it compares. Left out: one run alone (figures.py).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.report.drawing import BLUE, DASHES, GREEN, GREY, ORANGE, PURPLE, VERMILION, shorten, style, write_png
from trainer.report.figures import Floats, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_LEVEL = 25.0  # %, paper, figure 1: the training error by which the two non-linearities are compared
_LABEL_LETTERS = 40
_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE)
_MARKERS = ("o", "s", "^", "D", "v")


def name_runs(names: Sequence[str], recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each run: the recipe's fields in which they differ, or the runs' own names where that tells nothing.

    `recipes`: as config.json holds them; a field that one does not have counts as None.
    """
    known = sorted({field for recipe in recipes for field in recipe} - {"name", "epochs"})
    differing = [field for field in known if len({str(recipe.get(field)) for recipe in recipes}) > 1]
    labels = [", ".join(_spell(field, recipe.get(field)) for field in differing[:3]) for recipe in recipes]
    return labels if all(labels) and len(set(labels)) == len(labels) else list(names)


def _spell(field: str, value: object) -> str:
    return str(value) if field == "activation" else f"{field} {value}".lower()


def training_error(metrics: Sequence[Record], field: str = "top1_error") -> tuple[Floats, Floats]:
    """Epochs (N,) and each one's training error (N,), %: the mean over its steps, also of an epoch under way.

    `field`: another one of the records of training, such as "loss".
    """
    sums: dict[int, tuple[float, int]] = {}
    before = 0
    for record in metrics:
        if record["kind"] == "train":
            weight, before = record["step"] - before, record["step"]
            if record[field] is not None:
                total, count = sums.get(record["epoch"], (0.0, 0))
                sums[record["epoch"]] = total + weight * record[field], count + weight
    known = sorted((epoch, total / count) for epoch, (total, count) in sums.items() if count)
    return np.array([e for e, _ in known], dtype=np.float64), np.array([error for _, error in known], dtype=np.float64)


def first_reached(epochs: Floats, errors: Floats, level: float) -> float | None:
    """When the error first is at `level` or below, in epochs, straight between measurements; None: not yet."""
    for index, (epoch, error) in enumerate(zip(epochs.tolist(), errors.tolist(), strict=True)):
        if error <= level:
            if index == 0:
                return epoch
            before, higher = float(epochs[index - 1]), float(errors[index - 1])
            return before + (epoch - before) * (higher - level) / (higher - error)
    return None


def common_level(curves: Sequence[tuple[Floats, Floats]]) -> float:
    """The paper's 25 % where every run reaches it, else the lowest multiple of 5 % that every run reaches."""
    lowest = max(float(errors.min()) for _, errors in curves)
    return PAPER_LEVEL if lowest <= PAPER_LEVEL else min(100.0, 5.0 * math.ceil(lowest / 5.0))


def plot_training_errors(runs: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Write `training_errors_figure` as a PNG, atomically."""
    with style():
        write_png(training_errors_figure(runs), path)


def training_errors_figure(runs: Mapping[str, Sequence[Record]]) -> "Figure":
    """The paper's figure 1: top-1 training error over epochs of runs by label, and when each comes to one level."""
    from matplotlib.figure import Figure

    curves = {label: training_error(metrics) for label, metrics in runs.items()}
    curves = {label: curve for label, curve in curves.items() if len(curve[0])}
    with style():
        figure = Figure(figsize=(9.0, 5.4), layout="constrained")
        axes = figure.subplots()
        level = common_level(list(curves.values())) if curves else PAPER_LEVEL
        axes.axhline(level, color=GREY, linestyle=":", linewidth=1.4)
        for number, (label, (epochs, errors)) in enumerate(curves.items()):
            colour, dash, marker = _look(number)
            reached = first_reached(epochs, errors, level)
            when = f"{level:g} % after {reached:.1f} epochs" if reached is not None else f"{level:g} % not reached"
            shown = f"{shorten(label, _LABEL_LETTERS)}: {when}"
            axes.plot(epochs, errors, color=colour, linestyle=dash, label=shown, marker=marker, markersize=4)
            if reached is not None:
                axes.plot(reached, level, color=colour, marker=marker, markersize=10, linestyle="")
        axes.set(xlabel="epochs", ylabel="training error (top-1, %)", ylim=(0, 102))
        axes.set_xlim(left=0)
        if curves:
            axes.legend(loc="best")
    return figure


def plot_overfitting(runs: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Write `overfitting_figure` as a PNG, atomically."""
    with style():
        write_png(overfitting_figure(runs), path)


def overfitting_figure(runs: Mapping[str, Sequence[Record]]) -> "Figure":
    """Runs side by side: top-1 error on training and validation images above, the loss on both below, over epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with style():
        figure = Figure(figsize=(4.9 * max(len(runs), 1) + 0.6, 7.4), layout="constrained")
        panels = figure.subplots(2, max(len(runs), 1), sharex=True, sharey="row", squeeze=False)
        for column, (label, metrics) in enumerate(runs.items()):
            evals = [record for record in metrics if record["kind"] == "eval" and record["crops"] == "centre"]
            for row, (field, unit) in enumerate((("top1_error", "top-1 error (%)"), ("loss", "loss (nats)"))):
                axes = panels[row][column]
                epochs, values = training_error(metrics, field)
                axes.plot(epochs, values, color=BLUE, label="training")
                known = [(record["epoch"], record[field]) for record in evals if record[field] is not None]
                axes.plot(
                    [epoch for epoch, _ in known], [value for _, value in known], color=VERMILION, linestyle=DASHES[1],
                    marker="s", markersize=4, label="validation",
                )  # fmt: skip
                if column == 0:
                    axes.set_ylabel(unit)
            panels[0][column].set_title(shorten(label, _LABEL_LETTERS))
            panels[1][column].set_xlabel("epochs")
            panels[0][column].legend(loc="best")
        for axes in panels[:, 0]:  # when all runs are drawn: a limit that is set ends the search for the others
            axes.set_ylim(bottom=0)
        panels[0][0].set_xlim(left=0)
        panels[0][0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _look(number: int) -> tuple[str, Any, str]:
    return _COLOURS[number % len(_COLOURS)], DASHES[number % len(DASHES)], _MARKERS[number % len(_MARKERS)]
