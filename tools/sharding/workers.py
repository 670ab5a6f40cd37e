"""Where work units run: a pool of local processes, behind one function.

The decision that shaped it: one pipe to each worker carries everything, units one way, progress and results the other,
so a death shows as the end of a pipe, whichever side dies. A worker killed (by SIGKILL, or for want of memory) is an
error at once and never a hang; workers whose parent is gone end at their next word to it. Order of results is not
promised: a unit's output must depend on the unit alone. Left out: what a unit is.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar, cast

from pipeline.common.errors import UserError

Unit = TypeVar("Unit")
Update = TypeVar("Update")
Result = TypeVar("Result")


class _Failed(NamedTuple):
    error: Exception


class _Finished(NamedTuple):
    result: Any


def count_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def use_one_thread() -> None:
    """Keep the libraries of a worker from starting threads of their own: there is one process for each CPU already."""
    os.environ["OMP_NUM_THREADS"] = "1"  # heeded by what is imported later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def run_units(
    function: Callable[[Unit, Callable[[Update], None]], Result],
    units: Iterable[Unit],
    *,
    num_workers: int,
    on_result: Callable[[Result], None],
    on_progress: Callable[[Update], None],
    preload: Sequence[str] = (),
) -> None:
    """Call `function(unit, report)` for each unit in `num_workers` processes.

    `function`, units, results and what is given to `report` must pickle. `on_result` and `on_progress` are called here,
    in this process; an exception out of them, of a unit, or a signal stops all workers and is raised. `preload` names
    modules that are imported once and shared by the workers. Raises UserError if a worker dies.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # started on the way, it would take the mask below away again
    remaining = iter(units)
    processes = []
    at_work: dict[Connection, tuple[Any, Unit]] = {}
    try:
        for unit in remaining:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(function, there, dict(os.environ)), daemon=True)
            # Ctrl-C goes to every process of the terminal, but it is for this one to decide what comes of it: workers
            # inherit a mask that keeps it from them, from their first instruction on.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
                processes.append(process)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            there.close()  # or the end of the worker would not be the end of the pipe
            _send(here, process, unit)
            at_work[here] = process, unit
            if len(processes) == num_workers:
                break
        while at_work:
            for ready in wait(list(at_work)):
                connection = cast(Connection, ready)
                process, unit = at_work[connection]
                message = _receive(connection, process, unit)
                if isinstance(message, _Failed):
                    raise message.error
                if not isinstance(message, _Finished):
                    on_progress(message)
                    continue
                del at_work[connection]
                on_result(message.result)
                for following in remaining:
                    _send(connection, process, following)
                    at_work[connection] = process, following
                    break
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _send(connection: Connection, process: Any, unit: Any) -> None:
    try:
        connection.send(unit)
    except OSError as error:
        raise _mourn(process, unit) from error


def _receive(connection: Connection, process: Any, unit: Any) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        raise _mourn(process, unit) from error


def _mourn(process: Any, unit: Any) -> UserError:
    process.join()
    status = process.exitcode
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    hint = "if memory ran out, give fewer --workers; " if status < 0 else ""  # the kernel kills, it does not ask
    return UserError(
        f"{unit}: its worker process {how}, expected it to finish; {hint}"
        "run the same command again to go on from the finished shards"
    )


def _work(
    function: Callable[[Any, Callable[[Any], None]], Any], connection: Connection, variables: dict[str, str]
) -> None:
    """The life of a worker: take a unit, tell how it goes, until the parent hangs up or ends this process."""
    os.environ.clear()  # what is inherited is the environment of the first call in the parent's life
    os.environ.update(variables)

    def tell(message: Any) -> None:
        try:
            connection.send(message)
        except OSError:
            raise SystemExit(1) from None  # the parent is gone: unwind (removing temporary files) and end

    use_one_thread()
    while True:
        try:
            unit = connection.recv()
        except (EOFError, OSError):
            return
        try:
            outcome: _Finished | _Failed = _Finished(function(unit, tell))
        except Exception as error:  # noqa: BLE001 - carried to the parent and raised there
            error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
            outcome = _Failed(error)
        tell(outcome)
