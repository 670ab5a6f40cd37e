"""TensorBoard: the numbers of metrics.jsonl, the first layer, and what the net says to a few validation images.

Events go through TensorBoard's own writer of records, at once, and not through SummaryWriter: that puts the host's name
into the file's, and a thread of its prints a traceback when the disk is full.
"""

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.shards import ShardSet
from trainer.evaluate import log_probabilities
from trainer.model import AlexNet
from trainer.nets.predict import Guess, find_best
from trainer.nets.weights import Classes
from trainer.recipe import Recipe
from trainer.report.examples import NUM_GUESSES, StoredImages, choose_shown
from trainer.report.pictures import kernel_grid

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


@dataclass(frozen=True, eq=False)
class Samples:
    """N images: central crops uint8 (N, 224, 224, 3); as the net sees them, float32 (N, 3, 224, 224); classes (N,)."""

    pixels: NDArray[np.uint8]
    images: Tensor
    labels: list[int]
    classes: Classes

    @torch.no_grad()
    def ask(self, model: AlexNet, dtype: torch.dtype) -> list[tuple[Guess, ...]]:
        """The five likeliest classes of each, by the model as it is; it is left in evaluation mode."""
        model.eval()
        device = next(model.parameters()).device
        outputs = log_probabilities(model, self.images.to(device), dtype).cpu()
        return [find_best(row, self.classes) for row in outputs]


def read_samples(shards: ShardSet, colors: ColorStats, recipe: Recipe, num: int = NUM_GUESSES) -> Samples | None:
    """`num` validation images as `choose_shown` chooses them; None if there are none.

    Raises UserError for damaged shards.
    """
    stored = StoredImages(shards, "val")
    chosen = choose_shown(shards.num_samples("val"), num, stored.label)
    if not chosen:
        return None
    pixels = np.stack([stored.crop(position) for position in chosen])
    finish = recipe.transform(train=False).constants(colors).finisher(torch.device("cpu"))
    labels = [stored.label(position) for position in chosen]
    return Samples(pixels, finish(torch.from_numpy(pixels), None), labels, shards.manifest.classes)


class Board:
    """The events of a run being trained: every record; with each evaluation the kernels and what the net says to the
    samples. Get one from `open_board`; one process writes it."""

    def __init__(self, path: Path, after_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        path.parent.mkdir(exist_ok=True)
        self._writer = RecordWriter(path.open("xb"))
        self._samples: Samples | None = None
        self._write(0, file_version="brain.Event:2")
        if after_step is not None:  # readers drop what was written of later steps
            self._write(after_step + 1, session_log=SessionLog(status=SessionLog.START))

    def train(self, record: Mapping[str, Any]) -> None:
        """A TrainRecord as scalars; those that are not finite are left out."""
        self._write_scalars("train", record)

    def eval(self, record: Mapping[str, Any]) -> None:
        """An EvalRecord, likewise."""
        self._write_scalars("eval", record)

    def show(self, samples: Samples, step: int) -> None:
        """The images that `look` will ask about, in rows of four at half their size."""
        self._samples = samples
        small = samples.pixels[:, ::2, ::2]
        small = np.concatenate([small, np.zeros((-len(small) % 4, *small.shape[1:]), np.uint8)])
        page = np.concatenate([np.concatenate(list(row), axis=1) for row in small.reshape(-1, 4, *small.shape[1:])])
        self._write_image("samples/images", page, step)

    def look(self, model: AlexNet, dtype: torch.dtype, step: int) -> None:
        """At the whole net as it is: its first layer, a tower below the other, and what it takes the samples for. It is
        left in evaluation mode."""
        from torch.utils.tensorboard.summary import text

        weight = model.conv1.weight.detach().float().cpu().numpy()
        grids = kernel_grid(weight, model.recipe.num_towers, _KERNELS_WIDTH_PX)
        gap = np.full((8, grids[0].shape[1], 3), 255, np.uint8)
        self._write_image("conv1/kernels", np.concatenate([part for grid in grids for part in (grid, gap)][:-1]), step)
        if not self._samples:
            return
        lines = ["| image | class | taken for |", "|---|---|---|"]
        asked = zip(self._samples.labels, self._samples.ask(model, dtype), strict=True)
        for number, (label, best) in enumerate(asked, start=1):
            mark = "✓" if best[0].index == label else "✗"
            guesses = ", ".join(f"{_literal(guess.name)} {100 * guess.probability:.1f} %" for guess in best)
            lines.append(f"| {number} | {mark} {_literal(self._samples.classes[label].name)} | {guesses} |")
        self._write(step, summary=text("samples/answers", "\n".join(lines)))

    def close(self) -> None:
        self._writer.close()

    def _write_scalars(self, kind: str, record: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import scalar

        for field, tag in _SCALARS[kind].items():
            value = record.get(field)
            if value is not None and np.isfinite(value):
                self._write(record["step"], summary=scalar(tag, value))

    def _write_image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        from torch.utils.tensorboard.summary import image

        self._write(step, summary=image(tag, pixels, dataformats="HWC"))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
        self._writer.flush()


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
    board = Board(folder / f"events.out.tfevents.{int(time.time()):010d}.{number:04d}", after_step)
    try:
        samples = read_samples(shards, colors, recipe)
    except UserError:  # a damaged shard: then there are no samples; whoever reads that one will say so
        samples = None
    if samples:
        board.show(samples, after_step or 0)
    return board


def _literal(name: str) -> str:
    """A name from a file as the text that it is, whatever Markdown or HTML would make of it."""
    return "".join(letter if letter.isalnum() or letter in " -" else f"&#{ord(letter)};" for letter in name)
