"""One job at a time in an output folder or bucket, or different parts of one job.

A job takes the lock of its name, then looks who else is there. In a folder the lock is a file held by flock, which ends
with the process. In a bucket it is an object that is created only where there is none, and refreshed: its holder counts
as dead once its process is gone or, on another machine, after LAPSE_S by the bucket's clock without a refresh.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.common.console import note
from pipeline.common.errors import UserError
from pipeline.common.machine import is_running, machine_id, started_ticks
from tools.sharding.store import BucketStore, FolderStore, Store

REFRESH_S = 15.0
LAPSE_S = 180.0
CLOSING_S = 5.0  # until the kernel has closed the files of a process that was killed
POLL_S = 0.02
_LOCK_FILE = re.compile(r"\.lock(-[0-9]+-of-[0-9]+|-[0-9a-f]{16})?")  # the last: of before, whose jobs have ended
_NUM_SHOWN = 400


@dataclass(frozen=True)
class Part:
    """One of `count` shares of a job's shards; `number` counts from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_part(text: str) -> Part:
    """The second of eight from "2/8". Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    part = Part(int(match[1]), int(match[2])) if match else None
    if part is None or not 1 <= part.number <= part.count:
        raise ValueError(f"{text!r}: expected a part such as 2/8, from 1/8 to 8/8")
    return part


class Holder(NamedTuple):
    """A job that holds a store, or died holding it: the name of its lock, and what that says of it."""

    lock: str
    job: str | None
    part: Part | None
    words: str
    is_alive: bool

    def conflicts(self, job: str, part: Part | None) -> bool:
        """Only different parts of the same division of the same job go together."""
        if job != self.job or part is None or self.part is None:
            return True
        return part.count != self.part.count or part.number == self.part.number


def is_lock(name: str) -> bool:
    """Whether a file of an output folder is a lock, by its name."""
    return bool(_LOCK_FILE.fullmatch(name))


def find_holders(store: Store) -> list[Holder]:
    """Who holds `store` or died holding it, by the names of the locks. Changes nothing."""
    holders = []
    for name, item in sorted(store.list().items()):
        if is_lock(name):
            with contextlib.suppress(FileNotFoundError):  # let go of meanwhile
                holders.append(_read(store, name, item.modified_s))
    return holders


def _read(store: Store, name: str, modified_s: float) -> Holder:
    is_held = isinstance(store, FolderStore) and _is_held(store.root / name)
    try:
        raw: dict[str, Any] = json.loads(store.read(name))
        # Told in a message of one line, and not trusted to be one.
        texts = {key: " ".join(str(raw[key]).split())[:_NUM_SHOWN] for key in ("host", "started", "command")}
        part = None if raw["part"] is None else Part(int(raw["part"]["number"]), int(raw["part"]["count"]))
        job, machine, pid, ticks = str(raw["job"]), raw["machine"], int(raw["pid"]), raw["ticks"]
    except (ValueError, KeyError, TypeError):  # damaged, or being written
        return Holder(name, None, None, "somebody", is_held)
    words = "process {} on {host!r} since {started}{} ({command})".format(
        pid, f" for --part {part}" if part else "", **texts
    )
    runs = machine == machine_id() and is_running(pid, ticks)
    if isinstance(store, FolderStore):  # for a moment longer than its process lives, a file is held
        return Holder(name, job, part, words, is_held and (runs or machine != machine_id()))
    if machine == machine_id():
        return Holder(name, job, part, words, runs)
    silent_s = max(store.tell_time_s() - modified_s, 0)
    words += f"; last heard of {silent_s:.0f} s ago, and taken for dead after {LAPSE_S:.0f} s"
    return Holder(name, job, part, words, silent_s <= LAPSE_S)


def _is_held(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def refuse_held(store: Store, job: str, part: Part | None, *, own: str | None = None) -> list[Holder]:
    """Raise UserError, naming it, if a living job holds `store` against this one, whose `own` lock does not count.
    Returns the dead. Changes nothing."""
    holders = find_holders(store)
    for holder in holders:
        if holder.is_alive and holder.lock != own and holder.conflicts(job, part):
            raise UserError(
                f"{store}: in use by {holder.words}; wait for it, stop it, choose another --out, or share one job out "
                "by --part"
            )
    return [holder for holder in holders if not holder.is_alive]


@contextlib.contextmanager
def lock_store(store: Store, job: str, part: Part | None) -> Iterator[Callable[[], None]]:
    """The right to write, as long as the block runs. Gives a function that raises UserError once the right is lost.

    Raises UserError, naming the holder, if another job has that right. The locks of the dead are removed.
    """
    for dead in refuse_held(store, job, part):
        note(f"{store}: the lock of {dead.words} is stale and removed")
        if isinstance(store, BucketStore):
            store.delete(dead.lock)
        else:  # by whom holds it, so that it is nobody's who came meanwhile
            with contextlib.suppress(BlockingIOError), _hold_file(store.root / dead.lock, b"", wait_s=CLOSING_S):
                pass
    name = f".lock-{part.number}-of-{part.count}" if part else ".lock"
    me = {
        "job": job,
        "part": part and vars(part),
        "host": socket.gethostname(),
        "machine": machine_id(),
        "pid": os.getpid(),
        "ticks": started_ticks(os.getpid()),
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command": shlex.join(sys.argv),
    }
    data = (json.dumps(me) + "\n").encode()
    with contextlib.ExitStack() as stack:
        try:
            is_lost = stack.enter_context(
                _hold_file(store.root / name, data)
                if isinstance(store, FolderStore)
                else _hold_object(store, name, data)
            )
        except BlockingIOError as error:  # somebody was faster
            refuse_held(store, job, part)
            raise UserError(f"{store}: was in use until a moment ago; run the same command again") from error
        refuse_held(store, job, part, own=name)  # of two with locks of different names each finds the other

        def check() -> None:
            if is_lost():
                raise UserError(
                    f"{store}: the lock of this job is gone ({name}): deleted, or taken by another job after "
                    f"{LAPSE_S:.0f} s without a sign of life; run the same command again to go on from the finished "
                    "shards"
                )

        yield check


@contextlib.contextmanager
def _hold_file(path: Path, data: bytes, *, wait_s: float = 0.0) -> Iterator[Callable[[], bool]]:
    """Gives whether the lock is lost. Raises BlockingIOError if somebody holds it, after `wait_s` still."""
    deadline_s = time.monotonic() + wait_s
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a+b", buffering=0) as file:

            def is_lost(descriptor: int = file.fileno()) -> bool:
                return not os.fstat(descriptor).st_nlink

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_lost():
                    continue  # removed by who held it, between the two lines above
                file.truncate(0)
                file.write(data)
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    raise
                time.sleep(POLL_S)
                continue
            except OSError as error:
                raise UserError(f"{path.parent}: cannot be locked ({error.strerror}); choose another --out") from error
            try:
                yield is_lost
            finally:
                if not is_lost():
                    path.unlink()
            return


@contextlib.contextmanager
def _hold_object(store: BucketStore, name: str, data: bytes) -> Iterator[Callable[[], bool]]:
    """As `_hold_file`. A thread refreshes the object while the block runs."""
    if not store.write_new(name, data):
        raise BlockingIOError
    left, lost = threading.Event(), threading.Event()
    refreshed_s = time.monotonic()

    def refresh() -> None:
        nonlocal refreshed_s
        try:
            if store.read(name) != data:
                lost.set()
                return
            store.write(name, data)
            refreshed_s = time.monotonic()
        except FileNotFoundError:
            lost.set()
        except (OSError, UserError):
            pass  # a network that may come back; `is_lost` asks again, and who takes this job for dead takes the lock

    def keep() -> None:
        while not left.wait(REFRESH_S) and not lost.is_set():
            refresh()

    def is_lost() -> bool:
        if time.monotonic() - refreshed_s > LAPSE_S:
            refresh()
        return lost.is_set()

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield is_lost
    finally:
        left.set()
        thread.join()
        if not is_lost():
            store.delete(name)
