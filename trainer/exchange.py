"""What ranks send each other within a step: collectives, their gradients, and a count of the bytes.

The decision that shaped it: every collective of a step goes through the three functions below (the gradients of
DistributedDataParallel through `reduce_gradients`), so that `count_traffic` counts what is really issued. Bytes are
those that a ring sends from each rank, which is the least for an all-gather and a reduce-scatter, and what NCCL does
for large tensors. Left out: when to exchange what (parallel.py), and the few bytes by which ranks agree to log or to
stop (distributed.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Kind = Literal["parameters", "activations", "input"]
# torch 2.13 renamed both; the old names go on working, with a warning
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """What one rank has sent: bytes and number of collectives, by kind."""

    sent_bytes: dict[str, float] = field(default_factory=lambda: {"parameters": 0.0, "activations": 0.0, "input": 0.0})
    collectives: dict[str, int] = field(default_factory=lambda: {"parameters": 0, "activations": 0, "input": 0})

    def add(self, kind: Kind, sent_bytes: float) -> None:
        self.sent_bytes[kind] += sent_bytes
        self.collectives[kind] += 1


_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank sends within the block, backward passes included."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def _count(kind: Kind, sent_bytes: float) -> None:
    for traffic in _counting:
        traffic.add(kind, sent_bytes)


def all_gather(x: Tensor, kind: Kind) -> Tensor:
    """Every rank's `x` (all of one shape), in rank order: (world size, *x.shape)."""
    world_size = dist.get_world_size()
    parts = x.new_empty((world_size, *x.shape))
    _all_gather(parts.view(-1), x.contiguous().view(-1))
    _count(kind, (world_size - 1) * x.nbytes)
    return parts


def reduce_scatter(parts: Tensor, kind: Kind) -> Tensor:
    """The sum over ranks of `parts[rank]`, for this rank; parts (world size, ...)."""
    world_size = dist.get_world_size()
    mine = parts.new_empty(parts.shape[1:])
    _reduce_scatter(mine.view(-1), parts.contiguous().view(-1))
    _count(kind, (world_size - 1) * parts.nbytes / world_size)
    return mine


def reduce_gradients(compress: bool, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel's averaging of a bucket, as its communication hook; `compress`: sent as bfloat16."""
    world_size = dist.get_world_size()
    gradients = bucket.buffer()
    sent = (gradients.to(torch.bfloat16) if compress else gradients).div_(world_size)
    _count("parameters", 2 * (world_size - 1) * sent.nbytes / world_size)
    future = dist.all_reduce(sent, async_op=True).get_future()

    def finish(done: torch.futures.Future[Any]) -> Tensor:
        value = done.value()
        averaged: Tensor = value[0] if isinstance(value, list) else value
        return gradients.copy_(averaged) if compress else averaged

    return future.then(finish)


class GatherAlong(torch.autograd.Function):
    """All ranks' tensors (all of one shape) side by side along `dim`; each is given back the sum of its gradients.

    `factor` multiplies that sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, factor: float) -> Tensor:
        """`x` of every rank, in the order of ranks, along `dim`."""
        ctx.dim, ctx.factor = dim, factor
        parts = all_gather(x, "activations")
        return parts.flatten(0, 1) if dim == 0 else torch.cat(parts.unbind(), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """This rank's part of the gradients, summed over ranks, times `factor`; none for `dim` and `factor`."""
        world_size = dist.get_world_size()
        if ctx.dim == 0:
            parts = gradient.contiguous().unflatten(0, (world_size, -1))
        else:
            parts = torch.stack(gradient.chunk(world_size, ctx.dim))
        mine = reduce_scatter(parts, "activations")
        return mine if ctx.factor == 1 else mine * ctx.factor, None, None


class SumOfParts(torch.autograd.Function):
    """This rank's slice of the batch of: the sum over ranks of `part` (batch, outputs), plus `bias` (outputs,).

    Its gradient is that of the mean over ranks of their losses. Every rank sees the whole batch's, so that `bias` gets
    the same gradient on all without an exchange.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, bias: Tensor) -> Tensor:
        """(batch / ranks, outputs) of the sum, in float32 or more."""
        ctx.dtypes = part.dtype, bias.dtype
        part = part.to(torch.promote_types(part.dtype, torch.float32))  # outputs are few: sums of 16 bits save nothing
        return reduce_scatter(part.unflatten(0, (dist.get_world_size(), -1)), "activations") + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The whole batch's gradient of `part`, and that of `bias`."""
        whole = all_gather(gradient, "activations").flatten(0, 1) / dist.get_world_size()
        part_dtype, bias_dtype = ctx.dtypes
        return whole.to(part_dtype), whole.sum(0).to(bias_dtype)
