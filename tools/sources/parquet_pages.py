"""Where each value of a byte column lies in a Parquet file: one is read without its row group."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from tools.sources.archive import OpenFile


def read_struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Fields by number, and where the struct ends. Bytes that are none raise IndexError, ValueError or the like."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            raw, at = read_varint(data, at)
            number = _unzigzag(raw)
        fields[number], at = _read_field(data, at, head & 15)
    return fields, at + 1


def _read_field(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        raw, at = read_varint(data, at)
        return _unzigzag(raw), at
    if kind == 7:
        return data[at : at + 8], at + 8
    if kind == 8:
        size, at = read_varint(data, at)
        return data[at : at + size], at + size
    if kind == 12:
        return read_struct(data, at)
    raise ValueError(f"a field of kind {kind}")


def read_hybrid(data: bytes, width: int, num_values: int) -> list[int]:
    """Numbers of `width` bits: runs of one number, or groups of eight packed from the lowest bit on."""
    numbers: list[int] = []
    at, mask = 0, (1 << width) - 1
    while len(numbers) < num_values:
        head, at = read_varint(data, at)
        if head & 1:
            num_bytes = (head >> 1) * width
            packed = int.from_bytes(data[at : at + num_bytes], "little")
            numbers += [
                packed >> (place * width) & mask for place in range(min((head >> 1) * 8, num_values - len(numbers)))
            ]
        else:
            num_bytes = (width + 7) // 8
            numbers += [int.from_bytes(data[at : at + num_bytes], "little")] * min(head >> 1, num_values - len(numbers))
        at += num_bytes
    return numbers


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _unzigzag(value: int) -> int:
    return value >> 1 ^ -(value & 1)


def write_varint(value: int) -> bytes:
    """What `read_varint` reads."""
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)


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


_HEADER_BYTES = 1 << 16  # read at once for a page header; statistics may make it long
_MAX_SMALL_PAGE_BYTES = 64 << 20  # of indices, decoded whole
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8


class Span(NamedTuple):
    """A value: `stored` bytes of the file from `offset` on. Uncompressed if `size` is -1; else fragments of a Snappy
    stream, of whose content the value is `size` bytes from `skip` on, and which has `content` bytes."""

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


def read_span(file: OpenFile, span: Span) -> bytes:
    """The value. Raises OSError."""
    stored = file.read(span.offset, span.stored)
    if span.size < 0:
        return stored
    content = unsnap(write_varint(span.content) + stored, span.content)
    return content[span.skip : span.skip + span.size]


def locate_values(file: OpenFile, column: Column) -> list[Span]:
    """The span of each of the column chunk's values, in order. Raises Unlocatable, also for a chunk with nulls."""
    if column.codec not in ("UNCOMPRESSED", "SNAPPY"):
        raise Unlocatable(f"compressed by {column.codec}")
    try:
        return _locate(file, column)
    except Unlocatable:
        raise
    except Exception as error:  # what a damaged page leads to is not to be foreseen; a full reader will have the say
        raise Unlocatable("a page of unknown form") from error


def _locate(file: OpenFile, column: Column) -> list[Span]:
    is_snappy = column.codec == "SNAPPY"
    spans: list[Span] = []
    dictionary: list[Span] = []
    at, end = column.offset, column.offset + column.num_bytes
    while len(spans) < column.num_values:
        header, start = _read_header(file, at, end)
        kind, stored, size = header[1], header[3], header[2]
        at = start + stored
        if stored < 0 or at > end:
            raise Unlocatable("a page that reaches beyond its column")
        if kind == _DICTIONARY:
            if header[7][2] not in (_PLAIN, _PLAIN_DICTIONARY):
                raise Unlocatable(f"a dictionary of encoding {header[7][2]}")
            dictionary = _locate_plain(file, start, stored, size, 0, header[7][1], is_snappy)
        elif kind in (_DATA, _DATA_V2):
            if header[5 if kind == _DATA else 8][1] > column.num_values - len(spans):
                raise Unlocatable("more values than expected")
            spans += _locate_page(file, header, start, column.max_level, is_snappy, dictionary)
        # Pages of other kinds (indices) are passed over, as the format asks.
    if len(spans) != column.num_values:
        raise Unlocatable(f"{len(spans)} values, {column.num_values} expected")
    return spans


