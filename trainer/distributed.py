"""Ranks: how they meet, agree and reduce. One process is a world of one, without a process group.

Whoever starts ranks (launch.py, torchrun, a cluster) says so in torch's own variables.
"""

import hashlib
import os
import signal
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.common.errors import UserError

RESTART, LAUNCH_ID = "ALEXNET_RESTART", "ALEXNET_LAUNCH_ID"  # what our own launcher tells its ranks
FAILURE, PEER_LOST = "failure", "peer lost"
_MEETING = timedelta(minutes=10)  # the longest that ranks wait for each other
_POLL_S = 0.05
_SIGNS_OF_LOSS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "remote process exited",
    "ncclremoteerror",
)
_failures: dist.Store | None = None  # where ranks say who failed first


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
    """Whether torchrun, srun or our own launcher has started this process as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restart_count() -> int:
    """How often the launcher has started this job again after a rank had died."""
    return sum(int(os.environ.get(name, "0")) for name in (RESTART, "TORCHELASTIC_RESTART_COUNT"))


def launch_id() -> str | None:
    """What the launcher calls this job, the same after a restart; None without one."""
    named = os.environ.get(LAUNCH_ID) or os.environ.get("TORCHELASTIC_RUN_ID")
    if named == "none":  # torchrun's default is the same for every job: told apart by its process
        return f"none/{socket.gethostname()}/{os.getppid()}"
    return named


def list_signals() -> list[signal.Signals]:
    """The signals by which this process is told to stop: not SIGHUP where it is ignored, as under nohup."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if is_ignored else [signal.SIGHUP])]


@contextmanager
def join(use_gpu: bool, timeout_s: float = 0.0) -> Iterator[Ranks]:
    """Be a rank for the length of the block. A collective waits for longer than `timeout_s`, after which the watchdog
    has spoken.

    Raises UserError if this rank's GPU or NCCL is missing, the port is taken, or the ranks' code or versions differ.
    """
    rank, world_size, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = choose_device(local_rank, use_gpu)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not under_launcher():
        yield Ranks(0, 1, device)
        return
    if use_gpu and world_size > 1 and not dist.is_nccl_available():
        raise UserError(
            f"this torch ({torch.__version__}) has no NCCL, by which {world_size} GPUs reduce; install a CUDA build of "
            "torch, or use one GPU (--gpus 1)"
        )
    _init(rank, world_size, use_gpu, max(_MEETING, timedelta(seconds=1.5 * timeout_s + 60)))
    ranks = Ranks(rank, world_size, device)
    _agree_on_restarts(ranks)
    check_alike(describe_software(), ranks)
    _check_devices(ranks)
    yield ranks
    dist.destroy_process_group()  # not after an error: what a rank has to say comes before its peers see it leave


def choose_device(local_rank: int, use_gpu: bool) -> torch.device:
    """The GPU of this rank, or the CPU. Raises UserError if there is no such GPU."""
    if not use_gpu:
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if found == 1 and "SLURM_PROCID" in os.environ:  # srun --gpus-per-task: each task sees its own alone
        local_rank = 0
    if local_rank >= found:
        raise UserError(
            f"local rank {local_rank} has no GPU: {found} visible; start at most {found} ranks on this machine, or "
            "check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", local_rank)


def _init(rank: int, world_size: int, use_gpu: bool, timeout: timedelta) -> None:
    """Raises UserError if the port by which ranks meet is taken, or if one of them does not come."""
    global _failures
    try:
        shared, _, _ = next(dist.rendezvous("env://", timeout=_MEETING))
        store = dist.PrefixStore(f"alexnet/{choose_meeting(shared, rank, world_size)}", shared)
    except (dist.DistNetworkError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise UserError(f"{where}: the port is in use; choose another with MASTER_PORT") from error
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            raise UserError(
                f"{where}: not all of the {world_size} ranks have come within {_MEETING.total_seconds():g} s; start as "
                "many, where that address can be reached"
            ) from error
        raise
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if use_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    _failures = dist.PrefixStore("failures", store)


def choose_meeting(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that all ranks of this start have in common, and no start before: torchrun (2.13) gives the ranks that it
    starts again the store of those that died, where their addresses still are.

    Each of the others leaves a word of its own, the first rank answers to it with the name until the other says that it
    has it; a word left by one that died gets an answer that nobody reads. Raises RuntimeError if one does not come.
    """
    word, num_s, started_s = uuid.uuid4().hex, _MEETING.total_seconds(), time.monotonic()
    if rank:
        store.set(f"word/{rank}", word)
        name = store.get(f"answer/{word}").decode()
        store.set(f"here/{name}/{rank}", "")
        return name
    awaited = set(range(1, world_size))
    while awaited:
        for other in sorted(awaited):
            store.set(f"answer/{store.get(f'word/{other}').decode()}", word)
        awaited = {other for other in awaited if not store.check([f"here/{word}/{other}"])}
        if time.monotonic() - started_s > num_s:
            raise RuntimeError(f"timed out after {num_s:g} s without ranks {sorted(awaited)}")
        time.sleep(_POLL_S if awaited else 0)
    return word


def _agree_on_restarts(ranks: Ranks) -> None:
    """torchrun on a machine counts only the starts that its own ranks have caused."""
    number = max(gather(restart_count(), ranks)) - int(os.environ.get(RESTART, "0"))
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)


def is_first_to(what: str) -> bool:
    """Whether no other rank has claimed `what` before; also true where there is nobody to ask."""
    try:
        return _failures is None or _failures.add(what, 1) == 1
    except RuntimeError:  # the rank that keeps the books is gone
        return what != PEER_LOST


def is_peer_loss(error: BaseException) -> bool:
    """Whether an error only says that another rank has gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS_OF_LOSS)


def check_alike(facts: Mapping[str, str], ranks: Ranks) -> None:
    """Raises UserError, on every rank, if `facts` (what, value) are not the same on all."""
    found = gather(dict(facts), ranks)
    for name, first in found[0].items():
        other = next((rank for rank, theirs in enumerate(found) if theirs.get(name) != first), None)
        if other is not None:
            raise UserError(
                f"ranks differ in {name}: rank 0 has {first}, rank {other} has {found[other].get(name)}; "
                "give all machines the same"
            )


def describe_software() -> dict[str, str]:
    """What has to be the same on all ranks, before any data is looked at."""
    import importlib.metadata

    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for path in sorted(path for package in ("pipeline", "trainer") for path in (root / package).rglob("*.[cp]*")):
        if path.suffix in (".py", ".c"):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "the code of alexnet-dali (SHA-256)": digest.hexdigest()[:12],
        "torch": torch.__version__,
        "nvidia-dali": importlib.metadata.version("nvidia-dali-cuda120"),
    }


def _check_devices(ranks: Ranks) -> None:
    """Raises UserError if two ranks compute on one GPU, with which NCCL cannot deal."""
    if ranks.device.type != "cuda":
        return
    mine = str(getattr(torch.cuda.get_device_properties(ranks.device), "uuid", f"rank {ranks.rank}"))
    seen: dict[str, int] = {}
    for rank, place in enumerate(gather(f"{socket.gethostname()}/{mine}", ranks)):
        if place in seen:
            raise UserError(f"ranks {seen[place]} and {rank} have the same GPU; start one rank for each GPU")
        seen[place] = rank


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
