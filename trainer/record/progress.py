"""How far training is, and how that looks: bars on a terminal, plain lines elsewhere, JSON lines, or nothing."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipeline.common.console import PLAIN_INTERVAL_S, Voice, can_redraw, note, print_line

_GIB = 2**30
_MEANS = ("loss", "top1_error", "top5_error")


@dataclass(frozen=True)
class Status:
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


class Progress:
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
        self.epochs, self.steps_per_epoch, self.now_s = epochs, steps_per_epoch, clock
        self._start_s, self.first_step, self._last_step = clock(), steps_done, steps_done
        self._spent = 0.0  # seconds of training, times the batch size over images
        self._epoch, self._weight, self._sums = 0, 0, dict.fromkeys(_MEANS, 0.0)
        self.best_error = None if math.isinf(best_error) else best_error

    def add(self, record: Mapping[str, Any]) -> Status:
        """Count a record of training (TrainRecord of metrics.py)."""
        steps, self._last_step = record["step"] - self._last_step, record["step"]
        if record["epoch"] != self._epoch:
            self._epoch, self._weight, self._sums = record["epoch"], 0, dict.fromkeys(_MEANS, 0.0)
        self._weight += steps
        for name in _MEANS:
            self._sums[name] += steps * record[name]
        self._spent += steps / record["images_per_s"]
        given = {field.name: record[field.name] for field in fields(Status) if field.name in record}
        counted = {
            "step_in_epoch": record["step"] - (record["epoch"] - 1) * self.steps_per_epoch,
            "best_error": self.best_error,
            "mean_images_per_s": (record["step"] - self.first_step) / self._spent if self._spent else 0.0,
            "left_s": self.left_s(record["step"]),
        }
        means = {name: total / max(self._weight, 1) for name, total in self._sums.items()}
        return Status(**given | means | counted)

    def add_evaluation(self, top1_error: float) -> None:
        """Count an evaluation; one that is not a number is none."""
        if math.isfinite(top1_error):
            self.best_error = top1_error if self.best_error is None else min(self.best_error, top1_error)

    def left_s(self, step: int) -> float:
        """Seconds until the last epoch ends, if all goes on as so far."""
        here = max(step - self.first_step, 1)
        return (self.now_s() - self._start_s) / here * max(self.epochs * self.steps_per_epoch - step, 0)

    def name_epoch(self, epoch: int) -> str:
        """As "epoch 3/90"."""
        return f"epoch {epoch}/{self.epochs}"


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


class TrainDisplay:
    """What all displays do: count. This one says nothing: --quiet."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __enter__(self) -> "TrainDisplay":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put right."""

    def step(self, epoch: int, step_in_epoch: int) -> None:
        """So many steps of `epoch` are done. Called after each of them: it must cost nothing."""

    def record(self, record: Mapping[str, Any]) -> Status:
        """A record of training has been logged. Returns where training is."""
        status = self._progress.add(record)
        self._show(status)
        return status

    def evaluating(self, epoch: int) -> None:
        """The epoch's steps are done, its evaluation begins."""

    def evaluated(self, top1_error: float) -> None:
        """With what result it ended."""
        self._progress.add_evaluation(top1_error)

    def epoch_done(self, epoch: int, summary: str) -> None:
        """The epoch is over: `summary` is to stay."""

    def _show(self, status: Status) -> None:
        pass


class PlainDisplay(TrainDisplay):
    """A line on stderr every ten seconds at most, and one for each epoch."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress)
        self._said_s = progress.now_s()

    def _show(self, status: Status) -> None:
        now_s = self._progress.now_s()
        if now_s - self._said_s >= PLAIN_INTERVAL_S:
            self._said_s = now_s
            self._say(status)

    def _say(self, now: Status) -> None:
        where = f"{self._progress.name_epoch(now.epoch)}  step {now.step_in_epoch}/{self._progress.steps_per_epoch}"
        note("  ".join([where, *spell(now), f"{spell_duration(now.left_s)} left"]))

    def epoch_done(self, epoch: int, summary: str) -> None:
        self._said_s = self._progress.now_s()
        note(f"{self._progress.name_epoch(epoch)}  {summary}")


class JsonDisplay(PlainDisplay):
    """A JSON object a line on stdout: what the records of metrics.jsonl add up to (docs/metrics.md)."""

    def _say(self, now: Status) -> None:
        print_line({"kind": "progress", "epochs": self._progress.epochs, **asdict(now)})

    def epoch_done(self, epoch: int, summary: str) -> None:
        all_ = self._progress
        print_line({"kind": "epoch", "epoch": epoch, "epochs": all_.epochs, "best_error": all_.best_error,
                    "left_s": all_.left_s(epoch * all_.steps_per_epoch), "text": summary})  # fmt: skip


class TerminalDisplay(TrainDisplay):
    """Two bars and two lines of numbers that change in place, and a line for each epoch above them.

    Leaving the context by any exception restores the terminal.
    """

    def __init__(self, progress: Progress, console: Any = None) -> None:
        """`console`: a rich console to draw on; None: stderr."""
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars
        from rich.text import Text

        super().__init__(progress)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[said]}"))
        self._bars = Bars(*columns, expand=True)
        whole = progress.epochs * progress.steps_per_epoch
        self._epoch_bar = self._bars.add_task(progress.name_epoch(1), total=progress.steps_per_epoch, said="")
        self._total_bar = self._bars.add_task("total", total=whole, completed=progress.first_step, said="")
        self._lines = [Text("", no_wrap=True, overflow="ellipsis") for _ in range(2)]
        # stdout is taken over only where it shares the screen: into a file, results must go where they belong
        shared = sys.stdout.isatty()
        console = console or Console(stderr=True)
        self._live = Live(Group(self._bars, *self._lines), console=console, transient=True, redirect_stdout=shared)

    def __enter__(self) -> "TrainDisplay":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the terminal was closed: training goes on
            self._live.stop()

    def step(self, epoch: int, step_in_epoch: int) -> None:
        steps, name = self._progress.steps_per_epoch, self._progress.name_epoch(epoch)
        said = f"{step_in_epoch}/{steps} steps"
        self._bars.update(self._epoch_bar, description=name, completed=step_in_epoch, said=said)
        self._bars.update(self._total_bar, completed=(epoch - 1) * steps + step_in_epoch)

    def evaluating(self, epoch: int) -> None:
        self._bars.update(self._epoch_bar, said="evaluating")

    def epoch_done(self, epoch: int, summary: str) -> None:
        line = f"{self._progress.name_epoch(epoch)}  {summary}"
        with contextlib.suppress(OSError):  # the terminal was closed
            self._live.console.print(line, markup=False, highlight=False)  # broken between words

    def _show(self, status: Status) -> None:
        self.step(status.epoch, status.step_in_epoch)
        self._bars.update(self._total_bar, said=f"{spell_duration(status.left_s)} left")
        said = spell(status)
        num_learnt = next(place for place, part in enumerate(said) if "images/s" in part)
        self._lines[0].plain, self._lines[1].plain = "  ".join(said[:num_learnt]), "  ".join(said[num_learnt:])


def spell(now: Status) -> list[str]:
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


def choose_display(voice: Voice, progress: Progress) -> TrainDisplay:
    """The display for a voice; with words, bars where stderr is a terminal that can show them."""
    if voice == "quiet":
        return TrainDisplay(progress)
    if voice == "json":
        return JsonDisplay(progress)
    return TerminalDisplay(progress) if can_redraw() else PlainDisplay(progress)
