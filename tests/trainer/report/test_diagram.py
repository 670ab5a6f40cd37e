"""The network's diagram says what the model's modules say, for any recipe."""

from itertools import pairwise

import pytest
import torch
from PIL import Image

from trainer.model import AlexNet
from trainer.recipe import RECIPES, override
from trainer.report.diagram import network_figure, trace
from trainer.report.pictures import write_png


def net(name: str, *settings: str, num_classes: int = 10) -> AlexNet:
    return AlexNet.from_recipe(override(RECIPES[name], ["width=0.0625", *settings]), num_classes)


NETS = {
    "paper": lambda: net("paper"),
    "wider": lambda: net("paper", "width=0.25", num_classes=7),
    "one tower": lambda: net("small", "num_towers=1"),
    "2x2 pools": lambda: net("original", "overlapping_pool=false"),
    "torchvision's": lambda: net("owt"),
}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_a_trace_has_the_shapes_and_numbers_of_the_modules(make):
    model = make()
    layers = trace(model)
    assert [layer.name for layer in layers] == [name for name, _ in model.named_children()]
    for layer, (_, module) in zip(layers, model.named_children(), strict=True):
        assert layer.num_parameters == sum(p.numel() for p in module.parameters())
        assert layer.shape[0] == len(module.bias)
        if isinstance(module, torch.nn.Conv2d):
            assert (layer.kernel, layer.stride, layer.groups) == (
                module.kernel_size[0], module.stride[0], module.groups
            )  # fmt: skip
    assert [layer.shape[1] for layer in layers[:5]] == [55, 27, 13, 13, 13]
    assert [layer.pooled for layer in layers] == [27, 13, None, None, 6, None, None, None]


def test_tracing_leaves_the_model_as_it_was():
    model = net("paper").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model)
    assert model.training and not any(layer._forward_hooks for layer in model.children())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_every_label_comes_from_the_modules_shapes(make):
    model = make()
    towers, children = model.recipe.num_towers, dict(model.named_children())
    texts = [text.get_text() for text in network_figure(model).axes[0].texts]
    sizes = {"conv1": "55×55", "conv2": "27×27", "conv3": "13×13", "conv4": "13×13", "conv5": "13×13"}
    pooled = {"conv1": "\npooled 27×27", "conv2": "\npooled 13×13", "conv5": "\npooled 6×6"}
    expected = ["224×224×3\nimage"]
    for name, size in sizes.items():
        maps = children[name].out_channels // towers
        expected += [f"{size}×{maps}{pooled.get(name, '')}"] * towers
    expected += [f"{children[name].out_features // towers:,}" for name in ("fc6", "fc7") for _ in range(towers)]
    expected += [f"{children['fc8'].out_features:,}"]
    named = ["conv1\n11×11, stride 4", "conv2\n5×5", "conv3\n3×3", "conv4\n3×3", "conv5\n3×3", "fc6", "fc7", "fc8"]
    number = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    shown = [text for text in texts if text]
    assert sorted(text for text in shown if "parameters" not in text) == sorted(expected + named)
    assert sum(number in text for text in shown) == 1


def test_lines_cross_only_where_a_layer_sees_both_towers():
    def crossings(model):
        arrows = [text for text in network_figure(model).axes[0].texts if not text.get_text()]
        return sum(arrow.arrow_patch.get_linestyle() != "-" for arrow in arrows), len(arrows)

    # image to conv1: 2; conv2, conv4, conv5: 2 each; conv3, fc6, fc7: 4 each, half of them crossing; fc8: 2
    assert crossings(net("paper")) == (6, 2 + 3 * 2 + 3 * 4 + 2)
    assert crossings(net("paper", "num_towers=1")) == (0, 8)


def test_blocks_stand_apart_from_left_to_right_and_nothing_leaves_the_page():
    axes = network_figure(net("paper", "width=0.25")).axes[0]
    fronts = sorted({round(patch.get_xy()[0][0], 6) for patch in axes.patches if hasattr(patch, "get_xy")})
    assert len(fronts) >= 9 and all(b > a for a, b in pairwise(fronts))
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for patch in axes.patches:
        for x, y in patch.get_xy() if hasattr(patch, "get_xy") else []:
            assert left <= x <= right and bottom <= y <= top


def test_the_same_model_gives_the_same_bytes(tmp_path):
    write_png(network_figure(net("paper")), tmp_path / "one.png")
    write_png(network_figure(net("paper")), tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (1950, 1260)
