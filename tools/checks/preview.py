"""Some samples as they are stored and as the network sees them, on a contact sheet."""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.common.pictures import shorten, write_png
from pipeline.loader import TrainLoader, read_pixels
from pipeline.manifest import CLS_DIGITS, ENDINGS, KEY_DIGITS, Shard, index_header
from pipeline.options import LoaderOptions
from pipeline.shards import ShardSet
from tools.checks.shards import BLOCK_BYTES, open_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


NUM_DRAWS = 4
_CROP_PX = 224


class View(NamedTuple):
    """One draw of a sample: crop offset (y, x), whether mirrored, colour shift (3,) in grey levels, and what came of
    it: float32 (224, 224, 3), the mean added back, so that it is stored pixel + shift."""

    offset: tuple[int, int]
    flip: bool
    shift: NDArray[np.float32]
    pixels: NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """A stored image, uint8 (256, 256, 3), with its key, class and views."""

    key: str
    label: int
    class_name: str
    stored: NDArray[np.uint8]
    views: tuple[View, ...]


def draw_samples(
    shards: ShardSet,
    colors: ColorStats,
    *,
    num_samples: int = 8,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
    split: str = "train",
) -> list[Sample]:
    """`num_samples` images of `split`, chosen by `seed`, each with `num_draws` views as training with that seed draws.

    Raises UserError if the split has fewer images, or if an index does not fit its tar.
    """
    num_held = shards.num_samples(split)
    if num_samples > num_held:
        asked = f"{num_held} {split} images, {num_samples} asked for"
        raise UserError(f"{shards.root}: {asked}; set --samples lower, or another --split")
    # The raw stream of a bit generator never changes between versions of NumPy.
    chosen = np.sort(np.argsort(np.random.PCG64(seed).random_raw(num_held), kind="stable")[:num_samples])
    with tempfile.TemporaryDirectory(prefix="alexnet-preview-") as folder:
        copied = copy_samples(shards, split, chosen.tolist(), Path(folder))
        ending = ENDINGS[shards.manifest.encoding]
        keys = open_index(copied.tars("train")[0], copied.shards("train")[0], ending).keys.tolist()
        stored = [(image, int(label)) for batch in read_pixels(copied, num_threads=1)
                  for image, label in zip(batch.images.numpy().copy(), batch.labels, strict=True)]  # fmt: skip
        views: dict[int, list[View]] = {key: [] for key in keys}
        for key, view in _draw_views(copied, colors, num_draws, seed):
            views[key].append(view)
    names = [entry.name for entry in shards.manifest.classes]
    return [
        Sample(f"{key:0{KEY_DIGITS}d}", label, names[label], image, tuple(views[key]))
        for key, (image, label) in zip(keys, stored, strict=True)
    ]


def _draw_views(shards: ShardSet, colors: ColorStats, num_draws: int, seed: int) -> Iterator[tuple[int, View]]:
    num_samples = shards.num_samples("train")
    loader = TrainLoader(shards, colors, options=LoaderOptions(num_threads=1), global_batch_size=num_samples, seed=seed)
    edge = (colors.mean_image.shape[0] - _CROP_PX) // 2
    mean = colors.mean_image[edge : edge + _CROP_PX, edge : edge + _CROP_PX]
    for _ in range(num_draws):
        for images, _ in loader:
            draws = loader.draws
            assert draws is not None  # a batch was given
            for number, key in enumerate(draws.keys.tolist()):
                pixels = images[number].numpy().transpose(1, 2, 0) + mean
                y, x = draws.offset[number].tolist()
                yield key, View((y, x), bool(draws.flip[number]), draws.shift[number].numpy().copy(), pixels)


def copy_samples(shards: ShardSet, split: str, positions: list[int], folder: Path) -> ShardSet:
    """A set in `folder` whose one training shard holds the samples at `positions` (in stored order) of `split`.

    Only these samples and the indices of their shards are read.
    """
    tar, ending, rows = folder / "train-000000.tar", ENDINGS[shards.manifest.encoding], []
    chosen, first = [], 0
    for shard in shards.shards(split):
        here = [position - first for position in sorted(positions) if first <= position < first + shard.samples]
        first += shard.samples
        if here:
            chosen.append((shard, here))
    if shards.remote:
        shards.keep_only(split, [shard for shard, _ in chosen]).fetch(split)
    with tar.open("wb") as out:
        for shard, here in chosen:
            path = shards.root / shard.file
            index = open_index(path, shard, ending)
            with path.open("rb") as file:
                for number in here:
                    key, image, size, label = (int(column[number]) for column in index)
                    name, begin = f"{key:0{KEY_DIGITS}d}", image - BLOCK_BYTES
                    moved = out.tell() - begin
                    row = f"{ending} {image + moved} {size} {name}.{ending}"
                    rows.append(f"{row} cls {label + moved} {CLS_DIGITS} {name}.cls")
                    file.seek(begin)
                    out.write(file.read(label + BLOCK_BYTES - begin))
        out.write(bytes(2 * BLOCK_BYTES))
    tar.with_suffix(".idx").write_text("\n".join([index_header(len(rows)), *rows, ""]), encoding="ascii")
    data = tar.read_bytes()
    one = Shard(tar.name, "train", len(rows), len(data), hashlib.sha256(data).hexdigest())
    return ShardSet(folder, replace(shards.manifest, shards=(one,), totals={"train": len(rows), "val": 0}))


