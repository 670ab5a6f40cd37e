"""The contestants of step.py: training steps on one batch that lies in memory, each library's way as it is written.

"The usual reproduction" is what public AlexNet repositories have in common: a Sequential of Conv2d, ReLU(inplace),
nn.LocalResponseNorm and MaxPool2d in NCHW float32, dropout before the linear layers, torch.optim.SGD with momentum and
weight decay. Most of them leave out the groups, which makes a larger network, so it runs both ways. The limits do the
arithmetic, or move the bytes, of so many images. The race runs it as `python peers/step.py NAME JOB`.
"""
# mypy: disable-error-code="import-not-found,import-untyped"

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness.children import Contestant, serve
from torch import Tensor, nn
from torch.nn import functional

IMAGE_PX, PRODUCT_SIZE, STREAM_ELEMENTS = 224, 2048, 1 << 26
LIMIT_S = 1.5
Job = dict[str, Any]


@dataclass
class Way:
    """A step to repeat, how many images it counts for, and what is reported beside its rate."""

    step: Callable[[], object]
    num_images: float
    lrn: Callable[[], object] | None = None  # the normalisations of a step alone, forward and backward
    num_parameters: int | None = None
    note: str = ""
    least_s: float = 0.0  # of a turn


# Ours.


def ours(job: Job, recipe_name: str, *settings: str) -> Way:
    from trainer.distributed import Ranks
    from trainer.evaluate import count_errors
    from trainer.recipe import RECIPES, override
    from trainer.step import Learner

    settings = (f"global_batch_size={job['batch']}", *settings)
    recipe = override(RECIPES[recipe_name], settings)
    learner = Learner(recipe, job["classes"], Ranks(0, 1, torch.device("cpu")))
    learner.schedule.begin_step(1, 0, 1000)
    learner.net.train()
    images, labels = make_batch(job)
    images = images.to(memory_format=torch.channels_last)
    sums = torch.zeros(4, dtype=torch.float64)

    def step() -> None:
        nonlocal sums
        sums += count_errors(learner.step(images, labels), labels)

    net = learner.model
    maps = [(net.conv1.out_channels, 55), (net.conv2.out_channels, 27)]
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    norms = [lambda x: net._normalise(x, relu=True)] * 2 if recipe.lrn else []
    return Way(step, job["batch"], make_lrn(norms, maps, job["batch"], dtype, torch.channels_last), count(net))


# The others.


def usual_net(num_classes: int, groups: int) -> nn.Module:
    """AlexNet as public repositories write it; groups 2 is the paper's network, 1 what most of them have."""

    def norm() -> nn.Module:
        return nn.LocalResponseNorm(size=5, alpha=1e-4, beta=0.75, k=2)

    return nn.Sequential(
        nn.Conv2d(3, 96, 11, stride=4, padding=2), nn.ReLU(inplace=True), norm(), nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 256, 5, padding=2, groups=groups), nn.ReLU(inplace=True), norm(), nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 384, 3, padding=1, groups=groups), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1, groups=groups), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(9216, 4096), nn.ReLU(inplace=True),
        nn.Dropout(0.5), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
        nn.Linear(4096, num_classes),
    )  # fmt: skip