def _locate_page(
    file: OpenFile, header: dict[int, Any], start: int, max_level: int, is_snappy: bool, dictionary: list[Span]
) -> list[Span]:
    """The values of a data page: levels (of which all must say that the value is there), then values or indices."""
    stored, size = header[3], header[2]
    if header[1] == _DATA_V2:
        page = header[8]
        num_values, encoding, levels_size = page[1], page[4], page.get(5, 0)
        if page.get(2, 0) or page.get(6, 0):
            raise Unlocatable("nulls or lists")
        # Levels stand in front, uncompressed.
        start, stored, size = start + levels_size, stored - levels_size, size - levels_size
        is_snappy = is_snappy and page.get(7, True)
        levels_size = 0
    else:
        page = header[5]
        num_values, encoding = page[1], page[2]
        levels_size = _check_levels(_head(file, start, stored, size, is_snappy), num_values, max_level)
    if encoding == _PLAIN:
        return _locate_plain(file, start, stored, size, levels_size, num_values, is_snappy)
    if encoding not in (_PLAIN_DICTIONARY, _RLE_DICTIONARY) or size > _MAX_SMALL_PAGE_BYTES:
        raise Unlocatable(f"a page of encoding {encoding}")
    content = file.read(start, stored)
    indices = unsnap(content, size)[levels_size:] if is_snappy else content[levels_size:]
    return [dictionary[index] for index in read_hybrid(indices[1:], indices[0], num_values)]


def _check_levels(head: bytes, num_values: int, max_level: int) -> int:
    """Size of the definition levels at the head of a page. Raises Unlocatable if they tell of nulls."""
    if not max_level:
        return 0
    size = int.from_bytes(head[:4], "little")
    if len(head) < 4 + size:
        raise Unlocatable("levels of unusual length: nulls, surely")
    if set(read_hybrid(head[4 : 4 + size], max_level.bit_length(), num_values)) - {max_level}:
        raise Unlocatable("nulls")
    return 4 + size


def _head(file: OpenFile, start: int, stored: int, size: int, is_snappy: bool) -> bytes:
    """The first bytes of a page's content: of a Snappy stream, its first fragment."""
    if not is_snappy:
        return file.read(start, min(stored, FRAGMENT_BYTES))
    fragment = next(walk_fragments(file, start, stored, size))
    return fragment.decode()


# PLAIN: each value is four bytes of its length, little-endian, and the value.


def _locate_plain(
    file: OpenFile, start: int, stored: int, size: int, skip: int, num_values: int, is_snappy: bool
) -> list[Span]:
    if not is_snappy:
        return _locate_stored(file, start, stored, skip, num_values)
    values: list[tuple[int, int]] = []  # start and size in the content
    starts: list[int] = []
    at, length = skip, b""
    for fragment in walk_fragments(file, start, stored, size):
        starts.append(fragment.offset)
        while at < fragment.start + fragment.size and len(values) < num_values:
            wanted = min(4 - len(length), fragment.start + fragment.size - at)
            length += fragment.read(at, wanted)
            at += wanted
            if len(length) == 4:
                num_bytes = int.from_bytes(length, "little")
                values.append((at, num_bytes))
                at, length = at + num_bytes, b""
    if len(values) != num_values or at != size:
        raise Unlocatable("values that do not fill their page")
    starts.append(start + stored)
    spans = []
    for value, num_bytes in values:
        first, last = value // FRAGMENT_BYTES, -(-(value + num_bytes) // FRAGMENT_BYTES)
        last = max(last, first)
        content = min(last * FRAGMENT_BYTES, size) - first * FRAGMENT_BYTES
        if num_bytes == 0:
            spans.append(Span(start, 0))
            continue
        spans.append(
            Span(starts[first], starts[last] - starts[first], value - first * FRAGMENT_BYTES, num_bytes, content)
        )
    return spans


def _locate_stored(file: OpenFile, start: int, stored: int, skip: int, num_values: int) -> list[Span]:
    spans = []
    at, end = start + skip, start + stored
    for _ in range(num_values):
        num_bytes = int.from_bytes(file.read(at, 4), "little")
        spans.append(Span(at + 4, num_bytes))
        at += 4 + num_bytes
        if at > end:
            break
    if at != end:
        raise Unlocatable("values that do not fill their page")
    return spans


def _read_header(file: OpenFile, at: int, end: int) -> tuple[dict[int, Any], int]:
    data = file.read(at, min(_HEADER_BYTES, end - at))
    header, used = read_struct(data, 0)
    return header, at + used
