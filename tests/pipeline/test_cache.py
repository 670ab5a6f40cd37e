"""Shards behind a URL as a folder: what opens, what it costs, what gives way, what is refused with which numbers."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest

from pipeline import cache, origin
from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.fetch import is_kept
from pipeline.manifest import IMAGE_SIZE_PX, index_header
from pipeline.shards import ShardSet
from tests.s3_server import Bucket

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
DEADLINE_S = 60  # far beyond what anything here takes


@pytest.fixture(scope="module")
def whole_set(shard_dir, tmp_path_factory) -> Path:
    """Shards with colour statistics, made up: this is about their transport."""
    out = shutil.copytree(shard_dir, tmp_path_factory.mktemp("whole") / "set")
    products = [[70_000 + 1000 * (i == j) for j in range(3)] for i in range(3)]
    image_sum = np.full((IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), 100, np.int64)
    ColorStats.from_sums(1, products, image_sum, ShardSet.open(out).fingerprint).save(out)
    return out


@pytest.fixture
def open_shards(tmp_path, monkeypatch):
    """Opens a URL with a cache of the test's own and without pauses between attempts; what it opened is closed."""
    monkeypatch.setattr(origin, "BACKOFF_S", (0.0, 0.0))
    monkeypatch.setattr(origin, "OPENING_BACKOFF_S", (0.0, 0.0))
    opened = []

    def make(url, cache_dir=None, **options):
        shards = ShardSet.open(url, cache_dir=cache_dir or tmp_path / "cache", **options)
        opened.append(shards)
        return shards

    yield make
    for shards in opened:
        shards.remote.fetcher.close()


def tar_bytes(shards) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for split in ("train", "val") for path in shards.tars(split)}


def tar_requests(bucket: Bucket) -> list[tuple[str, str, str]]:
    return [request for request in bucket.requests if request[1].endswith(".tar")]


def wait_for_all(shards) -> None:
    shards.wait("train")
    shards.wait("val")


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.s3
def test_opening_fetches_what_is_small_and_leaves_the_tars(whole_set, s3_bucket, open_shards):
    local = ShardSet.open(whole_set)
    shards = open_shards(s3_bucket.upload(whole_set, "data/set"))
    assert shards.manifest == local.manifest and shards.fingerprint == local.fingerprint
    assert shards.location == f"{s3_bucket.url}/data/set"
    for split in ("train", "val"):
        assert [path.read_bytes() for path in shards.indices(split)] == [p.read_bytes() for p in local.indices(split)]
        assert [path.stat().st_size for path in shards.tars(split)] == [p.stat().st_size for p in local.tars(split)]
    assert (
        ColorStats.load(shards.root, shards.fingerprint).mean == ColorStats.load(local.root, local.fingerprint).mean
    ).all()
    assert tar_requests(s3_bucket) == []
    assert not any(is_kept(shards.root, shard) for shard in shards.manifest.shards)


@pytest.mark.s3
def test_waiting_for_a_split_brings_its_bytes_and_a_second_opening_asks_for_none(whole_set, s3_bucket, open_shards):
    url = s3_bucket.upload(whole_set, "set")
    first = open_shards(url)
    first.wait("val")
    assert [path.read_bytes() for path in first.tars("val")] == [
        p.read_bytes() for p in ShardSet.open(whole_set).tars("val")
    ]
    wait_for_all(first)
    assert tar_bytes(first) == tar_bytes(ShardSet.open(whole_set))
    s3_bucket.requests.clear()
    second = open_shards(url)
    wait_for_all(second)
    assert second.root == first.root and tar_requests(s3_bucket) == []


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_any_url_that_fsspec_knows_opens(whole_set, tmp_path, open_shards, scheme):
    pytest.importorskip("fsspec")
    import fsspec

    url = f"memory://test-{tmp_path.name}/set" if scheme == "memory" else f"file://{tmp_path}/set"
    fsspec.filesystem(scheme).put(f"{whole_set}/", f"{url}/", recursive=True)
    shards = open_shards(url)
    wait_for_all(shards)
    assert tar_bytes(shards) == tar_bytes(ShardSet.open(whole_set))


@pytest.mark.s3
def test_several_readers_of_one_folder_fetch_each_byte_once(whole_set, s3_bucket, open_shards):
    url = s3_bucket.upload(whole_set, "set")
    ranks = [open_shards(url) for _ in range(3)]
    for rank in ranks:
        rank.remote.fetcher.prefer([shard.file for shard in rank.manifest.shards])
    for rank in ranks:
        wait_for_all(rank)
    assert set(Counter(tar_requests(s3_bucket)).values()) == {1}
    assert len({rank.root for rank in ranks}) == 1 and tar_bytes(ranks[0]) == tar_bytes(ShardSet.open(whole_set))


FETCH_PROGRAM = """
import sys
from pipeline.shards import ShardSet
shards = ShardSet.open(sys.argv[1], cache_dir=sys.argv[2])
print("opened", flush=True)
shards.wait("val")
shards.remote.fetcher.prefer([shard.file for shard in shards.manifest.shards])
print("val", flush=True)
shards.wait("train")
"""


