"""The share of a hybrid batch that the host decodes: from two rates, and exact in every batch."""

import itertools
from dataclasses import replace

import pytest
import torch
from pipeline.balance import find_host_share
from pipeline.feeding import make_feed

from pipeline import balance, graph
from pipeline.graph import Feed


@pytest.fixture
def feed(shards) -> Feed:
    return make_feed(
        shards,
        "train",
        batch_size=8,
        rank=0,
        world_size=1,
        device="cpu",
        num_threads=2,
        decode="hybrid",
        automatic="hybrid",
    )


@pytest.mark.parametrize(("host_s", "gpu_s", "share"), [(1.0, 1.0, 0.5), (3.0, 1.0, 0.25), (1.0, 4.0, 0.8)])
def test_the_share_is_the_one_at_which_both_decoders_finish_together(shards, feed, host_s, gpu_s, share, capsys):
    times = iter([0.0, host_s, 10.0, 10.0 + gpu_s])  # the clock is read before and after each of the two
    assert find_host_share(shards, feed, clock=lambda: next(times)) == share
    assert f"{100 * share:.0f} % on the host" in capsys.readouterr().err


def test_a_loader_finds_its_share_by_itself_unless_it_is_given(make_train, monkeypatch):
    monkeypatch.setattr("pipeline.loader.find_host_share", lambda *_: 0.125)
    assert make_train(decode="hybrid").feed.host_share == 0.125
    assert make_train(decode="hybrid", host_share=0.25).feed.host_share == 0.25


def test_the_share_found_on_this_machine_is_a_share(shards, feed):
    assert 0 <= find_host_share(shards, feed) <= 1


def test_the_host_decodes_a_whole_number_of_each_batch(feed):
    assert [replace(feed, host_share=k / 16).num_on_host for k in range(17)] == [round(8 * k / 16) for k in range(17)]
    assert [replace(feed, decode=decode).num_on_host for decode in ("host", "mixed", "stored")] == [8, 0, 0]


@pytest.mark.parametrize(("share", "num_on_host"), [(0.0, 0), (0.3, 2), (0.5, 4), (1.0, 8)])
def test_the_first_of_every_batch_are_decoded_on_the_host_and_the_others_on_the_gpu(
    make_train, monkeypatch, share, num_on_host
):
    """What the GPU decodes is marked by being inverted."""
    decode = graph._decode_on

    def decode_and_mark(encoded, feed, position, on_gpu):
        pixels = decode(encoded, feed, position, on_gpu)
        return graph.fn.cast_like(255 - pixels, pixels) if on_gpu else pixels

    options = {"dtype": "uint8", "global_batch_size": 8}
    plain = [batch.images for batch in make_train(**options)]
    monkeypatch.setattr(graph, "_decode_on", decode_and_mark)
    for images, batch in zip(plain, make_train(decode="hybrid", host_share=share, **options), strict=True):
        assert torch.equal(batch.images[:num_on_host], images[:num_on_host])
        assert torch.equal(batch.images[num_on_host:], 255 - images[num_on_host:])


def test_timing_reads_the_same_number_of_batches_from_both(shards, feed, monkeypatch):
    batches = []
    build = balance.eval_pipeline

    def spy(shards, feed, *, whole):
        pipeline = build(shards, feed, whole=whole)
        run = pipeline.run
        pipeline.run = lambda: batches.append((feed.decode, feed.host_share)) or run()
        return pipeline

    monkeypatch.setattr(balance, "eval_pipeline", spy)
    clock = itertools.count()
    assert find_host_share(shards, feed, clock=lambda: next(clock)) == 0.5
    assert batches.count(("hybrid", 1.0)) == batches.count(("mixed", 0.5)) > 16
