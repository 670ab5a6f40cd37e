"""native.c, compiled for this machine's processor: LRN and the update rule in one pass each over memory, on the CPU.

The decision that shaped it: a faster way to what torch does in many passes, never needed: lrn.py and optim.py do
without it where there is no C compiler, and tests hold both against the oracle. Left out: 16-bit floats other than
bfloat16, float64 and powers other than the paper's 0.75, which take torch's way; GPUs (lrn_triton.py).
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.operators.compile import compile_library

SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-fopenmp", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math")
_MOST_MAPS, _MOST_N, _BETA = 2048, 17, 0.75  # what native.c can do
_KEEP = ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20))  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


class Norm(NamedTuple):
    """b = a / (k + scale * sum of a^2 over n maps)^beta, of a = ReLU(x) if `relu`."""

    k: float
    n: int
    scale: float
    beta: float
    relu: bool = False


class _Lrn(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_ssize_t),
        *((name, ctypes.c_int) for name in ("num_maps", "n", "relu", "bf16", "num_threads")),
        *((name, ctypes.c_float) for name in ("k", "scale", "coefficient")),
    )


class Native:
    """The library's functions on tensors. All are contiguous and on the CPU; rows (R, maps) float32 or bfloat16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._forward, self._backward, self._update = library.lrn_forward, library.lrn_backward, library.update
        for function, num_tensors in ((self._forward, 2), (self._backward, 3)):
            function.argtypes, function.restype = [ctypes.POINTER(_Lrn), *[ctypes.c_void_p] * num_tensors], None
        self._update.argtypes = [
            *[ctypes.c_void_p] * 3, ctypes.c_ssize_t, *[ctypes.c_float] * 3, ctypes.c_int
        ]  # fmt: skip
        self._update.restype = None

    @staticmethod
    def can_normalise(rows: Tensor, norm: Norm) -> bool:
        return (
            rows.device.type == "cpu"
            and rows.dtype in (torch.float32, torch.bfloat16)
            and rows.shape[1] <= _MOST_MAPS
            and norm.n <= _MOST_N
            and norm.beta == _BETA
        )

    def lrn_forward(self, rows: Tensor, norm: Norm) -> Tensor:
        out = torch.empty_like(rows)
        self._forward(ctypes.byref(_describe(rows, norm)), rows.data_ptr(), out.data_ptr())
        return out

    def lrn_backward(self, rows: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
        """The gradient of rows; `gradient` is of their shape and dtype."""
        out = torch.empty_like(rows)
        self._backward(ctypes.byref(_describe(rows, norm)), rows.data_ptr(), gradient.data_ptr(), out.data_ptr())
        return out

    @staticmethod
    def can_update(tensors: Sequence[Tensor]) -> bool:
        """Whether weight, velocity and gradient are float32 on the CPU and lie in memory alike, without gaps."""
        return all(
            t.device.type == "cpu"
            and t.dtype == torch.float32
            and t.stride() == tensors[0].stride()
            and (t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last))
            for t in tensors
        )

    def update(
        self, weight: Tensor, velocity: Tensor, gradient: Tensor, lr: float, momentum: float, decay_lr: float
    ) -> None:
        """v = momentum * v - decay_lr * w - lr * g; w = w + v, in place, to the bits of torch's own kernels."""
        pointers = (t.data_ptr() for t in (weight, velocity, gradient))
        self._update(*pointers, weight.numel(), lr, momentum, decay_lr, torch.get_num_threads())


def _describe(rows: Tensor, norm: Norm) -> _Lrn:
    return _Lrn(
        *rows.shape,
        norm.n,
        norm.relu,
        rows.dtype == torch.bfloat16,
        torch.get_num_threads(),
        norm.k,
        norm.scale,
        2 * norm.scale * norm.beta,
    )


@cache
def load_native() -> Native | None:
    """The compiled functions, or None where they cannot be compiled."""
    library = compile_library(SOURCE, *_FLAGS)
    return None if library is None else Native(library)


def keep_freed_memory() -> bool:
    """Have this process keep what its tensors on the CPU free, for the next ones. Whether the C library can.

    glibc gives blocks of some megabytes back to the system at once, and the next step's first touch of each page costs
    more than the arithmetic on it: an eighth of a step. The process stays as large as it was at its largest, and a
    tenth more: blocks that are cut from it leave gaps.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    return all(mallopt(option, value) for option, value in _KEEP)


def release_freed_memory() -> bool:
    """Give what is kept back to the system, once: the next step touches its pages anew. Whether the C library can.

    What the process has in use stays the same for hours, but the pages it touches wander: without this its resident
    memory creeps towards all that it was ever given.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # not glibc
        return False
    trim(0)
    return True
