"""What feeding can do: the training loader with nobody consuming, and the machine's limit beside it.

The decision that shaped it: the limit is the same stored images, taken out of the same shards into memory and put
through the codec alone (libjpeg-turbo, whole images) by a thread for each core, with no reading, shuffling, cropping or
normalising. Raw shards have no codec: there the limit is reading the same samples. Left out: other loaders; they stand
in benchmarks/.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.loader import Batch, TrainLoader
from pipeline.manifest import ENDINGS, IMAGE_SIZE_PX
from pipeline.shards import ShardSet, read_index
from trainer.bench.rates import Task, Work
from trainer.bench.usage import count_cores

MAX_SAMPLES = 2048  # of 25 KB each: more than the processor's caches hold, and read in a moment
_LEAD_BATCHES = 4  # two stand ready in DALI's queue, others in whatever comes behind it
_IMAGES_A_STEP = 16  # for each thread


class Place(NamedTuple):
    """Where a stored image's bytes lie."""

    tar: Path
    offset: int
    size: int


def endless(loader: TrainLoader) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from loader


def loader_task(batches: Iterator[Batch]) -> Task:
    """A step takes one batch and drops it."""

    def run(num_steps: int) -> Work:
        return Work(sum(len(batch.labels) for batch in itertools.islice(batches, num_steps)))

    return Task(run, lead=_LEAD_BATCHES)


def find_samples(shards: ShardSet, limit: int = MAX_SAMPLES) -> list[Place]:
    """Where the training images lie: all, or `limit` spread evenly. Raises UserError for a bad index."""
    ending, places = ENDINGS[shards.manifest.encoding], []
    wanted = np.unique(np.linspace(0, shards.num_samples("train") - 1, limit).astype(np.int64))
    first = 0
    for tar, path, shard in zip(shards.tars("train"), shards.indices("train"), shards.shards("train"), strict=True):
        here = wanted[(wanted >= first) & (wanted < first + shard.samples)] - first
        if len(here):
            index = read_index(path, shard, ending)
            places += [Place(tar, int(index.offsets[row]), int(index.sizes[row])) for row in here]
        first += shard.samples
    return places


def limit_task(places: Sequence[Place], encoding: str, num_threads: int | None = None) -> tuple[str, Task]:
    """What feeding cannot be faster than, as (words for it, task): a step decodes (raw: reads) 16 images a thread."""
    num_threads = num_threads or count_cores()
    if encoding == "raw":
        words = f"reading the same samples alone, {num_threads} threads"
        return words, _spread(_make_read(places), places, num_threads)
    import simplejpeg

    codec = f"libjpeg-turbo (simplejpeg {simplejpeg.__version__})"
    words = f"decoding the same whole images alone, {codec}, {num_threads} threads"
    return words, _spread(_make_decode(places), places, num_threads)


def _make_decode(places: Sequence[Place]) -> Callable[[int, np.ndarray], None]:
    import simplejpeg

    images = [_read(place) for place in places]

    def decode(number: int, into: np.ndarray) -> None:
        simplejpeg.decode_jpeg(images[number], buffer=into)  # lets other threads run meanwhile

    return decode


def _make_read(places: Sequence[Place]) -> Callable[[int, np.ndarray], None]:
    files = {tar: tar.open("rb", buffering=0) for tar in {place.tar for place in places}}

    def read(number: int, into: np.ndarray) -> None:
        place = places[number]
        os.preadv(files[place.tar].fileno(), [into.data.cast("B")[: place.size]], place.offset)

    return read


def _read(place: Place) -> bytes:
    with place.tar.open("rb") as file:
        file.seek(place.offset)
        return file.read(place.size)


def _spread(work: Callable[[int, np.ndarray], None], places: Sequence[Place], num_threads: int) -> Task:
    """Each thread takes every so-manieth image, into a buffer of its own, so that none waits for another."""
    pool, position = ThreadPoolExecutor(num_threads, "limit"), 0
    buffers = [np.empty((IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), np.uint8) for _ in range(num_threads)]

    def do_part(thread: int, start: int, stop: int) -> None:
        for number in range(start + thread, stop, num_threads):
            work(number % len(places), buffers[thread])

    def run(num_steps: int) -> Work:
        nonlocal position
        start, position = position, position + num_steps * num_threads * _IMAGES_A_STEP
        for part in [pool.submit(do_part, thread, start, position) for thread in range(num_threads)]:
            part.result()
        return Work(position - start)

    return Task(run)
