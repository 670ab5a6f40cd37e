"""Shards behind a URL as a local folder: all of them there, each of its SHA-256, before anything reads them.

A tar has its name only when it is whole and synced; until then its bytes grow in NAME.part, from which an interrupted
download goes on. CHECKED remembers what was held to its checksum, here and for shards that never were behind a URL.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, TypeVar

from pipeline.colors import COLOR_FILE, MEAN_IMAGE_FILE
from pipeline.common.console import Progress, note
from pipeline.common.errors import UserError
from pipeline.common.files import sync_folder, user_cache, write_atomic, write_json
from pipeline.manifest import MANIFEST, Manifest, Shard, check_header

ENV_CACHE = "ALEXNET_CACHE"
CHECKED = ".checked.json"  # beside shards: which files, as they are, had the SHA-256 of the manifest
NUM_CONNECTIONS = 8  # a shard each: one connection to S3 brings 50 to 90 MB/s
RANGE_BYTES = 8 << 20  # of one request: the most that an interruption loses, of each shard under way
NUM_CHECKSUM_ATTEMPTS = 3
BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # between attempts at a range of a shard: half a minute of patience
OPENING_BACKOFF_S = (0.5, 1.0)  # somebody is waiting for an answer
POLL_S = 0.5  # of a process that waits for another one's download
_LEAVE_S = 1.0  # for requests under way, when a download has failed or was interrupted
_CHUNK_BYTES = 1 << 20
# What s3fs and its client repeat by themselves would multiply with the attempts here: 25 times, and minutes long.
_S3_OPTIONS: dict[str, Any] = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "ProfileNotFound")
_SET_NAME = re.compile(r"[\w.-]+-[0-9a-f]{12}", re.ASCII)
_ELSEWHERE = f"name another folder with --cache-dir or {ENV_CACHE}"
_remembering = threading.Lock()
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Remote:
    """A folder behind a URL that fsspec understands (s3://bucket/prefix, memory://x, ...)."""

    url: str
    filesystem: Any
    path: str

    @classmethod
    def open(cls, url: str) -> "Remote":
        """Raises UserError for an unknown protocol or a missing package. Nothing is asked of the server yet."""
        is_s3 = url.partition("://")[0] in ("s3", "s3a")
        try:
            import fsspec

            options = _S3_OPTIONS if is_s3 else {}
            filesystem, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
        except ImportError as error:
            raise UserError(f"{url}: cannot be opened ({one_line(error)}); pip install 'alexnet-dali[s3]'") from error
        except Exception as error:  # an unknown protocol, a client that cannot be configured: each raises its own
            raise UserError(f"{url}: cannot be opened ({one_line(error)}); expected s3://bucket/prefix") from error
        if is_s3:
            filesystem.retries = 1
        return cls(url.rstrip("/"), filesystem, path.rstrip("/"))

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes [start, end) of a file, or all of it. Raises UserError as `ask` does, and if it is not there."""
        data = self.find(name, start, end, BACKOFF_S)
        if data is None:
            raise UserError(f"{self.url}/{name}: no such file or bucket; check the URL, or upload the shards again")
        return data

    def find(
        self, name: str, start: int | None = None, end: int | None = None, backoff_s: Sequence[float] | None = None
    ) -> bytes | None:
        """The same with less patience; None if the file is not there."""

        def request() -> bytes:
            data: bytes = self.filesystem.cat_file(f"{self.path}/{name}", start=start, end=end)
            if start is not None and end is not None and len(data) != end - start:
                raise EOFError(f"got {len(data)} bytes at {start}, expected {end - start} (truncated, or replaced?)")
            return data

        where, remedy = (
            f"{self.url}/{name}",
            "check that the file is whole, the server (AWS_ENDPOINT_URL) and the network",
        )
        with suppress(FileNotFoundError):
            return ask(request, where, backoff_s or OPENING_BACKOFF_S, right="read", remedy=remedy)
        return None

    def publish_colors(self, folder: Path) -> None:
        """Put the colour statistics in `folder` beside the shards. Raises UserError if that is refused."""
        for name in (MEAN_IMAGE_FILE, COLOR_FILE):  # the completion mark last
            try:
                self.filesystem.pipe_file(f"{self.path}/{name}", (folder / name).read_bytes())
            except Exception as error:  # each protocol raises its own
                raise UserError(
                    f"{self.url}/{name}: cannot be written ({one_line(error)}); check that you may write there"
                ) from error

    def fetch(self, root: Path, shards: Sequence[Shard]) -> None:
        """Return when these tars are in `root`, each of its SHA-256; at once if they are there already.

        One process of a machine downloads, the others wait. Raises UserError if the disk is too small, or for a shard
        that cannot be had; what has come is kept for the next time, as after an interruption.
        """
        lock = _lock(root, lambda: not find_unchecked(root, shards), self.url)
        if lock is None:
            return
        with lock:
            missing = find_unchecked(root, shards)
            if not missing:
                return
            _check_room(root, missing)
            total, num_done, counting = sum(shard.bytes for shard in missing), 0, threading.Lock()
            note(f"{self.url}: downloading {len(missing)} shards, {_size(total)}, to {root}")
            with Progress("downloading", _mb(total), "MB") as progress:

                def count(num_bytes: int) -> None:
                    nonlocal num_done
                    with counting:
                        before, num_done = num_done, num_done + num_bytes
                        progress.advance(_mb(num_done) - _mb(before))

                try:
                    _on_threads(lambda shard: self._download(root, shard), missing, lock, count)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    left = _size(total - num_done)
                    raise UserError(
                        f"{root}: the disk is full with {left} still to fetch; free as much, or {_ELSEWHERE}"
                    ) from error

    def _download(self, root: Path, shard: Shard) -> Iterator[int]:
        """Yields how many bytes more are there; fewer, if they prove to be wrong."""
        path, part = root / shard.file, root / f"{shard.file}.part"
        if path.is_file() and path.stat().st_size == shard.bytes:  # put here by hand, or not remembered
            before, digest = describe(root, shard), hashlib.sha256()
            with path.open("rb") as file:
                yield from hash_chunks(file, digest)
            if digest.hexdigest() == shard.sha256:
                return remember(root, {shard.file: before})
            yield -shard.bytes
        for _ in range(NUM_CHECKSUM_ATTEMPTS):
            digest = hashlib.sha256()
            with part.open("ab+") as file:
                file.seek(0)
                yield from hash_chunks(file, digest)
                size = file.tell()
                while size < shard.bytes:
                    data = self.read(shard.file, size, min(size + RANGE_BYTES, shard.bytes))
                    file.write(data)
                    file.flush()
                    digest.update(data)
                    size += len(data)
                    yield len(data)
                os.fsync(file.fileno())
            if digest.hexdigest() == shard.sha256:
                part.replace(path)
                sync_folder(root)
                return remember(root, {shard.file: describe(root, shard)})
            part.unlink()
            yield -size
        raise UserError(
            f"{self.url}/{shard.file}: SHA-256 is {digest.hexdigest()[:12]} after {NUM_CHECKSUM_ATTEMPTS} downloads, "
            f"expected {shard.sha256[:12]} (damaged, or changed since the manifest was read); upload the shards again"
        )

    def _fetch_index(self, root: Path, shard: Shard) -> Iterator[int]:
        name = Path(shard.file).with_suffix(".idx").name
        data = self.read(name)
        check_header(data, shard, f"{self.url}/{name}", "upload the shards again")
        write_atomic(root / name, data)
        yield len(data)


def open_remote(url: str, cache_dir: str | Path | None) -> tuple[Path, Manifest, Remote]:
    """A local folder under `cache_dir` for the shards at `url`, with their indices and colours; `fetch` brings tars.

    Raises UserError if there is no finished set of shards at `url`, or if it cannot be reached.
    """
    cache = Path(cache_dir or default_cache_dir()).absolute()
    remote = Remote.open(url)
    data = remote.find(MANIFEST)
    if data is None:
        raise UserError(
            f"{remote.url}: unfinished or not a folder of shards (no {MANIFEST}); check the URL, or upload all files "
            "that `alexnet-prep shard` made"
        )
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{remote.url}/{MANIFEST}: not JSON ({error}); upload it again") from error
    manifest = Manifest.parse(raw, f"{remote.url}/{MANIFEST}")
    name = re.sub(r"[^\w.-]", "_", remote.url.rsplit("/", 1)[-1], flags=re.ASCII) or "shards"
    root = cache / f"{name}-{hashlib.sha256(remote.url.encode() + b' ' + data).hexdigest()[:12]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{root}: cannot be made ({error.strerror}); {_ELSEWHERE}") from error

    def list_missing() -> list[Shard]:
        return [shard for shard in manifest.shards if not (root / shard.file).with_suffix(".idx").is_file()]

    if lock := _lock(root, lambda: not list_missing(), remote.url):
        with lock:
            _on_threads(lambda shard: remote._fetch_index(root, shard), list_missing(), lock, lambda _: None)
    for file in (COLOR_FILE, MEAN_IMAGE_FILE):  # always: they may have been computed since
        _put(root / file, remote.find(file))
    _put(root / MANIFEST, data)
    return root, manifest, remote


def default_cache_dir() -> Path:
    """$ALEXNET_CACHE, else alexnet-dali under the user's cache folder. Raises UserError for a user without a home."""
    named = os.environ.get(ENV_CACHE)
    folder = Path(named) if named else user_cache()
    if folder is None:
        raise UserError(
            f"no folder for shards behind a URL: neither HOME nor XDG_CACHE_HOME is set; name one with --cache-dir or "
            f"{ENV_CACHE}"
        )
    return folder


def find_unchecked(root: Path, shards: Sequence[Shard]) -> list[Shard]:
    """Those whose tar is missing, or not as it was when it had its SHA-256."""
    known = _read_checked(root)
    return [shard for shard in shards if shard.file not in known or known[shard.file] != describe(root, shard)]


def describe(root: Path, shard: Shard) -> dict[str, Any] | None:
    """By what a tar is known to be the one that was checked. None: it is not there."""
    try:
        state = (root / shard.file).stat()
    except FileNotFoundError:
        return None
    return {
        "sha256": shard.sha256, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "inode": state.st_ino
    }  # fmt: skip


def remember(root: Path, checked: dict[str, dict[str, Any] | None]) -> None:
    """That these files, so described before they were read, had their SHA-256. Where that cannot be written, they are
    read again next time."""
    with _remembering, suppress(OSError):
        write_json(root / CHECKED, _read_checked(root) | checked)
        sync_folder(root)


def _forget_lock() -> None:
    global _remembering
    _remembering = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)  # a thread that held it has no counterpart in a forked process


