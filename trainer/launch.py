"""Start ranks on this machine or under Slurm, and end them all when one dies."""

import math
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, MutableMapping
from multiprocessing import connection, resource_tracker
from types import FrameType
from typing import Any

from pipeline.common.console import (
    STATUS_FAILED,
    explain_os_error,
    flush_results,
    leave_closed_terminal,
    take_streams,
    warn,
)
from pipeline.common.errors import UserError
from trainer.distributed import FAILURE, LAUNCH_ID, PEER_LOST, RESTART, is_first_to, is_peer_loss, list_signals

_STOPPED = (0, *(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)))  # having saved
STATUS_CRASHED, STATUS_PEER_LOST = 70, 75  # of a rank: a defect, whose traceback it has shown; another one is gone
SAVE_S = 60  # from a signal to the end of all ranks by force
END_S = 10  # from a rank's death to that; with one missing, the others have nothing left to do
_GRACE_S = 1.0  # who has lost a peer leaves after it, so that the peer is the one that is found to have failed
_POLL_S = 0.25


def launch(function: Callable[..., int], arguments: tuple[Any, ...], num_ranks: int, max_restarts: int = 0) -> int:
    """Run `function` as `num_ranks` ranks of this machine; returns the exit status.

    A rank that dies takes the others down, within END_S; then all are started again, at most `max_restarts` times,
    unless what failed was a UserError, which would only come again. SIGINT, SIGTERM or SIGHUP to this process is passed
    on, so that the ranks save and leave, within SAVE_S; a second one (but SIGHUP) ends all at once.
    """
    os.environ[LAUNCH_ID] = uuid.uuid4().hex
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    resource_tracker.ensure_running()  # multiprocessing's helper, which has to outlive the terminal
    signal.signal(signal.SIGHUP, before)
    restarts = 0
    while True:
        os.environ[RESTART] = str(restarts)
        status, rank, received = _launch_once(function, arguments, num_ranks)
        if received and (status in _STOPPED or 128 - status in _STOPPED):  # or too early to save
            return 128 + received
        if status in _STOPPED:
            return status
        told = status in (STATUS_FAILED, STATUS_CRASHED)
        what = f"rank {rank} failed" if told else f"rank {rank} {_name_end(status)}"
        if status == STATUS_FAILED or restarts == max_restarts or received:
            if told:
                return STATUS_FAILED
            raise UserError(f"{what}; the last checkpoint is kept: go on with --resume, or start with --max-restarts N")
        restarts += 1
        warn(f"{what}: restart {restarts} of {max_restarts}, from the last checkpoint")


def _launch_once(function: Callable[..., int], arguments: tuple[Any, ...], num_ranks: int) -> tuple[int, int, int]:
    """(status, rank) of the rank that ended it, a negative status is a signal's number; the signal received, or 0."""
    import torch.distributed
    import torch.multiprocessing

    received: list[int] = []

    def receive(number: int, _frame: FrameType | None) -> None:
        ranks = multiprocessing.active_children()
        if number == signal.SIGHUP:
            leave_closed_terminal()
            if received:  # the shell and the kernel may both send it
                return
        if received or not ranks:
            for rank in ranks:
                rank.kill()
            raise SystemExit(128 + number)
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in list_signals()}
    try:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        started = torch.multiprocessing.start_processes(
            _run_child, (num_ranks, store.port, function, arguments), num_ranks, join=False
        )
        return *_watch(started.processes, received), received[0] if received else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(ranks: list[Any], received: list[int]) -> tuple[int, int]:
    """Wait for the ranks' end: (status, rank). Ends them when one has failed or this process has `received` a signal,
    by force in the end: a rank that waits in a GPU's kernel for another hears no signal but SIGKILL."""
    first: tuple[int, int] | None = None
    end_s, is_told = math.inf, False
    while True:
        alive = [rank for rank in ranks if rank.is_alive()]
        failed = [(rank.exitcode, number) for number, rank in enumerate(ranks) if (rank.exitcode or 0) not in _STOPPED]
        if received and not is_told:
            is_told, end_s = True, min(end_s, time.monotonic() + SAVE_S)
            warn(f"{signal.Signals(received[0]).name}: the ranks save and leave; a second one ends them at once")
            _terminate(alive)  # never SIGINT, which a terminal has sent them already
        if failed and first is None:
            first = min(failed, key=lambda end: end[0] == STATUS_PEER_LOST)
            end_s = min(end_s, time.monotonic() + END_S)
            _terminate(alive)
        if time.monotonic() > end_s:
            for rank in alive:
                rank.kill()
        if not alive:
            return first or (max(rank.exitcode for rank in ranks), 0)
        connection.wait([rank.sentinel for rank in alive], _POLL_S)