@pytest.mark.s3
def test_what_a_killed_process_left_half_done_does_not_count_and_is_fetched_by_the_next(
    whole_set, s3_bucket, open_shards, tmp_path
):
    url = s3_bucket.upload(whole_set, "set")
    faults = [s3_bucket.fail(tar.name, "hold") for tar in ShardSet.open(whole_set).tars("train")]
    command = [sys.executable, "-c", FETCH_PROGRAM, url, str(tmp_path / "cache")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["opened\n", "val\n"]
        shards = open_shards(url)
        shards.remote.fetcher.prefer([shard.file for shard in shards.shards("train")])  # all are in the other's hands
        process.send_signal(signal.SIGKILL)
    kept = {shard.file for shard in shards.manifest.shards if is_kept(shards.root, shard)}
    assert kept == {shard.file for shard in shards.shards("val")}
    for fault in faults:
        fault.released.set()
    wait_for_all(shards)
    assert tar_bytes(shards) == tar_bytes(ShardSet.open(whole_set))


@pytest.mark.s3
@pytest.mark.parametrize("damage", ["removed", "cut", "changed"])
def test_a_cached_shard_that_was_tampered_with_is_fetched_again(whole_set, s3_bucket, open_shards, damage):
    url = s3_bucket.upload(whole_set, "set")
    shards = open_shards(url)
    wait_for_all(shards)
    tar = shards.tars("train")[1]
    if damage == "removed":
        tar.unlink()
    elif damage == "cut":
        os.truncate(tar, 1000)
    else:
        tar.write_bytes(bytes(tar.stat().st_size))
    s3_bucket.requests.clear()
    again = open_shards(url)
    wait_for_all(again)
    assert {path.rsplit("/", 1)[-1] for _, path, _ in tar_requests(s3_bucket)} == {tar.name}
    assert tar_bytes(again) == tar_bytes(ShardSet.open(whole_set))


@pytest.mark.s3
def test_colours_computed_since_are_seen_and_colours_taken_away_are_gone(whole_set, s3_bucket, open_shards):
    url = s3_bucket.upload(whole_set, "set")
    s3_bucket.client.delete_object(Bucket=s3_bucket.name, Key="set/color.json")
    shards = open_shards(url)
    assert "color.json: missing" in refusal(ColorStats.load, shards.root, shards.fingerprint)
    s3_bucket.upload(whole_set, "set")
    shards = open_shards(url)
    assert ColorStats.load(shards.root, shards.fingerprint).num_pixels == IMAGE_SIZE_PX**2


@pytest.mark.s3
def test_colours_are_published_beside_the_shards_or_refused(whole_set, s3_bucket, open_shards):
    url = s3_bucket.upload(whole_set, "set")
    shards = open_shards(url)
    (shards.root / "mean_image.npy").write_bytes(b"image")
    (shards.root / "color.json").write_bytes(b"colours")
    shards.remote.publish_colors(shards.root)
    for name, data in (("mean_image.npy", b"image"), ("color.json", b"colours")):
        assert s3_bucket.client.get_object(Bucket=s3_bucket.name, Key=f"set/{name}")["Body"].read() == data
    s3_bucket.fail("set/", 403, method="PUT")
    assert f"{url}/mean_image.npy: cannot be written" in refusal(shards.remote.publish_colors, shards.root)


# What is refused at once


@pytest.mark.s3
def test_a_url_without_a_finished_set_is_refused(whole_set, s3_bucket, open_shards, tmp_path):
    expected = f"{s3_bucket.url}/nothing: unfinished or not a folder of shards (no manifest.json); check the URL"
    assert refusal(open_shards, f"{s3_bucket.url}/nothing").startswith(expected)
    assert "s3://no-such-bucket/set: unfinished" in refusal(open_shards, "s3://no-such-bucket/set")
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="set/manifest.json", Body=b"{")
    assert f"{s3_bucket.url}/set/manifest.json: not JSON" in refusal(open_shards, f"{s3_bucket.url}/set")
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="set/manifest.json", Body=b"{}")
    assert f"{s3_bucket.url}/set/manifest.json: schema is None" in refusal(open_shards, f"{s3_bucket.url}/set")
    assert not (tmp_path / "cache").exists()


@pytest.mark.s3
def test_a_missing_or_stale_index_is_refused_by_name(whole_set, s3_bucket, open_shards):
    url = s3_bucket.upload(whole_set, "set")
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="set/train-000002.idx", Body=b"v1.2 7\n")
    expected = f"{url}/train-000002.idx: starts with 'v1.2 7', expected {index_header(16)!r} (stale index)"
    assert expected in refusal(open_shards, url)
    s3_bucket.client.delete_object(Bucket=s3_bucket.name, Key="set/train-000002.idx")
    assert f"{url}/train-000002.idx: no such file or bucket" in refusal(open_shards, url)


