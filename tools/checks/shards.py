"""One shard read from end to end and held against its index, its record and its line in the manifest."""

import hashlib
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.common.console import spell_command
from pipeline.common.errors import UserError
from pipeline.common.files import read_json
from pipeline.manifest import CLS_DIGITS, ENDINGS, IMAGE_SIZE_PX, KEY_DIGITS, MANIFEST, Shard, index_header
from pipeline.shards import Index, check_places, read_index
from tools.sharding.record import Record

BLOCK_BYTES = 512
READ_BYTES = 1 << 18  # stays in the processor's cache between reading and hashing
RAW_BYTES = IMAGE_SIZE_PX * IMAGE_SIZE_PX * 3
SHOWN_PER_KIND = 20  # problems of one kind in one file; the rest are counted
REPORT_EVERY = 200  # samples
_LARGEST_HELD_BYTES = 1 << 26  # a larger member is hashed and measured, not held in memory
_MEMBER_NAME = re.compile(rf"([0-9]{{{KEY_DIGITS}}})\.([a-z]+)")
_LABEL = re.compile(rb"[0-9]{%d}" % CLS_DIGITS)


class Problem(NamedTuple):
    """A contradiction: the file it is in, the sample's key ("" for a whole file), what was found, what was expected,
    and what has to be made again: "shard", "manifest", "job", "colors", or "extra" for what does not belong there."""

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
        """Count a problem, and keep it unless there are many of its kind."""
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


def reason_of(error: UserError, path: Path) -> str:
    """What a UserError about `path` says, without the path and the remedy."""
    return str(error).removeprefix(f"{path}: ").rpartition("; ")[0]


def open_index(tar: Path, shard: Shard, ending: str) -> Index:
    """The index beside `tar`. Raises UserError, naming `alexnet-prep verify`, for one that does not fit the tar."""
    path = tar.with_suffix(".idx")
    try:
        check_places(path, shard, ending)
        return read_index(path, shard, ending)
    except UserError as error:
        hint = f"find out more with `{spell_command('alexnet-prep', 'verify', shards=tar.parent)}`"
        raise UserError(f"{path}: damaged index ({reason_of(error, path)}); {hint}") from error


class Member(NamedTuple):
    """One entry of a tar: name as it stands there, offset and size of its data, the data (None if it is enormous)."""

    name: str
    is_file: bool
    offset: int
    size: int
    data: bytes | None


