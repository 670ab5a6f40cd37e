"""How fast a disk gives what lies on it: shards read from end to end, and pieces of them at random places.

The decision that shaped it: around the page cache (O_DIRECT), or with the pages dropped first where a file system knows
no O_DIRECT, because what memory holds already says nothing about the first epoch. Bounded in time and bytes. Left out:
writing, and reading by several threads at once.
"""

import contextlib
import errno
import mmap
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 4 << 20
_PIECE_BYTES = 128 << 10
_ALIGNMENT = 4096
_MAX_BYTES = 512 << 20
_MAX_PIECES = 512


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes and seconds of the two readings; `direct`: around the page cache for certain."""

    sequential_bytes: int
    sequential_s: float
    random_pieces: int
    random_bytes: int
    random_s: float
    direct: bool


def measure(files: Sequence[Path], budget_s: float = 2.0, clock: Callable[[], float] = time.perf_counter) -> DiskSpeed:
    """Read `files` in order, then 128 KiB pieces of them at random, each for `budget_s` at the most.

    Raises OSError if a file cannot be read, ValueError if all are empty.
    """
    sizes = {path: path.stat().st_size for path in files}
    if not sum(sizes.values()):
        raise ValueError("no bytes to read")
    direct = all(_knows_direct(path) for path in files[:1])
    with mmap.mmap(-1, _BLOCK_BYTES) as buffer:  # of whole pages, as O_DIRECT wants it
        start_s, num_bytes = clock(), 0
        for path in files:
            with _open(path, direct) as file:
                offset = 0
                while offset < sizes[path] and num_bytes < _MAX_BYTES and clock() - start_s < budget_s:
                    got = os.preadv(file, [buffer], offset)
                    offset, num_bytes = offset + got, num_bytes + got
                    if got < _BLOCK_BYTES:
                        break
        sequential_s = clock() - start_s
        draw, pieces, piece_bytes = random.Random(0), 0, 0
        start_s, piece = clock(), memoryview(buffer)[:_PIECE_BYTES]
        with contextlib.ExitStack() as stack, piece:
            opened = {path: stack.enter_context(_open(path, direct)) for path in files if sizes[path]}
            while pieces < _MAX_PIECES and clock() - start_s < budget_s:
                path = draw.choice(list(opened))
                last = max(0, sizes[path] - _PIECE_BYTES) // _ALIGNMENT
                piece_bytes += os.preadv(opened[path], [piece], draw.randint(0, last) * _ALIGNMENT)
                pieces += 1
        return DiskSpeed(num_bytes, sequential_s, pieces, piece_bytes, clock() - start_s, direct)


def _knows_direct(path: Path) -> bool:
    try:
        with _open(path, True) as file, mmap.mmap(-1, _ALIGNMENT) as buffer:
            os.preadv(file, [buffer], 0)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    return True


@contextlib.contextmanager
def _open(path: Path, direct: bool) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        if not direct:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        yield file
    finally:
        os.close(file)
