"""What each mode sends in a step, and how many images/s a link then allows: what `--parallel auto` chooses by.

The decision that shaped it: bytes follow from the net's shapes by the same sums that exchange.py counts (a test holds
them equal, to the byte), so the only assumptions are the constants below, all of them named: the rates of links, and
the time that one GPU needs. Left out: measuring (benchmarks/parallel.py).
"""

import os
import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.common.errors import UserError
from pipeline.options import CROP_SIZE_PX
from trainer.model import AlexNet
from trainer.parallel import MODES, Mode, check
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from trainer.parallel import Traffic

_CONV3_SIDE_PX = 13  # of conv3's input, in every recipe
_SHIFT_BYTES = 12  # of an image's colour shift, sent with its pixels
_REACHED = 0.8  # of a link's raw rate: an assumption; copies between two GPUs reach about that
_PROGRAM_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Link:
    """What connects the ranks: raw bytes/s in each direction, and what a collective takes before its first byte."""

    name: str
    raw_bytes_per_s: float
    latency_s: float

    def time_s(self, sent_bytes: float, num_collectives: float) -> float:
        return sent_bytes / (_REACHED * self.raw_bytes_per_s) + num_collectives * self.latency_s


@dataclass(frozen=True)
class Device:
    """One GPU, by assumption: images/s of forward and backward, and bytes/s of its memory (for the update)."""

    images_per_s: float = 5000.0
    memory_bytes_per_s: float = 1e12


PCIE4 = Link("PCIe 4 x16", 31.5e9, 20e-6)
PCIE5 = Link("PCIe 5 x16", 63e9, 20e-6)
NVLINK = Link("NVLink 4", 450e9, 15e-6)
NETWORK = Link("400 Gb/s network", 50e9, 30e-6)  # for each GPU
LOOPBACK = Link("loopback", 1e9, 300e-6)  # gloo between processes of one machine
CPU = Device(images_per_s=28.0, memory_bytes_per_s=1e10)  # of the core on which benchmarks/parallel.py was run
_CONV_BACKWARD = 0.6  # of a step's arithmetic: what DistributedDataParallel sends the large layers' gradients behind
_UPDATE_PASSES = 5  # over the weights: reads weight, gradient, velocity; writes weight, velocity


def predict_traffic(
    mode: Mode, recipe: Recipe, num_classes: int, world_size: int, *, activation_bytes: int = 4, gradient_bytes: int = 4
) -> "Traffic":
    """What each rank sends in one step: the bytes of ring collectives, as exchange.count_traffic counts them.

    Buckets of gradients are not known here: their number stands as one.
    """
    from trainer.parallel import Traffic

    with torch.device("meta"):
        net = AlexNet(recipe, num_classes)
    sizes = {name: weight.numel() for name, weight in net.named_parameters()}
    batch, others = recipe.global_batch_size, world_size - 1
    share = others / world_size
    traffic = Traffic()
    if mode != "columns":
        averaged = sum(size for name, size in sizes.items() if mode == "data" or name.startswith("conv"))
        traffic.add("parameters", 2 * share * averaged * gradient_bytes)
    if mode == "data":
        return traffic
    inputs = [net.fc6.in_features, net.fc7.in_features]
    if mode == "columns":
        inputs.append(net.conv3.in_channels * _CONV3_SIDE_PX**2)
        traffic.add("input", others * batch / world_size * CROP_SIZE_PX**2 * 3)
        traffic.add("input", others * batch / world_size * _SHIFT_BYTES)
    for size in inputs:  # gathered going forward; the gradient is summed and scattered going back
        traffic.add("activations", share * batch * size * activation_bytes)
        traffic.add("activations", share * batch * size * activation_bytes)
    for _ in range(2):  # fc8's outputs and their gradient, in float32
        traffic.add("activations", share * batch * num_classes * 4)
    return traffic


def predict_rate(
    mode: Mode,
    recipe: Recipe,
    num_classes: int,
    world_size: int,
    link: Link,
    device: Device = Device(),
) -> float:
    """images/s of `world_size` ranks. Every mode divides the arithmetic evenly; feeding is taken to keep up.

    Gradients are sent behind the convolutions' backward pass, but for the convolutions' own, which end it;
    activations and pixels are waited for.
    """
    with torch.device("meta"):
        net = AlexNet(recipe, num_classes)
    weights = {name: weight.numel() for name, weight in net.named_parameters()}
    conv = sum(size for name, size in weights.items() if name.startswith("conv"))
    total = sum(weights.values())
    held = {"data": total, "columns": total / world_size, "hybrid": conv + (total - conv) / world_size}[mode]
    traffic = predict_traffic(mode, recipe, num_classes, world_size)
    compute_s = recipe.global_batch_size / world_size / device.images_per_s
    update_s = _UPDATE_PASSES * 4 * held / device.memory_bytes_per_s
    waited_s = sum(
        link.time_s(traffic.sent_bytes[kind], traffic.collectives[kind]) for kind in ("activations", "input")
    )
    averaged = traffic.sent_bytes["parameters"]
    last = averaged * conv / total if mode == "data" else averaged
    exposed_s = 0.0
    if averaged:
        behind_s = link.time_s(averaged - last, 1)
        exposed_s = link.time_s(last, 1) + max(0.0, behind_s - _CONV_BACKWARD * compute_s)
    return recipe.global_batch_size / (compute_s + update_s + waited_s + exposed_s)


def choose(recipe: Recipe, num_classes: int, world_size: int, link: Link, device: Device) -> tuple[Mode, str]:
    """(the fastest mode by the model, why). Only modes that recipe and number of ranks allow."""
    rates: dict[Mode, float] = {}
    for mode in MODES:
        try:
            check(mode, recipe, world_size)
        except UserError:
            if mode == "data":  # the batch: no mode can mend that
                raise
            continue
        rates[mode] = predict_rate(mode, recipe, num_classes, world_size, link, device)
    best = max(rates, key=lambda mode: rates[mode])
    listed = ", ".join(f"{mode} {rate:,.0f}" for mode, rate in rates.items())
    why = (
        f"--parallel auto takes {best}: {world_size} ranks over {link.name} and batches of {recipe.global_batch_size} "
        f"should train {listed} images/s (a model, taking {device.images_per_s:,.0f} for one alone)"
    )
    return best, why


def find_link(use_gpu: bool, world_size: int) -> Link:
    """What connects this job's ranks, as far as the driver says; PCIe 4 where it says nothing."""
    if not use_gpu:
        return LOOPBACK
    if world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size)):
        return NETWORK
    if has_nvlink(_ask("nvidia-smi", "topo", "-m")):
        return NVLINK
    generations = re.findall(r"\d+", _ask("nvidia-smi", "--query-gpu=pcie.link.gen.max", "--format=csv,noheader"))
    return PCIE5 if generations and min(map(int, generations)) >= 5 else PCIE4


def has_nvlink(topology: str) -> bool:
    """Whether every two GPUs of `nvidia-smi topo -m` are joined by NVLink ("NV4" and the like in the matrix)."""
    rows = [line.split() for line in topology.splitlines() if re.match(r"GPU\d+\s", line)]
    between = [cell for row in rows for cell in row[1 : 1 + len(rows)] if cell != "X"]
    return bool(between) and all(re.fullmatch(r"NV\d+", cell) for cell in between)


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PROGRAM_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
