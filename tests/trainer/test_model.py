"""The network: every number against the float64 oracle, and everything the paper and the source state about it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import oracle
from trainer.model import HIDDEN_BIAS_LAYERS, AlexNet, shapes_of
from trainer.recipe import RECIPES, Recipe, override

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


def narrow(name: str, *settings: str, width: float = 1 / 16) -> Recipe:
    return override(RECIPES[name], [f"width={width}", *settings])


def meta_net(recipe: Recipe, num_classes: int = 1000) -> AlexNet:
    with torch.device("meta"):
        return AlexNet(recipe, num_classes)


def double_net(recipe: Recipe) -> AlexNet:
    """Float64, evaluation mode, ten classes, weights so large that every layer matters to the output."""
    net = AlexNet.from_recipe(recipe, num_classes=10).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)
    return net


def random_images(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 50.0 * torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(2), dtype=dtype)


def numpy_weights(net: AlexNet) -> dict[str, oracle.Array]:
    return {name: value.detach().numpy() for name, value in net.named_parameters()}


def layer_outputs(net: AlexNet, images: Tensor) -> dict[str, Tensor]:
    """What each layer gave, by its name, and what it was given, as "name.in"."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, given, made, name=name: seen.update({name: made.detach(), f"{name}.in": given[0].detach()})
        )
        for name, layer in net.named_children()
    ]
    net(images)
    for hook in hooks:
        hook.remove()
    return seen


# The whole network.


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(narrow("paper"), id="paper"),
        pytest.param(narrow("original"), id="original"),
        pytest.param(narrow("paper", "num_towers=1", "overlapping_pool=false"), id="one tower, pools 2/2"),
        pytest.param(narrow("original", "lrn=false", "activation=tanh"), id="tanh without LRN"),
        pytest.param(narrow("owt"), id="owt"),
        pytest.param(narrow("paper", "lrn_across_towers=true", "lrn_alpha=0.01"), id="LRN across towers"),
    ],
)
def test_whole_network_agrees_with_the_oracle_forward_and_backward(recipe: Recipe) -> None:
    """Logits to 1e-10; the derivative along a random direction, by central differences of the oracle, to 1e-6."""
    net, images = double_net(recipe), random_images(2)
    logits = net(images)
    weights = numpy_weights(net)
    np.testing.assert_allclose(logits.detach(), oracle.alexnet(recipe, weights, images.numpy()), rtol=1e-10)

    sensitivity = np.random.default_rng(3).normal(size=logits.shape)
    logits.backward(torch.from_numpy(sensitivity))
    rng, h = np.random.default_rng(4), 1e-7
    direction = {name: w.std() * rng.normal(size=w.shape) for name, w in weights.items()}
    forward, backward = (
        (
            oracle.alexnet(recipe, {n: w + step * direction[n] for n, w in weights.items()}, images.numpy())
            * sensitivity
        ).sum()
        for step in (h, -h)
    )
    derivative = sum(float((p.grad.numpy() * direction[name]).sum()) for name, p in net.named_parameters())
    assert derivative == pytest.approx((forward - backward) / (2 * h), rel=1e-6)


def test_memory_format_does_not_change_the_logits() -> None:
    net, images = double_net(narrow("paper")), random_images(2)
    expected = net(images)
    last = net.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["paper", "original"])
def test_bf16_autocast_stays_near_float32(name: str) -> None:
    net, images = double_net(narrow(name)).float(), random_images(2, torch.float32)
    with torch.no_grad():
        exact = net(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(images)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 0.03


def test_a_batch_without_images_gives_no_logits() -> None:
    assert AlexNet.from_recipe(narrow("original"), 10).eval()(torch.zeros(0, 3, 224, 224)).shape == (0, 10)


@pytest.mark.parametrize("name", ["paper", "original"])
def test_has_60_965_224_parameters(name: str) -> None:
    assert sum(p.numel() for p in meta_net(RECIPES[name]).parameters()) == 60_965_224


def test_one_tower_of_the_same_width_has_more_weights() -> None:
    recipe = override(RECIPES["paper"], ["num_towers=1"])
    assert sum(p.numel() for p in meta_net(recipe).parameters()) == 62_378_344


@pytest.mark.parametrize("settings", [[], ["overlapping_pool=false"], ["conv1_order=lrn-pool-relu", "lrn=false"]])
def test_sizes_are_those_of_the_paper(settings: list[str]) -> None:
    net = meta_net(override(RECIPES["paper"], settings))
    seen = layer_outputs(net, torch.zeros(1, 3, 224, 224, device="meta"))
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in seen.items()}
    assert {name: shapes[name] for name in LAYERS} == {
        "conv1": (96, 55, 55),
        "conv2": (256, 27, 27),
        "conv3": (384, 13, 13),
        "conv4": (384, 13, 13),
        "conv5": (256, 13, 13),
        "fc6": (4096,),
        "fc7": (4096,),
        "fc8": (1000,),
    }
    assert shapes["conv1.in"] == (3, 227, 227)
    assert shapes["conv2.in"] == (96, 27, 27)
    assert shapes["conv3.in"] == (256, 13, 13)
    assert shapes["fc6.in"] == (9216,)


def test_kernels_are_those_of_the_paper() -> None:
    shapes = {name: tuple(layer.weight.shape) for name, layer in meta_net(RECIPES["paper"]).named_children()}
    assert shapes == {
        "conv1": (96, 3, 11, 11),
        "conv2": (256, 48, 5, 5),
        "conv3": (384, 256, 3, 3),
        "conv4": (384, 192, 3, 3),
        "conv5": (256, 192, 3, 3),
        "fc6": (4096, 9216),
        "fc7": (4096, 4096),
        "fc8": (1000, 4096),
    }


def test_the_three_extra_pixels_are_zeros_at_the_right_and_bottom() -> None:
    given = layer_outputs(double_net(narrow("paper")), random_images(1))["conv1.in"]
    assert torch.equal(given[..., :224, :224], random_images(1))
    assert not given[..., 224:, :].any()
    assert not given[..., :, 224:].any()


@pytest.mark.parametrize("width", [0.01, 1 / 16, 0.3, 0.5, 2.0])
@pytest.mark.parametrize("towers", [1, 2])
def test_every_width_divides_into_towers_and_leaves_the_classes(width: float, towers: int) -> None:
    net = meta_net(narrow("paper", f"num_towers={towers}", width=width), num_classes=7)
    for name, layer in net.named_children():
        kernels, full = len(layer.bias), len(meta_net(RECIPES["paper"]).get_submodule(name).bias)
        assert kernels == 7 if name == "fc8" else kernels % towers == 0 and abs(kernels - full * width) <= towers


# Initial weights.


@pytest.mark.parametrize("init", ["paper", "original", "he"])
def test_initial_weights_have_the_recipes_spread(init: str) -> None:
    net = AlexNet.from_recipe(narrow("paper", f"init={init}", width=0.25))
    for name, layer in net.named_children():
        weight = layer.weight
        expected = {"paper": 0.01, "original": 0.03 if name in ("conv3", "conv4", "conv5") else 0.01}.get(
            init, 0.01 if name == "fc8" else (2 / weight[0].numel()) ** 0.5
        )
        assert weight.std().item() == pytest.approx(expected, rel=0.04), name
        assert abs(weight.mean().item()) < 5 * expected / weight.numel() ** 0.5, name
        kurtosis = ((weight / weight.std()) ** 4).mean().item()
        assert kurtosis == pytest.approx(3.0, abs=0.3), f"{name}: not normal"


@pytest.mark.parametrize(("name", "hidden"), [("paper", 1.0), ("original", 1.0), ("small", 0.0)])
def test_initial_biases_are_one_where_the_paper_has_them(name: str, hidden: float) -> None:
    net = AlexNet.from_recipe(narrow(name))
    assert HIDDEN_BIAS_LAYERS == ("conv2", "conv4", "conv5", "fc6", "fc7")
    for layer_name, layer in net.named_children():
        value = hidden if layer_name in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0
        assert (layer.bias == value).all(), layer_name


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first = AlexNet.from_recipe(narrow("paper"), seed=5)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again, other = AlexNet.from_recipe(narrow("paper"), seed=5), AlexNet.from_recipe(narrow("paper"), seed=6)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


# What the paper says the parts do.


