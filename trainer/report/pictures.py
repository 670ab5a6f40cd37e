"""Pictures in one style, as files or for the page: the first layer's kernels, what the net says to images."""

import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.common import pictures
from pipeline.common.pictures import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trainer.report.examples import Guess, Neighbour

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#666666"
GREEN, ORANGE, SKY, PURPLE = "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
_INK, _RULE = "#1A1D21", "#DDDDDD"
_RUN_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 3)))
_MARKERS = ("o", "s", "^", "D", "v")
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
    "grid.color": _RULE,
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "legend.frameon": False,
    "text.parse_math": False,  # a class called $x$ is its own name
    "svg.fonttype": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
_PAGE_COLOURS = {_INK: "ink", GREY: "soft", _RULE: "rule", "#FFFFFF": "card"} | {
    colour: f"c{number}" for number, colour in enumerate(_RUN_COLOURS)
}


@contextmanager
def style() -> Iterator[None]:
    """Our style on matplotlib's defaults, whatever the user's matplotlibrc says. Functions that draw wear it."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches. Call it within `style`."""
    from matplotlib.figure import Figure  # here: whoever needs only a grid of kernels need not load matplotlib

    return Figure(figsize=(width, height), layout="constrained")


@style()
def write_png(figure: "Figure", path: Path) -> None:
    """Write a figure in our style, as `pipeline.common.pictures.write_png` does."""
    pictures.write_png(figure, path, DPI)


@style()
def to_svg(figure: "Figure", name: str, classes: str = "chart") -> str:
    """A figure as an <svg> for a page: as wide as its place, text as text, our colours as the page's CSS variables.

    A line's gid becomes its group's class, its label the tooltip; markers tell their values too. `name` stands for the
    figure where it cannot be seen, and keeps its ids apart from those of figures by other names.
    """
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}), pictures.without_glyph_warnings():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    lines = {line.get_gid(): line for axes in figure.axes for line in axes.lines if line.get_gid()}
    root = ElementTree.fromstring(buffer.getvalue())
    for element in list(root.iter()):
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.items()}
        if "style" in element.attrib:
            element.set("style", re.sub("#[0-9a-f]{6}", _to_variable, element.attrib["style"]))
        if "d" in element.attrib:
            element.set("d", re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", element.attrib["d"]))
        gid = element.attrib.pop("id", "") if element.tag == "g" else ""
        if gid in lines:
            element.set("class", gid)
            _add_titles(element, lines[gid])
    root.attrib = {"class": classes, "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": name}
    return ElementTree.tostring(root, encoding="unicode")


def _to_variable(colour: re.Match[str]) -> str:
    name = _PAGE_COLOURS.get(colour[0].upper())
    return f"var(--{name})" if name else colour[0]


def _add_titles(group: ElementTree.Element, line: Any) -> None:
    known = [(x, y) for x, y in line.get_xydata().tolist() if math.isfinite(y)]
    for marker, (x, y) in zip([one for one in group.iter() if one.tag.endswith("use")], known, strict=False):
        ElementTree.SubElement(marker, "title").text = f"{line.get_label()}: {y:.4g} at {x:.4g}"
    title = ElementTree.Element("title")
    title.text = line.get_label()
    group.insert(0, title)


def look_of(run: int) -> tuple[str, Any, str]:
    """The colour, dash and marker of the run at this place: what differs in colour differs in form, too."""
    return _RUN_COLOURS[run % len(_RUN_COLOURS)], DASHES[run % len(DASHES)], _MARKERS[run % len(_MARKERS)]


@style()
def swatch_figure(run: int) -> "Figure":
    """How a run's line and its marks look, for a legend."""
    figure = new_figure(0.6, 0.2)
    axes = figure.subplots()
    colour, dash, marker = look_of(run)
    axes.plot([0, 1, 2], [0, 0, 0], color=colour, linestyle=dash, marker=marker, markevery=[1])
    axes.set_axis_off()
    return figure


def wrap(name: str) -> str:
    """The same, of at most 120 characters, in lines of 40: for a legend."""
    return "\n".join(textwrap.wrap(shorten(name, 120), 40))


def name_class(names: Sequence[str], index: int, limit: int = 20) -> str:
    """A class in at most `limit` characters. ImageNet's names are lists of synonyms: the first says enough."""
    return shorten(names[index].split(",")[0], limit) if 0 <= index < len(names) else f"class {index}"


KERNELS_PER_ROW = 16  # paper, figure 3: 96 kernels as 6 rows of 16, three rows a tower
_WIDTH_PX, _TITLE_WIDTH_PX = 1200, 880
_LARGEST_SCALE = 16


@style()
def kernels_figure(weight: ArrayLike, num_towers: int) -> "Figure":
    """The kernels of conv1 as the paper's figure 3 shows them: `kernel_grid` under a title, pixel for pixel."""
    from matplotlib.figure import Figure

    grids = kernel_grid(weight, num_towers)
    number, _, height, width = np.shape(weight)
    margin_px, title_px, label_px = 24, 48, 48 if len(grids) > 1 else 16
    width_px = max(_TITLE_WIDTH_PX, grids[0].shape[1]) + 2 * margin_px
    height_px = title_px + sum(label_px + len(grid) for grid in grids) + margin_px
    figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI)
    bottom_px = height_px - title_px
    title = f"conv1: {number} kernels of {height} × {width} × 3, each on its own scale (mid-grey is 0)"
    texts = [(title, bottom_px)]
    for index, grid in enumerate(grids, start=1):
        bottom_px -= label_px
        texts += [(f"tower {index}", bottom_px + 8)] if len(grids) > 1 else []
        bottom_px -= len(grid)
        figure.figimage(grid, margin_px, bottom_px, origin="upper")
    for text, at_px in texts:
        figure.text(margin_px / width_px, at_px / height_px, text, fontsize=LEAST_PT, va="bottom")
    return figure


