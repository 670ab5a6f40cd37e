"""Each effect the paper reports is switched by one setting, and what is switched is what the setting's name says."""

import pytest
import torch
from torch.nn import functional

from pipeline.colors import ColorStats
from pipeline.options import LoaderOptions
from pipeline.shards import ShardSet
from trainer import data as feed
from trainer.distributed import Ranks
from trainer.model import AlexNet
from trainer.optim import make_optimizer
from trainer.recipe import RECIPES, override

CPU = Ranks(0, 1, torch.device("cpu"))


def seen(*settings: str, training: bool = False) -> dict[str, torch.Tensor]:
    """Of each layer of a narrow net on one image: its input as NAME.in, its linear output as NAME."""
    net = AlexNet.from_recipe(override(RECIPES["paper"], ["width=0.0625", *settings]), 10).double().train(training)
    found: dict[str, torch.Tensor] = {}
    for name, layer in net.named_children():
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: found.update({f"{name}.in": inputs[0], name: output})
        )
    with torch.no_grad():
        net(100.0 * torch.randn(1, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return found


def normalised(maps: torch.Tensor) -> torch.Tensor:
    """P 3.3 over each of two towers, written out: 2, 5, 1e-4, 0.75."""
    towers = []
    for tower in maps.chunk(2, dim=1):
        squares = functional.pad(tower * tower, (0, 0, 0, 0, 2, 2))
        sums = sum(squares[:, shift : shift + tower.shape[1]] for shift in range(5))
        towers.append(tower / (2.0 + 1e-4 * sums) ** 0.75)
    return torch.cat(towers, dim=1)


def test_lrn_false_leaves_out_the_normalisation_and_nothing_else():
    on, off = seen(), seen("lrn=false")
    assert torch.equal(off["conv2.in"], functional.max_pool2d(torch.relu(off["conv1"]), 3, 2))
    torch.testing.assert_close(on["conv2.in"], functional.max_pool2d(normalised(torch.relu(on["conv1"])), 3, 2))


def test_overlapping_pool_false_pools_windows_of_two_that_share_no_pixel():
    off = seen("lrn=false", "overlapping_pool=false")
    rows = torch.relu(off["conv1"])[:, :, :54, :54]  # the 55th row and column are in no window
    assert torch.equal(off["conv2.in"], rows.unflatten(3, (27, 2)).unflatten(2, (27, 2)).amax(dim=(3, 5)))
    assert off["conv2.in"].shape[2:] == seen()["conv2.in"].shape[2:] == (27, 27)


def test_activation_says_whether_what_the_layers_pass_on_is_rectified_or_saturates():
    relu, tanh = seen(), seen("activation=tanh")
    assert torch.equal(relu["fc7.in"], torch.relu(relu["fc6"]))
    assert torch.equal(tanh["fc7.in"], torch.tanh(tanh["fc6"]))
    assert torch.equal(tanh["conv4.in"], torch.tanh(tanh["conv3"]))
    assert (tanh["conv4.in"] < 0).any() and not (relu["conv4.in"] < 0).any()


def test_dropout_sets_that_share_of_the_hidden_units_to_zero():
    for share in (0.0, 0.5):
        torch.manual_seed(0)
        found = seen("width=0.25", f"dropout={share}", training=True)
        for before, after in (("fc6", "fc7.in"), ("fc7", "fc8.in")):
            active = found[before] > 0
            assert (found[after][active] == 0).double().mean() == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize(("setting", "field"), [("crop=false", 0), ("flip=false", 1), ("lighting=none", 2)])
def test_a_setting_of_the_recipe_switches_its_augmentation_off_in_training(ready_shards, setting, field):
    shards = ShardSet.open(ready_shards)
    colors = ColorStats.load(shards.root, shards.fingerprint)
    switched = []
    for settings in ([], [setting]):
        recipe = override(RECIPES["paper"], ["global_batch_size=32", *settings])
        loader = feed.make_train_loader(shards, colors, recipe, CPU, 0, LoaderOptions())
        next(iter(loader))
        switched.append([bool((draw == still).all()) for draw, still in zip(loader.draws, (16, 0, 0.0), strict=False)])
    assert switched[0] == [False, False, False]
    assert [index for index, off in enumerate(switched[1]) if off] == [field]


def test_the_colour_noise_and_its_division_end_with_the_epoch_that_the_recipe_names(ready_shards):
    """S: both off from epoch 67. Still and centred, pixels plus their mean are whole numbers again."""
    shards = ShardSet.open(ready_shards)
    colors = ColorStats.load(shards.root, shards.fingerprint)
    recipe = override(
        RECIPES["original"],
        ["global_batch_size=32", "mean=channel", "crop=false", "flip=false", "lighting_off_epoch=3"],
    )
    fed = feed.TrainFeed(shards, colors, recipe, CPU, seed=0, options=LoaderOptions())
    noisy, whole = [], []
    for epoch in (1, 2, 3, 4):
        fed.begin_epoch(epoch)
        for images, _ in fed:
            pixels = images + torch.from_numpy(colors.mean).float().view(1, 3, 1, 1)
            noisy.append(bool((fed._loader.draws.shift != 0).any()))
            whole.append(bool((pixels - pixels.round()).abs().max() < 1e-3))
    assert noisy == [True] * 4 + [False] * 4
    assert whole == [False] * 4 + [True] * 4


@pytest.mark.parametrize(("setting", "kept"), [("weight_decay=0.0005", 1 - 0.01 * 0.0005), ("weight_decay=0", 1.0)])
def test_weight_decay_shrinks_a_weight_that_has_no_gradient(setting, kept):
    recipe = override(RECIPES["paper"], ["width=0.0625", setting])
    net = AlexNet.from_recipe(recipe, 10).double()
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(net, recipe).step()
    for name, value in net.named_parameters():
        torch.testing.assert_close(value.detach(), kept * before[name], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("towers", [1, 2])
def test_num_towers_says_whether_conv4_sees_the_other_half_of_conv3(towers):
    net = AlexNet.from_recipe(override(RECIPES["paper"], ["width=0.0625", f"num_towers={towers}"]), 10)
    half = net.conv3.out_channels // 2
    maps = torch.rand(1, 2 * half, 13, 13)
    changed = maps.clone()
    changed[:, half:] += 1.0
    same = torch.equal(net.conv4(maps)[:, : net.conv4.out_channels // 2], net.conv4(changed)[:, :half])
    assert same == (towers == 2)
