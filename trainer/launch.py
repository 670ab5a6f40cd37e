"""Starting ranks, by this machine or by Slurm, and what is done when one dies."""

import logging
import math
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Callable, MutableMapping
from multiprocessing import resource_tracker
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
from trainer.distributed import FAILURE, LAUNCH_ID, PEER_LOST, RESTART, is_first_to, is_peer_loss
from trainer.safety import list_signals

_STOPPED = (0, *(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)))  # having saved
STATUS_CRASHED, STATUS_PEER_LOST = 70, 75  # of a rank: a defect, whose traceback it has shown; another one is gone
SAVE_S = 60  # from a signal to the end of all ranks by force
END_S = 10  # from a rank's death to that; with one missing, the others have nothing left to do
_GRACE_S = 1.0  # who has lost a peer leaves after it, so that the peer is the one that is found to have failed
_POLL_S = 0.25


def launch(function: Callable[..., int], arguments: tuple[Any, ...], num_ranks: int, max_restarts: int = 0) -> int:
    """Run `function` as `num_ranks` ranks of this machine under torch's elastic launcher; returns the exit status.

    A rank that dies takes the others down, within END_S; then all are started again, at most `max_restarts` times,
    unless what failed was a UserError, which would only come again. SIGINT, SIGTERM or SIGHUP to this process is passed
    on, so that the ranks save and leave, within SAVE_S; a second one (but SIGHUP) ends all at once.
    """
    os.environ[LAUNCH_ID] = uuid.uuid4().hex
    _start_tracker()
    restarts = 0
    while True:
        os.environ[RESTART] = str(restarts)
        watch = _Watch()
        status, rank = _launch_once(function, arguments, num_ranks, watch)
        if watch.received and (status in _STOPPED or 128 - status in _STOPPED):  # or too early to save
            return 128 + watch.received
        if status in _STOPPED:
            return status
        told = status in (STATUS_FAILED, STATUS_CRASHED)
        what = f"rank {rank} failed" if told else f"rank {rank} {_name_end(status)}"
        if status == STATUS_FAILED or restarts == max_restarts or watch.received:
            if told:
                return STATUS_FAILED
            raise UserError(f"{what}; the last checkpoint is kept: go on with --resume, or start with --max-restarts N")
        restarts += 1
        warn(f"{what}: restart {restarts} of {max_restarts}, from the last checkpoint")


def _start_tracker() -> None:
    """multiprocessing's own helper ignores SIGINT and SIGTERM, but not that the terminal was closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    resource_tracker.ensure_running()
    signal.signal(signal.SIGHUP, before)


def _launch_once(
    function: Callable[..., int], arguments: tuple[Any, ...], num_ranks: int, watch: "_Watch"
) -> tuple[int, int]:
    """(status, rank) of the rank that ended it; a negative status is a signal's number."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=os.environ[LAUNCH_ID],
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # else a temporary folder that nobody removes
        signals_to_handle="SIGQUIT",  # the others are ours
    )
    logging.disable(logging.CRITICAL)  # torch's launcher logs a trace of itself for every rank that ends
    try:
        with watch:
            statuses = elastic_launch(config, _run_child)(function, arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        return int(failure.exitcode), rank
    finally:
        logging.disable(logging.NOTSET)
    return max((int(status) for status in statuses.values()), default=STATUS_FAILED), 0


class _Watch:
    """For the length of a block, what torch's launcher does not do, or too late; a thread does it.

    Passes a signal on to the ranks and sets them an end; ends a rank that waits in a GPU's kernel for another that has
    died, since it hears no signal but SIGKILL and torch would give it 30 s.
    """

    def __init__(self) -> None:
        self.received = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_after, daemon=True)

    def __enter__(self) -> None:
        self._previous = {number: signal.signal(number, self._receive) for number in list_signals()}
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        ranks = multiprocessing.active_children()
        if number == signal.SIGHUP:
            leave_closed_terminal()
            if self.received:  # the shell and the kernel may both send it
                return
        if self.received or not ranks:
            for rank in ranks:
                rank.kill()
            raise SystemExit(128 + number)
        self.received = number

    def _look_after(self) -> None:
        ranks: set[Any] = set()
        told: set[Any] = set()
        end_s = math.inf
        while not self._over.wait(_POLL_S):
            ranks.update(multiprocessing.active_children())
            if self.received and not told:
                warn(f"{signal.Signals(self.received).name}: the ranks save and leave; a second one ends them at once")
                end_s = min(end_s, time.monotonic() + SAVE_S)
            if self.received:
                for rank in ranks - told:
                    rank.terminate()  # never SIGINT, which a terminal has sent them already
                told |= ranks
            if any(rank.exitcode for rank in ranks):
                end_s = min(end_s, time.monotonic() + END_S)
            if time.monotonic() > end_s:
                for rank in ranks:
                    rank.kill()


def _name_end(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    hint = " (out of memory? see dmesg)" if status == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"


def _run_child(function: Callable[..., int], arguments: tuple[Any, ...]) -> int:
    take_streams()
    status = flush_results(run_as_rank(function, *arguments))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # nothing is left to stop, and torch's launcher
        signal.signal(number, signal.SIG_IGN)  # would wait for ever for a rank that dies while it waits to be asked
    threading.Thread(target=_leave_with_launcher, args=(status,), daemon=True).start()
    return status


def _leave_with_launcher(status: int) -> None:
    """If it was killed: this rank has saved, but torch would have it wait to be asked for ever."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        launcher.join()
        os._exit(status)


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
    if isinstance(error, UserError):
        warn(f"error: rank {rank}: {error}")
        return STATUS_FAILED
    if isinstance(error, OSError):
        warn(f"error: rank {rank}: {explain_os_error(error)}")
        return STATUS_CRASHED
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
