"""The network's own diagram, as the paper's figure 2: its maps as blocks, the towers apart, what sees what as lines.

The decision that shaped it: everything drawn and written is read from a model that has just been run on one image (the
shapes that really passed, kernels and groups of its modules), so that the diagram of any recipe, width or number of
towers is right or cannot be drawn at all. Left out: activations, normalisation and dropout, as in the paper.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from trainer.model import AlexNet
from trainer.report.pictures import BLUE, GREY, LEAST_PT, ORANGE, VERMILION, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INPUT_PX = 224
_OBLIQUE = 0.28  # how far a map recedes, in its own height
_LARGEST_HEIGHT, _LARGEST_DEPTH, _GAP = 2.7, 1.1, 1.15
_LANE = 4.9  # from one tower to the next


@dataclass(frozen=True)
class Layer:
    """A layer as it was run: what it gave, before pooling, and how it is made.

    `shape`: (maps, rows, columns), or (units,); `pooled`: rows after the pooling behind it, None without pooling;
    `kernel`, `stride`: of a convolution, px; `groups`: into how many parts it falls that do not see each other.
    """

    name: str
    shape: tuple[int, ...]
    kernel: int | None
    stride: int | None
    groups: int
    pooled: int | None
    num_parameters: int


def trace(model: AlexNet) -> list[Layer]:
    """The model's layers in order, from one run on an empty image; the model is left as it was."""
    given: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def keep(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given[name], made[name] = inputs[0], output

    layers = dict(model.named_children())
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: keep(name, inputs, output))
        for name, layer in layers.items()
    ]
    was_training, weight = model.training, next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, INPUT_PX, INPUT_PX, dtype=weight.dtype, device=weight.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    following = {name: after for name, after in pairwise(layers)}
    return [_describe(name, layer, made[name], given.get(following.get(name, ""))) for name, layer in layers.items()]


def _describe(name: str, layer: nn.Module, made: Tensor, given_on: Tensor | None) -> Layer:
    shape = tuple(made.shape[1:])
    number = sum(parameter.numel() for parameter in layer.parameters())
    if not isinstance(layer, nn.Conv2d):
        return Layer(name, shape, None, None, 1, None, number)
    rows = shape[1]
    if given_on is not None:  # flattened before the first fully connected layer
        rows = given_on.shape[2] if given_on.dim() == 4 else round((given_on.shape[1] / shape[0]) ** 0.5)
    pooled = rows if rows != shape[1] else None
    return Layer(name, shape, layer.kernel_size[0], layer.stride[0], layer.groups, pooled, number)


class _Block(NamedTuple):
    """Where the front of a block stands: left, bottom, width, height, and how far it recedes."""

    left: float
    bottom: float
    width: float
    height: float
    recedes: float

    @property
    def centre(self) -> float:
        return self.bottom + self.height / 2


