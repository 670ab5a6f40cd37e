"""Shards behind a URL: what goes wrong on the way, or with the folder they come to, is told by name."""

import errno
import json
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from pipeline import download
from pipeline.colors import ColorStats
from pipeline.manifest import IMAGE_SIZE_PX, index_header
from pipeline.shards import ShardSet
from tests.pipeline.downloading import RANGE_BYTES, TAR, names_in, refusal, starts_asked

pytestmark = pytest.mark.usefixtures("without_pauses")


# What goes wrong on the way


@pytest.mark.s3
@pytest.mark.parametrize("kind", [503, "cut", "flip"])
def test_a_fault_that_passes_is_not_noticed(whole_set, url, s3_bucket, open_shards, kind):
    fault = s3_bucket.fail(TAR, kind, times=2)
    shards = open_shards(url)
    shards.fetch("train")
    assert fault.times == 0 and (shards.root / TAR).read_bytes() == (whole_set / TAR).read_bytes()


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
def test_a_fault_that_stays_is_an_error_naming_the_file_which_never_gets_its_name(
    whole_set, url, s3_bucket, open_shards, kind, message
):
    fault, shards = s3_bucket.fail(TAR, kind), open_shards(url)
    told = refusal(shards.fetch, "train")
    assert told.startswith(f"{url}/{TAR}: ") and message in told
    assert TAR not in names_in(shards.root)
    assert refusal(shards.fetch, "train") == told  # and again, not a hang
    fault.times = 0
    shards.fetch("train")
    assert (shards.root / TAR).read_bytes() == (whole_set / TAR).read_bytes()


@pytest.mark.s3
def test_a_shard_missing_shortened_or_replaced_on_the_server_is_told(whole_set, url, s3_bucket, open_shards):
    key, whole = {"Bucket": s3_bucket.name, "Key": f"set/{TAR}"}, (whole_set / TAR).read_bytes()
    shards = open_shards(url)
    s3_bucket.client.delete_object(**key)
    assert f"{url}/{TAR}: no such file or bucket" in refusal(shards.fetch, "train")
    last = (len(whole) - 1) // RANGE_BYTES * RANGE_BYTES  # where the last range begins
    for body, message in (
        (whole[: last + 512], f"got 512 bytes at {last}, expected {len(whole) - last} (truncated, or replaced?)"),
        (whole[:last], "check that the file is whole"),
        (bytes(len(whole)), "damaged, or changed since the manifest was read"),
    ):
        s3_bucket.client.put_object(**key, Body=body)
        told = refusal(shards.fetch, "train")
        assert TAR in told and message in told and TAR not in names_in(shards.root)


class FullDisk:
    """A file on a disk that has room for one more range."""

    def __init__(self, file) -> None:
        self.file, self.num_written = file, 0

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        if self.num_written:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.num_written = self.file.write(data)
        return self.num_written


@pytest.mark.s3
def test_a_disk_that_fills_up_is_told_with_what_is_missing_and_what_came_is_kept(
    whole_set, url, s3_bucket, open_shards
):
    shards, open_file = open_shards(url), Path.open
    one = shards.keep_only("train", [shards.shards("train")[1]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Path,
            "open",
            lambda path, *words, **named: (FullDisk if path.suffix == ".part" else lambda file: file)(
                open_file(path, *words, **named)
            ),
        )
        told = refusal(one.fetch, "train")
    left = ((whole_set / TAR).stat().st_size - RANGE_BYTES) / 2**20
    assert told.startswith(f"{shards.root}: the disk is full with {left:.2f} MiB still to fetch; free as much, or name")
    assert (shards.root / f"{TAR}.part").read_bytes() == (whole_set / TAR).read_bytes()[:RANGE_BYTES]
    s3_bucket.requests.clear()
    one.fetch("train")
    assert starts_asked(s3_bucket, TAR)[0] == RANGE_BYTES


@pytest.mark.s3
def test_a_url_without_a_finished_set_is_refused(s3_bucket, open_shards, tmp_path):
    expected = f"{s3_bucket.url}/nothing: unfinished or not a folder of shards (no manifest.json); check the URL"
    assert refusal(open_shards, f"{s3_bucket.url}/nothing").startswith(expected)
    assert "s3://no-such-bucket/set: unfinished" in refusal(open_shards, "s3://no-such-bucket/set")
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="set/manifest.json", Body=b"{")
    assert f"{s3_bucket.url}/set/manifest.json: not JSON" in refusal(open_shards, f"{s3_bucket.url}/set")
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="set/manifest.json", Body=b"{}")
    assert f"{s3_bucket.url}/set/manifest.json: schema is None" in refusal(open_shards, f"{s3_bucket.url}/set")
    assert not (tmp_path / "cache").exists()


@pytest.mark.s3
def test_a_missing_or_stale_index_is_refused_by_name(url, s3_bucket, open_shards):
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="set/train-000002.idx", Body=b"v1.2 7\n")
    expected = f"{url}/train-000002.idx: starts with 'v1.2 7', expected {index_header(16)!r} (stale index)"
    assert expected in refusal(open_shards, url)
    s3_bucket.client.delete_object(Bucket=s3_bucket.name, Key="set/train-000002.idx")
    assert f"{url}/train-000002.idx: no such file or bucket" in refusal(open_shards, url)


@pytest.mark.s3
def test_credentials_and_a_server_that_is_down_are_told_in_one_line(url, s3_bucket, open_shards, monkeypatch):
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


