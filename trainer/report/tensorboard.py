"""The same numbers as metrics.jsonl as TensorBoard shows them, with the first layer and what the net says to samples.

The decision that shaped it: events are written as they happen, in the loop's own thread, into files whose names hold no
host name (TensorBoard's own writer puts it there, and a published run should not carry it). A resumed run begins
another file with a mark that makes readers drop what lies past its checkpoint, so no step is there twice. Left out:
reading (metrics.jsonl is the record; these files are a view of it).
"""

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.shards import ShardSet
from trainer.model import AlexNet
from trainer.recipe import Recipe
from trainer.report.figures import kernel_grid
from trainer.report.samples import Samples, read_samples

FOLDER = "tensorboard"
_KERNELS_WIDTH_PX = 400
_SCALARS = {
    "train": {
        "loss": "loss/training",
        "top1_error": "top1_error/training",
        "top5_error": "top5_error/training",
        "lr": "lr",
        "images_per_s": "speed/images_per_s",
        "data_wait_fraction": "speed/data_wait_fraction",
        "gpu_utilisation": "gpu/utilisation",
        "gpu_memory_bytes": "gpu/memory_bytes",
    },
    "eval": {
        "loss": "loss/validation",
        "top1_error": "top1_error/validation",
        "top5_error": "top5_error/validation",
    },
}


class EventFile:
    """An event file of a run being trained, open at its end. Get one from `open_events`; one process writes it."""

    def __init__(self, path: Path, after_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        path.parent.mkdir(exist_ok=True)
        self._writer = RecordWriter(path.open("xb"))
        self._write(0, file_version="brain.Event:2")
        if after_step is not None:
            self._write(after_step + 1, session_log=SessionLog(status=SessionLog.START))

    def numbers(self, kind: str, record: Mapping[str, Any]) -> None:
        """A record of metrics.jsonl, "train" or "eval", as scalars; those that are not finite are left out."""
        from torch.utils.tensorboard.summary import scalar

        for field, tag in _SCALARS[kind].items():
            value = record.get(field)
            if value is not None and np.isfinite(value):
                self._write(record["step"], summary=scalar(tag, value))

    def kernels(self, model: AlexNet, step: int) -> None:
        """What the first layer looks like, a tower below the other."""
        from torch.utils.tensorboard.summary import image

        weight = model.conv1.weight.detach().float().cpu().numpy()
        grids = kernel_grid(weight, model.recipe.num_towers, _KERNELS_WIDTH_PX)
        gap = np.full((8, grids[0].shape[1], 3), 255, np.uint8)
        page = np.concatenate([part for grid in grids for part in (grid, gap)][:-1])
        self._write(step, summary=image("conv1/kernels", page, dataformats="HWC"))

    def samples(self, samples: Samples, step: int) -> None:
        """The sample images, once, in rows of four at half their size."""
        from torch.utils.tensorboard.summary import image

        small = np.concatenate([samples.pixels, np.zeros_like(samples.pixels[: -len(samples.pixels) % 4])])[:, ::2, ::2]
        page = np.concatenate([np.concatenate(list(row), axis=1) for row in small.reshape(-1, 4, *small.shape[1:])])
        self._write(step, summary=image("samples/images", page, dataformats="HWC"))

    def answers(self, samples: Samples, model: AlexNet, dtype: torch.dtype, step: int) -> None:
        """What the net takes the samples for, as a table."""
        from torch.utils.tensorboard.summary import text

        lines = ["| image | class | taken for |", "|---|---|---|"]
        for number, (label, best) in enumerate(zip(samples.labels, samples.ask(model, dtype), strict=True), start=1):
            mark = "✓" if best[0].index == label else "✗"
            guesses = ", ".join(f"{_literal(guess.name)} {100 * guess.probability:.1f} %" for guess in best)
            lines.append(f"| {number} | {mark} {_literal(samples.classes[label].name)} | {guesses} |")
        self._write(step, summary=text("samples/answers", "\n".join(lines)))

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
        self._writer.flush()


class Board:
    """What of a run goes to TensorBoard: every record; with each evaluation the kernels and the samples' answers."""

    def __init__(self, events: EventFile, samples: Samples | None, step: int) -> None:
        self._events, self._samples = events, samples
        if samples:
            events.samples(samples, step)

    def train(self, record: Mapping[str, Any]) -> None:
        self._events.numbers("train", record)

    def eval(self, record: Mapping[str, Any]) -> None:
        self._events.numbers("eval", record)

    def look(self, model: AlexNet, dtype: torch.dtype, step: int) -> None:
        """At the whole net as it is; it is left in evaluation mode."""
        self._events.kernels(model, step)
        if self._samples:
            self._events.answers(self._samples, model, dtype, step)

    def close(self) -> None:
        self._events.close()


def is_wanted(asked: bool | None) -> bool:
    """Whether to write events: as asked, else if TensorBoard is installed. Raises UserError if asked for in vain."""
    there = importlib.util.find_spec("tensorboard") is not None
    if asked and not there:
        raise UserError("--tensorboard: tensorboard is not installed; pip install 'alexnet-dali[tensorboard]'")
    return there if asked is None else asked


def open_board(run: Path, shards: ShardSet, colors: ColorStats, recipe: Recipe, after_step: int | None) -> Board:
    """A board of a run, in its folder `tensorboard`; `after_step`: of a resumed run, its checkpoint's."""
    folder = run / FOLDER
    number = len(list(folder.iterdir())) if folder.is_dir() else 0
    events = EventFile(folder / f"events.out.tfevents.{int(time.time()):010d}.{number:04d}", after_step)
    try:
        samples = read_samples(shards, colors, recipe)
    except UserError:  # a damaged shard: then there are no samples; whoever reads that one will say so
        samples = None
    return Board(events, samples, after_step or 0)


def _literal(name: str) -> str:
    """A name from a file as the text that it is, whatever Markdown or HTML would make of it."""
    return "".join(letter if letter.isalnum() or letter in " -" else f"&#{ord(letter)};" for letter in name)
