"""Weights of other programs compute in our net what they compute there; ours come back from a file as they were."""

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from pipeline.common.errors import UserError
from pipeline.options import Transform
from tests import oracle
from tests.docs.pictures import picture
from tests.trainer.trained import DEMO, PAPER, draw_state, make_run
from trainer.commands.nets import export as command
from trainer.model import AlexNet
from trainer.nets import formats as weightfile
from trainer.nets.formats import CAFFE, OWT, load_any, load_file, save_caffe, save_safetensors, save_torchvision
from trainer.nets.predict import Predictor
from trainer.nets.weights import Weights, load_run
from trainer.recipe import RECIPES

CPU = torch.device("cpu")


class TorchvisionAlexNet(nn.Module):
    """torchvision.models.AlexNet, its layers written down again, at a fraction of its width."""

    def __init__(self, width: float, num_classes: int) -> None:
        super().__init__()
        a, b, c, d, e, units = (round(size * width) for size in (64, 192, 384, 256, 256, 4096))
        self.features = nn.Sequential(
            nn.Conv2d(3, a, kernel_size=11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(a, b, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(b, c, kernel_size=3, padding=1), nn.ReLU(),
            nn.Conv2d(c, d, kernel_size=3, padding=1), nn.ReLU(),
            nn.Conv2d(d, e, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(e * 36, units), nn.ReLU(),
            nn.Dropout(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, num_classes),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def torchvision_net(width: float = 1 / 16, num_classes: int = 10) -> TorchvisionAlexNet:
    torch.manual_seed(5)
    return TorchvisionAlexNet(width, num_classes).eval()


def caffe_blobs(width: float = 1 / 16, num_classes: int = 10) -> dict[str, np.ndarray]:
    """Blobs float64 of bvlc_alexnet, of a spread at which every layer and both normalisations matter."""
    a, b, c, d, e, units = (round(size * width) for size in (96, 256, 384, 384, 256, 4096))
    shapes = {
        "conv1": (a, 3, 11, 11),
        "conv2": (b, a // 2, 5, 5),
        "conv3": (c, b, 3, 3),
        "conv4": (d, c // 2, 3, 3),
        "conv5": (e, d // 2, 3, 3),
        "fc6": (units, e * 36),
        "fc7": (units, units),
        "fc8": (num_classes, units),
    }
    rng = np.random.default_rng(6)
    blobs = {f"{name}_w": rng.normal(size=s) * (2 / np.prod(s[1:])) ** 0.5 for name, s in shapes.items()}
    return blobs | {f"{name}_b": rng.normal(size=s[0]) for name, s in shapes.items()}


def in_tensorflows_order(blobs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As converters to TensorFlow leave them: kernels last, and fc6 over (row, column, map)."""
    turned = {}
    for name, blob in blobs.items():
        layer, _, kind = name.partition("_")
        if name == "fc6_w":
            blob = blob.reshape(len(blob), -1, 6, 6).transpose(0, 2, 3, 1).reshape(blob.shape)
        if blob.ndim == 4:
            blob = blob.transpose(2, 3, 1, 0)
        turned[f"{layer}.{'weights' if kind == 'w' else 'biases'}"] = blob.T if blob.ndim == 2 else blob
    return turned


def double_net(weights: Weights) -> AlexNet:
    net = AlexNet(weights.recipe, weights.num_classes).double().eval()
    net.load_state_dict(weights.state)
    return net


def images(size: int = 224) -> torch.Tensor:
    return 50 * torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_torchvisions_weights_give_torchvisions_logits(tmp_path):
    theirs = torchvision_net().double()
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    weights = load_file(tmp_path / "net.pth")
    assert weights.recipe == replace(OWT, width=1 / 16) and weights.num_classes == 10 and weights.classes is None
    with torch.no_grad():
        torch.testing.assert_close(double_net(weights)(images()), theirs(images()), rtol=1e-10, atol=1e-10)


def test_owt_at_full_width_takes_a_state_dict_of_torchvision_and_names_imagenets_classes(tmp_path):
    with torch.device("meta"):
        state = {name: torch.empty(tensor.shape) for name, tensor in TorchvisionAlexNet(1, 1000).state_dict().items()}
    assert sum(tensor.numel() for tensor in state.values()) == 61_100_840  # torchvision's documentation
    torch.save({name: torch.zeros(tensor.shape) for name, tensor in state.items()}, tmp_path / "net.pth")
    weights = load_file(tmp_path / "net.pth")
    assert weights.recipe == RECIPES["owt"]
    assert (weights.classes[0].wnid, weights.classes[999].wnid) == ("n01440764", "n15075141")


def test_torchvisions_preprocessing_is_ours_on_the_stored_image(tmp_path):
    theirs = torchvision_net()
    torch.save({"state_dict": {f"module.{name}": t for name, t in theirs.state_dict().items()}}, tmp_path / "net.pth")
    weights = load_file(tmp_path / "net.pth")
    pixels = np.array(picture(256, 256))
    unit = torch.from_numpy(pixels[16:240, 16:240].copy()).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = theirs(((unit - mean[:, None, None]) / std[:, None, None])[None]).log_softmax(1)
    got = Predictor(weights, crops="centre", device=CPU)([pixels])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    constants = Transform("channel", None, unit_variance=True).constants(weights.colors)
    torch.testing.assert_close(torch.from_numpy(constants.mean), 255 * mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.from_numpy(constants.factor), 1 / (255 * std), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["npz", "old blobs", "state dict", "TensorFlow's order"])
def test_caffes_blobs_give_caffes_logits(tmp_path, form):
    blobs, path = caffe_blobs(), tmp_path / "net"
    bgr = images(227).numpy()
    expected = oracle.caffe_alexnet(blobs, bgr)
    stored = blobs
    if form == "old blobs":
        stored = {name: blob.reshape((1,) * (4 - blob.ndim) + blob.shape) for name, blob in blobs.items()}
    if form == "TensorFlow's order":
        stored = in_tensorflows_order(blobs)
    if form == "state dict":
        torch.save({n.replace("_w", ".weight").replace("_b", ".bias"): torch.tensor(b) for n, b in blobs.items()}, path)
    else:
        np.savez(path.with_suffix(".npz"), **stored)
        path = path.with_suffix(".npz")
    weights = load_file(path)
    assert weights.recipe == replace(CAFFE, width=1 / 16)
    with torch.no_grad():
        logits = double_net(weights)(torch.from_numpy(bgr[:, ::-1].copy()))
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
    for changed in ({"lrn_k": 2.0}, {"lrn_across_towers": False}, {"lrn_alpha_over_n": False}):
        other = double_net(replace(weights, recipe=replace(weights.recipe, **changed)))
        with torch.no_grad():
            assert not np.allclose(other(torch.from_numpy(bgr[:, ::-1].copy())).numpy(), expected, rtol=1e-3)


def test_both_layouts_are_written_as_they_were_read(tmp_path):
    theirs = torchvision_net(1.0, 3).state_dict()
    torch.save(theirs, tmp_path / "net.pth")
    save_torchvision(tmp_path / "again.pth", load_file(tmp_path / "net.pth"))
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert set(again) == set(theirs) and all(torch.equal(again[name], theirs[name]) for name in theirs)
    blobs = {name: blob.astype(np.float32) for name, blob in caffe_blobs().items()}
    np.savez(tmp_path / "net.npz", **blobs)
    save_caffe(tmp_path / "again.npz", load_file(tmp_path / "net.npz"))
    with np.load(tmp_path / "again.npz") as again:
        assert len(again.files) == 16
        for name, blob in blobs.items():
            np.testing.assert_array_equal(again[name.replace("_w", ".weight").replace("_b", ".bias")], blob)


def test_a_net_that_computes_something_else_is_not_written_in_a_foreign_layout(tmp_path):
    weights = Weights("mine", PAPER, draw_state(PAPER, 4))
    with pytest.raises(UserError, match=r"mine: is not the net of torchvision's AlexNet: maps \(96, .*safetensors"):
        save_torchvision(tmp_path / "a.pth", weights)
    with pytest.raises(UserError, match=r"Caffe's bvlc_alexnet: .*lrn_k 2.0 \(there 1.0\)"):
        save_caffe(tmp_path / "a.npz", weights)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", [PAPER, DEMO], ids=["mean image", "three means"])
def test_safetensors_hold_all_that_a_prediction_needs(ready_shards, tmp_path, recipe):
    run = make_run(tmp_path / "runs", "net", ready_shards, recipe)
    was = load_run(run)
    save_safetensors(tmp_path / "net.safetensors", was)
    now = load_any(tmp_path / "net.safetensors")
    assert now.recipe == was.recipe and now.classes == was.classes and now.num_classes == 4
    assert now.shards_fingerprint == was.shards_fingerprint
    assert set(now.state) == set(was.state) and all(torch.equal(now.state[n], was.state[n]) for n in was.state)
    for field in ("mean", "covariance", "eigenvalues", "eigenvectors", "mean_image"):
        np.testing.assert_array_equal(getattr(now.colors, field), getattr(was.colors, field))
    pixels = [np.array(picture(256, 256, seed)) for seed in range(2)]
    ask = [Predictor(weights, crops="ten", device=CPU)(pixels) for weights in (was, now)]
    assert torch.equal(*ask)


def test_a_checkpoint_file_is_read_with_its_runs_colours_or_alone(ready_shards, tmp_path):
    run = make_run(tmp_path / "runs", "net", ready_shards, PAPER)
    assert load_any(run / "checkpoints" / "last.pt").colors is not None
    alone = tmp_path / "alone.pt"
    alone.write_bytes((run / "checkpoints" / "last.pt").read_bytes())
    assert load_any(alone).colors is None and load_any(alone).num_classes == 4


def test_alexnet_export_writes_each_format_and_says_what_the_input_is(ready_shards, tmp_path):
    run = make_run(tmp_path / "runs", "net", ready_shards, PAPER)
    done = CliRunner().invoke(command, [str(run), "--out", str(tmp_path / "a.safetensors")], standalone_mode=False)
    assert done.exception is None and "4 classes" in done.stdout
    torch.save(torchvision_net(1.0, 3).state_dict(), tmp_path / "net.pth")
    words = [str(tmp_path / "net.pth"), "--format", "torchvision", "--out", str(tmp_path / "b.pth")]
    done = CliRunner().invoke(command, words, standalone_mode=False)
    assert done.exception is None and "minus [123.675, 116.28, 103.53" in done.stderr


class Evil:
    def __reduce__(self):
        return (print, ("this code must not run",))


def broken_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Name -> (content, what the message says)."""

    def saved(value: object) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    def zipped(**arrays: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    def npy(value: object) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, np.array(value, dtype=object), allow_pickle=True)
        return buffer.getvalue()

    good = torchvision_net().state_dict()
    save_safetensors(folder / "good", Weights("good", PAPER, draw_state(PAPER, 4)))
    ours = (folder / "good").read_bytes()
    (folder / "good").unlink()
    caffe = caffe_blobs()
    bad_recipe = ours.replace(b'\\"name\\": \\"paper\\"', b'\\"naam\\": \\"paper\\"')
    assert bad_recipe != ours
    return {
        "empty": (b"", "0 bytes, expected the weights"),
        "text": (b"hello, this is text", "cannot be read as weights"),
        "cut": (ours[: len(ours) // 2], "cannot be read as weights"),
        "recipe": (bad_recipe, "metadata cannot be read .*unknown naam"),
        "code": (pickle.dumps(Evil()), "holds more than tensors"),
        "code in torch's": (saved(Evil()), "holds more than tensors"),
        "objects": (zipped(conv1_w=np.array([Evil()], dtype=object)), "cannot be read as weights .*allow_pickle"),
        "list": (saved([torch.zeros(3)]), "not a state dict"),
        "a .npy": (npy({"conv1": [np.zeros(3), np.zeros(3)]}), r"a NumPy array \(.npy\).*np.savez"),
        "others": (saved({"layer1.weight": torch.zeros(3)}), "tensors named layer1.weight; expected features.0.weight"),
        "shape": (
            saved({**good, "features.3.weight": torch.zeros(12, 4, 3, 3)}),
            "conv2.weight is 12 x 4 x 3 x 3, exp",
        ),
        "missing": (saved({n: t for n, t in good.items() if n != "features.6.bias"}), "no tensor conv3.bias"),
        "more": (saved({**good, "features.99.bias": torch.zeros(3)}), "unknown tensor 'features.99.bias'"),
        "more, outside": (saved({**good, "extra": torch.zeros(3)}), "unknown tensor 'extra'"),
        "no number": (
            saved({**good, "features.6.bias": torch.full((24,), torch.nan, dtype=torch.float16)}),
            "conv3.bias holds infinities or NaN",
        ),
        "whole numbers": (saved({n: t.to(torch.int8) for n, t in good.items()}), "torch.int8, expected floating-point"),
        "no units": (saved({**good, "classifier.1.bias": torch.zeros(2, 2)}), "no bias of fc6"),
        "caffe": (zipped(**caffe | {"conv4_w": np.zeros((3, 3))}), "conv4.weight is 3 x 3, expected"),
        "caffe's more": (zipped(**caffe, mean=np.zeros(3)), "unknown tensor 'mean'"),
    }


def test_what_is_no_file_of_weights_is_refused_in_one_line_and_no_code_in_it_runs(tmp_path, capfd):
    for name, (content, text) in broken_files(tmp_path).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=text) as caught:
            load_any(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value), name
    with pytest.raises(UserError, match="cannot be read \\(No such file"):
        load_any(tmp_path / "nowhere")
    assert "must not run" not in capfd.readouterr().out


def test_a_file_too_large_for_any_alexnet_is_refused_before_it_is_read(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "bomb.npz", conv1_w=np.zeros(1 << 20))
    monkeypatch.setattr(weightfile, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(weightfile.np, "load", None)
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 20
    with pytest.raises(UserError, match="unpacks to more than"):
        load_file(tmp_path / "bomb.npz")
    monkeypatch.setattr(weightfile, "MAX_BYTES", 1 << 10)
    with pytest.raises(UserError, match=r"bytes, expected the weights"):
        load_file(tmp_path / "bomb.npz")


def test_metadata_is_plain_json_that_other_programs_read(ready_shards, tmp_path):
    from safetensors import safe_open

    run = make_run(tmp_path / "runs", "net", ready_shards, DEMO)
    save_safetensors(tmp_path / "a.safetensors", load_run(run))
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        told = json.loads(file.metadata()["input"])
        colors = load_run(run).colors
        assert told["mean"] == colors.mean.tolist() and told["scale"] == colors.std.tolist()
        assert json.loads(file.metadata()["classes"])[0] == [
            load_run(run).classes[0].wnid,
            load_run(run).classes[0].name,
        ]
