"""Every picture of a run, in one style: learning, the first layer's kernels, several runs, what the net sees."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.common.files import write_atomic
from trainer.report.examples import NUM_NEAREST, Examples, Guess, Neighbour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#666666"
GREEN, ORANGE, SKY, PURPLE = "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 3)))
DPI = 150
LEAST_PT = 11  # 5.5 points at half size
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 12,
    "axes.labelsize": 12,
    "axes.titlesize": 13,
    "legend.fontsize": LEAST_PT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "legend.frameon": False,
    "text.parse_math": False,  # a class called $x$ is its own name
}


@contextmanager
def style() -> Iterator[None]:
    """Our style on matplotlib's defaults, whatever the user's matplotlibrc says: for building and for writing."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def write_png(figure: "Figure", path: Path, dpi: int = DPI) -> None:
    """Write a figure, atomically, at `dpi` dots an inch; folders are made. Call it within `style`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})  # no version: the same bytes anywhere
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def shorten(name: str, limit: int) -> str:
    """A name from a file as one printable line of at most `limit` characters: what is drawn is never markup."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


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


_COLUMNS = 4
_NAME_LETTERS = 20
_BAR_END = 1.3  # bars end at 1: beyond it stand the numbers


def plot_guesses(examples: Examples, names: Sequence[str], path: Path) -> None:
    """Write `guesses_figure` as a PNG, atomically."""
    with style():
        write_png(guesses_figure(examples.guesses, names), path)


def plot_neighbours(examples: Examples, names: Sequence[str], path: Path) -> None:
    """Write `neighbours_figure` as a PNG, atomically."""
    with style():
        write_png(neighbours_figure(examples.rows, names, examples.num_searched), path)


def guesses_figure(guesses: Sequence[Guess], names: Sequence[str]) -> "Figure":
    """Each image over its true class and its likeliest classes as bars of probability, the true one marked.

    `names`: of the classes, by index.
    """
    from matplotlib.figure import Figure

    num_rows = max(1, -(-len(guesses) // _COLUMNS))
    with style():
        figure = Figure(figsize=(11.0, 4.5 * num_rows), layout="constrained")
        cells = figure.subplots(2 * num_rows, _COLUMNS, squeeze=False, height_ratios=[1.55, 1.0] * num_rows)
        for axes in cells.flat:
            axes.set_axis_off()
        for number, guess in enumerate(guesses):
            top, column = 2 * (number // _COLUMNS), number % _COLUMNS
            cells[top][column].imshow(guess.pixels)
            right = guess.classes[:1] == (guess.label,)
            cells[top][column].set_title(
                ("✓ " if right else "✗ ") + _name(names, guess.label), color=BLUE if right else VERMILION, fontsize=13
            )
            _draw_bars(cells[top + 1][column], guess, names)
    return figure


def _draw_bars(axes: "Axes", guess: Guess, names: Sequence[str]) -> None:
    for place, (index, probability) in enumerate(zip(guess.classes, guess.probabilities, strict=True)):
        true = index == guess.label
        look: Any = {"color": BLUE, "hatch": "///", "edgecolor": "white"} if true else {"color": SKY, "alpha": 0.6}
        axes.barh(place, probability, height=0.86, **look)
        axes.text(
            0.02, place, _name(names, index), va="center", fontsize=11.5, color="black",
            fontweight="bold" if true else "normal",
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8} if true else None,
        )  # fmt: skip
        axes.text(_BAR_END, place, f"{100 * probability:.0f} %", va="center", ha="right", fontsize=11)
    axes.set(xlim=(0, _BAR_END), ylim=(4.6, -0.6))


def neighbours_figure(rows: Sequence[Sequence[Neighbour]], names: Sequence[str], num_searched: int) -> "Figure":
    """A row for each validation image (left): the training images nearest to it, with class and distance."""
    from matplotlib.figure import Figure

    columns = max([NUM_NEAREST + 1, *(len(row) for row in rows)])
    with style():
        figure = Figure(figsize=(1.72 * columns, 2.05 * max(len(rows), 1) + 0.5), layout="constrained")
        cells = figure.subplots(max(len(rows), 1), columns, squeeze=False)
        for axes in cells.flat:
            axes.set_axis_off()
        for row, line in zip(rows, cells, strict=False):
            for place, (found, axes) in enumerate(zip(row, line, strict=False)):
                axes.imshow(found.pixels)
                same = found.label == row[0].label
                mark = "" if place == 0 else "✓ " if same else "✗ "
                axes.set_title(
                    mark + _name(names, found.label), fontsize=11, color=BLUE if same else VERMILION, pad=4,
                    fontweight="bold" if place == 0 else "normal",
                )  # fmt: skip
                if place:
                    axes.text(
                        0.97, 0.03, f"{found.distance:.3g}", transform=axes.transAxes, ha="right", va="bottom",
                        fontsize=LEAST_PT, bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.0},
                    )  # fmt: skip
        figure.suptitle(
            f"validation images (left) and the nearest of {num_searched:,} training images: distance in fc7",
            fontsize=12, x=0.01, ha="left",
        )  # fmt: skip
    return figure


def _name(names: Sequence[str], index: int) -> str:
    """ImageNet's names are lists of synonyms: the first says enough."""
    return shorten(names[index].split(",")[0], _NAME_LETTERS)
