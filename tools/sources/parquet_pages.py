"""Where each value of a byte column lies in a Parquet file, so that one is read by itself: pyarrow reads row groups.

A page is stored as it is, or as a Snappy stream. Snappy's writers compress 64 KiB of content at a time, without looking
back at what came before, so that the fragments a value is in can be read and decompressed without the others.
"""

from bisect import bisect_right
from typing import Any, NamedTuple

from tools.sources.archive import OpenFile

FRAGMENT_BYTES = 1 << 16
_WINDOW_BYTES = 4096  # of a Snappy stream, read at once: its tags lie far apart where photographs do not compress
_HEADER_BYTES = 1 << 16  # read at once for a page header; statistics may make it long
_DICTIONARY, _DATA, _DATA_V2 = 2, 0, 3  # kinds of pages
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8  # encodings


class Unlocatable(Exception):
    """This is not of a form in which single values can be located."""


class Place(NamedTuple):
    """A value: `stored` bytes of the file from `offset` on. Uncompressed if `size` is -1; else fragments of a Snappy
    stream, of whose `content` bytes the value is `size` from `skip` on."""

    offset: int
    stored: int
    skip: int = 0
    size: int = -1
    content: int = 0


class Column(NamedTuple):
    """What the file's metadata says of a column chunk: where its pages are, values with nulls, levels, "SNAPPY"..."""

    offset: int
    num_bytes: int
    num_values: int
    max_level: int
    codec: str


def read_place(file: OpenFile, place: Place) -> bytes:
    """The value. Raises OSError."""
    stored = file.read(place.offset, place.stored)
    if place.size < 0:
        return stored
    import pyarrow

    # A stream begins with its length, seven bits a byte; bits that are zero do no harm.
    length = bytes([*(place.content >> shift & 127 | 128 for shift in (0, 7, 14, 21)), place.content >> 28])
    try:
        content: bytes = pyarrow.decompress(length + stored, place.content, codec="snappy", asbytes=True)
    except pyarrow.ArrowException as error:
        raise OSError(f"damaged Snappy stream ({error})") from error
    return content[place.skip : place.skip + place.size]


def locate_values(file: OpenFile, column: Column) -> list[Place]:
    """The place of each of the column chunk's values, in order. Raises Unlocatable, also for a chunk with nulls."""
    if column.codec not in ("UNCOMPRESSED", "SNAPPY"):
        raise Unlocatable(f"compressed by {column.codec}")
    try:
        return _locate(file, column)
    except Unlocatable:
        raise
    except Exception as error:  # what a damaged page leads to is not to be foreseen; a full reader will have the say
        raise Unlocatable("a page of unknown form") from error


def _locate(file: OpenFile, column: Column) -> list[Place]:
    places: list[Place] = []
    dictionary: list[Place] = []
    at, end = column.offset, column.offset + column.num_bytes
    is_snappy = column.codec == "SNAPPY"
    while len(places) < column.num_values:
        header, used = _read_struct(file.read(at, min(_HEADER_BYTES, end - at)), 0)
        start, kind, size, stored = at + used, header[1], header[2], header[3]
        at = start + stored
        if stored < 0 or at > end:
            raise Unlocatable("a page that reaches beyond its column")
        if kind == _DICTIONARY:
            about = header[7]
            if about[2] not in (_PLAIN, _PLAIN_DICTIONARY):
                raise Unlocatable(f"a dictionary of encoding {about[2]}")
            dictionary = _list_values(Page(file, start, stored, size, is_snappy), 0, about[1], _PLAIN, [])
        elif kind in (_DATA, _DATA_V2):
            about = header[5 if kind == _DATA else 8]
            num_values = about[1]
            if num_values > column.num_values - len(places):
                raise Unlocatable("more values than expected")
            if kind == _DATA:
                page = Page(file, start, stored, size, is_snappy)
                skip = _measure_levels(page, num_values, column.max_level)
                places += _list_values(page, skip, num_values, about[2], dictionary)
            else:
                if about.get(2, 0) or about.get(6, 0):
                    raise Unlocatable("nulls or lists")
                levels = about.get(5, 0)  # bytes of them, in front and uncompressed
                is_packed = is_snappy and about.get(7, True)
                page = Page(file, start + levels, stored - levels, size - levels, is_packed)
                places += _list_values(page, 0, num_values, about[4], dictionary)
        # Pages of other kinds (indices) are passed over, as the format asks.
    return places


