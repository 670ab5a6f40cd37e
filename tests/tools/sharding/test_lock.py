"""The lock: one job at a time, or parts of one job together, and the dead block nobody."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.common.machine import started_ticks
from tests.sharding import wait_until
from tools.sharding import lock as locking
from tools.sharding.lock import Part, find_holders, is_lock, lock_store, refuse_held
from tools.sharding.store import FolderStore

ROOT = Path(__file__).parents[3]
HOLD = """
import sys
from pathlib import Path
from tools.sharding.lock import Part, lock_store
from tools.sharding.store import FolderStore
part = Part(*map(int, sys.argv[3].split("/"))) if sys.argv[3] else None
with lock_store(FolderStore(Path(sys.argv[1])), sys.argv[2], part):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path / "out")


def start_holder(store: FolderStore, job: str, part: str = "") -> subprocess.Popen:
    """Another process that holds the lock; close its stdin to end it."""
    command = [sys.executable, "-c", HOLD, str(store), job, part]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def list_locks(store: FolderStore) -> list[str]:
    return sorted(filter(is_lock, store.list()))


@pytest.mark.parametrize("job", ["job", "another job"])
def test_a_second_job_is_refused_and_told_who_is_there(store, job, monkeypatch):
    monkeypatch.setattr(locking, "POLL_S", "at once")  # a refusal does not sleep
    with start_holder(store, "job") as holder:
        for refuse in (lambda: lock_store(store, job, None).__enter__(), lambda: refuse_held(store, job, None)):
            with pytest.raises(UserError) as caught:
                refuse()
            text = str(caught.value)
            assert text.startswith(f"{store}: in use by process {holder.pid} on '{os.uname().nodename}' since 2")
            assert " UTC (-c " in text and str(store) in text and "\n" not in text
            assert "wait for it, stop it, choose another --out, or share one job out by --part" in text
        assert len(list_locks(store)) == 1  # the refused one left nothing
        holder.stdin.close()
    assert list_locks(store) == []
    with lock_store(store, job, None):
        assert len(list_locks(store)) == 1


@pytest.mark.parametrize(
    ("job", "part", "is_refused"),
    [
        ("job", Part(2, 8), False),
        ("job", Part(1, 8), True),  # the same part
        ("job", Part(2, 4), True),  # another division: the same shards
        ("job", None, True),
        ("another job", Part(2, 8), True),
    ],
    ids=str,
)
def test_only_different_parts_of_the_same_division_go_together(store, job, part, is_refused):
    with start_holder(store, "job", "1/8") as holder:
        if is_refused:
            with pytest.raises(UserError, match=r"for --part 1/8 \("), lock_store(store, job, part):
                pass
            assert len(list_locks(store)) == 1
        else:
            with lock_store(store, job, part):
                assert len(list_locks(store)) == 2
        holder.stdin.close()


@pytest.mark.parametrize("part", [None, Part(1, 2)], ids=["of the same name", "of another name"])
def test_the_lock_of_a_killed_process_is_removed_and_said_to_be_stale(store, capsys, part):
    holder = start_holder(store, "job")
    holder.kill()
    wait_until(lambda: started_ticks(holder.pid) is None, "death")  # a zombie: nobody has collected it yet
    assert Path(f"/proc/{holder.pid}").exists()
    assert [dead.is_alive for dead in refuse_held(store, "job", part)] == [False] and len(list_locks(store)) == 1
    with lock_store(store, "job", part):
        assert len(list_locks(store)) == 1
    assert f"the lock of process {holder.pid} on" in capsys.readouterr().err
    assert list_locks(store) == []
    holder.communicate()


def test_a_lock_of_the_version_before_is_stale_and_removed(store, capsys):
    """Such a job refreshed a file of a random name, and is over: this version is installed."""
    name = ".lock-0123456789abcdef"
    store.write(name, b'{"job": "job", "part": {"number": 2, "count": 8}, "host": "node07", "machine": "0123abcd", '
                b'"pid": 1234, "ticks": 99, "started": "then", "command": "shard", "holds": true}')  # fmt: skip
    with lock_store(store, "job", None):
        assert name not in list_locks(store)
    assert "the lock of process 1234 on 'node07' since then for --part 2/8 (shard) is stale" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b'{"part": 3}'])