def _read_checked(root: Path) -> dict[str, Any]:
    try:
        found = json.loads((root / CHECKED).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: entry for name, entry in found.items() if entry} if isinstance(found, dict) else {}


def ask(request: Callable[[], Answer], where: str, backoff_s: Sequence[float], *, right: str, remedy: str) -> Answer:
    """The answer to a request to a server, repeated after each of `backoff_s` seconds while it fails.

    Raises FileNotFoundError, or UserError: access denied (to those who lack the `right` to read, ...) and missing
    credentials at once, anything else when the attempts are used up, with the `remedy`.
    """
    problem = ""
    for wait_s in (*backoff_s, None):
        try:
            return request()
        except (FileNotFoundError, MemoryError):
            raise
        except PermissionError as error:
            raise UserError(
                f"{where}: access denied ({one_line(error)}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                f"or AWS_PROFILE, and what they may {right}"
            ) from error
        except Exception as error:  # timeouts, resets, 5xx: each client has its own; the last one is told
            if type(error).__name__ in _NO_CREDENTIALS:
                raise UserError(
                    f"{where}: no credentials ({one_line(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                    "or AWS_PROFILE, or FSSPEC_S3_ANON=true for a public bucket"
                ) from error
            problem = f"{type(error).__name__}: {one_line(error)}"
        if wait_s is not None:
            time.sleep(wait_s)
    raise UserError(f"{where}: {problem}; gave up after {1 + len(backoff_s)} attempts: {remedy}")


