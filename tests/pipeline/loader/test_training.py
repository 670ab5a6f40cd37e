"""Training epochs over ranks: who gets which sample, how often, in what order. Samples are known by their keys."""

import itertools

import pytest
import torch

from tests import oracle
from tests.pipeline.loader.loading import NUM_TRAIN, flatten, read_keys, record


@pytest.mark.parametrize(
    ("world_size", "global_batch_size", "num_steps"),
    [(1, 8, 8), (2, 8, 8), (3, 6, 10), (7, 7, 9), (2, 10, 6), (1, 64, 1)],
)
def test_ranks_share_an_epoch_of_distinct_samples_in_equal_steps(
    make_train, shards, world_size, global_batch_size, num_steps
):
    loaders = [
        make_train(rank=rank, world_size=world_size, global_batch_size=global_batch_size) for rank in range(world_size)
    ]
    for _ in range(3):
        parts = [read_keys(loader) for loader in loaders]
        for loader, part in zip(loaders, parts, strict=True):
            assert len(loader) == len(part) == num_steps
            assert {len(keys) for keys in part} == {global_batch_size // world_size}
        seen = flatten(flatten(parts))
        assert len(seen) == len(set(seen)) == num_steps * global_batch_size
        assert set(seen) <= set(oracle.read_samples(shards.tars("train")))
    assert {loader.epoch for loader in loaders} == {4}


def test_the_remainder_of_an_epoch_is_dropped_and_is_another_one_each_time(make_train):
    loader = make_train(global_batch_size=10)
    epochs = [set(flatten(read_keys(loader))) for _ in range(4)]
    assert [len(keys) for keys in epochs] == [60] * 4
    assert len(set(map(frozenset, epochs))) == 4
    assert len(set.union(*epochs)) == NUM_TRAIN


def test_ranks_draw_different_crops_flips_and_shifts(make_train):
    loaders = [make_train(rank=rank, world_size=2) for rank in range(2)]
    for _ in zip(*loaders, strict=True):
        one, other = (loader.draws for loader in loaders)
        assert not torch.equal(one.offset, other.offset)
        assert not torch.equal(one.shift, other.shift)
    flips = [[loader.draws.flip.tolist() for _ in loader] for loader in loaders]
    assert flips[0] != flips[1]


def test_order_and_draws_differ_between_epochs_and_between_seeds(make_train):
    loader = make_train()
    epochs = [record(loader), record(loader), record(make_train(seed=6))]
    for one, other in itertools.combinations(epochs, 2):
        for field in range(2, 6):  # offset, flip, shift, keys
            assert [batch[field] for batch in one] != [batch[field] for batch in other]


def test_a_batch_mixes_images_of_several_shards(make_train, shards):
    shard_of = {key: tar.name for tar in shards.tars("train") for key in oracle.read_samples([tar])}
    num_mixed = [len({shard_of[key] for key in keys}) for keys in read_keys(make_train())]
    assert min(num_mixed) >= 2 and max(num_mixed) >= 3


@pytest.mark.parametrize("other", [{}, {"num_threads": 1}], ids=["same arguments", "one thread"])
def test_the_same_seed_gives_the_same_bits(make_train, other):
    one, same = make_train(), make_train(**other)
    for _ in range(2):
        assert record(one) == record(same)


def test_a_batch_that_is_kept_keeps_its_values(make_train, make_eval):
    for loader in (make_train(), make_eval()):
        kept, copies = [], []
        for batch in loader:
            kept.append(batch)
            copies.append((batch.images.clone(), batch.labels.clone()))
        list(loader)
        for batch, (images, labels) in zip(kept, copies, strict=True):
            assert torch.equal(batch.images, images) and torch.equal(batch.labels, labels)


def test_a_training_loop_left_early_goes_on_where_it_was(make_train):
    loader, whole = make_train(), make_train()
    parts = [record(loader, 3), record(loader, 1)]
    assert (loader.epoch, loader.step) == (1, 4)
    assert parts[0] + parts[1] + record(loader) == record(whole)
    assert (loader.epoch, loader.step) == (2, 0)
