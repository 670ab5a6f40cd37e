"""native.c, compiled for this machine's processor: ReLU with LRN on the CPU; and how the process keeps freed memory."""

import ctypes
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
        self._forward, self._backward = library.lrn_forward, library.lrn_backward
        for function, num_tensors in ((self._forward, 2), (self._backward, 3)):
            function.argtypes, function.restype = [ctypes.POINTER(_Lrn), *[ctypes.c_void_p] * num_tensors], None

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