class TarReader:
    """A tar being read: bytes and SHA-256 so far; `is_whole` when it has been found to end as a tar does.

    Headers are read by the standard library, but not the archive: it ends in silence at a header that is none, obeys
    headers that rename or move what follows, and takes three times as long.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.offset, self.digest, self.is_whole = 0, hashlib.sha256(), False

    def members(self, complain: Callable[[str, str], None]) -> Iterator[Member]:
        """Every member up to the end, or to what is none: that is told to `complain`. Reads all of the file."""
        num_bytes = os.fstat(self._file.fileno()).st_size
        while any(block := self._read(BLOCK_BYTES)):
            at, left = self.offset - len(block), num_bytes - self.offset
            try:
                header = tarfile.TarInfo.frombuf(block, "ascii", "backslashreplace")
            except tarfile.HeaderError as error:
                complain(f"at byte {at}: no header of a member ({error})", "a tar from end to end")
                break
            name, size = header.name, header.size
            if not 0 <= size <= left:
                complain(f"{name!r} at byte {at} has {left} of its {size} bytes (truncated)", "a tar from end to end")
                break
            offset, data = self.offset, None
            if size <= _LARGEST_HELD_BYTES:
                data = self._read(size)
            else:
                self._pass(size)
            self._read(-size % BLOCK_BYTES)
            yield Member(name, header.type in (tarfile.REGTYPE, tarfile.AREGTYPE), offset, size, data)
        else:
            at = self.offset - len(block)
            if not self._pass(num_bytes):
                complain(f"data after the end mark at byte {at}", "nothing but zeros there")
            elif self.offset - at < 2 * BLOCK_BYTES:
                what = f"ends at byte {self.offset} without an end mark (truncated)"
                complain(what, "two blocks of zeros at the end")
            else:
                self.is_whole = True
        self._pass(num_bytes)

    def _read(self, num_bytes: int) -> bytes:
        data = self._file.read(num_bytes)
        self.digest.update(data)
        self.offset += len(data)
        return data

    def _pass(self, num_bytes: int) -> bool:
        """Read on without keeping anything; whether it was all zeros."""
        is_zero = True
        while num_bytes > 0 and (data := self._read(min(num_bytes, READ_BYTES))):
            num_bytes -= len(data)
            is_zero &= data.count(0) == len(data)
        return is_zero


class Samples:
    """Samples as their members come by: keys, labels (-1 where unusable), and the rows an index of them has.

    `ending` is the images' (None: any we know), `num_classes` bounds the labels (None: unbounded), `decode` has every
    image decoded. What is wrong in `file` goes to `found`.
    """

    def __init__(
        self, found: Findings, file: str, *, ending: str | None, num_classes: int | None, decode: bool
    ) -> None:
        self._found, self._file, self._num_classes, self._decode = found, file, num_classes, decode
        self._endings = (ending,) if ending else tuple(ENDINGS.values())
        self.keys: list[str] = []
        self.labels: list[int] = []
        self.rows: list[str] = []
        self._seen: set[str] = set()
        self._key, self._parts, self._label = "", dict[str, str](), -1

    def _complain(self, kind: str, what: str, expected: str, key: str) -> None:
        self._found.add(kind, self._file, what, expected, key=key)

    def add(self, member: Member) -> None:
        """The next member of the tar."""
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
            self._label = self._read_label(member.data or b"", key)
        elif fault := find_fault(member, ending, decode=self._decode):
            self._complain("unusable images", f"{member.name}: {fault}", f"{IMAGE_SIZE_PX}x{IMAGE_SIZE_PX} RGB", key)

    def close(self) -> None:
        """The sample begun is over: the next member is another's, or there is none."""
        if not self._parts:
            return
        if len(self._parts) != 2 or "cls" not in self._parts:
            has = ", ".join(f".{ending}" for ending in self._parts)
            self._complain("incomplete samples", f"has {has}", "one image and one .cls, side by side", self._key)
        if self._key in self._seen:
            self._complain("duplicate keys", "this key comes again", "each key once", self._key)
        self._seen.add(self._key)
        self.keys.append(self._key)
        self.labels.append(self._label)
        self.rows.append(" ".join(self._parts.values()))
        self._parts, self._label = {}, -1

    def _read_label(self, data: bytes, key: str) -> int:
        bound = "" if self._num_classes is None else f", 0 to {self._num_classes - 1}"
        if not _LABEL.fullmatch(data):
            what = f"label is {data[:16]!r}"
        elif self._num_classes is not None and int(data) >= self._num_classes:
            what = f"label {int(data)} is out of range"
        else:
            return int(data)
        self._complain("bad labels", what, f"{CLS_DIGITS} digits{bound}", key)
        return -1


def find_fault(member: Member, ending: str, *, decode: bool) -> str | None:
    """What is wrong with a stored image: its size if it is raw; with `decode`, whatever its decoder finds."""
    from PIL import Image

    if ending == ENDINGS["raw"]:
        return None if member.size == RAW_BYTES else f"{member.size} bytes, raw pixels have {RAW_BYTES}"
    if not member.size:
        return "empty"
    if not decode:
        return None
    try:
        with Image.open(io.BytesIO(member.data or b""), formats=("JPEG",)) as image:
            if image.size != (IMAGE_SIZE_PX, IMAGE_SIZE_PX) or image.mode != "RGB":
                return f"{image.size[0]}x{image.size[1]} {image.mode}"
            image.load()
    except Exception as error:  # noqa: BLE001 - decoders raise anything when fed broken bytes
        reason = " ".join(str(error).split()).partition(" <_io.")[0]
        return f"cannot be decoded ({type(error).__name__}: {reason})"
    return None


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

    @property
    def split(self) -> str:
        return self.file.partition("-")[0]

    @property
    def record_name(self) -> str:
        return _record_of(self.file)


def _record_of(file: str) -> str:
    return Path(file).with_suffix(".json").name


def check_shard(task: Task, report: Callable[[int], None]) -> Checked:
    """Read one shard and find everything that is wrong with it; `report(n)` after every so many samples."""
    found = Findings()
    record = _find_record(task.root / _record_of(task.file), found)
    samples = Samples(found, task.file, ending=task.ending, num_classes=task.num_classes, decode=task.decode)
    index = task.root / Path(task.file).with_suffix(".idx")
    tar = _read_tar(task, samples, report, found)
    if tar:
        is_intact = _compare_counts(task, tar, len(samples.keys), record, found)
        _compare_index(index, samples, record, found, is_intact=is_intact)
        if record and tar.is_whole:
            _compare_sources(_record_of(task.file), samples, record, found)
    elif not index.is_file():
        found.add("index", index.name, "missing", "an index beside its tar")
    return Checked(
        file=task.file,
        keys=tuple(samples.keys) if tar else (),
        labels=tuple(samples.labels) if tar else (),
        num_bytes=tar.offset if tar else 0,
        record=record,
        problems=found.list_problems(),
        num_problems=found.num_problems,
    )


