"""A few validation images that a net is asked about again and again while it trains.

The decision that shaped it: they are read from the shards by their offset and finished as the loaders finish theirs
(the central crop), without a graph of their own, so that looking at them costs a batch of eight and no start-up. Left
out: neighbours and the pictures of a report (examples.py).
"""

from dataclasses import dataclass
from typing import BinaryIO

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