@style()
def network_figure(model: AlexNet) -> "Figure":
    """The layers from left to right, one row of blocks a tower; heights as maps are high, widths as maps are many.

    A full line: the kernels of one block see the other; where a layer sees both towers, lines cross. Fully connected
    layers are halved among the towers as in the paper, since each unit sees everything.
    """
    layers, towers = trace(model), model.recipe.num_towers
    highest = max(layer.shape[1] for layer in layers if len(layer.shape) == 3)
    deepest = max(layer.shape[0] // towers for layer in layers if len(layer.shape) == 3)
    most_units = max(layer.shape[0] for layer in layers if len(layer.shape) == 1)
    figure = new_figure(13.0, 2.0 + 3.2 * towers)
    axes = figure.subplots()
    lanes = [_LANE * ((towers - 1) / 2 - tower) for tower in range(towers)]  # the first tower on top
    image = _Block(0.0, -1.6, 0.12, 3.2, 1.3)
    _draw_block(axes, image, GREY)
    _write_below(axes, image, [f"{INPUT_PX}×{INPUT_PX}×3", "image"])
    before, left = [image], image.width + image.recedes * _OBLIQUE * 2 + 1.0
    for layer in layers:
        is_last, is_map = layer is layers[-1], len(layer.shape) == 3
        rows = [0.0] if is_last else lanes
        if is_map:
            height = 0.55 + (_LARGEST_HEIGHT - 0.55) * layer.shape[1] / highest
            width = max(0.1, _LARGEST_DEPTH * layer.shape[0] / towers / deepest)
        else:
            height, width = 0.6 + 2.4 * layer.shape[0] / len(rows) / most_units, 0.22
        recedes = 0.4 * height if is_map else 0.0
        blocks = [_Block(left, lane - height / 2, width, height, recedes) for lane in rows]
        parts = 1 if len(before) == 1 or len(blocks) == 1 else layer.groups
        _connect(axes, before, blocks, apart=parts == len(blocks) > 1, is_map=is_map)
        for block in blocks:
            _draw_block(axes, block, BLUE if is_map else ORANGE)
            _write_below(axes, block, _size_lines(layer, len(blocks)))
        _write_above(axes, blocks[0], _name_lines(layer))
        before, left = blocks, left + width + recedes * _OBLIQUE * 2 + _GAP
    bottom = min(lanes) - _LARGEST_HEIGHT / 2 - 1.1
    total = sum(layer.num_parameters for layer in layers)
    text = f"recipe {model.recipe.name}: {total:,} parameters"
    if towers > 1:
        text += f"; {towers} towers, which see each other where lines are dashed"
    axes.text(0.0, bottom, text, fontsize=12, va="top", color="black")
    axes.set_xlim(-0.9, left - 0.4)
    axes.set_ylim(bottom - 0.5, max(lanes) + _LARGEST_HEIGHT / 2 + 1.7)
    axes.set_axis_off()
    return figure


def _name_lines(layer: Layer) -> list[str]:
    if layer.kernel is None:
        return [layer.name]
    return [layer.name, f"{layer.kernel}×{layer.kernel}" + (f", stride {layer.stride}" if layer.stride != 1 else "")]


def _size_lines(layer: Layer, num_blocks: int) -> list[str]:
    """What is written under a block: its part of the maps or units, and the size after pooling."""
    if len(layer.shape) == 1:
        return [f"{layer.shape[0] // num_blocks:,}"]
    maps, rows, columns = layer.shape
    lines = [f"{rows}×{columns}×{maps // num_blocks}"]
    return [*lines, f"pooled {layer.pooled}×{layer.pooled}"] if layer.pooled else lines


def _draw_block(axes: "Axes", block: _Block, colour: str) -> None:
    from matplotlib.patches import Polygon

    x, y, w, h = block.left, block.bottom, block.width, block.height
    dx, dy = block.recedes * _OBLIQUE * 2, block.recedes * _OBLIQUE * 1.6
    faces = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)]]
    if block.recedes:
        faces += [
            [(x, y + h), (x + w, y + h), (x + w + dx, y + h + dy), (x + dx, y + h + dy)],
            [(x + w, y), (x + w + dx, y + dy), (x + w + dx, y + h + dy), (x + w, y + h)],
        ]
    for points, alpha in zip(faces, (0.35, 0.2, 0.5), strict=False):
        axes.add_patch(Polygon(points, facecolor="white", edgecolor="none", zorder=3))
        axes.add_patch(Polygon(points, facecolor=colour, alpha=alpha, edgecolor="none", zorder=3))
        axes.add_patch(Polygon(points, facecolor="none", edgecolor=colour, linewidth=1.2, zorder=3))


def _connect(axes: "Axes", before: list[_Block], blocks: list[_Block], *, apart: bool, is_map: bool) -> None:
    for source_number, source in enumerate(before):
        for number, block in enumerate(blocks):
            crosses = len(before) > 1 and len(blocks) > 1 and source_number != number
            if apart and crosses:
                continue
            start = source.left + source.width + source.recedes * _OBLIQUE * 2
            axes.annotate(
                "",
                (block.left - 0.04, block.centre),
                (start + 0.04, source.centre),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": VERMILION if crosses else GREY,
                    "linewidth": 1.4,
                    "linestyle": (0, (4, 2)) if crosses else "-",
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
                zorder=2,
            )


def _write_below(axes: "Axes", block: _Block, lines: list[str]) -> None:
    axes.text(
        block.left + block.width / 2,
        block.bottom - 0.1,
        "\n".join(lines),
        fontsize=LEAST_PT,
        ha="center",
        va="top",
        zorder=4,
    )


def _write_above(axes: "Axes", block: _Block, lines: list[str]) -> None:
    top = block.bottom + block.height + block.recedes * _OBLIQUE * 1.6
    axes.text(
        block.left + block.width / 2, top + 0.15, "\n".join(lines), fontsize=11, ha="center", va="bottom", zorder=4,
        linespacing=1.15,
    )  # fmt: skip
