"""Images inside large files: where they lie in a tar, and their bytes out of the middle of a file that stays open."""

import errno
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from pipeline.common.console import Progress
from pipeline.common.errors import UserError
from tools.sources.listing import Entry

MAX_OPEN_FILES = 128  # per process; the usual limit is 1024
NUM_SCAN_THREADS = 8  # a scan mostly waits for the disk
_READ_AHEAD_BYTES = 4096  # what a disk is asked for anyway
_MAX_EXTENSION_BYTES = 1 << 20  # of a long name or a pax header

Item = TypeVar("Item")
Found = TypeVar("Found")


class OpenFile:
    """A file open for reading at any offset, by several threads too; closed when nobody holds it any more."""

    def __init__(self, path: str) -> None:
        self.path, self.fd = path, -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

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


# For reading entries. A scan opens its own: a file may have been replaced since it was kept.
keep_open = lru_cache(maxsize=MAX_OPEN_FILES)(OpenFile)


@dataclass(frozen=True)
class MemberReader:
    """`read` of a Source whose entries are (number of the file, offset, size), in bytes."""

    root: str
    files: tuple[str, ...]

    def __call__(self, entry: Entry) -> bytes:
        number, offset, size = entry.where
        return keep_open(os.path.join(self.root, self.files[number])).read(offset, size)  # noqa: PTH118 - 1.3 million


class _TarFile(io.BufferedReader):
    """What tarfile reads: it ends at `end`, and no name is longer than a damaged or hostile size may make it."""

    end = 0

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_EXTENSION_BYTES:
            raise tarfile.ReadError(f"a name of {size} bytes, expected no more than {_MAX_EXTENSION_BYTES}")
        return super().read(max(min(size, self.end - self.tell()), 0))


def scan_tar(path: Path, start: int = 0, size: int | None = None, *, name: str = "") -> Iterator[tarfile.TarInfo]:
    """The members, but for directories, of the tar in `size` bytes of the file from `start` on; a content's offset is
    counted from the beginning of the file. `name` is what a message calls a tar within a tar.

    Raises UserError, naming file and offset, for what is not a tar or ends too early, OSError for what cannot be read.
    """
    where = f"{path}, {name!r}" if name else str(path)
    with _TarFile(path.open("rb", buffering=0), _READ_AHEAD_BYTES) as file:
        file.end = os.fstat(file.fileno()).st_size if size is None else start + size
        file.seek(start)
        tar, at, reason = None, start, ""
        while True:
            try:
                tar = tar or tarfile.TarFile(fileobj=file, encoding="utf-8")
                member = tar.next()
            # Besides its own errors, tarfile lets through what numbers and long chains of headers lead to.
            except (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError) as error:
                member, reason = None, str(error)
            if tar is None or member is None:
                break
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            shown = f"{member.name!r} (header at byte {at})"
            if member.issparse():
                raise UserError(f"{where}: {shown} is stored as a sparse file, expected plain files; make the tar "
                                "again without --sparse")  # fmt: skip
            if member.size < 0 or not member.pax_headers.get("size", "0").isdecimal():
                raise UserError(f"{where}: damaged: {shown} has no readable size; fetch it again")
            if not member.name and not member.isdir():
                raise UserError(f"{where}: damaged: no readable name at byte {at}; fetch it again")
            if member.isreg() and member.offset_data + member.size > file.end:
                raise UserError(f"{where}: truncated: {shown} needs {member.size} bytes, and the tar ends at byte "
                                f"{file.end}; fetch it again")  # fmt: skip
            if not member.isdir():
                yield member
            at = tar.offset
        # tarfile takes whatever is no header for the end.
        is_short = file.tell() >= file.end
        file.seek(at)
        block = file.read(tarfile.BLOCKSIZE)
        if not reason and (block == bytes(tarfile.BLOCKSIZE) or (not block and name and at > start)):
            return  # without an end mark only where an outer header has told the size
        if is_short:
            raise UserError(f"{where}: truncated: ends at byte {file.end}, where a header or the end mark of a tar "
                            "should be; fetch it again")  # fmt: skip
        reason = f" ({reason})" if reason else ""
        if at == start:
            raise UserError(f"{where}: no tar, expected a tar header at byte {at}{reason}; a compressed one must be "
                            "unpacked")  # fmt: skip
        raise UserError(f"{where}: damaged: no tar header at byte {at}{reason}, where one should be; fetch it again")


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
