"""What a trained net takes photographs for: any image file -> its five best classes.

A file is prepared as `alexnet-prep shard` does and finished as the loaders do, so that a prediction is that of an
evaluation on the same stored image. DALI is not needed; a folder of any size takes the memory of a batch.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.images.decode import BadImage, Pixels
from pipeline.images.imagenet import IMAGE_ENDINGS
from pipeline.images.resize import read_square
from pipeline.manifest import ClassEntry
from pipeline.options import CENTRE_PX, CROP_SIZE_PX, FIVE_OFFSETS_PX, count_threads
from trainer.evaluate import BATCH_SIZE, TOP, Crops, choose_dtype, log_probabilities
from trainer.nets.weights import Classes, Weights, make_net


@dataclass(frozen=True)
class Guess:
    """A class and its probability, 0 to 1."""

    index: int
    wnid: str
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """A file with its best classes, best first; or why there are none."""

    path: Path
    best: tuple[Guess, ...] = ()
    failure: str | None = None


class Predictor:
    """A net ready to be asked: call it with prepared images."""

    def __init__(
        self, weights: Weights, *, crops: Crops = "ten", device: torch.device, num_threads: int | None = None
    ) -> None:
        """Raises UserError for weights without the colours they were trained with."""
        if weights.colors is None:
            raise UserError(
                f"{weights.source}: does not hold the colours it was trained with; name its run with --run, or export "
                "it from there with `alexnet-export RUN --format safetensors`"
            )
        recipe = weights.recipe
        self.classes, self.num_threads = weights.classes, num_threads or count_threads()
        self.batch_size = BATCH_SIZE[crops]
        self._net, self._dtype = make_net(weights, device), choose_dtype(recipe.precision, device)
        self._device = device
        self._finish = recipe.transform(train=False).constants(weights.colors).finisher(device)
        self._views = [(*CENTRE_PX, False)]
        if crops == "ten":
            self._views = [(y, x, flip) for flip in (False, True) for y, x in FIVE_OFFSETS_PX]

    @torch.no_grad()
    def __call__(self, images: Sequence[Pixels]) -> Tensor:
        """Log of the softmax outputs, averaged over the crops (P 4.1): float32 (B, classes), on the CPU.

        images: uint8 (256, 256, 3) RGB each.
        """
        pixels = torch.from_numpy(np.stack(images)).to(self._device)
        crops = [pixels[:, y : y + CROP_SIZE_PX, x : x + CROP_SIZE_PX] for y, x, _ in self._views]
        crops = [crop.flip(2) if flip else crop for crop, (_, _, flip) in zip(crops, self._views, strict=True)]
        finished = self._finish(torch.stack(crops, dim=1).flatten(0, 1), None)
        finished = finished.reshape(len(images), len(self._views), *finished.shape[1:])
        return log_probabilities(self._net, finished, self._dtype).cpu()


def predict(paths: Sequence[Path], predictor: Predictor) -> Iterator[Prediction]:
    """A prediction for each file, in order; one that cannot be read or decoded has its failure instead."""
    with ThreadPoolExecutor(predictor.num_threads) as threads:
        for start in range(0, len(paths), predictor.batch_size):
            batch = paths[start : start + predictor.batch_size]
            images = list(threads.map(_read, batch))
            good = [image for image in images if not isinstance(image, str)]
            outputs = iter(predictor(good) if good else ())
            for path, image in zip(batch, images, strict=True):
                if isinstance(image, str):
                    yield Prediction(path, failure=image)
                else:
                    yield Prediction(path, find_best(next(outputs), predictor.classes))


def find_best(log_outputs: Tensor, classes: Classes | None) -> tuple[Guess, ...]:
    """The five best classes (or all, if there are fewer) of log-probabilities (classes,), the best first."""
    values, indices = log_outputs.double().sort(descending=True, stable=True)
    guesses = []
    for index, probability in zip(indices[:TOP].tolist(), values[:TOP].exp().tolist(), strict=True):
        entry = classes[index] if classes else ClassEntry(index, "", f"class {index}")
        guesses.append(Guess(index, entry.wnid, entry.name, probability))
    return tuple(guesses)


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the image files at any depth in them, sorted. Raises UserError for an empty one."""
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(
            Path(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")
        )
        if not inside:
            raise UserError(f"{path}: no image in this folder, expected files ending in {', '.join(IMAGE_ENDINGS)}")
        found += inside
    return found


def _read(path: Path) -> Pixels | str:
    """The prepared image, or why there is none."""
    try:
        return read_square(path.read_bytes()).pixels
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except BadImage as error:
        return str(error)
