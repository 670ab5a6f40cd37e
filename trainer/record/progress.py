"""How training looks while it runs: bars and numbers on a terminal, plain lines elsewhere, JSON lines or nothing.

The decision that shaped it: the loop says the same whatever listens (`choose_display`), words go to stderr and only a
terminal gets control codes, so that a log file reads like a log file; stdout belongs to the JSON lines alone. Left
out: what is measured (train.py), what it adds up to (tally.py), and what is kept (runlog.py).
"""

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any

from pipeline.common.console import PLAIN_INTERVAL_S, Voice, can_redraw, note, print_line
from trainer.record.tally import Standing, Tally, spell_duration

_GIB = 2**30


class TrainDisplay:
    """What all displays do: add up. This one says nothing: --quiet."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def __enter__(self) -> "TrainDisplay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def step(self, epoch: int, step_in_epoch: int) -> None:
        """So many steps of `epoch` are done. Called after each of them: it must cost nothing."""

    def record(self, record: Mapping[str, Any]) -> Standing:
        """A record of training has been logged (metricslog.TrainRecord). Returns where training stands."""
        standing = self._tally.add(record)
        self._show(standing)
        return standing

    def evaluating(self, epoch: int) -> None:
        """The epoch's steps are done, its evaluation begins."""

    def evaluated(self, top1_error: float) -> None:
        self._tally.add_evaluation(top1_error)

    def epoch_done(self, epoch: int, summary: str) -> None:
        """The epoch is over: `summary` is to stay."""

    def _show(self, standing: Standing) -> None:
        pass

    def _close(self) -> None:
        pass


class PlainDisplay(TrainDisplay):
    """A line on stderr every ten seconds at most, and one for each epoch."""

    def __init__(self, tally: Tally, interval_s: float = PLAIN_INTERVAL_S) -> None:
        super().__init__(tally)
        self._interval_s, self._said_s = interval_s, tally.now_s()

    def _show(self, standing: Standing) -> None:
        if self._is_due():
            self._say(standing)

    def _is_due(self) -> bool:
        now_s = self._tally.now_s()
        due = now_s - self._said_s >= self._interval_s
        self._said_s = now_s if due else self._said_s
        return due

    def _say(self, now: Standing) -> None:
        where = f"{_epoch(now.epoch, self._tally)}  step {now.step_in_epoch}/{self._tally.steps_per_epoch}"
        note("  ".join([where, *spell(now), f"{spell_duration(now.left_s)} left"]))

    def epoch_done(self, epoch: int, summary: str) -> None:
        self._said_s = self._tally.now_s()
        note(f"{_epoch(epoch, self._tally)}  {summary}")


class JsonDisplay(PlainDisplay):
    """A JSON object a line on stdout: what the records of metrics.jsonl add up to (docs/metrics.md)."""

    def _say(self, now: Standing) -> None:
        print_line({"kind": "progress", "epochs": self._tally.epochs, **asdict(now)})

    def epoch_done(self, epoch: int, summary: str) -> None:
        left_s = self._tally.left_s(epoch * self._tally.steps_per_epoch)
        best = self._tally.best_error
        print_line({"kind": "epoch", "epoch": epoch, "epochs": self._tally.epochs, "best_error": best, "left_s": left_s,
                    "text": summary})  # fmt: skip


class TerminalDisplay(TrainDisplay):
    """Two bars and two lines of numbers that change in place, and a line for each epoch above them.

    Leaving the context by any exception restores the terminal.
    """

    def __init__(self, tally: Tally, console: Any = None) -> None:
        """`console`: a rich console to draw on; None: stderr."""
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text

        super().__init__(tally)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[said]}"))
        self._bars = Progress(*columns, expand=True)
        whole = tally.epochs * tally.steps_per_epoch
        self._epoch_bar = self._bars.add_task(_epoch(1, tally), total=tally.steps_per_epoch, said="")
        self._total_bar = self._bars.add_task("total", total=whole, completed=tally.first_step, said="")
        self._lines = [Text("", no_wrap=True, overflow="ellipsis") for _ in range(2)]
        # stdout is taken over only where it shares the screen: into a file, results must go where they belong
        shared = sys.stdout.isatty()
        console = console or Console(stderr=True)
        self._live = Live(Group(self._bars, *self._lines), console=console, transient=True, redirect_stdout=shared)

    def __enter__(self) -> "TrainDisplay":
        self._live.start()
        return self

    def step(self, epoch: int, step_in_epoch: int) -> None:
        steps = self._tally.steps_per_epoch
        done = (epoch - 1) * steps + step_in_epoch
        said = f"{step_in_epoch}/{steps} steps"
        self._bars.update(self._epoch_bar, description=_epoch(epoch, self._tally), completed=step_in_epoch, said=said)
        self._bars.update(self._total_bar, completed=done)

    def evaluating(self, epoch: int) -> None:
        self._bars.update(self._epoch_bar, said="evaluating")

    def epoch_done(self, epoch: int, summary: str) -> None:
        line = f"{_epoch(epoch, self._tally)}  {summary}"
        with contextlib.suppress(OSError):  # the terminal was closed: training goes on
            self._live.console.print(line, markup=False, highlight=False)  # broken between words

    def _show(self, standing: Standing) -> None:
        self.step(standing.epoch, standing.step_in_epoch)
        self._bars.update(self._total_bar, said=f"{spell_duration(standing.left_s)} left")
        said = spell(standing)
        learnt = sum(part.startswith(_LEARNT) for part in said)
        self._lines[0].plain, self._lines[1].plain = "  ".join(said[:learnt]), "  ".join(said[learnt:])

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._live.stop()


_LEARNT = ("loss", "top-1", "top-5", "val.", "rate")


def spell(now: Standing) -> list[str]:
    """The numbers in words: what is learned, then how fast. Each half fits 80 columns."""
    parts = [f"loss {now.loss:.3f}", f"top-1 error {now.top1_error:.1f} %", f"top-5 {now.top5_error:.1f} %"]
    if now.best_error is not None:
        parts.append(f"val. best {now.best_error:.2f} %")
    parts += [
        f"rate {now.lr:.3g}",
        f"{now.images_per_s:,.0f} images/s (mean {now.mean_images_per_s:,.0f})",
        f"waiting for data {100 * now.data_wait_fraction:.0f} %",
    ]
    gpu = [] if now.gpu_utilisation is None else [f"{100 * now.gpu_utilisation:.0f} %"]
    gpu += [] if now.gpu_memory_bytes is None else [f"{now.gpu_memory_bytes / _GIB:.1f} GiB"]
    return [*parts, f"GPU {', '.join(gpu)}"] if gpu else parts


def choose_display(voice: Voice, tally: Tally) -> TrainDisplay:
    """The display for a voice; with words, bars where stderr is a terminal that can show them."""
    if voice == "quiet":
        return TrainDisplay(tally)
    if voice == "json":
        return JsonDisplay(tally)
    return TerminalDisplay(tally) if can_redraw() else PlainDisplay(tally)


def _epoch(epoch: int, tally: Tally) -> str:
    return f"epoch {epoch}/{tally.epochs}"
