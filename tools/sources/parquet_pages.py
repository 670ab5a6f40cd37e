"""Where each value of a byte column lies inside a Parquet file, so that one can be read without its row group.

The decision that shaped it: a reader of Parquet decodes whole pages, and the pages of Hugging Face's image sets hold a
hundred images. Uncompressed, a value is a span of the file. Under Snappy the page is a row of fragments of 64 KiB, each
compressed by itself (as pyarrow writes it; the format does not promise it), and the few fragments that a value
touches are a Snappy stream once a length is put in front. To find values, only the tags between the
fragments' literals are read, not the images. Whatever does not fit raises `Unlocatable`: the caller then reads row
groups. Format: apache/parquet-format (Thrift compact page headers; PLAIN and RLE_DICTIONARY), Snappy's description.
"""

from typing import Any, NamedTuple

from tools.sources.snappy import FRAGMENT_BYTES, Unlocatable, unsnap, walk_fragments
from tools.sources.spans import OpenFile
from tools.sources.thrift import read_hybrid, read_struct, write_varint

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
