"""The machine that a benchmark runs on: which CPUs, how busy, what to call it. Read from /proc; standard library only,
because contestants' processes import it in any environment.
"""

import contextlib
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def watch_foreign(duration_s: float) -> float:
    """Cores busy while all of ours are stopped: other work on this machine."""
    before = _read_cpu_ticks()
    time.sleep(duration_s)
    after = _read_cpu_ticks()
    return max(0.0, (after[0] - before[0]) / max(1, after[1] - before[1]) * (os.cpu_count() or 1))


def sum_cpu_ticks(group: int) -> int:
    """User and system time of the processes in `group` and of the ended ones they waited for (proc(5), stat)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            words = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(words[2]) == group:
                ticks += sum(map(int, words[11:15]))
    return ticks


def _read_cpu_ticks() -> tuple[int, int]:
    """Busy and all ticks since boot, over all cores."""
    ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def describe_machine(cpus: set[int]) -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": model,
        "cores_used": len(cpus),
        "cores_of_machine": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
    }


def choose_cpus(num: int) -> set[int]:
    """The first `num` CPUs that this process may use. Raises SystemExit if there are fewer."""
    usable = sorted(os.sched_getaffinity(0))
    if not 1 <= num <= len(usable):
        raise SystemExit(f"error: --workers {num}: expected 1 to {len(usable)}, the CPUs that this process may use")
    return set(usable[:num])
