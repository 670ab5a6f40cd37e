"""docs/figures.py at small size: the same bytes twice, and numbers that a slow count gives too."""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.colors import ColorStats
from pipeline.options import Transform
from pipeline.shards import ShardSet
from tests import oracle
from trainer import checkpoint
from trainer.model import AlexNet
from trainer.recipe import RECIPES, override, to_dict
from trainer.record.metrics import MetricsLog
from trainer.record.runs import CHECKPOINTS, LAST, METRICS, create_run, write_config

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "figures.py"


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("docs_figures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(ready_shards, tmp_path_factory):
    """Two runs of an untrained narrow net, with and without dropout."""
    made, shards = [], ShardSet.open(ready_shards)
    for dropout in ("0.5", "0"):
        recipe = override(RECIPES["demo"], ["width=0.0625", f"dropout={dropout}"])
        run = create_run(tmp_path_factory.mktemp("runs"), f"dropout-{dropout}")
        write_config(run, {"recipe": to_dict(recipe), "shards": str(ready_shards)})
        with MetricsLog.open(run / METRICS, None) as log:
            for epoch in (1, 2):
                log.train(step=4 * epoch, epoch=epoch, loss=2.0 / epoch, top1_error=80.0 / epoch, top5_error=0.0,
                          lr=0.01, images_per_s=1.0, data_wait_fraction=0.0, time_s=1.0)  # fmt: skip
                log.eval(step=4 * epoch, epoch=epoch, crops="centre", num_images=24, loss=1.0 + epoch,
                         top1_error=60.0, top5_error=0.0)  # fmt: skip
            log.train(
                step=10,
                epoch=3,
                loss=9.0,
                top1_error=99.0,
                top5_error=0.0,
                lr=0.01,
                images_per_s=1.0,
                data_wait_fraction=0.0,
                time_s=1.0,
            )  # fmt: skip - an epoch under way: not yet evaluated
        state = {"recipe": to_dict(recipe), "num_classes": 4, "shards_fingerprint": shards.fingerprint}
        checkpoint.save(run / CHECKPOINTS / LAST, {**state, "model": AlexNet.from_recipe(recipe, 4).state_dict()})
        made.append(run)
    return made


def options(shards, runs, out):
    return argparse.Namespace(
        shards=str(shards), run=str(runs[0]), compare=[str(run) for run in runs], image=3, out=str(out)
    )


NAMES = [f"question-{name}.png" for name in ("colour", "dropout", "mean", "normalisation", "saturation")]


@pytest.fixture(scope="module")
def made(figures, ready_shards, runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("images")
    return figures.make(options(ready_shards, runs, out)), out


def test_every_figure_is_made_and_the_same_files_give_the_same_bytes(figures, made, ready_shards, runs, tmp_path):
    numbers, out = made
    again = figures.make(options(ready_shards, runs, tmp_path))
    assert json.dumps(again) == json.dumps(numbers)
    assert sorted(path.name for path in out.iterdir()) == NAMES
    for name in NAMES:
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes()
        with Image.open(out / name) as picture:
            assert picture.width >= 800
            picture.verify()


def test_a_label_of_a_thousand_classes_is_10_bits_and_of_uneven_ones_their_entropy(made, figures):
    found = made[0]["bits"]
    assert found["log2_1000"] == pytest.approx(9.9658, abs=1e-4)
    assert found["log2_classes"] == 2.0
    assert found["entropy_of_labels"] == pytest.approx(2.0, abs=0.02)  # 64 images in 4 classes, about even
    uneven = figures.bits(4, 8, [4, 2, 2, 0])
    assert uneven["entropy_of_labels"] == pytest.approx(1.5) and uneven["labels_bits"] == pytest.approx(12.0)


def test_the_curvature_of_raw_pixels_is_that_of_their_second_moments(figures):
    pixels = np.random.default_rng(0).integers(0, 256, (500, 3)).astype(np.float64) * [1.0, 0.9, 0.5]
    mean, covariance = pixels.mean(axis=0), np.cov(pixels.T, bias=True)
    found = figures.subtracting_the_mean(mean, covariance)
    raw = np.linalg.eigvalsh(pixels.T @ pixels / len(pixels))
    assert found["largest_curvature_raw"] == pytest.approx(raw[-1])
    assert found["condition_raw"] == pytest.approx(raw[-1] / raw[0])
    assert found["share_of_mean_square_that_is_the_mean"] == pytest.approx((mean @ mean) * 500 / (pixels**2).sum())
    assert found["condition_centred"] < found["condition_raw"]


def test_slopes_are_those_of_finite_differences(figures):
    found = figures.saturation()
    for x in (0.0, 1.0, 2.0, 3.0):
        slope = (math.tanh(x + 1e-6) - math.tanh(x - 1e-6)) / 2e-6
        assert found[f"tanh_slope_at_{x:g}"] == pytest.approx(slope, rel=1e-6)
    assert found["seven_tanh_layers_at_2"] == pytest.approx(found["tanh_slope_at_2"] ** 7)


def test_response_normalisation_knows_one_image_and_batch_normalisation_the_batch(figures):
    maps = torch.relu(100.0 * torch.randn(6, 8, 5, 5, generator=torch.Generator().manual_seed(0)))
    found = figures.normalisation(maps, 1.0)
    assert found["response_change_with_other_images"] == 0.0
    assert found["batch_change_with_other_images"] > 0.01
    array = maps.numpy().astype(np.float64)
    divisor = array[array > 0] / oracle.lrn(array)[array > 0]
    assert found["divisor_99_percent_as_trained"] == pytest.approx(np.quantile(divisor, 0.99), rel=1e-4)
    assert found["divisor_1_percent_on_0_255"] == pytest.approx(np.quantile(divisor, 0.01), rel=1e-4)
    mean, deviation = array.mean(axis=(0, 2, 3), keepdims=True), array.std(axis=(0, 2, 3), keepdims=True)
    np.testing.assert_allclose(figures.batch_norm(maps), (array - mean) / deviation, atol=1e-4)


def test_the_last_epoch_is_stated_beside_the_error_without_noise(figures, made, ready_shards, runs):
    from pipeline.loader import EvalLoader

    shards = ShardSet.open(ready_shards)
    colors = ColorStats.load(shards.root, shards.fingerprint)
    transform = Transform(mean="channel", unit_variance=True)
    ((images, labels),) = EvalLoader(shards, colors, transform, batch_size=64, split="train")
    with torch.no_grad():
        wrong = (figures.load_model(runs[1])(images).argmax(dim=1) != labels).double().mean()
    found = made[0]["runs"]
    assert list(found) == ["dropout 0.5", "dropout 0.0"]
    assert found["dropout 0.0"]["training_error"] == pytest.approx(100 * wrong.item())
    assert found["dropout 0.5"]["training_error_with_noise"] == 40.0
    assert found["dropout 0.5"]["lowest_validation_loss"] == 2.0


def test_the_colour_noise_as_drawn_has_the_spread_that_the_eigenbasis_predicts(made):
    """64 images, the root of a mean square known to about 9 % (three of these: 27 %)."""
    colour = made[0]["colour"]
    for kind in ("paper", "original"):
        assert colour["rms_drawn"][kind] == pytest.approx(colour["rms_shift"][kind], rel=0.27)
    ratio = np.divide(colour["rms_drawn"]["original"], colour["rms_drawn"]["paper"])
    assert (ratio > 1.5).all()  # the two scales are told apart


def test_wrong_arguments_are_told_in_a_line(ready_shards, tmp_path):
    for words, message in (
        (["--shards", tmp_path / "gone"], "gone: no such folder"),
        (["--shards", ready_shards, "--image", 24, "--out", tmp_path / "out"], "--image 24: expected less than 24"),
    ):
        done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert not (tmp_path / "out").exists()