def test_a_damaged_lock_holds_nobody_up_and_goes(store, content):
    store.write(".lock-1-of-2", content)
    with lock_store(store, "job", None):
        assert list_locks(store) == [".lock"]


@pytest.mark.parametrize("content", [b"", b"{"])
def test_a_lock_that_is_held_counts_whatever_is_in_it(store, content):
    with start_holder(store, "job") as holder:
        (store.root / ".lock").write_bytes(content)
        with pytest.raises(UserError, match="in use by somebody; wait for it"), lock_store(store, "job", Part(1, 2)):
            pass
        holder.stdin.close()


def test_a_lock_that_is_held_by_another_machine_refuses(store):
    """A container is one, too: there a number of a process says nothing here."""
    with start_holder(store, "job") as holder:
        path = store.root / ".lock"
        raw = json.loads(path.read_bytes())
        path.write_text(json.dumps({**raw, "machine": "0123abcd", "pid": 2**22, "ticks": 1}))
        with pytest.raises(UserError, match=f"in use by process {2**22} on"), lock_store(store, "job", None):
            pass
        holder.stdin.close()


def test_a_lock_with_line_breaks_is_still_told_in_one_line(store):
    with start_holder(store, "job") as holder:
        path = store.root / ".lock"
        raw = json.loads(path.read_bytes())
        odd = {name: "x\n\ny" + "z" * 1000 for name in ("command", "host", "started")}
        path.write_text(json.dumps({**raw, **odd}))
        with pytest.raises(UserError, match="x y") as caught, lock_store(store, "job", None):
            pass
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
        holder.stdin.close()


def test_of_many_that_start_at_once_exactly_one_gets_the_lock(store):
    winners, refused, start, end = [], [], threading.Barrier(8), threading.Barrier(8)

    def contend():
        start.wait()
        try:
            with lock_store(store, "job", None):
                winners.append(list_locks(store))
                end.wait(60)
        except UserError as error:
            refused.append(str(error))
            end.wait(60)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (winners, len(refused), list_locks(store)) == ([[".lock"]], 7, [])
    assert all("in use by" in text for text in refused)


def test_a_lock_that_its_holder_removes_while_another_opens_it_is_not_taken_for_the_new_one(store, monkeypatch):
    """What the other opened has no name any more: held, it would keep nobody out."""
    usual, path = fcntl.flock, store.root / ".lock"
    removed = []

    def remove_first(file, kind):
        if kind & fcntl.LOCK_EX and not removed:
            path.unlink()
            removed.append(True)
        usual(file, kind)

    monkeypatch.setattr(locking.fcntl, "flock", remove_first)
    with lock_store(store, "job", None):
        assert removed and path.exists() and [holder.is_alive for holder in find_holders(store)] == [True]


def test_of_two_whose_locks_have_different_names_both_may_give_way_but_never_none(store, monkeypatch):
    with lock_store(store, "job", Part(1, 2)):
        looks = []
        usual = locking.refuse_held

        def look(*arguments, **options):
            looks.append(options)
            return usual(*arguments, **options) if options else []  # the first time it was not there yet

        monkeypatch.setattr(locking, "refuse_held", look)
        with pytest.raises(UserError, match=r"for --part 1/2 \("), lock_store(store, "job", None):
            pass
        assert len(looks) == 2 and list_locks(store) == [".lock-1-of-2"]


def test_a_lock_that_was_deleted_is_told_and_one_of_another_job_stays(store):
    with lock_store(store, "job", None) as check:
        check()
        (store.root / ".lock").unlink()
        with lock_store(store, "another job", None):
            with pytest.raises(UserError, match=r"the lock of this job is gone.*run the same command again"):
                check()
            assert list_locks(store) == [".lock"]
        (store.root / ".lock").write_bytes(b"of a third")
    assert list_locks(store) == [".lock"]


def test_a_file_system_without_locks_is_one_error_that_names_the_folder(store, monkeypatch):
    def fail(_file, _kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locking.fcntl, "flock", fail)
    with pytest.raises(UserError, match=r"out: cannot be locked \(No locks available\); choose another --out"):
        lock_store(store, "job", None).__enter__()
