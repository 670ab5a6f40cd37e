"""What a net says to some images, and which training images it holds to be near them: the paper's figure 4, unpainted.

The decision that shaped it: images are seen as evaluation sees them (the central crop), and training images are the
first so many of the shards, which are in random order already, so that the search costs what one asks for and is a
fair sample of the whole. Left out: what it looks like (figures_images.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipeline.colors import ColorStats
from pipeline.common.console import Progress
from pipeline.loader import EvalLoader, read_pixels
from pipeline.shards import ShardSet
from trainer.evaluate import choose_dtype, log_probabilities
from trainer.model import AlexNet
from trainer.report.confusion import Predictions

NUM_GUESSES, NUM_BEST = 8, 5  # paper, figure 4, left: eight images, five labels
NUM_QUERIES, NUM_NEAREST = 5, 6  # right: five images, six neighbours each
MOST_VALIDATION = 1024  # images among which those shown are chosen, evenly spaced
_BATCH_SIZE = 64
_CROP = slice(16, 240)  # the central 224 of 256 px

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


@dataclass(frozen=True)
class _Seen:
    """Of N images in stored order: log-probabilities (N, classes), last hidden layer (N, units), classes (N,)."""

    outputs: NDArray[np.float32]
    hidden: NDArray[np.float32]
    labels: NDArray[np.int64]


def find_examples(model: AlexNet, shards: ShardSet, colors: ColorStats, num_train: int) -> Examples:
    """Eight guesses and five rows of neighbours, the latter from the first `num_train` training images, on the CPU.

    Raises UserError if the shards hold no validation images.
    """
    num_val = min(MOST_VALIDATION, shards.num_samples("val"))
    num_train = min(num_train, shards.num_samples("train"))
    for split, num in (("val", num_val), ("train", num_train)):
        first_shards(shards, split, num).fetch(split)
    with Progress("looking at images", num_val + num_train, "images") as progress:
        val = _look(model, shards, colors, "val", num_val, progress)
        train = _look(model, shards, colors, "train", num_train, progress)
    shown, queries = choose_shown(val.labels.tolist(), NUM_GUESSES), choose_shown(val.labels.tolist(), NUM_QUERIES)
    near, distances = nearest(val.hidden[queries], train.hidden, NUM_NEAREST)
    val_pixels = _pixels(shards, "val", [*shown, *queries])
    train_pixels = _pixels(shards, "train", near.flatten().tolist())
    guesses = []
    for position in shown:
        best = np.argsort(-val.outputs[position], kind="stable")[:NUM_BEST]
        probabilities = np.exp(val.outputs[position][best].astype(np.float64))
        guesses.append(
            Guess(val_pixels[position], int(val.labels[position]), tuple(best.tolist()), tuple(probabilities.tolist()))
        )
    rows = []
    for query, found, away in zip(queries, near.tolist(), distances.tolist(), strict=True):
        row = [Neighbour(val_pixels[query], int(val.labels[query]), 0.0)]
        row += [Neighbour(train_pixels[i], int(train.labels[i]), d) for i, d in zip(found, away, strict=True)]
        rows.append(row)
    best = np.argsort(-val.outputs, axis=1, kind="stable")[:, :NUM_BEST]
    best = np.pad(best, ((0, 0), (0, NUM_BEST - best.shape[1])), constant_values=-1)
    which = f"the first {num_val:,} of {shards.num_samples('val'):,} validation images"
    return Examples(guesses, rows, len(train.labels), Predictions(val.labels, best, "centre", which))


def spread(number: int, wanted: int) -> list[int]:
    """At most `wanted` different positions of `number`, evenly spaced, off the ends: the same for the same numbers."""
    return sorted({(2 * index + 1) * number // (2 * wanted) for index in range(wanted)}) if number else []


def choose_shown(labels: Sequence[int], wanted: int) -> list[int]:
    """At most `wanted` positions: those of `spread`, each moved on to the next image of a class not yet chosen, where
    there is one. In sets that deal their classes in turn, evenly spaced images are all of one class."""
    chosen: list[int] = []
    for start in spread(len(labels), wanted):
        ahead = [position for position in (*range(start, len(labels)), *range(start)) if position not in chosen]
        seen = {labels[position] for position in chosen}
        chosen.append(next((position for position in ahead if labels[position] not in seen), ahead[0]))
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
def _look(model: AlexNet, shards: ShardSet, colors: ColorStats, split: str, num: int, progress: Progress) -> _Seen:
    """The first `num` images of a split through the net."""
    recipe = model.recipe
    loader = EvalLoader(
        first_shards(shards, split, num), colors, recipe.transform(train=False), batch_size=_BATCH_SIZE, split=split
    )
    dtype, hidden = choose_dtype(recipe.precision, torch.device("cpu")), list[Tensor]()
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
    return _Seen(*(torch.cat(parts)[:num].numpy() for parts in (outputs, hidden, labels)))


def _pixels(shards: ShardSet, split: str, positions: Sequence[int]) -> dict[int, Pixels]:
    """The central crops of the images at `positions`, in stored order, of a split."""
    if not positions:
        return {}
    wanted, found = set(positions), dict[int, Pixels]()
    for position, image in enumerate(_stored(first_shards(shards, split, max(wanted) + 1), split)):
        if position in wanted:
            found[position] = image[_CROP, _CROP].copy()
    return found


def _stored(shards: ShardSet, split: str) -> Iterator[Pixels]:
    for batch in read_pixels(shards, split=split):
        yield from batch.images.numpy()
