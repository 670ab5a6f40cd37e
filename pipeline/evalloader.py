"""Batches for evaluation and statistics: each image of a split exactly once over all ranks, in order.

The decision that shaped it: every rank's reader pads its part to the same number of batches and the loader cuts the
padding off, so that ranks take equal steps and nothing is counted twice. Left out: what is done to the pixels
(graph.py, assemble.py, finish.py).
"""

import math
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.assemble import Assemble, Batch, InFlight, make_assembler, run_ahead
from pipeline.batches import NUMBERS, Batches, read_number
from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.feeding import DecodeOption, check_kinds, check_ranks, count_threads, make_feed
from pipeline.finish import CENTRE_PX, CROP_SIZE_PX, FIVE_OFFSETS_PX, Transform, Views
from pipeline.graph import Feed, eval_pipeline
from pipeline.hostpixels import HostPixels
from pipeline.manifest import IMAGE_SIZE_PX, SPLITS
from pipeline.shards import ShardSet
from pipeline.threads import Job, begin_all, start_threads


class EvalLoader:
    """Every image of a split exactly once over all ranks, in order, `len(loader)` steps on every rank.

    `crops`: "centre" or "ten" (four corners and the centre, then their mirror images). `decode`, of JPEG shards, as for
    TrainLoader, but "auto" is "mixed" on a GPU. A rank may get fewer images, or none, in its last batches: it still
    gets a batch, so that it joins every reduction. Can be iterated any number of times, each time from the start to
    the end. `keys`: of the batch given last, int64 (B,) on the host.
    """

    def __init__(
        self,
        shards: ShardSet,
        colors: ColorStats,
        *,
        batch_size: int = 128,
        crops: Literal["centre", "ten"] = "centre",
        split: str = "val",
        rank: int = 0,
        world_size: int = 1,
        device: Literal["cpu", "gpu"] = "cpu",
        decode: DecodeOption = "auto",
        host_share: float | None = None,
        mean: str = "image",
        unit_variance: bool = False,
        dtype: str = "float32",
        layout: str = "NCHW",
        num_threads: int | None = None,
    ) -> None:
        check_kinds(shards, colors, batch_size=batch_size, rank=rank, world_size=world_size)
        check_ranks(rank, world_size)
        if split not in SPLITS:
            raise UserError(f"split {split!r}: expected {' or '.join(map(repr, SPLITS))}")
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: expected 1 or more")
        if crops not in ("centre", "ten"):
            raise UserError(f"crops {crops!r}: expected 'centre' or 'ten'")
        num_samples = shards.num_samples(split)
        if not num_samples:
            raise UserError(f"{shards.root}: no {split} images; add a {split}/ folder to the source and shard it again")
        transform = Transform(mean, None, False, False, unit_variance, dtype, layout)
        shards.fetch(split)
        num_parts = min(world_size, num_samples)  # DALI needs a sample for each part; ranks beyond them get none
        feed = make_feed(
            shards,
            split,
            batch_size=batch_size,
            rank=rank,
            world_size=num_parts,
            device=device,
            num_threads=count_threads() if num_threads is None else num_threads,
            decode=decode,
            automatic="mixed",
            host_share=host_share,
        )
        self._num_steps = math.ceil(math.ceil(num_samples / num_parts) / batch_size)
        self._shards, self._split, self._dtype = shards, split, transform.torch_dtype
        views = [(*CENTRE_PX, 0)]
        if crops == "ten":
            views = [(y, x, flip) for flip in (0, 1) for y, x in FIVE_OFFSETS_PX]
        self._views = torch.tensor(views)
        self._empty_on = "cuda" if device == "gpu" else "cpu"
        self._feed, self._in_flight = feed, InFlight(feed)
        self.keys = torch.empty(0, dtype=torch.int64)
        self._batches: Batches | None = None
        self._running: Generator[dict[str, Any], None, None] | None = None
        if rank < num_parts:
            self._assemble: Assemble = make_assembler(shards, colors, transform, feed, cropped=crops == "centre")
            self._batches = _once(shards, feed, whole=crops == "ten")

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is None:
            for _ in range(self._num_steps):
                yield self._shape(torch.empty((0, 3, CROP_SIZE_PX, CROP_SIZE_PX), dtype=self._dtype), torch.empty(0))
            return
        if self._running is not None:
            self._running.close()  # an earlier loop that was left, but is still held by somebody
        self._shards.check(self._split)
        self._running = _from_start(self._batches, self._shards, self._feed)
        begun = ((self._begin(outputs), outputs) for outputs in self._running)
        for job, outputs in run_ahead(begun, self._feed.num_ahead):
            batch = job.result()
            self._in_flight.hold((outputs, batch.labels))
            self.keys = read_number(outputs["key"])
            yield batch

    def _begin(self, outputs: dict[str, Any]) -> Job[Batch]:
        labels, keys, num_views = read_number(outputs["label"]), read_number(outputs["key"]), len(self._views)
        views = self._views.repeat(len(labels), 1)  # all of the first image, then all of the second, ...
        source = torch.arange(len(labels)).repeat_interleave(num_views)
        images = self._assemble(outputs, keys, Views(source, views[:, :2], views[:, 2]), num_views)
        return Job([], lambda: self._shape(images.result(), labels))

    def _shape(self, images: Tensor, labels: Tensor) -> Batch:
        if len(self._views) > 1:
            images = images.reshape(len(labels), len(self._views), *images.shape[1:])
        return Batch(images.to(self._empty_on), labels.to(self._empty_on, torch.int64, non_blocking=True))