@pytest.mark.s3
def test_credentials_and_a_server_that_is_down_are_told_in_one_line(
    whole_set, s3_bucket, open_shards, monkeypatch, tmp_path
):
    url = s3_bucket.upload(whole_set, "set")
    s3_bucket.fail("set/manifest.json", 403, times=1)
    assert f"{url}/manifest.json: access denied" in refusal(open_shards, url)
    fsspec = pytest.importorskip("fsspec")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    fsspec.filesystem("s3").clear_instance_cache()
    assert f"{url}/manifest.json: no credentials" in refusal(open_shards, url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    fsspec.filesystem("s3").clear_instance_cache()
    message = refusal(open_shards, url)
    assert f"{url}/manifest.json: " in message and "127.0.0.1:9" in message and "gave up after 3 attempts" in message


def test_an_unknown_protocol_and_a_missing_package_are_told(monkeypatch, tmp_path):
    pytest.importorskip("fsspec")
    assert "nosuch://x: cannot be opened" in refusal(ShardSet.open, "nosuch://x", cache_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert "pip install 'alexnet-dali[s3]'" in refusal(ShardSet.open, "s3://x/y", cache_dir=tmp_path)


# Space


@pytest.fixture
def file_url(whole_set):
    pytest.importorskip("fsspec")
    return f"file://{whole_set}"


def total_bytes(folder: Path) -> int:
    return sum(shard.bytes for shard in ShardSet.open(folder).manifest.shards)


def test_a_cache_that_cannot_hold_the_set_is_refused_with_the_numbers(whole_set, file_url, open_shards, tmp_path):
    needed = total_bytes(whole_set) / GIB
    message = refusal(open_shards, file_url, cache_gib=needed * 0.9)
    assert f"need {needed:.2f} GiB (train " in message and f"--cache-gib allows {needed * 0.9:g} GiB" in message
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert open_shards(file_url, cache_gib=needed).root.is_dir()


@pytest.mark.parametrize("text", ["much", "-1", "0", "nan", "inf"])
def test_a_bound_from_the_environment_is_heeded_and_nonsense_refused(
    whole_set, file_url, open_shards, monkeypatch, text
):
    monkeypatch.setenv("ALEXNET_CACHE_GIB", f"{total_bytes(whole_set) / GIB * 0.9:f}")
    assert "--cache-gib allows" in refusal(open_shards, file_url)
    monkeypatch.setenv("ALEXNET_CACHE_GIB", text)
    assert f"ALEXNET_CACHE_GIB is {text!r}, expected a number of GiB above 0" in refusal(open_shards, file_url)


def test_a_disk_that_cannot_hold_the_set_is_refused_before_anything_is_fetched(
    whole_set, file_url, open_shards, monkeypatch, tmp_path
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage(0, 0, total_bytes(whole_set) - 1))
    message = refusal(open_shards, file_url)
    assert "are still to fetch, the disk has 0.00 GiB free; free some space or name another --cache-dir" in message
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.fixture
def copies(whole_set, tmp_path):
    """Three URLs of sets alike, each its own to the cache."""
    pytest.importorskip("fsspec")
    return [f"file://{shutil.copytree(whole_set, tmp_path / f'copy{n}')}" for n in range(3)]


def test_the_set_needed_longest_ago_gives_way_and_no_other(whole_set, copies, open_shards):
    two = 2.5 * total_bytes(whole_set) / GIB
    roots = []
    for age, url in enumerate(copies[:2]):
        shards = open_shards(url, cache_gib=two)
        wait_for_all(shards)
        roots.append(shards.root)
        close(shards)
        os.utime(shards.root / "in-use.lock", (1000 - age, 1000 - age))  # the second was needed before the first
    third = open_shards(copies[2], cache_gib=two)
    assert [root.exists() for root in (*roots, third.root)] == [True, False, True]


def test_a_set_in_use_does_not_give_way(whole_set, copies, open_shards):
    first = open_shards(copies[0])
    wait_for_all(first)
    message = refusal(open_shards, copies[1], cache_gib=1.5 * total_bytes(whole_set) / GIB)
    assert f"held by sets now in use ({first.root.name})" in message
    assert tar_bytes(first) == tar_bytes(ShardSet.open(whole_set))


def close(shards) -> None:
    """What the end of a process does."""
    shards.remote.fetcher.close()
    shards.remote.in_use.close()


def test_a_folder_that_is_no_set_is_never_removed(whole_set, file_url, open_shards, tmp_path):
    mine = tmp_path / "cache" / "holiday-pictures"
    mine.mkdir(parents=True)
    (mine / "one.jpg").write_bytes(bytes(10_000_000))
    open_shards(file_url, cache_gib=total_bytes(whole_set) / GIB)
    assert (mine / "one.jpg").exists()


def test_a_manifest_that_changed_on_the_server_is_another_set(whole_set, copies, open_shards):
    folder = Path(copies[0].removeprefix("file://"))
    first = open_shards(copies[0])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"seed": 5}))
    second = open_shards(copies[0])
    assert second.root != first.root and second.manifest.seed == 5
