"""Whole shards from a URL into a local folder, ahead of the reader: in the order it needs them, several at once.

The decision that shaped it: connections take byte ranges in the order of need, so that all bandwidth goes to the shard
that is needed first and a shard waits for none behind it. Bytes go into a file that is there from the start at its full
size (DALI opens every tar when a pipeline is built); what counts as fetched is the mark beside it, written after the
SHA-256 agreed. Processes that share a folder share the work through a lock on each file, which dies with its holder.
Left out: what is needed when (readahead.py), how large the folder may be (cache.py).
"""

import errno
import fcntl
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.files import write_json
from pipeline.manifest import Shard
from pipeline.origin import Origin

PART_BYTES = 8 << 20
NUM_CONNECTIONS = 8
NUM_CHECKSUM_ATTEMPTS = 3


def is_kept(folder: Path, shard: Shard) -> bool:
    """Whether the shard lies in the folder as it was when its checksum agreed."""
    try:
        mark = json.loads(_mark(folder, shard).read_text())
        state = (folder / shard.file).stat()
    except (OSError, ValueError):
        return False
    return mark == _describe(shard, state)


def _mark(folder: Path, shard: Shard) -> Path:
    return (folder / shard.file).with_suffix(".fetched")


def _describe(shard: Shard, state: os.stat_result) -> dict[str, Any]:
    return {"sha256": shard.sha256, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}


@dataclass
class _Job:
    """A shard being fetched by this process: its open and locked file, the ranges nobody took, how many are missing."""

    shard: Shard
    descriptor: int
    parts: deque[tuple[int, int]] = field(default_factory=deque)
    num_missing: int = 0
    num_attempts: int = 0

    def begin(self) -> None:
        size = self.shard.bytes
        self.parts.extend((start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES))
        self.num_missing = len(self.parts)
        self.num_attempts += 1


