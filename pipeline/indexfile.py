"""DALI's index of a shard: is it the one that goes with its tar?

The decision that shaped it: a reader believes its index, so a row too many is an image too many, a row of another place
is a crash, and neither is noticed. Every index is therefore held against the form of its rows before it is used, by one
regular expression (0.8 s for ImageNet's 1.3 million); places in the tar, which need numbers, are looked at when reading
has failed, to name the row. Left out: whether the tar has at these places what its index says (`alexnet-prep verify`).
"""

import re
from functools import cache
from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.manifest import CLS_DIGITS, ENDINGS, KEY_DIGITS, Shard, index_header
from pipeline.shards import ShardSet

_BLOCK_BYTES = 512  # of a tar: each member has a header before it, and begins at a multiple
_REMEDY = "restore it, or run `alexnet-prep shard` again with --force"


def check_index(path: Path, shard: Shard, ending: str) -> None:
    """Raises UserError naming the first row that is not of the form "jpg 512 24470 000000855.jpg cls 25600 5 ...", or
    the number of rows, if it is not the shard's. `ending`: of its images."""
    data = path.read_bytes()
    header = index_header(shard.samples).encode() + b"\n"
    rows = data.removeprefix(header)
    if len(rows) < len(data) and rows.count(b"\n") == shard.samples and _form(ending, many=True).fullmatch(rows):
        return
    for row in rows.splitlines():
        if not _form(ending).fullmatch(row + b"\n"):
            shown = row[:80].decode("ascii", "backslashreplace")
            expected = f"'{ending} OFFSET BYTES KEY.{ending} cls OFFSET {CLS_DIGITS} KEY.cls'"
            raise UserError(f"{path}: has the row {shown!r}, expected {expected}; {_REMEDY}")
    raise UserError(f"{path}: {rows.count(bytes([10]))} rows, expected {shard.samples}; {_REMEDY}")


def find_damage(shards: ShardSet, split: str) -> None:
    """Raises UserError, or OSError with the file's name, for what must have kept a split from being read, if that can
    be told from its tars' sizes and its indices."""
    shards.check(split)  # deleted or cut since the epoch began
    for shard, tar, index in zip(shards.shards(split), shards.tars(split), shards.indices(split), strict=True):
        tar.open("rb").close()
        check_index(index, shard, ENDINGS[shards.manifest.encoding])
        check_places(index, shard)


def check_places(path: Path, shard: Shard) -> None:
    """Raises UserError naming the first sample that cannot lie where the index says, by the size of its tar."""
    end = 0
    for row in path.read_text(encoding="ascii", errors="replace").splitlines()[1:]:
        words = row.split()
        for offset, size, name in zip(words[1::4], words[2::4], words[3::4], strict=True):
            first, last = int(offset), int(offset) + int(size)
            if first % _BLOCK_BYTES or first < end + _BLOCK_BYTES or last > shard.bytes:
                raise UserError(
                    f"{path}: says {name} lies at {first} to {last}, expected a multiple of {_BLOCK_BYTES} past {end}, "
                    f"within the tar's {shard.bytes} bytes; {_REMEDY}"
                )
            end = last


@cache
def _form(ending: str, *, many: bool = False) -> re.Pattern[bytes]:
    """Of one row, or of all; in each, image and label are the same sample's."""
    number, key = rb"[0-9]{1,18}", rb"([0-9]{%d})" % KEY_DIGITS
    image = rb"%b %b %b %b\.%b" % (ending.encode(), number, number, key, ending.encode())
    row = rb"%b cls %b %d \1\.cls\n" % (image, number, CLS_DIGITS)
    return re.compile(rb"(?:%b)*+" % row if many else row)
