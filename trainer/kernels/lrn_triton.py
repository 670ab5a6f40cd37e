"""Local response normalisation on a GPU: Triton kernels, the ReLU before it included, one forward and one backward.

A value's neighbours are read again, from the nearest cache, so the backward pass is one kernel. Triton's compiler reads
the kernels' annotations, and takes none but its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.native import Norm

_BLOCK = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_normalise(rows: Tensor, norm: Norm) -> bool:
    """Whether the kernels are written for tensors and constants like these."""
    return rows.dtype in _DTYPES and norm.n == 5 and norm.beta == 0.75


def lrn_forward(rows: Tensor, norm: Norm) -> Tensor:
    """rows (R, maps), contiguous; see native.Norm."""
    out = torch.empty_like(rows)
    size = rows.numel()
    _forward[_grid(size)](rows, out, size, norm.k, norm.scale, rows.shape[1], norm.relu, _BLOCK)
    return out


def lrn_backward(rows: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
    """The gradient of rows; `gradient` is of their shape and dtype, contiguous too."""
    out = torch.empty_like(rows)
    size, coefficient = rows.numel(), 2 * norm.scale * norm.beta
    _backward[_grid(size)](rows, gradient, out, size, norm.k, norm.scale, coefficient, rows.shape[1], norm.relu, _BLOCK)
    return out


def _grid(size: int) -> tuple[int]:
    return (triton.cdiv(size, _BLOCK),)


@triton.jit
def _near(
    x: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    inside: tl.tensor,
    shift: tl.constexpr,
    maps: tl.constexpr,
    relu: tl.constexpr,
) -> tl.tensor:
    """The value `shift` maps further, 0 beyond the row's ends."""
    a = tl.load(x + i + shift, mask=inside & (j + shift >= 0) & (j + shift < maps), other=0.0).to(tl.float32)
    if relu:
        a = tl.where(a < 0, 0.0, a)  # what is not a number stays so
    return a


@triton.jit
def _term(a: tl.tensor, e: tl.tensor, total: tl.tensor, k: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """t * a / s, of a neighbour."""
    root = tl.sqrt(k + scale * total)
    inverse = 1.0 / (root * tl.sqrt(root))
    return e * inverse * a * root * inverse * inverse


@triton.jit
def _forward(
    x: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    k: tl.tensor,
    scale: tl.tensor,
    maps: tl.constexpr,
    relu: tl.constexpr,
    block: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside, j = i < size, i % maps
    a = _near(x, i, j, inside, 0, maps, relu)
    b, c = _near(x, i, j, inside, -2, maps, relu), _near(x, i, j, inside, -1, maps, relu)
    d, e = _near(x, i, j, inside, 1, maps, relu), _near(x, i, j, inside, 2, maps, relu)
    root = tl.sqrt(k + scale * (b * b + c * c + a * a + d * d + e * e))
    tl.store(out + i, (a / (root * tl.sqrt(root))).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x: tl.tensor,
    gradient: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    k: tl.tensor,
    scale: tl.tensor,
    coefficient: tl.tensor,
    maps: tl.constexpr,
    relu: tl.constexpr,
    block: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside, j = i < size, i % maps
    a0, a1 = _near(x, i, j, inside, -4, maps, relu), _near(x, i, j, inside, -3, maps, relu)
    a2, a3 = _near(x, i, j, inside, -2, maps, relu), _near(x, i, j, inside, -1, maps, relu)
    a4 = _near(x, i, j, inside, 0, maps, relu)
    a5, a6 = _near(x, i, j, inside, 1, maps, relu), _near(x, i, j, inside, 2, maps, relu)
    a7, a8 = _near(x, i, j, inside, 3, maps, relu), _near(x, i, j, inside, 4, maps, relu)
    q0, q1, q2, q3, q4, q5, q6, q7, q8 = a0 * a0, a1 * a1, a2 * a2, a3 * a3, a4 * a4, a5 * a5, a6 * a6, a7 * a7, a8 * a8
    e = _near(gradient, i, j, inside, 0, maps, False)
    near = _term(a2, _near(gradient, i, j, inside, -2, maps, False), q0 + q1 + q2 + q3 + q4, k, scale)
    near += _term(a3, _near(gradient, i, j, inside, -1, maps, False), q1 + q2 + q3 + q4 + q5, k, scale)
    near += _term(a4, e, q2 + q3 + q4 + q5 + q6, k, scale)
    near += _term(a5, _near(gradient, i, j, inside, 1, maps, False), q3 + q4 + q5 + q6 + q7, k, scale)
    near += _term(a6, _near(gradient, i, j, inside, 2, maps, False), q4 + q5 + q6 + q7 + q8, k, scale)
    root = tl.sqrt(k + scale * (q2 + q3 + q4 + q5 + q6))
    result = e / (root * tl.sqrt(root)) - coefficient * a4 * near
    if relu:
        result = tl.where(a4 == 0, 0.0, result)
    tl.store(out + i, result.to(out.dtype.element_ty), mask=inside)