INK, GREY = "#222222", "#666666"
FRAMES: tuple[tuple[str, Any], ...] = (("#0072B2", "-"), ("#D55E00", (0, (5, 1.5))), ("#009E73", (0, (1.2, 1.2))),
                                       ("#CC79A7", (0, (6, 1.5, 1.2, 1.5))))  # fmt: skip
AXES = (("#000000", "-", "o"), ("#D55E00", "--", "s"), ("#0072B2", ":", "^"))  # colour, line, marker of an axis
_DPI = 150
_NAME_LETTERS = 24
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 9,
    "text.parse_math": False,  # a class may be called $x$
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "figure.facecolor": "white",
}
# Inches.
_TILE, _STORED = 1.30, 1.30 * 256 / 224
_GAP, _CAPTION, _MARGIN, _HEAD = 0.12, 0.44, 0.22, 0.64
_PANEL, _PANEL_GAP = 4.15, 0.45
_CLOUD, _SWATCHES, _PLANE, _MATRIX = 3.75, 2.35, 3.55, 1.35
_NUM_CLOUD_PIXELS = 4000
_REACH = 2.0  # standard deviations that axes and swatches reach, either way
_SIGMAS = np.linspace(-_REACH, _REACH, 9)
_ELEVATION_DEG, _AZIMUTHS_DEG = 22, range(-75, -14, 5)  # red to the right, green to the back
_BRACKET_PX = 44
_SMALL, _MEDIUM, _LARGE = 8.5, 9.5, 11.0  # points: legible at half size

Floats = NDArray[np.float64]