def _terminate(ranks: list[Any]) -> None:
    for rank in ranks:
        rank.terminate()


def _name_end(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    hint = " (out of memory? see dmesg)" if status == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"


def _run_child(rank: int, world_size: int, port: int, function: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",  # the store is the launcher's
    )  # fmt: skip
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as torchrun has it
    take_streams()
    status = flush_results(run_as_rank(function, *arguments))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # nothing is left to stop
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


def run_as_rank(function: Callable[..., int], *arguments: Any) -> int:
    """`function` as one rank of several. Its status; or the process ends here, once its failure has been told."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 - told here: no launcher knows which rank was the first to fail
        status = _tell(error)
    if status == STATUS_PEER_LOST or os.environ.get("RANK") == "0":  # whom the others may have to ask
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_GRACE_S)
    os._exit(flush_results(status))  # the usual way waits for collectives that the other ranks will not join


def _tell(error: Exception) -> int:
    rank = os.environ.get("RANK", "0")
    if is_peer_loss(error):
        if is_first_to(PEER_LOST):
            warn(f"rank {rank} stops: another rank is gone ({str(error).strip().splitlines()[0][:120]})")
        return STATUS_PEER_LOST
    if not is_first_to(FAILURE):
        return STATUS_FAILED if isinstance(error, UserError) else STATUS_CRASHED
    if isinstance(error, UserError | OSError):
        warn(f"error: rank {rank}: {error if isinstance(error, UserError) else explain_os_error(error)}")
        return STATUS_FAILED if isinstance(error, UserError) else STATUS_CRASHED
    warn("".join(traceback.format_exception(error)).rstrip())
    warn(f"error: rank {rank} failed: {type(error).__name__}: {' '.join(str(error).split())}")
    return STATUS_CRASHED


_FIRST_PORT, _NUM_PORTS = 20000, 12000  # below the ports that Linux hands out by itself


def adopt(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from srun's variables.

    Does nothing outside of a step of several tasks, or where RANK is set (torchrun under srun). MASTER_ADDR and
    MASTER_PORT are kept where set. Raises UserError for an environment that cannot be srun's.
    """
    num_tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or num_tasks == "1":
        return
    try:
        rank, local_rank = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
        node = int(environment["SLURM_NODEID"])
        local_size = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])[node]
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        host = first_host(environment["SLURM_STEP_NODELIST"])
        world_size = int(num_tasks)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"Slurm's environment is not understood ({type(error).__name__}: {error}); start ranks with srun, or with "
            "torchrun inside of it"
        ) from error
    environment.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(local_size)
    )
    environment.setdefault("MASTER_ADDR", host)
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + (31 * job + step) % _NUM_PORTS))


def first_host(nodes: str) -> str:
    """The first of a list as Slurm abbreviates it: "gpu[03-05,09]-ib,login" is gpu03-ib and so on."""
    match = re.match(r"([^,\[\]]*)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?", nodes)
    if not match or not match[0]:
        raise ValueError(f"no host in {nodes!r}")
    return (match[1] or "") + (match[2] or "") + (match[3] or "")


def expand_counts(counts: str) -> list[int]:
    """Tasks of each node: "2(x3),1" is 2, 2, 2, 1."""
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise ValueError(f"no counts in {counts!r}")
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded
