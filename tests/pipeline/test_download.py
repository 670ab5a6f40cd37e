"""Shards behind a URL: they come whole or not at all, each byte once, and what goes wrong is told by name."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import download
from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.download import CHECKED, find_unchecked
from pipeline.manifest import IMAGE_SIZE_PX, index_header
from pipeline.shards import ShardSet
from tests.s3_server import Bucket
from tools.checks.preview import copy_samples

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60  # far beyond what anything here takes, and less than what a client waits for a server
TAR = "train-000001.tar"
RANGE_BYTES = 40_000  # several ranges a shard


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF_S", (0.0, 0.0))
    monkeypatch.setattr(download, "OPENING_BACKOFF_S", (0.0, 0.0))
    monkeypatch.setattr(download, "POLL_S", 0.01)
    monkeypatch.setattr(download, "RANGE_BYTES", RANGE_BYTES)


@pytest.fixture(scope="module")
def whole_set(shard_dir, tmp_path_factory) -> Path:
    """Shards with colour statistics, made up: this is about their transport."""
    out = shutil.copytree(shard_dir, tmp_path_factory.mktemp("whole") / "set")
    products = [[70_000 + 1000 * (i == j) for j in range(3)] for i in range(3)]
    image_sum = np.full((IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), 100, np.int64)
    ColorStats.from_sums(1, products, image_sum, ShardSet.open(out).fingerprint).save(out)
    return out


@pytest.fixture
def url(whole_set, s3_bucket) -> str:
    return s3_bucket.upload(whole_set, "set")


@pytest.fixture
def open_shards(tmp_path):
    """Opens a URL with a cache of the test's own."""
    return lambda url, **options: ShardSet.open(url, cache_dir=tmp_path / "cache", **options)


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


# What comes


@pytest.mark.s3
def test_opening_brings_what_is_small_and_no_tar(whole_set, url, s3_bucket, open_shards):
    local, shards = ShardSet.open(whole_set), open_shards(url)
    assert shards.manifest == local.manifest and shards.fingerprint == local.fingerprint
    assert shards.location == url == f"{s3_bucket.url}/set"
    for split in ("train", "val"):
        assert [path.read_bytes() for path in shards.indices(split)] == [p.read_bytes() for p in local.indices(split)]
    stats, expected = (ColorStats.load(one.root, one.fingerprint) for one in (shards, local))
    assert (stats.mean == expected.mean).all() and (stats.mean_image == expected.mean_image).all()
    assert tar_requests(s3_bucket) == [] and names_in(shards.root) == set()


@pytest.mark.s3
def test_a_split_comes_to_the_byte_in_ranges_each_asked_for_once(whole_set, url, s3_bucket, open_shards):
    shards, local = open_shards(url), ShardSet.open(whole_set)
    shards.fetch("val")
    assert names_in(shards.root) == {path.name for path in local.tars("val")}
    shards.fetch("train", "val")
    assert tar_bytes(shards) == tar_bytes(local)
    assert set(Counter(tar_requests(s3_bucket)).values()) == {1}
    size = (whole_set / TAR).stat().st_size
    assert sorted(starts_asked(s3_bucket, TAR)) == list(range(0, size, RANGE_BYTES)) and size > 2 * RANGE_BYTES


@pytest.mark.s3
def test_a_set_that_is_there_is_neither_asked_for_nor_read_nor_written_again(
    url, s3_bucket, open_shards, monkeypatch, capsys
):
    first = open_shards(url)
    first.fetch("train", "val")
    before = {path.name: path.stat().st_mtime_ns for path in (first.root, *first.root.iterdir())}
    s3_bucket.requests.clear()
    capsys.readouterr()
    monkeypatch.setattr(download, "hash_chunks", None)
    second = open_shards(url)
    second.fetch("train", "val")
    assert second.root == first.root and tar_requests(s3_bucket) == [] and capsys.readouterr().err == ""
    assert {path.name: path.stat().st_mtime_ns for path in (first.root, *first.root.iterdir())} == before


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_any_url_that_fsspec_knows_opens(whole_set, tmp_path, open_shards, scheme):
    pytest.importorskip("fsspec")
    import fsspec

    url = f"memory://test-{tmp_path.name}/set" if scheme == "memory" else f"file://{tmp_path}/set"
    fsspec.filesystem(scheme).put(f"{whole_set}/", f"{url}/", recursive=True)
    shards = open_shards(url)
    shards.fetch("train", "val")
    assert tar_bytes(shards) == tar_bytes(ShardSet.open(whole_set))


