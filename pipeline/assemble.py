"""From what a graph gave for a batch to images on the device: finishes decoded pixels, or gets them on the host first.

The decision that shaped it: a batch is a list of views (which image, offset, flip, shift) and something that has their
pixels; every combination of decoder, cache and device is one of the two classes below. A batch is a job, begun when it
is drawn and asked for later. Left out: epochs (loader.py).
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.colors import ColorStats
from pipeline.finish import CROP_SIZE_PX, GpuFinisher, Transform, Views
from pipeline.graph import Feed
from pipeline.hostfinish import CpuFinisher, make_finisher
from pipeline.hostpixels import HostPixels, ReadRows
from pipeline.manifest import IMAGE_SIZE_PX
from pipeline.shards import ShardSet
from pipeline.stored import ROW_BYTES, MemoryPixels, choose_memory
from pipeline.threads import Job, begin_all, start_threads

T = TypeVar("T")
# A graph's outputs, keys (B,), the views wanted, and how many of them each image has, one after the other.
Assemble = Callable[[Mapping[str, Any], Tensor, Views, int], Job[Tensor]]


class Batch(NamedTuple):
    """images (B, 3, 224, 224), for ten crops (B, 10, 3, 224, 224); labels int64 (B,); on the loader's device.

    They stay as they are as long as anybody holds them, or a view of them; their memory is used again afterwards.
    """

    images: Tensor
    labels: Tensor


def make_assembler(
    shards: ShardSet,
    colors: ColorStats,
    transform: Transform,
    feed: Feed,
    *,
    cropped: bool,
    cached: bool = False,
    num_local_ranks: int = 1,
) -> Assemble:
    """What makes images of `feed`'s graph; `cropped`: the graph, if it decodes, has cut its pixels to the view.

    Raises UserError for a damaged index, or a cache that does not fit.
    """
    if feed.decode in ("host", "stored"):
        return FromHost(shards, colors, transform, feed, cached=cached, num_local_ranks=num_local_ranks)
    return FromGraph(colors, transform, feed, cropped=cropped)


def run_ahead(begun: Iterator[T], num_ahead: int) -> Iterator[T]:
    """The same items in order, each given when the `num_ahead` after it are begun as well."""
    waiting: deque[T] = deque()
    for item in begun:
        waiting.append(item)
        if len(waiting) > num_ahead:
            yield waiting.popleft()
    yield from waiting


class FromGraph:
    """Images from the pixels of a graph: `cropped` to the views' offsets already, or whole."""

    def __init__(self, colors: ColorStats, transform: Transform, feed: Feed, *, cropped: bool) -> None:
        self._cropped = cropped
        self._finish = make_finisher(transform, colors, device_of(feed), feed.num_threads)

    def __call__(self, outputs: Mapping[str, Any], keys: Tensor, views: Views, views_per_image: int = 1) -> Job[Tensor]:
        pixels, finish = outputs["pixels"], self._finish
        if self._cropped:
            views = views._replace(offset=torch.zeros_like(views.offset))
        if isinstance(finish, GpuFinisher):
            return Job([], lambda: finish(pixels, views))
        return finish.begin(pixels.__getitem__, views, views_per_image)


