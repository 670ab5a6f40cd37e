"""The network's own diagram, as the paper's figure 2: its maps as blocks, the towers apart, what sees what as lines.

All that is drawn is read from a model that has just been run on one image, so that it is right for any recipe.
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
    recedes: float = 0.0

    @property
    def middle(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.bottom + self.height / 2

    @property
    def back(self) -> tuple[float, float]:
        """By how much its back is shifted to the right and up."""
        return self.recedes * _OBLIQUE * 2, self.recedes * _OBLIQUE * 1.6

    @property
    def right(self) -> float:
        return self.left + self.width + self.back[0]


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
    before = [_Block(0.0, -1.6, 0.12, 3.2, 1.3)]
    _draw_block(axes, before[0], GREY, f"{INPUT_PX}×{INPUT_PX}×3\nimage")
    left = before[0].right + 1.0
    for layer in layers:
        is_map, rows = len(layer.shape) == 3, [0.0] if layer is layers[-1] else lanes
        if is_map:
            height = 0.55 + (_LARGEST_HEIGHT - 0.55) * layer.shape[1] / highest
            width, recedes = max(0.1, _LARGEST_DEPTH * layer.shape[0] / towers / deepest), 0.4 * height
        else:
            height, width, recedes = 0.6 + 2.4 * layer.shape[0] / len(rows) / most_units, 0.22, 0.0
        blocks = [_Block(left, lane - height / 2, width, height, recedes) for lane in rows]
        parts = 1 if len(before) == 1 or len(blocks) == 1 else layer.groups
        _connect(axes, before, blocks, apart=parts == len(blocks) > 1)
        for block in blocks:
            _draw_block(axes, block, BLUE if is_map else ORANGE, _tell_size(layer, len(blocks)))
        name = layer.name if layer.kernel is None else f"{layer.name}\n{layer.kernel}×{layer.kernel}"
        name += f", stride {layer.stride}" if layer.stride not in (None, 1) else ""
        above = blocks[0].bottom + height + blocks[0].back[1] + 0.15
        axes.text(blocks[0].middle[0], above, name, fontsize=LEAST_PT, ha="center", va="bottom", zorder=4)
        before, left = blocks, blocks[0].right + _GAP
    bottom = min(lanes) - _LARGEST_HEIGHT / 2 - 1.1
    text = f"recipe {model.recipe.name}: {sum(layer.num_parameters for layer in layers):,} parameters"
    if towers > 1:
        text += f"; {towers} towers, which see each other where lines are dashed"
    axes.text(0.0, bottom, text, va="top")
    axes.set(xlim=(-0.9, left - 0.4), ylim=(bottom - 0.5, max(lanes) + _LARGEST_HEIGHT / 2 + 1.7))
    axes.set_axis_off()
    return figure


def _tell_size(layer: Layer, num_blocks: int) -> str:
    """What is written under a block: its part of the maps or units, and the size after pooling."""
    if len(layer.shape) == 1:
        return f"{layer.shape[0] // num_blocks:,}"
    maps, rows, columns = layer.shape
    size = f"{rows}×{columns}×{maps // num_blocks}"
    return f"{size}\npooled {layer.pooled}×{layer.pooled}" if layer.pooled else size


def _draw_block(axes: "Axes", block: _Block, colour: str, below: str) -> None:
    from matplotlib.patches import Polygon

    (x, y, w, h, _), (dx, dy) = block, block.back
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
    axes.text(block.middle[0], y - 0.1, below, fontsize=LEAST_PT, ha="center", va="top", zorder=4)


def _connect(axes: "Axes", before: list[_Block], blocks: list[_Block], *, apart: bool) -> None:
    """An arrow from each block to each, dashed from one tower to the other; `apart`: there are none of these."""
    for source_number, source in enumerate(before):
        for number, block in enumerate(blocks):
            crosses = len(before) > 1 and len(blocks) > 1 and source_number != number
            if apart and crosses:
                continue
            look = {"color": VERMILION, "linestyle": (0, (4, 2))} if crosses else {"color": GREY, "linestyle": "-"}
            start, end = (source.right + 0.04, source.middle[1]), (block.left - 0.04, block.middle[1])
            arrow = {"arrowstyle": "-|>", "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0, **look}
            axes.annotate("", end, start, arrowprops=arrow, zorder=2)
