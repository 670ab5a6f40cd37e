"""One shard read from end to end, held against its index, its record and its line in the manifest."""

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.manifest import CLS_DIGITS, ENDINGS, IMAGE_SIZE_PX, KEY_DIGITS, MANIFEST, Shard, index_header

BLOCK_BYTES = 512
READ_BYTES = 1 << 18  # stays in the processor's cache between reading, hashing and taking apart
RAW_BYTES = IMAGE_SIZE_PX * IMAGE_SIZE_PX * 3
SHOWN_PER_KIND = 20  # problems of one kind in one file; the rest are counted
_LARGEST_HELD_BYTES = 1 << 26  # a larger member is hashed and measured, not held in memory
_MEMBER_NAME = re.compile(rf"([0-9]{{{KEY_DIGITS}}})\.([a-z]+)")
_OCTAL = re.compile(rb"[0-7]+")
_LABEL = re.compile(rb"[0-9]{%d}" % CLS_DIGITS)
_CHECKSUM, _SIZE, _NAME, _PREFIX = slice(148, 156), slice(124, 136), slice(0, 100), slice(345, 500)


class Problem(NamedTuple):
    """A contradiction: the file it is in, the sample's key ("" for a whole file), what was found, what was expected,
    and what has to be made again: "shard", "manifest", "colors", or "extra" for what does not belong there."""

    file: str
    key: str
    what: str
    expected: str
    mend: str


@dataclass
class Findings:
    """Problems as they come up: at most SHOWN_PER_KIND of a kind in a file are kept, all are counted."""

    shown: list[Problem] = field(default_factory=list)
    _counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, kind: str, file: str, what: str, expected: str, *, key: str = "", mend: str = "shard") -> None:
        self._counts[file, kind, mend] += 1
        if self._counts[file, kind, mend] <= SHOWN_PER_KIND:
            self.shown.append(Problem(file, key, what, expected, mend))

    @property
    def num_problems(self) -> int:
        return self._counts.total()

    def list_problems(self) -> tuple[Problem, ...]:
        """Those kept, with a line for each kind of which there are more."""
        more = (
            Problem(file, "", f"and {count - SHOWN_PER_KIND} more: {kind}", "none", mend)
            for (file, kind, mend), count in self._counts.items()
            if count > SHOWN_PER_KIND
        )
        return (*self.shown, *more)


class Member(NamedTuple):
    """One entry of a tar: name as it stands there, offset and size of its data, the data (None if it is enormous)."""

    name: str
    is_file: bool
    offset: int
    size: int
    data: bytes | None


class TarReader:
    """A tar being read: bytes and SHA-256 so far; `is_whole` when it has been found to end as a tar does."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._block = memoryview(bytearray(READ_BYTES))
        self._at = self._end = 0  # what is in the block, hashed and not yet taken
        self.num_bytes = os.fstat(file.fileno()).st_size
        self.offset, self.digest, self.is_whole = 0, hashlib.sha256(), False

    def members(self, complain: Callable[[str, str], None]) -> Iterator[Member]:
        """Every member up to the end, or to what is none: that is told to `complain`. Reads all of the file."""
        while True:
            at = self.offset
            block = self._take(BLOCK_BYTES)
            left = self.num_bytes - self.offset
            if not any(block):
                self._read_end(at, len(block), complain)
                return
            try:
                name, size, is_file = parse_header(block)
            except ValueError as error:
                complain(f"at byte {at}: no header of a member ({error})", "a tar from end to end")
                break
            if size > left:
                complain(f"{name!r} at byte {at} has {left} of its {size} bytes (truncated)", "a tar from end to end")
                break
            offset = self.offset
            data = self._take(size) if size <= _LARGEST_HELD_BYTES else None
            self._pass(size if data is None else 0)
            self._take(-size % BLOCK_BYTES)
            yield Member(name, is_file, offset, size, data)
        self._pass(self.num_bytes)

    def _read_end(self, at: int, num_zeros: int, complain: Callable[[str, str], None]) -> None:
        start = self.offset
        is_clean = self._pass(self.num_bytes)
        if not is_clean:
            complain(f"data after the end mark at byte {at}", "nothing but zeros there")
        elif num_zeros + self.offset - start < 2 * BLOCK_BYTES:
            complain(f"ends at byte {self.offset} without an end mark (truncated)", "two blocks of zeros at the end")
        else:
            self.is_whole = True

    def _take(self, num_bytes: int) -> bytes:
        # Hashed block by block: piece by piece, the calls would cost as much as the hash.
        pieces = []
        while num_bytes > 0:
            if self._at == self._end:
                self._at, self._end = 0, self._file.readinto(self._block)
                self.digest.update(self._block[: self._end])
                if not self._end:
                    break
            pieces.append(bytes(self._block[self._at : min(self._at + num_bytes, self._end)]))
            self._at += len(pieces[-1])
            num_bytes -= len(pieces[-1])
            self.offset += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _pass(self, num_bytes: int) -> bool:
        """Read on without keeping anything; whether it was all zeros."""
        is_zero = True
        while num_bytes > 0 and (data := self._take(min(num_bytes, READ_BYTES))):
            num_bytes -= len(data)
            is_zero &= data.count(0) == len(data)
        return is_zero


def parse_header(block: bytes) -> tuple[str, int, bool]:
    """Name, size and whether it is a plain file, of a member's header. Raises ValueError for other bytes."""
    if len(block) < BLOCK_BYTES:
        raise ValueError(f"{len(block)} of {BLOCK_BYTES} bytes")
    told = block[_CHECKSUM].strip(b"\0 ")
    if not _OCTAL.fullmatch(told) or int(told, 8) != sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" "):
        raise ValueError("its checksum is wrong")
    size = block[_SIZE].strip(b"\0 ")
    if not _OCTAL.fullmatch(size):
        raise ValueError(f"its size is {size!r}")
    name = block[_NAME].partition(b"\0")[0]
    if prefix := block[_PREFIX].partition(b"\0")[0]:
        name = prefix + b"/" + name
    return name.decode("ascii", "backslashreplace"), int(size, 8), block[156:157] in (b"0", b"\0")


