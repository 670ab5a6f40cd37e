"""The lock: one job at a time, or parts of one job together, and the dead block nobody."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.common.machine import is_running, machine_id, started_ticks
from tests.sharding import wait_until
from tools.sharding import lock as locking
from tools.sharding.lock import LAPSE_S, Holder, Lock, Part, is_lock, refuse_held
from tools.sharding.store import FolderStore

ROOT = Path(__file__).parents[3]
HOLD = """
import sys
from pathlib import Path
from tools.sharding.lock import Lock, Part
from tools.sharding.store import FolderStore
part = Part(*map(int, sys.argv[3].split("/"))) if sys.argv[3] else None
with Lock(FolderStore(Path(sys.argv[1])), sys.argv[2], part):
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


def write_lock(store: FolderStore, *, age_s: float = 0.0, **changes) -> str:
    """A lock of a process on another machine, refreshed `age_s` ago."""
    name = ".lock-" + "0" * 16
    raw = {
        "job": "other",
        "part": None,
        "host": "node07",
        "machine": "0123abcd",
        "pid": 1234,
        "ticks": 99,
        "started": "2026-01-02 03:04:05 UTC",
        "command": "alexnet-prep shard x",
        "holds": True,
        **changes,
    }
    store.write(name, json.dumps(raw).encode())
    then_s = time.time() - age_s
    os.utime(store.root / name, (then_s, then_s))
    return name


@pytest.mark.parametrize("job", ["job", "another job"])
def test_a_second_job_is_refused_and_told_who_is_there(store, job, monkeypatch):
    monkeypatch.setattr(locking, "POLL_S", "at once")  # no number: it must not sleep
    with start_holder(store, "job") as holder:
        for refuse in (lambda: Lock(store, job, None).__enter__(), lambda: refuse_held(store, store.list(), job, None)):
            with pytest.raises(UserError) as caught:
                refuse()
            text = str(caught.value)
            assert text.startswith(f"{store}: in use by process {holder.pid} on '{os.uname().nodename}' since 2")
            assert " UTC (-c " in text and str(store) in text and "\n" not in text
        assert len(list_locks(store)) == 1  # the refused one left nothing
        holder.stdin.close()
    assert list_locks(store) == []
    with Lock(store, job, None):
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
            with pytest.raises(UserError, match=r"for --part 1/8 \("), Lock(store, job, part):
                pass
        else:
            with Lock(store, job, part):
                assert len(list_locks(store)) == 2
        holder.stdin.close()


def test_the_lock_of_a_killed_process_is_removed_and_said_to_be_stale(store, capsys):
    holder = start_holder(store, "job")
    holder.kill()
    wait_until(lambda: started_ticks(holder.pid) is None, "death")  # a zombie: nobody has collected it yet
    assert Path(f"/proc/{holder.pid}").exists()
    refuse_held(store, store.list(), "job", None)
    with Lock(store, "job", None):
        assert len(list_locks(store)) == 1
    assert f"the lock of process {holder.pid} on" in capsys.readouterr().err
    holder.communicate()


def test_a_process_that_got_the_number_of_a_dead_one_does_not_hold_its_lock(store):
    pid, ticks = os.getpid(), started_ticks(os.getpid())
    assert is_running(pid, ticks) and not is_running(pid, ticks - 1) and is_running(pid)
    write_lock(store, machine=machine_id(), pid=pid, ticks=ticks)
    with pytest.raises(UserError, match=f"in use by process {pid} "), Lock(store, "job", None):
        pass
    write_lock(store, machine=machine_id(), pid=pid, ticks=ticks - 1)
    with Lock(store, "job", None):
        pass


def test_a_living_process_of_this_machine_holds_its_lock_however_long_it_was_silent(store):
    write_lock(store, machine=machine_id(), pid=os.getpid(), ticks=started_ticks(os.getpid()), age_s=1e6)
    with pytest.raises(UserError, match="in use by"), Lock(store, "job", None):
        pass