def read_pixels(
    shards: ShardSet,
    *,
    split: str = "train",
    batch_size: int = 64,
    device: Literal["cpu", "gpu"] = "cpu",
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """Every stored image of a split once, in order, unchanged: images uint8 (B, 256, 256, 3) RGB, labels int64 (B,)."""
    feed = make_feed(
        shards,
        split,
        batch_size=batch_size,
        rank=0,
        world_size=1,
        device=device,
        num_threads=count_threads() if num_threads is None else num_threads,
        decode="auto",
        automatic="mixed",
    )
    shards.fetch(split)
    on = torch.device("cuda" if device == "gpu" else "cpu")
    batches = _from_start(_once(shards, feed, whole=True), shards, feed)
    if feed.decode not in ("host", "stored"):
        for outputs in batches:
            yield Batch(outputs["pixels"], read_number(outputs["label"]).to(on))
        return
    host, threads = HostPixels(shards, feed), start_threads(feed.num_threads)

    def begin(outputs: dict[str, Any]) -> Job[Batch]:
        labels = read_number(outputs["label"])
        read_rows = host.begin(outputs, read_number(outputs["key"]))
        images = torch.empty((len(labels), IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), dtype=torch.uint8)
        array = images.numpy()
        return begin_all(
            threads,
            lambda i: read_rows(i, array[i], 0),
            range(len(labels)),
            lambda: Batch(images.to(on), labels.to(on)),
        )

    for job in run_ahead(map(begin, batches), feed.num_ahead):
        yield job.result()


def _once(shards: ShardSet, feed: Feed, *, whole: bool) -> Batches:
    return Batches(eval_pipeline(shards, feed, whole=whole), shards, feed, NUMBERS)


def _from_start(batches: Batches, shards: ShardSet, feed: Feed) -> Generator[dict[str, Any], None, None]:
    """The batches of one epoch without their padding: the last ones may be short, or empty."""
    num_samples, rank, world_size = shards.num_samples(feed.split), feed.rank, feed.world_size
    num_left = num_samples * (rank + 1) // world_size - num_samples * rank // world_size
    try:
        while batches.num_left:
            outputs = batches.take()
            num = min(num_left, feed.batch_size)
            num_left -= num
            yield {name: value if name == "encoded" else value[:num] for name, value in outputs.items()}
    except GeneratorExit:  # a loop left early; after an error of DALI's there is nothing to read on to
        with suppress(AttributeError):  # of a pipeline that is being taken apart together with its loader
            batches.finish_epoch()
        raise
    batches.finish_epoch()
