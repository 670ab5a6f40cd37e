"""How fast the parts are: the loader alone, so far.

The decision that shaped it: a rate is the median over rounds of equal length, with its spread, after a warm-up; never
one number from one stretch. Left out: comparison with other loaders (scripts in benchmarks/).
"""

import statistics
import time
from dataclasses import dataclass

import torch

from pipeline.colorstats import ColorStats
from pipeline.shardset import ShardSet
from trainer.distributed import Ranks
from trainer.recipe import Recipe
from trainer.train import make_train_loader

NUM_ROUNDS = 5


@dataclass(frozen=True)
class LoaderRate:
    """Images per second of the training loader: median, lowest and highest of `num_rounds` rounds."""

    images_per_s: float
    lowest: float
    highest: float
    num_rounds: int
    num_images: int
    device: str

    def __str__(self) -> str:
        return (
            f"loader ({self.device}): {self.images_per_s:,.0f} images/s, median of {self.num_rounds} rounds "
            f"({self.lowest:,.0f} to {self.highest:,.0f}), {self.num_images:,} images"
        )


def measure_loader(
    shards: ShardSet, recipe: Recipe, use_gpu: bool, num_threads: int | None, duration_s: float
) -> LoaderRate:
    """Feed batches to nobody for about `duration_s` seconds, after one round of warm-up."""
    colors = ColorStats.load(shards.root, shards.fingerprint)
    ranks = Ranks(0, 1, torch.device("cuda" if use_gpu else "cpu"))
    loader = make_train_loader(shards, colors, recipe, ranks, num_threads=num_threads)
    batches = iter(loader)
    rates, num_images = [], 0
    for round_number in range(NUM_ROUNDS + 1):
        start_s, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start_s < duration_s / (NUM_ROUNDS + 1):
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                continue
            count += len(batch.labels)
        if use_gpu:
            torch.cuda.synchronize()
        if round_number:  # the first is the warm-up
            rates.append(count / (time.perf_counter() - start_s))
            num_images += count
    return LoaderRate(statistics.median(rates), min(rates), max(rates), NUM_ROUNDS, num_images, ranks.feed)
