"""Where work units run: a pool of local processes, or a Ray cluster."""

import contextlib
import logging
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

from pipeline.common.errors import UserError

POLL_S = 0.2  # of Ray
ANSWER_TIMEOUT_S = 120.0  # of Ray, for what is there already
CONNECT_TIMEOUT_S = 10.0
OBJECT_STORE_BYTES = 128 << 20  # of a Ray of our own: listings of units go through it, images do not

Unit = TypeVar("Unit")
Update = TypeVar("Update")
Result = TypeVar("Result")


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
    at_work: dict[Connection, tuple[ForkServerProcess, Unit]] = {}

    def hand_out(unit: Unit, connection: Connection, process: ForkServerProcess) -> None:
        with contextlib.suppress(OSError):  # a worker that has died is told as such when it is listened to
            connection.send(unit)
        at_work[connection] = process, unit

    try:
        for unit in islice(remaining, num_workers):
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
            hand_out(unit, here, process)
        while at_work:
            for ready in wait(list(at_work)):
                connection = cast(Connection, ready)
                process, unit = at_work[connection]
                try:
                    message, value = connection.recv()
                except (EOFError, OSError) as error:
                    raise _explain_death(process, unit) from error
                if message == "progress":
                    on_progress(value)
                    continue
                if message == "failure":
                    raise value
                del at_work[connection]
                on_result(value)
                for following in islice(remaining, 1):
                    hand_out(following, connection, process)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _explain_death(process: ForkServerProcess, unit: Any) -> UserError:
    process.join()
    status = process.exitcode or 0
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
    use_one_thread()

    def tell(message: str, value: Any) -> None:
        try:
            connection.send((message, value))
        except OSError:
            raise SystemExit(1) from None  # the parent is gone: unwind (removing temporary files) and end

    while True:
        try:
            unit = connection.recv()
        except (EOFError, OSError):
            return
        tell(*_call(function, unit, partial(tell, "progress"), "a worker process"))


def _call(
    function: Callable[[Any, Callable[[Any], None]], Any], unit: Any, report: Callable[[Any], None], where: str
) -> tuple[str, Any]:
    """ "result" and what the unit gave, or "failure" and its exception, which is raised in the process that asked."""
    try:
        return "result", function(unit, report)
    except Exception as error:  # noqa: BLE001 - not lost: see above
        error.add_note(f"in {where}:\n" + "".join(traceback.format_exception(error)))
        return "failure", error


class _Mailbox:
    """An actor that keeps what tasks tell until the driver asks."""

    def __init__(self) -> None:
        self._updates: list[Any] = []

    def put(self, update: Any) -> None:
        self._updates.append(update)

    def take(self) -> list[Any]:
        updates, self._updates = self._updates, []
        return updates


def run_units_on_ray(
    function: Callable[[Unit, Callable[[Update], None]], Result],
    units: Iterable[Unit],
    *,
    num_tasks: int | None,
    address: str | None,
    on_result: Callable[[Result], None],
    on_progress: Callable[[Update], None],
) -> None:
    """Call `function(unit, report)` for each unit in a Ray task, `num_tasks` at a time (None: one per CPU of the
    cluster).

    `address` is that of a running cluster ("auto": the one this machine belongs to); None starts Ray on this machine
    for this call. Callbacks are called here; an exception out of them, of a unit, or a signal is raised, and all tasks
    end. Raises UserError if Ray is not installed or cannot be reached, or if a worker or its machine dies.
    """
    remaining = iter(units)
    first = list(islice(remaining, 1))
    if not first:
        return
    with _connect(address, num_tasks) as ray, _hold_signals() as heed_signals:
        num_tasks = num_tasks or max(1, int(ray.cluster_resources().get("CPU", 1)))
        mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()
        task = ray.remote(_work_on_ray).options(num_cpus=1, max_retries=0)
        shared, folder = ray.put(function), Path.cwd()
        at_work: dict[Any, Unit] = {}

        def hand_out(units: Iterable[Unit]) -> None:
            at_work.update({task.remote(folder, shared, unit, mailbox): unit for unit in units})

        hand_out(islice(chain(first, remaining), num_tasks))
        while at_work:
            finished, _ = ray.wait(list(at_work), timeout=POLL_S)
            heed_signals()
            for update in _get(ray, mailbox.take.remote(), "the progress of the units"):
                on_progress(update)
            for reference in finished:
                unit = at_work.pop(reference)
                message, value = _get(ray, reference, str(unit))
                if message == "failure":
                    raise value
                on_result(value)
                hand_out(islice(remaining, 1))