def one_line(error: BaseException) -> str:
    """The words of an error in one line; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def _mb(num_bytes: int) -> int:
    return -(-num_bytes // 10**6)


def hash_chunks(file: IO[bytes], digest: Any) -> Iterator[int]:
    """Update a digest with the rest of a file. Yields the bytes of each piece, so that whoever reads can stop."""
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        yield len(chunk)


def _put(path: Path, data: bytes | None) -> None:
    """A file with these bytes, or none. What is so already is not written: the disk may be a read-only one."""
    if data is None:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != data:
        write_atomic(path, data)


def _check_room(root: Path, shards: Sequence[Shard]) -> None:
    """Raises UserError with the numbers if the disk cannot hold what these tars still lack."""
    needed, free = 0, shutil.disk_usage(root).free
    for shard in shards:
        held = [path.stat().st_size for path in (root / shard.file, root / f"{shard.file}.part") if path.is_file()]
        needed += max(0, shard.bytes - max(held, default=0))
    if needed <= free:
        return
    others = sorted(path for path in root.parent.iterdir() if path != root and _SET_NAME.fullmatch(path.name))
    sizes = [f"{path.name} ({_size(sum(file.lstat().st_blocks * 512 for file in path.iterdir()))})" for path in others]
    hint = f"; other sets there, to be deleted if nobody needs them: {', '.join(sizes)}" if sizes else ""
    raise UserError(
        f"{root.parent}: {_size(needed)} of these shards are still to fetch, the disk has {_size(free)} free; "
        f"free some space or {_ELSEWHERE}{hint}"
    )


def _lock(root: Path, is_done: Callable[[], bool], url: str) -> IO[str] | None:
    """The folder's lock, once no other process has it; None when another one has done what there was to do."""
    file = None
    while not is_done():
        is_first, file = file is None, file or (root / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # dropped when the process dies, however it does
            return file
        except BlockingIOError:
            if is_first:
                note(f"{url}: another process is downloading to {root}; waiting for it")
            time.sleep(POLL_S)
    return None


def _on_threads(
    work: Callable[[Shard], Iterator[int]], shards: Sequence[Shard], lock: IO[str], count: Callable[[int], None]
) -> None:
    """`work` on each shard, several at once; what it yields is counted, the first error raised.

    The threads are daemons, since an interrupted process must not wait for a server; and they hold the lock, too, so
    that nobody else writes before they have ended.
    """
    left, stop, ended = iter(shards), threading.Event(), SimpleQueue[BaseException | None]()

    def run(held: int) -> None:
        failure = None
        try:
            for shard in left:  # one iterator for all threads
                for num_bytes in work(shard):
                    count(num_bytes)
                    if stop.is_set():
                        return
        except BaseException as error:  # noqa: BLE001 - a thread has no caller: raised below
            failure = error
        finally:
            os.close(held)
            ended.put(failure)

    threads = [
        threading.Thread(target=run, args=(os.dup(lock.fileno()),), name="download", daemon=True)
        for _ in range(min(NUM_CONNECTIONS, len(shards)))
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            if failure := ended.get():
                raise failure
    finally:
        stop.set()
        end_s = time.monotonic() + _LEAVE_S
        for thread in threads:
            thread.join(max(0.0, end_s - time.monotonic()))
