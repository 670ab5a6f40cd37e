"""Bytes out of the middle of large files: how images are read where nothing is extracted.

The decision that shaped it: files are opened by the process that reads, when it first does, and kept open, a bounded
number of them; reads carry their own offset, so threads may share a file. The files are those that were listed: an
entry says which by number, never by a name. Left out: finding out where things are (tars.py, parquet_pages.py).
"""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from pipeline.common.console import Progress
from tools.sources.listing import Entry

MAX_OPEN_FILES = 128  # per process; the usual limit is 1024
NUM_SCAN_THREADS = 8  # a scan mostly waits for the disk

Item = TypeVar("Item")
Found = TypeVar("Found")


class OpenFile:
    """A file open for reading at any offset; closed when nobody holds it any more."""

    def __init__(self, path: str) -> None:
        self.path, self.fd = path, -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.num_bytes = os.fstat(self.fd).st_size

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # modules are gone before the last of these
        if self.fd >= 0:
            close(self.fd)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on. Raises OSError, also if the file ends before."""
        data = os.pread(self.fd, size, offset)
        while len(data) < size:  # a signal, a network file system, or the end
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                reason = f"has {os.fstat(self.fd).st_size} bytes, expected {size} from byte {offset} on"
                raise OSError(errno.EIO, reason, self.path)
            data += more
        return data


@lru_cache(maxsize=MAX_OPEN_FILES)
def keep_open(path: str) -> OpenFile:
    """The file for reading entries; a scan opens its own, since a file may have been replaced since it was kept."""
    return OpenFile(path)


@dataclass(frozen=True)
class SpanReader:
    """`read` of a Source whose entries are (number of the file, offset, size), in bytes."""

    root: str
    files: tuple[str, ...]

    def __call__(self, entry: Entry) -> bytes:
        number, offset, size = entry.where
        return keep_open(os.path.join(self.root, self.files[number])).read(offset, size)  # noqa: PTH118 - 1.3 million


def find_files(root: Path, folders: Sequence[str], ending: str) -> list[str]:
    """Names, relative to `root` and sorted, of the visible files with that ending directly in one of its `folders`."""
    found = []
    for folder in folders:
        if (root / folder).is_dir():
            names = os.listdir(root / folder)  # noqa: PTH208 - a class folder may hold very many
            wanted = [name for name in names if name.endswith(ending) and not name.startswith(".")]
            found += [f"{folder}/{name}" if folder else name for name in wanted if (root / folder / name).is_file()]
    return sorted(found)


def scan_all(function: Callable[[Item], Found], items: Sequence[Item], label: str) -> Iterator[Found]:
    """`function` of each item, in their order, worked out by a few threads, with progress on stderr."""
    executor = ThreadPoolExecutor(NUM_SCAN_THREADS)
    try:
        with Progress(label, len(items), "parts") as progress:
            for found in executor.map(function, items):
                progress.advance(1)
                yield found
    finally:
        executor.shutdown(cancel_futures=True)
