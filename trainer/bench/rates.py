"""How rates are taken: rounds of several tasks in turns, over all ranks; and what CPU time and memory they cost.

Turns in one process, because whatever else the machine does then falls on all tasks alike. A round is a number of
steps that all ranks agree on, because ranks reduce in step.
"""

import contextlib
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainer.distributed import Ranks, gather

Clock = Callable[[], float]

_WARM_UP_STEPS = 2  # allocation, compilation, choice of algorithms
_MAX_STEPS = 1 << 24
_PROC = Path("/proc")
_PARENT, _TIMES = 1, slice(11, 15)  # of /proc/PID/stat behind the name: ppid; utime, stime, cutime, cstime


class Work(NamedTuple):
    """What some steps of a task did: how many images (or products), and the seconds spent waiting for data."""

    num_done: int
    waited_s: float = 0.0


@dataclass(frozen=True)
class Task:
    """Something to time. `run(n)` does n steps; `lead` steps go untimed before each round, to empty what was queued."""

    run: Callable[[int], Work]
    lead: int = 1


class Round(NamedTuple):
    """One timed stretch, over all ranks: counts and CPU time summed, the slowest rank's times."""

    num_done: int
    duration_s: float
    waited_s: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        return self.num_done / self.duration_s


@dataclass(frozen=True)
class Rate:
    """Rounds of one task. per_s, lowest and highest are the median, least and largest of their rates."""

    rounds: tuple[Round, ...]

    @property
    def per_s(self) -> float:
        return statistics.median(one.per_s for one in self.rounds)

    @property
    def num_done(self) -> int:
        return self._total.num_done

    @property
    def cores_used(self) -> float:
        """CPU time per second, of all processes of all ranks."""
        return self._total.cpu_s / self._total.duration_s

    @property
    def waited_fraction(self) -> float:
        """Share of the time in which the slowest rank waited for data."""
        return self._total.waited_s / self._total.duration_s

    @property
    def _total(self) -> Round:
        return Round(*map(sum, zip(*self.rounds, strict=True)))

    def ratio_to(self, other: "Rate") -> float:
        """Median over rounds of this rate in units of the other's, taken in the same turn."""
        return statistics.median(a.per_s / b.per_s for a, b in zip(self.rounds, other.rounds, strict=True))

    def to_json(self, unit: str = "images") -> dict[str, Any]:
        """The fields of a rate in `alexnet-bench --json`; spread is (highest - lowest) / median."""
        rates = [one.per_s for one in self.rounds]
        return {
            f"{unit}_per_s": self.per_s,
            "lowest": min(rates),
            "highest": max(rates),
            "spread": (max(rates) - min(rates)) / self.per_s,
            "num_rounds": len(self.rounds),
            f"num_{unit}": self.num_done,
            "duration_s": self._total.duration_s,
            "rounds": [{f"num_{unit}": one.num_done, "duration_s": one.duration_s} for one in self.rounds],
        }


def alternate(
    tasks: Mapping[str, Task], *, num_rounds: int, duration_s: float, ranks: Ranks, clock: Clock = time.perf_counter
) -> dict[str, Rate]:
    """`num_rounds` rounds of each task in turns, each task for about `duration_s` in all. Every rank calls it alike.

    A step that is longer than a round still makes a round of its own, so slow steps take longer than asked for.
    """
    num_steps = {name: _choose_steps(task, duration_s / num_rounds, ranks, clock) for name, task in tasks.items()}
    rounds: dict[str, list[Round]] = {name: [] for name in tasks}
    for turn in range(num_rounds):
        for name in list(tasks) if turn % 2 == 0 else reversed(list(tasks)):
            tasks[name].run(tasks[name].lead)
            rounds[name].append(_time_round(tasks[name], num_steps[name], ranks, clock))
    return {name: Rate(tuple(taken)) for name, taken in rounds.items()}


def _choose_steps(task: Task, round_s: float, ranks: Ranks, clock: Clock) -> int:
    """How many steps make a round of about `round_s`, and no fewer than the lead. The same on every rank."""
    task.run(_WARM_UP_STEPS)
    num_steps = task.lead
    while True:
        took_s = _time_round(task, num_steps, ranks, clock).duration_s
        if took_s >= round_s / 2 or num_steps >= _MAX_STEPS:
            return max(task.lead, round(num_steps * round_s / took_s) if took_s > 0 else num_steps)
        num_steps *= 2


def _time_round(task: Task, num_steps: int, ranks: Ranks, clock: Clock) -> Round:
    synchronise(ranks)
    gather(None, ranks)  # all begin together
    cpu_s, start_s = cpu_time_s(list_tree()), clock()
    work = task.run(num_steps)
    synchronise(ranks)
    took_s = clock() - start_s
    mine = Round(work.num_done, took_s, work.waited_s, cpu_time_s(list_tree()) - cpu_s)
    done, times, waits, cpus = zip(*gather(mine, ranks), strict=True)
    return Round(sum(done), max(times), max(waits), sum(cpus))


def synchronise(ranks: Ranks) -> None:
    """Wait until this rank's GPU has done what it was given."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)


def gpu_memory_bytes(ranks: Ranks) -> int | None:
    """Memory in use on this rank's GPU, by whatever: DALI's is not torch's to count. None on the CPU."""
    if ranks.device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(ranks.device)
    return total - free


def list_tree() -> list[int]:
    """The ids of this process and all its descendants: a loader may decode in processes of its own."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (stat := _read_stat(int(entry.name))):
            children[int(stat[_PARENT])].append(int(entry.name))
    tree = [os.getpid()]
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