def _get(ray: Any, reference: Any, what: str) -> Any:
    try:
        return ray.get(reference, timeout=ANSWER_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:  # before the unit's own code ran
        raise UserError(
            f"{what}: cannot run on the cluster ({str(error).strip().splitlines()[-1]}); expected alexnet-dali in the "
            "same version on each of its machines"
        ) from error
    except ray.exceptions.RayError as error:
        raise UserError(
            f"{what}: its Ray worker died ({type(error).__name__}: {_first_line(error)}), expected it to finish; if "
            "memory ran out, give fewer --workers; run the same command again to go on from the finished shards"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")


def _work_on_ray(
    folder: Path, function: Callable[[Any, Callable[[Any], None]], Any], unit: Any, mailbox: Any
) -> tuple[str, Any]:
    """A task: what `_call` gives. `folder` is the driver's current one."""
    import ray

    with contextlib.suppress(OSError):  # a machine that does not have it
        os.chdir(folder)
    use_one_thread()
    told: list[Any] = []

    def report(update: Any) -> None:
        told[:] = [mailbox.put.remote(update)]

    outcome = _call(function, unit, report, "a Ray task")
    ray.get(told)  # the mailbox takes one after the other: all are there before the result is
    return outcome


@contextlib.contextmanager
def _hold_signals() -> Iterator[Callable[[], None]]:
    """Hold SIGINT and SIGTERM back until the function that is yielded is called, or the block ends.

    An exception that a handler raises in the middle of Ray's compiled code is lost there, or leaves it in knots. A
    second signal is not held back.
    """
    held: list[int] = []
    handlers: dict[int, Any] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            handlers[number](number, frame)
        held.append(number)

    def heed() -> None:
        if held:
            number = held.pop()
            handlers[number](number, None)

    if threading.current_thread() is threading.main_thread():
        handlers = {n: h for n in (signal.SIGINT, signal.SIGTERM) if callable(h := signal.getsignal(n))}
    for number in handlers:
        signal.signal(number, hold)
    try:
        yield heed
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    heed()


@contextlib.contextmanager
def _connect(address: str | None, num_tasks: int | None) -> Iterator[Any]:
    """The module `ray`, connected. It neither reports to its makers nor greets, and leaves our signals alone."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of a changed default
    if address is None and not any(name.startswith("RAY_AUTH_") for name in os.environ):
        # Nobody else on this machine may use a Ray of our own; left to itself it writes a token into the home folder.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--engine ray needs the package ray ({error}); pip install 'alexnet-dali[ray]'") from error

    _knock(address)
    handler = signal.getsignal(signal.SIGTERM)
    local: dict[str, Any] = {
        "num_cpus": num_tasks or count_cpus(),
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    try:
        with contextlib.chdir(
            "/"
        ):  # Ray's workers look for modules in the driver's folder first: the user's own are there
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                **({} if address else local),
            )
    except (ConnectionError, ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
        raise _explain(address, error) from error
    finally:
        signal.signal(signal.SIGTERM, handler)
    try:
        # A thread of Ray's writes what goes wrong to our standard output, where results go. It is raised here as well.
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield ray
    finally:
        ray.shutdown()  # and with it our tasks; ray.cancel beside one that is just ending aborts the process


def _knock(address: str | None) -> None:
    """Raise UserError if nobody listens at host:port; Ray itself tries for a quarter of an hour."""
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            raise _explain(address, error) from error


def _explain(address: str | None, error: Exception) -> UserError:
    return UserError(
        f"Ray at {address or 'this machine'!r} cannot be used ({_first_line(error)}); "
        "check --ray-address, `ray status` there, and RAY_AUTH_MODE and RAY_AUTH_TOKEN if it wants a token"
    )
