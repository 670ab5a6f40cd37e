"""Errors against a plain NumPy count, and the average over views against the softmax outputs written out."""

import numpy as np
import pytest
import torch

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.options import LoaderOptions
from pipeline.shards import ShardSet
from trainer.distributed import Ranks
from trainer.evaluate import choose_dtype, count_errors, evaluate, log_probabilities, make_eval_loader
from trainer.recipe import RECIPES

CPU = Ranks(0, 1, torch.device("cpu"))


class Linear(torch.nn.Module):
    """Logits that depend on the view: the mean colour, times fixed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.randn(3, 7, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) @ self.weights


def test_counts_equal_sorting_by_hand():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(200, 12)), generator.integers(12, size=200)
    ranked = np.argsort(-logits, axis=1)
    places = np.array([list(row).index(label) for row, label in zip(ranked, labels, strict=True)])
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    losses = -np.log(shifted[np.arange(200), labels] / shifted.sum(axis=1))
    count, loss, wrong1, wrong5 = count_errors(torch.tensor(logits), torch.tensor(labels)).tolist()
    assert (count, wrong1, wrong5) == (200, (places >= 1).sum(), (places >= 5).sum())
    assert loss == pytest.approx(losses.sum(), rel=1e-5)


def test_an_output_that_is_not_a_number_is_a_mistake():
    _, _, wrong1, wrong5 = count_errors(torch.full((3, 10), float("nan")), torch.tensor([0, 1, 2])).tolist()
    assert (wrong1, wrong5) == (3, 3)


def test_with_five_classes_or_fewer_there_is_no_top5_mistake():
    assert count_errors(torch.randn(20, 4), torch.zeros(20, dtype=torch.int64))[3] == 0


def test_ten_views_are_averaged_after_the_softmax():
    net, images = Linear(), torch.randn(2, 10, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 50
    outputs = np.array([[torch.softmax(net(view[None])[0], 0).numpy() for view in image] for image in images])
    expected = outputs.astype(np.float64).mean(axis=1)
    np.testing.assert_allclose(log_probabilities(net, images, torch.float32).exp().numpy(), expected, rtol=1e-4)


def test_an_evaluation_of_another_number_of_images_is_refused(ready_shards):
    shards = ShardSet.open(ready_shards)
    colors = ColorStats.load(shards.root, shards.fingerprint)
    loader = make_eval_loader(shards, colors, RECIPES["demo"], CPU, "centre", LoaderOptions())
    assert evaluate(Linear(), loader, CPU, torch.float32, 24).num_images == 24
    with pytest.raises(UserError, match="evaluated 24 images, expected 25"):
        evaluate(Linear(), loader, CPU, torch.float32, 25)


def test_precision_by_name_and_auto_by_the_hardware():
    assert choose_dtype("bf16", CPU.device) == torch.bfloat16
    assert choose_dtype("float32", CPU.device) == torch.float32
    amx = torch.cpu._is_amx_tile_supported()
    assert choose_dtype("auto", CPU.device) == (torch.bfloat16 if amx else torch.float32)