def _find_record(path: Path, found: Findings) -> Record | None:
    """The record at `path`; None, and a problem, if there is none or it is not one."""
    try:
        return Record.parse(read_json(path))
    except UserError as error:
        what = f"no record ({reason_of(error, path)})" if path.is_file() else "missing"
    except (KeyError, TypeError) as error:
        what = f"no record ({type(error).__name__}: {error})"
    found.add("record", path.name, what, "the record of its shard")
    return None


def peek_record(tar: Path) -> Record | None:
    """The record beside `tar`, None if there is none that can be read."""
    return _find_record(tar.with_suffix(".json"), Findings())


def _read_tar(task: Task, samples: Samples, report: Callable[[int], None], found: Findings) -> TarReader | None:
    num_reported = 0
    try:
        with (task.root / task.file).open("rb", buffering=READ_BYTES) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            tar = TarReader(file)
            for member in tar.members(partial(found.add, "structure", task.file)):
                samples.add(member)
                if len(samples.keys) >= num_reported + REPORT_EVERY:
                    report(len(samples.keys) - num_reported)
                    num_reported = len(samples.keys)
        samples.close()
    except FileNotFoundError:
        found.add("tar", task.file, "missing", f"a tar of {task.listed.bytes} bytes" if task.listed else "a tar")
        return None
    except OSError as error:
        found.add("tar", task.file, f"cannot be read: {error.strerror}", "a readable file")
        return None
    report(len(samples.keys) - num_reported)
    return tar


def _compare_counts(task: Task, tar: TarReader, num_samples: int, record: Record | None, found: Findings) -> bool:
    """Hold size, checksum and number of samples against record and manifest; whether the tar is what it should be."""
    is_intact = tar.is_whole
    actual = {
        "file": task.file,
        "split": task.file.partition("-")[0],
        "bytes": tar.offset,
        "sha256": tar.digest.hexdigest(),
        "samples": num_samples,
    }
    for name, value in actual.items():
        listed, recorded = getattr(task.listed, name, None), getattr(record, name, None)
        told = [each for each in (listed, recorded) if each is not None]
        if name == "samples" and not tar.is_whole:
            break
        if told and value not in told:
            found.add("contents", task.file, f"{name} {value}", f"{name} {told[0]}")
            is_intact = False
            if name == "bytes":
                break  # of a truncated tar checksum and number of samples say nothing new
        elif listed not in (None, value):
            what, expected = f"{task.file}: {name} {listed}", f"{name} {value}, as tar and record have it"
            found.add("shards", MANIFEST, what, expected, mend="manifest")
        elif recorded not in (None, value):
            expected = f"{name} {value}, as tar and manifest have it"
            found.add("record", _record_of(task.file), f"{name} {recorded!r}", expected)
    return is_intact


def _compare_index(path: Path, samples: Samples, record: Record | None, found: Findings, *, is_intact: bool) -> None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        found.add("index", path.name, "missing", "an index beside its tar")
        return
    except OSError as error:
        found.add("index", path.name, f"cannot be read: {error.strerror}", "a readable file")
        return
    sha256 = hashlib.sha256(data).hexdigest()
    if record and sha256 == record.idx_sha256 and not is_intact:
        return  # a damaged tar differs from its index: that is no fault of the index
    expected = [index_header(len(samples.rows)), *samples.rows, ""]
    rows = data.decode("ascii", "backslashreplace").split("\n")
    if rows == expected:
        if record and sha256 != record.idx_sha256:
            found.add("record", _record_of(path.name), f"idx_sha256 {record.idx_sha256}", f"{sha256}, the index's")
        return
    if rows[0] != expected[0]:
        found.add("index", path.name, f"stale: starts with {rows[0][:80]!r}", f"{expected[0]!r}, as its tar has it")
    for number, (row, right) in enumerate(zip(rows[1:], expected[1:], strict=False), start=1):
        if row != right:
            key = samples.keys[number - 1] if number <= len(samples.keys) else ""
            what = f"row {number} is {row[:200]!r}"
            found.add("index rows", path.name, what, f"{right!r}, as its tar has it", key=key)
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
