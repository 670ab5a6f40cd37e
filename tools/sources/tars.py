"""What is in a tar and where, from its headers alone.

The decision that shaped it: a tar is read in place, so that all we need of a member is name, offset and size; the
standard library's reader keeps an object for each and is several times slower. Understood are old, ustar, GNU and pax
headers, with long names and sizes of any length. Names are handed on as data and never opened. Left out: sparse and
compressed archives, which are refused.
"""

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.common.errors import UserError
from tools.sources.spans import OpenFile

BLOCK_BYTES = 512
_PAGE_BYTES = 4096  # what a disk is asked for anyway: a header, a label of a few bytes and the header behind it
_MAX_EXTENSION_BYTES = 1 << 20  # of a long name or a pax header
_ZEROS = bytes(BLOCK_BYTES)
_FILE_KINDS, _DIRECTORY, _SPARSE = (b"0", b"\0", b"7"), b"5", b"S"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"


class Member(NamedTuple):
    """A member: its name as stored, whether it is a file, offset and size of its content in bytes."""

    name: str
    is_file: bool
    offset: int
    size: int


class Window:
    """The bytes of a file around where we are, so that small neighbouring reads cost one system call."""

    def __init__(self, file: OpenFile, end: int) -> None:
        self._file, self._end = file, end
        self._start, self._data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, fewer at the end."""
        at = offset - self._start
        if at < 0 or at + size > len(self._data):
            wanted = min(max(size, _PAGE_BYTES - offset % _PAGE_BYTES), self._end - offset)
            self._start, self._data, at = offset, self._file.read(offset, max(wanted, 0)), 0
        return self._data[at : at + size]


def scan_tar(
    file: OpenFile, start: int = 0, size: int | None = None, *, name: str = ""
) -> Iterator[tuple[Member, Window]]:
    """The members of the tar in `size` bytes of `file` from `start` on, but for directories; with each a window to read
    a little of its content. `name` is what a message calls a tar within a tar.

    Raises UserError, naming file and offset, for what is not a tar or ends too early, OSError for what cannot be read.
    """
    end = file.num_bytes if size is None else start + size
    where = f"{file.path}, {name!r}" if name else file.path
    window = Window(file, end)
    at = start
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = window.read(at, BLOCK_BYTES)
        if not header and name and at > start:
            return  # the outer header has told its size: it cannot have been cut short
        if len(header) < BLOCK_BYTES:
            raise UserError(f"{where}: truncated: ends at byte {end}, where a header or the end mark of a tar "
                            "should be; fetch it again")  # fmt: skip
        if header == _ZEROS:
            return
        content = at + BLOCK_BYTES
        _check(header, where, at, is_first=at == start)
        kind = header[156:157]
        length = int(pax["size"]) if "size" in pax else _parse_number(header[124:136], where, at)
        stored = long_name or pax.get("path") or _join_name(header)
        if content + length > end:
            raise UserError(
                f"{where}: truncated: {stored!r} (header at byte {at}) needs {length} bytes, and the tar ends at byte "
                f"{end}; fetch it again"
            )
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            if length > _MAX_EXTENSION_BYTES:
                raise UserError(f"{where}: a name of {length} bytes at byte {at}, expected no more than "
                                f"{_MAX_EXTENSION_BYTES}; is it a tar?")  # fmt: skip
            extension = window.read(content, length)
            if kind == _LONG_NAME:
                long_name = extension.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == _PAX:
                pax = _parse_pax(extension, where, at)
        else:
            if kind == _SPARSE or any(key.startswith("GNU.sparse") for key in pax):
                raise UserError(f"{where}: {stored!r} (header at byte {at}) is stored as a sparse file, expected plain "
                                "files; make the tar again without --sparse")  # fmt: skip
            if kind != _DIRECTORY:
                yield Member(stored, kind in _FILE_KINDS, content, length), window
            long_name, pax = None, {}
        at = content + -(-length // BLOCK_BYTES) * BLOCK_BYTES


def _check(header: bytes, where: str, at: int, *, is_first: bool) -> None:
    stored = header[148:156].strip(b" \0")
    # The sum counts its own eight bytes as spaces.
    found = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if stored not in (b"%o" % found, b"%06o" % found, b"%07o" % found):
        if is_first:
            raise UserError(f"{where}: no tar, expected a tar header at byte {at}; a compressed one must be unpacked")
        raise UserError(f"{where}: damaged: no tar header at byte {at}, where one should be; fetch it again")


def _parse_number(field: bytes, where: str, at: int) -> int:
    if field[0] & 0x80:  # base 256: sizes from 8 GiB on
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise UserError(f"{where}: damaged: a member at byte {at} has no readable size; fetch it again") from error


def _join_name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _parse_pax(data: bytes, where: str, at: int) -> dict[str, str]:
    """Records of the form "<length> <key>=<value>\\n"."""
    records = {}
    while data.strip(b"\0"):
        number = data.partition(b" ")[0]
        length = int(number) if number.isdigit() else 0
        key, equals, value = data[len(number) + 1 : length - 1].partition(b"=")
        if not equals or length <= len(number) or (key == b"size" and not value.isdigit()):
            raise UserError(f"{where}: damaged: unreadable pax header at byte {at}; fetch it again")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records
