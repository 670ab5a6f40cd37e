"""A signal as a wish to stop, on which all ranks agree.

The decision that shaped it: a handler only takes a note. Where no rank is in the midst of anything, between two steps
or two batches of an evaluation, the loop asks, and what one rank was told is then true of all. That the terminal was
closed (SIGHUP) is such a signal, too, unless it is ignored, as under nohup. Left out: what is saved (run.py), and what
a launcher passes on (launch.py).
"""

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from pipeline.common.console import leave_closed_terminal
from trainer.distributed import Ranks, under_launcher


def list_signals() -> list[signal.Signals]:
    """The signals by which this process is told to stop."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if is_ignored else [signal.SIGHUP])]


class StopRequest:
    """SIGINT, SIGTERM and SIGHUP as a wish to stop, on which all ranks agree: `with StopRequest(ranks) as stop: ...`.

    A second SIGINT is a KeyboardInterrupt, as ever; not under a launcher, which passes on what a terminal has sent to
    all, and which ends its ranks itself.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._received = ranks, 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in list_signals():
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT and not under_launcher():
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            leave_closed_terminal()
        self._received = self._received or number

    def status(self) -> int:
        """0, or the exit status (129, 130, 143) of the signal that any rank has received. All must ask in step."""
        number = self._received
        if self._ranks.world_size > 1:
            asked = torch.tensor(number)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)  # on the CPU: the GPU's queue is not waited for
            number = int(asked)
        return 128 + number if number else 0
