"""Pixels that need no decoder: read from raw shards by offset, or kept in memory once they were decoded.

The decision that shaped it: a graph without a decoder (graph.py, "stored") says which samples come and what was drawn
for them, by the same operators as any other, so that neither raw shards nor a cache changes the order, the draws, or
what a state holds; this file only finds the pixels for a key. Rows are read with pread into memory that is used again:
mapping the tars costs a page fault for every 4 KiB, each epoch anew. Left out: decoding (hostpixels.py), arithmetic
(finish.py).
"""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.common.console import note
from pipeline.common.errors import UserError
from pipeline.manifest import ENDINGS, IMAGE_SIZE_PX
from pipeline.shards import ShardSet, read_index

SAMPLE_SHAPE = (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)
ROW_BYTES = IMAGE_SIZE_PX * 3
SAMPLE_BYTES = IMAGE_SIZE_PX * ROW_BYTES
HOST_RESERVE_BYTES = 2 << 30  # left to the rest of the machine by a cache in host memory
GPU_RESERVE_BYTES = 12 << 30  # left by a cache on a GPU to the network: AlexNet at batch 1024 takes less
_MEMINFO = Path("/proc/meminfo")


class SampleTable:
    """Where the image of every sample of a split lies: in which tar, at which byte. Positions count in key order."""

    def __init__(self, shards: ShardSet, split: str) -> None:
        """Reads the split's indices. Raises UserError for a damaged one."""
        ending = ENDINGS[shards.manifest.encoding]
        self._tars = shards.tars(split)
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()
        rows = [np.empty((4, 0), np.int64)]
        for number, (path, shard) in enumerate(zip(shards.indices(split), shards.shards(split), strict=True)):
            index = read_index(path, shard, ending)
            rows.append(np.stack([index.keys, index.offsets, index.sizes, np.full(shard.samples, number)]))
        table = np.concatenate(rows, axis=1)
        self._keys, self._offsets, self._sizes, self._numbers = table[:, np.argsort(table[0], kind="stable")]
        wrong = np.flatnonzero(self._sizes != SAMPLE_BYTES) if ending == "rgb" else np.empty(0, np.int64)
        if len(wrong):
            raise UserError(
                f"{self._tars[self._numbers[wrong[0]]]}: sample {self._keys[wrong[0]]:09d} has "
                f"{self._sizes[wrong[0]]} bytes, expected {SAMPLE_BYTES}; run `alexnet-prep shard` again with --force"
            )

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: NDArray[np.int64]) -> list[int]:
        """The positions of some keys. Raises UserError for one that is in no index."""
        positions = np.searchsorted(self._keys, keys)
        known = positions < len(self)
        known[known] = self._keys[positions[known]] == keys[known]
        if not known.all():
            raise UserError(f"sample {keys[~known][0]:09d} is in no index; run `alexnet-prep shard` again with --force")
        return positions.tolist()

    def find_tar(self, key: int) -> Path:
        """The tar of a sample. Raises UserError for a key that is in no index."""
        return self._tars[self._numbers[self.find(np.array([key]))[0]]]

    def locate(self, positions: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Open files and where in them samples begin. Raises UserError for a tar that cannot be opened."""
        numbers = self._numbers[list(positions)]
        return np.array([self._open(int(number)) for number in numbers], np.int32), self._offsets[list(positions)]

    def refuse(self, position: int, reason: str) -> UserError:
        """The error of a sample that cannot be read."""
        return UserError(
            f"{self._tars[self._numbers[position]]}: sample {self._keys[position]:09d} cannot be read ({reason}); "
            "restore it, or run `alexnet-prep shard` again with --force"
        )

    def read(self, position: int) -> NDArray[np.uint8]:
        """The stored bytes of a sample, in memory of their own."""
        data = np.empty(self._sizes[position], np.uint8)
        self.read_into(position, data, 0)
        return data

    def read_into(self, position: int, target: NDArray[np.uint8], start: int) -> None:
        """Fill `target` with a sample's bytes from byte `start` on. Raises UserError where the tar ends before."""
        number = int(self._numbers[position])
        offset = int(self._offsets[position]) + start
        num_read = os.preadv(self._open(number), [target.data], offset)
        while 0 < num_read < target.nbytes:  # a read that was cut short by a signal
            more = os.preadv(self._open(number), [target.data[num_read:]], offset + num_read)
            num_read = num_read + more if more else -1
        if num_read != target.nbytes:
            raise self.refuse(position, "the file ends there")

    def _open(self, number: int) -> int:
        with self._lock:
            if number not in self._files:
                try:
                    self._files[number] = os.open(self._tars[number], os.O_RDONLY)
                except OSError as error:
                    raise UserError(f"{self._tars[number]}: cannot be opened ({error.strerror})") from error
            return self._files[number]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


class MemoryPixels:
    """The decoded images of a whole split, 196,608 bytes each, in host memory or on a GPU; filled as they come by.

    Every rank holds all of them, since each epoch deals the samples anew.
    """

    def __init__(self, num_samples: int, device: torch.device) -> None:
        self._is_there = np.zeros(num_samples, bool)
        self.array: NDArray[np.uint8] | None = None  # the same memory as `pixels`, on the host
        if device.type == "cpu":  # NumPy asks for huge pages; touched first when filled
            self.array = np.empty((num_samples, *SAMPLE_SHAPE), np.uint8)
            self.pixels = torch.from_numpy(self.array)
        else:
            self.pixels = torch.empty((num_samples, *SAMPLE_SHAPE), dtype=torch.uint8, device=device)

    @property
    def num_missing(self) -> int:
        return int((~self._is_there).sum())

    def has(self, position: int) -> bool:
        return bool(self._is_there[position])

    def mark(self, positions: Sequence[int]) -> None:
        """What stands at these positions of `pixels` is their image from now on."""
        self._is_there[list(positions)] = True


def choose_memory(num_samples: int, device: torch.device, num_local_ranks: int, say: Callable[[str], None] = note) -> (
    torch.device
):  # fmt: skip
    """Where a cache of `num_samples` images goes: the GPU if `device` is one and they fit, else the host's memory.

    Says what it takes before anything is taken. Raises UserError with the numbers if it fits nowhere.
    """
    needed = num_samples * SAMPLE_BYTES
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if needed + GPU_RESERVE_BYTES <= free:
            say(f"cache: {num_samples:,} images take {_gib(needed)} of the GPU's {_gib(free)} free memory")
            return device
    available = available_bytes()
    if needed * num_local_ranks + HOST_RESERVE_BYTES > available:
        ranks = f" for each of {num_local_ranks} ranks" if num_local_ranks > 1 else ""
        gpu = (
            f", the GPU has {_gib(free)} free and must keep {_gib(GPU_RESERVE_BYTES)}" if device.type == "cuda" else ""
        )
        raise UserError(
            f"cache: {num_samples:,} images need {_gib(needed)} of memory{ranks}, the host has {_gib(available)} "
            f"available and must keep {_gib(HOST_RESERVE_BYTES)}{gpu}; leave out --cache raw, or make shards with "
            "--encoding raw"
        )
    say(f"cache: {num_samples:,} images take {_gib(needed)} of the host's {_gib(available)} available memory")
    return torch.device("cpu")


def available_bytes(meminfo: Path = _MEMINFO) -> int:
    """What the kernel can give without swapping."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"{meminfo}: no MemAvailable; leave out --cache raw")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
