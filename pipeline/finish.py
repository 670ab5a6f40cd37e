"""From uint8 pixels to network input: crop, flip, colour shift, mean, scale, type. The same on every device.

The decision that shaped it: output = (pixel + shift - mean) * factor is written once, for torch. A GPU does it for the
whole batch, in one kernel where torch.compile can make one; a CPU image by image, so that an image is still in the
cache when it is shifted, in threads, into buffers that are used again once nobody holds the batch (a fresh one costs
more in page faults than all of the arithmetic), and by finish.c, with the same bits, where that can be compiled. Left
out: where pixels and draws come from (graph.py, stored.py).
"""

import importlib.util
import math
import os
import shutil
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.colorstats import ORIGINAL_DIVISOR, ColorStats
from pipeline.console import note
from pipeline.errors import UserError
from pipeline.kernel import Kernel
from pipeline.shardset import IMAGE_SIZE_PX

CROP_SIZE_PX = 224
MAX_OFFSET_PX = IMAGE_SIZE_PX - CROP_SIZE_PX  # offsets 0..32: 33 of them, as the released source draws
CENTRE_PX = (MAX_OFFSET_PX // 2, MAX_OFFSET_PX // 2)
# Offsets (y, x) of the five views: four corners and the centre (paper, section 4.1; source: corners at 0 and 32).
FIVE_OFFSETS_PX = ((0, 0), (0, 32), (32, 0), (32, 32), CENTRE_PX)
_ROW = CROP_SIZE_PX * 3
_KEPT_BUFFERS = 4  # free ones; a loop needs two or three
_IMAGES_AT_ONCE = 16  # what a thread takes at a time
_ALIGNMENT = 64

Load = Callable[[int], Tensor]  # the pixels of the i-th image of a batch: uint8 (height, width, 3)


@dataclass(frozen=True)
class Transform:
    """How a stored image becomes network input: output = (pixel + colour shift - mean) / scale.

    mean: "image" (the central 224x224 of the mean image, whatever the crop, subtracted after the flip: so does the
    source) or "channel"; lighting: "paper", "original" (which also divides by 1.1) or None; crop: random offset, else
    the centre; flip: mirror with probability 0.5; unit_variance: divide by the standard deviation of each channel;
    dtype: "float32", "float16", "bfloat16", or "uint8": cropped and flipped pixels, no arithmetic; layout: "NCHW" or
    "NHWC" in memory.
    """

    mean: str = "image"
    lighting: str | None = "paper"
    crop: bool = True
    flip: bool = True
    unit_variance: bool = False
    dtype: str = "float32"
    layout: str = "NCHW"

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[object, ...]] = {
            "mean": ("image", "channel"),
            "lighting": ("paper", "original", None),
            "dtype": ("float32", "float16", "bfloat16", "uint8"),
            "layout": ("NCHW", "NHWC"),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise UserError(f"{field} is {getattr(self, field)!r}, expected one of {', '.join(map(str, values))}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Views(NamedTuple):
    """The parts of some images that become network input, on the host: view n is of image source[n].

    source int64 (N,), offset int (N, 2) as (y, x), flip (N,) 0 or 1, shift float32 (N, 3) in grey levels, or None.
    """

    source: Tensor
    offset: Tensor
    flip: Tensor
    shift: Tensor | None = None


class Constants(NamedTuple):
    """What a transform subtracts and multiplies by, float32 (3,) and (224, 224, 3); None for nothing."""

    mean: Tensor | None
    mean_image: Tensor | None
    factor: Tensor | None

    @classmethod
    def of(cls, transform: Transform, colors: ColorStats) -> "Constants":
        if transform.dtype == "uint8":
            return cls(None, None, None)
        divisor = ORIGINAL_DIVISOR if transform.lighting == "original" else 1.0
        scale = divisor * (colors.std.clip(min=1.0) if transform.unit_variance else np.ones(3))
        top, left = CENTRE_PX
        centre = colors.mean_image[top : top + CROP_SIZE_PX, left : left + CROP_SIZE_PX]
        with_image = transform.mean == "image"
        return cls(
            mean=None if with_image else torch.from_numpy(colors.mean).float(),
            mean_image=torch.from_numpy(np.ascontiguousarray(centre)) if with_image else None,
            factor=torch.from_numpy(1 / scale).float() if (scale != 1).any() else None,
        )

    def bias(self, shift: Tensor | None) -> Tensor | None:
        """What is added to every pixel of a view: (N, 3), or (1, 3) where all views have the same."""
        if self.mean is None:
            return shift
        return -self.mean[None] if shift is None else shift - self.mean


def finish_batch(
    images: Tensor, views: Views, constants: Constants, bias: Tensor | None, dtype: torch.dtype, layout: str
) -> Tensor:
    """All views at once, (N, 3, 224, 224), on the device where everything lies. images: uint8 (M, height, width, 3).

    Plain torch, so that it can be compiled into one kernel, and run anywhere if it cannot.
    """
    steps = torch.arange(CROP_SIZE_PX, device=images.device)
    rows = views.offset[:, 0, None] + steps
    columns = views.offset[:, 1, None] + torch.where(views.flip[:, None] > 0, CROP_SIZE_PX - 1 - steps, steps)
    pixels = images[views.source[:, None, None], rows[:, :, None], columns[:, None, :]]
    if dtype != torch.uint8:
        pixels = pixels.to(torch.float32)
        if bias is not None:
            pixels = pixels + bias[:, None, None, :]
        if constants.mean_image is not None:
            pixels = pixels - constants.mean_image
        if constants.factor is not None:
            pixels = pixels * constants.factor
    pixels = pixels.to(dtype).permute(0, 3, 1, 2)
    return pixels.contiguous() if layout == "NCHW" else pixels


class GpuFinisher:
    """Finishes batches on a CUDA device: `finisher(images, views)`, see finish_batch."""

    def __init__(self, transform: Transform, colors: ColorStats, device: torch.device) -> None:
        self._transform, self._device = transform, device
        self._constants = Constants(*(_to(value, device) for value in Constants.of(transform, colors)))
        self._finish = torch.compile(finish_batch, dynamic=False) if _can_compile() else finish_batch

    def __call__(self, images: Tensor, views: Views) -> Tensor:
        views = Views(*(_to(value, self._device) for value in views))  # type: ignore[arg-type]
        arguments = (
            images,
            views,
            self._constants,
            self._constants.bias(views.shift),
            self._transform.torch_dtype,
            self._transform.layout,
        )
        try:
            return self._finish(*arguments)
        except Exception as error:  # a compiler fails in its own ways; without one the result is the same
            if self._finish is finish_batch:
                raise
            self._finish = finish_batch
            note(f"torch.compile failed ({type(error).__name__}): pixels are finished in several kernels, not in one")
            return self._finish(*arguments)


def _to(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device, non_blocking=True)


def _can_compile() -> bool:
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")  # Triton compiles its launchers
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))