@pytest.mark.s3
def test_several_shards_come_at_once(whole_set, url, s3_bucket, open_shards):
    holds = [s3_bucket.fail(tar.name, "hold") for tar in ShardSet.open(whole_set).tars("train")]
    with ThreadPoolExecutor() as pool:
        done = pool.submit(open_shards(url).fetch, "train")
        assert all(hold.reached.wait(DEADLINE_S) for hold in holds)  # none is answered before all are asked for
        for hold in holds:
            hold.released.set()
        done.result(DEADLINE_S)


@pytest.mark.s3
def test_what_is_being_done_is_said_once_and_in_whole_numbers(url, open_shards, capsys, monkeypatch):
    monkeypatch.setattr(download.Progress, "advance", lambda self, amount, **_: amounts.append(amount))
    amounts: list[int] = []
    shards = open_shards(url)
    shards.fetch("train")
    size = sum(shard.bytes for shard in shards.shards("train"))
    assert capsys.readouterr().err == f"{url}: downloading 4 shards, {size / 2**20:.2f} MiB, to {shards.root}\n"
    assert sum(amounts) == -(-size // 10**6) and all(isinstance(amount, int) for amount in amounts)


@pytest.mark.s3
def test_a_few_samples_cost_no_more_than_their_shards(whole_set, url, s3_bucket, open_shards, tmp_path):
    copied = copy_samples(open_shards(url), "train", [17, 20, 40], tmp_path)
    assert copied.num_samples("train") == 3 and tars_asked(s3_bucket) == {"train-000001.tar", "train-000002.tar"}
    expected = copy_samples(ShardSet.open(whole_set), "train", [17, 20, 40], tmp_path / "cache")
    assert copied.tars("train")[0].read_bytes() == expected.tars("train")[0].read_bytes()


def test_a_tar_gets_its_name_when_it_is_synced_and_is_remembered_when_its_name_is(whole_set, open_shards, monkeypatch):
    pytest.importorskip("fsspec")
    shards = open_shards(f"file://{whole_set}")
    events, fsync, replace = [], os.fsync, Path.replace

    def log_sync(descriptor: int) -> None:
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def log_replace(path: Path, target: Path) -> Path:
        events.append(("name", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", log_sync)
    monkeypatch.setattr(Path, "replace", log_replace)
    shards.keep_only("train", [shards.shards("train")[1]]).fetch("train")
    begun = [("sync", f"{TAR}.part"), ("name", TAR), ("sync", shards.root.name)]
    assert events[:3] == begun and events[-1] == ("name", CHECKED) and len(events) == 5


# Several processes, interruptions


@pytest.mark.s3
def test_of_several_readers_one_downloads_and_the_others_wait(whole_set, url, s3_bucket, open_shards, monkeypatch):
    waiting, lines = threading.Semaphore(0), []

    def note(line: str) -> None:
        lines.append(line)
        if "waiting" in line:
            waiting.release()

    monkeypatch.setattr(download, "note", note)
    readers = [open_shards(url) for _ in range(3)]
    hold = s3_bucket.fail(TAR, "hold")
    with ThreadPoolExecutor() as pool:
        done = [pool.submit(reader.fetch, "train") for reader in readers]
        assert all(waiting.acquire(timeout=DEADLINE_S) for _ in range(2))
        hold.kind = ""
        hold.times = 0
        hold.released.set()
        for one in done:
            one.result(DEADLINE_S)
    assert set(Counter(tar_requests(s3_bucket)).values()) == {1}
    root = readers[0].root
    told = f"{url}: another process is downloading to {root}; waiting for it"
    assert lines.count(told) == 2 and len(lines) == 3
    assert [path.read_bytes() for path in readers[2].tars("train")] == [
        path.read_bytes() for path in ShardSet.open(whole_set).tars("train")
    ]


PROGRAM = """
import sys
from pipeline import download
download.RANGE_BYTES = int(sys.argv.pop())
"""
FETCH = """
from pipeline.shards import ShardSet
ShardSet.open(sys.argv[1], cache_dir=sys.argv[2]).fetch("train")
"""
PCA = """
from tools.cli import main
sys.argv = ["alexnet-prep", "pca", "--shards", sys.argv[1]]
main()
"""


def start(program: str, url: str, cache: Path, range_bytes: int = RANGE_BYTES) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + program, url, str(cache), str(range_bytes)],
        cwd=ROOT,
        env={**os.environ, "ALEXNET_CACHE": str(cache)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # else ignored where a shell started us
    )


@pytest.mark.s3
def test_a_process_that_waits_goes_on_where_a_killed_one_was(
    whole_set, url, s3_bucket, open_shards, tmp_path, monkeypatch
):
    hold = s3_bucket.fail(TAR, "hold", part=f"bytes={2 * RANGE_BYTES}-")
    waiting, shards = threading.Event(), open_shards(url)
    monkeypatch.setattr(download, "note", lambda line: waiting.set() if "waiting" in line else None)
    with start(FETCH, url, tmp_path / "cache") as process, ThreadPoolExecutor() as pool:
        assert hold.reached.wait(DEADLINE_S)
        done = pool.submit(shards.fetch, "train", "val")
        assert waiting.wait(DEADLINE_S)
        assert TAR not in names_in(shards.root) and f"{TAR}.part" in names_in(shards.root)
        s3_bucket.requests.clear()
        hold.times = 0
        process.kill()
        done.result(DEADLINE_S)
        hold.released.set()
    assert min(starts_asked(s3_bucket, TAR)) == 2 * RANGE_BYTES
    assert tar_bytes(shards) == tar_bytes(ShardSet.open(whole_set))
    assert names_in(shards.root) == set(tar_bytes(shards))


@pytest.mark.s3
@pytest.mark.parametrize(("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (15, 143, "terminated")])
def test_an_interrupted_download_ends_at_once_and_keeps_what_came(
    url, s3_bucket, open_shards, tmp_path, number, status, word
):
    range_bytes = 3000  # less than a buffer of Python's
    hold = s3_bucket.fail(TAR, "hold", part=f"bytes={range_bytes}-")
    process = start(PCA, url, tmp_path / "cache", range_bytes)
    assert hold.reached.wait(DEADLINE_S)
    process.send_signal(number)
    _, said = process.communicate(timeout=DEADLINE_S / 2)  # the request under way is never answered
    assert process.returncode == status and said.endswith(f"{word}\n") and "Traceback" not in said
    hold.times = 0
    hold.released.set()
    shards = open_shards(url)
    assert (shards.root / f"{TAR}.part").stat().st_size == range_bytes
    s3_bucket.requests.clear()
    shards.fetch("train")
    assert starts_asked(s3_bucket, TAR)[0] == range_bytes


@pytest.mark.s3
@pytest.mark.parametrize("damage", ["removed", "cut", "changed", "longer"])
def test_a_shard_that_was_tampered_with_comes_again_and_no_other(whole_set, url, s3_bucket, open_shards, damage):
    shards = open_shards(url)
    shards.fetch("train", "val")
    tar = shards.tars("train")[1]
    whole = tar.read_bytes()
    if damage == "removed":
        tar.unlink()
    else:
        tar.write_bytes({"cut": whole[:1000], "changed": bytes(len(whole)), "longer": whole + b"0"}[damage])
    s3_bucket.requests.clear()
    again = open_shards(url)
    again.fetch("train", "val")
    assert tars_asked(s3_bucket) == {tar.name} and tar_bytes(again) == tar_bytes(ShardSet.open(whole_set))


@pytest.mark.s3
def test_a_part_that_is_not_what_was_downloaded_is_thrown_away(whole_set, url, s3_bucket, open_shards):
    shards = open_shards(url)
    whole = (whole_set / TAR).read_bytes()
    for data in (bytes(RANGE_BYTES), whole[:-1] + b"x", whole + b"x"):  # a power cut leaves zeros
        (shards.root / f"{TAR}.part").write_bytes(data)
        s3_bucket.requests.clear()
        shards.fetch("train")
        assert (shards.root / TAR).read_bytes() == whole and 0 in starts_asked(s3_bucket, TAR)
        (shards.root / TAR).unlink()


@pytest.mark.s3
def test_tars_put_there_by_hand_are_checked_and_not_downloaded(whole_set, url, s3_bucket, open_shards):
    shards = open_shards(url)
    for path in whole_set.glob("train-*.tar"):
        shutil.copy(path, shards.root)
    (shards.root / CHECKED).write_text('{"train-000000.tar": null, "train-000001.tar": {}, "train-000002.tar": 3')
    shards.fetch("train")
    assert tar_requests(s3_bucket) == [] and find_unchecked(shards.root, shards.shards("train")) == []


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


# Training and evaluating


def same(one, other) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.mark.s3
def test_loaders_download_their_split_alone_and_give_the_batches_of_a_local_folder(
    ready_shards, s3_bucket, open_shards, make_train, make_eval
):
    shards = open_shards(s3_bucket.upload(ready_shards, "ready"))
    evaluation = make_eval(shards=shards)
    assert tars_asked(s3_bucket) == {shard.file for shard in shards.shards("val")}
    assert all(same(one, other) for one, other in zip(evaluation, make_eval(), strict=True))
    s3_bucket.requests.clear()
    remote, local = make_train(shards=shards), make_train()
    assert tars_asked(s3_bucket) == {shard.file for shard in shards.shards("train")}
    for _ in range(2):
        assert all(same(one, other) for one, other in zip(remote, local, strict=True))


TIMING = {"images_per_s", "data_wait_fraction", "time_s"}
NARROW = ["--recipe", "demo", "--set", "width=0.0625", "--global-batch-size", "4", "--gpus", "0"]


def read_metrics(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records if record["kind"] != "event"]


@pytest.mark.s3
@pytest.mark.slow
def test_the_commands_take_a_url_and_a_run_from_a_server_equals_a_local_one(ready_shards, s3_bucket, tmp_path):
    url = s3_bucket.upload(ready_shards, "set")
    for name in ("color.json", "mean_image.npy"):
        s3_bucket.client.delete_object(Bucket=s3_bucket.name, Key=f"set/{name}")
    variables = {"ALEXNET_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(program: str, *words: object) -> str:
        command = [str(Path(sys.executable).parent / program), *map(str, words)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("alexnet-prep", "pca", "--shards", url, "--device", "cpu")
    published = ColorStats.load(
        ShardSet.open(url, cache_dir=tmp_path / "fresh").root, ShardSet.open(ready_shards).fingerprint
    )
    assert published.num_pixels == 64 * 256 * 256
    run("alexnet-train", "--shards", ready_shards, *NARROW, "--epochs", 2, "--name", "local")
    run("alexnet-train", "--shards", url, *NARROW, "--epochs", 1, "--name", "remote")
    s3_bucket.requests.clear()
    run("alexnet-train", "--resume", "--name", "remote", "--epochs", 2, "--gpus", 0)  # finds the URL in the run
    assert read_metrics(tmp_path / "runs/remote") == read_metrics(tmp_path / "runs/local")
    errors = [json.loads(run("alexnet-eval", name, "--gpus", 0, "--json")) for name in ("remote", "local")]
    assert errors[0]["top1_error"] == errors[1]["top1_error"] and errors[0]["num_images"] == 24
    assert tar_requests(s3_bucket) == []
