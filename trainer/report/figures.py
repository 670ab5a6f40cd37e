"""The pictures of a run, in one style: what it learned over time, and what its first layer sees.

The decision that shaped it: a picture is built by a function that returns a matplotlib Figure, or the very pixels, and
is written by another, so that what it shows can be tested without looking at it. Matplotlib is imported on use:
training runs without it. Left out: the style (drawing.py), and the choice of what goes into a report (report.py).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.report.drawing import BLUE, DASHES, DPI, GREY, LEAST_PT, VERMILION, style, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KERNELS_PER_ROW = 16  # paper, figure 3: 96 kernels as 6 rows of 16, three rows a tower
_WIDTH_PX, _TITLE_WIDTH_PX = 1200, 880
_LARGEST_SCALE = 16

Record = dict[str, Any]
Floats = NDArray[np.float64]


def plot_curves(metrics: Sequence[Record], path: Path, *, num_classes: int | None = None) -> None:
    """Write `curves_figure` to `path` as a PNG, atomically; the same records give the same bytes."""
    with style():
        write_png(curves_figure(metrics, num_classes=num_classes), path)


def curves_figure(metrics: Sequence[Record], *, num_classes: int | None = None) -> "Figure":
    """Error (%) above, loss (nats) below, both over epochs, from the records of metrics.jsonl (runlog.read_metrics).

    Training faint as logged and bold as a running mean; validation as marked points; cuts of the learning rate as
    vertical lines; with `num_classes`, the level of guessing.
    """
    from matplotlib.figure import Figure

    per_epoch = steps_per_epoch(metrics)
    train = [record for record in metrics if record["kind"] == "train"]
    centre = [record for record in metrics if record["kind"] == "eval" and record["crops"] == "centre"]
    ten = [record for record in metrics if record["kind"] == "eval" and record["crops"] == "ten"]
    with style():
        figure = Figure(figsize=(9.0, 7.2), layout="constrained")
        errors, losses = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for name, field, colour, dash, marker, star in (
            ("top-1", "top1_error", BLUE, DASHES[0], "o", "*"),
            ("top-5", "top5_error", VERMILION, DASHES[1], "s", "P"),
        ):
            _curve(errors, train, field, per_epoch, colour, dash, f"{name}, training")
            _points(errors, centre, field, per_epoch, colour, marker, f"{name}, validation")
            _points(errors, ten, field, per_epoch, colour, star, f"{name}, validation, ten crops")
        _curve(losses, train, "loss", per_epoch, BLUE, DASHES[0], "training")
        _points(losses, centre, "loss", per_epoch, BLUE, "o", "validation")
        if num_classes is not None and num_classes > 1:
            chance = 100.0 * (1.0 - 1.0 / num_classes)
            errors.axhline(chance, color=GREY, linestyle="--", linewidth=1.2, label=f"guessing, top-1 ({chance:.4g} %)")
            losses.axhline(
                math.log(num_classes), color=GREY, linestyle="--", linewidth=1.2, label=f"guessing (ln {num_classes})"
            )
        _mark_cuts(errors, losses, metrics, per_epoch)
        errors.set(ylabel="error (%)", ylim=(0, 102))
        losses.set(ylabel="loss (cross-entropy, nats)", xlabel="epochs")
        losses.set_ylim(0, 1.05 * losses.get_ylim()[1])
        losses.set_xlim(left=0)
        for axes in (errors, losses):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def smooth(values: ArrayLike) -> Floats:
    """(N,) -> (N,): running mean over a fifteenth of the values, centred, cut at the ends; NaN counts for nothing."""
    raw = np.asarray(values, dtype=np.float64)
    known = np.isfinite(raw)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, raw, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    here, half = np.arange(len(raw)), len(raw) // 30
    first, last = np.maximum(here - half, 0), np.minimum(here + half + 1, len(raw))
    number = counts[last] - counts[first]
    return np.where(number > 0, (sums[last] - sums[first]) / np.maximum(number, 1), np.nan)


def plot_kernels(weight: ArrayLike, path: Path, num_towers: int) -> None:
    """Write the kernels of conv1 as the paper's figure 3 shows them: `kernel_grid` under a title, as a PNG, atomically.

    `weight` and `num_towers` as for `kernel_grid`.
    """
    from matplotlib.figure import Figure

    grids = kernel_grid(weight, num_towers)
    number, _, height, width = np.shape(weight)
    margin_px, title_px, label_px = 24, 48, 48 if len(grids) > 1 else 16
    page_px = (
        max(_TITLE_WIDTH_PX, grids[0].shape[1]) + 2 * margin_px,
        title_px + sum(label_px + len(grid) for grid in grids) + margin_px,
    )
    with style():
        figure = Figure(figsize=(page_px[0] / DPI, page_px[1] / DPI), dpi=DPI)

        def write(text: str, bottom_px: int, size: float) -> None:
            figure.text(margin_px / page_px[0], bottom_px / page_px[1], text, fontsize=size, va="bottom")

        bottom_px = page_px[1] - title_px
        write(
            f"conv1: {number} kernels of {height} × {width} × 3, each on its own scale (mid-grey is 0)",
            bottom_px,
            LEAST_PT,
        )
        for index, grid in enumerate(grids):
            bottom_px -= label_px
            if len(grids) > 1:
                write(f"tower {index + 1}", bottom_px + 8, LEAST_PT)
            bottom_px -= len(grid)
            figure.figimage(grid, margin_px, bottom_px, origin="upper")
        write_png(figure, path)


def kernel_grid(weight: ArrayLike, num_towers: int, width_px: int = _WIDTH_PX) -> list[NDArray[np.uint8]]:
    """(K, 3, h, w) -> for each tower the (rows, columns, 3) pixels of its kernels, row by row in their order.

    Each kernel is scaled to its own largest magnitude, jointly over red, green and blue, with 0 as mid-grey, and
    enlarged without interpolation to squares, together at most `width_px` wide where that is possible; white gaps one
    kernel pixel wide part them. The first
    K / num_towers kernels are tower 1's, as for grouped convolutions. Raises ValueError for another shape.
    """
    kernels = np.nan_to_num(np.asarray(weight, dtype=np.float64), posinf=0.0, neginf=0.0)
    if kernels.ndim != 4 or kernels.shape[1] != 3 or not len(kernels) or num_towers < 1 or len(kernels) % num_towers:
        raise ValueError(f"kernels of shape {kernels.shape} in {num_towers} towers: expected (K, 3, h, w), K divisible")
    largest = np.abs(kernels).max(axis=(1, 2, 3), keepdims=True)
    shown = np.rint(127.5 + 127.5 * kernels / np.where(largest > 0, largest, 1.0)).astype(np.uint8)
    per_tower = len(kernels) // num_towers
    rows = math.ceil(per_tower / KERNELS_PER_ROW)
    columns = math.ceil(per_tower / rows)
    height, width = kernels.shape[2] + 1, kernels.shape[3] + 1
    scale = min(max(width_px // (columns * width - 1), 1), _LARGEST_SCALE)
    grids = []
    for tower in np.split(shown, num_towers):
        grid = np.full((rows * height - 1, columns * width - 1, 3), 255, dtype=np.uint8)
        for index, kernel in enumerate(tower):
            top, left = index // columns * height, index % columns * width
            grid[top : top + height - 1, left : left + width - 1] = kernel.transpose(1, 2, 0)
        grids.append(grid.repeat(scale, axis=0).repeat(scale, axis=1))
    return grids


def steps_per_epoch(metrics: Sequence[Record]) -> float:
    """Exact once an epoch is complete (a step of epoch e is at most e epochs' worth of steps); until then too small."""
    ratios = [record["step"] / record["epoch"] for record in metrics if record.get("epoch") and "step" in record]
    return max([*ratios, 1e-9])


def list_values(records: Sequence[Record], field: str) -> Floats:
    """(N,) of a field, NaN where it is null."""
    return np.array([math.nan if record[field] is None else record[field] for record in records], dtype=np.float64)


def _curve(
    axes: "Axes", records: Sequence[Record], field: str, per_epoch: float, colour: str, dash: Any, label: str
) -> None:
    if records:
        epochs, values = list_values(records, "step") / per_epoch, list_values(records, field)
        axes.plot(epochs, values, color=colour, alpha=0.25, linewidth=1.0, marker="." if len(values) == 1 else "")
        axes.plot(epochs, smooth(values), color=colour, linestyle=dash, label=label)


def _points(
    axes: "Axes", records: Sequence[Record], field: str, per_epoch: float, colour: str, marker: str, label: str
) -> None:
    if records:
        epochs, values = list_values(records, "step") / per_epoch, list_values(records, field)
        size, line = (15.0 if marker == "*" else 12.0, "") if marker in "*P" else (5.5, ":")
        style: Any = {"marker": marker, "markersize": size, "markeredgecolor": "white", "markeredgewidth": 0.8}
        axes.plot(epochs, values, color=colour, linestyle=line, linewidth=1.2, label=label, zorder=3, **style)


def _mark_cuts(errors: "Axes", losses: "Axes", metrics: Sequence[Record], per_epoch: float) -> None:
    cuts = [record for record in metrics if record["kind"] == "event" and record["name"] == "lr_cut"]
    for record in cuts:
        if "step" in record:
            for axes in (errors, losses):
                axes.axvline(record["step"] / per_epoch, color=GREY, linewidth=1.0, linestyle="-.", zorder=1)
            errors.annotate(
                f"learning rate {record['lr']:g}" if isinstance(record.get("lr"), int | float) else "learning rate cut",
                (record["step"] / per_epoch, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-3, -3),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="top",
                fontsize=LEAST_PT,
                color=GREY,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            )
