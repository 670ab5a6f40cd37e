"""What the ways of preparing images share: the job, tars, and a pool of processes.

They are started before the clock, because a set of millions would not notice their start.
"""

import multiprocessing
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness.children import Contestant
from harness.prepare_images import Encode

Timed = tuple[int, float, int]  # images, seconds, images worked on
_prepare: Encode  # of a worker process


@dataclass(frozen=True)
class Job:
    """files: paths of the images, in order; tree: the folder that holds them as <class>/<file>; out: scratch folder."""

    files: list[str]
    tree: str
    out: Path
    workers: int
    samples_per_shard: int

    def fresh(self) -> Path:
        """An empty folder for one round's output."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        return self.out


def _start_worker(make: Callable[[], Encode]) -> None:
    global _prepare
    _prepare = make()


def _write_shard(path: Path, start: int, files: list[str]) -> int:
    """One tar, written by the worker that prepares its images; keys are positions in the list."""
    from webdataset import TarWriter

    with TarWriter(str(path), encoder=False) as tar:
        for position, file in enumerate(files, start):
            tar.write({"__key__": f"{position:09d}", "jpg": _prepare(Path(file).read_bytes()), "cls": b"00000"})
    return len(files)


def _prepare_only(files: list[str]) -> int:
    for file in files:
        _prepare(Path(file).read_bytes())
    return len(files)


def prepare_file(file: str) -> bytes | None:
    return _prepare(Path(file).read_bytes())


def _cut(job: Job, num: int) -> list[tuple[int, list[str]]]:
    """(first position, files) per shard of the first `num` files."""
    return [
        (start, job.files[start : min(num, start + job.samples_per_shard)])
        for start in range(0, num, job.samples_per_shard)
    ]


def start_pool(job: Job, make: Callable[[], Encode]) -> Any:
    make()  # a missing library is found out here
    return multiprocessing.get_context("spawn").Pool(job.workers, _start_worker, (make,))


def pooled(job: Job, make: Callable[[], Encode], *packages: str) -> Contestant:
    pool = start_pool(job, make)

    def run(num: int) -> Timed:
        out, start_s = job.fresh(), time.perf_counter()
        tasks = [(out / f"{start:09d}.tar", start, files) for start, files in _cut(job, num)]
        done = sum(pool.starmap(_write_shard, tasks, chunksize=1))
        return done, time.perf_counter() - start_s, done

    return Contestant({"run": run, "stored": partial(unpack, job)}, packages, pool.terminate)


def limit(job: Job, make: Callable[[], Encode]) -> Contestant:
    pool = start_pool(job, make)

    def run(num: int) -> Timed:
        start_s = time.perf_counter()
        done = sum(pool.imap_unordered(_prepare_only, [files for _, files in _cut(job, num)]))
        return done, time.perf_counter() - start_s, done

    return Contestant({"run": run}, ("simplejpeg", "numpy"), pool.terminate)


def unpack(job: Job, folder: str) -> int:
    """The stored images of the last round as `folder`/<position>.jpg; how many there were."""
    num = 0
    for tar in sorted(job.out.glob("*.tar")):
        for name, data in read_tar(tar):
            if name.endswith(".jpg"):
                (Path(folder) / f"{int(name[:-4]):09d}.jpg").write_bytes(data)
                num += 1
    return num


def read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                yield Path(member.name).name, file.read()
