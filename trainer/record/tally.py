"""Where training stands: means so far, the best error, the time left.

The decision that shaped it: it is fed the records of metrics.jsonl and nothing else, so that the screen, the plain
lines and the JSON lines say the same. Time left is judged from the steps of this process alone, with all that they cost
(evaluations, checkpoints). Left out: what it looks like (display.py).
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


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
