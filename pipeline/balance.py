"""How much of each batch the host's cores should decode while the GPU decodes the rest.

The decision that shaped it: both decoders are timed at start-up on the shards themselves, each alone, and the share is
the one at which they would finish together. It changes which decoder sees a sample, never which samples come or what
is drawn for them. Left out: decoding (graph.py).
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from pipeline.common.console import note
from pipeline.graph import Feed, eval_pipeline
from pipeline.shards import ShardSet

_WARM_UP_BATCHES = 4
_NUM_BATCHES = 16

Clock = Callable[[], float]


def find_host_share(shards: ShardSet, feed: Feed, clock: Clock = time.perf_counter) -> float:
    """The share of each batch, 0 to 1, for Feed.host_share. Says what it found."""
    # A graph that decodes all on the host, as it will its share: the decoder of decode "host" is another.
    alone = (replace(feed, decode="hybrid", host_share=1.0), replace(feed, decode="mixed"))
    host, gpu = (_images_per_s(shards, one, clock) for one in alone)
    share = round(host / (host + gpu), 2)
    note(f"decoding: {host:,.0f} images/s on the host's cores, {gpu:,.0f} on the GPU: {100 * share:.0f} % on the host")
    return share


def _images_per_s(shards: ShardSet, feed: Feed, clock: Clock) -> float:
    pipeline = eval_pipeline(shards, feed, whole=False)
    for _ in range(_WARM_UP_BATCHES + feed.prefetch_batches):
        pipeline.run()
    _synchronise(feed)
    start_s = clock()
    for _ in range(_NUM_BATCHES):
        pipeline.run()
    _synchronise(feed)
    return _NUM_BATCHES * feed.batch_size / max(clock() - start_s, 1e-9)


def _synchronise(feed: Feed) -> None:
    if feed.device == "gpu":
        torch.cuda.synchronize(feed.device_id)
