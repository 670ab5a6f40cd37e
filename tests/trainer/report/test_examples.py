"""What is shown of images: the classes that evaluation would give, and the neighbours that a slow search finds."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.colors import ColorStats
from pipeline.loader import EvalLoader, read_pixels
from pipeline.options import Transform
from pipeline.shards import ShardSet
from tests import oracle
from trainer.model import AlexNet
from trainer.recipe import RECIPES, override
from trainer.report.examples import (
    Examples,
    Guess,
    Neighbour,
    choose_shown,
    find_examples,
    first_shards,
    nearest,
)
from trainer.report.pictures import guesses_figure, neighbours_figure, write_png


@pytest.fixture(scope="module")
def shards(ready_shards):
    return ShardSet.open(ready_shards)


@pytest.fixture(scope="module")
def colors(shards):
    return ColorStats.load(shards.root, shards.fingerprint)


@pytest.fixture(scope="module")
def model():
    net = AlexNet.from_recipe(override(RECIPES["demo"], ["width=0.0625", "precision=float32"]), 4, seed=3)
    with torch.no_grad():
        net.fc8.weight.mul_(30.0)  # so that it holds something likely
    return net.eval()


@pytest.fixture(scope="module")
def found(model, shards, colors):
    return find_examples(model, shards, colors, 40)


def look(model, shards, colors, split):
    """Probabilities, hidden layer, labels and pixels of a whole split, one plain pass."""
    loader = EvalLoader(shards, colors, Transform(mean="channel", unit_variance=True), batch_size=100, split=split)
    ((images, labels),) = list(loader)
    kept = []
    hook = model.fc8.register_forward_hook(lambda _, inputs, __: kept.append(inputs[0]))
    with torch.no_grad():
        outputs = torch.softmax(model(images), dim=1)
    hook.remove()
    pixels = torch.cat([batch.images for batch in read_pixels(shards, split=split)])[:, 16:240, 16:240]
    return outputs.numpy(), kept[0].numpy(), labels.numpy(), pixels.numpy()


def test_neighbours_are_those_of_a_slow_search():
    rng = np.random.default_rng(0)
    for num_vectors, num in ((50, 6), (4, 6), (6, 6)):
        vectors = rng.integers(0, 3, (num_vectors, 8)).astype(np.float32)  # few values: many ties
        queries = rng.integers(0, 3, (5, 8)).astype(np.float32)
        positions, distances = nearest(queries, vectors, num)
        expected = [oracle.nearest(query, vectors, num) for query in queries]
        assert positions.tolist() == [[position for position, _ in row] for row in expected]
        np.testing.assert_allclose(distances, [[away for _, away in row] for row in expected], rtol=1e-12)


def choose(labels, wanted):
    return choose_shown(len(labels), wanted, labels.__getitem__)


def test_the_positions_shown_are_evenly_spaced_and_all_different():
    assert choose(range(341), 8) == [21, 63, 106, 149, 191, 234, 277, 319]
    assert choose(range(3), 8) == [0, 1, 2]
    assert choose([0] * 200, 5) == [20, 60, 100, 140, 180]
    assert choose([0], 5) == [0]


def test_images_of_different_classes_are_shown_where_there_are_any():
    dealt = [position % 10 for position in range(200)]  # evenly spaced, these five are all of class 0
    assert [dealt[position] for position in (20, 60, 100, 140, 180)] == [0] * 5
    assert [dealt[position] for position in choose(dealt, 5)] == [0, 1, 2, 3, 4]
    assert choose(dealt, 5) == [20, 61, 102, 143, 184]
    assert choose([0, 0, 0, 1], 4) == [0, 1, 2, 3]
    assert choose([], 5) == []


def test_guesses_are_what_an_evaluation_of_the_same_images_gives(found, model, shards, colors):
    outputs, _, labels, pixels = look(model, shards, colors, "val")
    assert len(found.guesses) == 8
    for position, guess in zip(choose(labels.tolist(), 8), found.guesses, strict=True):
        order = np.argsort(-outputs[position])
        assert (guess.label, guess.classes) == (labels[position], tuple(order))
        np.testing.assert_allclose(guess.probabilities, outputs[position][order], rtol=1e-4)
        np.testing.assert_array_equal(guess.pixels, pixels[position])


def test_rows_are_the_nearest_of_the_training_images_searched_by_the_last_hidden_layer(found, model, shards, colors):
    _, val_hidden, val_labels, val_pixels = look(model, shards, colors, "val")
    _, hidden, labels, pixels = look(model, shards, colors, "train")
    assert found.num_searched == 40
    for position, row in zip(choose(val_labels.tolist(), 5), found.rows, strict=True):
        assert row[0].label == val_labels[position] and row[0].distance == 0.0
        np.testing.assert_array_equal(row[0].pixels, val_pixels[position])
        expected = oracle.nearest(val_hidden[position], hidden[:40], 6)
        np.testing.assert_allclose([n.distance for n in row[1:]], [away for _, away in expected], rtol=1e-4)
        for neighbour, (place, _) in zip(row[1:], expected, strict=True):
            assert neighbour.label == labels[place]
            np.testing.assert_array_equal(neighbour.pixels, pixels[place])


def test_only_the_first_shards_are_read(shards):
    part = first_shards(shards, "train", 17)
    assert part.num_samples("train") == 32 and part.num_samples("val") == 24  # shards of 16
    assert [shard.file for shard in part.shards("train")] == ["train-000000.tar", "train-000001.tar"]
    assert first_shards(shards, "train", 10**6).manifest == shards.manifest


def guess(label, classes, probabilities):
    return Guess(np.zeros((224, 224, 3), np.uint8), label, classes, probabilities)


NAMES = ["tench, Tinca tinca", "a$^$b", "line\nbreak", "x" * 99, "cat"]


def bar_texts(axes):
    return [text.get_text() for text in axes.texts]


def test_bars_are_the_probabilities_and_the_true_class_is_marked():
    figure = guesses_figure([guess(1, (0, 1, 4), (0.7, 0.2, 0.1)), guess(4, (4, 0), (0.9, 0.1))], NAMES)
    images, bars = figure.axes[:4], figure.axes[4:8]
    assert [axes.get_title() for axes in images] == ["✗ a$^$b", "✓ cat", "", ""]
    assert [bar.get_width() for bar in bars[0].patches] == [0.7, 0.2, 0.1]
    assert [bar.get_hatch() for bar in bars[0].patches] == [None, "///", None]
    assert bar_texts(bars[0]) == ["tench", "70 %", "a$^$b", "20 %", "cat", "10 %"]
    assert [bar.get_hatch() for bar in bars[1].patches] == ["///", None]
    figure.canvas.draw()
    for number in bars[0].texts[1::2]:  # the percentages stand beyond the longest bar there could be
        left = number.get_window_extent().transformed(bars[0].transData.inverted()).x0
        assert left >= 1.0


def test_neighbours_show_class_distance_and_whether_the_class_is_the_same():
    pixels = np.zeros((224, 224, 3), np.uint8)
    row = [Neighbour(pixels, 1, 0.0), Neighbour(pixels, 1, 1.5), Neighbour(pixels, 2, 22.25)]
    figure = neighbours_figure([row], NAMES, 40)
    shown = figure.axes[:3]
    assert [axes.get_title() for axes in shown] == ["a$^$b", "✓ a$^$b", "✗ line break"]
    assert [bar_texts(axes) for axes in shown] == [[], ["1.5"], ["22.2"]]
    assert "40 training images" in figure.get_suptitle()


def test_names_that_look_like_markup_and_few_images_can_be_drawn(tmp_path):
    few = Examples([guess(3, (1,), (1.0,))], [[Neighbour(np.zeros((224, 224, 3), np.uint8), 1, 0.0)]], 0)
    for examples in (few, Examples([], [], 0)):
        write_png(guesses_figure(examples.guesses, NAMES), tmp_path / "guesses.png")
        write_png(neighbours_figure(examples.rows, NAMES, examples.num_searched), tmp_path / "neighbours.png")
        for name in ("guesses.png", "neighbours.png"):
            Image.open(tmp_path / name).verify()
    assert guesses_figure(few.guesses, NAMES).axes[0].get_title() == "✗ " + "x" * 19 + "…"
