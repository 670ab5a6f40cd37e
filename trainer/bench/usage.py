"""What this process and its descendants use: CPU time and memory.

The decision that shaped it: read from /proc over the whole tree of processes, living ones included, because a loader
may decode in processes of its own and `resource` counts children only when they have ended. Left out: the GPU's memory
(bench.py asks CUDA for it).
"""

import contextlib
import os
from collections import defaultdict
from pathlib import Path

_PROC = Path("/proc")
_PARENT, _TIMES = 1, slice(11, 15)  # of /proc/PID/stat behind the name: ppid; utime, stime, cutime, cstime


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def list_tree(root: int | None = None) -> list[int]:
    """The ids of this process (or `root`) and all its descendants."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            stat = _read_stat(int(entry.name))
            if stat:
                children[int(stat[_PARENT])].append(int(entry.name))
    tree = [os.getpid() if root is None else root]
    for process in tree:  # grows while it is walked
        tree += children[process]
    return tree


def cpu_time_s(tree: list[int]) -> float:
    """CPU seconds so far of these processes, to about 0.01: user, system, and that of children they outlived."""
    ticks = sum(sum(map(int, _read_stat(process)[_TIMES])) for process in tree)
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_bytes(tree: list[int], *, peak: bool = False) -> int:
    """Resident memory of these processes, now or at its peak; pages that they share are counted in each of them."""
    name, total = "VmHWM:" if peak else "VmRSS:", 0
    for process in tree:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for line in (_PROC / str(process) / "status").read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith(name):
                    total += int(line.split()[1]) * 1024
    return total


def _read_stat(process: int) -> list[str]:
    """The fields behind the name, which may hold anything; none if the process has ended meanwhile."""
    try:
        return (_PROC / str(process) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
