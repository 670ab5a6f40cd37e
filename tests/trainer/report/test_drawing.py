"""Every picture can be read in print, at half its size, and by the colour-blind: letters, dashes, markers."""

import itertools
import re

import numpy as np
import pytest
from matplotlib.text import Text

from tests.trainer.trained import PAPER
from trainer.model import AlexNet
from trainer.report.curves import LEARNING, chart_figure, curves_figure, overfitting_figure, training_errors_figure
from trainer.report.diagram import network_figure
from trainer.report.examples import Guess, Neighbour
from trainer.report.pictures import (
    BLUE,
    GREEN,
    GREY,
    LEAST_PT,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    guesses_figure,
    neighbours_figure,
)

OKABE_ITO = {"#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000"}


def metrics(seed=0):
    generator = np.random.default_rng(seed)
    records = []
    for epoch in range(1, 9):
        error = 90 - 8 * epoch + float(generator.normal())
        common = {"epoch": epoch, "step": 20 * epoch, "loss": error / 15, "top1_error": error, "top5_error": error / 3}
        records.append({"kind": "train", **common, "lr": 0.01, "images_per_s": 1.0, "data_wait_fraction": 0.0})
        records.append({"kind": "eval", **common, "crops": "centre", "num_images": 20})
    records.append({"kind": "event", "name": "lr_cut", "step": 80, "text": "rate 0.001 from epoch 5"})
    return [*records, {**records[-2], "kind": "eval", "crops": "ten"}]


@pytest.fixture(scope="module")
def figures():
    pixels = np.zeros((224, 224, 3), np.uint8)
    runs = {name: metrics(seed) for seed, name in enumerate(("relu", "tanh", "wide", "narrow", "deep"))}
    names = ["a class of a long name indeed", "b"]
    return {
        "curves": curves_figure(metrics(), num_classes=10),
        "chart": chart_figure(LEARNING[0], runs, num_classes=10),
        "training errors": training_errors_figure(runs),
        "overfitting": overfitting_figure(dict(list(runs.items())[:2])),
        "guesses": guesses_figure([Guess(pixels, 0, (1, 0), (0.7, 0.3))], names),
        "neighbours": neighbours_figure([[Neighbour(pixels, 0, 0.0), Neighbour(pixels, 1, 12.5)]], names, 100),
        "network": network_figure(AlexNet.from_recipe(PAPER, 4)),
    }


NAMES = ["curves", "chart", "training errors", "overfitting", "guesses", "neighbours", "network"]


@pytest.mark.parametrize("name", NAMES)
def test_no_letter_is_smaller_than_what_can_be_read_at_half_size(figures, name):
    texts = [text for text in figures[name].findobj(Text) if text.get_text() and text.get_visible()]
    assert len(texts) >= 4
    assert {text.get_text(): text.get_fontsize() for text in texts if text.get_fontsize() < LEAST_PT} == {}


@pytest.mark.parametrize("name", ["curves", "chart", "training errors", "overfitting"])
def test_lines_in_one_picture_differ_in_dash_or_marker_and_not_in_colour_alone(figures, name):
    for axes in figures[name].axes:
        shown = [line for line in axes.lines if not line.get_label().startswith("_")]
        named = [line for line in shown if not re.match("raw|mark", str(line.get_gid()))]
        looks = [(line.get_marker(), line._unscaled_dash_pattern, line.get_linestyle() == "None") for line in named]
        assert len(named) >= 2 or axes.get_title() == "Learning rate"
        assert all(one != other for one, other in itertools.combinations(looks, 2)), name


def test_the_colours_are_okabe_and_itos():
    assert {BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE} <= OKABE_ITO
    red, green, blue = (GREY[at : at + 2] for at in (1, 3, 5))
    assert red == green == blue
