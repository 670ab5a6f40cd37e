"""figure1.py: its net, where an error crosses the goal, and a tiny search that goes on where it was broken off."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import figure1

    return figure1


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes that a net tells apart at once: dark and bright."""
    root = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    for name, low in (("a", 0), ("b", 150)):
        (root / "train" / name).mkdir(parents=True)
        for number in range(64):
            pixels = rng.integers(low, low + 100, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{number:03d}.png")
    return root


def records(*errors):
    return [{"epoch": epoch, "error": error, "loss": 1.0} for epoch, error in enumerate(errors)]


@pytest.mark.parametrize(
    ("errors", "expected"),
    [((90, 50, 20), 1 + 25 / 30), ((90, 25), 1.0), ((90, 26), None), ((20, 10), 0.0), ((90, 20, 40, 10), 65 / 70)],
)
def test_the_goal_is_crossed_on_the_line_between_two_epochs(script, errors, expected):
    assert script.epochs_to_goal(records(*errors)) == (None if expected is None else pytest.approx(expected))


def test_the_net_has_three_convolutions_of_5x5_and_one_layer_of_classes(script):
    net = script.Net(script.Setting("relu", 0.01, 0), 10)
    shapes = [tuple(weight.shape) for name, weight in net.named_parameters() if name.endswith("weight")]
    assert shapes == [(32, 3, 5, 5), (32, 32, 5, 5), (64, 32, 5, 5), (10, 1024)]
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("activation", "gain"), [("relu", 2), ("tanh", 1)])
def test_scaled_weights_keep_the_spread_that_their_activation_wants(script, activation, gain):
    net = script.Net(script.Setting(activation, 0.01, 0), 10)
    for layer in [*net.convolutions, net.classes]:
        assert float(layer.weight.detach().std()) == pytest.approx((gain / layer.weight[0].numel()) ** 0.5, rel=0.05)
    small = script.Net(script.Setting(activation, 0.01, 0, weights="small"), 10)
    assert float(small.convolutions[0].weight.detach().std()) == pytest.approx(0.0001, rel=0.05)


def test_the_ratio_is_of_the_best_rates_and_of_all_pairs_of_seeds(script):
    runs = [
        (script.Setting("relu", 0.1, 0), records(90, 20)),
        (script.Setting("relu", 0.01, 0), records(90, 90, 20)),
        (script.Setting("tanh", 0.1, 0), records(90, 90, 20)),
        (script.Setting("relu", 0.1, 1), records(90, 25)),
    ]
    found = script.summarise(runs)
    assert found["relu"] == {"rate": 0.1, "epochs": [pytest.approx(65 / 70), 1.0]}
    slow = 1 + 65 / 70
    assert found["ratio"] == {name: pytest.approx(x) for name, x in (
        ("median", (slow + slow * 70 / 65) / 2), ("min", slow), ("max", slow * 70 / 65))}  # fmt: skip


def run(images, out, *words):
    command = [
        sys.executable,
        ROOT / "benchmarks" / "figure1.py",
        images,
        "--out",
        out,
        "--rates",
        "0.01,0.003",
        *words,
    ]
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=True, timeout=300
    ).stdout


@pytest.mark.slow
def test_a_search_that_is_broken_off_goes_on_to_the_same_numbers(images, tmp_path):
    whole = run(images, tmp_path / "whole", "--epochs", "6", "--seeds", "0,1")
    run(images, tmp_path / "parts", "--epochs", "1", "--seeds", "0")
    again = run(images, tmp_path / "parts", "--epochs", "6", "--seeds", "0,1")
    assert again.splitlines()[-1] == whole.splitlines()[-1]
    summary = json.loads(whole.splitlines()[-1])
    assert {"relu", "tanh", "ratio"} <= set(summary) and len(summary["relu"]["epochs"]) == 2
    assert (tmp_path / "whole" / "figure1-scaled-scaled.png").stat().st_size > 10_000
    done = run(images, tmp_path / "whole", "--epochs", "6", "--seeds", "0,1")
    assert "epoch 1," not in done  # nothing is trained again