class Samples:
    """Samples as their members come by: keys, labels (-1 where unusable), and the rows an index of them has.

    `ending` is the images' (None: any we know), `num_classes` bounds the labels (None: unbounded), `decode` has every
    image decoded. `complain(kind, what, expected, key)` is told what is wrong.
    """

    def __init__(
        self,
        complain: Callable[[str, str, str, str], None],
        *,
        ending: str | None,
        num_classes: int | None,
        decode: bool,
    ) -> None:
        self._complain, self._num_classes, self._decode = complain, num_classes, decode
        self._endings = (ending,) if ending else tuple(ENDINGS.values())
        self.keys: list[str] = []
        self.labels: list[int] = []
        self.rows: list[str] = []
        self._seen: set[str] = set()
        self._key, self._parts, self._label = "", dict[str, str](), -1

    def add(self, member: Member) -> None:
        match = _MEMBER_NAME.fullmatch(member.name)
        key, ending = match.groups() if match else ("", "")
        if not member.is_file or ending not in (*self._endings, "cls"):
            what = "foreign member" if member.is_file else "member that is no plain file:"
            expected = f"<{KEY_DIGITS} digits>.{'|'.join(self._endings)} and .cls"
            self._complain("foreign members", f"{what} {member.name!r}", expected, key)
            return
        if key != self._key or ending in self._parts:
            self.close()
            self._key = key
        self._parts[ending] = f"{ending} {member.offset} {member.size} {member.name}"
        if ending == "cls":
            self._label = self._read_label(member, key)
        elif fault := find_fault(member, ending, decode=self._decode):
            self._complain("unusable images", f"{member.name}: {fault}", f"{IMAGE_SIZE_PX}x{IMAGE_SIZE_PX} RGB", key)

    def close(self) -> None:
        """The sample begun is over: the next member is another's, or there is none."""
        if not self._parts:
            return
        images = [ending for ending in self._parts if ending != "cls"]
        if len(images) != 1 or "cls" not in self._parts:
            has = ", ".join(f".{ending}" for ending in self._parts)
            self._complain("incomplete samples", f"has {has}", "one image and one .cls, side by side", self._key)
        if self._key in self._seen:
            self._complain("duplicate keys", "this key comes again", "each key once", self._key)
        self._seen.add(self._key)
        self.keys.append(self._key)
        self.labels.append(self._label)
        self.rows.append(" ".join(self._parts.values()))
        self._parts, self._label = {}, -1

    def _read_label(self, member: Member, key: str) -> int:
        data = member.data or b""
        bound = "" if self._num_classes is None else f", 0 to {self._num_classes - 1}"
        expected = f"{CLS_DIGITS} digits{bound}"
        if not _LABEL.fullmatch(data):
            self._complain("bad labels", f"label is {data[:16]!r}", expected, key)
            return -1
        if self._num_classes is not None and int(data) >= self._num_classes:
            self._complain("bad labels", f"label {int(data)} is out of range", expected, key)
            return -1
        return int(data)


def find_fault(member: Member, ending: str, *, decode: bool) -> str | None:
    """What is wrong with a stored image: its size if it is raw; with `decode`, whatever its decoder finds."""
    if ending == ENDINGS["raw"]:
        return None if member.size == RAW_BYTES else f"{member.size} bytes, raw pixels have {RAW_BYTES}"
    if not member.size:
        return "empty"
    return find_decoding_fault(member.data or b"") if decode else None


