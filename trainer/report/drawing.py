"""The one style of all pictures: colours, type, and the way to a file.

The decision that shaped it: the style lies on matplotlib's own defaults, not on the user's, and a PNG holds no version
or date, so that the same numbers give the same bytes anywhere. Colours are Okabe and Ito's, told apart by the
colour-blind; marker and line style differ as well, for print; no letter is under LEAST_PT, so that a picture of 9
inches can be read at half its size. Matplotlib (Agg, no display) is imported on use. Left out: what is drawn.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common.files import write_atomic

if TYPE_CHECKING:
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
