"""Shards behind a URL as a local folder of bounded size: `ShardSet.open("s3://bucket/prefix", cache_dir=..., ...)`.

The decision that shaped it: the folder holds a whole set of shards, or is refused with the numbers. Each epoch deals
all shards anew among the ranks, so a smaller cache would fetch again, every epoch, what it lacks; and DALI, resuming,
reads again what its shuffle buffer held, from far back in the epoch. What gives way to a new set is the set that was
needed longest ago and that nobody has open. Left out: fetching (fetch.py) and its order (readahead.py).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline.colors import COLOR_FILE, MEAN_IMAGE_FILE
from pipeline.common.errors import UserError
from pipeline.common.files import write_atomic
from pipeline.fetch import NUM_CONNECTIONS, Fetcher, gib, is_kept
from pipeline.manifest import MANIFEST, Manifest, Shard, index_header
from pipeline.origin import Origin

ENV_CACHE, ENV_CACHE_GIB = "ALEXNET_CACHE", "ALEXNET_CACHE_GIB"
_IN_USE = "in-use.lock"
_SET_NAME = re.compile(r"[\w.-]+-[0-9a-f]{12}", re.ASCII)


@dataclass(frozen=True, eq=False)
class Remote:
    """Where a cached set of shards comes from, and what fetches it."""

    origin: Origin
    fetcher: Fetcher
    in_use: IO[str]  # locked as long as it is open: nobody removes the folder

    @property
    def url(self) -> str:
        return self.origin.url

    def publish_colors(self, folder: Path) -> None:
        """Put the colour statistics in `folder` beside the shards. Raises UserError if that is refused."""
        for name in (MEAN_IMAGE_FILE, COLOR_FILE):  # the completion mark last
            self.origin.write(name, (folder / name).read_bytes())


def default_cache_dir() -> Path:
    """$ALEXNET_CACHE, else alexnet-dali under the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(ENV_CACHE) or Path(home) / "alexnet-dali")


def default_cache_gib() -> float | None:
    """$ALEXNET_CACHE_GIB, else no bound but the disk. Raises UserError if it is not a positive number."""
    text = os.environ.get(ENV_CACHE_GIB)
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"{ENV_CACHE_GIB} is {text!r}, expected a number of GiB above 0; set it, or unset it")
    return number


