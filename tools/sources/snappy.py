"""Snappy streams, a fragment at a time: what is needed to undo a part of one.

The decision that shaped it: Snappy's library compresses 64 KiB by 64 KiB, each by itself, so that the fragments that
hold a value are a stream of their own once their length is put in front. Only tags are read to find them, and literals
(images, to Snappy) are stepped over. The format does not promise such fragments: others are refused (`Unlocatable`).
"""

from collections.abc import Iterator

from tools.sources.spans import OpenFile
from tools.sources.thrift import read_varint, write_varint

FRAGMENT_BYTES = 1 << 16
_WINDOW_BYTES = 4096


class Unlocatable(Exception):
    """This is not of a form in which single values can be located."""


class Fragment:
    """64 KiB of a Snappy stream's content (the last has fewer): where it is stored and where its literals are."""

    def __init__(self, file: OpenFile, start: int, offset: int) -> None:
        self._file = file
        self.start, self.offset, self.size, self.stored = start, offset, 0, 0
        self.literals: list[tuple[int, int, int]] = []  # start in the content, size, offset in the file
        self._content = b""

    def read(self, at: int, size: int) -> bytes:
        """`size` bytes of the content from `at` on, out of a literal if they are in one."""
        for start, length, offset in self.literals:
            if start <= at and at + size <= start + length:
                return self._file.read(offset + at - start, size)
        return self.decode()[at - self.start : at - self.start + size]

    def decode(self) -> bytes:
        if not self._content:
            stream = write_varint(self.size) + self._file.read(self.offset, self.stored)
            self._content = unsnap(stream, self.size)
        return self._content


def walk_fragments(file: OpenFile, start: int, stored: int, size: int) -> Iterator[Fragment]:
    """The fragments of the Snappy stream in `stored` bytes from `start` on. Raises Unlocatable if it is not made of
    such fragments or does not have `size` bytes of content."""
    end = start + stored
    window, base = file.read(start, min(_WINDOW_BYTES, stored)), start
    promised, at = read_varint(window, 0)
    if promised != size:
        raise Unlocatable("a stream of another length than its page")
    at += start
    out = 0
    fragment = Fragment(file, 0, at)
    while at < end:
        here = at - base
        if here + 5 > len(window) and base + len(window) < end:
            window, base, here = file.read(at, min(_WINDOW_BYTES, end - at)), at, 0
        tag = window[here]
        kind = tag & 3
        if kind == 0:
            length = (tag >> 2) + 1
            num_extra = max(length - 60, 0)
            if num_extra:
                length = int.from_bytes(window[here + 1 : here + 1 + num_extra], "little") + 1
            at += 1 + num_extra
            fragment.literals.append((out, length, at))
            at += length
        else:
            if kind == 1:
                length, back, num_extra = ((tag >> 2) & 7) + 4, (tag >> 5) << 8 | window[here + 1], 1
            else:
                num_extra = 2 if kind == 2 else 4
                length = (tag >> 2) + 1
                back = int.from_bytes(window[here + 1 : here + 1 + num_extra], "little")
            if back > out - fragment.start:
                raise Unlocatable("fragments that depend on each other")
            at += 1 + num_extra
        out += length
        if out - fragment.start >= FRAGMENT_BYTES or at >= end:
            if out - fragment.start > FRAGMENT_BYTES:
                raise Unlocatable("fragments of unusual size")
            fragment.size, fragment.stored = out - fragment.start, at - fragment.offset
            yield fragment
            fragment = Fragment(file, out, at)
    if at != end or out != size:
        raise Unlocatable("a stream of another length than its page")


def unsnap(stream: bytes, size: int) -> bytes:
    """The `size` bytes of content of a whole stream. Raises OSError."""
    import pyarrow

    try:
        content: bytes = pyarrow.decompress(stream, size, codec="snappy", asbytes=True)
    except pyarrow.ArrowException as error:
        raise OSError(f"damaged Snappy stream ({error})") from error
    return content
