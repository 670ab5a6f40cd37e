"""A finished folder of shards, or a URL of one, opened and checked; and the one reader of DALI's index files."""

import hashlib
import os
import random
import re
import threading
import weakref
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.common.files import read_json
from pipeline.download import Remote, describe, find_unchecked, hash_chunks, open_remote, remember
from pipeline.manifest import (
    CLS_DIGITS,
    ENDINGS,
    IMAGE_SIZE_PX,
    KEY_DIGITS,
    MANIFEST,
    SPLITS,
    Manifest,
    Shard,
    check_header,
    index_header,
)

GET_VAL = "give `alexnet-prep shard` a source with val/, or --val-fraction 0.05 for a share of the training images"
_BLOCK_BYTES = 512  # of a tar: each member has a header before it, and begins at a multiple
_REMEDY = "restore it, or run `alexnet-prep shard` again with --force"


@dataclass(frozen=True)
class ShardSet:
    """A finished folder of shards. Open one with `ShardSet.open(path)`.

    Behind a URL, `root` is the local folder into which it is downloaded: everything small lies there, tars come by
    `fetch`. Whoever reads a split calls that first.
    """

    root: Path
    manifest: Manifest
    remote: Remote | None = field(default=None, compare=False, repr=False)
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(cls, root: str | Path, *, cache_dir: str | Path | None = None) -> "ShardSet":
        """The shards in `root`, checked: every tar present and of its recorded size, every index of its sample count.

        `root` may be a URL (s3://bucket/prefix and whatever fsspec knows): then the shards come to a folder in
        `cache_dir` (default: $ALEXNET_CACHE or the user's cache folder), see `fetch`. Raises UserError for a folder
        without a manifest, with one of another schema, or with a missing, truncated or stale file. Checksums are not
        read here: that would cost as long as reading the data set.
        """
        if "://" in str(root):
            return cls(*open_remote(str(root), cache_dir))
        root = Path(root)
        path = root / MANIFEST
        if not path.is_file():
            what = "unfinished or not a folder of shards" if root.is_dir() else "no such folder"
            raise UserError(
                f"{root}: {what} (no {MANIFEST}); "
                f"make it with `alexnet-prep shard SOURCE --out {quote(str(root))}`, or name another with --shards"
            )
        manifest = Manifest.parse(read_json(path), path)
        shards = cls(root.absolute(), manifest)  # the current folder may change
        for split in SPLITS:
            shards.check(split)
        return shards

    @property
    def location(self) -> str:
        """Where the shards come from: their URL, or their folder's absolute path. `open` takes it."""
        return self.remote.url if self.remote else str(self.root.resolve())

    @property
    def remedy(self) -> str:
        """What to do about a file of the set that is damaged."""
        return "delete it and start again: it will be downloaded anew" if self.remote else _REMEDY

    def fetch(self, *splits: str) -> None:
        """Return when all tars of these splits are in `root`, and check them; at once if they are there already.

        Behind a URL they are downloaded, each checked against its SHA-256, by one process a machine, while the others
        wait. Raises UserError for one not to be had, or if the disk is too small.
        """
        if self.remote:
            self.remote.fetch(self.root, [shard for split in splits for shard in self.shards(split)])
        for split in splits:
            self.check(split)

    def check(self, split: str) -> None:
        """Raises UserError naming the first tar or index of `split` that is missing, truncated, stale or, since it was
        checked first, replaced by other bytes."""
        for shard in self.shards(split):
            _check_files(self.root, shard, self.remedy)
            self._check_unchanged(shard)

    def _check_unchanged(self, shard: Shard) -> None:
        """The bytes are read only where the file is another one, or was written to, since it was looked at last."""
        status = (self.root / shard.file).stat()
        now = status.st_ino, status.st_mtime_ns
        if self._seen.setdefault(shard.file, now) == now:
            return
        with (self.root / shard.file).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise UserError(
                f"{self.root / shard.file}: was replaced while it was in use (SHA-256 {found[:12]}, expected "
                f"{shard.sha256[:12]}); restore it, and go on from a checkpoint of before"
            )
        self._seen[shard.file] = now

    def keep_only(self, split: str, kept: Collection[Shard]) -> "ShardSet":
        """The same set with these shards alone in `split`: the others are neither read nor fetched."""
        shards = tuple(shard for shard in self.manifest.shards if shard.split != split or shard in kept)
        totals = {**self.manifest.totals, split: sum(shard.samples for shard in kept)}
        return replace(self, manifest=replace(self.manifest, shards=shards, totals=totals))

    def shards(self, split: str) -> list[Shard]:
        return [shard for shard in self.manifest.shards if shard.split == split]

    def tars(self, split: str) -> list[Path]:
        return [self.root / shard.file for shard in self.shards(split)]

    def indices(self, split: str) -> list[Path]:
        return [path.with_suffix(".idx") for path in self.tars(split)]

    def num_samples(self, split: str) -> int:
        return self.manifest.totals[split]

    @property
    def num_classes(self) -> int:
        return len(self.manifest.classes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the ordered (file name, SHA-256) pairs of the training tars: what the statistics describe."""
        digest = hashlib.sha256()
        for shard in self.shards("train"):
            digest.update(f"{shard.file} {shard.sha256}\n".encode())
        return digest.hexdigest()


class Checksums:
    """Holds every tar of a split to its SHA-256, once, in a thread of its own: for a reader that takes a damaged image
    in silence. What was found sound is remembered beside the shards, and read again only if it changes."""

    def __init__(self, shards: ShardSet, split: str) -> None:
        self._result, self._process = _Result(), os.getpid()
        self._work = partial(_hash_all, shards.root.absolute(), shards.shards(split), shards.remedy, self._result)
        self._thread = threading.Thread(target=self._work, name="checksums", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._result.stop.set)  # nobody is left to be told

    def raise_if_damaged(self) -> None:
        """Raises UserError naming a damaged tar, if one was found so far."""
        if self._result.damage:
            raise UserError(self._result.damage)

    def wait(self) -> None:
        """Return when all tars were held to their checksums. Raises UserError for a damaged one."""
        if os.getpid() == self._process:
            self._thread.join()
        elif not self._result.is_done and not self._result.damage:  # a fork has no such thread
            self._work()
        self.raise_if_damaged()


@dataclass
class _Result:
    damage: str = ""
    is_done: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


def _hash_all(root: Path, shards: list[Shard], remedy: str, result: _Result) -> None:
    random.Random(os.getpid()).shuffle(shards)  # so that the ranks of a machine share the work
    for shard in shards:
        if not find_unchecked(root, [shard]):
            continue
        path, before, digest = root / shard.file, describe(root, shard), hashlib.sha256()
        try:
            with path.open("rb") as file:
                for _ in hash_chunks(file, digest):
                    if result.stop.is_set():
                        return
        except OSError as error:
            result.damage = f"{path}: cannot be read ({error.strerror}); {remedy}"
            return
        if digest.hexdigest() != shard.sha256:
            result.damage = (
                f"{path}: SHA-256 is {digest.hexdigest()[:12]}, expected {shard.sha256[:12]} (damaged, or replaced); "
                f"{remedy}"
            )
            return
        remember(root, {shard.file: before})
    result.is_done = True


def _check_files(root: Path, shard: Shard, remedy: str) -> None:
    tar = root / shard.file
    index = tar.with_suffix(".idx")
    if not tar.is_file():
        raise UserError(f"{tar}: missing, expected {shard.bytes} bytes; {remedy}")
    size = tar.stat().st_size
    if size != shard.bytes:
        raise UserError(f"{tar}: {size} bytes, expected {shard.bytes} (truncated or replaced); {remedy}")
    try:
        with index.open("rb") as file:
            check_header(file.readline(64), shard, index, remedy)
    except FileNotFoundError:
        raise UserError(f"{index}: missing; {remedy}") from None


class Index(NamedTuple):
    """Of a shard's N samples, in stored order: key, where the image begins in the tar, its bytes, where the label
    begins. int64 (N,) each."""

    keys: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]


def read_index(path: Path, shard: Shard, ending: str) -> Index:
    """What an index says. Raises UserError as check_index does."""
    words = check_index(path, shard, ending).translate(None, b"abcdefghijklmnopqrstuvwxyz.")
    offsets, sizes, keys, labels, _, _ = np.fromstring(words, np.int64, sep=" ").reshape(-1, 6).T
    return Index(keys, offsets, sizes, labels)


def check_index(path: Path, shard: Shard, ending: str) -> bytes:
    """The rows of an index. Raises UserError naming the first that is not of the form "jpg 512 24470 000000855.jpg cls
    25600 5 ...", or their number, if it is not the shard's. `ending`: of its images.

    One regular expression over all: 0.8 s for ImageNet's 1.3 million rows."""
    data = path.read_bytes()
    header = index_header(shard.samples).encode() + b"\n"
    rows = data.removeprefix(header)
    if len(rows) < len(data) and rows.count(b"\n") == shard.samples and _form(ending, many=True).fullmatch(rows):
        return rows
    for row in rows.splitlines():
        if not _form(ending).fullmatch(row + b"\n"):
            shown = row[:80].decode("ascii", "backslashreplace")
            expected = f"'{ending} OFFSET BYTES KEY.{ending} cls OFFSET {CLS_DIGITS} KEY.cls'"
            raise UserError(f"{path}: has the row {shown!r}, expected {expected}; {_REMEDY}")
    raise UserError(f"{path}: {rows.count(bytes([10]))} rows, expected {shard.samples}; {_REMEDY}")


def check_raw(path: Path, shard: Shard) -> None:
    """Raises UserError naming the first raw image that is not 256x256, or not right before its label."""
    keys, offsets, sizes, labels = read_index(path, shard, ENDINGS["raw"])
    expected = IMAGE_SIZE_PX * IMAGE_SIZE_PX * 3  # a multiple of a block: no padding follows
    wrong = np.flatnonzero((sizes != expected) | (labels != offsets + sizes + _BLOCK_BYTES))
    if len(wrong):
        at = wrong[0]
        raise UserError(
            f"{path}: sample {keys[at]:0{KEY_DIGITS}d} has {sizes[at]} bytes at {offsets[at]} and its label at "
            f"{labels[at]}, expected {expected} bytes and the label {_BLOCK_BYTES} behind them; {_REMEDY}"
        )


def find_damage(shards: ShardSet, split: str) -> None:
    """Raises UserError, or OSError with the file's name, for what must have kept a split from being read, if that can
    be told from its tars' sizes and its indices."""
    shards.check(split)  # deleted or cut since the epoch began
    for shard, tar, index in zip(shards.shards(split), shards.tars(split), shards.indices(split), strict=True):
        tar.open("rb").close()
        check_places(index, shard, ENDINGS[shards.manifest.encoding])


def check_places(path: Path, shard: Shard, ending: str) -> None:
    """Raises UserError naming the first image or label that cannot lie where the index says, by the size of its tar."""
    keys, offsets, sizes, labels = read_index(path, shard, ending)
    first = np.stack([offsets, labels], axis=1).ravel()
    last = np.stack([offsets + sizes, labels + CLS_DIGITS], axis=1).ravel()
    end = np.concatenate([[0], last])[:-1]
    wrong = np.flatnonzero((first % _BLOCK_BYTES != 0) | (first < end + _BLOCK_BYTES) | (last > shard.bytes))
    if len(wrong):
        at = wrong[0]
        name = f"{keys[at // 2]:0{KEY_DIGITS}d}.{'cls' if at % 2 else ending}"
        raise UserError(
            f"{path}: says {name} lies at {first[at]} to {last[at]}, expected a multiple of {_BLOCK_BYTES} past "
            f"{end[at]}, within the tar's {shard.bytes} bytes; {_REMEDY}"
        )


@cache
def _form(ending: str, *, many: bool = False) -> re.Pattern[bytes]:
    """Of one row, or of all; in each, image and label are the same sample's."""
    number, key = rb"[0-9]{1,18}", rb"([0-9]{%d})" % KEY_DIGITS
    image = rb"%b %b %b %b\.%b" % (ending.encode(), number, number, key, ending.encode())
    row = rb"%b cls %b %d \1\.cls\n" % (image, number, CLS_DIGITS)
    return re.compile(rb"(?:%b)*+" % row if many else row)
