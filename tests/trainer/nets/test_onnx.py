"""Nets of every kind through onnxruntime: the same logits from raw pixels, and a wrong graph is noticed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.shards import ShardSet
from tests import oracle
from tests.trainer.trained import DEMO, PAPER, draw_state, make_run
from trainer.commands.nets import export as command
from trainer.model import AlexNet
from trainer.nets import onnx as onnxfile
from trainer.nets.formats import CAFFE, OWT
from trainer.nets.onnx import build, compare, save_onnx
from trainer.nets.weights import Weights, load_run
from trainer.recipe import RECIPES, Recipe, override

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

NETS = {
    "paper": replace(PAPER, lrn_alpha=0.01),  # so that LRN matters in each of them
    "original": replace(RECIPES["original"], width=1 / 16, lrn_alpha=0.01),
    "demo": DEMO,
    "owt": replace(OWT, width=1 / 16),
    "caffe": replace(CAFFE, width=1 / 16, lrn_alpha=0.05),
    "tanh": override(PAPER, ["activation=tanh", "overlapping_pool=false", "num_towers=1"]),
    "no lrn": override(PAPER, ["lrn=false"]),
}


@pytest.fixture(scope="module")
def colors(ready_shards) -> ColorStats:
    return ColorStats.load(ready_shards, ShardSet.open(ready_shards).fingerprint)


def weights_of(recipe: Recipe, colors: ColorStats | None) -> Weights:
    return Weights("net", recipe, draw_state(recipe, 10), colors)


@pytest.mark.parametrize("name", NETS)
def test_onnxruntime_gives_the_logits_of_the_net_on_the_same_pixels(colors, name):
    weights = weights_of(NETS[name], colors)
    pixels = np.random.default_rng(3).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    mean = {"mean_image": colors.mean_image} if weights.recipe.mean == "image" else {"mean": colors.mean}
    std = colors.std if weights.recipe.unit_variance else None
    images = np.stack([oracle.central_crop(one, **mean, std=std) for one in pixels])
    net = AlexNet(weights.recipe, 10).double().eval()
    net.load_state_dict(weights.state)
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    session = onnxruntime.InferenceSession(build(weights).SerializeToString(), providers=["CPUExecutionProvider"])
    crops = pixels[:, 16:240, 16:240].transpose(0, 3, 1, 2).astype(np.float32)
    (logits,) = session.run(None, {"pixels": crops})
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    (alone,) = session.run(None, {"pixels": crops[:1]})  # a batch of another size than the one that was traced
    np.testing.assert_allclose(alone, logits[:1], atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected[0] - expected[1]).max() > 0.01 * np.abs(expected).max()


@pytest.mark.slow
def test_the_papers_net_at_its_own_width_agrees_too(colors, tmp_path):
    weights = Weights("net", RECIPES["paper"], draw_state(RECIPES["paper"], 1000), colors)
    assert save_onnx(tmp_path / "net.onnx", weights) < 1e-4
    assert 243e6 < (tmp_path / "net.onnx").stat().st_size < 246e6


def test_a_graph_that_computes_something_else_is_not_written(colors, tmp_path, monkeypatch):
    weights = weights_of(NETS["original"], colors)
    assert compare(build(weights).SerializeToString(), weights) < 1e-5
    without = replace(weights, recipe=replace(weights.recipe, spatial_norm=False))
    monkeypatch.setattr(onnxfile, "build", lambda _: build(without))
    with pytest.raises(UserError, match=r"net.onnx: onnxruntime's logits differ from ours by .*not written"):
        save_onnx(tmp_path / "net.onnx", weights)
    assert list(tmp_path.iterdir()) == []


def test_alexnet_export_writes_a_checked_file_with_classes_and_recipe(ready_shards, tmp_path):
    run = make_run(tmp_path / "runs", "net", ready_shards, PAPER)
    words = [str(run), "--format", "onnx", "--out", str(tmp_path / "net.onnx")]
    done = CliRunner().invoke(command, words, standalone_mode=False)
    assert done.exception is None and "onnxruntime within" in done.stdout
    facts = onnxruntime.InferenceSession(tmp_path / "net.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(facts["recipe"])["width"] == 1 / 16
    assert [wnid for wnid, _ in json.loads(facts["classes"])] == [entry.wnid for entry in load_run(run).classes]


def test_weights_without_colours_are_refused(tmp_path):
    with pytest.raises(UserError, match="net: does not hold the colours"):
        save_onnx(tmp_path / "net.onnx", weights_of(PAPER, None))
