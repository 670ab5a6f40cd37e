"""What a job makes: which images go into which shard in which order, and the fingerprint that names it all.

The plan follows from the source's listing and the options alone, so that every worker, machine and repetition has the
same one.
"""

import hashlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.manifest import IMAGE_SIZE_PX, SCHEMA, SPLITS
from tools.sharding.lock import Part
from tools.sources.source import Entry, Source

Encoding = Literal["jpeg", "raw"]

BYTES_PER_IMAGE = 30_000  # of a photograph at quality 90 with its tar headers; an estimate on the safe side
RAW_BYTES_PER_IMAGE = IMAGE_SIZE_PX * IMAGE_SIZE_PX * 3 + 3 * 512  # pixels; headers of image and label, and the label
RAW_QUALITY = 100  # what a manifest says of raw pixels: nothing is lost


@dataclass(frozen=True)
class Options:
    """What the bytes of a job follow from, beside its source."""

    seed: int = 0
    samples_per_shard: int = 5000
    quality: int = 90
    encoding: Encoding = "jpeg"

    def estimate_bytes(self) -> int:
        """Bytes of a stored photograph with its headers: exact if raw; of a JPEG 1 at quality 90, 0.6 at 75, 1.5 at 95,
        4 at 100 times BYTES_PER_IMAGE."""
        if self.encoding == "raw":
            return RAW_BYTES_PER_IMAGE
        return round(BYTES_PER_IMAGE * (10 / max(100 - self.quality, 1)) ** 0.6)


@dataclass(frozen=True)
class Unit:
    """The images of one shard in stored order, with their positions in the canonical order of their split."""

    file: str
    split: str
    positions: tuple[int, ...]
    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        return self.file


class PlannedShard(NamedTuple):
    """A shard to be: its split, and its images as a range of the split's stored order."""

    split: str
    start: int
    num_images: int


@dataclass(frozen=True)
class Plan:
    """The shards of `source`, train in a global shuffle, val in canonical order."""

    source: Source
    options: Options

    @cached_property
    def job(self) -> str:
        return fingerprint_job(self.source, **vars(self.options))

    @cached_property
    def shards(self) -> dict[str, PlannedShard]:
        """By file name, in order."""
        size = self.options.samples_per_shard
        return {
            file: PlannedShard(split, number * size, min(size, len(entries) - number * size))
            for split in SPLITS
            for entries in (self.source.entries(split),)
            for number, file in enumerate(name_shards(split, len(entries), size))
        }

    @property
    def num_images(self) -> int:
        return sum(len(self.source.entries(split)) for split in SPLITS)

    def count_images(self, files: Container[str]) -> int:
        return sum(shard.num_images for file, shard in self.shards.items() if file in files)

    def share(self, part: Part | None) -> list[str]:
        """The files of a part: every `part.count`-th, so that parts differ by one shard at most; all without a part."""
        files = list(self.shards)
        return files[part.number - 1 :: part.count] if part else files

    def units(self, files: Container[str]) -> Iterator[Unit]:
        """The units of `files` in order. Made one by one: listings are long."""
        for split in SPLITS:
            entries = self.source.entries(split)
            order = order_samples(len(entries), self.options.seed if split == "train" else None)
            for file, shard in self.shards.items():
                if shard.split == split and file in files:
                    positions = order[shard.start : shard.start + shard.num_images].tolist()
                    yield Unit(file, split, tuple(positions), tuple(entries[position] for position in positions))


def order_samples(num_samples: int, seed: int | None) -> NDArray[np.int64]:
    """Canonical positions in stored order: shuffled by `seed`, or as they are if it is None."""
    if seed is None:
        return np.arange(num_samples)
    # The raw stream of a bit generator never changes between versions of NumPy; Generator.permutation may.
    return np.argsort(np.random.PCG64(seed).random_raw(num_samples), kind="stable")


def name_shards(split: str, num_samples: int, samples_per_shard: int) -> list[str]:
    """Names of the tars of a split, in order."""
    return [f"{split}-{number:06d}.tar" for number in range(-(-num_samples // samples_per_shard))]


def fingerprint_job(
    source: Source,
    *,
    seed: int,
    quality: int,
    samples_per_shard: int,
    encoding: str = "jpeg",
    device: str = "cpu",
) -> str:
    """SHA-256 (hex) over what the output follows from, except the images' bytes.

    `device` is what a shard's record names: "gpu" in shards of before, when a GPU could prepare images too.
    """
    options = (SCHEMA, source.layout, seed, quality, IMAGE_SIZE_PX, encoding, device, samples_per_shard)
    digest = hashlib.sha256(repr(options).encode())
    for split in SPLITS:
        digest.update(f"\n{split}".encode())
        for entry in source.entries(split):
            digest.update(f"\n{entry.label} {entry.path}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
