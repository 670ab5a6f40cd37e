"""Fetching: what goes wrong on the way is tried again, then told by name; nothing wrong is ever kept."""

import errno
from pathlib import Path

import pytest

from pipeline import fetch, origin
from pipeline.common.errors import UserError
from pipeline.fetch import is_kept
from pipeline.shards import ShardSet

TAR = "train-000001.tar"


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(origin, "BACKOFF_S", (0.0, 0.0))
    monkeypatch.setattr(fetch, "PART_BYTES", 40_000)  # several ranges a shard


@pytest.fixture
def cached(shard_dir, s3_bucket, tmp_path):
    """The shards opened from the server; their tars not fetched yet."""
    shards = ShardSet.open(s3_bucket.upload(shard_dir, "set"), cache_dir=tmp_path / "cache")
    yield shards
    shards.remote.fetcher.close()


def refusal(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kept_names(shards) -> set[str]:
    return {shard.file for shard in shards.manifest.shards if is_kept(shards.root, shard)}


def is_equal(shards, folder: Path, name: str) -> bool:
    return (shards.root / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.s3
def test_a_shard_is_fetched_in_ranges_each_once(cached, s3_bucket, shard_dir):
    cached.wait("train")
    size = (shard_dir / TAR).stat().st_size
    ranges = sorted(
        (spec for _, path, spec in s3_bucket.requests if path.endswith(TAR)), key=lambda s: int(s[6:].split("-")[0])
    )
    assert ranges == [f"bytes={start}-{min(start + 40_000, size) - 1}" for start in range(0, size, 40_000)]
    assert len(ranges) > 1


@pytest.mark.s3
@pytest.mark.parametrize("kind", [503, "cut", "flip"])
def test_a_fault_that_passes_is_not_noticed(cached, s3_bucket, shard_dir, kind):
    fault = s3_bucket.fail(TAR, kind, times=2)
    cached.wait("train")
    assert fault.times == 0 and is_equal(cached, shard_dir, TAR)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (503, "gave up after 3 attempts: check that the file is whole"),
        (403, "access denied"),
        ("cut", "gave up after 3 attempts"),
        ("flip", "after 3 downloads, expected"),
    ],
)
def test_a_fault_that_stays_is_an_error_naming_the_file_and_the_shard_does_not_count(cached, s3_bucket, kind, message):
    s3_bucket.fail(TAR, kind)
    told = refusal(cached.wait, "train")
    assert told.startswith(f"{cached.location}/{TAR}: ") and message in told
    assert TAR not in kept_names(cached)
    assert refusal(cached.wait, "train") == told  # and again, not a hang


@pytest.mark.s3
def test_a_shard_missing_shortened_or_replaced_on_the_server_is_told(cached, s3_bucket, shard_dir, tmp_path):
    key, whole = {"Bucket": s3_bucket.name, "Key": f"set/{TAR}"}, (shard_dir / TAR).read_bytes()
    s3_bucket.client.delete_object(**key)
    assert f"{TAR}: no such file or bucket" in refusal(cached.wait, "train")
    last = (len(whole) - 1) // fetch.PART_BYTES * fetch.PART_BYTES  # where the last range begins
    for body, message in (
        (whole[: last + 512], f"got 512 bytes at {last}, expected {len(whole) - last} (truncated, or replaced?)"),
        (whole[:last], "check that the file is whole"),
        (bytes(len(whole)), "damaged, or changed since the manifest was read"),
    ):
        s3_bucket.client.put_object(**key, Body=body)
        shards = ShardSet.open(cached.location, cache_dir=tmp_path / "cache")
        told = refusal(shards.wait, "train")
        assert TAR in told and message in told and TAR not in kept_names(shards)
        shards.remote.fetcher.close()


@pytest.mark.s3
def test_a_full_disk_is_told_with_what_is_missing(cached, monkeypatch):
    def fail(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch.os, "posix_fallocate", fail)
    assert f"{cached.root}: the disk is full with 0.00 GiB still to fetch" in refusal(cached.wait, "train")
    assert kept_names(cached) == set()


@pytest.mark.s3
def test_what_is_needed_first_is_fetched_first_and_does_not_wait_for_the_rest(cached, s3_bucket, shard_dir):
    first, *others = [shard.file for shard in cached.shards("train")][::-1]
    holds = [s3_bucket.fail(name, "hold") for name in others]
    cached.remote.fetcher.prefer([first, *others])
    cached.remote.fetcher.wait([first])  # returns, though no other can arrive
    assert is_equal(cached, shard_dir, first) and kept_names(cached) == {first}
    for hold in holds:
        hold.released.set()


@pytest.mark.s3
def test_ranges_are_asked_for_in_the_order_of_need(cached, s3_bucket, monkeypatch):
    monkeypatch.setattr(fetch, "NUM_CONNECTIONS", 1)
    names = [shard.file for shard in cached.manifest.shards]
    wanted = [names[3], names[0], names[4]]
    cached.remote.fetcher.wait(wanted)
    cached.remote.fetcher.wait(names)
    asked = [path.rsplit("/", 1)[-1] for _, path, _ in s3_bucket.requests if path.endswith(".tar")]
    assert list(dict.fromkeys(asked)) == [*wanted, *(name for name in names if name not in wanted)]
    starts = [int(spec[6:].split("-")[0]) for _, path, spec in s3_bucket.requests if path.endswith(names[3])]
    assert starts == sorted(starts) and len(starts) > 1


@pytest.mark.s3
@pytest.mark.parametrize(
    ("samples", "wanted"),
    [(range(1), "0"), (range(16), "0"), (range(15, 17), "01"), (range(16, 32), "1"), (range(0), "")],
)
def test_waiting_for_samples_fetches_their_shards_first(cached, s3_bucket, samples, wanted):
    names = [f"train-00000{digit}.tar" for digit in wanted]
    others = [shard.file for shard in cached.manifest.shards if shard.file not in names]
    holds = [s3_bucket.fail(name, "hold") for name in others]
    cached.wait("train", samples)  # a hang, if it waited for others
    assert kept_names(cached) == set(names)
    for hold in holds:
        hold.released.set()


@pytest.mark.s3
def test_an_error_of_a_shard_not_needed_yet_waits_for_its_turn(cached, s3_bucket):
    first, second = (shard.file for shard in cached.shards("train")[:2])
    fault = s3_bucket.fail(second, "hold")
    cached.remote.fetcher.wait([first])
    fault.kind = 403
    fault.released.set()
    assert second in refusal(cached.remote.fetcher.wait, [second])
    cached.remote.fetcher.wait([first])


@pytest.mark.s3
def test_a_stopped_fetcher_is_told_and_not_waited_for(cached):
    cached.remote.fetcher.close()
    with pytest.raises(RuntimeError, match="the fetcher has stopped"):
        cached.wait("train")


@pytest.mark.s3
def test_a_reader_that_fails_gives_its_locks_back(cached, s3_bucket, shard_dir, tmp_path):
    s3_bucket.fail(TAR, 403, times=1)
    refusal(cached.wait, "train")
    other = ShardSet.open(cached.location, cache_dir=tmp_path / "cache")
    other.wait("train")  # a hang, if the first still held a lock
    assert is_equal(other, shard_dir, TAR)
    other.remote.fetcher.close()
