"""Curves of one run or several, from the records of their metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.report.pictures import BLUE, DASHES, GREY, LEAST_PT, VERMILION, look_of, new_figure, shorten, style, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
Floats = NDArray[np.float64]


class Chart(NamedTuple):
    """What a chart shows of metrics.jsonl: a field, times `factor`, over epochs or time; `top`: where its axis ends."""

    title: str
    field: str
    unit: str
    over: Literal["step", "time_s"] = "step"
    top: float | None = None
    factor: float = 1.0


LEARNING = (
    Chart("Top-1 error", "top1_error", "error (%)", top=102.0),
    Chart("Top-5 error", "top5_error", "error (%)"),
    Chart("Loss", "loss", "cross-entropy (nats)"),
    Chart("Learning rate", "lr", "rate"),
)
SPEED = (
    Chart("Throughput", "images_per_s", "images/s", "time_s"),
    Chart("Waiting for data", "data_wait_fraction", "share of the time (%)", "time_s", 102.0, 100.0),
)
_CHART_IN = (5.6, 3.5)
_MOST_POINTS = 600  # of a line: more are not seen, and a page of many runs stays small
_LABEL_LETTERS = 40


@style()
def chart_figure(chart: Chart, runs: Mapping[str, Sequence[Record]], num_classes: int | None = None) -> "Figure":
    """One chart of runs by label, from the records of their metrics.jsonl.

    Training is faint as logged and bold as a running mean; validation is marked points; cuts of the learning rate are
    vertical lines; with `num_classes`, a level says what guessing gives. Lines have gids: raw, smooth, points or mark,
    then run0, run1, ...
    """
    figure = new_figure(*_CHART_IN)
    _draw_chart(figure.subplots(), chart, runs, num_classes)
    return figure


@style()
def curves_figure(metrics: Sequence[Record], num_classes: int | None = None) -> "Figure":
    """The charts of `LEARNING` of one run in one picture, with a legend."""
    figure = new_figure(2 * _CHART_IN[0], 2 * _CHART_IN[1] + 0.5)
    named: dict[str, Any] = {}
    for axes, chart in zip(figure.subplots(2, 2).flat, LEARNING, strict=True):
        _draw_chart(axes, chart, {"": metrics}, num_classes)
        for line in axes.lines:
            if line.get_gid() != "level" and chart.field != "lr":
                named.setdefault("learning rate cut" if "mark" in line.get_gid() else line.get_label(), line)
    if named:
        figure.legend(named.values(), named, loc="outside lower center", ncols=3)
    return figure


def _draw_chart(axes: "Axes", chart: Chart, runs: Mapping[str, Sequence[Record]], num_classes: int | None) -> None:
    unit, unit_s = "epochs", 1.0
    if chart.over == "time_s":
        times = [
            record["time_s"] or 0.0 for metrics in runs.values() for record in metrics if record["kind"] == "train"
        ]
        unit, unit_s = ("hours", 3600.0) if max(times, default=0.0) > 7200 else ("minutes", 60.0)
    for run, (name, metrics) in enumerate(runs.items()):
        label, colour = "", VERMILION
        if len(runs) > 1:
            label, colour = f"{shorten(name, _LABEL_LETTERS)}, ", look_of(run)[0]
        _draw_training(axes, chart, metrics, run, label, unit_s)
        if chart.field in ("top1_error", "top5_error", "loss"):
            _draw_validation(axes, chart, metrics, run, label, colour)
    if num_classes and num_classes > 1 and chart.field in ("top1_error", "loss"):
        guess = 100 * (1 - 1 / num_classes) if chart.field == "top1_error" else math.log(num_classes)
        text = f"guessing: {guess:.4g}"
        axes.axhline(guess, color=GREY, linestyle="--", linewidth=1.2, gid="level", label=text)
        axes.annotate(text, (1.0, guess), (0, -3), ("axes fraction", "data"), "offset points", ha="right", va="top",
                      color=GREY, fontsize=LEAST_PT)  # fmt: skip
    axes.set(title=chart.title, ylabel=chart.unit, xlabel=unit if chart.over == "step" else f"{unit} of training")
    axes.set_xlim(left=0)
    if chart.field == "lr":
        _set_decades(axes)
    else:
        axes.set_ylim(0, chart.top or 1.05 * axes.get_ylim()[1])


def _draw_training(axes: "Axes", chart: Chart, metrics: Sequence[Record], run: int, label: str, unit_s: float) -> None:
    train = [record for record in metrics if record["kind"] == "train"]
    if not train:
        return
    colour, dash, _ = look_of(run)
    x = list_values(train, chart.over) / (steps_per_epoch(metrics) if chart.over == "step" else unit_s)
    y = chart.factor * list_values(train, chart.field)
    shared: Any = {"color": colour, "marker": "." if np.isfinite(y).sum() == 1 else ""}
    mean, said = (y, "learning rate") if chart.field == "lr" else (smooth(y), "training, running mean")
    if mean is not y:
        axes.plot(
            *thin(x, y), alpha=0.3, linewidth=1.0, gid=f"raw run{run}", label=f"{label}training, as logged", **shared
        )
    axes.plot(*thin(x, mean), linestyle=dash, gid=f"smooth run{run}", label=label + said, **shared)


def _draw_validation(axes: "Axes", chart: Chart, metrics: Sequence[Record], run: int, label: str, colour: str) -> None:
    per_epoch, marker = steps_per_epoch(metrics), look_of(run)[2]
    dot: Any = {"linestyle": ":", "markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.8}
    ring: Any = {"linestyle": "", "markersize": 9.0, "markerfacecolor": "none", "markeredgewidth": 2.0}
    for crops, said, look in (("centre", "centre crop", dot), ("ten", "ten crops", ring)):
        found = [record for record in metrics if record["kind"] == "eval" and record["crops"] == crops]
        if found:
            axes.plot(list_values(found, "step") / per_epoch, list_values(found, chart.field), color=colour,
                      linewidth=1.2, marker=marker, zorder=3, gid=f"points run{run} {crops}",
                      label=f"{label}validation, {said}", **look)  # fmt: skip
    for event in metrics:
        if event["kind"] == "event" and event["name"] == "lr_cut" and "step" in event:
            text = shorten(str(event.get("text", "learning rate cut")), _LABEL_LETTERS)
            axes.axvline(event["step"] / per_epoch, color=GREY, linewidth=1.2, linestyle="-.", zorder=1,
                         gid=f"mark run{run} step{event['step']}", label=label + text)  # fmt: skip


def _set_decades(axes: "Axes") -> None:
    """A logarithmic axis from one power of ten to another, at most five apart: a cosine's tail is of no interest."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rates = np.concatenate([[], *(line.get_ydata() for line in axes.lines)])
    rates = rates[rates > 0]
    if not len(rates):
        return
    low, high = math.floor(math.log10(rates.min())), math.ceil(math.log10(rates.max()))
    axes.set_yscale("log")
    axes.set_ylim(0.8 * 10.0 ** max(low, high - 5), 1.25 * 10.0 ** max(high, low + 1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def steps_per_epoch(metrics: Sequence[Record]) -> float:
    """Exact once an epoch is complete (a step of epoch e is at most e epochs' worth of steps); until then too small."""
    ratios = [record["step"] / record["epoch"] for record in metrics if record.get("epoch") and "step" in record]
    return max([*ratios, 1e-9])


def list_values(records: Sequence[Record], field: str) -> Floats:
    """(N,) of a field, NaN where it is null."""
    return np.array([math.nan if record[field] is None else record[field] for record in records], dtype=np.float64)


def smooth(values: ArrayLike) -> Floats:
    """(N,) -> (N,): running mean over a fifteenth of the values, centred, cut at the ends; NaN counts for nothing."""
    raw = np.asarray(values, dtype=np.float64)
    if not len(raw):
        return raw
    known, window = np.isfinite(raw), np.ones(2 * (len(raw) // 30) + 1)
    number = np.convolve(known, window, "same")
    sums = np.convolve(np.where(known, raw, 0.0), window, "same")
    return np.where(number > 0, sums / np.maximum(number, 1), np.nan)


def thin(x: Floats, y: Floats, most: int = _MOST_POINTS) -> tuple[Floats, Floats]:
    """At most `most` of the points of a line: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(x) <= most:
        return x, y
    kept = []
    for stretch in np.array_split(np.arange(len(x)), most // 2):
        known = stretch[np.isfinite(y[stretch])]
        kept += sorted({int(known[y[known].argmin()]), int(known[y[known].argmax()])} if len(known) else {stretch[0]})
    return x[kept], y[kept]


PAPER_LEVEL = 25.0  # %, paper, figure 1: the training error by which the two non-linearities are compared


def name_runs(names: Sequence[str], recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each run: the recipe's fields in which they differ, or the runs' own names where that tells nothing.

    `recipes`: as config.json holds them; a field that one does not have counts as None.
    """
    known = sorted({field for recipe in recipes for field in recipe} - {"name", "epochs"})
    differing = [field for field in known if len({str(recipe.get(field)) for recipe in recipes}) > 1][:3]
    labels = [
        ", ".join(str(recipe.get(f)) if f == "activation" else f"{f} {recipe.get(f)}".lower() for f in differing)
        for recipe in recipes
    ]
    return labels if all(labels) and len(set(labels)) == len(labels) else list(names)


def training_error(metrics: Sequence[Record], field: str = "top1_error") -> tuple[Floats, Floats]:
    """Epochs (N,) and each one's training error (N,), %: the mean over its steps, also of an epoch under way.

    `field`: another one of the records of training, such as "loss".
    """
    train = [record for record in metrics if record["kind"] == "train"]
    epochs, values = list_values(train, "epoch"), list_values(train, field)
    weights = np.diff(list_values(train, "step"), prepend=0.0)
    known = np.isfinite(values) & (weights > 0)
    found = np.unique(epochs[known])
    places = [known & (epochs == epoch) for epoch in found]
    return found, np.array([np.average(values[place], weights=weights[place]) for place in places])


def first_reached(epochs: Floats, errors: Floats, level: float) -> float | None:
    """When the error first is at `level` or below, in epochs, straight between measurements; None: not yet."""
    reached = np.flatnonzero(errors <= level)
    if not len(reached):
        return None
    last = int(reached[0])
    return float(np.interp(-level, -errors[max(last - 1, 0) : last + 1], epochs[max(last - 1, 0) : last + 1]))


def common_level(curves: Sequence[tuple[Floats, Floats]]) -> float:
    """The paper's 25 % where every run reaches it, else the lowest multiple of 5 % that every run reaches."""
    lowest = max(float(errors.min()) for _, errors in curves)
    return PAPER_LEVEL if lowest <= PAPER_LEVEL else min(100.0, 5.0 * math.ceil(lowest / 5.0))


@style()
def training_errors_figure(runs: Mapping[str, Sequence[Record]]) -> "Figure":
    """The paper's figure 1: top-1 training error over epochs of runs by label, and when each comes to one level."""
    curves = {label: training_error(metrics) for label, metrics in runs.items()}
    curves = {label: curve for label, curve in curves.items() if len(curve[0])}
    figure = new_figure(9.0, 5.4)
    axes = figure.subplots()
    level = common_level(list(curves.values())) if curves else PAPER_LEVEL
    axes.axhline(level, color=GREY, linestyle=":", linewidth=1.4)
    for number, (label, (epochs, errors)) in enumerate(curves.items()):
        colour, dash, marker = look_of(number)
        reached = first_reached(epochs, errors, level)
        when = f"{level:g} % after {reached:.1f} epochs" if reached is not None else f"{level:g} % not reached"
        shown = f"{wrap(label)}: {when}"
        axes.plot(epochs, errors, color=colour, linestyle=dash, label=shown, marker=marker, markersize=4)
        if reached is not None:
            axes.plot(reached, level, color=colour, marker=marker, markersize=10, linestyle="")
    axes.set(xlabel="epochs", ylabel="training error (top-1, %)", ylim=(0, 102))
    axes.set_xlim(left=0)
    if curves:
        axes.legend(loc="best")
    return figure


@style()
def overfitting_figure(runs: Mapping[str, Sequence[Record]]) -> "Figure":
    """Runs side by side: top-1 error on training and validation images above, the loss on both below, over epochs."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(4.9 * max(len(runs), 1) + 0.6, 7.4)
    panels = figure.subplots(2, max(len(runs), 1), sharex=True, sharey="row", squeeze=False)
    for column, (label, metrics) in zip(panels.T, runs.items(), strict=False):
        evals = [record for record in metrics if record["kind"] == "eval" and record["crops"] == "centre"]
        for axes, field in zip(column, ("top1_error", "loss"), strict=True):
            axes.plot(*training_error(metrics, field), color=BLUE, label="training")
            axes.plot(list_values(evals, "epoch"), list_values(evals, field), color=VERMILION, linestyle=DASHES[1],
                      marker="s", markersize=4, label="validation")  # fmt: skip
        column[0].set_title(wrap(label))
        column[1].set_xlabel("epochs")
        column[0].legend(loc="best")
    for axes, unit in zip(panels[:, 0], ("top-1 error (%)", "loss (nats)"), strict=True):
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)  # when all runs are drawn: a limit that is set ends the search for the others
    panels[0][0].set_xlim(left=0)
    panels[0][0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