class CpuFinisher:
    """Finishes batches in `num_threads` threads of its own: `finisher(load, views)`, with `kernel` where there is one.

    A batch's memory is its holder's as long as any tensor, view or array of it lives, and is used again after that.
    """

    def __init__(
        self, transform: Transform, colors: ColorStats, num_threads: int, kernel: Kernel | None = None
    ) -> None:
        self._dtype, self._is_nhwc = transform.torch_dtype, transform.layout == "NHWC"
        self._constants = constants = Constants.of(transform, colors)
        self._kernel = None if self._dtype == torch.uint8 else kernel
        self._mean_image = constants.mean_image
        if self._mean_image is not None and not self._is_nhwc:
            self._mean_image = self._mean_image.permute(2, 0, 1).contiguous()
        self._factors = torch.ones(3) if constants.factor is None else constants.factor
        self._buffers = Buffers()
        self.threads = start_threads(num_threads)
        self._local = threading.local()

    def __call__(self, load: Load, views: Views) -> Tensor:
        """(N, 3, 224, 224). `load` is called in the threads; what it gave may be overwritten at the thread's next."""
        num, side = len(views.source), CROP_SIZE_PX
        out = self._buffers.take((num, side, side, 3) if self._is_nhwc else (num, 3, side, side), self._dtype)
        bias = self._constants.bias(views.shift)
        biases = (torch.zeros(1, 3) if bias is None else bias).expand(num, 3).contiguous().unbind()
        source, offset, flip, outs = views.source.tolist(), views.offset.tolist(), views.flip.tolist(), out.unbind()

        def finish(first: int) -> None:
            for n in range(first, min(first + _IMAGES_AT_ONCE, num)):
                pixels, (y, x) = load(source[n]), offset[n]
                if len(pixels) != side:
                    pixels = pixels[y : y + side, x : x + side]
                if self._dtype == torch.float32:
                    self._finish_one(pixels, flip[n], biases[n], outs[n])
                elif self._dtype == torch.uint8:
                    self._copy(pixels.flip(1) if flip[n] else pixels, outs[n])
                else:  # rounded once, at the end
                    work = self._scratch(outs[n].shape)
                    self._finish_one(pixels, flip[n], biases[n], work)
                    outs[n].copy_(work)

        run_all(self.threads, finish, range(0, num, _IMAGES_AT_ONCE))
        return out.permute(0, 3, 1, 2) if self._is_nhwc else out

    def _finish_one(self, pixels: Tensor, is_flipped: bool, bias: Tensor, out: Tensor) -> None:
        if self._kernel is not None:
            self._kernel(pixels, is_flipped, bias, self._mean_image, self._factors, out, not self._is_nhwc)
            return
        self._copy(pixels.flip(1) if is_flipped else pixels, out)
        rows, factors = out, self._factors
        if self._is_nhwc:  # rows of 672 numbers: torch is slow where the innermost dimension is 3
            rows, bias, factors = out.view(CROP_SIZE_PX, _ROW), bias.repeat(CROP_SIZE_PX), factors.repeat(CROP_SIZE_PX)
        else:
            bias, factors = bias[:, None, None], factors[:, None, None]
        rows.add_(bias)
        if self._mean_image is not None:
            rows.sub_(self._mean_image.view(rows.shape))
        if self._constants.factor is not None:
            rows.mul_(factors)

    def _copy(self, pixels: Tensor, out: Tensor) -> None:
        out.copy_(pixels if self._is_nhwc else pixels.permute(2, 0, 1))

    def _scratch(self, shape: torch.Size) -> Tensor:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Buffers().take(tuple(shape), torch.float32)
        return self._local.scratch


