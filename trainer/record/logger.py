"""What a run writes and says while it trains: its folder, metrics.jsonl, TensorBoard, progress.

Every rank calls its logger alike; that of each rank but the first keeps quiet.
"""

import contextlib
import errno
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from pipeline.colors import ColorStats
from pipeline.common.console import Voice, explain_os_error, print_line, warn
from pipeline.common.files import write_json
from trainer.distributed import Ranks, gather
from trainer.evaluate import Errors
from trainer.model import AlexNet
from trainer.record.environment import environment, read_gpu_load
from trainer.record.metrics import MetricsLog
from trainer.record.progress import Progress, TrainDisplay
from trainer.record.runs import ENVIRONMENT, METRICS, create_run, lock_run, write_config


class Board(Protocol):
    """Where else the numbers go: TensorBoard's event file (trainer/report/tensorboard.py)."""

    def train(self, record: Mapping[str, Any]) -> None:
        """A record of training."""

    def eval(self, record: Mapping[str, Any]) -> None:
        """A record of an evaluation."""

    def look(self, model: AlexNet, dtype: torch.dtype, step: int) -> None:
        """At the whole net; it is left in evaluation mode."""

    def close(self) -> None:
        """The run has ended."""


class Logger:
    """Of one run: `folder`, known on every rank; `display`, where progress is shown."""

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
        epoch: int,
        voice: Voice = "words",
        open_board: Callable[[Path], Board] | None = None,
    ) -> None:
        """A new run's folder with `config` and `colors`, or that of the run to `resume`, cut after `step` in `epoch`
        (from step 0 on it is a new one).

        With the voice "json", what is logged is printed, too. Raises UserError if another process trains in the folder.
        """
        self._log: MetricsLog | None = None
        self._lock: BinaryIO | None = None
        self._board: Board | None = None
        self.display = TrainDisplay(Progress(1, 1))
        self._summary, self._device, self._voice, self._is_full = "", ranks.device, voice, False
        folder = resume or Path()
        if ranks.is_first:
            if not resume:
                folder = create_run(runs, name)
            self._lock = lock_run(folder)
            if not step:  # new, or begun anew since nothing of it was saved: with another number of epochs, say
                write_config(folder, config)  # first: what is killed from here on is begun again in its folder
                colors.save(folder)  # with the class names in `config`: the net can be used without its shards
            write_json(folder / ENVIRONMENT, environment())
            echo = print_line if voice == "json" else None
            self._log = MetricsLog.open(folder / METRICS, step if resume else None, echo, epoch=epoch)
        self.folder: Path = gather(folder, ranks)[0]
        if open_board and ranks.is_first:
            self._show(lambda _: None, open_board)

    def announce(self, **facts: Any) -> None:
        """Tell a reader of JSON lines what run this is."""
        if self._log and self._voice == "json":
            print_line({"kind": "run", "run": str(self.folder), **facts})

    def end(self, status: int, step: int, said: str = "") -> None:
        """Training is over or stopped; `said`: how to go on, which a quiet run says as well."""
        if not self._log:
            return
        if self._voice == "json":
            if not print_line({"kind": "end", "status": status, "step": step, "text": said}):
                warn(said or f"complete after step {step}; {self.folder / METRICS} has what the JSON lines lack")
        elif said:
            warn(said)

    def train(self, got: Errors, **record: Any) -> None:
        """Log training since the record before: `got` over those steps, the other fields of a TrainRecord."""
        if not self._log:
            return
        record |= {"loss": got.loss, "top1_error": got.top1_error, "top5_error": got.top5_error}
        load = read_gpu_load(self._device)
        if load:
            record["gpu_memory_bytes"] = load.memory_bytes
            if load.utilisation is not None:
                record["gpu_utilisation"] = load.utilisation
        self._write(self._log.train, **record)
        self._show(lambda board: board.train(record))
        now = self.display.record(record)
        self._summary = (
            f"training loss {now.loss:.3f}, top-1 {now.top1_error:.2f} %, {now.mean_images_per_s:,.0f} images/s, "
            f"waiting for data {100 * now.data_wait_fraction:.0f} %"
        )

    def eval(self, errors: Errors, step: int, epoch: int) -> None:
        """Log an evaluation."""
        if self._log:
            self._write(self._log.eval, step=step, epoch=epoch, crops="centre", **asdict(errors))
        self._show(lambda board: board.eval({"step": step, **asdict(errors)}))
        self.display.evaluated(errors.top1_error)

    def look(self, model: AlexNet, dtype: torch.dtype, step: int) -> None:
        """At the whole net, as it was evaluated; it is left in evaluation mode."""
        self._show(lambda board: board.look(model, dtype, step))

    def event(self, name: str, **fields: Any) -> None:
        """Log something that happened."""
        if self._log:
            self._write(self._log.event, name=name, **fields)

    def epoch_done(self, epoch: int, result: str) -> None:
        """The epoch is over: its line."""
        self.display.epoch_done(epoch, result + self._summary)

    def sync(self) -> None:
        """To be called before a checkpoint is saved."""
        if self._log:
            self._log.sync()

    def close(self) -> None:
        """Close all files, and let others train in the folder."""
        if self._log:
            self._log.close()
        self._show(lambda board: board.close())
        if self._lock:
            self._lock.close()

    def _write(self, write: Callable[..., None], **record: Any) -> None:
        """Log a line; on a full disk it waits in memory, for the next line or checkpoint to take it along."""
        try:
            write(**record)
            self._is_full = False
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self._is_full:
                warn(
                    f"warning: {self.folder / METRICS}: {error.strerror}; its lines wait in memory until there is room"
                )
            self._is_full = True

    def _show(self, write: Callable[[Board], None], open_board: Callable[[Path], Board] | None = None) -> None:
        """Write to the board, if there is one; a disk that takes no more ends it, and not the run."""
        try:
            if open_board:
                self._board = open_board(self.folder)
            if self._board:
                write(self._board)
        except OSError as error:
            warn(f"warning: {explain_os_error(error)}; TensorBoard sees no more of this run, {METRICS} is the record")
            board, self._board = self._board, None
            if board:
                with contextlib.suppress(OSError):  # what could not be written still cannot
                    board.close()
