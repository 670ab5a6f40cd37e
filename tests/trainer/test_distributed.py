"""One fixed batch, whole on one rank or sliced over two gloo ranks: the same loss, gradients and updates.

Float64, dropout off; tolerance 1e-6 of each tensor's norm.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import UserError
from trainer.distributed import gather, join, launch, reduce_sum
from trainer.evaluate import count_errors
from trainer.learner import train_step
from trainer.model import AlexNet
from trainer.optim import make_optimizer, make_schedule
from trainer.recipe import RECIPES

BATCH_SIZE, NUM_CLASSES, NUM_UPDATES, TOLERANCE = 4, 5, 5, 1e-6
NARROW = replace(RECIPES["paper"], width=1 / 16, dropout=0.0, lr=0.01, init="he", hidden_bias=0.0)


def train_on_fixed_batch(folder: str) -> int:
    """Five updates on this rank's slice; the first rank writes losses, gradients and weights to `folder`."""
    with join(use_gpu=False) as ranks:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(BATCH_SIZE, 3, 224, 224, generator=generator, dtype=torch.float64)
        labels = torch.arange(BATCH_SIZE) % NUM_CLASSES
        part = slice(ranks.rank, None, ranks.world_size)
        model = AlexNet.from_recipe(NARROW, NUM_CLASSES, seed=3).double()
        optimizer = make_optimizer(model, NARROW)
        schedule = make_schedule(NARROW, optimizer)
        net = DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks.world_size > 1 else model
        losses, gradients = [], {}
        for step in range(NUM_UPDATES):
            schedule.begin_step(1, step, NUM_UPDATES)
            logits = train_step(net, optimizer, images[part], labels[part], torch.float32)
            if not step:
                gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
            sums = reduce_sum(
                torch.nn.functional.cross_entropy(logits.detach(), labels[part], reduction="sum")[None], ranks
            )
            losses.append(sums / BATCH_SIZE)
        assert gather(ranks.rank, ranks) == list(range(ranks.world_size))
        if ranks.is_first:
            result = {"losses": torch.cat(losses), "gradients": gradients, "weights": model.state_dict()}
            torch.save(result, Path(folder) / f"{ranks.world_size}.pt")
    return 0


def fail_on_the_last_rank(_folder: str) -> int:
    with join(use_gpu=False) as ranks:
        if ranks.rank == ranks.world_size - 1:
            raise ValueError("this rank fails")
        reduce_sum(torch.zeros(1), ranks)  # the other waits for it
    return 0


def test_two_ranks_on_slices_equal_one_rank_on_the_whole_batch(tmp_path):
    train_on_fixed_batch(str(tmp_path))
    assert launch(train_on_fixed_batch, (str(tmp_path),), 2) == 0
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert (one["losses"] - two["losses"]).norm() <= TOLERANCE * one["losses"].norm()
    assert one["losses"][0] > one["losses"][-1]  # something was learnt
    for kind in ("gradients", "weights"):
        for name, expected in one[kind].items():
            assert (two[kind][name] - expected).norm() <= TOLERANCE * expected.norm(), (kind, name)


def test_a_rank_that_fails_takes_the_other_down_and_the_launcher_says_so(tmp_path):
    with pytest.raises(UserError, match=r"rank [01] failed with status 1"):
        launch(fail_on_the_last_rank, (str(tmp_path),), 2)


def test_the_mistakes_of_slices_add_up_to_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 10, generator=generator), torch.randint(10, (50,), generator=generator)
    parts = sum(count_errors(logits[i::3], labels[i::3]) for i in range(3))
    torch.testing.assert_close(parts, count_errors(logits, labels), rtol=1e-6, atol=0)