def kernel_grid(weight: ArrayLike, num_towers: int, width_px: int = _WIDTH_PX) -> list[NDArray[np.uint8]]:
    """(K, 3, h, w) -> for each tower the (rows, columns, 3) pixels of its kernels, row by row in their order.

    Each kernel is scaled to its own largest magnitude, jointly over red, green and blue, with 0 as mid-grey, and
    enlarged without interpolation to squares, together at most `width_px` wide where that is possible; white gaps one
    kernel pixel wide part them. The first K / num_towers kernels are tower 1's, as for grouped convolutions. Raises
    ValueError for another shape.
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


_COLUMNS = 4
_BAR_END = 1.3  # bars end at 1: beyond it stand the numbers


@style()
def guesses_figure(guesses: Sequence["Guess"], names: Sequence[str]) -> "Figure":
    """Each image over its true class and its likeliest classes as bars of probability, the true one marked.

    `names`: of the classes, by index.
    """
    num_rows = max(1, -(-len(guesses) // _COLUMNS))
    figure = new_figure(11.0, 4.5 * num_rows)
    cells = figure.subplots(2 * num_rows, _COLUMNS, squeeze=False, height_ratios=[1.55, 1.0] * num_rows)
    for axes in cells.flat:
        axes.set_axis_off()
    for guess, above, below in zip(guesses, cells[::2].flat, cells[1::2].flat, strict=False):
        above.imshow(guess.pixels)
        mark, colour = ("✓", BLUE) if guess.is_right else ("✗", VERMILION)
        above.set_title(f"{mark} {name_class(names, guess.label)}", color=colour)
        below.set(xlim=(0, _BAR_END), ylim=(4.6, -0.6))
        for place, (index, probability) in enumerate(zip(guess.classes, guess.probabilities, strict=True)):
            is_true = index == guess.label
            look: Any = (
                {"color": BLUE, "hatch": "///", "edgecolor": "white"} if is_true else {"color": SKY, "alpha": 0.6}
            )
            below.barh(place, probability, height=0.86, **look)
            below.text(0.02, place, name_class(names, index), va="center", fontweight="bold" if is_true else "normal",
                       bbox=_paper(0.75) if is_true else None)  # fmt: skip
            below.text(_BAR_END, place, f"{100 * probability:.0f} %", va="center", ha="right", fontsize=LEAST_PT)
    return figure


@style()
def neighbours_figure(rows: Sequence[Sequence["Neighbour"]], names: Sequence[str], num_searched: int) -> "Figure":
    """A row for each validation image (left): the training images nearest to it, with class and distance."""
    columns = max([7, *(len(row) for row in rows)])  # paper, figure 4: six beside each
    figure = new_figure(1.72 * columns, 2.05 * max(len(rows), 1) + 0.5)
    cells = figure.subplots(max(len(rows), 1), columns, squeeze=False)
    for axes in cells.flat:
        axes.set_axis_off()
    for row, line in zip(rows, cells, strict=False):
        for place, (found, axes) in enumerate(zip(row, line, strict=False)):
            axes.imshow(found.pixels)
            is_same = found.label == row[0].label
            mark = "" if place == 0 else "✓ " if is_same else "✗ "
            axes.set_title(mark + name_class(names, found.label), fontsize=LEAST_PT, pad=4,
                           color=BLUE if is_same else VERMILION, fontweight="normal" if place else "bold")  # fmt: skip
            if place:
                axes.text(0.97, 0.03, f"{found.distance:.3g}", transform=axes.transAxes, ha="right", va="bottom",
                          fontsize=LEAST_PT, bbox=_paper(0.8))  # fmt: skip
    title = f"validation images (left) and the nearest of {num_searched:,} training images: distance in fc7"
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return figure


def _paper(alpha: float) -> dict[str, Any]:
    """White behind a text."""
    return {"facecolor": "white", "alpha": alpha, "edgecolor": "none", "pad": 1.0}
