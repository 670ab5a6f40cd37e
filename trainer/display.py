"""How training looks while it runs: a live line on a terminal, plain lines elsewhere, one line that stays per epoch.

The decision that shaped it: everything goes to stderr and only a terminal gets control codes, so that a log file reads
like a log file. Left out: what is measured (train.py); nothing here is kept (runlog.py does that).
"""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pipeline.console import PLAIN_INTERVAL_S, note


class TrainDisplay:
    """How training looks on stderr: a live line on a terminal, else plain lines, and one line that stays per epoch.

    `steps_done` is where a resumed run goes on: time left is judged from the steps of this process alone. Leaving the
    context by any exception restores the terminal.
    """

    def __init__(
        self, epochs: int, steps_per_epoch: int, *, steps_done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._epochs, self._steps_per_epoch, self._steps_done, self._clock = epochs, steps_per_epoch, steps_done, clock
        self._start_s = self._said_s = clock()
        self._live: Any = None
        self._show: Callable[..., None] | None = None

    def __enter__(self) -> "TrainDisplay":
        if sys.stderr.isatty():
            from rich.console import Console, Group
            from rich.live import Live
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.text import Text

            left = TextColumn("{task.completed}/{task.total}  {task.fields[left]} left")
            bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=None), left, expand=True)
            task = bar.add_task(f"epoch 1/{self._epochs}", total=self._steps_per_epoch, left="?")
            numbers = Text("", no_wrap=True, overflow="ellipsis")

            def show(where: str, done: int, left: str, said: str) -> None:
                bar.update(task, description=where, completed=done, left=left)
                numbers.plain = said

            self._show = show
            # stdout is taken over only where it shares the screen: into a file, results must go where they belong
            shared = sys.stdout.isatty()
            self._live = Live(Group(bar, numbers), console=Console(stderr=True), transient=True, redirect_stdout=shared)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(
        self,
        epoch: int,
        step_in_epoch: int,
        *,
        images_per_s: float,
        data_wait_fraction: float,
        loss: float,
        top1_error: float,
    ) -> None:
        """Show that `step_in_epoch` steps of `epoch` (both from 1) are done; loss and error (%) so far in the epoch."""
        now_s = self._clock()
        if self._show is None and now_s - self._said_s < PLAIN_INTERVAL_S:
            return
        where, left = f"epoch {epoch}/{self._epochs}", _duration(self._left_s(epoch, step_in_epoch, now_s))
        said = (
            f"loss {loss:.3f}  top-1 error {top1_error:.1f} %  {images_per_s:,.0f} images/s  "
            f"waiting for data {100 * data_wait_fraction:.0f} %"
        )
        if self._show is not None:
            self._show(where, step_in_epoch, left, said)
        else:
            self._said_s = now_s
            note(f"{where}  step {step_in_epoch}/{self._steps_per_epoch}  {said}  {left} left")

    def epoch_done(self, epoch: int, summary: str) -> None:
        """Print the line about `epoch` that stays on the screen."""
        line = f"epoch {epoch}/{self._epochs}  {summary}"
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._said_s = self._clock()
            note(line)

    def _left_s(self, epoch: int, step_in_epoch: int, now_s: float) -> float:
        done = (epoch - 1) * self._steps_per_epoch + step_in_epoch
        here = max(done - self._steps_done, 1)
        return (now_s - self._start_s) / here * (self._epochs * self._steps_per_epoch - done)


def _duration(seconds: float) -> str:
    """Two units at most: "45 s", "3 min 20 s", "2 h 05 min", "5 d 11 h"."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    if minutes:
        return f"{minutes} min {whole % 60:02d} s"
    return f"{whole} s"