def write_sheet(samples: list[Sample], colors: ColorStats, path: Path) -> None:
    """Write `sheet_figure` to `path` as a PNG, atomically; the same samples give the same bytes."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's matplotlibrc says
        mpl.rcParams.update(_STYLE)
        write_png(sheet_figure(samples, colors), path, _DPI)


def sheet_figure(samples: list[Sample], colors: ColorStats) -> "Figure":
    """A row for each sample: the stored image, then its views; to the right, the colour axes of `colors`."""
    from matplotlib.figure import Figure

    num_draws = len(samples[0].views)
    grid = _STORED + 2 * _GAP + num_draws * (_TILE + _GAP)
    row = _STORED + _CAPTION
    panel = _CLOUD + _SWATCHES + _MATRIX
    planes = [(0, 1), (1, 2)][: max(0, int((len(samples) * row - panel) / _PLANE))]  # where there is room
    width = _MARGIN + grid + _PANEL_GAP + _PANEL + _MARGIN
    height = _HEAD + max(len(samples) * row, panel) + _MARGIN
    figure = Figure(figsize=(width, height))

    def place(left: float, top: float, across: float, down: float, **options: Any) -> Any:
        return figure.add_axes((left / width, 1 - (top + down) / height, across / width, down / height), **options)

    def write(left: float, top: float, text: str, size: float = _SMALL, **options: Any) -> None:
        figure.text(left / width, 1 - top / height, text, va="top", size=size, linespacing=1.25, **options)

    def head(left: float, text: str, below: str) -> None:
        write(left, 0.16, text, _LARGE, weight="bold")
        write(left, 0.38, below, color=GREY)

    head(_MARGIN, "as stored", "256 × 256")
    first = _MARGIN + _STORED + 2 * _GAP
    head(first, "as the network sees it, the mean added back",
         "224 × 224 at (y, x), mirrored or not; shift of red, green, blue in grey levels")  # fmt: skip
    for number, sample in enumerate(samples):
        top = _HEAD + number * row
        _show_stored(place(_MARGIN, top, _STORED, _STORED), sample)
        write(
            _MARGIN,
            top + _STORED + 0.05,
            f"{sample.key}\n{shorten(sample.class_name.partition(',')[0], _NAME_LETTERS)}",
        )
        for column, view in enumerate(sample.views):
            left = first + column * (_TILE + _GAP)
            _show_view(place(left, top, _TILE, _TILE), view, column)
            write(left, top + _TILE + 0.06, _describe(view))
    left, top = _MARGIN + grid + _PANEL_GAP, _HEAD - 0.1
    head(left, "colour axes of the training pixels", "mean ± 2 σ, on pixels of the images at the left")
    _show_cloud(place(left - 0.3, top, _PANEL + 0.3, _CLOUD, projection="3d", computed_zorder=False), samples, colors)
    top += _CLOUD + 0.1
    for axis in range(3):
        write(left, top, _describe_axis(colors, axis), _MEDIUM)
        _show_swatches(place(left, top + 0.23, _PANEL, 0.27), colors, axis)
        top += 0.64
    for text, at, align in (("mean − 2 σ", 0.0, "left"), ("mean", 0.5, "center"), ("mean + 2 σ", 1.0, "right")):
        write(left + at * _PANEL, top - 0.1, text, color=GREY, ha=align)
    top += _SWATCHES - 3 * 0.64 - 0.1
    for plane in planes:
        _show_plane(place(left + 0.55, top + 0.1, _PANEL - 0.6, _PLANE - 0.75), samples, colors, plane)
        top += _PLANE
    write(left, top, "covariance of red, green, blue (grey levels²)", _MEDIUM)
    _show_matrix(place(left + 0.55, top + 0.42, _PANEL - 0.55, _MATRIX - 0.5), colors.covariance)
    return figure


def _show_stored(axes: "Axes", sample: Sample) -> None:
    """The image, with the corners of what each draw cut out of it."""
    _show(axes, sample.stored)
    for column, view in enumerate(sample.views):
        first_y, first_x = (offset - 0.5 for offset in view.offset)
        last_y, last_x = first_y + view.pixels.shape[0], first_x + view.pixels.shape[1]
        colour, line = FRAMES[column % len(FRAMES)]
        for y, inward_y in ((first_y, _BRACKET_PX), (last_y, -_BRACKET_PX)):
            for x, inward_x in ((first_x, _BRACKET_PX), (last_x, -_BRACKET_PX)):
                corner = ([x + inward_x, x, x], [y, y, y + inward_y])
                axes.plot(*corner, color="white", linewidth=2.6, alpha=0.8, clip_on=False)
                axes.plot(*corner, color=colour, linewidth=1.5, linestyle=line, clip_on=False)
    axes.set(xlim=(-0.5, sample.stored.shape[1] - 0.5), ylim=(sample.stored.shape[0] - 0.5, -0.5))


def _show_view(axes: "Axes", view: View, column: int) -> None:
    _show(axes, to_8_bit(view.pixels))
    colour, line = FRAMES[column % len(FRAMES)]
    for spine in axes.spines.values():
        spine.set(visible=True, edgecolor=colour, linewidth=2.0, linestyle=line)


def _show(axes: "Axes", pixels: NDArray[np.uint8]) -> None:
    axes.imshow(pixels, interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def to_8_bit(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Grey levels as they can be shown: rounded, and cut off at 0 and 255 where the colour shift goes beyond."""
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def _describe(view: View) -> str:
    shift = " ".join(f"{name}{value:+.1f}" for name, value in zip("RGB", view.shift, strict=True)).replace("-", "−")
    return f"({view.offset[0]}, {view.offset[1]}){'  mirrored' if view.flip else ''}\n{shift}"


def _describe_axis(colors: ColorStats, axis: int) -> str:
    share = colors.eigenvalues[axis] / max(colors.eigenvalues.sum(), 1e-12)
    direction = ", ".join(f"{part:+.2f}" for part in colors.eigenvectors[:, axis]).replace("-", "−")
    return f"axis {axis + 1}:  σ {np.sqrt(colors.eigenvalues[axis]):.1f},  {share:.1%} of variance,  ({direction})"


