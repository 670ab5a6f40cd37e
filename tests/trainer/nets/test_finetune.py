"""Training that starts from a trained net: what is taken, what is new, what is refused, what the run keeps of it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.common.errors import UserError
from pipeline.manifest import ClassEntry
from tests.trainer.trained import DEMO, PAPER, draw_state, make_run
from trainer import checkpoint
from trainer.model import AlexNet
from trainer.nets.finetune import check_fits, find_differences, hash_file, start_from
from trainer.nets.formats import CAFFE, save_safetensors
from trainer.nets.weights import Weights

TRAIN = Path(sys.executable).parent / "alexnet-train"


def name_classes(*wnids: str) -> tuple[ClassEntry, ...]:
    return tuple(ClassEntry(index, wnid, wnid) for index, wnid in enumerate(wnids))


def train(*arguments: object, cwd: Path, status: int = 0) -> str:
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith("ALEXNET_")}, "OMP_NUM_THREADS": "1"}
    words = [str(TRAIN), *map(str, arguments), "--gpus", "0"]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    """A net of three classes in a file."""
    net = Weights("mine", DEMO, draw_state(DEMO, 3), classes=name_classes("a", "b", "c"))
    save_safetensors(tmp_path / "net.safetensors", net)
    return replace(net, source=str(tmp_path / "net.safetensors"))


@pytest.mark.parametrize("wnids", ["abcd", "abx", "abc"])
def test_every_layer_is_taken_and_fc8_only_if_the_classes_are_the_same(weights, wnids):
    model = AlexNet.from_recipe(DEMO, len(wnids), seed=3)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = start_from(model, weights, name_classes(*wnids))
    assert start.is_fc8_new == (wnids != "abc") and start.num_classes == 3
    assert ("a new fc8" in start.describe()) == (wnids != "abc")
    assert start.sha256 == hash_file(Path(weights.source)) and start.differences == ()
    for name, tensor in model.state_dict().items():
        is_theirs = wnids == "abc" or not name.startswith("fc8.")
        assert torch.equal(tensor, weights.state[name] if is_theirs else fresh[name]), name


def test_weights_without_names_keep_fc8_if_it_has_as_many_classes(weights):
    model = AlexNet.from_recipe(DEMO, 3)
    assert not start_from(model, replace(weights, classes=None), name_classes("x", "y", "z")).is_fc8_new


def test_layers_of_other_shapes_are_refused_by_name(weights):
    with pytest.raises(
        UserError, match=r"net.safetensors: conv1.weight is 6 x 3 x 11 x 11, expected 12 x .*recipe demo"
    ):
        check_fits(replace(DEMO, width=1 / 8), weights)
    fewer = {name: tensor for name, tensor in weights.state.items() if name != "fc7.bias"}
    with pytest.raises(UserError, match=r"no tensor fc7\.bias"):
        check_fits(DEMO, replace(weights, state=fewer))


def test_what_the_net_computed_otherwise_is_told():
    assert find_differences(PAPER, replace(CAFFE, width=1 / 16)) == [
        "lrn_k=1.0",
        "lrn_alpha=2e-05",
        "lrn_across_towers=True",
        "mean=channel",
    ]
    assert find_differences(PAPER, replace(PAPER, lr=1.0, dropout=0.1, lighting=None)) == []


def test_a_run_starts_from_the_file_records_it_and_goes_on_without_it(weights, ready_shards, tmp_path):
    words = ["--shards", ready_shards, "--weights", weights.source, "--global-batch-size", 16, "--lr", 1e-12]
    said = train(*words, "--set", "warmup_epochs=0", "--epochs", 1, "--name", "tuned", cwd=tmp_path)
    assert "with a new fc8: its 3 classes are others" in said and "recipe demo" in said
    run = tmp_path / "runs" / "tuned"
    config = json.loads((run / "config.json").read_text())
    assert config["weights"]["sha256"] == hash_file(Path(weights.source)) and config["weights"]["is_fc8_new"]
    assert config["recipe"]["width"] == 1 / 16 and config["num_classes"] == 4
    state = checkpoint.load(run / "checkpoints" / "last.pt")["model"]
    for name, tensor in weights.state.items():  # as good as untouched at such a rate
        if not name.startswith("fc8."):
            torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-8)
    assert state["fc8.weight"].shape == (4, 256) and state["fc8.weight"].std() == pytest.approx(0.01, rel=0.2)
    Path(weights.source).unlink()
    train("--resume", "tuned", "--epochs", 2, cwd=tmp_path)
    assert json.loads((run / "config.json").read_text())["weights"] == config["weights"]


def test_a_run_by_name_is_taken_and_misuse_leaves_no_run(ready_shards, tmp_path):
    base = make_run(tmp_path / "runs", "base", ready_shards, DEMO)
    words = ["--shards", ready_shards, "--weights", "base", "--global-batch-size", 16, "--epochs", 1]
    said = train(*words, "--set", "width=0.125", cwd=tmp_path, status=1)
    assert "error: " in said and "conv1.weight is 6 x 3 x 11 x 11, expected 12" in said
    assert "leave out --weights" in train("--resume", "base", "--weights", "base", cwd=tmp_path, status=2)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["base"]
    said = train(*words, "--name", "more", cwd=tmp_path)
    assert f"starting from {base / 'checkpoints' / 'best.pt'} (alexnet-dali)\n" in said
