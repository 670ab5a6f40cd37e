"""Which machine and which process this is, told apart on a folder that several machines share.

A machine is its host name, its boot and its process namespace together: process numbers mean something only there.
"""

import functools
import hashlib
import os
import socket
from pathlib import Path

_NUM_DIGITS = 8


@functools.cache
def machine_id() -> str:
    """Eight hexadecimal digits, the same for all processes that can see each other's numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - not a path
    return hashlib.sha256(f"{socket.gethostname()} {boot} {namespace}".encode()).hexdigest()[:_NUM_DIGITS]


def started_ticks(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot. None: gone, dead but not yet collected by its
    parent, or hidden from this user."""
    try:
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in ("Z", "X") else int(fields[18])  # proc(5): field 22, the third follows the name


def is_running(pid: int, ticks: int | None = None) -> bool:
    """Whether process `pid` of this machine runs and, if `ticks` is given, is the one that started then."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's; where even its entry in /proc is hidden, it is taken to be the one
        found = started_ticks(pid)
        return found is None or ticks in (None, found)
    found = started_ticks(pid)
    return found is not None and ticks in (None, found)


def temporary_for(path: Path) -> Path:
    """The name beside `path` under which this process, and no other on any machine, writes it."""
    return path.with_name(f".{path.name}.{machine_id()}.tmp{os.getpid()}")
