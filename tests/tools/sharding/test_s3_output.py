"""Output in a bucket: the same bytes as in a folder, resumed, locked, and with clear words when it cannot be."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.common.machine import is_running, machine_id, started_ticks
from pipeline.shards import ShardSet
from tests.sharding import BROKEN, PREP, hash_output, make, prep, wait_until, wait_until_gone
from tools.sharding import lock as locking
from tools.sharding import store as storing
from tools.sharding.lock import LAPSE_S, Part, is_lock, lock_store
from tools.sharding.store import BucketStore, FolderStore, open_store

pytestmark = pytest.mark.s3
ROOT = Path(__file__).parents[3]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(storing, "BACKOFF_S", (0.0, 0.0, 0.0, 0.0))


def read_bucket(bucket, prefix: str) -> dict[str, bytes]:
    listed = bucket.client.list_objects_v2(Bucket=bucket.name, Prefix=f"{prefix}/").get("Contents", [])
    keys = [entry["Key"] for entry in listed]
    bodies = {key: bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read() for key in keys}
    return {key.removeprefix(f"{prefix}/"): body for key, body in bodies.items()}


def hash_bucket(bucket, prefix: str) -> dict[str, str]:
    """As `hash_output` of a folder."""
    names = ("manifest.json", "failures.jsonl")
    found = read_bucket(bucket, prefix).items()
    return {n: hashlib.sha256(data).hexdigest() for n, data in found if n.endswith((".tar", ".idx")) or n in names}


def list_puts(bucket) -> list[str]:
    return [path.rpartition("/")[2] for method, path, _ in bucket.requests if method == "PUT"]


@pytest.fixture(scope="module")
def whole(small_tree, tmp_path_factory):
    return hash_output(make(small_tree, tmp_path_factory.mktemp("whole") / "out").out)


def test_a_bucket_gets_what_a_folder_would_and_nothing_else(s3_bucket, small_tree, whole):
    summary = make(small_tree, f"{s3_bucket.url}/some/prefix/")
    assert summary.out == f"{s3_bucket.url}/some/prefix" == summary.to_json()["out"]
    assert (summary.images, summary.is_complete) == ({"train": 12, "val": 4}, True)
    found = read_bucket(s3_bucket, "some/prefix")
    assert hash_bucket(s3_bucket, "some/prefix") == whole
    assert set(found) == {*whole, *(name.replace(".tar", ".json") for name in whole if name.endswith(".tar"))}


def test_shards_go_at_the_top_of_a_bucket_too(s3_bucket, small_tree):
    assert make(small_tree, s3_bucket.url).out == s3_bucket.url
    assert s3_bucket.client.head_object(Bucket=s3_bucket.name, Key="manifest.json")


def test_what_is_in_the_bucket_opens_as_a_set_of_shards(s3_bucket, small_tree, tmp_path):
    make(small_tree, f"{s3_bucket.url}/shards")
    shards = ShardSet.open(f"{s3_bucket.url}/shards", cache_dir=tmp_path / "cache")
    shards.fetch("train")
    assert shards.num_samples("train") == 12


def test_the_record_follows_tar_and_index_and_the_manifest_everything(s3_bucket, small_tree):
    make(small_tree, f"{s3_bucket.url}/out", num_workers=1)
    puts = [name for name in list_puts(s3_bucket) if not is_lock(name)]
    units = [
        f"{name}.{end}"
        for name in ("train-000000", "train-000001", "train-000002", "val-000000")
        for end in ("tar", "idx", "json")
    ]
    assert puts == ["job.json", *units, "manifest.json"]


def test_a_complete_output_is_left_alone_and_an_unfinished_one_completed(s3_bucket, small_tree, whole, capsys):
    url = f"{s3_bucket.url}/out"
    make(small_tree, url)
    s3_bucket.requests.clear()
    assert make(small_tree, url).was_complete and list_puts(s3_bucket) == []
    for name in ("manifest.json", "train-000000.json"):
        s3_bucket.client.delete_object(Bucket=s3_bucket.name, Key=f"out/{name}")
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="out/train-000001.tar", Body=b"cut")
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="out/val-000000.idx", Body=b"v1.2 4\nstale\n")
    s3_bucket.requests.clear()
    summary = make(small_tree, url)
    assert (summary.num_kept_shards, summary.num_prepared) == (1, 12)
    assert "1 of 4 shards were finished before and are kept" in capsys.readouterr().err
    assert "train-000002.tar" not in list_puts(s3_bucket) and hash_bucket(s3_bucket, "out") == whole


def test_a_complete_output_that_lost_a_tar_is_an_error_that_names_it(s3_bucket, small_tree, whole):
    url = f"{s3_bucket.url}/out"
    make(small_tree, url)
    s3_bucket.client.delete_object(Bucket=s3_bucket.name, Key="out/train-000001.tar")
    with pytest.raises(UserError, match=rf"^{url}/train-000001.tar: missing, expected \d+ bytes; .*--force"):
        make(small_tree, url)
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="out/train-000001.tar", Body=b"cut")
    with pytest.raises(UserError, match=r"train-000001.tar: 3 bytes, expected \d+"):
        make(small_tree, url)
    make(small_tree, url, force=True)
    assert hash_bucket(s3_bucket, "out") == whole


def test_other_jobs_and_other_files_are_refused_and_force_replaces_only_ours(s3_bucket, small_tree, whole):
    url = f"{s3_bucket.url}/out"
    make(small_tree, url, samples_per_shard=2)
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="out/notes.txt", Body=b"mine")
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="out/color.json", Body=b"old")
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="out/deeper/train-000000.tar", Body=b"theirs")
    with pytest.raises(UserError, match=r"another job.*--force"):
        make(small_tree, url)
    make(small_tree, url, force=True)
    found = read_bucket(s3_bucket, "out")
    assert found["notes.txt"] == b"mine" and found["deeper/train-000000.tar"] == b"theirs" and "color.json" not in found
    assert {name: digest for name, digest in hash_bucket(s3_bucket, "out").items() if "deeper" not in name} == whole
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="foreign/data.csv", Body=b"theirs")
    with pytest.raises(UserError, match="holds 1 files that are no shards made here"):
        make(small_tree, f"{s3_bucket.url}/foreign", force=True)


def test_failures_go_there_too(s3_bucket, tree):
    (tree / "train/dog/dog_2.png").write_bytes(BROKEN)
    make(tree, f"{s3_bucket.url}/out")
    assert json.loads(read_bucket(s3_bucket, "out")["failures.jsonl"])["source"] == "train/dog/dog_2.png"


@pytest.mark.slow
def test_parts_in_processes_complete_a_bucket(s3_bucket, small_tree, whole):
    url = f"{s3_bucket.url}/out"
    command = [
        str(PREP),
        "shard",
        str(small_tree),
        "--out",
        url,
        "--samples-per-shard",
        "4",
        "--workers",
        "1",
        "--json",
    ]
    processes = [
        subprocess.Popen([*command, "--part", part], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for part in ("1/2", "2/2")
    ]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert any(json.loads(stdout)["is_complete"] for stdout, _ in told)
    assert hash_bucket(s3_bucket, "out") == whole
    assert not [name for name in read_bucket(s3_bucket, "out") if is_lock(name) or name == "job.json"]


@pytest.mark.slow
def test_a_killed_job_is_taken_up_and_its_lock_holds_nobody_up(s3_bucket, synth_tree, shard_dir):
    url = f"{s3_bucket.url}/out"
    command = [str(PREP), "shard", str(synth_tree), "--out", url, "--samples-per-shard", "16", "--workers", "1"]

    def list_records():
        return [
            name
            for name in read_bucket(s3_bucket, "out")
            if name.startswith(("train", "val")) and name.endswith(".json")
        ]

    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: list_records() or process.poll() is not None, "the first record")
            process.send_signal(signal.SIGSTOP)
            refused = prep(*command[1:], status=1)
        finally:
            process.kill()  # a stopped process does not end by itself
    assert f"error: {url}: in use by process {process.pid} on " in refused.stderr
    wait_until_gone(process.pid)
    assert [name for name in read_bucket(s3_bucket, "out") if is_lock(name)]
    num_finished = len(list_records())
    done = prep(*command[1:], "--json")
    assert json.loads(done.stdout)["num_kept_shards"] == num_finished and "is stale and removed" in done.stderr
    assert hash_bucket(s3_bucket, "out") == hash_output(shard_dir)
    assert not [name for name in read_bucket(s3_bucket, "out") if is_lock(name)]


def write_lock(store, **changes) -> None:
    """A lock of a process on another machine."""
    raw = {
        "job": "j", "part": None, "host": "node07", "machine": "0123abcd", "pid": 1, "ticks": 1, "started": "then",
        "command": "shard", **changes,
    }  # fmt: skip
    store.write(".lock", json.dumps(raw).encode())


def list_locks(store) -> list[str]:
    return list(filter(is_lock, store.list()))


def test_a_lock_of_another_machine_holds_until_it_is_old_by_the_clock_of_the_bucket(s3_bucket, monkeypatch):
    store = open_store(f"{s3_bucket.url}/out")
    write_lock(store)
    with (
        pytest.raises(UserError, match=r"in use by process 1 on 'node07' .* last heard of \d s ago, .* after 180 s"),
        lock_store(store, "j", None),
    ):
        pass
    usual = BucketStore.tell_time_s
    assert abs(usual(store) - store.list()[".lock"].modified_s) < 60
    monkeypatch.setattr(BucketStore, "tell_time_s", lambda self: usual(self) + LAPSE_S + 60)
    with lock_store(store, "j", Part(1, 2)):
        assert list_locks(store) == [".lock-1-of-2"]
    assert list_locks(store) == []


def test_a_process_that_got_the_number_of_a_dead_one_does_not_hold_its_lock(s3_bucket, monkeypatch, capsys):
    store = open_store(f"{s3_bucket.url}/out")
    pid, ticks = os.getpid(), started_ticks(os.getpid())
    assert is_running(pid) and is_running(pid, ticks) and not is_running(pid, ticks - 1)
    monkeypatch.setattr(BucketStore, "tell_time_s", lambda self: 4e9)  # however long it was silent
    write_lock(store, machine=machine_id(), pid=pid, ticks=ticks)
    with pytest.raises(UserError, match=f"in use by process {pid} "), lock_store(store, "j", None):
        pass
    write_lock(store, machine=machine_id(), pid=pid, ticks=ticks - 1)
    with lock_store(store, "j", None):
        assert list_locks(store) == [".lock"]
    assert f"the lock of process {pid} on 'node07' since then (shard) is stale" in capsys.readouterr().err


def test_an_attempt_whose_answer_was_lost_does_not_refuse_itself(s3_bucket):
    store = open_store(f"{s3_bucket.url}/out")
    assert [store.write_new("one", data) for data in (b"1", b"1", b"2")] == [True, True, False]
    assert store.read("one") == b"1"


def test_the_lock_of_a_bucket_is_refreshed_while_it_is_held(s3_bucket, monkeypatch):
    monkeypatch.setattr(locking, "REFRESH_S", 0.01)
    store = open_store(f"{s3_bucket.url}/out")
    with lock_store(store, "j", None) as check:
        wait_until(lambda: list_puts(s3_bucket).count(".lock") > 2, "refreshing")
        check()
    assert list_locks(store) == []


@pytest.mark.parametrize("taken", [True, False])
def test_who_was_taken_for_dead_is_told_and_does_not_take_the_lock_back(s3_bucket, monkeypatch, taken):
    store = open_store(f"{s3_bucket.url}/out")
    with lock_store(store, "j", None) as check:
        check()
        monkeypatch.setattr(locking, "LAPSE_S", 0.0)  # as after a long sleep
        if taken:
            write_lock(store)
        else:
            store.delete(".lock")
        with pytest.raises(UserError, match=r"the lock of this job is gone.*run the same command again"):
            check()
    assert list_locks(store) == [".lock"] * taken


def test_a_refresh_that_fails_is_no_loss_until_it_is_known_to_be_one(s3_bucket, monkeypatch):
    store = open_store(f"{s3_bucket.url}/out")
    with lock_store(store, "j", None) as check:

        def fail(_self, _name):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(BucketStore, "read", fail)
        check()
        monkeypatch.setattr(locking, "LAPSE_S", 0.0)  # from now on each check asks
        check()
        monkeypatch.undo()
        monkeypatch.setattr(locking, "LAPSE_S", 0.0)
        store.delete(".lock")
        with pytest.raises(UserError, match="is gone"):
            check()


# What goes wrong


def test_a_bucket_that_is_not_there_is_named(s3_bucket, small_tree):
    with pytest.raises(UserError, match=r"^s3://no-such-bucket/x: there is no bucket 'no-such-bucket'; make it"):
        make(small_tree, "s3://no-such-bucket/x")


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_access_denied_is_said_at_once(s3_bucket, small_tree, method):
    fault = s3_bucket.fail(f"/{s3_bucket.name}", 403, 100, method)
    with pytest.raises(UserError, match=r"access denied .*AWS_ACCESS_KEY_ID") as caught:
        make(small_tree, f"{s3_bucket.url}/out")
    assert fault.times >= 98 and "\n" not in str(caught.value)


def test_missing_credentials_are_said(s3_bucket, small_tree, impatient):
    variables = {k: v for k, v in os.environ.items() if k not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    arguments = [str(PREP), "shard", str(small_tree), "--out", f"{s3_bucket.url}/out"]
    done = subprocess.run(arguments, env=variables, capture_output=True, text=True, check=False, timeout=120)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith(f"error: {s3_bucket.url}/out: no credentials"), done.stderr
    assert "set AWS_ACCESS_KEY_ID" in last


def test_a_server_that_is_down_is_tried_five_times_and_named(small_tree, s3_bucket, monkeypatch, impatient):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    storing._connect.cache_clear()
    try:
        with pytest.raises(
            UserError, match=r"^s3://b/x: .*gave up after 5 attempts: check the server \(AWS_ENDPOINT_URL\)"
        ):
            make(small_tree, "s3://b/x")
    finally:
        storing._connect.cache_clear()


def test_a_server_that_stumbles_is_tried_again(s3_bucket, small_tree, whole, impatient):
    faults = [s3_bucket.fail("train-000001.tar", 503, 2, "PUT"), s3_bucket.fail(f"/{s3_bucket.name}", 503, 2, "GET")]
    make(small_tree, f"{s3_bucket.url}/out")
    assert [fault.times for fault in faults] == [0, 0] and hash_bucket(s3_bucket, "out") == whole


def test_a_server_that_stays_down_in_the_middle_ends_the_job_and_it_can_be_taken_up(s3_bucket, small_tree, whole):
    fault = s3_bucket.fail("train-000002.tar", 503, 5, "PUT")
    with pytest.raises(UserError, match=r"train-000002.tar: .*gave up after 5 attempts.*run the same command again"):
        make(small_tree, f"{s3_bucket.url}/out", num_workers=1)
    assert fault.times == 0 and "manifest.json" not in read_bucket(s3_bucket, "out")
    assert make(small_tree, f"{s3_bucket.url}/out").num_kept_shards == 2
    assert hash_bucket(s3_bucket, "out") == whole


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://", "s3:///x", "s3://bucket/a//b", "http://host/x", "://"])
def test_other_urls_are_refused(url):
    with pytest.raises(UserError, match=r"cannot be written to, expected a folder or s3://bucket/prefix"):
        open_store(url)


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    storing._connect.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'alexnet-dali\[s3\]'"):
        open_store("s3://bucket/x").list()


# Room and memory


def test_room_is_asked_of_the_temporary_folder_for_the_tars_under_way(small_tree, s3_bucket, monkeypatch):
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda path: asked.append(path) or usage(0, 0, 5 * 10**5))
    make(small_tree, f"{s3_bucket.url}/fits")  # two workers, 4 images of 30 kB each: 240 kB
    with pytest.raises(UserError, match=rf"^{tempfile.gettempdir()}: about 0.00159 GB needed .* TMPDIR.*--workers"):
        make(small_tree, f"{s3_bucket.url}/raw", encoding="raw")
    assert set(asked) == {tempfile.gettempdir()} and read_bucket(s3_bucket, "raw") == {}


def test_a_large_tar_is_uploaded_in_parts_with_bounded_memory(s3_bucket):
    """In a process of its own, as what the server keeps is memory too: 192 MiB take no more than 64."""
    program = (
        "import hashlib, os, re, sys\n"
        "from pathlib import Path\n"
        "from tools.sharding import store as storing\n"
        "storing.PART_BYTES = 8 << 20\n"
        "store, digest, block = storing.open_store(sys.argv[1]), hashlib.sha256(), os.urandom(1 << 20)\n"
        "store.write('small', b'')\n"
        "def peak_kib(): return int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
        "before = peak_kib()\n"
        "with store.create('train-000000.tar') as file:\n"
        "    for number in range(192):\n"
        "        file.write(block)\n"
        "        digest.update(block)\n"
        "print(digest.hexdigest(), peak_kib() - before)\n"
    )
    arguments = [sys.executable, "-c", program, f"{s3_bucket.url}/big"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    digest, growth_kib = done.stdout.split()
    assert int(growth_kib) < 64 << 10
    assert list_puts(s3_bucket).count("train-000000.tar") == 192 // 8
    assert hashlib.sha256(read_bucket(s3_bucket, "big")["train-000000.tar"]).hexdigest() == digest


def test_a_file_that_was_not_finished_does_not_appear_and_leaves_no_temporary(s3_bucket, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = open_store(f"{s3_bucket.url}/out")
    with contextlib.suppress(KeyboardInterrupt), store.create("train-000000.tar") as file:
        file.write(b"half")
        assert list(tmp_path.iterdir()) == []  # it has no name: nothing is left of a killed process either
        raise KeyboardInterrupt
    assert store.list() == {} and list_puts(s3_bucket) == []


# Both kinds of store do the same


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    if request.param == "folder":
        return FolderStore(tmp_path / "a" / "b")
    return open_store(f"{request.getfixturevalue('s3_bucket').url}/a/b")


def test_what_is_written_is_listed_read_replaced_and_deleted(store):
    assert store.list() == {}
    store.write("one", b"1")
    store.write("one", b"12")
    with store.create("two") as file:
        file.write(b"123")
        assert "two" not in store.list()
    listed = store.list()
    assert {name: item.bytes for name, item in listed.items()} == {"one": 2, "two": 3}
    assert all(abs(item.modified_s - time.time()) < 60 for item in listed.values())
    assert (store.read("one"), store.read("two")) == (b"12", b"123")
    assert store.locate("one") == f"{store}/one"
    for _ in range(2):
        store.delete("one")
    assert list(store.list()) == ["two"]
    with pytest.raises(FileNotFoundError):
        store.read("one")


def test_more_files_than_a_page_of_a_listing_holds_are_all_listed(s3_bucket):
    store = open_store(f"{s3_bucket.url}/many")
    for number in range(1005):
        s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=f"many/{number}", Body=b"")
    assert set(store.list()) == set(map(str, range(1005)))
