"""What a training run writes and says: its folder, records and one line an epoch. Only the first rank does.

The decision that shaped it: the loop tells every rank's journal everything, and the journal of every rank but the first
keeps quiet, so that the loop has no branches about it. Left out: the formats (runlog.py) and checkpoints.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.colorstats import ColorStats
from pipeline.console import note
from pipeline.shardset import write_json
from trainer.distributed import Ranks, gather
from trainer.evaluate import Errors
from trainer.runlog import ENVIRONMENT, METRICS, MetricsLog, TrainDisplay, create_run, environment, write_config


class Journal:
    """Of one run: `folder`, known on every rank."""

    def __init__(
        self,
        ranks: Ranks,
        runs: Path,
        name: str,
        config: dict[str, Any],
        colors: ColorStats,
        *,
        resume: Path | None,
        step: int,
    ) -> None:
        """A new run's folder with `config` and `colors`, or that of the run to `resume`, cut after `step`."""
        self._log: MetricsLog | None = None
        self._display: TrainDisplay | None = None
        self._summary = ""
        folder = resume or Path()
        if ranks.is_first:
            if not resume:
                folder = create_run(runs, name)
                colors.save(folder)  # with the class names in `config`: the net can be used without its shards
                write_config(folder, config)
            write_json(folder / ENVIRONMENT, environment())
            self._log = MetricsLog.open(folder / METRICS, step if resume else None)
        self.folder: Path = gather(folder, ranks)[0]

    def show(self, display: TrainDisplay) -> None:
        """Where to show progress from now on."""
        if self._log:
            self._display = display

    def say(self, text: str) -> None:
        if self._log:
            note(text)

    def train(self, got: Errors, *, in_epoch: int, **record: Any) -> None:
        """Log training since the record before: `got` over those steps, the other fields of a TrainRecord."""
        if not self._log or not self._display:
            return
        rate, waited = record["images_per_s"], record["data_wait_fraction"]
        self._log.train(loss=got.loss, top1_error=got.top1_error, top5_error=got.top5_error, **record)
        self._display.step(
            record["epoch"],
            in_epoch,
            images_per_s=rate,
            data_wait_fraction=waited,
            loss=got.loss,
            top1_error=got.top1_error,
        )
        self._summary = f"training loss {got.loss:.3f}, {rate:,.0f} images/s, waiting for data {100 * waited:.0f} %"

    def eval(self, errors: Errors, step: int, epoch: int) -> None:
        if self._log:
            self._log.eval(step=step, epoch=epoch, crops="centre", **asdict(errors))

    def event(self, name: str, **fields: Any) -> None:
        if self._log:
            self._log.event(name, **fields)

    def epoch_done(self, epoch: int, result: str) -> None:
        if self._display:
            self._display.epoch_done(epoch, result + self._summary)

    def sync(self) -> None:
        """To be called before a checkpoint is saved."""
        if self._log:
            self._log.sync()

    def close(self) -> None:
        if self._log:
            self._log.close()