class Page:
    """The content of a page, `size` bytes, of which a part is found without decompressing the rest.

    Raises Unlocatable for a Snappy stream of another length, or one that is not made of fragments.
    """

    def __init__(self, file: OpenFile, offset: int, stored: int, size: int, is_snappy: bool) -> None:
        self._file, self._offset, self.size = file, offset, size
        self._fragments: list[int] = []  # where each begins in the file, and where the last one ends
        self._literals: list[tuple[int, int, int]] = []  # start in the content, size, offset in the file
        if is_snappy:
            self._walk(offset, offset + stored)
        elif stored != size:
            raise Unlocatable("a page of another length than its header says")

    def _walk(self, at: int, end: int) -> None:
        """Follow the stream's tags: a literal's bytes are in the file, a copy's come from further up in the content."""
        window, base = self._file.read(at, min(_WINDOW_BYTES, end - at)), at
        size, used = _read_varint(window, 0)
        at += used
        begin = out = 0  # of the fragment, and of what the next tag stands for
        self._fragments.append(at)
        while at < end:
            if at + 5 > base + len(window) and base + len(window) < end:
                window, base = self._file.read(at, min(_WINDOW_BYTES, end - at)), at
            here = at - base + 1
            tag, kind = window[here - 1], window[here - 1] & 3
            length = (tag >> 2) + 1
            if kind == 0:
                num_extra = max(length - 60, 0)
                if num_extra:
                    length = int.from_bytes(window[here : here + num_extra], "little") + 1
                self._literals.append((out, length, at + 1 + num_extra))
                at += length
            else:
                num_extra = (1, 2, 4)[kind - 1]
                back = int.from_bytes(window[here : here + num_extra], "little")
                if kind == 1:
                    length, back = (tag >> 2 & 7) + 4, tag >> 5 << 8 | back
                if back > out - begin:
                    raise Unlocatable("fragments that depend on each other")
            at += 1 + num_extra
            out += length
            if out - begin >= FRAGMENT_BYTES or at >= end:
                if out - begin > FRAGMENT_BYTES:
                    raise Unlocatable("fragments of unusual size")
                self._fragments.append(at)
                begin = out
        if at != end or not out == size == self.size:
            raise Unlocatable("a stream of another length than its page")

    def place(self, at: int, size: int) -> Place:
        """Where `size` bytes of the content from `at` on are stored."""
        if at + size > self.size:
            raise Unlocatable("values that do not fill their page")
        if not self._fragments or not size:
            return Place(self._offset + at, size)
        first, last = at // FRAGMENT_BYTES, -(-(at + size) // FRAGMENT_BYTES)
        begin, end = self._fragments[first], self._fragments[last]
        skipped = first * FRAGMENT_BYTES
        return Place(begin, end - begin, at - skipped, size, min(last * FRAGMENT_BYTES, self.size) - skipped)

    def read(self, at: int, size: int) -> bytes:
        """`size` bytes of the content from `at` on, out of a literal if they are in one."""
        literal = bisect_right(self._literals, at, key=lambda literal: literal[0]) - 1
        if literal >= 0:
            start, length, offset = self._literals[literal]
            if at + size <= start + length:
                return self._file.read(offset + at - start, size)
        return read_place(self._file, self.place(at, size))


def _list_values(page: Page, at: int, num_values: int, encoding: int, dictionary: list[Place]) -> list[Place]:
    """The places of a page's values, which begin at `at`: each with its length in front, or by number."""
    if encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY):
        numbers = page.read(at, page.size - at)
        return [dictionary[number] for number in _read_hybrid(numbers[1:], numbers[0], num_values)]
    if encoding != _PLAIN:
        raise Unlocatable(f"a page of encoding {encoding}")
    places = []
    for _ in range(num_values):
        size = int.from_bytes(page.read(at, 4), "little")
        places.append(page.place(at + 4, size))
        at += 4 + size
    if at != page.size:
        raise Unlocatable("values that do not fill their page")
    return places


def _measure_levels(page: Page, num_values: int, max_level: int) -> int:
    """Bytes of the definition levels at the head of a page. Raises Unlocatable if they tell of nulls."""
    if not max_level:
        return 0
    size = int.from_bytes(page.read(0, 4), "little")
    if set(_read_hybrid(page.read(4, size), max_level.bit_length(), num_values)) - {max_level}:
        raise Unlocatable("nulls")
    return 4 + size


def _read_hybrid(data: bytes, width: int, num_values: int) -> list[int]:
    """Numbers of `width` bits: runs of one number, or groups of eight packed from the lowest bit on."""
    numbers: list[int] = []
    at, mask = 0, (1 << width) - 1
    while len(numbers) < num_values:
        head, at = _read_varint(data, at)
        count, is_packed = head >> 1, head & 1
        num_bytes = count * width if is_packed else (width + 7) // 8
        bits = int.from_bytes(data[at : at + num_bytes], "little")
        at += num_bytes
        if is_packed:
            numbers += [bits >> place * width & mask for place in range(min(count * 8, num_values - len(numbers)))]
        else:
            numbers += [bits] * min(count, num_values - len(numbers))
    return numbers


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def _read_struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Fields by number of a struct in Thrift's compact form, and where it ends: what page headers are made of."""
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at, number, kind = at + 1, number + (head >> 4), head & 15
        if kind in (1, 2):  # true and false
            fields[number] = kind == 1
        elif kind in (4, 5, 6):  # whole numbers, their sign in the lowest bit
            raw, at = _read_varint(data, at)
            fields[number] = raw >> 1 ^ -(raw & 1)
        elif kind == 8:
            size, at = _read_varint(data, at)
            fields[number], at = data[at : at + size], at + size
        elif kind == 12:
            fields[number], at = _read_struct(data, at)
        else:
            raise Unlocatable(f"a page header with a field of kind {kind}")
    return fields, at + 1
