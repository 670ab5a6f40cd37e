"""TensorBoard: the numbers of metrics.jsonl, the first layer, and what the net says to a few validation images."""

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.manifest import CLS_DIGITS, ENDINGS
from pipeline.options import CENTRE_PX, CROP_SIZE_PX
from pipeline.shards import Index, ShardSet, read_index
from trainer.evaluate import log_probabilities
from trainer.model import AlexNet
from trainer.nets.predict import Guess, find_best
from trainer.nets.weights import Classes
from trainer.recipe import Recipe
from trainer.report.pictures import kernel_grid

NUM_SAMPLES = 8  # paper, figure 4
_MOST_TRIED = 64  # images, on the way to one of a new class


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


def read_samples(shards: ShardSet, colors: ColorStats, recipe: Recipe, num: int = NUM_SAMPLES) -> Samples | None:
    """`num` validation images, evenly spaced over the split in the order of keys, each moved on to the next of a class
    not seen yet where there is one near; None if there are no images.

    Raises UserError for damaged shards.
    """
    if not shards.num_samples("val"):
        return None
    total = shards.num_samples("val")
    num, indices = min(num, total), dict[str, Index]()
    chosen: dict[int, tuple[bytes, int]] = {}
    for place in range(num):
        start = (2 * place + 1) * total // (2 * num)
        ahead = [position for step in range(_MOST_TRIED) if (position := (start + step) % total) not in chosen]
        seen = {label for _, label in chosen.values()}
        found = ((position, _read_sample(shards, position, indices)) for position in ahead)
        position, sample = next((pair for pair in found if pair[1][1] not in seen), (ahead[0], None))
        chosen[position] = sample or _read_sample(shards, position, indices)
    stored, labels = np.empty((num, 256, 256, 3), np.uint8), []
    for place, (_, (image, label)) in enumerate(sorted(chosen.items())):
        if shards.manifest.encoding == "raw":
            stored[place] = np.frombuffer(image, np.uint8).reshape(256, 256, 3)
        else:
            simplejpeg.decode_jpeg(image, "RGB", buffer=stored[place])
        labels.append(label)
    top, left = CENTRE_PX
    crops = stored[:, top : top + CROP_SIZE_PX, left : left + CROP_SIZE_PX].copy()
    finish = recipe.transform(train=False).constants(colors).finisher(torch.device("cpu"))
    return Samples(crops, finish(torch.from_numpy(crops), None), labels, shards.manifest.classes)


def _read_sample(shards: ShardSet, position: int, indices: dict[str, Index]) -> tuple[bytes, int]:
    """The stored image and class of the validation image at `position`. `indices`: those read so far, by shard."""
    held = iter(shards.shards("val"))
    while position >= (shard := next(held)).samples:
        position -= shard.samples
    tar = shards.root / shard.file
    try:
        if shard.file not in indices:
            indices[shard.file] = read_index(tar.with_suffix(".idx"), shard, ENDINGS[shards.manifest.encoding])
        _, offsets, sizes, labels = indices[shard.file]
        with tar.open("rb") as file:
            image = _read(file, int(offsets[position]), int(sizes[position]))
            return image, int(_read(file, int(labels[position]), CLS_DIGITS))
    except (OSError, ValueError) as error:
        raise UserError(f"{tar}: a sample cannot be read ({error}); see `alexnet-prep verify`") from error


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


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
