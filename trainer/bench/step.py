"""What a training step can do: the step of training on data that lies on the device, in parts and in operations.

The decision that shaped it: it is `train_step` itself that is timed, and the parts (forward, backward, update) are read
off torch's hooks around it, so that nothing is measured that training does not do. Operations are counted from the
network's shapes; the limit beside them is a large matrix product on the same device in the same precision. Left out:
profiles of single kernels (torch.profiler does that).
"""

import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.loader import Batch
from trainer.bench.rates import Clock, Task, Work
from trainer.distributed import Ranks
from trainer.evaluate import count_errors
from trainer.model import AlexNet
from trainer.recipe import Recipe
from trainer.step import Learner

IMAGE_SIZE_PX = 224
_PIXEL_STD = 70.0  # about that of photographs in grey levels
_PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices: large enough to be limited by arithmetic
_MARKS_A_STEP = 4


def count_macs(recipe: Recipe, num_classes: int = 1000) -> dict[str, int]:
    """Multiply-accumulates of one image's forward pass, by layer: convolutions and full connections only."""
    macs: dict[str, int] = {}
    with torch.device("meta"):  # shapes alone: no weights, no arithmetic
        model, image = AlexNet(recipe, num_classes), torch.empty(1, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    for name, layer in model.named_children():

        def count(layer: nn.Module, _inputs: Any, output: Tensor, name: str = name) -> None:
            macs[name] = output[0].numel() * layer.get_parameter("weight")[0].numel()

        layer.register_forward_hook(count)
    model(image)
    return macs


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
    numbers = {"maps": 0.0, "weights": 0.0}
    with torch.device("meta"):
        model, image = AlexNet(recipe, num_classes), torch.empty(1, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    pooled = 0
    for name, layer in model.named_children():

        def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            nonlocal pooled
            into, out = inputs[0].numel(), output.numel()
            numbers["maps"] += (2 if name == "conv1" else 3) * into + 3 * out  # the layer
            numbers["maps"] += 5 * out if name != "fc8" else 0  # what follows it: ReLU, with normalisation or without
            if name in ("conv1", "conv2", "conv5"):
                pooled += out
            numbers["weights"] += sum(p.numel() for p in layer.parameters()) * (3 + 5)

        layer.register_forward_hook(count)
    model(image)
    smaller = pooled / 4
    numbers["maps"] += 2 * pooled + 2 * smaller + 2 * smaller * 2
    return 4 * (numbers["maps"] + numbers["weights"] / batch_size)


class Trainee:
    """A network in training, as run.py sets one up, and the times of its latest steps' parts."""

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
        """What train.py does with a batch."""
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
    shape = (recipe.global_batch_size // ranks.world_size, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    images = torch.randn(shape, generator=generator, device=ranks.device)
    images *= 1.0 if recipe.unit_variance else _PIXEL_STD
    labels = torch.randint(num_classes, shape[:1], generator=generator, device=ranks.device)
    return Batch(images.contiguous(memory_format=torch.channels_last), labels)


def step_task(trainee: Trainee, batch: Batch) -> Task:
    """A step trains on the same batch."""

    def run(num_steps: int) -> Work:
        for _ in range(num_steps):
            trainee.step(batch)
        return Work(num_steps * len(batch.labels))

    return Task(run)


def train_task(trainee: Trainee, batches: Iterator[Batch], clock: Clock = time.perf_counter) -> Task:
    """A step waits for the next batch and trains on it, as train.py does."""

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