def torchvision_net(num_classes: int) -> tuple[nn.Module, str]:
    """torchvision.models.alexnet, or the same rebuilt here where that cannot be imported; and which of the two."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # its CUDA wheel beside torch's CPU wheel: an operator is missing
        net = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.AdaptiveAvgPool2d((6, 6)), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(9216, 4096), nn.ReLU(inplace=True),
            nn.Dropout(0.5), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )  # fmt: skip
        return net, f"rebuilt ({type(error).__name__})"
    return torchvision.models.alexnet(num_classes=num_classes), f"torchvision {torchvision.__version__}"


def usual(job: Job, groups: int, bf16: bool = False, channels_last: bool = False) -> Way:
    net = usual_net(job["classes"], groups)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dtype = torch.bfloat16 if bf16 else torch.float32
    norms = [layer for layer in net if isinstance(layer, nn.LocalResponseNorm)]
    with_relu: list[Callable[[Tensor], Tensor]] = [lambda x, norm=norm: norm(torch.relu(x)) for norm in norms]
    lrn = make_lrn(with_relu, [(96, 55), (256, 27)], job["batch"], dtype, layout)
    return Way(make_step(job, net, bf16, layout, decay=5e-4), job["batch"], lrn, count(net))


def torchvision(job: Job) -> Way:
    net, which = torchvision_net(job["classes"])
    return Way(
        make_step(job, net, False, torch.contiguous_format, decay=1e-4), job["batch"], None, count(net), note=which
    )


def make_step(job: Job, net: nn.Module, bf16: bool, layout: torch.memory_format, decay: float) -> Callable[[], None]:
    """The loop's body that everybody writes, torchvision's references too: the loss is read in each step."""
    net = net.to(memory_format=layout).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=decay)
    images, labels = make_batch(job)
    images = images.to(memory_format=layout)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


# What the machine can do.


def products(job: Job) -> Way:
    """Large matrix products, counted as images of so many operations each."""
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE) for _ in range(2))
    out = torch.empty_like(a)
    return Way(lambda: torch.mm(a, b, out=out), 2 * PRODUCT_SIZE**3 / job["flops"], least_s=LIMIT_S)


def streams(job: Job) -> Way:
    """b += a over arrays larger than a core's caches, counted as images of so many bytes each: two reads, one write."""
    a, b = torch.ones(STREAM_ELEMENTS), torch.ones(STREAM_ELEMENTS)
    return Way(lambda: b.add_(a), 3 * a.nbytes / job["bytes"], least_s=LIMIT_S)


# What all need.


def make_batch(job: Job) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(job["batch"], 3, IMAGE_PX, IMAGE_PX, generator=generator)
    return images, torch.randint(job["classes"], (job["batch"],), generator=generator)


def make_lrn(
    norms: list[Callable[[Tensor], Tensor]],
    maps: list[tuple[int, int]],
    batch: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> Callable[[], None] | None:
    """ReLU and normalisation of all layers that have one, forward and backward, on maps of their own."""
    if not norms:
        return None
    shapes = [(batch, num, side, side) for num, side in maps]

    def run() -> None:
        for norm, shape in zip(norms, shapes, strict=True):
            x = torch.randn(shape).to(dtype).to(memory_format=layout).requires_grad_()
            gradient = torch.ones(shape, dtype=dtype).to(memory_format=layout)
            started = time.perf_counter()
            norm(x).backward(gradient)
            spent_s[0] += time.perf_counter() - started

    return run


spent_s = [0.0]


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


WAYS: dict[str, Callable[[Job], Way]] = {
    "ours": lambda job: ours(job, "paper"),
    "ours-bf16": lambda job: ours(job, "paper", "precision=bf16"),
    "ours-no-lrn": lambda job: ours(job, "paper", "lrn=false"),
    "ours-owt": lambda job: ours(job, "owt"),
    "usual": lambda job: usual(job, groups=2),
    "usual-ungrouped": lambda job: usual(job, groups=1),
    "usual-nhwc": lambda job: usual(job, groups=2, channels_last=True),
    "usual-bf16": lambda job: usual(job, groups=2, bf16=True),
    "torchvision": torchvision,
    "limit-products": products,
    "limit-memory": streams,
}


def make(name: str, job: Job) -> Contestant:
    torch.set_num_threads(job["workers"])
    torch.manual_seed(0)
    way = WAYS[name](job)

    def run(seconds: float) -> list[float]:
        """A step to find the pace again, then steps for `seconds`, two at least."""
        way.step()
        started, num_steps = time.perf_counter(), 0
        while num_steps < 2 or time.perf_counter() - started < max(seconds, way.least_s):
            way.step()
            num_steps += 1
        took_s = time.perf_counter() - started
        return [num_steps * way.num_images, took_s, (num_steps + 1) * way.num_images]

    def look() -> dict[str, Any]:
        return {"num_parameters": way.num_parameters, "note": way.note}

    def lrn_s() -> float | None:
        """Seconds of a step's normalisations: the best of three."""
        if way.lrn is None:
            return None
        best = float("inf")
        for _ in range(4):
            spent_s[0] = 0.0
            way.lrn()
            best = min(best, spent_s[0])
        return best

    return Contestant({"run": run, "look": look, "lrn_s": lrn_s}, ("torch", "torchvision", "alexnet-dali"))


if __name__ == "__main__":
    serve(make)
