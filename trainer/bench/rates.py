"""How rates are taken: rounds of several tasks in alternation, after a warm-up, over all ranks.

The decision that shaped it: what is compared is measured in turns in one process, so that whatever else the machine
does falls on all of it alike; a rate is the median over rounds with its spread, a ratio the median of the ratios of
neighbouring rounds. Rounds are numbers of steps, agreed on by all ranks, because ranks reduce in step. Left out: what
is measured (bench_feed.py, bench_step.py) and what follows from it (diagnosis.py).
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from trainer.bench.usage import cpu_time_s, list_tree
from trainer.distributed import Ranks, gather

Clock = Callable[[], float]

_WARM_UP_STEPS = 2  # allocation, compilation, choice of algorithms
_MAX_STEPS = 1 << 24


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
    """Rounds of one task, and what they say."""

    rounds: tuple[Round, ...]

    @property
    def per_s(self) -> float:
        """Median over rounds."""
        return statistics.median(one.per_s for one in self.rounds)

    @property
    def lowest(self) -> float:
        return min(one.per_s for one in self.rounds)

    @property
    def highest(self) -> float:
        return max(one.per_s for one in self.rounds)

    @property
    def spread(self) -> float:
        """(highest - lowest) / median."""
        return (self.highest - self.lowest) / self.per_s

    @property
    def num_done(self) -> int:
        return sum(one.num_done for one in self.rounds)

    @property
    def duration_s(self) -> float:
        return sum(one.duration_s for one in self.rounds)

    @property
    def cores_used(self) -> float:
        """CPU time per second, of all processes of all ranks."""
        return sum(one.cpu_s for one in self.rounds) / self.duration_s

    @property
    def waited_fraction(self) -> float:
        """Share of the time in which the slowest rank waited for data."""
        return sum(one.waited_s for one in self.rounds) / self.duration_s

    def ratio_to(self, other: "Rate") -> float:
        """Median over rounds of this rate in units of the other's, taken in the same turn."""
        return statistics.median(a.per_s / b.per_s for a, b in zip(self.rounds, other.rounds, strict=True))

    def to_json(self, unit: str = "images") -> dict[str, Any]:
        return {
            f"{unit}_per_s": self.per_s,
            "lowest": self.lowest,
            "highest": self.highest,
            "spread": self.spread,
            "num_rounds": len(self.rounds),
            f"num_{unit}": self.num_done,
            "duration_s": self.duration_s,
            "rounds": [{f"num_{unit}": one.num_done, "duration_s": one.duration_s} for one in self.rounds],
        }

    def __str__(self) -> str:
        return f"{self.per_s:,.0f} ({self.lowest:,.0f} to {self.highest:,.0f})"


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