class Buffers:
    """Memory for batches. A tensor that is taken owns its memory; once it and all its views are gone, it is free."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=_KEPT_BUFFERS)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any contents, its memory aligned to 64 bytes."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        memory = None
        while self._free and memory is None:
            found = self._free.pop()
            memory = found if found.nbytes >= num_bytes + _ALIGNMENT else None
        if memory is None:
            memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        lent = memory[
            start : start + num_bytes
        ]  # an array of its own: the tensor's memory keeps it alive, nothing else
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)


def start_threads(num_threads: int) -> ThreadPoolExecutor:
    """Threads in which each torch operation runs on one core: theirs. The rest of the process keeps its own number."""
    num_torch_threads = torch.get_num_threads()
    threads = ThreadPoolExecutor(num_threads, thread_name_prefix="alexnet-finish")
    barrier = threading.Barrier(num_threads)  # so that every thread takes one

    def begin(_: int) -> None:
        barrier.wait()
        torch.get_num_threads()  # a thread takes the default at its first look, even if its own was set before
        torch.set_num_threads(1)  # of this thread, and the default of threads to come, which is set right below

    run_all(threads, begin, range(num_threads))
    torch.set_num_threads(num_torch_threads)
    return threads


def run_all(threads: ThreadPoolExecutor, work: Callable[[int], object], items: Iterable[int]) -> None:
    """work(item) for every item, in the threads; the first error is raised when all have ended."""
    futures = [threads.submit(work, item) for item in items]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
