"""Ranks: how they start, agree, reduce and stop. One process is a world of one, without a process group.

The decision that shaped it: whoever starts ranks (our launcher, torchrun, a cluster) says so in torch's own names,
and `join` reads only those. GPUs reduce with NCCL, everything on the CPU with gloo. Left out: what the ranks compute
(train.py, evaluate.py).
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.console import STATUS_FAILED
from pipeline.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank 0..world_size-1, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def feed(self) -> Literal["cpu", "gpu"]:
        """The same device in the pipeline's words."""
        return "gpu" if self.device.type == "cuda" else "cpu"


def under_launcher() -> bool:
    """Whether torchrun, or our own launcher, has started this process as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def join(use_gpu: bool) -> Iterator[Ranks]:
    """Be a rank for the length of the block. Raises UserError if this rank's GPU does not exist."""
    rank, world_size, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cpu")
    if use_gpu:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; start fewer ranks a node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not under_launcher():
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo")
    try:
        yield Ranks(rank, world_size, device)
    finally:
        dist.destroy_process_group()


def launch(function: Callable[..., int], arguments: tuple[Any, ...], num_ranks: int) -> int:
    """Run `function` as `num_ranks` ranks of this machine under torch's elastic launcher; returns the exit status.

    A rank that fails takes the others down. A signal to this process is passed on, so that the ranks save and leave.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    try:
        statuses = elastic_launch(config, function)(*arguments)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        raise UserError(f"rank {rank} failed with status {failure.exitcode}; its message is above") from failed
    return max((int(status) for status in statuses.values()), default=STATUS_FAILED)


def reduce_sum(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum over ranks, on every rank; `tensor` itself is left as it is."""
    total = tensor.clone()
    if ranks.world_size > 1:
        dist.all_reduce(total)
    return total


def gather(value: Any, ranks: Ranks) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


class StopRequest:
    """SIGINT and SIGTERM as a wish to stop, on which all ranks agree: `with StopRequest(ranks) as stop: ...`."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._received = ranks, 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._received = self._received or number

    def status(self) -> int:
        """0, or the exit status (130, 143) of the signal that any rank has received. Every rank must ask in step."""
        number = self._received
        if self._ranks.world_size > 1:
            asked = torch.tensor(number)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)  # on the CPU: the GPU's queue is not waited for
            number = int(asked)
        return 128 + number if number else 0
