"""Starting ranks on this machine, and what is said and done when one dies.

The decision that shaped it: the rank that fails first tells, once, on stderr, whoever has started it (this launcher,
torchrun, srun); a rank that merely lost its peer keeps quiet. So the launcher adds a word only for a rank that could
not speak, and torch's own report is not shown. Left out: several machines (torchrun, srun: docs/operations.md).
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any

from pipeline.console import STATUS_FAILED, explain_os_error, warn
from pipeline.errors import UserError
from trainer.distributed import FAILURE, LAUNCH_ID, PEER_LOST, RESTART, is_first_to, is_peer_loss

STATUS_CRASHED, STATUS_PEER_LOST = 70, 75  # of a rank: a defect, whose traceback it has shown; another one is gone
SAVE_S = 60  # from a signal to the end of all ranks by force
END_S = 10  # from a rank's death to that; with one missing, the others have nothing left to do
_GRACE_S = 1.0  # who has lost a peer leaves after it, so that the peer is the one that is found to have failed
_POLL_S = 0.25


def launch(function: Callable[..., int], arguments: tuple[Any, ...], num_ranks: int, max_restarts: int = 0) -> int:
    """Run `function` as `num_ranks` ranks of this machine under torch's elastic launcher; returns the exit status.

    A rank that dies takes the others down, within END_S; then all are started again, at most `max_restarts` times,
    unless what failed was a UserError, which would only come again. A signal to this process is passed on, so that the
    ranks save and leave.
    """
    os.environ[LAUNCH_ID] = uuid.uuid4().hex
    restarts = 0
    while True:
        os.environ[RESTART] = str(restarts)
        status, rank = _launch_once(function, arguments, num_ranks)
        if status in (0, 130, 143):
            return status
        told = status in (STATUS_FAILED, STATUS_CRASHED)
        what = f"rank {rank} failed" if told else f"rank {rank} {_name_end(status)}"
        if status == STATUS_FAILED or restarts == max_restarts:
            if told:
                return STATUS_FAILED
            raise UserError(f"{what}; the last checkpoint is kept: go on with --resume, or start with --max-restarts N")
        restarts += 1
        warn(f"{what}: restart {restarts} of {max_restarts}, from the last checkpoint")


def _launch_once(function: Callable[..., int], arguments: tuple[Any, ...], num_ranks: int) -> tuple[int, int]:
    """(status, rank) of the rank that ended it; a negative status is a signal's number."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_S))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=os.environ[LAUNCH_ID],
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    logging.disable(logging.CRITICAL)  # torch's launcher logs a trace of itself for every rank that ends
    over = threading.Event()
    threading.Thread(target=_end_all_when_one_fails, args=(over,), daemon=True).start()
    try:
        statuses = elastic_launch(config, _run_child)(function, arguments)
    except SignalException as stopped:
        return 128 + int(stopped.sigval), 0
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        return int(failure.exitcode), rank
    finally:
        over.set()
        logging.disable(logging.NOTSET)
    return max((int(status) for status in statuses.values()), default=STATUS_FAILED), 0


def _end_all_when_one_fails(over: threading.Event) -> None:
    """What torch's launcher does only after 30 s: a rank that waits in a GPU's kernel hears no signal but SIGKILL."""
    ranks: set[Any] = set()
    failed_s = None
    while not over.wait(_POLL_S):
        ranks.update(child for child in multiprocessing.active_children() if child not in ranks)
        if failed_s is None and any(child.exitcode for child in ranks):
            failed_s = time.monotonic()
        if failed_s is not None and time.monotonic() - failed_s > END_S:
            for child in ranks:
                if child.is_alive():
                    child.kill()


def _name_end(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    hint = " (out of memory? see dmesg)" if status == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"


def _run_child(function: Callable[..., int], arguments: tuple[Any, ...]) -> int:
    return run_as_rank(function, *arguments)


def run_as_rank(function: Callable[..., int], *arguments: Any) -> int:
    """`function` as one rank of several. Its status; or the process ends here, once its failure has been told."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 - told here: no launcher knows which rank was the first to fail
        status = _tell(error)
    if status == STATUS_PEER_LOST or os.environ.get("RANK") == "0":  # whom the others may have to ask
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_GRACE_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the usual way waits for collectives that the other ranks will not join


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
