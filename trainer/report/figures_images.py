"""The paper's figure 4: images with their five likeliest classes as bars, and images with their nearest neighbours.

The decision that shaped it: right and wrong are told by mark and hatching as well as by colour. Names of classes come
from files: they are drawn as they are, cut to length, never as markup. Left out: what is shown (examples.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.report.drawing import BLUE, LEAST_PT, SKY, VERMILION, shorten, style, write_png
from trainer.report.examples import NUM_NEAREST, Examples, Guess, Neighbour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