def find_decoding_fault(data: bytes) -> str | None:
    """Why `data` is no JPEG of 256x256 RGB pixels that decodes from end to end; None if it is one."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.size != (IMAGE_SIZE_PX, IMAGE_SIZE_PX) or image.mode != "RGB":
                return f"{image.size[0]}x{image.size[1]} {image.mode}"
            image.load()
    except Exception as error:  # noqa: BLE001 - decoders raise anything when fed broken bytes
        reason = " ".join(str(error).split()).partition(" <_io.")[0]
        return f"cannot be decoded ({type(error).__name__}: {reason})"
    return None


REPORT_EVERY = 200  # samples
_KEY = re.compile(rf"[0-9]{{{KEY_DIGITS}}}")
_FAILURE_FIELDS = {"source", "reason", "exception"}


@dataclass(frozen=True)
class Task:
    """A shard to check. What the manifest says is None where it is unreadable or silent: `listed` is the shard's line,
    `ending` its images' (jpg or rgb)."""

    root: Path
    file: str
    listed: Shard | None
    ending: str | None
    num_classes: int | None
    decode: bool

    def __str__(self) -> str:
        return self.file


class Record(NamedTuple):
    """What a unit's record says: its shard, the index's SHA-256, the job, where images were encoded (cpu, gpu), source
    by key, what was mended by key, failures."""

    shard: Shard
    idx_sha256: str
    job: str
    device: str
    sources: dict[str, str]
    repaired: dict[str, str]
    failures: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Checked:
    """What a shard holds and what is wrong with it; keys and labels in stored order, without record: None."""

    file: str
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    num_bytes: int
    record: Record | None
    problems: tuple[Problem, ...]
    num_problems: int


class _Read(NamedTuple):
    """A tar that could be read: as a manifest would have it, whether it is whole, its samples."""

    shard: Shard
    is_whole: bool
    samples: Samples


def check_shard(task: Task, report: Callable[[int], None]) -> Checked:
    """Read one shard and find everything that is wrong with it; `report(n)` after every so many samples."""
    found = Findings()
    path = task.root / task.file
    record = read_record(path.with_suffix(".json"), found)
    read = _read_tar(task, path, report, found)
    if read:
        is_intact = _compare_counts(task, read, record, found)
        _compare_index(path.with_suffix(".idx"), read, record, found, is_intact=is_intact)
        if record and read.is_whole:
            _compare_sources(path.with_suffix(".json").name, read.samples, record, found)
    elif not path.with_suffix(".idx").is_file():
        found.add("index", path.with_suffix(".idx").name, "missing", "an index beside its tar")
    return Checked(
        file=task.file,
        keys=tuple(read.samples.keys) if read else (),
        labels=tuple(read.samples.labels) if read else (),
        num_bytes=read.shard.bytes if read else 0,
        record=record,
        problems=found.list_problems(),
        num_problems=found.num_problems,
    )


def read_record(path: Path, found: Findings) -> Record | None:
    """The record at `path`; None, and a problem, if there is none or it is not one."""
    expected = "the record of its shard"
    try:
        raw = load_strictly(path)
        shard = Shard(raw["file"], raw["split"], raw["samples"], raw["bytes"], raw["sha256"])
        record = Record(
            shard,
            raw["idx_sha256"],
            raw["job"],
            raw["device"],
            raw["sources"],
            raw["repaired"],
            tuple(raw["failures"]),
        )
        if not _is_well_typed(record):
            raise TypeError("a value of another type")
    except FileNotFoundError:
        found.add("record", path.name, "missing", expected)
    except OSError as error:
        found.add("record", path.name, f"cannot be read: {error.strerror}", expected)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        found.add("record", path.name, f"no record ({type(error).__name__}: {error})", expected)
    else:
        return record
    return None


def load_strictly(path: Path) -> Any:
    """Decoded JSON. Raises OSError, or ValueError for what is none and for an object with a name twice."""
    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_doubles)


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name comes twice in one object")
    return dict(pairs)


def _is_well_typed(record: Record) -> bool:
    shard = record.shard
    texts = (shard.file, shard.split, shard.sha256, record.idx_sha256, record.job, record.device)
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in (shard.samples, shard.bytes))
        and isinstance(record.sources, dict)
        and isinstance(record.repaired, dict)
        and all(_KEY.fullmatch(key) for key in record.sources)
        and all(isinstance(text, str) and text for text in (*record.sources.values(), *record.repaired.values()))
        and all(
            isinstance(failure, dict)
            and set(failure) >= _FAILURE_FIELDS
            and all(isinstance(text, str) for text in failure.values())
            for failure in record.failures
        )
    )


