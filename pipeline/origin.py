"""Files behind a URL: read whole or in part, with bounded retries, and with errors that a person can act on.

The decision that shaped it: fsspec speaks the protocols, and this is the one place that knows how it fails. A file that
is not there, or may not be read, is told at once; anything else is tried again. Left out: what is read when (fetch.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.common.errors import UserError

BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # between attempts at a range of a shard: half a minute of patience
OPENING_BACKOFF_S = (0.5, 1.0)  # somebody is waiting for an answer
# What s3fs and its client repeat by themselves would multiply with the attempts here: 25 times, and minutes long.
_S3_OPTIONS: dict[str, Any] = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "ProfileNotFound")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Origin:
    """A folder behind a URL that fsspec understands (s3://bucket/prefix, memory://x, ...)."""

    url: str
    filesystem: Any
    path: str

    @classmethod
    def open(cls, url: str) -> "Origin":
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
        """The bytes [start, end) of a file, or all of it. Raises UserError once the attempts are used up."""
        data = self._try(name, start, end, BACKOFF_S)
        if data is None:
            raise UserError(f"{self.url}/{name}: no such file or bucket; check the URL, or upload the shards again")
        return data

    def find(self, name: str) -> bytes | None:
        """All of a small file, or None if it is not there. As `read`, but less patient."""
        return self._try(name, None, None, OPENING_BACKOFF_S)

    def write(self, name: str, data: bytes) -> None:
        """Put a small file there, replacing one of that name. Raises UserError if that is refused."""
        try:
            self.filesystem.pipe_file(f"{self.path}/{name}", data)
        except Exception as error:  # each protocol raises its own
            raise UserError(
                f"{self.url}/{name}: cannot be written ({one_line(error)}); check that you may write there"
            ) from error

    def _try(self, name: str, start: int | None, end: int | None, backoff_s: Sequence[float]) -> bytes | None:
        def request() -> bytes:
            data: bytes = self.filesystem.cat_file(f"{self.path}/{name}", start=start, end=end)
            if start is not None and end is not None and len(data) != end - start:
                raise EOFError(f"got {len(data)} bytes at {start}, expected {end - start} (truncated, or replaced?)")
            return data

        try:
            return ask(
                request,
                f"{self.url}/{name}",
                backoff_s,
                right="read",
                remedy="check that the file is whole, the server (AWS_ENDPOINT_URL) and the network",
            )
        except FileNotFoundError:
            return None


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
