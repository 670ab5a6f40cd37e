"""One work unit: a list of images -> one tar, its DALI index and its record.

The decision that shaped it: the unit's output depends on the unit alone, byte by byte. Tar headers carry no time, user
or group; an image that cannot be used leaves a gap in the keys and changes nothing else. The record gets its name
last and is the mark that the unit is complete. Left out: which images make a unit, and in what order (plan.py). Runs
in worker processes; webdataset, which takes a second to import, is imported there only.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from pipeline.common.errors import UserError
from pipeline.images.decode import BadImage
from pipeline.manifest import CLS_DIGITS, ENDINGS, KEY_DIGITS, Shard, index_header
from tools.sharding.output import JOB_FILE, Failure, Written, find_job
from tools.sharding.plan import Options, Unit
from tools.sharding.preparer import make_preparer
from tools.sharding.store import Store
from tools.sources.source import Entry

if TYPE_CHECKING:
    from tools.sharding.hostcodec import Prepared
    from tools.sharding.preparer import Preparer

TAR_HEADER_BYTES = 512
TAR_MODE = 0o644
BATCH_SIZE = 32  # images prepared at a time; also how often a worker finds out that nobody waits for it any more


class Tick(NamedTuple):
    """Progress within a unit: so many more images seen, these of them failed."""

    num_images: int
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Setup:
    """What all units of a job share: where to write, job fingerprint, options, how to read a source image."""

    store: Store
    job: str
    options: Options
    read: Callable[[Entry], bytes]


@dataclass
class _Content:
    """What goes into index and record while the tar is written: rows, source and repair by key, failures."""

    rows: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    repaired: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)


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
    """Write `unit` into setup.store: tar, then index, then record, each atomically.

    Raises OSError, naming the file, if it cannot be written; an image that cannot be read or used is a Failure.
    """
    store, name = setup.store, PurePath(unit.file)
    try:
        with store.create(unit.file) as file:
            hashed = _HashingFile(file)
            content = _write_samples(setup, unit, hashed, report)
            _check_wanted(setup, unit)
        index = "\n".join([index_header(len(content.rows)), *content.rows, ""]).encode("ascii")
        store.write(name.with_suffix(".idx").name, index)
        shard = Shard(unit.file, unit.split, len(content.rows), hashed.num_bytes, hashed.digest.hexdigest())
        record = {
            **asdict(shard),
            "idx_sha256": hashlib.sha256(index).hexdigest(),
            "job": setup.job,
            "device": setup.options.device,
            "sources": content.sources,
            "repaired": content.repaired,
            "failures": [failure._asdict() for failure in content.failures],
        }
        store.write(name.with_suffix(".json").name, (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, store.locate(unit.file)) from error
    return Written(shard, tuple(content.failures), len(content.repaired))


def _check_wanted(setup: Setup, unit: Unit) -> None:
    """Raise UserError if the store is another job's by now: on a cluster a task may outlive the job it belonged to."""
    owner = find_job(setup.store, JOB_FILE)
    if owner not in (None, setup.job):
        raise UserError(
            f"{setup.store}: belongs to another job by now ({owner[:12]}, this one is {setup.job[:12]}), so {unit} is "
            "not written; choose another --out for one of them"
        )


def _write_samples(setup: Setup, unit: Unit, file: _HashingFile, report: Callable[[Tick], None]) -> _Content:
    from webdataset import TarWriter

    content, ending = _Content(), ENDINGS[setup.options.encoding]
    with TarWriter(file, user="", group="", mode=TAR_MODE, mtime=0, encoder=False) as tar:
        for start in range(0, len(unit.entries), BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            num_failures = len(content.failures)
            images = _prepare(setup, unit.entries[batch])
            for position, entry, image in zip(unit.positions[batch], unit.entries[batch], images, strict=True):
                if isinstance(image, Failure):
                    content.failures.append(image)
                    continue
                key = f"{position:0{KEY_DIGITS}d}"
                row = []
                for name, data in ((ending, image.content), ("cls", f"{entry.label:0{CLS_DIGITS}d}".encode("ascii"))):
                    row.append(f"{name} {tar.tarstream.offset + TAR_HEADER_BYTES} {len(data)} {key}.{name}")
                    tar.write({"__key__": key, name: data})
                content.rows.append(" ".join(row))
                content.sources[key] = entry.path
                if image.repair:
                    content.repaired[key] = image.repair
            report(Tick(len(images), tuple(content.failures[num_failures:])))
    report(Tick(0, ()))  # syncing may take long: not begun if nobody waits for it
    return content


def _prepare(setup: Setup, entries: Sequence[Entry]) -> "list[Prepared | Failure]":
    """One outcome for each entry."""
    read = [_read(setup, entry) for entry in entries]
    prepare = _find_preparer(setup.options)
    outcomes = iter(prepare([data for data in read if not isinstance(data, Failure)]))
    images: list[Prepared | Failure] = []
    for entry, data in zip(entries, read, strict=True):
        image = data if isinstance(data, Failure) else next(outcomes)
        images.append(Failure(entry.path, image.reason, image.exception) if isinstance(image, BadImage) else image)
    return images


def _read(setup: Setup, entry: Entry) -> bytes | Failure:
    try:
        return setup.read(entry)
    except OSError as error:
        return Failure(entry.path, error.strerror or str(error), type(error).__name__)


@functools.cache
def _find_preparer(options: Options) -> "Preparer":
    return make_preparer(device=options.device, encoding=options.encoding, quality=options.quality)