def open_cached(url: str, cache_dir: str | Path | None, cache_gib: float | None) -> tuple[Path, Manifest, Remote]:
    """The local folder for the shards at `url`, with their indices and colours; the tars follow when asked for.

    `cache_gib` bounds the tars of all sets under `cache_dir` (None: by the disk alone). Raises UserError if there is no
    finished set of shards at `url`, if it cannot be reached, or if it does not fit.
    """
    origin = Origin.open(url)
    data = origin.find(MANIFEST)
    if data is None:
        raise UserError(
            f"{origin.url}: unfinished or not a folder of shards (no {MANIFEST}); check the URL, or upload all files "
            "that `alexnet-prep shard` made"
        )
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin.url}/{MANIFEST}: not JSON ({error}); upload it again") from error
    manifest = Manifest.parse(raw, f"{origin.url}/{MANIFEST}")
    cache = Path(cache_dir) if cache_dir else default_cache_dir()
    cache_gib = default_cache_gib() if cache_gib is None else cache_gib
    name = re.sub(r"[^\w.-]", "_", origin.url.rsplit("/", 1)[-1], flags=re.ASCII) or "shards"
    root = cache / f"{name}-{hashlib.sha256(origin.url.encode() + b' ' + data).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / ".lock"):
        _make_room(cache, root, manifest, cache_gib)
        root.mkdir(exist_ok=True)
        in_use = (root / _IN_USE).open("w")
        fcntl.flock(in_use, fcntl.LOCK_SH)  # dropped when the process dies, however it does
        os.utime(in_use.fileno())
        _fetch_small_files(origin, root, manifest)
        write_atomic(root / MANIFEST, data)
    remote = Remote(origin, Fetcher(origin, root, manifest.shards), in_use)
    weakref.finalize(remote, remote.fetcher.stop)
    return root, manifest, remote


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_room(cache: Path, root: Path, manifest: Manifest, cache_gib: float | None) -> None:
    """Remove sets that nobody has open, the longest unneeded first, until this one fits; else say what it needs."""
    needed = sum(shard.bytes for shard in manifest.shards)
    parts = ", ".join(
        f"{split} {gib(sum(shard.bytes for shard in manifest.shards if shard.split == split))}"
        for split in ("train", "val")
    )
    limit = None if cache_gib is None else int(cache_gib * 2**30)
    if limit is not None and needed > limit:
        raise UserError(
            f"{cache}: these shards need {gib(needed)} ({parts}), --cache-gib allows {cache_gib:g} GiB; every epoch "
            f"reads all of them, so set --cache-gib to {needed / 2**30 + 0.005:.2f} or more"
        )
    missing = needed - sum(shard.bytes for shard in manifest.shards if is_kept(root, shard))
    others = sorted(
        (folder for folder in cache.iterdir() if folder != root and _SET_NAME.fullmatch(folder.name)),
        key=_last_needed,
    )
    sizes = {folder: _disk_bytes(folder) for folder in others}
    held = []
    for folder in others:
        fits = limit is None or needed + sum(sizes.values()) <= limit
        if fits and missing <= shutil.disk_usage(cache).free:
            return
        if _remove_unused(folder):
            del sizes[folder]
        else:
            held.append(folder.name)
    used = f"; {gib(sum(sizes.values()))} are held by sets now in use ({', '.join(held)})" if held else ""
    if limit is not None and needed + sum(sizes.values()) > limit:
        raise UserError(
            f"{cache}: these shards need {gib(needed)} ({parts}), --cache-gib allows {cache_gib:g} GiB{used}; "
            f"set it to {(needed + sum(sizes.values())) / 2**30 + 0.005:.2f} or more, or name another --cache-dir"
        )
    free = shutil.disk_usage(cache).free
    if missing > free:
        raise UserError(
            f"{cache}: {gib(missing)} of these shards are still to fetch, the disk has {gib(free)} free{used}; free "
            "some space or name another --cache-dir"
        )


def _last_needed(folder: Path) -> float:
    try:
        return (folder / _IN_USE).stat().st_mtime
    except FileNotFoundError:  # left by a removal that was cut short
        return 0.0


def _disk_bytes(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.iterdir())


def _remove_unused(folder: Path) -> bool:
    with (folder / _IN_USE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(folder)
    return True


def _fetch_small_files(origin: Origin, root: Path, manifest: Manifest) -> None:
    """Indices, colours, and a tar of the right size, still empty, for every shard: DALI opens them all at once."""
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        for _ in pool.map(lambda shard: _prepare(origin, root, shard), manifest.shards):
            pass
    for name in (COLOR_FILE, MEAN_IMAGE_FILE):  # always: they may have been computed since
        data = origin.find(name)
        if data is None:
            (root / name).unlink(missing_ok=True)
        else:
            write_atomic(root / name, data)


def _prepare(origin: Origin, root: Path, shard: Shard) -> None:
    tar = root / shard.file
    index = tar.with_suffix(".idx")
    if not index.is_file():
        data = origin.read(index.name)
        header, expected = data.split(b"\n", 1)[0].decode("ascii", "replace").strip(), index_header(shard.samples)
        if header != expected:
            raise UserError(
                f"{origin.url}/{index.name}: starts with {header[:40]!r}, expected {expected!r} (stale index); "
                "upload the shards again"
            )
        write_atomic(index, data)
    if not tar.is_file() or tar.stat().st_size != shard.bytes:
        tar.touch()
        os.truncate(tar, shard.bytes)
