"""What the contestants of feed.py are fed, and the draws and arithmetic of those that do them in Python. NumPy only.

All start from encoded bytes and raw pixels in flat files and draw alike, so that rows differ in what they are named
after.
"""

import io
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE_PX = 256
CROP_PX = 224
MAX_OFFSET_PX = SIZE_PX - CROP_PX
BATCH = 128
LONG_EPOCH = 100_000  # samples, for libraries that want to know: so many that an epoch's end is rare
BUFFERED_BATCHES = 2  # finished batches that wait, where that can be chosen

Batches = Iterator[tuple[Any, Any]]
Pixels = NDArray[np.uint8]
Sample = tuple[Pixels, NDArray[np.float32], int]  # crop, shift, label


class Samples:
    """What every contestant is fed from: encoded images, labels and, if made, raw pixels, in files of one folder."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.labels: NDArray[np.int64] = np.load(self.folder / "labels.npy", allow_pickle=False)
        self._ends: NDArray[np.int64] = np.load(self.folder / "ends.npy", allow_pickle=False)

    @cached_property
    def _data(self) -> Pixels:
        return np.memmap(self.folder / "encoded.bin", np.uint8, "r")

    @cached_property
    def raw(self) -> Pixels:
        """(N, 256, 256, 3) RGB."""
        return np.memmap(self.folder / "raw.bin", np.uint8, "r", shape=(len(self), SIZE_PX, SIZE_PX, 3))

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_data", "raw")}

    def view(self, index: int) -> Pixels:
        """The encoded bytes of a sample, without a copy."""
        return self._data[self._ends[index - 1] if index else 0 : self._ends[index]]

    def encoded(self, index: int) -> bytes:
        return self.view(index).tobytes()


@dataclass(frozen=True)
class Job:
    """samples; shards: folders of ours ("jpeg", "raw"); out: scratch folder of this contestant; project: whose
    `pipeline` is raced; colours."""

    samples: Samples
    shards: dict[str, str]
    out: Path
    project: Path
    workers: int
    mean: NDArray[np.float32]
    basis: NDArray[np.float32]

    def converted(self, name: str, make: Callable[[Path], object]) -> Path:
        """`out`/name, made by `make` unless an earlier run finished it."""
        path, mark = self.out / name, self.out / f"{name}.done"
        if not mark.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            make(path)
            mark.touch()
        return path


# The draws and the arithmetic, for the ways that do them in Python.


@dataclass(frozen=True)
class Augment:
    """Encoded image -> (uint8 crop, perhaps mirrored, as a view; shift), and samples -> a batch."""

    mean: NDArray[np.float32]
    basis: NDArray[np.float32]

    def draw(self, pixels: Pixels, rng: np.random.Generator) -> tuple[Pixels, NDArray[np.float32]]:
        y, x = rng.integers(0, MAX_OFFSET_PX + 1, 2)
        crop = pixels[y : y + CROP_PX, x : x + CROP_PX]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        return crop, self.mean - self.basis @ rng.standard_normal(3, np.float32)

    def pillow(self, data: bytes, rng: np.random.Generator) -> tuple[Pixels, NDArray[np.float32]]:
        from PIL import Image

        return self.draw(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), rng)

    @staticmethod
    def collate(samples: list[Sample]) -> tuple[Any, Any]:
        images = np.empty((len(samples), 3, CROP_PX, CROP_PX), np.float32)
        for image, (crop, shift, _) in zip(images, samples, strict=True):
            planes = np.ascontiguousarray(crop.transpose(2, 0, 1))  # a third faster than without
            np.subtract(planes, shift[:, None, None], out=image)
        return images, np.array([label for _, _, label in samples])

    def collate_stored(self, samples: list[dict[str, Any]]) -> tuple[Any, Any]:
        """From {"image": encoded bytes, "label": int}."""
        return self.collate_torch([(*self.pillow(sample["image"], rng()), sample["label"]) for sample in samples])

    def collate_torch(self, samples: list[Sample]) -> tuple[Any, Any]:
        import torch

        images, labels = self.collate(samples)
        return torch.from_numpy(images), torch.from_numpy(labels)


_random = threading.local()


def rng() -> np.random.Generator:
    """A generator of this thread's own, in whichever process."""
    if getattr(_random, "process", None) != os.getpid():
        _random.process, _random.generator = os.getpid(), np.random.default_rng()
    return _random.generator


def draw_order(num: int) -> Iterator[NDArray[np.int64]]:
    """Endless batches of sample numbers, each epoch in another order."""
    generator = np.random.default_rng()
    order = np.empty(0, np.int64)
    while True:
        while len(order) < BATCH:
            order = np.concatenate([order, generator.permutation(num)])
        yield order[:BATCH]
        order = order[BATCH:]


def rotate(job: Job, work: Callable[[Any, Any], object], shape: tuple[int, ...], dtype: Any) -> Batches:
    """Batches that `work(indices, out)` fills in threads, a part each, ahead, in buffers that go round."""
    size = BATCH * int(np.prod(shape)) * np.dtype(dtype).itemsize
    # anonymous maps lie on page bounds, as streaming stores want
    buffers = [np.frombuffer(mmap.mmap(-1, size), dtype).reshape(BATCH, *shape) for _ in range(BUFFERED_BATCHES + 1)]
    part = BATCH // (4 * job.workers)
    with ThreadPoolExecutor(job.workers) as pool:

        def start(number: int, indices: NDArray[np.int64]) -> tuple[Any, Any, list[Future[Any]]]:
            out = buffers[number % len(buffers)]
            futures = [pool.submit(work, indices[k : k + part], out[k : k + part]) for k in range(0, BATCH, part)]
            return out, job.samples.labels[indices], futures

        under_way: list[tuple[Any, Any, list[Future[Any]]]] = []
        for number, indices in enumerate(draw_order(len(job.samples))):
            under_way.append(start(number, indices))
            if len(under_way) == BUFFERED_BATCHES:
                images, labels, futures = under_way.pop(0)
                for future in futures:
                    future.result()
                yield images, labels
