"""One work unit: a list of images -> one tar, its DALI index and its record.

The decision that shaped it: the unit's output depends on the unit alone, byte by byte. Tar headers carry no time, user
or group; an image that cannot be used leaves a gap in the keys and changes nothing else. The record is renamed into
place last and is the mark that the unit is complete. Left out: which images make a unit, and in what order
(sharder.py). Runs in worker processes; webdataset, which pulls in torch, is imported there only.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipeline.errors import UserError
from pipeline.shardset import CLS_DIGITS, KEY_DIGITS, Shard, index_header, read_json, write_atomic, write_json
from tools.imaging import BadImage, prepare
from tools.sources import Entry

TAR_HEADER_BYTES = 512
TAR_MODE = 0o644
REPORT_EVERY = 16  # images; also how often a worker finds out that nobody waits for it any more


class Failure(NamedTuple):
    """An image that could not be used."""

    source: str
    reason: str
    exception: str


class Tick(NamedTuple):
    """Progress within a unit: so many more images seen, these of them failed."""

    num_images: int
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Unit:
    """The images of one shard in stored order, with their positions in the canonical order of their split."""

    file: str
    split: str
    positions: tuple[int, ...]
    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        return self.file


@dataclass(frozen=True)
class Setup:
    """What all units of a job share: output folder, job fingerprint, JPEG quality, how to read a source image."""

    out: Path
    job: str
    quality: int
    read: Callable[[Entry], bytes]


@dataclass(frozen=True)
class Written:
    """A complete unit."""

    shard: Shard
    failures: tuple[Failure, ...]


class _HashingFile:
    """A file being written, with the SHA-256 and number of bytes so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest, self.num_bytes = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)


def write_unit(setup: Setup, unit: Unit, report: Callable[[Tick], None]) -> Written:
    """Write `unit` into setup.out: tar, then index, then record, each atomically.

    Raises OSError, naming the file, if it cannot be written; an image that cannot be read or used is a Failure.
    """
    path = setup.out / unit.file
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            hashed = _HashingFile(file)
            rows, sources, failures = _write_samples(setup, unit, hashed, report)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        index = "\n".join([index_header(len(rows)), *rows, ""]).encode("ascii")
        write_atomic(path.with_suffix(".idx"), index)
        shard = Shard(unit.file, unit.split, len(rows), hashed.num_bytes, hashed.digest.hexdigest())
        record = {
            **asdict(shard),
            "idx_sha256": hashlib.sha256(index).hexdigest(),
            "job": setup.job,
            "sources": sources,
            "failures": [failure._asdict() for failure in failures],
        }
        write_json(path.with_suffix(".json"), record)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return Written(shard, tuple(failures))


def _write_samples(
    setup: Setup, unit: Unit, file: _HashingFile, report: Callable[[Tick], None]
) -> tuple[list[str], dict[str, str], list[Failure]]:
    """Index rows, source path by key, failures."""
    from webdataset import TarWriter

    rows: list[str] = []
    sources: dict[str, str] = {}
    failures: list[Failure] = []
    num_unreported = num_reported_failures = 0
    tar = TarWriter(file, user="", group="", mode=TAR_MODE, mtime=0, encoder=False)
    for position, entry in zip(unit.positions, unit.entries, strict=True):
        image = _prepare(setup, entry)
        if isinstance(image, Failure):
            failures.append(image)
        else:
            key = f"{position:0{KEY_DIGITS}d}"
            row = []
            for ending, content in (("jpg", image), ("cls", f"{entry.label:0{CLS_DIGITS}d}".encode("ascii"))):
                row.append(f"{ending} {tar.tarstream.offset + TAR_HEADER_BYTES} {len(content)} {key}.{ending}")
                tar.write({"__key__": key, ending: content})
            rows.append(" ".join(row))
            sources[key] = entry.path
        num_unreported += 1
        if num_unreported == REPORT_EVERY or num_reported_failures < len(failures):
            report(Tick(num_unreported, tuple(failures[num_reported_failures:])))
            num_unreported, num_reported_failures = 0, len(failures)
    tar.close()
    report(Tick(num_unreported, ()))
    return rows, sources, failures


def _prepare(setup: Setup, entry: Entry) -> bytes | Failure:
    try:
        return prepare(setup.read(entry), quality=setup.quality)
    except BadImage as error:
        return Failure(entry.path, error.reason, error.exception)
    except OSError as error:
        return Failure(entry.path, error.strerror or str(error), type(error).__name__)


def find_finished(out: Path, file: str, job: str) -> Written | None:
    """What an earlier run of the same job completed as `file`: record of this job, tar of its size, unchanged index."""
    path = out / file
    if not path.with_suffix(".json").is_file():
        return None
    try:
        raw: dict[str, Any] = read_json(path.with_suffix(".json"))
        if raw["job"] != job or raw["file"] != file:
            return None
        shard = Shard(file, str(raw["split"]), int(raw["samples"]), int(raw["bytes"]), str(raw["sha256"]))
        failures = tuple(Failure(**failure) for failure in raw["failures"])
        index = path.with_suffix(".idx").read_bytes()
        is_whole = path.stat().st_size == shard.bytes and hashlib.sha256(index).hexdigest() == raw["idx_sha256"]
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return None  # damaged in whatever way: it is written again
    return Written(shard, failures) if is_whole else None


def write_failures(path: Path, failures: list[Failure]) -> None:
    """One JSON object a line; no file where there is nothing to say."""
    if failures:
        write_atomic(path, "".join(json.dumps(failure._asdict()) + "\n" for failure in failures).encode("ascii"))
