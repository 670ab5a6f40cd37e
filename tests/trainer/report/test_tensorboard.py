"""Events read back by TensorBoard's own reader say what metrics.jsonl says, each step once, names as they are."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.loader import EvalLoader
from pipeline.manifest import ClassEntry
from pipeline.operators import load_operators
from pipeline.shards import ShardSet
from tests.trainer.trained import DEMO, PAPER, draw_state
from trainer.model import AlexNet
from trainer.report.examples import choose_shown
from trainer.report.tensorboard import FOLDER, _literal, is_wanted, open_board, read_samples

pytest.importorskip("tensorboard", reason="tensorboard is not installed")

TRAIN = {"loss": 1.5, "top1_error": 71.25, "top5_error": 20.5, "lr": 0.01, "images_per_s": 200.0}


def read_back(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / FOLDER), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def scalars(events, tag):
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


@pytest.fixture(scope="module")
def material(ready_shards):
    shards = ShardSet.open(ready_shards)
    return shards, ColorStats.load(ready_shards, shards.fingerprint)


@pytest.fixture
def model():
    made = AlexNet.from_recipe(PAPER, 4)
    made.load_state_dict(draw_state(PAPER, 4))
    return made


def record(step, **changes):
    return {**TRAIN, "step": step, "epoch": 1, "data_wait_fraction": 0.125, **changes}


def test_numbers_come_back_as_they_were_logged(material, tmp_path):
    board = open_board(tmp_path, *material, PAPER, None)
    board.train(record(20, gpu_utilisation=0.5, gpu_memory_bytes=1 << 30))
    board.train(record(40, loss=float("nan"), lr=0.001))
    board.eval({"step": 40, "loss": 1.25, "top1_error": 40.5, "top5_error": 3.0})
    board.close()
    events = read_back(tmp_path)
    assert scalars(events, "loss/training") == [(20, 1.5)]  # what is not a number is left out
    assert scalars(events, "top1_error/training") == [(20, 71.25), (40, 71.25)]
    assert scalars(events, "lr") == [(20, 0.01), (40, 0.001)]
    assert scalars(events, "speed/images_per_s") == [(20, 200.0), (40, 200.0)]
    assert scalars(events, "speed/data_wait_fraction") == [(20, 0.125), (40, 0.125)]
    assert scalars(events, "gpu/utilisation") == [(20, 0.5)] and scalars(events, "gpu/memory_bytes") == [(20, 2**30)]
    assert [scalars(events, f"{name}/validation") for name in ("loss", "top1_error", "top5_error")] == [
        [(40, 1.25)],
        [(40, 40.5)],
        [(40, 3.0)],
    ]


def test_no_step_is_there_twice_after_a_resume_and_lost_ones_are_gone(material, model, tmp_path):
    board = open_board(tmp_path, *material, PAPER, None)
    for step in (20, 40, 60, 80):
        board.train(record(step, loss=float(step)))
    board.look(model, torch.float32, 64)
    board.close()
    for _ in range(2):  # resumed within the same second, twice, from step 40
        board = open_board(tmp_path, *material, PAPER, 40)
        board.train(record(60, loss=61.0))
        board.close()
    events = read_back(tmp_path)
    assert scalars(events, "loss/training") == [(20, 20.0), (40, 40.0), (60, 61.0)]
    assert "conv1/kernels" not in events.Tags()["images"] or not events.Images("conv1/kernels")


def test_the_first_layer_and_the_samples_are_pictures(material, model, tmp_path):
    board = open_board(tmp_path, *material, PAPER, None)
    board.look(model, torch.float32, 32)
    board.close()
    events = read_back(tmp_path)
    (kernels,) = events.Images("conv1/kernels")
    pixels = np.asarray(Image.open(io.BytesIO(kernels.encoded_image_string)))
    assert kernels.step == 32 and pixels.shape[1] <= 400 and pixels.std() > 20
    (samples,) = events.Images("samples/images")
    page = np.asarray(Image.open(io.BytesIO(samples.encoded_image_string)))
    assert samples.step == 0 and page.shape == (224, 448, 3)
    crops = read_samples(*material, PAPER).pixels
    assert np.array_equal(page[112:, 112:224], crops[5, ::2, ::2])


@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_any_number_of_samples_fills_rows_of_four(num, material, tmp_path):
    samples = read_samples(*material, PAPER, num)
    board = open_board(tmp_path, *material, PAPER, None)
    board.show(samples, 32)
    board.close()
    event = read_back(tmp_path).Images("samples/images")[-1]
    page = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert page.shape == (112 * -(-num // 4), 448, 3)
    last = (num - 1) % 4 * 112
    assert np.array_equal(page[-112:, last : last + 112], samples.pixels[-1, ::2, ::2])
    assert not page[-112:, last + 112 :].any()


def test_the_answers_are_those_of_an_evaluation_with_names_as_they_are(material, model, tmp_path):
    shards, colors = material
    samples = read_samples(shards, colors, PAPER)
    wild = [ClassEntry(i, f"n{i}", f"<b>|![x](http://{i})") for i in range(4)]
    object.__setattr__(samples, "classes", tuple(wild))
    board = open_board(tmp_path, shards, colors, PAPER, None)
    board._samples = samples
    board.look(model, torch.float32, 32)
    board.close()
    (answer,) = read_back(tmp_path).Tensors("samples/answers/text_summary")
    text = answer.tensor_proto.string_val[0].decode()
    assert answer.step == 32 and len(text.splitlines()) == 2 + 8
    assert "<" not in text and "[" not in text and "http:" not in text
    with torch.no_grad():
        best = model.eval()(samples.images).argmax(dim=1).tolist()
    for line, label, guess in zip(text.splitlines()[2:], samples.labels, best, strict=True):
        assert ("✓" in line) == (label == guess)
        assert line.split("|")[2].endswith(f"{_literal(wild[label].name)} ")


@pytest.mark.parametrize("recipe", [PAPER, DEMO])
def test_samples_are_what_the_evaluation_sees(material, recipe):
    shards, colors = material
    samples = read_samples(shards, colors, recipe, num=5)
    loader = EvalLoader(shards, colors, recipe.transform(train=False), batch_size=24)
    ((images, labels),) = list(loader)
    places = choose_shown(len(labels), 5, labels.tolist().__getitem__)
    assert samples.labels == labels[places].tolist()
    torch.testing.assert_close(samples.images, images[places], rtol=0, atol=0 if load_operators() else 1e-3)


def test_looking_draws_nothing_and_changes_nothing(material, model, tmp_path):
    before, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    board = open_board(tmp_path, *material, PAPER, None)
    board.look(model, torch.float32, 32)
    board.close()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_without_shards_at_hand_there_are_numbers_and_kernels_but_no_samples(material, model, tmp_path):
    shards, colors = material
    from dataclasses import replace

    board = open_board(tmp_path, replace(shards, root=tmp_path / "gone"), colors, PAPER, None)
    board.look(model, torch.float32, 32)
    board.close()
    tags = read_back(tmp_path).Tags()
    assert tags["images"] == ["conv1/kernels"] and tags["tensors"] == []


def test_no_host_name_is_written(material, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "secret-host")
    open_board(tmp_path, *material, PAPER, None).close()
    (path,) = (tmp_path / FOLDER).iterdir()
    assert "secret-host" not in path.name and b"secret-host" not in path.read_bytes()


def test_events_are_written_if_tensorboard_is_there_and_asked_for_in_vain_named(monkeypatch):
    assert is_wanted(None) and is_wanted(True) and not is_wanted(False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not is_wanted(None) and not is_wanted(False)
    with pytest.raises(UserError, match=r"pip install 'alexnet-dali\[tensorboard\]'"):
        is_wanted(True)


def test_what_is_shown_is_what_is_logged():
    from trainer.record.metrics import EvalRecord, GpuFields, TrainRecord
    from trainer.report.tensorboard import _SCALARS

    shown = set(_SCALARS["train"]) | {"step", "epoch", "time_s"}
    assert shown == set(TrainRecord.__annotations__) | set(GpuFields.__annotations__)
    assert set(_SCALARS["eval"]) < set(EvalRecord.__annotations__)
