"""When a step does not fit into a GPU's memory: which batch would.

The decision that shaped it: two small batches are run, and what a step takes is a line through what they took, so the
answer is of this net, this precision and this machine, and not of a table. Left out: divided nets (columns, hybrid),
whose steps one rank cannot run alone; there half of the batch is what is said.
"""

from collections.abc import Callable
from typing import Protocol

import torch

_SPARE = 0.05  # of the memory: the allocator's gaps
_ROUND = 8  # local batches of at least twice this are a multiple of it


class Meter(Protocol):
    """Memory of a device, in bytes."""

    def reset(self) -> None:
        """Give back what is not used, and measure from now on."""

    def peak(self) -> int:
        """The most that has been held since `reset`."""

    def available(self) -> int:
        """All that the training could hold."""


class GpuMeter:
    """Of the current GPU, as far as torch is concerned: what others hold there (the decoder) is not available."""

    def reset(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def available(self) -> int:
        self.reset()
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated()


def find_fitting_batch(run: Callable[[int], None], meter: Meter, tried: int, later_bytes: int = 0) -> int | None:
    """The largest batch below `tried` that should fit; None if not even two images do.

    `run` takes a step of so many images. `later_bytes`: what is not held yet, and will be (a first step's velocity).
    """
    small = max(1, tried // 16)
    while True:
        try:
            low, high = (_measure(run, meter, number) for number in (small, 2 * small))
            break
        except torch.OutOfMemoryError:
            if small == 1:
                return None
        small = max(1, small // 4)
    each = max((high - low) / small, 1.0)
    fixed = low - each * small + later_bytes
    number = min(int((meter.available() * (1 - _SPARE) - fixed) / each), tried - 1)
    if number >= 2 * _ROUND:
        number -= number % _ROUND
    return number if number >= 1 else None


def _measure(run: Callable[[int], None], meter: Meter, number: int) -> int:
    meter.reset()
    run(number)
    return meter.peak()


def explain(tried: int, fitting: int | None, world_size: int, *, is_measured: bool = True) -> str:
    """One line with the remedy; `tried` and `fitting` are images on each rank."""
    each = f" ({tried} on each of {world_size} GPUs)" if world_size > 1 else ""
    what = f"out of GPU memory with --global-batch-size {tried * world_size}{each}"
    if fitting is None:
        return f"{what}; no batch would fit here: see with nvidia-smi who holds its memory, or use --set width=0.5"
    how = "two smaller steps were measured" if is_measured else "half of it, not measured"
    return f"{what}; --global-batch-size {fitting * world_size} would fit ({how})"