class Fetcher:
    """Fetches the shards of one folder in the background, from the first `prefer` or `wait` on.

    Threads, not processes: the work is waiting, hashing and writing, all of which let others run.
    """

    def __init__(self, origin: Origin, folder: Path, shards: Sequence[Shard]) -> None:
        self._origin, self._folder = origin, folder
        self._shards = {shard.file: shard for shard in shards}
        self._kept = {shard.file for shard in shards if is_kept(folder, shard)}
        self._order = [name for name in self._shards if name not in self._kept]
        self._jobs: dict[str, _Job | None] = {}  # None: being opened
        self._elsewhere: set[str] = set()  # being fetched by another process
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._num_running = 0

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def prefer(self, names: Iterable[str]) -> None:
        """Fetch these first, in this order, then the others as before."""
        with self._changed:
            first = [name for name in dict.fromkeys(names) if name not in self._kept]
            if not first and not self._order:
                return
            moved = set(first)
            self._order = first + [name for name in self._order if name not in moved]
            self._start()
            self._changed.notify_all()

    def has(self, names: Iterable[str]) -> bool:
        """Whether all of these are in the folder."""
        return self._kept.issuperset(names)

    def wait(self, names: Sequence[str]) -> None:
        """Return when all of these are in the folder. Raises UserError if one cannot be had."""
        if self._kept.issuperset(names):
            return
        self.prefer(names)
        with self._changed:
            self._changed.wait_for(lambda: self._kept.issuperset(names) or self._error or self._stopped)
            if self._kept.issuperset(names):
                return
            if isinstance(self._error, UserError):
                raise UserError(str(self._error)) from self._error
            raise RuntimeError("the fetcher has stopped") from self._error

    def stop(self) -> None:
        """Stop after the ranges under way; what is not whole does not count."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """As `stop`, and wait for it."""
        self.stop()
        for thread in self._threads[1:]:  # the first may be waiting for another process's lock
            thread.join()

    def _start(self) -> None:
        if self._threads or self._stopped:
            return
        work = [self._watch] + [self._work] * NUM_CONNECTIONS
        self._num_running = len(work)
        self._threads = [threading.Thread(target=self._guard, args=(run,), daemon=True) for run in work]
        for thread in self._threads:
            thread.start()

    def _guard(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:  # noqa: BLE001 - a thread has no caller: `wait` raises it there
            with self._changed:
                self._error = self._error or self._explain(error)
                self._changed.notify_all()
        with self._changed:
            self._num_running -= 1
            if self._num_running == 1:  # the watcher: no one writes any more, so others may have the locks
                for job in filter(None, self._jobs.values()):
                    os.close(job.descriptor)
                self._jobs.clear()

    def _explain(self, error: BaseException) -> BaseException:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            missing = sum(shard.bytes for shard in self._shards.values() if shard.file not in self._kept)
            return UserError(
                f"{self._folder}: the disk is full with {gib(missing)} still to fetch; free as much, "
                "or name another --cache-dir"
            )
        return error

    def _work(self) -> None:
        while True:
            with self._changed:
                task = self._changed.wait_for(self._next_task)
                if task == "stop":
                    return
            if isinstance(task, str):
                self._open(self._shards[task])
                continue
            job, (start, end) = task
            data = self._origin.read(job.shard.file, start, end)
            _write_all(job.descriptor, data, start)
            with self._changed:
                job.num_missing -= 1
                is_last = not job.num_missing
            if is_last:
                self._finish(job)

    def _next_task(self) -> Any:
        """A range to fetch as (job, range), the name of a shard to begin, "stop", or None: nothing to do now."""
        if self._stopped or self._error:
            return "stop"
        for name in self._order:
            job = self._jobs.get(name)
            if job and job.parts:
                return job, job.parts.popleft()
            if name not in self._jobs and name not in self._elsewhere:
                self._jobs[name] = None
                return name
        return None

    def _open(self, shard: Shard) -> None:
        descriptor = os.open(self._folder / shard.file, os.O_RDWR)
        job = None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_kept(self._folder, shard):
                if shard.bytes:
                    os.posix_fallocate(descriptor, 0, shard.bytes)  # a full disk is known before the bytes travel
                job = _Job(shard, descriptor)
                job.begin()
        except BlockingIOError:
            with self._changed:
                self._elsewhere.add(shard.file)
        finally:
            if job is None:
                os.close(descriptor)
        with self._changed:
            if job:
                self._jobs[shard.file] = job
            else:
                del self._jobs[shard.file]
                if shard.file not in self._elsewhere:
                    self._keep(shard)
            self._changed.notify_all()

    def _finish(self, job: _Job) -> None:
        shard, path = job.shard, self._folder / job.shard.file
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard.sha256:
            if job.num_attempts == NUM_CHECKSUM_ATTEMPTS:
                raise UserError(
                    f"{self._origin.url}/{shard.file}: SHA-256 is {digest[:12]} after {job.num_attempts} downloads, "
                    f"expected {shard.sha256[:12]} (damaged, or changed since the manifest was read); "
                    "upload the shards again"
                )
            with self._changed:
                job.begin()
                self._changed.notify_all()
            return
        os.fsync(job.descriptor)
        write_json(_mark(self._folder, shard), _describe(shard, os.fstat(job.descriptor)))
        with self._changed:
            os.close(job.descriptor)  # and with it the lock
            del self._jobs[shard.file]
            self._keep(shard)
            self._changed.notify_all()

    def _keep(self, shard: Shard) -> None:
        self._kept.add(shard.file)
        self._order.remove(shard.file)

    def _watch(self) -> None:
        """Wait for what other processes fetch, the first needed first; what one leaves undone is ours again."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._elsewhere or self._stopped or self._error)
                if self._stopped or self._error:
                    return
                name = next(name for name in self._order if name in self._elsewhere)
            with (self._folder / name).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                kept = is_kept(self._folder, self._shards[name])
            with self._changed:
                self._elsewhere.remove(name)
                if kept:
                    self._keep(self._shards[name])
                self._changed.notify_all()


def gib(num_bytes: int) -> str:
    """A number of bytes for people: "1.50 GiB"."""
    return f"{num_bytes / 2**30:.2f} GiB"


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
