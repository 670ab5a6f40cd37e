"""From what a graph gave for a batch to images on the device: finishes decoded pixels, or fetches stored ones first.

The decision that shaped it: a batch is a list of views (which image, offset, flip, shift) and something that has their
pixels; every combination of decoder, cache and device is one of the two classes below. Left out: epochs (loader.py).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.colorstats import ColorStats
from pipeline.finish import CROP_SIZE_PX, CpuFinisher, GpuFinisher, Transform, Views, run_all, start_threads
from pipeline.graph import Feed, decode_pipeline
from pipeline.kernel import load_kernel
from pipeline.shardset import IMAGE_SIZE_PX, ShardSet
from pipeline.stored import MemoryPixels, RawPixels, SampleTable, choose_memory

Assemble = Callable[[Tensor | None, Tensor, Views], Tensor]  # a graph's pixels, if any; keys (B,); the views wanted
_NUM_PINNED = 3  # one being filled, one on its way, one being read


class Batch(NamedTuple):
    """images (B, 3, 224, 224), for ten crops (B, 10, 3, 224, 224); labels int64 (B,); on the loader's device.

    They stay as they are as long as anybody holds them, or a view of them; their memory is used again afterwards.
    """

    images: Tensor
    labels: Tensor


class Decoded:
    """Images from the pixels of a graph: `cropped` to the views' offsets already, or whole."""

    def __init__(self, colors: ColorStats, transform: Transform, feed: Feed, *, cropped: bool) -> None:
        self._cropped = cropped
        self._in_place = transform.dtype == "uint8" and transform.layout == "NHWC" and cropped
        self._finish = _make_finisher(colors, transform, feed, max(1, (feed.num_threads + 1) // 2))

    def __call__(self, pixels: Tensor | None, keys: Tensor, views: Views) -> Tensor:
        assert pixels is not None
        if self._cropped:
            views = views._replace(offset=torch.zeros_like(views.offset))
        if isinstance(self._finish, GpuFinisher):
            return self._finish(pixels, views)
        if self._in_place:  # the batch is ours, and as it should be but for the flips
            flipped = views.flip.nonzero().flatten().tolist()
            run_all(self._finish.threads, lambda i: pixels[i].copy_(pixels[i].flip(1)), flipped)
            return pixels.permute(0, 3, 1, 2)
        return self._finish(pixels.__getitem__, views)


class Stored:
    """Images of raw shards, or from a cache of decoded ones, which takes what it lacks from the shards."""

    def __init__(
        self,
        shards: ShardSet,
        colors: ColorStats,
        transform: Transform,
        feed: Feed,
        *,
        cached: bool = False,
        num_local_ranks: int = 1,
    ) -> None:
        """Raises UserError for a damaged index, or a cache that does not fit."""
        self._table = SampleTable(shards, feed.split)
        self._raw = RawPixels(self._table) if shards.manifest.encoding == "raw" else None
        self._feed = feed
        self._device = device_of(feed)
        self._memory: MemoryPixels | None = None
        if cached:
            where = choose_memory(len(self._table), self._device, num_local_ranks)
            self._memory = MemoryPixels(len(self._table), where)
        self._decoder: Any = None
        self._finish = _make_finisher(colors, transform, feed, feed.num_threads)
        self._stage = _Stage(self._device, feed) if feed.device == "gpu" else None
        self._threads = start_threads(feed.num_threads) if cached or self._stage else None

    def __call__(self, pixels: Tensor | None, keys: Tensor, views: Views) -> Tensor:
        positions = self._table.find(keys.numpy())
        if self._memory is not None:
            self._fill(self._memory, positions)
            if isinstance(self._finish, GpuFinisher) and self._memory.pixels.device == self._device:
                source = torch.tensor(positions)[views.source]
                return self._finish(self._memory.pixels, views._replace(source=source))
        tops, num_rows = [0] * len(positions), IMAGE_SIZE_PX
        if len(views.source) == len(positions):  # one view of each: only its rows are read
            tops, num_rows = views.offset[:, 0].tolist(), CROP_SIZE_PX

        def load(i: int) -> Tensor:
            if self._memory is not None:
                return self._memory.pixels[positions[i]]
            assert self._raw is not None
            return self._raw.load(positions[i], tops[i], num_rows)

        if isinstance(self._finish, CpuFinisher):
            return self._finish(load, views)
        assert self._stage is not None and self._threads is not None

        def fill(i: int, target: NDArray[np.uint8]) -> None:
            target[...] = load(i).numpy()[tops[i] : tops[i] + num_rows]

        images = self._stage.send(len(positions), num_rows, fill, self._threads)
        if num_rows < IMAGE_SIZE_PX:
            views = views._replace(offset=views.offset * torch.tensor([0, 1]))
        return self._finish(images, views)

    def _fill(self, memory: MemoryPixels, positions: list[int]) -> None:
        """Decode, once, what the cache lacks."""
        missing = memory.missing(positions)
        if not missing:
            return
        if self._raw is not None:
            for position in missing:
                memory.put([position], [self._raw.load(position)], None)
            return
        if self._decoder is None:
            self._decoder = decode_pipeline(replace(self._feed, prefetch_batches=1, decode="host"))
        self._decoder.feed_input("encoded", [self._table.read(position) for position in missing])
        (images,) = self._decoder.run()
        on_host = memory.pixels.device.type == "cpu"
        memory.put(missing, list(torch.from_dlpack(images.as_tensor())), self._threads if on_host else None)
        if self._feed.device == "gpu":  # DALI takes its memory back below, whether the copies are done or not
            torch.cuda.current_stream(self._device).synchronize()
        if memory.num_missing == 0:
            self._decoder = None  # its threads and buffers are not needed again


class InFlight:
    """What a GPU may still be reading. DALI uses a batch's memory again as soon as nobody holds it, which is when the
    copies and kernels that read it are queued, not when they are done."""

    def __init__(self, feed: Feed) -> None:
        self._on_gpu = feed.device == "gpu"
        self._held: deque[tuple[torch.cuda.Event, object]] = deque()

    def hold(self, outputs: object) -> None:
        """Keep `outputs` until all that was queued so far on the current stream is done."""
        if not self._on_gpu:
            return
        done = torch.cuda.Event()
        done.record()
        self._held.append((done, outputs))
        while self._held and self._held[0][0].query():
            self._held.popleft()


class _Stage:
    """Pinned memory from which batches of whole rows go to the GPU on a stream of their own, while it computes."""

    def __init__(self, device: torch.device, feed: Feed) -> None:
        shape = (feed.batch_size, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)
        self._pinned = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_PINNED)]
        self._sent = [torch.cuda.Event() for _ in range(_NUM_PINNED)]
        self._stream, self._device, self._next = torch.cuda.Stream(device), device, 0

    def send(self, num: int, num_rows: int, fill: Callable[[int, NDArray[np.uint8]], None], threads: Any) -> Tensor:
        """uint8 (num, num_rows, 256, 3) on the GPU; `fill(i, target)` writes image i."""
        slot, self._next = self._next, (self._next + 1) % _NUM_PINNED
        self._sent[slot].synchronize()  # until the copy out of it is done; at once if there was none
        pinned = self._pinned[slot][:num, :num_rows] if num_rows == IMAGE_SIZE_PX else (
            self._pinned[slot].view(-1)[: num * num_rows * IMAGE_SIZE_PX * 3].view(num, num_rows, IMAGE_SIZE_PX, 3)
        )  # fmt: skip
        target = pinned.numpy()
        run_all(threads, lambda i: fill(i, target[i]), range(num))
        with torch.cuda.stream(self._stream):
            images = pinned.to(self._device, non_blocking=True)
            self._sent[slot].record(self._stream)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        images.record_stream(current)
        return images


def device_of(feed: Feed) -> torch.device:
    return torch.device("cuda", feed.device_id or 0) if feed.device == "gpu" else torch.device("cpu")


def _make_finisher(colors: ColorStats, transform: Transform, feed: Feed, num_threads: int) -> CpuFinisher | GpuFinisher:
    if feed.device == "gpu":
        return GpuFinisher(transform, colors, device_of(feed))
    return CpuFinisher(transform, colors, num_threads, load_kernel())
