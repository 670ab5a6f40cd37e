"""One job at a time in an output folder or bucket, or different parts of one job.

The decision that shaped it: every job has a lock file of its own, with a random name, so that removing a dead one can
never hit a live one, and nothing is asked of the file system but that what is written is then listed. A job first
announces itself, then looks who else is there: of two that arrive together, the one with the lower name goes on. A lock
of this machine is stale when its process is gone; one of another machine when it has not been refreshed for LAPSE_S by
the clock of the store. Left out: waiting for a lock; whoever is refused is told by whom.
"""

import json
import re
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from os import getpid
from types import TracebackType
from typing import Any

from pipeline.common.console import note
from pipeline.common.errors import UserError
from pipeline.common.machine import is_running, machine_id, started_ticks
from tools.sharding.store import Item, Store

REFRESH_S = 15.0
LAPSE_S = 180.0
ANNOUNCE_S = 60.0  # how long one that arrived at the same moment is given to make up its mind
POLL_S = 0.1
_LOCK_FILE = re.compile(r"\.lock-[0-9a-f]{16}")
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


@dataclass(frozen=True)
class Holder:
    """Who works: the job and the part of it, the process and its machine, and whether it has the right to yet."""

    job: str
    part: Part | None
    host: str
    machine: str
    pid: int
    ticks: int | None
    started: str
    command: str
    holds: bool

    @classmethod
    def parse(cls, data: bytes) -> "Holder | None":
        """None for what is no lock."""
        try:
            raw: dict[str, Any] = json.loads(data)
            part = None if raw["part"] is None else Part(int(raw["part"]["number"]), int(raw["part"]["count"]))
            ticks = None if raw["ticks"] is None else int(raw["ticks"])
            # Told in a message of one line, and not trusted to be one.
            texts = {
                name: " ".join(str(raw[name]).split())[:_NUM_SHOWN]
                for name in ("job", "host", "machine", "started", "command")
            }
            return cls(part=part, pid=max(1, int(raw["pid"])), ticks=ticks, holds=bool(raw["holds"]), **texts)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def conflicts(self, job: str, part: Part | None) -> bool:
        """Only different parts of the same division of the same job go together."""
        if job != self.job or part is None or self.part is None:
            return True
        return part.count != self.part.count or part.number == self.part.number

    def is_dead(self, age_s: float) -> bool:
        """Whether the process is gone, for all that can be known; `age_s` since the lock was refreshed."""
        if self.machine == machine_id():
            return not is_running(self.pid, self.ticks)
        return age_s > LAPSE_S

    def __str__(self) -> str:
        part = f" for --part {self.part}" if self.part else ""
        return f"process {self.pid} on {self.host!r} since {self.started}{part} ({self.command})"


def is_lock(name: str) -> bool:
    """Whether a file of an output folder is a lock, by its name."""
    return bool(_LOCK_FILE.fullmatch(name))


def refuse_held(store: Store, items: Mapping[str, Item], job: str, part: Part | None) -> None:
    """Raise UserError, naming it, if a living job holds `store` against this one. Nothing is written, so that the age
    of a lock of another machine can only be told by this machine's clock; `Lock` does better."""
    for name in filter(is_lock, sorted(items)):
        holder, age_s = _read(store, name), time.time() - items[name].modified_s
        if holder and holder.holds and holder.conflicts(job, part) and not holder.is_dead(age_s):
            raise _refuse(store, holder, age_s)


def _read(store: Store, name: str) -> Holder | None:
    try:
        return Holder.parse(store.read(name))
    except FileNotFoundError:
        return None


def _refuse(store: Store, holder: Holder, age_s: float) -> UserError:
    alive = ""
    if holder.machine != machine_id():
        alive = f"; last heard of {max(age_s, 0):.0f} s ago, and taken for dead after {LAPSE_S:.0f} s"
    return UserError(
        f"{store}: in use by {holder}{alive}; wait for it, stop it, choose another --out, or "
        "share one job out by --part"
    )


class Lock:
    """`with Lock(store, job, part) as lock:` the right to write; `lock.check()` raises UserError once it is lost.

    Raises UserError, naming the holder, if another job has that right. Stale locks are removed. A thread refreshes the
    lock while the block runs.
    """

    def __init__(self, store: Store, job: str, part: Part | None) -> None:
        self._store = store
        self.name = f".lock-{secrets.token_hex(8)}"
        self._me = Holder(
            job=job,
            part=part,
            host=socket.gethostname(),
            machine=machine_id(),
            pid=getpid(),
            ticks=started_ticks(getpid()),
            started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            command=shlex.join(sys.argv),
            holds=False,
        )
        self._is_lost = False
        self._refreshed_s = 0.0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> "Lock":
        try:
            self._write(self._me)
            self._contend()
            self._write(replace(self._me, holds=True))
        except BaseException:
            self._store.delete(self.name)
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()
        self._store.delete(self.name)

    def check(self) -> None:
        """Raise UserError if another job has taken this one for dead, as after a long sleep or a lost network."""
        if not self._is_lost and time.monotonic() - self._refreshed_s > LAPSE_S:
            self._refresh()
        if self._is_lost:
            raise UserError(
                f"{self._store}: the lock of this job is gone, another took it for dead after {LAPSE_S:.0f} s without "
                "a sign of life; run the same command again to go on from the finished shards"
            )

    def _write(self, holder: Holder) -> None:
        self._store.write(self.name, (json.dumps(asdict(holder)) + "\n").encode())
        self._refreshed_s = time.monotonic()

    def _contend(self) -> None:
        """Return once nobody is in the way. Raises UserError if somebody holds the store or was here first."""
        deadline_s = time.monotonic() + ANNOUNCE_S
        while True:
            items = self._store.list()
            if self.name not in items:  # a listing from before this lock was written
                raise UserError(f"{self._store}: files written to it do not appear in it; choose another --out")
            is_free = True
            for name in sorted(filter(is_lock, items.keys() - {self.name})):
                age_s = items[self.name].modified_s - items[name].modified_s
                holder = _read(self._store, name)
                if holder is None and age_s <= LAPSE_S:
                    continue  # taken away at this moment, or damaged
                if holder is None or holder.is_dead(age_s):
                    note(f"{self._store}: the lock of {holder or 'somebody'} is stale and removed")
                    self._store.delete(name)
                elif holder.conflicts(self._me.job, self._me.part):
                    if holder.holds or name < self.name or time.monotonic() > deadline_s:
                        raise _refuse(self._store, holder, age_s)
                    is_free = False
            if is_free:
                return
            time.sleep(POLL_S)
            self._store.refresh(self.name)

    def _keep(self) -> None:
        while not self._left.wait(REFRESH_S) and not self._is_lost:
            self._refresh()

    def _refresh(self) -> None:
        try:
            self._store.refresh(self.name)
            self._refreshed_s = time.monotonic()
        except FileNotFoundError:
            self._is_lost = True
        except (OSError, UserError):
            pass  # a network that may come back; `check` asks again, and who takes this job for dead removes the lock
