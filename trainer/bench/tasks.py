"""What alexnet-bench times: the loader with nobody consuming, the step on data on the device, and their limits."""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from torch import Tensor, nn

from pipeline.loader import Batch, TrainLoader
from pipeline.manifest import ENDINGS, IMAGE_SIZE_PX
from pipeline.options import CROP_SIZE_PX, count_threads
from pipeline.shards import ShardSet, read_index
from trainer.bench.rates import Clock, Task, Work
from trainer.distributed import Ranks
from trainer.evaluate import count_errors
from trainer.model import AlexNet
from trainer.recipe import Recipe
from trainer.step import Learner

MAX_SAMPLES = 2048  # of 25 KB each: more than the processor's caches hold, and read in a moment
_LEAD_BATCHES = 4  # two stand ready in DALI's queue, others in whatever comes behind it
_IMAGES_A_STEP = 16  # for each thread
_PIXEL_STD = 70.0  # about that of photographs in grey levels
_PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices: large enough to be limited by arithmetic
_MARKS_A_STEP = 4


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
    num_threads = num_threads or count_threads()
    if encoding == "raw":
        what, work = "reading the same samples alone", _make_read(places)
    else:
        codec = f"libjpeg-turbo (simplejpeg {simplejpeg.__version__})"
        what, work = f"decoding the same whole images alone, {codec}", _make_decode(places)
    return f"{what}, {num_threads} threads", _spread(work, len(places), num_threads)


def _make_read(places: Sequence[Place]) -> Callable[[int, np.ndarray], None]:
    files = {tar: tar.open("rb", buffering=0) for tar in {place.tar for place in places}}

    def read(number: int, into: np.ndarray) -> None:
        place = places[number]
        os.preadv(files[place.tar].fileno(), [into.data.cast("B")[: place.size]], place.offset)

    return read


def _make_decode(places: Sequence[Place]) -> Callable[[int, np.ndarray], None]:
    read, images = _make_read(places), [np.empty(place.size, np.uint8) for place in places]
    for number, image in enumerate(images):
        read(number, image)

    def decode(number: int, into: np.ndarray) -> None:
        simplejpeg.decode_jpeg(images[number], buffer=into)  # lets other threads run meanwhile

    return decode


def _spread(work: Callable[[int, np.ndarray], None], num_images: int, num_threads: int) -> Task:
    """Each thread takes every so-manieth image, into a buffer of its own, so that none waits for another."""
    pool, position = ThreadPoolExecutor(num_threads, "limit"), 0
    buffers = [np.empty((IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), np.uint8) for _ in range(num_threads)]

    def do_part(thread: int, start: int, stop: int) -> None:
        for number in range(start + thread, stop, num_threads):
            work(number % num_images, buffers[thread])

    def run(num_steps: int) -> Work:
        nonlocal position
        start, position = position, position + num_steps * num_threads * _IMAGES_A_STEP
        for part in [pool.submit(do_part, thread, start, position) for thread in range(num_threads)]:
            part.result()
        return Work(position - start)

    return Task(run)


class _Layer(NamedTuple):
    """For one image: the values that a layer reads and writes, its weights with biases, its multiply-accumulates."""

    num_in: int
    num_out: int
    num_weights: int
    num_macs: int


def _measure_layers(recipe: Recipe, num_classes: int) -> dict[str, _Layer]:
    layers: dict[nn.Module, _Layer] = {}

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
        num_macs = output.numel() * weight[0].numel()
        layers[layer] = _Layer(inputs[0].numel(), output.numel(), weight.numel() + bias.numel(), num_macs)

    with torch.device("meta"):  # shapes alone: no weights, no arithmetic
        model, image = AlexNet(recipe, num_classes), torch.empty(1, 3, CROP_SIZE_PX, CROP_SIZE_PX)
    for layer in model.children():
        layer.register_forward_hook(measure)
    model(image)
    return {name: layers[layer] for name, layer in model.named_children()}


def count_macs(recipe: Recipe, num_classes: int = 1000) -> dict[str, int]:
    """Multiply-accumulates of one image's forward pass, by layer: convolutions and full connections only."""
    return {name: layer.num_macs for name, layer in _measure_layers(recipe, num_classes).items()}


def count_step_flops(recipe: Recipe, num_classes: int = 1000) -> int:
    """Floating-point operations of a training step for each image: forward, gradients of weights and of inputs.

    Two operations a multiply-accumulate; the gradient of the images themselves is not computed (conv1).
    """
    macs = count_macs(recipe, num_classes)
    return 2 * (3 * sum(macs.values()) - macs["conv1"])