def test_a_lock_of_another_machine_holds_until_it_has_not_been_refreshed_for_long(store):
    write_lock(store, age_s=LAPSE_S - 60)
    with (
        pytest.raises(UserError, match=r"process 1234 on 'node07' .*; last heard of 12\d s ago, .* after 180 s"),
        Lock(store, "job", None),
    ):
        pass
    write_lock(store, age_s=LAPSE_S + 60)
    with Lock(store, "job", None):
        assert len(list_locks(store)) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b'{"part": 3}'])
def test_a_damaged_lock_holds_nobody_up_and_goes_when_it_is_old(store, content):
    name = write_lock(store)
    store.write(name, content)
    with Lock(store, "job", None):
        assert name in list_locks(store)
    os.utime(store.root / name, (1.0, 1.0))
    with Lock(store, "job", None):
        assert name not in list_locks(store)


def test_a_lock_with_line_breaks_is_still_told_in_one_line(store):
    write_lock(store, host="a\nb", command="x\n\ny" + "z" * 1000, started="2026\n")
    with pytest.raises(UserError) as caught, Lock(store, "job", None):
        pass
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_of_two_that_arrive_together_the_lower_name_waits_and_the_higher_gives_way(store, monkeypatch):
    monkeypatch.setattr(locking, "POLL_S", 0.001)
    write_lock(store, machine=machine_id(), pid=os.getpid(), ticks=started_ticks(os.getpid()), holds=False)
    with pytest.raises(UserError, match="in use by"), Lock(store, "job", None):  # every name is above 000...
        pass
    name = ".lock-" + "f" * 16
    (store.root / (".lock-" + "0" * 16)).rename(store.root / name)
    lock = Lock(store, "job", None)
    waiting = threading.Thread(target=lock.__enter__)
    waiting.start()
    wait_until(lambda: lock.name in store.list(), "announcement")
    assert not Holder.parse(store.read(lock.name)).holds
    store.delete(name)
    waiting.join(30)
    assert Holder.parse(store.read(lock.name)).holds
    lock.__exit__(None, None, None)
    assert list_locks(store) == []


def test_of_many_that_start_at_once_exactly_one_gets_the_lock(store):
    winners, refused, start, end = [], [], threading.Barrier(8), threading.Barrier(8)

    def contend():
        start.wait()
        try:
            with Lock(store, "job", None) as lock:
                winners.append(lock.name)
                end.wait(60)
        except UserError as error:
            refused.append(str(error))
            end.wait(60)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(winners), len(refused), list_locks(store)) == (1, 7, [])


def test_the_lock_is_refreshed_while_it_is_held(store, monkeypatch):
    monkeypatch.setattr(locking, "REFRESH_S", 0.005)
    with Lock(store, "job", None) as lock:
        os.utime(store.root / lock.name, (1.0, 1.0))
        wait_until(lambda: store.list()[lock.name].modified_s > 1.0, "refreshing")
        lock.check()


def test_who_was_taken_for_dead_is_told_and_does_not_take_the_lock_back(store, monkeypatch):
    monkeypatch.setattr(locking, "REFRESH_S", 0.005)
    with Lock(store, "job", None) as lock:
        store.delete(lock.name)
        with pytest.raises(UserError, match=r"the lock of this job is gone.*run the same command again"):
            wait_until(lock.check, "news of the loss")
        assert list_locks(store) == []


def test_a_refresh_that_fails_is_no_loss_until_it_has_failed_for_long(store, monkeypatch):
    with Lock(store, "job", None) as lock:

        def fail(_self, _name):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(FolderStore, "refresh", fail)
        lock.check()
        lock._refreshed_s -= LAPSE_S + 1
        lock.check()  # another attempt fails: nobody has taken the lock away, as far as is known
        monkeypatch.undo()
        store.delete(lock.name)
        with pytest.raises(UserError, match="is gone"):
            lock.check()