def test_an_unknown_protocol_and_a_missing_package_are_told(open_shards, monkeypatch):
    pytest.importorskip("fsspec")
    assert "nosuch://x: cannot be opened" in refusal(open_shards, "nosuch://x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert "pip install 'alexnet-dali[s3]'" in refusal(open_shards, "s3://x/y")


# The folder


@pytest.fixture
def file_url(whole_set):
    pytest.importorskip("fsspec")
    return f"file://{whole_set}"


def test_without_a_home_the_flag_that_names_a_folder_is_told(file_url, monkeypatch, tmp_path):
    for variable in ("HOME", "XDG_CACHE_HOME", "ALEXNET_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    told = refusal(ShardSet.open, file_url)
    assert "neither HOME nor XDG_CACHE_HOME is set; name one with --cache-dir or ALEXNET_CACHE" in told
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ShardSet.open(file_url).root.parent == tmp_path / "xdg/alexnet-dali"
    monkeypatch.setenv("ALEXNET_CACHE", str(tmp_path / "named"))
    assert ShardSet.open(file_url).root.parent == tmp_path / "named"


def test_a_folder_that_cannot_be_made_is_named_with_the_flag(file_url, tmp_path):
    (tmp_path / "file").write_text("")
    told = refusal(ShardSet.open, file_url, cache_dir=tmp_path / "file")
    assert "cannot be made (Not a directory); name another folder with --cache-dir or ALEXNET_CACHE" in told


def test_a_disk_that_cannot_hold_the_set_is_refused_with_the_numbers_and_the_other_sets(
    whole_set, file_url, open_shards, monkeypatch, tmp_path
):
    other = open_shards(f"file://{shutil.copytree(whole_set, tmp_path / 'other')}")
    other.fetch("train", "val")
    (tmp_path / "cache/holiday-pictures").mkdir()
    shards = open_shards(file_url)
    usage, free = namedtuple("usage", "total used free"), sum(shard.bytes for shard in shards.shards("val"))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(0, 0, free))
    told = refusal(shards.fetch, "train", "val")
    needed = sum(shard.bytes for shard in shards.manifest.shards) / 2**20
    numbers = f"{needed:.2f} MiB of these shards are still to fetch, the disk has {free / 2**20:.2f} MiB free"
    assert told.startswith(f"{tmp_path / 'cache'}: {numbers}; free ")
    assert "free some space or name another folder with --cache-dir or ALEXNET_CACHE" in told
    assert re.search(rf"to be deleted if nobody needs them: {other.root.name} \([1-9]\.\d\d MiB\)$", told)
    assert names_in(shards.root) == set() and len(names_in(other.root)) == 6
    shards.fetch("val")
    train = sum(shard.bytes for shard in shards.shards("train"))
    first = shards.shards("train")[0]
    (shards.root / f"{first.file}.part").write_bytes((whole_set / first.file).read_bytes()[:1000])
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(0, 0, train - 1000))
    shards.fetch("train")  # what is there needs no room


def test_a_manifest_that_changed_on_the_server_is_another_set(whole_set, open_shards, tmp_path):
    pytest.importorskip("fsspec")
    folder = shutil.copytree(whole_set, tmp_path / "copy")
    first = open_shards(f"file://{folder}")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"seed": 5}))
    second = open_shards(f"file://{folder}")
    assert second.root != first.root and second.manifest.seed == 5 and first.root.is_dir()


@pytest.mark.s3
def test_colours_computed_since_are_seen_and_colours_taken_away_are_gone(whole_set, url, s3_bucket, open_shards):
    for name in ("color.json", "mean_image.npy"):
        s3_bucket.client.delete_object(Bucket=s3_bucket.name, Key=f"set/{name}")
    shards = open_shards(url)
    assert "color.json: missing" in refusal(ColorStats.load, shards.root, shards.fingerprint)
    s3_bucket.upload(whole_set, "set")
    shards = open_shards(url)
    assert ColorStats.load(shards.root, shards.fingerprint).num_pixels == IMAGE_SIZE_PX**2
    s3_bucket.client.delete_object(Bucket=s3_bucket.name, Key="set/color.json")
    shards = open_shards(url)
    assert "color.json: missing" in refusal(ColorStats.load, shards.root, shards.fingerprint)


@pytest.mark.s3
def test_colours_are_published_beside_the_shards_or_refused(url, s3_bucket, open_shards):
    shards = open_shards(url)
    (shards.root / "mean_image.npy").write_bytes(b"image")
    (shards.root / "color.json").write_bytes(b"colours")
    shards.remote.publish_colors(shards.root)
    for name, data in (("mean_image.npy", b"image"), ("color.json", b"colours")):
        assert s3_bucket.client.get_object(Bucket=s3_bucket.name, Key=f"set/{name}")["Body"].read() == data
    s3_bucket.fail("set/", 403, method="PUT")
    assert f"{url}/mean_image.npy: cannot be written" in refusal(shards.remote.publish_colors, shards.root)


@pytest.mark.s3
def test_a_shard_that_is_lost_while_it_is_used_is_named_with_the_right_remedy(url, open_shards):
    shards = open_shards(url)
    shards.fetch("train")
    shards.tars("train")[1].unlink()
    assert "missing, expected" in (told := refusal(shards.check, "train"))
    assert told.endswith("delete it and start again: it will be downloaded anew")
