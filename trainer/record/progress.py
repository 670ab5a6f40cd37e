"""How training looks while it runs: where it stands, bars on a terminal, plain lines elsewhere, JSON lines."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from pipeline.common.console import PLAIN_INTERVAL_S, Voice, can_redraw, note, print_line


@dataclass(frozen=True)
class Standing:
    """After `step_in_epoch` steps of `epoch`, both from 1. Errors in percent, of the epoch so far; rates in images/s.

    best_error: the lowest top-1 error of an evaluation, None before the first. lr, images_per_s, data_wait_fraction
    and the GPU's numbers: of the last record; mean_images_per_s: of this process so far.
    """

    epoch: int
    step_in_epoch: int
    step: int
    loss: float
    top1_error: float
    top5_error: float
    best_error: float | None
    lr: float
    images_per_s: float
    mean_images_per_s: float
    data_wait_fraction: float
    left_s: float
    gpu_utilisation: float | None = None
    gpu_memory_bytes: int | None = None


class Tally:
    """Counts from step `steps_done` on, which is where a resumed run goes on; `best_error` is what it had."""

    def __init__(
        self,
        epochs: int,
        steps_per_epoch: int,
        *,
        steps_done: int = 0,
        best_error: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epochs, self.steps_per_epoch, self._clock = epochs, steps_per_epoch, clock
        self._start_s, self.first_step, self._last_step = clock(), steps_done, steps_done
        self._spent = 0.0  # seconds of training, times the batch size over images
        self._epoch, self._weight = 0, 0
        self._sums = [0.0, 0.0, 0.0]
        self.best_error = None if math.isinf(best_error) else best_error

    def add(self, record: Mapping[str, Any]) -> Standing:
        """Count a record of training (metricslog.TrainRecord)."""
        steps, self._last_step = record["step"] - self._last_step, record["step"]
        if record["epoch"] != self._epoch:
            self._epoch, self._weight, self._sums = record["epoch"], 0, [0.0, 0.0, 0.0]
        self._weight += steps
        for place, name in enumerate(("loss", "top1_error", "top5_error")):
            self._sums[place] += steps * record[name]
        self._spent += steps / record["images_per_s"]
        loss, top1_error, top5_error = (total / max(self._weight, 1) for total in self._sums)
        return Standing(
            epoch=record["epoch"],
            step_in_epoch=record["step"] - (record["epoch"] - 1) * self.steps_per_epoch,
            step=record["step"],
            loss=loss,
            top1_error=top1_error,
            top5_error=top5_error,
            best_error=self.best_error,
            lr=record["lr"],
            images_per_s=record["images_per_s"],
            mean_images_per_s=(record["step"] - self.first_step) / self._spent if self._spent else 0.0,
            data_wait_fraction=record["data_wait_fraction"],
            left_s=self.left_s(record["step"]),
            gpu_utilisation=record.get("gpu_utilisation"),
            gpu_memory_bytes=record.get("gpu_memory_bytes"),
        )

    def add_evaluation(self, top1_error: float) -> None:
        if math.isfinite(top1_error):
            self.best_error = top1_error if self.best_error is None else min(self.best_error, top1_error)

    def now_s(self) -> float:
        """By the clock that all times are taken from."""
        return self._clock()

    def left_s(self, step: int) -> float:
        """Seconds until the last epoch ends, if all goes on as so far."""
        here = max(step - self.first_step, 1)
        return (self._clock() - self._start_s) / here * max(self.epochs * self.steps_per_epoch - step, 0)


def spell_duration(seconds: float) -> str:
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
