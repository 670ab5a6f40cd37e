"""Pixels to network input on the host: image by image, in threads, while each image is still in a core's cache.

The decision that shaped it: whoever has the pixels hands them over one image at a time (`Load`), so that decoding and
finishing are one walk over the image. The result goes past the caches into buffers that are used again once nobody
holds the batch: a fresh one costs more in page faults than all of the arithmetic. finish.c does it where it can be
compiled, torch with the same bits where not. Left out: the formula and the GPU (finish.py).
"""

import ctypes
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.finish import CROP_SIZE_PX, Constants, GpuFinisher, Transform, Views
from pipeline.kernel import MESSAGE_BYTES, Kernel, load_kernel
from pipeline.threads import Job, begin_all, start_threads

_ROW = CROP_SIZE_PX * 3
_KEPT_BUFFERS = 6  # free ones; a loop needs one for each batch under way or held
_IMAGES_AT_ONCE = 16  # the most that a thread takes at a time
_TURNS = 4  # the least that each thread gets of a batch, so that none waits long for the last
_ALIGNMENT = 64

# The pixels of the i-th image of a batch: uint8 (height, width, 3) with contiguous rows, whole or already cut to
# 224x224. Called in a thread, which may overwrite what it was given before.
Load = Callable[[int], Tensor]
EncodedImages = Any  # a batch of JPEGs, as DALI's list of tensors uint8 (bytes,)
Refuse = Callable[[int, str], UserError]  # the error of the i-th image of a batch, from what the codec says


def make_finisher(
    transform: Transform, colors: ColorStats, device: torch.device, num_threads: int
) -> "CpuFinisher | GpuFinisher":
    """What finishes batches on a device, on a CPU in `num_threads` threads and as fast as this machine lets it."""
    if device.type == "cuda":
        return GpuFinisher(transform, colors, device)
    return CpuFinisher(transform, colors, num_threads, load_kernel())