@pytest.mark.parametrize("kernel", [0, 5])  # 5: the last of tower 0, whose window would reach into tower 1
def test_towers_meet_only_in_conv3(kernel: int) -> None:
    net, images = double_net(narrow("paper", "lrn_alpha=0.01", width=1 / 8)), random_images(1)
    before = layer_outputs(net, images)
    with torch.no_grad():
        net.conv1.weight[kernel] += 0.1
    after = layer_outputs(net, images)
    half = net.conv2.out_channels // 2
    assert not torch.equal(after["conv2"][:, :half], before["conv2"][:, :half])
    assert torch.equal(after["conv2"][:, half:], before["conv2"][:, half:])
    assert not torch.equal(
        after["conv3"][:, net.conv3.out_channels // 2 :], before["conv3"][:, net.conv3.out_channels // 2 :]
    )


def test_dropout_drops_only_in_training_and_doubles_the_rest() -> None:
    net, images = double_net(narrow("paper", width=1 / 4)), random_images(1)
    whole, again = layer_outputs(net, images), layer_outputs(net, images)
    assert torch.equal(whole["fc8"], again["fc8"])
    torch.manual_seed(0)
    thinned = layer_outputs(net.train(), images)
    assert torch.equal(thinned["fc6"], whole["fc6"])  # none before fc6
    kept = thinned["fc7.in"] != 0
    active = whole["fc7.in"] != 0
    torch.testing.assert_close(thinned["fc7.in"][kept], 2.0 * whole["fc7.in"][kept], rtol=1e-12, atol=0.0)
    assert 0.4 < (kept.sum() / active.sum()).item() < 0.6
    assert (thinned["fc8.in"] == 0).sum() > (torch.relu(thinned["fc7"]) == 0).sum()  # and after fc7


def test_dropout_at_the_inputs_drops_before_fc6_and_fc7_and_not_after() -> None:
    net, images = double_net(narrow("paper", "dropout_at=inputs", width=1 / 4)), random_images(1)
    whole = layer_outputs(net, images)
    torch.manual_seed(0)
    thinned = layer_outputs(net.train(), images)
    active = whole["fc6.in"] != 0
    kept = thinned["fc6.in"] != 0
    assert 0.4 < (kept.sum() / active.sum()).item() < 0.6
    torch.testing.assert_close(thinned["fc6.in"][kept], 2.0 * whole["fc6.in"][kept], rtol=1e-12, atol=0.0)
    assert (thinned["fc7.in"] == 0).sum() > (torch.relu(thinned["fc6"]) == 0).sum()
    assert torch.equal(thinned["fc8.in"], torch.relu(thinned["fc7"]))


def test_an_image_with_the_three_extra_pixels_is_taken_as_it_is() -> None:
    net, images = double_net(narrow("paper")), random_images(1)
    assert torch.equal(net(torch.nn.functional.pad(images, (0, 3, 0, 3))), net(images))


def test_dropout_zero_is_the_same_in_training() -> None:
    net, images = double_net(narrow("paper", "dropout=0")), random_images(1)
    assert torch.equal(net.train()(images), net.eval()(images))


@pytest.mark.parametrize(
    "setting",
    [
        "lrn=false",
        "lrn_alpha_over_n=true",
        "lrn_k=1",
        "lrn_n=3",
        "lrn_alpha=0.01",
        "lrn_beta=0.5",
        "overlapping_pool=false",
        "activation=tanh",
        "spatial_norm=true",
        "conv1_order=lrn-pool-relu",
        "conv1_pad=both",
        "lrn_across_towers=true",
    ],
)
def test_each_switch_changes_the_function(setting: str) -> None:
    plain, switched = double_net(narrow("paper")), double_net(narrow("paper", setting))
    switched.load_state_dict(plain.state_dict())
    images = random_images(1)
    difference = (switched(images) - plain(images)).norm() / plain(images).norm()
    assert difference > 1e-4


def test_switching_towers_changes_the_groups() -> None:
    groups = {
        towers: [meta_net(narrow("paper", f"num_towers={towers}")).get_submodule(n).groups for n in LAYERS[:5]]
        for towers in (1, 2)
    }
    assert groups == {1: [1, 1, 1, 1, 1], 2: [1, 2, 1, 2, 2]}


def test_shapes_are_those_of_the_papers_net() -> None:
    shapes = shapes_of(RECIPES["paper"])
    assert list(shapes) == list(LAYERS)
    assert sum(layer.num_parameters for layer in shapes.values()) == 60_965_224
    assert sum(layer.macs for layer in shapes.values()) == 724_406_816
    assert shapes["conv1"].given == (96, 55, 55) and shapes["conv3"].taken == (256, 13, 13)
    assert shapes["conv2"] == ((256, 48, 5, 5), (256,), (96, 27, 27), (256, 27, 27))
    assert (shapes["fc6"].taken, shapes["fc6"].given, shapes["fc8"].given) == ((9216,), (4096,), (1000,))


@pytest.mark.parametrize("name", RECIPES)
def test_shapes_follow_recipe_and_classes(name: str) -> None:
    recipe = narrow(name)
    shapes = shapes_of(recipe, 7)
    for layer, module in AlexNet.from_recipe(recipe, 7).named_children():
        assert (shapes[layer].weight, shapes[layer].bias) == (tuple(module.weight.shape), tuple(module.bias.shape))
