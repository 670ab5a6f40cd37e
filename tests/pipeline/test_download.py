"""Shards behind a URL: they come whole or not at all, each byte once, for one process or many."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pipeline import download
from pipeline.colors import ColorStats
from pipeline.download import CHECKED, find_unchecked
from pipeline.shards import ShardSet
from tests.pipeline.downloading import RANGE_BYTES, TAR, names_in, starts_asked, tar_bytes, tar_requests, tars_asked
from tools.checks.preview import copy_samples

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60  # far beyond what anything here takes, and less than what a client waits for a server
pytestmark = pytest.mark.usefixtures("without_pauses")


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
    mark = events[4:]
    assert events[:3] == begun and events[3][0] == "sync" and CHECKED in events[3][1]
    assert mark == [("name", CHECKED), ("sync", shards.root.name)]


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
