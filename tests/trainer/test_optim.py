"""The paper's update rule against the oracle, and the schedules against sequences worked out by hand."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.common.errors import UserError
from tests import oracle
from trainer.model import AlexNet
from trainer.optim import PaperSGD, Schedule, make_optimizer, make_schedule
from trainer.recipe import RECIPES, Recipe, override


def tiny(name: str = "paper", *settings: str) -> tuple[AlexNet, PaperSGD, Schedule]:
    recipe = override(RECIPES[name], ["width=0.02", *settings])
    net = AlexNet.from_recipe(recipe, num_classes=2)
    optimizer = make_optimizer(net, recipe)
    return net, optimizer, make_schedule(recipe, optimizer)


def rates(optimizer: PaperSGD) -> dict[str, float]:
    return {f"{group['layer']}.{group['kind']}": group["lr"] for group in optimizer.param_groups}


def velocity(optimizer: PaperSGD, weight: Tensor) -> Tensor:
    """v of P 5."""
    (group,) = (group for group in optimizer.param_groups if any(weight is other for other in group["params"]))
    return -group["buffer_lr"] * optimizer.state[weight]["momentum_buffer"]


def run_epochs(schedule: Schedule, errors: list[float]) -> tuple[list[float], list[int]]:
    """The rate of each epoch until training ends, and the epochs after which something was announced."""
    seen, announced = [], []
    for epoch, error in enumerate(errors, start=1):
        schedule.begin_step(epoch, 0, 10)
        seen.append(schedule.lr)
        if schedule.end_epoch(epoch, error) is not None:
            announced.append(epoch)
        if schedule.finished(epoch):
            break
    return seen, announced


# The update rule.


def test_update_agrees_with_the_oracle_through_changes_of_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (7,))]
    optimizer = PaperSGD(
        [{"params": [weights[0]], "weight_decay": 0.1}, {"params": [weights[1]], "weight_decay": 0.0}], lr=0.01
    )
    expected = [(w.numpy().copy(), np.zeros(w.shape)) for w in weights]
    for lr in (0.01, 0.01, 0.001, 0.02, 0.02):
        for i, (weight, decay) in enumerate(zip(weights, (0.1, 0.0), strict=True)):
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            optimizer.param_groups[i]["lr"] = lr
            expected[i] = oracle.paper_update(*expected[i], weight.grad.numpy(), lr=lr, decay=decay)
        optimizer.step()
        for weight, (w, v) in zip(weights, expected, strict=True):
            np.testing.assert_allclose(weight.numpy(), w, rtol=1e-13)
            np.testing.assert_allclose(velocity(optimizer, weight).numpy(), v, rtol=1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.0005])
def test_in_float32_the_update_is_the_rule_as_printed_to_rounding(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in ((96, 3, 11, 11), (1001,), (257, 33))]
    weights[0] = weights[0].to(memory_format=torch.channels_last)
    printed = [(weight.clone(), torch.zeros_like(weight)) for weight in weights]
    optimizer = PaperSGD(weights, lr=0.01, weight_decay=decay)
    for lr in (0.01, 0.003, 0.3, 0.3, 1e-5, 1e-5, 0.02):
        optimizer.param_groups[0]["lr"] = lr
        for weight, (w, v) in zip(weights, printed, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator).to(memory_format=torch.preserve_format)
            v.mul_(0.9).add_(w, alpha=-decay * lr).add_(weight.grad, alpha=-lr)
            w.add_(v)
        optimizer.step()
    for weight, (w, v) in zip(weights, printed, strict=True):
        assert (weight - w).abs().max() <= 3e-7 * w.abs().max()
        assert (velocity(optimizer, weight) - v).abs().max() <= 3e-7 * v.abs().max()


def test_a_state_of_an_earlier_version_goes_on_as_it_would_have() -> None:
    """Its groups had "decay", and each velocity stood as it is."""
    generator = torch.Generator().manual_seed(0)
    weight, frozen = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    kept = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    groups = [{"lr": lr, "momentum": 0.9, "decay": 0.1, "params": [i]} for i, lr in enumerate((0.1, 0.0))]
    optimizer = PaperSGD([{"params": [weight]}, {"params": [frozen]}], lr=0.5)
    optimizer.load_state_dict({"param_groups": groups, "state": {i: {"velocity": kept[i].clone()} for i in range(2)}})
    weight.grad, frozen.grad, before = torch.ones_like(weight), torch.ones_like(weight), frozen.clone()
    w, v = oracle.paper_update(weight.numpy().copy(), kept[0].numpy(), np.ones(5), lr=0.1, decay=0.1)
    optimizer.step()
    np.testing.assert_allclose(weight.numpy(), w, rtol=1e-13)
    np.testing.assert_allclose(velocity(optimizer, weight).numpy(), v, rtol=1e-13)
    assert torch.equal(frozen, before) and torch.equal(velocity(optimizer, frozen), kept[1])
    assert optimizer.state_dict()["param_groups"][0]["weight_decay"] == 0.1


def test_gradients_and_states_of_other_strides_count_by_their_places() -> None:
    weight = torch.randn(4, 6)
    expected = weight.clone()
    optimizer = PaperSGD([weight], lr=0.5, weight_decay=0.0)
    for step in (1, 2):
        weight.grad = torch.randn(6, 4).t()
        buffer = optimizer.state[weight]["momentum_buffer"] if step == 2 else torch.zeros(4, 6)
        if step == 2:
            optimizer.state[weight]["momentum_buffer"] = buffer.t().contiguous().t()
        expected -= 0.5 * (weight.grad + 0.9 * buffer)
        optimizer.step()
        torch.testing.assert_close(weight, expected)


def test_torchs_sgd_is_the_same_until_the_rate_changes_and_differs_after() -> None:
    ours, theirs = (torch.ones(3, dtype=torch.float64) for _ in range(2))
    paper = PaperSGD([ours], lr=0.1, momentum=0.9, weight_decay=0.01)
    torchs = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01)

    def step(lr: float) -> None:
        for optimizer, weight in ((paper, ours), (torchs, theirs)):
            optimizer.param_groups[0]["lr"] = lr
            weight.grad = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
            optimizer.step()

    for _ in range(3):
        step(0.1)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0.0)
    before = ours.clone()
    step(0.01)
    assert ((ours - theirs).abs() > 0.1).all()
    assert ((ours - before).abs() > 5 * (theirs - before).abs()).all()  # the old velocity runs on at its old size


def test_rate_zero_moves_neither_weight_nor_velocity() -> None:
    frozen, free = torch.ones(2), torch.ones(2)
    optimizer = PaperSGD([{"params": [frozen]}, {"params": [free]}], lr=0.1)

    def step() -> None:
        for weight in (frozen, free):
            weight.grad = torch.ones(2)
        optimizer.step()

    step()
    kept, before = frozen.clone(), velocity(optimizer, frozen)
    optimizer.param_groups[0]["lr"] = 0.0
    step()
    assert torch.equal(frozen, kept)
    assert torch.equal(velocity(optimizer, frozen), before)
    assert (free < kept).all()


def test_parameters_without_gradient_are_passed_over() -> None:
    used, unused = torch.ones(2), torch.ones(2)
    optimizer = PaperSGD([used, unused], lr=0.1)
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert (used < 1).all()


def test_a_restored_optimizer_continues_to_the_same_bits() -> None:
    net, optimizer, _ = tiny("original")

    def step(net: nn.Module, optimizer: PaperSGD, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    step(net, optimizer, 0)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    step(net, optimizer, 1)
    other, restored, _ = tiny("original")
    other.load_state_dict(weights)
    restored.load_state_dict(state)
    step(other, restored, 1)
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    assert [g["layer"] for g in restored.param_groups] == [g["layer"] for g in optimizer.param_groups]


def test_groups_hold_one_parameter_each_with_the_papers_decay_on_all() -> None:
    net, optimizer, _ = tiny("paper")
    assert list(rates(optimizer)) == [name for name, _ in net.named_parameters()]
    for group, parameter in zip(optimizer.param_groups, net.parameters(), strict=True):
        assert group["params"] == [parameter] or group["params"][0] is parameter
        assert (group["weight_decay"], group["momentum"]) == (0.0005, 0.9)


def test_original_decays_weights_only() -> None:
    _, optimizer, _ = tiny("original")
    assert {(g["kind"], g["weight_decay"]) for g in optimizer.param_groups} == {("weight", 0.0005), ("bias", 0.0)}


def test_one_setting_switches_the_papers_decay_off() -> None:
    _, optimizer, _ = tiny("paper", "weight_decay=0")
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0}


def test_groups_keep_their_names_under_a_data_parallel_wrapper() -> None:
    net, optimizer, _ = tiny("original")
    wrapper = nn.Module()
    wrapper.module = net  # as DistributedDataParallel names it
    assert list(rates(make_optimizer(wrapper, net.recipe))) == list(rates(optimizer))


def test_training_on_one_batch_lowers_the_loss() -> None:
    net, optimizer, schedule = tiny("small", "warmup_epochs=0", "dropout=0")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    losses: list[float] = []
    for step in range(12):
        schedule.begin_step(1, step, 100)
        loss: Tensor = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# The schedules.


def test_plateau_cuts_three_times_after_five_stalled_epochs_and_then_ends() -> None:
    _, optimizer, schedule = tiny("paper")
    seen, announced = run_epochs(schedule, [50.0] * 90)
    # Epoch 1 improves on nothing; then five stalled epochs to each cut and to the end.
    assert seen == pytest.approx([0.01] * 6 + [0.001] * 5 + [0.0001] * 5 + [0.00001] * 5)
    assert announced == [6, 11, 16, 21]
    assert set(rates(optimizer).values()) == {schedule.lr}  # the paper: all layers, biases too


@pytest.mark.parametrize(
    ("errors", "cut_after"),
    [
        pytest.param([50, 50, 50, 50, 50, 49.9, 49.9, 49.9, 49.9, 49.9, 49.9], [11], id="a fall of 0.1 counts"),
        pytest.param([30.2] * 5 + [30.1] * 6, [11], id="also where rounding hides it"),
        pytest.param([50, 49.95, 49.93, 49.92, 49.91, 49.901], [6], id="a fall of less than 0.1 in all does not"),
        pytest.param([50 - 0.04 * i for i in range(30)], [], id="small falls add up"),
        pytest.param([50, 60, 60, 60, 60, 49] + [55] * 4 + [48.9], [], id="rises are stalls until the next best"),
        pytest.param([50] * 6 + [50] * 4 + [49] + [49] * 4, [6], id="an improvement after a cut starts the count anew"),
        pytest.param([float("nan")] * 5, [5], id="an error that is no number is no improvement"),
    ],
)
def test_plateau_cuts_where_the_error_stalls(errors: list[float], cut_after: list[int]) -> None:
    _, _, schedule = tiny("paper")
    assert run_epochs(schedule, errors)[1] == cut_after


def test_plateau_ends_at_the_last_epoch_at_the_latest() -> None:
    _, _, schedule = tiny("paper", "epochs=4")
    assert run_epochs(schedule, [50.0 - i for i in range(10)]) == ([0.01] * 4, [])


def test_plateau_follows_its_settings() -> None:
    _, _, schedule = tiny("paper", "plateau_cuts=1", "plateau_patience=2", "plateau_min_drop=5")
    assert run_epochs(schedule, [50, 49, 48, 47, 46, 44]) == ([0.01, 0.01, 0.01, 0.001, 0.001], [3, 5])


def test_plateau_restored_at_any_epoch_goes_on_the_same() -> None:
    errors = [50, 50, 49, 49, 49, 49, 49, 49, 48.95, 48, 48, 48, 48, 48, 48, *[48] * 12]
    _, _, schedule = tiny("paper")
    seen, announced = run_epochs(schedule, errors)
    assert announced == [8, 15, 20, 25]
    _, _, schedule = tiny("paper")
    restored_rates = []
    for epoch, error in enumerate(errors[: len(seen)], start=1):
        state = schedule.state_dict()
        _, _, schedule = tiny("paper")
        schedule.load_state_dict(state)
        assert not schedule.finished(epoch - 1)
        schedule.begin_step(epoch, 3, 10)
        restored_rates.append(schedule.lr)
        schedule.end_epoch(epoch, error)
    assert restored_rates == seen
    state = schedule.state_dict()
    _, _, finished = tiny("paper")
    finished.load_state_dict(state)
    assert finished.finished(len(seen))  # a run that ended does not start again


def test_original_cuts_at_the_sources_epochs_and_keeps_the_bias_rate() -> None:
    _, optimizer, schedule = tiny("original")
    expected = {1: 0.01, 24: 0.01, 25: 1e-3, 50: 1e-3, 51: 1e-4, 66: 1e-4, 78: 1e-4, 79: 1e-5, 90: 1e-5}
    for epoch, lr in expected.items():
        schedule.begin_step(epoch, 0, 100)
        assert schedule.lr == pytest.approx(lr), epoch
        now = rates(optimizer)
        assert now["conv3.weight"] == now["fc8.weight"] == schedule.lr
        assert now["conv2.bias"] == now["fc8.bias"] == 0.02
        if epoch <= 66:
            assert (now["conv1.weight"], now["conv1.bias"]) == (schedule.lr, 0.02)


def test_original_slows_conv1_at_67_and_freezes_it_at_72() -> None:
    _, optimizer, schedule = tiny("original")
    for epochs, lr in (((67, 71), 1e-5), ((72, 79, 90), 0.0)):
        for epoch in epochs:
            schedule.begin_step(epoch, 0, 100)
            now = rates(optimizer)
            assert (now["conv1.weight"], now["conv1.bias"]) == (lr, lr), epoch
    schedule.begin_step(66, 0, 100)  # a function of the epoch, not of what came before
    assert rates(optimizer)["conv1.weight"] == pytest.approx(1e-4)


def test_original_announces_its_changes_and_ends_at_90() -> None:
    _, _, schedule = tiny("original")
    messages = {epoch: schedule.end_epoch(epoch, 50.0) for epoch in range(1, 91)}
    assert {epoch: message for epoch, message in messages.items() if message} == {
        24: "rate 0.001 from epoch 25",
        50: "rate 0.0001 from epoch 51",
        66: "conv1 at rate 1e-05 from epoch 67",
        71: "conv1 frozen from epoch 72",
        78: "rate 1e-05 from epoch 79",
    }
    assert [epoch for epoch in range(1, 92) if schedule.finished(epoch)] == [90, 91]


def cosine_rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    net = AlexNet.from_recipe(recipe, 2)
    schedule = make_schedule(recipe, make_optimizer(net, recipe))
    seen = []
    for epoch in range(1, recipe.epochs + 1):
        for step in range(steps_per_epoch):
            schedule.begin_step(epoch, step, steps_per_epoch)
            seen.append(schedule.lr)
    return seen


def test_cosine_rises_linearly_then_falls_to_nearly_nothing() -> None:
    recipe = override(RECIPES["small"], ["width=0.02", "lr=0.4", "epochs=5", "warmup_epochs=1"])
    seen = cosine_rates(recipe, steps_per_epoch=4)
    assert seen[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert seen[12] == pytest.approx(0.2)  # half way down: 1 + 2 of 4 epochs
    assert seen[19] == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert all(a > b for a, b in pairwise(seen[4:]))


@pytest.mark.parametrize("warmup", [0, 0.5, 2, 30])
def test_cosine_takes_any_warmup(warmup: float) -> None:
    recipe = override(RECIPES["small"], ["width=0.02", "epochs=2", f"warmup_epochs={warmup}"])
    assert all(0 < lr <= recipe.lr for lr in cosine_rates(recipe, steps_per_epoch=3))


def test_state_of_another_schedule_is_refused() -> None:
    _, _, plateau = tiny("paper")
    _, _, milestones = tiny("original")
    with pytest.raises(UserError, match="expected nothing"):
        milestones.load_state_dict(plateau.state_dict())
    with pytest.raises(UserError, match="got state nothing"):
        plateau.load_state_dict(milestones.state_dict())
