"""What the tests of downloads share: what a bucket was asked for, and what lies in a folder."""

from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from tests.s3_server import Bucket

TAR = "train-000001.tar"
RANGE_BYTES = 40_000  # several ranges a shard


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tar_bytes(shards) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for split in ("train", "val") for path in shards.tars(split)}


def tar_requests(bucket: Bucket) -> list[tuple[str, str, str]]:
    return [request for request in bucket.requests if request[1].endswith(".tar")]


def tars_asked(bucket: Bucket) -> set[str]:
    return {path.rsplit("/", 1)[-1] for _, path, _ in tar_requests(bucket)}


def starts_asked(bucket: Bucket, name: str) -> list[int]:
    return [int(spec[6:].split("-")[0]) for _, path, spec in tar_requests(bucket) if path.endswith(name)]


def names_in(folder: Path) -> set[str]:
    """The tars, whole or in part."""
    return {path.name for path in folder.iterdir() if ".tar" in path.name}
