"""One work unit: a list of images -> one tar, its DALI index and its record.

The bytes follow from the unit alone: tar headers carry no time, user or group, one encoder (libjpeg-turbo) makes every
sample, and an image that cannot be used leaves a gap in the keys and changes nothing else. The record gets its name
last: it marks the unit as complete.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import BinaryIO, NamedTuple

import simplejpeg

from pipeline.common.errors import UserError
from pipeline.images.decode import BadImage, Pixels
from pipeline.images.resize import read_square
from pipeline.manifest import CLS_DIGITS, ENDINGS, KEY_DIGITS, index_header
from tools.sharding.output import JOB_FILE, Failure, Written, encode_json, find_job
from tools.sharding.plan import Encoding, Options, Unit
from tools.sharding.record import Record
from tools.sharding.store import Store
from tools.sources.source import Entry

TAR_HEADER_BYTES = 512
TAR_MODE = 0o644
REPORT_EVERY = 32  # images; also how often a worker finds out that nobody waits for it any more
DEVICE = "cpu"  # in a record: of before, some were prepared on a GPU, which gives other bytes


class Prepared(NamedTuple):
    """A sample's bytes; `repair` says what was wrong with a file that could be used all the same."""

    content: bytes
    repair: str | None


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
        record = Record(
            file=unit.file,
            split=unit.split,
            samples=len(content.rows),
            bytes=hashed.num_bytes,
            sha256=hashed.digest.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            job=setup.job,
            device=DEVICE,
            sources=content.sources,
            repaired=content.repaired,
            failures=[failure._asdict() for failure in content.failures],
        )
        store.write(name.with_suffix(".json").name, encode_json(asdict(record)))
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, store.locate(unit.file)) from error
    return Written.of(record)


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
        for start in range(0, len(unit.entries), REPORT_EVERY):
            batch = slice(start, start + REPORT_EVERY)
            num_failures = len(content.failures)
            for position, entry in zip(unit.positions[batch], unit.entries[batch], strict=True):
                try:
                    image = _prepare(setup, entry)
                except BadImage as error:
                    content.failures.append(Failure(entry.path, error.reason, error.exception))
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
            report(Tick(len(unit.entries[batch]), tuple(content.failures[num_failures:])))
    report(Tick(0, ()))  # syncing may take long: not begun if nobody waits for it
    return content


def _prepare(setup: Setup, entry: Entry) -> Prepared:
    """Raises BadImage, for an image that cannot be read too."""
    try:
        data = setup.read(entry)
    except OSError as error:
        raise BadImage(error.strerror or str(error), type(error).__name__) from error
    return prepare(data, encoding=setup.options.encoding, quality=setup.options.quality)


def prepare(data: bytes, *, encoding: Encoding, quality: int) -> Prepared:
    """Encoded image -> baseline 4:2:0 JPEG without metadata, or 256x256x3 raw bytes (HWC, RGB). Raises BadImage."""
    pixels, repair = read_square(data)
    return Prepared(pixels.tobytes() if encoding == "raw" else encode(pixels, quality=quality), repair)


def encode(square: Pixels, *, quality: int) -> bytes:
    """(256, 256, 3) RGB -> baseline JPEG with 4:2:0 chroma and no metadata."""
    return simplejpeg.encode_jpeg(square, quality=quality, colorspace="RGB", colorsubsampling="420")
