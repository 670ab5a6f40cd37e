"""Where shards are written: a folder, or a prefix in an S3 bucket.

A file appears whole under its name or not at all. In a folder it is written beside, synced and renamed; in a bucket an
upload is atomic, and a tar grows in an unnamed local file first, so that memory is bounded and a killed process leaves
nothing. Every request to a bucket is tried up to five times, here and nowhere below.
"""

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipeline.common.errors import UserError
from pipeline.common.files import sync_folder, write_atomic
from pipeline.common.machine import temporary_for
from pipeline.download import ask

BACKOFF_S = (0.5, 1.0, 2.0, 4.0)  # between attempts at one request
PART_BYTES = 32 << 20  # of an upload in parts, two of which are in memory; S3 takes 10,000, so tars of up to 312 GiB


class Item(NamedTuple):
    """A file in a store; the time of its last change is by the clock of whoever keeps the store."""

    bytes: int
    modified_s: float


@dataclass(frozen=True)
class FolderStore:
    """A folder. Its methods are those of a bucket too."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def locate(self, name: str) -> str:
        """Path or URL of a file."""
        return str(self.root / name)

    def list(self) -> dict[str, Item]:
        """All files by name; nothing if the store is not there yet."""
        found = {}
        try:
            with os.scandir(self.root) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                        status = entry.stat(follow_symlinks=False)
                        found[entry.name] = Item(status.st_size, status.st_mtime)
        except FileNotFoundError:
            return {}
        return found

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError for a name that is not there."""
        return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Write a small file atomically, making the store if need be."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomic(self.root / name, data)
        sync_folder(self.root)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A file to write to; it gets its name at the end of the block, or never."""
        path = self.root / name
        temporary = temporary_for(path)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(self.root)
        finally:
            temporary.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        (self.root / name).unlink(missing_ok=True)

    def check_room(self, num_bytes: int, *, freed_bytes: int, open_bytes: int) -> None:
        """Raise UserError unless `num_bytes` more will fit once `freed_bytes` are gone, with `open_bytes` under way."""
        folder = self.root
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        free = shutil.disk_usage(folder).free + freed_bytes
        if num_bytes > free:
            raise UserError(
                f"{self}: about {_in_gb(num_bytes)} needed, {_in_gb(free)} free on its disk; "
                "free some space or choose another --out"
            )


@dataclass(frozen=True)
class BucketStore:
    """s3://bucket/prefix. The server and the credentials come from the environment, as for every S3 client."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def locate(self, name: str) -> str:
        return f"{self}/{name}"

    def _path(self, name: str) -> str:
        return self.locate(name).removeprefix("s3://")

    def list(self) -> dict[str, Item]:
        prefix = f"{self.prefix}/" if self.prefix else ""
        found: dict[str, Item] = {}
        query: dict[str, Any] = {"Bucket": self.bucket, "Prefix": prefix, "Delimiter": "/"}
        while True:
            try:
                page = self._ask(lambda client: client.call_s3("list_objects_v2", **query), str(self))
            except FileNotFoundError as error:
                raise UserError(
                    f"{self}: there is no bucket {self.bucket!r}; make it, check the name, or check AWS_ENDPOINT_URL"
                ) from error
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(prefix)
                if name:  # some tools make an empty object of the prefix itself
                    found[name] = Item(entry["Size"], entry["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return found
            query["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, name: str) -> bytes:
        data: bytes = self._ask(lambda client: client.cat_file(self._path(name)), self.locate(name))
        return data

    def write(self, name: str, data: bytes) -> None:
        self._ask(lambda client: client.pipe_file(self._path(name), data), self.locate(name))

    def write_new(self, name: str, data: bytes) -> bool:
        """Write a small object where there is none; whether there was none."""

        def put(client: Any) -> bool:
            try:
                client.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return bool(client.cat_file(self._path(name)) == data)  # by an attempt whose answer was lost
            return True

        return bool(self._ask(put, self.locate(name)))

    def tell_time_s(self) -> float:
        """The time by the bucket's clock."""
        page = self._ask(lambda client: client.call_s3("list_objects_v2", Bucket=self.bucket, MaxKeys=1), str(self))
        return parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        with tempfile.TemporaryFile() as file:
            yield file
            file.flush()
            local = f"/proc/self/fd/{file.fileno()}"
            options = {"chunksize": PART_BYTES, "max_concurrency": 2}
            self._ask(lambda client: client.put_file(local, self._path(name), **options), self.locate(name))

    def delete(self, name: str) -> None:
        self._ask(lambda client: client.rm_file(self._path(name)), self.locate(name))

    def check_room(self, num_bytes: int, *, freed_bytes: int, open_bytes: int) -> None:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if open_bytes > free:
            raise UserError(
                f"{folder}: about {_in_gb(open_bytes)} needed for the tars under way, {_in_gb(free)} free; "
                "free some space, name another folder by TMPDIR, or give fewer --workers or --samples-per-shard"
            )

    def _ask(self, request: Callable[[Any], Any], where: str) -> Any:
        """The answer to `request(client)`. Raises FileNotFoundError, or UserError that says what is wrong."""
        client = _connect()
        return ask(
            lambda: request(client),
            where,
            BACKOFF_S,
            right="list, read, write and delete",
            remedy="check the server (AWS_ENDPOINT_URL) and the network, then run the same command again",
        )


@functools.cache
def _connect() -> Any:
    try:
        import s3fs
    except ImportError as error:
        raise UserError(f"s3:// needs the package s3fs ({error}); pip install 'alexnet-dali[s3]'") from error

    # Listings are not remembered: other jobs write too. Nothing is tried again below `_ask`.
    config = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60}
    client = s3fs.S3FileSystem(use_listings_cache=False, config_kwargs=config, skip_instance_cache=True)
    client.retries = 1
    return client


Store = FolderStore | BucketStore


def open_store(out: str | Path) -> Store:
    """The store at a path or an s3:// URL. Raises UserError for another kind of URL or a path that is a file."""
    scheme, mark, rest = str(out).partition("://")
    if mark:
        bucket, _, prefix = rest.partition("/")
        parts = prefix.rstrip("/").split("/")
        if scheme != "s3" or not bucket or (parts != [""] and not all(parts)):
            raise UserError(f"{out}: cannot be written to, expected a folder or s3://bucket/prefix")
        return BucketStore(bucket, "/".join(parts))
    path = Path(out).absolute()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, expected a folder; choose another --out")
    return FolderStore(path)


def _in_gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
