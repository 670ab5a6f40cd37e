"""What a net says to some images, and which training images it holds to be near them: the paper's figure 4, unpainted.

Training images are the first so many of the shards, which are in random order already: a fair sample at the cost asked.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipeline.colors import ColorStats
from pipeline.common.console import Progress, spell_command
from pipeline.common.errors import UserError
from pipeline.loader import EvalLoader
from pipeline.manifest import CLS_DIGITS, ENDINGS
from pipeline.options import CENTRE_PX, CROP_SIZE_PX
from pipeline.shards import Index, ShardSet, read_index
from trainer.evaluate import choose_dtype, log_probabilities
from trainer.model import AlexNet
from trainer.report.confusion import Predictions

NUM_GUESSES, NUM_BEST = 8, 5  # paper, figure 4, left: eight images, five labels
NUM_QUERIES, NUM_NEAREST = 5, 6  # right: five images, six neighbours each
MOST_VALIDATION = 1024  # images among which those shown are chosen, evenly spaced
_MOST_TRIED = 64  # images, on the way to one of a new class
_BATCH_SIZE = 64

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Guess:
    """A validation image (224, 224, 3), its class, and the classes held most likely, best first, with probabilities."""

    pixels: Pixels
    label: int
    classes: tuple[int, ...]
    probabilities: tuple[float, ...]

    @property
    def is_right(self) -> bool:
        return self.classes[:1] == (self.label,)


@dataclass(frozen=True)
class Neighbour:
    """An image (224, 224, 3), its class, and its distance in the last hidden layer (0 for the one asked for)."""

    pixels: Pixels
    label: int
    distance: float


@dataclass(frozen=True)
class Examples:
    """Guesses, rows of neighbours (the validation image first, then training images), how many were searched; and
    what all validation images that were looked at are taken for."""

    guesses: list[Guess]
    rows: list[list[Neighbour]]
    num_searched: int
    predictions: Predictions | None = None


def find_examples(model: AlexNet, shards: ShardSet, colors: ColorStats, num_train: int) -> Examples:
    """Eight guesses and five rows of neighbours, the latter from the first `num_train` training images, on the CPU.

    Raises UserError if the shards hold no validation images.
    """
    num_val = min(MOST_VALIDATION, shards.num_samples("val"))
    num_train = min(num_train, shards.num_samples("train"))
    for split, num in (("val", num_val), ("train", num_train)):
        first_shards(shards, split, num).fetch(split)
    with Progress("looking at images", num_val + num_train, "images") as progress:
        outputs, hidden, labels = _look(model, shards, colors, "val", num_val, progress)
        _, searched, train_labels = _look(model, shards, colors, "train", num_train, progress)
    val, train = StoredImages(shards, "val"), StoredImages(shards, "train")
    best = np.argsort(-outputs, axis=1, kind="stable")[:, :NUM_BEST]
    likely = np.exp(np.take_along_axis(outputs, best, axis=1).astype(np.float64))
    guesses = [
        Guess(val.crop(at), int(labels[at]), tuple(best[at].tolist()), tuple(likely[at].tolist()))
        for at in choose_shown(num_val, NUM_GUESSES, labels.__getitem__)
    ]
    queries = choose_shown(num_val, NUM_QUERIES, labels.__getitem__)
    rows = [
        [Neighbour(val.crop(query), int(labels[query]), 0.0)]
        + [Neighbour(train.crop(at), int(train_labels[at]), away) for at, away in zip(near, distances, strict=True)]
        for query, near, distances in zip(
            queries, *(found.tolist() for found in nearest(hidden[queries], searched, NUM_NEAREST)), strict=True
        )
    ]
    best = np.pad(best, ((0, 0), (0, NUM_BEST - best.shape[1])), constant_values=-1)
    which = f"the first {num_val:,} of {shards.num_samples('val'):,} validation images"
    return Examples(guesses, rows, len(train_labels), Predictions(labels, best, "centre", which))


def choose_shown(num: int, wanted: int, label_of: Callable[[int], int]) -> list[int]:
    """At most `wanted` of `num` positions: evenly spaced, off the ends, each moved on to the next image of a class not
    yet chosen where there is one near. In sets that deal their classes in turn, evenly spaced images are of one class.
    """
    chosen: dict[int, int] = {}
    for place in range(min(wanted, num)):
        start = (2 * place + 1) * num // (2 * min(wanted, num))
        ahead = [at for at in ((start + step) % num for step in range(min(num, _MOST_TRIED))) if at not in chosen]
        at = next((at for at in ahead if label_of(at) not in chosen.values()), ahead[0])
        chosen[at] = label_of(at)
    return sorted(chosen)


def nearest(queries: ArrayLike, vectors: ArrayLike, num: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The `num` of `vectors` (M, D) nearest to each of `queries` (Q, D): positions and Euclidean distances (Q, num).

    In float64; nearest first, of equals the earlier first; fewer columns where there are fewer vectors.
    """
    asked, held = np.asarray(queries, dtype=np.float64), np.asarray(vectors, dtype=np.float64)
    away = np.array([np.sqrt(((held - query) ** 2).sum(axis=1)) for query in asked]).reshape(len(asked), len(held))
    order = np.argsort(away, axis=1, kind="stable")[:, :num]
    return order, np.take_along_axis(away, order, axis=1)