class FromHost:
    """Images from pixels on the host, or from a cache of them, which takes what it lacks from there."""

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
        self._host = HostPixels(shards, feed)
        self._device = device_of(feed)
        self.memory: MemoryPixels | None = None
        if cached:
            num_samples = shards.num_samples(feed.split)
            self.memory = MemoryPixels(num_samples, choose_memory(num_samples, self._device, num_local_ranks))
        self._finish = make_finisher(transform, colors, device_of(feed), feed.num_threads)
        self._stage = _Stage(self._device, feed) if feed.device == "gpu" else None

    def __call__(self, outputs: Mapping[str, Any], keys: Tensor, views: Views, views_per_image: int = 1) -> Job[Tensor]:
        read_rows = self._host.begin(outputs, keys)
        if self.memory is not None:
            return self._from_memory(self.memory, read_rows, self._host.find(keys), views, views_per_image)
        if isinstance(self._finish, GpuFinisher):
            return self._by_stage(read_rows, views, views_per_image, self._finish)
        if "encoded" in outputs and views_per_image == 1 and self._finish.decodes:
            refuse = self._host.refuse
            return self._finish.begin_encoded(outputs["encoded"], views, lambda i, why: refuse(int(keys[i]), why))
        if self._host.is_raw and views_per_image == 1 and self._finish.reads:
            table, positions = self._host.table, self._host.find(keys)
            assert table is not None
            return self._finish.begin_stored(
                *table.locate(positions), views, lambda i, why: table.refuse(positions[i], why)
            )
        tops = views.offset[:, 0].tolist() if views_per_image == 1 and self._host.is_raw else None

        def load(i: int) -> Tensor:
            image, array = self._host.scratch()
            top, num_rows = (0, IMAGE_SIZE_PX) if tops is None else (tops[i], CROP_SIZE_PX)
            read_rows(i, array[top : top + num_rows], top)
            return image

        return self._finish.begin(load, views, views_per_image)

    def _by_stage(self, read_rows: ReadRows, views: Views, views_per_image: int, finish: GpuFinisher) -> Job[Tensor]:
        """Whole rows go to the GPU: of a single view only its own."""
        assert self._stage is not None
        num = len(views.source) // views_per_image
        if views_per_image > 1:
            images = self._stage.begin(num, IMAGE_SIZE_PX, lambda i, rows: read_rows(i, rows, 0))
            return Job([], lambda: finish(images.result(), views))
        tops = views.offset[:, 0].tolist()
        images = self._stage.begin(num, CROP_SIZE_PX, lambda i, rows: read_rows(i, rows, tops[i]))
        cut = views._replace(offset=views.offset * torch.tensor([0, 1]))
        return Job([], lambda: finish(images.result(), cut))

    def _from_memory(
        self, memory: MemoryPixels, read_rows: ReadRows, positions: list[int], views: Views, views_per_image: int
    ) -> Job[Tensor]:
        if memory.array is None:
            return self._from_gpu_memory(memory, read_rows, positions, views)
        array = memory.array

        def keep(i: int) -> int:
            position = positions[i]
            if not memory.has(position):
                read_rows(i, array[position], 0)
                memory.mark([position])
            return position

        if isinstance(self._finish, CpuFinisher):
            return self._finish.begin(lambda i: memory.pixels[keep(i)], views, views_per_image)

        def copy_rows(i: int, rows: NDArray[np.uint8], top: int) -> None:
            rows[...] = array[keep(i)][top : top + len(rows)]

        return self._by_stage(copy_rows, views, views_per_image, self._finish)

    def _from_gpu_memory(
        self, memory: MemoryPixels, read_rows: ReadRows, positions: list[int], views: Views
    ) -> Job[Tensor]:
        finish = self._finish
        assert self._stage is not None and isinstance(finish, GpuFinisher)
        missing = [i for i, position in enumerate(positions) if not memory.has(position)]
        images = self._stage.begin(len(missing), IMAGE_SIZE_PX, lambda n, rows: read_rows(missing[n], rows, 0))
        source = torch.tensor(positions)[views.source]

        def complete() -> Tensor:
            if missing:
                places = [positions[i] for i in missing]
                memory.pixels[torch.tensor(places, device=self._device)] = images.result()
                memory.mark(places)
            return finish(memory.pixels, views._replace(source=source))

        return Job([], complete)


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
        num_slots = feed.prefetch_batches + 2  # those being filled, and one on its way
        num_bytes = feed.batch_size * IMAGE_SIZE_PX * ROW_BYTES
        self._pinned = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(num_slots)]
        self._sent = [torch.cuda.Event() for _ in range(num_slots)]
        self._threads = start_threads(feed.num_threads)
        self._stream, self._device, self._next = torch.cuda.Stream(device), device, 0

    def begin(self, num: int, num_rows: int, fill: Callable[[int, NDArray[np.uint8]], None]) -> Job[Tensor]:
        """uint8 (num, num_rows, 256, 3) on the GPU; `fill(i, rows)` writes image i, in a thread."""
        slot, self._next = self._next, (self._next + 1) % len(self._pinned)
        self._sent[slot].synchronize()  # until the copy out of it is done; at once if there was none
        pinned = self._pinned[slot][: num * num_rows * ROW_BYTES].view(num, num_rows, IMAGE_SIZE_PX, 3)
        target = pinned.numpy()
        return begin_all(
            self._threads, lambda i: fill(i, target[i]), range(num), lambda: self._send(pinned, self._sent[slot])
        )

    def _send(self, pinned: Tensor, sent: torch.cuda.Event) -> Tensor:
        with torch.cuda.stream(self._stream):
            images = pinned.to(self._device, non_blocking=True)
            sent.record(self._stream)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        images.record_stream(current)
        return images


def device_of(feed: Feed) -> torch.device:
    """Where the batches of `feed` come to lie."""
    return torch.device("cuda", feed.device_id or 0) if feed.device == "gpu" else torch.device("cpu")