class CpuFinisher:
    """Finishes batches in threads of its own: `finisher.begin(load, views)`, with `kernel` where there is one.

    A batch's memory is its holder's as long as any tensor, view or array of it lives, and is used again after that.
    """

    def __init__(
        self,
        transform: Transform,
        colors: ColorStats,
        num_threads: int,
        kernel: Kernel | None = None,
    ) -> None:
        self._dtype, self._is_nhwc = transform.torch_dtype, transform.layout == "NHWC"
        self._constants = constants = Constants.of(transform, colors)
        self._kernel = kernel
        self._mean_image = constants.mean_image
        if self._mean_image is not None and not self._is_nhwc:
            self._mean_image = self._mean_image.permute(2, 0, 1).contiguous()
        self._factors = torch.ones(3) if constants.factor is None else constants.factor
        self._buffers = Buffers()
        self._threads, self._num_threads = start_threads(num_threads), num_threads
        self._local = threading.local()

    @property
    def decodes(self) -> bool:
        """Whether `begin_encoded` can be used."""
        return self.reads and self._kernel is not None and self._kernel.decode is not None

    @property
    def reads(self) -> bool:
        """Whether `begin_stored` can be used."""
        return self._kernel is not None and self._dtype in (torch.float32, torch.uint8)

    def begin_encoded(self, encoded: EncodedImages, views: Views, refuse: Refuse) -> Job[Tensor]:
        """(N, 3, 224, 224) of view n of JPEG n, decoded in the same pass; `refuse` makes the error of one."""
        assert self._kernel is not None and self._kernel.decode is not None

        def find(part: range) -> tuple[NDArray[Any], NDArray[Any]]:
            images = [encoded[n] for n in part]
            return (
                np.array([image.data_ptr() for image in images], np.uint64),
                np.array([image.shape()[0] for image in images], np.uint64),
            )

        return self._begin_parts(self._kernel.decode, find, views, refuse)

    def begin_stored(
        self, files: NDArray[np.int32], starts: NDArray[np.int64], views: Views, refuse: Refuse
    ) -> Job[Tensor]:
        """(N, 3, 224, 224) of view n of the pixels from byte starts[n] of open file files[n] on, read a few rows at a
        time; `refuse` makes the error of one."""
        assert self._kernel is not None
        find = lambda part: (files[part.start : part.stop], starts[part.start : part.stop])  # noqa: E731
        return self._begin_parts(self._kernel.finish_stored, find, views, refuse)

    def _begin_parts(
        self,
        function: Callable[..., int],
        find: Callable[[range], tuple[NDArray[Any], NDArray[Any]]],
        views: Views,
        refuse: Refuse,
    ) -> Job[Tensor]:
        """A call of C for each part of a batch; `find` gives its first two arrays."""
        num, out, biases = self._prepare(views)
        offset, flip = views.offset.to(torch.int32).contiguous(), views.flip.to(torch.int32).contiguous()
        bytes_per_image, at_once = _ROW * CROP_SIZE_PX * out.element_size(), self._share(num)

        def finish(first: int) -> None:
            part = range(first, min(first + at_once, num))
            one, other = find(part)
            message = ctypes.create_string_buffer(MESSAGE_BYTES)
            failed = function(
                len(part),
                one.ctypes.data,
                other.ctypes.data,
                offset.data_ptr() + first * 8,
                flip.data_ptr() + first * 4,
                biases.data_ptr() + first * 12,
                None if self._mean_image is None else self._mean_image.data_ptr(),
                self._factors.data_ptr(),
                out.data_ptr() + first * bytes_per_image,
                not self._is_nhwc,
                self._dtype == torch.uint8,
                message,
            )
            if failed >= 0:
                raise refuse(first + failed, message.value.decode("ascii", "replace"))

        return begin_all(self._threads, finish, range(0, num, at_once), lambda: self._give(out))

    def begin(self, load: Load, views: Views, views_per_image: int = 1) -> Job[Tensor]:
        """(N, 3, 224, 224). A thread gets all of the `views_per_image` views of an image that follow each other."""
        num, out, biases = self._prepare(views)
        source, offset, flip = views.source.tolist(), views.offset.tolist(), views.flip.tolist()
        finish_one = self._finish_by_torch if self._kernel is None else self._finish_by_kernel
        at_once = views_per_image * self._share(num // views_per_image)

        def finish(first: int) -> None:
            pixels, loaded = None, -1
            for n in range(first, min(first + at_once, num)):
                if pixels is None or source[n] != loaded:
                    pixels, loaded = load(source[n]), source[n]
                y, x = offset[n]
                if len(pixels) == CROP_SIZE_PX:
                    y = x = 0
                if self._dtype in (torch.float32, torch.uint8):
                    finish_one(pixels, y, x, flip[n], biases, n, out)
                else:  # rounded once, at the end
                    work = self._scratch(out[n].shape)
                    finish_one(pixels, y, x, flip[n], biases[n : n + 1], 0, work)
                    out[n].copy_(work[0])

        return begin_all(self._threads, finish, range(0, num, at_once), lambda: self._give(out))

    def _prepare(self, views: Views) -> tuple[int, Tensor, Tensor]:
        """Number of views, memory for them, what is added to each (N, 3)."""
        num, side = len(views.source), CROP_SIZE_PX
        out = self._buffers.take((num, side, side, 3) if self._is_nhwc else (num, 3, side, side), self._dtype)
        bias = self._constants.bias(views.shift)
        return num, out, (torch.zeros(1, 3) if bias is None else bias).expand(num, 3).contiguous()

    def _share(self, num_images: int) -> int:
        """How many images a thread takes at a time."""
        return max(1, min(_IMAGES_AT_ONCE, num_images // (self._num_threads * _TURNS)))

    def _give(self, out: Tensor) -> Tensor:
        return out.permute(0, 3, 1, 2) if self._is_nhwc else out

    def _finish_by_kernel(
        self, pixels: Tensor, y: int, x: int, is_flipped: int, biases: Tensor, n: int, out: Tensor
    ) -> None:
        """View n of a batch, by addresses: tensors of one image each cost more than the call."""
        assert self._kernel is not None
        stride = pixels.stride(0)
        self._kernel.finish(
            pixels.data_ptr() + y * stride + 3 * x,
            stride,
            is_flipped,
            biases.data_ptr() + n * 3 * biases.element_size(),
            None if self._mean_image is None else self._mean_image.data_ptr(),
            self._factors.data_ptr(),
            out.data_ptr() + n * _ROW * CROP_SIZE_PX * out.element_size(),
            not self._is_nhwc,
            self._dtype == torch.uint8,
        )

    def _finish_by_torch(
        self, pixels: Tensor, y: int, x: int, is_flipped: int, biases: Tensor, n: int, out: Tensor
    ) -> None:
        pixels, target = pixels[y : y + CROP_SIZE_PX, x : x + CROP_SIZE_PX], out[n]
        pixels = pixels.flip(1) if is_flipped else pixels
        target.copy_(pixels if self._is_nhwc else pixels.permute(2, 0, 1))
        if self._dtype == torch.uint8:
            return
        rows, bias, factors = target, biases[n], self._factors
        if self._is_nhwc:  # rows of 672 numbers: torch is slow where the innermost dimension is 3
            rows = target.view(CROP_SIZE_PX, _ROW)
            bias, factors = bias.repeat(CROP_SIZE_PX), factors.repeat(CROP_SIZE_PX)
        else:
            bias, factors = bias[:, None, None], factors[:, None, None]
        rows.add_(bias)
        if self._mean_image is not None:
            rows.sub_(self._mean_image.view(rows.shape))
        if self._constants.factor is not None:
            rows.mul_(factors)

    def _scratch(self, shape: tuple[int, ...]) -> Tensor:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Buffers().take((1, *shape), torch.float32)
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
        # An array of its own: the tensor's memory keeps it alive, nothing else.
        lent = memory[start : start + num_bytes]
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)
