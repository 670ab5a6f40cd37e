"""Local response normalisation: across maps (paper, section 3.3) and, in the released source, across space too.

It is bound by memory, so the ReLU before it is part of it, and nothing is kept for the backward pass but the input.
Three ways to the same numbers: native.c on the CPU, lrn_triton.py on a GPU, torch's operations everywhere else.
P = Krizhevsky, Sutskever & Hinton, NIPS 2012, with the section; S = the 2012 source released in 2025, net 145.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pipeline.common.console import note
from trainer.kernels.native import Native, Norm, load_native

_SPATIAL_SIZE, _SPATIAL_SCALE, _SPATIAL_POWER, _SPATIAL_K = 5, 0.001, 0.75, 1.0  # S, the second norm of conv2
_BLOCK_ELEMENTS = 1 << 17  # float32 temporaries of half a megabyte: a few fit into one core's second-level cache


def local_response_norm(
    x: Tensor,
    *,
    k: float = 2.0,
    n: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    num_towers: int = 1,
    alpha_over_n: bool = False,
    relu: bool = False,
) -> Tensor:
    """b = a / (k + alpha * sum of a^2 over the n maps around it)^beta (P 3.3), the window never crossing towers (S).

    x (B, C, H, W), any floating dtype, C divisible by num_towers; returns the same shape and dtype in channels_last.
    alpha_over_n: alpha / n * sum, as S and torch.nn.functional.local_response_norm have it. relu: of a = ReLU(x), else
    of a = x. The arithmetic is float32 for 16-bit maps. First derivatives only, but for a compiled or exported graph,
    which is of plain operations. Raises ValueError unless n is 3, 5, 7, ... and the towers divide C.
    """
    if n < 3 or n % 2 == 0 or x.shape[1] % num_towers:
        raise ValueError(
            f"n = {n} must be odd and at least 3, and {x.shape[1]} maps must be divisible by num_towers = {num_towers}"
        )
    maps_last = x.permute(0, 2, 3, 1)
    rows = maps_last.reshape(-1, x.shape[1] // num_towers)  # a tower of a pixel is a row: windows end with their tower
    norm = Norm(k, n, alpha / n if alpha_over_n else alpha, beta, relu)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        normalised = _forward(rows, norm)
    else:
        normalised = _LocalResponseNorm.apply(rows, norm)
    return normalised.view(maps_last.shape).permute(0, 3, 1, 2)


def spatial_response_norm(x: Tensor) -> Tensor:
    """Each value by its own map's neighbourhood: a / (1 + 0.001 / 25 * sum over 5x5 of a^2)^0.75, zeros outside (S).

    x (B, C, H, W), any floating dtype; returns the same. The arithmetic is float32 for 16-bit maps.
    """
    a = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = functional.avg_pool2d(a * a, _SPATIAL_SIZE, stride=1, padding=_SPATIAL_SIZE // 2)
    return (a / _power(_SPATIAL_K + _SPATIAL_SCALE * mean_square, _SPATIAL_POWER)).to(x.dtype)


class _LocalResponseNorm(torch.autograd.Function):
    """Over rows (R, maps). Nothing is kept but them: to compute s again costs less than to store and to read it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, norm: Norm) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows)
        ctx.norm = norm
        kernels = _find_kernels(rows, norm)
        return kernels.lrn_forward(rows, norm) if kernels else _in_blocks(_forward, norm, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows,), norm, gradient = ctx.saved_tensors, ctx.norm, gradient.contiguous()
        kernels = _find_kernels(rows, norm)
        if kernels:
            return kernels.lrn_backward(rows, gradient, norm), None
        return _in_blocks(_backward, norm, rows, gradient), None


def _find_kernels(rows: Tensor, norm: Norm) -> Any:
    """What has lrn_forward and lrn_backward for rows and constants like these; None: torch's operations do it."""
    if rows.is_cuda:
        triton = load_triton()
        return triton if triton and triton.can_normalise(rows, norm) else None
    return load_native() if Native.can_normalise(rows, norm) else None


@cache
def load_triton(device: str = "cuda") -> ModuleType | None:
    """lrn_triton.py, if Triton is there and a trial on the device gives what torch's operations give; else None."""
    if importlib.util.find_spec("triton") is None:
        return None
    rows = torch.linspace(-60.0, 60.0, 101 * 48, device=device).sin().mul(60).view(101, 48)
    gradient, norm = rows.roll(1), Norm(2.0, 5, 1e-2, 0.75, relu=True)
    try:
        from trainer.kernels import lrn_triton

        torch.testing.assert_close(lrn_triton.lrn_forward(rows, norm), _forward(rows, norm))
        found = lrn_triton.lrn_backward(rows, gradient, norm)
        torch.testing.assert_close(found, _backward(rows, gradient, norm), rtol=1e-4, atol=1e-4)
    except Exception as error:  # noqa: BLE001 - a compiler fails in its own ways; without one the result is the same
        reason = str(error).strip().split("\n")[0]
        note(f"Triton cannot be used for LRN, torch's operations are slower ({type(error).__name__}: {reason})")
        return None
    return lrn_triton


def _forward(rows: Tensor, norm: Norm) -> Tensor:
    """b = a / s^beta with s = k + scale * window(a^2), in operations that compile, export and differentiate."""
    a = _read(rows, norm)
    return (a / _power(norm.k + norm.scale * _sum_windows(a * a, norm.n), norm.beta)).to(rows.dtype)


def _backward(rows: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
    """With e the incoming gradient and t = e / s^beta: da = t - 2 * scale * beta * a * window(t * a / s)."""
    a = _read(rows, norm)
    s = norm.k + norm.scale * _sum_windows(a * a, norm.n)
    t = gradient.to(a.dtype) / _power(s, norm.beta)
    found = t - 2.0 * norm.scale * norm.beta * a * _sum_windows(t * a / s, norm.n)
    return (found.masked_fill(rows <= 0, 0) if norm.relu else found).to(rows.dtype)


def _read(rows: Tensor, norm: Norm) -> Tensor:
    a = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return a.relu() if norm.relu else a


def _sum_windows(x: Tensor, n: int) -> Tensor:
    """Sums over n neighbouring maps, zeros beyond the row's ends."""
    padded = functional.pad(x, (n // 2, n // 2))
    total = padded[:, : x.shape[1]]
    for shift in range(1, n):
        total = total + padded[:, shift : shift + x.shape[1]]
    return total


def _in_blocks(function: Callable[..., Tensor], norm: Norm, *tensors: Tensor) -> Tensor:
    """`function` of some rows at a time, whose temporaries stay in a core's cache; on a GPU of all."""
    rows = tensors[0]
    size = max(1, len(rows) if rows.is_cuda else _BLOCK_ELEMENTS // rows.shape[1])
    result = torch.empty_like(rows)
    for *block, out in zip(*(x.split(size) for x in (*tensors, result)), strict=True):
        out.copy_(function(*block, norm))
    return result


def _power(s: Tensor, beta: float) -> Tensor:
    if beta == 0.75:  # P 3.3; two roots take a fraction of the time of a power
        root = s.sqrt()
        return root * root.sqrt()
    return s.pow(beta)