def _pick_pixels(samples: list[Sample]) -> NDArray[np.uint8]:
    """(N, 3): some thousand pixels of the stored images, evenly from all over them."""
    pixels = np.concatenate([sample.stored.reshape(-1, 3) for sample in samples])
    step = max(1, len(pixels) // _NUM_CLOUD_PIXELS)
    return pixels[step // 2 :: step]


def _show_cloud(axes: Any, samples: list[Sample], colors: ColorStats) -> None:
    """Some pixels of the stored images, each in its own colour, and the axes through the mean."""
    cloud = _pick_pixels(samples)
    axes.scatter(*cloud.T.astype(float), c=cloud / 255.0, s=5, linewidths=0, alpha=0.75, depthshade=False, zorder=1)
    for axis in range(len(AXES)):
        reach = _REACH * np.sqrt(colors.eigenvalues[axis]) * colors.eigenvectors[:, axis]
        _draw_axis(axes, axis, *np.stack([colors.mean - reach, colors.mean + reach]).T)
    axes.set(xlim=(0, 255), ylim=(0, 255), zlim=(0, 255), xlabel="red", ylabel="green", zlabel="blue")
    for direction, ticks in ((axes.xaxis, [0, 128, 255]), (axes.yaxis, [128, 255]), (axes.zaxis, [128, 255])):
        direction.set_ticks(ticks)  # 0 once: in the corner the labels would run into each other
        direction.set_pane_color((0.97, 0.97, 0.97, 1.0))
        direction._axinfo["grid"].update(color="#DDDDDD", linewidth=0.6)
    axes.tick_params(labelsize=_SMALL, pad=-1)
    axes.view_init(elev=_ELEVATION_DEG, azim=choose_azimuth_deg(colors.eigenvectors))
    axes.set_box_aspect((1, 1, 1), zoom=0.92)
    axes.legend(loc="upper left", frameon=False, fontsize=_SMALL, handlelength=3.2)


def _draw_axis(axes: Any, axis: int, *ends: Any) -> None:
    """A line between two points, given by coordinates, in the style of a colour axis."""
    colour, line, marker = AXES[axis]
    axes.plot(*ends, color="white", linewidth=4.6, zorder=2)
    axes.plot(*ends, color=colour, linewidth=2.2, linestyle=line, marker=marker, markersize=6, markeredgecolor="white",
              zorder=3, label=f"axis {axis + 1}")  # fmt: skip


def choose_azimuth_deg(eigenvectors: Floats) -> int:
    """Where to look from so that no axis (a column) points at the eye: the shortest as seen is as long as can be."""

    def shortest(azimuth_deg: int) -> float:
        up, round_ = np.radians(_ELEVATION_DEG), np.radians(azimuth_deg)
        eye = np.array([np.cos(up) * np.cos(round_), np.cos(up) * np.sin(round_), np.sin(up)])
        return float(np.sqrt((1 - (eye @ eigenvectors) ** 2).clip(min=0.0)).min())

    return max(_AZIMUTHS_DEG, key=shortest)


def _show_plane(axes: "Axes", samples: list[Sample], colors: ColorStats, plane: tuple[int, int]) -> None:
    """The same pixels as they lie along two of the axes, in grey levels from the mean."""
    cloud = _pick_pixels(samples)
    along = (cloud - colors.mean) @ colors.eigenvectors[:, plane]
    axes.scatter(along[:, 0], along[:, 1], c=cloud / 255.0, s=5, linewidths=0, alpha=0.75, zorder=1)
    for axis, direction in zip(plane, ((1, 0), (0, 1)), strict=True):
        reach = _REACH * np.sqrt(colors.eigenvalues[axis])
        _draw_axis(axes, axis, *([-reach * part, reach * part] for part in direction))
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(f"along axis {plane[0] + 1} (grey levels)", size=_SMALL)
    axes.set_ylabel(f"along axis {plane[1] + 1}", size=_SMALL)
    axes.tick_params(labelsize=_SMALL, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def swatches(colors: ColorStats, axis: int) -> Floats:
    """(9, 3) in grey levels: the mean moved along an axis by −2 to +2 standard deviations, cut off at 0 and 255."""
    sigma = np.sqrt(colors.eigenvalues[axis]) * colors.eigenvectors[:, axis]
    return (colors.mean + _SIGMAS[:, None] * sigma).clip(0, 255)


def _show_swatches(axes: "Axes", colors: ColorStats, axis: int) -> None:
    axes.imshow(swatches(colors, axis)[None] / 255.0, aspect="auto", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for edge in range(1, len(_SIGMAS)):
        axes.axvline(edge - 0.5, color="white", linewidth=1.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _show_matrix(axes: "Axes", covariance: Floats) -> None:
    largest = max(float(np.abs(covariance).max()), 1e-12)
    axes.imshow(np.abs(covariance), cmap="Greys", vmin=0, vmax=2.6 * largest, aspect="auto")
    names = ["red", "green", "blue"]
    axes.set(xticks=range(3), yticks=range(3), xticklabels=names, yticklabels=names)
    axes.tick_params(length=0, labelsize=_SMALL, labeltop=True, labelbottom=False)
    for row in range(3):
        for column in range(3):
            value = covariance[row, column]
            axes.text(column, row, f"{value:,.0f}", ha="center", va="center", fontsize=_MEDIUM, color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
