"""Evaluation: every image exactly once, over any number of ranks. Images are known by their bytes."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from tests import oracle
from tests.pipeline.loader.loading import NUM_TRAIN, NUM_VAL, flatten, list_images


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, NUM_VAL, NUM_VAL + 3])
def test_every_evaluation_image_comes_exactly_once_over_all_ranks(make_eval, shards, colors, world_size):
    parts = []
    for rank in range(world_size):
        loader = make_eval(rank=rank, world_size=world_size)
        parts.append(list(loader))
        assert len(parts[-1]) == len(loader) == len(parts[0])  # so that every rank joins every reduction
    stored = oracle.read_samples(shards.tars("val")).values()
    expected = Counter(
        (oracle.central_crop(pixels, mean=colors.mean.astype(np.float32)).astype(np.float32).tobytes(), label)
        for pixels, label in stored
    )
    assert len(expected) == NUM_VAL
    assert Counter(list_images(flatten(parts))) == expected
    sizes = [sum(len(batch.labels) for batch in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("batch_size", "sizes"), [(24, [24]), (25, [24]), (10, [10, 10, 4]), (1, [1] * 24)])
def test_the_last_evaluation_batch_holds_what_is_left(make_eval, batch_size, sizes):
    loader = make_eval(batch_size=batch_size)
    assert [len(batch.images) for batch in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize(("crops", "views"), [("centre", ()), ("ten", (10,))])
def test_a_rank_without_images_gets_empty_batches_of_the_right_shape(make_eval, crops, views):
    batches = list(make_eval(rank=NUM_VAL, world_size=NUM_VAL + 1, crops=crops, dtype="float16"))
    assert [batch.images.shape for batch in batches] == [(0, *views, 3, 224, 224)]
    assert batches[0].images.dtype == torch.float16
    assert batches[0].labels.shape == (0,) and batches[0].labels.dtype == torch.int64


def test_evaluation_can_be_repeated(make_eval):
    loader = make_eval(batch_size=10)
    first = list_images(loader)
    assert len(first) == NUM_VAL
    assert list_images(loader) == first
    assert list_images(loader) == first


@pytest.mark.parametrize("num_taken", [1, 2, 3])
def test_an_evaluation_left_early_starts_anew(make_eval, num_taken):
    loader = make_eval(batch_size=10)
    whole = list_images(loader)
    assert len(list(itertools.islice(loader, num_taken))) == num_taken
    assert list_images(loader) == whole


def test_the_training_split_can_be_evaluated(make_eval):
    loader = make_eval(split="train", batch_size=20)
    assert (len(loader), len(set(list_images(loader)))) == (4, NUM_TRAIN)


def test_a_new_loop_over_an_evaluation_loader_sees_everything_while_an_old_one_is_held(make_eval):
    loader = make_eval(batch_size=5)
    held = iter(loader)
    next(held)
    assert sum(len(batch.labels) for batch in loader) == NUM_VAL
    assert held is not None