def first_shards(shards: ShardSet, split: str, num: int) -> ShardSet:
    """The same set, but of `split` only as many of the first shards as hold `num` images: the rest is not read."""
    kept, held = [], 0
    for shard in shards.shards(split):
        if held >= num:
            break
        kept.append(shard)
        held += shard.samples
    return shards.keep_only(split, kept)


@torch.no_grad()
def _look(
    model: AlexNet, shards: ShardSet, colors: ColorStats, split: str, num: int, progress: Progress
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """The first `num` images of a split through the net: log-probabilities (num, classes), the last hidden layer
    (num, units) and classes (num,)."""
    shards, transform = first_shards(shards, split, num), model.recipe.transform(train=False)
    loader = EvalLoader(shards, colors, transform, batch_size=_BATCH_SIZE, split=split)
    dtype, hidden = choose_dtype(model.recipe.precision, torch.device("cpu")), list[Tensor]()
    hook = model.fc8.register_forward_hook(lambda _, inputs, __: hidden.append(inputs[0].float()))
    outputs, labels, held = [], [], 0
    try:
        model.eval()
        for images, wanted in loader:
            outputs.append(log_probabilities(model, images, dtype))
            labels.append(wanted)
            held += len(wanted)
            progress.advance(len(wanted))
            if held >= num:
                break
    finally:
        hook.remove()
    found = [torch.cat(parts)[:num].numpy() for parts in (outputs, hidden, labels)]
    return found[0], found[1], found[2]


class StoredImages:
    """The images of a split by their position in stored order, each read where it lies in its tar."""

    def __init__(self, shards: ShardSet, split: str) -> None:
        self._shards, self._split, self._indices = shards, split, dict[str, Index]()

    def label(self, position: int) -> int:
        """The class of an image. Raises UserError for damaged shards, as `crop` does."""
        return self._read(position)[1]

    def crop(self, position: int) -> Pixels:
        """The central crop (224, 224, 3), as evaluation sees it."""
        top, left = CENTRE_PX
        return self._read(position, decode=True)[0][top : top + CROP_SIZE_PX, left : left + CROP_SIZE_PX]

    def _read(self, position: int, *, decode: bool = False) -> tuple[Pixels, int]:
        held, encoding = iter(self._shards.shards(self._split)), self._shards.manifest.encoding
        while position >= (shard := next(held)).samples:
            position -= shard.samples
        tar = self._shards.root / shard.file
        try:
            if shard.file not in self._indices:
                self._indices[shard.file] = read_index(tar.with_suffix(".idx"), shard, ENDINGS[encoding])
            _, offsets, sizes, labels = self._indices[shard.file]
            with tar.open("rb") as file:
                file.seek(int(labels[position]))
                label = int(file.read(CLS_DIGITS))
                file.seek(int(offsets[position]))
                image = file.read(int(sizes[position])) if decode else b""
            if encoding == "raw" or not decode:
                return np.frombuffer(image, np.uint8).reshape(-1, 256, 3), label
            return simplejpeg.decode_jpeg(image, "RGB"), label
        except (OSError, ValueError) as error:
            hint = spell_command("alexnet-prep", "verify", shards=tar.parent)
            raise UserError(f"{tar}: a sample cannot be read ({error}); see `{hint}`") from error
