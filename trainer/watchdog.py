"""What ends a run in which nothing moves any more: a dead file system, a dead peer, a device that does not answer.

The decision that shaped it: the training says that it lives (`beat`) after each step, each batch of an evaluation and
each piece of a checkpoint, and a thread of every rank counts the time since. It counts its own ticks, so that a process
which was itself frozen, and its clock, do not matter. The rank that finds nothing moving shows the stacks of all
threads: its own, and by a signal those of the ranks on the same machine, whose C code answers even where their Python
cannot; then it ends. Where even this thread cannot run, since something holds the interpreter, faulthandler's own does
the same after three times as long. A start (opening shards, building pipelines) has no beats, and at least START_S.
Left out: ranks that do not meet, which torch ends (distributed.py), and other machines, whose ranks have a watchdog of
their own.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from pipeline.common.console import show_cursor
from trainer.distributed import Ranks, gather, is_first_to, under_launcher

STATUS_HUNG, STATUS_HUNG_RANK = 1, 70  # alone; as a rank, whose launcher may start it again
HUNG = "hung"
_STDERR = 2
START_S = 1800.0  # the least that a start may take: other machines may still be downloading shards
_ANSWER_S = 1.0  # for another process to write its stacks, or for the ranks' store to say who is first
_LEAVE_S = 5.0  # a rank that is not the first to find it lets that one speak


class Watchdog:
    """`with Watchdog(ranks, timeout_s) as watchdog: ... watchdog.beat("step 5")`. Every rank makes one alike.

    From the first beat on, nothing may take longer than `timeout_s`; until then, START_S if that is longer.
    """

    def __init__(
        self,
        ranks: Ranks,
        timeout_s: float,
        *,
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], object] | None = None,
    ) -> None:
        self._ranks, self._timeout_s, self._end, self._clock = ranks, timeout_s, end, clock
        self._write = write or (lambda text: os.write(_STDERR, text.encode(errors="replace")))
        self._tick_s = min(timeout_s / 10, 5.0)
        self._limit_s = max(timeout_s, START_S)
        self._idle_s, self._last_s, self._after = 0.0, clock(), "the start"
        self._beats, self._seen = 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._peers: Sequence[tuple[int, str, int]] = ()

    def __enter__(self) -> "Watchdog":
        faulthandler.register(signal.SIGUSR1, file=_STDERR, all_threads=True)
        self._peers = gather((self._ranks.rank, socket.gethostname(), os.getpid()), self._ranks)
        self._last_s = self._clock()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR1)

    def beat(self, after: str) -> None:
        """Something has moved: `after` says what, in the words of "nothing has moved since ..."."""
        self._after, self._limit_s = after, self._timeout_s
        self._beats += 1

    def _watch(self) -> None:
        while not self._over.wait(self._tick_s):
            faulthandler.dump_traceback_later(3 * self._limit_s, exit=True, file=_STDERR)
            if self.tick():
                return

    def tick(self) -> bool:
        """Count the time since the tick before, one and a half ticks at the most; True once this has ended the run."""
        now_s = self._clock()
        passed_s, self._last_s = now_s - self._last_s, now_s
        if self._beats != self._seen:
            self._seen, self._idle_s = self._beats, 0.0
            return False
        self._idle_s += min(max(passed_s, 0.0), 1.5 * self._tick_s)
        if self._idle_s < self._limit_s:
            return False
        self._give_up()
        return True

    def _give_up(self) -> None:
        status = STATUS_HUNG_RANK if under_launcher() else STATUS_HUNG
        if not self._is_first():
            time.sleep(_LEAVE_S)
            self._end(status)
            return
        rank = f"rank {self._ranks.rank}: " if self._ranks.world_size > 1 else ""
        self._write(
            f"error: {rank}nothing has moved for {self._limit_s:g} s, since {self._after}: a file system or a peer "
            "that does not answer? What all threads are doing:\n" + dump_stacks()
        )
        for number, host, process in self._peers:
            if process != os.getpid() and host == socket.gethostname():
                self._write(f"rank {number} (process {process}, {find_state(process)}):\n")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGUSR1)
                time.sleep(_ANSWER_S)
        self._write(
            "error: ended after --timeout-s; the last checkpoint is kept: go on with --resume, or with a longer "
            "--timeout-s if it was only slow\n"
        )
        show_cursor()  # the display will not get to it
        self._end(status)

    def _is_first(self) -> bool:
        """Whether no rank of this machine has begun to tell; also true if the ranks' store does not answer."""
        answers: list[bool] = []
        what = f"{HUNG}/{socket.gethostname()}"
        asking = threading.Thread(target=lambda: answers.append(is_first_to(what)), daemon=True)
        asking.start()
        asking.join(_ANSWER_S)
        return answers[0] if answers else True


def dump_stacks() -> str:
    """The stacks of all threads of this process."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def find_state(process: int) -> str:
    """What Linux says about a process: one that is stopped, or waits for a disk, shows no stacks."""
    names = {"R": "running", "S": "sleeping", "D": "waiting for a disk", "T": "stopped", "Z": "ended"}
    try:
        letter = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "gone"
    return names.get(letter, letter)