def count_step_bytes(recipe: Recipe, batch_size: int, num_classes: int = 1000) -> float:
    """Bytes that a float32 training step on the CPU must move for each image if every pass reads its input and writes
    its result once: what no cache saves, with batches whose maps do not fit in one.

    A layer reads its input and writes its output; backward it reads the output's gradient twice (for the weights, for
    the input), its input, and writes the input's gradient (conv1's not). ReLU, forward and backward: five maps; with
    normalisation, in one pass each: five; pooling: its larger side twice, its smaller and the places of the maxima (8
    bytes each) twice. Weights: read forward and backward, their gradient written; the update reads three such and
    writes two.
    """
    layers = _measure_layers(recipe, num_classes)
    maps = sum(3 * layer.num_in + (3 + 5) * layer.num_out for layer in layers.values())
    maps -= layers["conv1"].num_in + 5 * layers["fc8"].num_out  # no gradient of the images; no ReLU of the logits
    pooled = sum(layers[name].num_out for name in ("conv1", "conv2", "conv5"))
    weights = sum(layer.num_weights for layer in layers.values()) * (3 + 5)
    return 4 * (maps + 2 * pooled + 6 * pooled / 4 + weights / batch_size)


class Trainee:
    """A network in training, as the training loop sets one up, and the times of its latest steps' parts."""

    def __init__(self, recipe: Recipe, num_classes: int, ranks: Ranks, clock: Clock = time.perf_counter) -> None:
        self.ranks, self.recipe, self._clock = ranks, recipe, clock
        self.learner = Learner(recipe, num_classes, ranks)
        self.dtype, self.net = self.learner.dtype, self.learner.net
        self.learner.schedule.begin_step(1, 0, 1)
        self.net.train()
        self._sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
        self._marks: list[Any] = []
        self.net.register_forward_pre_hook(self._mark)
        self.net.register_forward_hook(self._mark)
        self.learner.optimizer.register_step_pre_hook(self._mark)
        self.learner.optimizer.register_step_post_hook(self._mark)

    def step(self, batch: Batch) -> None:
        """What the training loop does with a batch."""
        logits = self.learner.step(batch.images, batch.labels)
        self._sums += count_errors(logits, batch.labels)

    def _mark(self, *_: Any) -> None:
        if self.ranks.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(self._clock())

    def take_parts_s(self, num_steps: int) -> dict[str, float]:
        """Median seconds of the parts of the latest `num_steps` steps on this rank; empty if there are none."""
        marks, self._marks = self._marks, []
        steps = [marks[first : first + _MARKS_A_STEP] for first in range(0, len(marks), _MARKS_A_STEP)][-num_steps:]
        if not steps or len(steps[-1]) != _MARKS_A_STEP:
            return {}
        parts = zip(*([_between(a, b) for a, b in pairwise(step)] for step in steps), strict=True)
        return dict(zip(("forward", "backward", "update"), map(statistics.median, parts), strict=True))


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def make_batch(trainee: Trainee, num_classes: int) -> Batch:
    """A rank's share of a synthetic batch, on its device and laid out as the loader's: noise of the input's scale."""
    ranks, recipe = trainee.ranks, trainee.recipe
    generator = torch.Generator(ranks.device).manual_seed(ranks.rank)
    shape = (recipe.global_batch_size // ranks.world_size, 3, CROP_SIZE_PX, CROP_SIZE_PX)
    images = torch.randn(shape, generator=generator, device=ranks.device)
    images *= 1.0 if recipe.unit_variance else _PIXEL_STD
    labels = torch.randint(num_classes, shape[:1], generator=generator, device=ranks.device)
    return Batch(images.contiguous(memory_format=torch.channels_last), labels)


def train_task(trainee: Trainee, batches: Iterator[Batch], clock: Clock = time.perf_counter) -> Task:
    """A step waits for the next batch and trains on it, as the training loop does."""

    def run(num_steps: int) -> Work:
        count, waited_s = 0, 0.0
        for _ in range(num_steps):
            asked_s = clock()
            batch = next(batches)
            waited_s += clock() - asked_s
            trainee.step(batch)
            count += len(batch.labels)
        return Work(count, waited_s)

    return Task(run, lead=2)


def step_task(trainee: Trainee, batch: Batch) -> Task:
    """A step trains on the same batch."""
    return Task(train_task(trainee, itertools.repeat(batch)).run)


def product_task(ranks: Ranks, dtype: torch.dtype) -> tuple[int, Task]:
    """(operations of a step, task): a step multiplies two square matrices. float32 on a GPU may be rounded to TF32,
    since convolutions there are."""
    size = _PRODUCT_SIZE[ranks.device.type]
    a, b = (torch.randn(size, size, device=ranks.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run(num_steps: int) -> Work:
        before = torch.get_float32_matmul_precision()
        if ranks.device.type == "cuda" and torch.backends.cudnn.allow_tf32:
            torch.set_float32_matmul_precision("high")
        try:
            for _ in range(num_steps):
                torch.mm(a, b, out=out)
        finally:
            torch.set_float32_matmul_precision(before)
        return Work(num_steps)

    return 2 * size**3, Task(run)