def _read_tar(task: Task, path: Path, report: Callable[[int], None], found: Findings) -> _Read | None:
    samples = Samples(
        lambda kind, what, expected, key: found.add(kind, task.file, what, expected, key=key),
        ending=task.ending,
        num_classes=task.num_classes,
        decode=task.decode,
    )
    num_reported = 0
    try:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            tar = TarReader(file)
            for member in tar.members(partial(found.add, "structure", task.file)):
                samples.add(member)
                if len(samples.keys) >= num_reported + REPORT_EVERY:
                    report(len(samples.keys) - num_reported)
                    num_reported = len(samples.keys)
        samples.close()
    except FileNotFoundError:
        size = f"a tar of {task.listed.bytes} bytes" if task.listed else "a tar"
        found.add("tar", task.file, "missing", size)
        return None
    except OSError as error:
        found.add("tar", task.file, f"cannot be read: {error.strerror}", "a readable file")
        return None
    report(len(samples.keys) - num_reported)
    split = task.file.partition("-")[0]
    return _Read(Shard(task.file, split, len(samples.keys), tar.offset, tar.digest.hexdigest()), tar.is_whole, samples)


def _compare_counts(task: Task, read: _Read, record: Record | None, found: Findings) -> bool:
    """Hold size, checksum and number of samples against record and manifest; whether the tar is what it should be."""
    is_intact = read.is_whole
    for name in ("file", "split", "bytes", "sha256", *(["samples"] if read.is_whole else [])):
        actual = getattr(read.shard, name)
        listed = getattr(task.listed, name) if task.listed else None
        recorded = getattr(record.shard, name) if record else None
        told = [value for value in (listed, recorded) if value is not None]
        if told and actual not in told:
            found.add("contents", task.file, f"{name} {actual}", f"{name} {told[0]}")
            is_intact = False
            if name == "bytes":
                break  # of a truncated tar checksum and number of samples say nothing new
        elif listed not in (None, actual):
            what = f"{task.file}: {name} {listed}"
            found.add("shards", MANIFEST, what, f"{name} {actual}, as tar and record have it", mend="manifest")
        elif recorded not in (None, actual):
            record_name = Path(task.file).with_suffix(".json").name
            found.add("record", record_name, f"{name} {recorded!r}", f"{name} {actual}, as tar and manifest have it")
    return is_intact


def _compare_index(path: Path, read: _Read, record: Record | None, found: Findings, *, is_intact: bool) -> None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        found.add("index", path.name, "missing", "an index beside its tar")
        return
    except OSError as error:
        found.add("index", path.name, f"cannot be read: {error.strerror}", "a readable file")
        return
    is_recorded = record is not None and hashlib.sha256(data).hexdigest() == record.idx_sha256
    if is_recorded and not is_intact:
        return  # a damaged tar differs from its index: that is no fault of the index
    expected = [index_header(len(read.samples.rows)), *read.samples.rows, ""]
    rows = data.decode("ascii", "backslashreplace").split("\n")
    if rows == expected:
        if record and not is_recorded:
            what = f"idx_sha256 {record.idx_sha256}"
            found.add(
                "record", path.with_suffix(".json").name, what, f"{hashlib.sha256(data).hexdigest()}, the index's"
            )
        return
    if rows[0] != expected[0]:
        found.add("index", path.name, f"stale: starts with {rows[0][:80]!r}", f"{expected[0]!r}, as its tar has it")
    for number, (row, right) in enumerate(zip(rows[1:], expected[1:], strict=False), start=1):
        if row != right:
            key = read.samples.keys[number - 1] if number <= len(read.samples.keys) else ""
            found.add(
                "index rows", path.name, f"row {number} is {row[:200]!r}", f"{right!r}, as its tar has it", key=key
            )
    if len(rows) != len(expected):
        found.add("index", path.name, f"stale: {len(rows)} lines", f"{len(expected)} lines, as its tar has samples")


def _compare_sources(name: str, samples: Samples, record: Record, found: Findings) -> None:
    if list(record.sources) != samples.keys:
        odd = sorted(set(record.sources).symmetric_difference(samples.keys))[:3]
        what = f"keys {', '.join(map(repr, odd))} in record or tar alone" if odd else "keys in another order or twice"
        found.add("record", name, what, "the keys of its tar, in their order")
    if strangers := sorted(record.repaired.keys() - record.sources.keys())[:3]:
        what = f"repaired images {', '.join(map(repr, strangers))} are none of its samples"
        found.add("record", name, what, "keys of its samples")
