"""Contestants as child processes, each with its own interpreter: a line of JSON asks, a line of JSON answers.

A child is stopped (SIGSTOP) whenever it is not its turn, so that nobody prefetches on another's time. Standard library
only, because the children import this file in any environment.
"""

import contextlib
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.machine import sum_cpu_ticks

BENCHMARKS = Path(__file__).resolve().parents[1]
REPLY_LIMIT_S = 1200.0


@dataclass(frozen=True)
class Contestant:
    """What a child offers: functions callable by name with JSON arguments, and the packages whose versions count."""

    calls: Mapping[str, Callable[..., Any]]
    packages: Sequence[str]
    close: Callable[[], object] = lambda: None


class Failed(Exception):
    """A contestant that could not start or answer: the reason in one line."""


def serve(make: Callable[[str, dict[str, Any]], Contestant]) -> None:
    """The life of a child (argv: name, job as JSON): make the contestant, then answer calls until stdin ends."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would not end those whose parent was killed
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print; the pipe is for replies alone
    name, job = sys.argv[1], json.loads(sys.argv[2])

    def reply(**message: Any) -> None:
        print(json.dumps(message), file=replies, flush=True)

    try:
        contestant = make(name, job)
    except ImportError as error:
        traceback.print_exc()
        reply(missing=" ".join(str(error).split()))
        return
    except Exception as error:  # noqa: BLE001 - carried to the parent, which reports it in the contestant's row
        traceback.print_exc()
        reply(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
        return
    reply(value={"python": platform.python_version(), **find_versions(contestant.packages)})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply(value=contestant.calls[request["call"]](**request["arguments"]))
        except Exception as error:  # noqa: BLE001 - as above
            traceback.print_exc()
            reply(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
    contestant.close()


def find_versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class Child:
    """A contestant's process and all that it starts, one process group: stopped except while it is asked something."""

    def __init__(
        self, python: Path, script: Path, name: str, job: Mapping[str, Any], cpus: set[int], log: Path
    ) -> None:
        self._log = log
        threads = str(len(cpus))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "NUMBA_NUM_THREADS": threads,
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *job.get("paths", [])]),
        }
        with log.open("ab") as file, _on_cpus(cpus):  # not preexec_fn: a signal's exception is lost in its fork hooks
            self._process = subprocess.Popen(
                [str(python), str(script), name, json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                process_group=0,  # same session: should we die, the kernel wakes and hangs up a stopped group
            )
        self._buffer = b""
        try:
            self.versions: dict[str, str] = self._receive()
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def ask(self, call: str, **arguments: Any) -> Any:
        """The answer of the child's function `call`. Raises Failed if it has none."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write((json.dumps({"call": call, "arguments": arguments}) + "\n").encode())
            self._process.stdin.flush()
            return self._receive()
        except BrokenPipeError:
            raise Failed(f"ended with status {self._process.wait()} (log: {self._log.name})") from None
        finally:
            self._signal(signal.SIGSTOP)

    def count_cpu_s(self) -> float:
        """Processor time that the group has used so far, ended processes included."""
        return sum_cpu_ticks(self._process.pid) / os.sysconf("SC_CLK_TCK")

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        limit_s = time.monotonic() + REPLY_LIMIT_S
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, limit_s - time.monotonic()))
            if not ready:
                raise Failed(f"no answer in {REPLY_LIMIT_S:.0f} s (log: {self._log.name})")
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                raise Failed(f"ended with status {self._process.wait()} (log: {self._log.name})")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = json.loads(line)
        if "missing" in message:
            raise ModuleNotFoundError(message["missing"])
        if "error" in message:
            raise Failed(message["error"])
        return message["value"]

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End the whole group: kindly if the child answers to the end of its input, else at once."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._signal(signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def _on_cpus(cpus: set[int]) -> Iterator[None]:
    """What is started in the block runs on `cpus`."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


@contextlib.contextmanager
def closing_all(children: Mapping[str, Child]) -> Iterator[None]:
    """End every child, whatever happens."""
    try:
        yield
    finally:
        for child in children.values():
            child.close()


def unwind_when_terminated() -> None:
    """SIGTERM ends this process by way of its `finally` clauses: no child and no temporary folder stays behind."""
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(128 + signal.SIGTERM))
