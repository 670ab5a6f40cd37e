"""A tar of samples read from end to end: what it holds, and everything in it that should not be there.

The decision that shaped it: the bytes are read once, front to back, and hashed and taken apart on the way, so that a
shard costs what its disk costs. Nothing that a tar says is followed: names are compared and shown, never used as paths,
and sizes are held against what is left of the file. Left out: whether it is the tar it should be (shardcheck.py).
"""

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.manifest import CLS_DIGITS, ENDINGS, IMAGE_SIZE_PX, KEY_DIGITS

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
