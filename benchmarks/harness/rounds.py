"""The race: who takes part, and rounds in which all take turns, each beginning with another contestant.

Whatever keeps the cores busy while all of ours are stopped is foreign work, which is measured and reported. A
contestant whose library is missing, or that fails, keeps its row and says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.children import Child, Failed
from harness.machine import watch_foreign

LISTEN_S = 0.2  # how long foreign work is watched before each turn


@dataclass(frozen=True)
class Entry:
    """A row to be: name, kind ("ours", "peer" or "limit"), what it does in words."""

    name: str
    kind: str
    what: str


@dataclass
class Row:
    """What was found out about an entry, one value per round: `rates` in images/s, `cpu_ms` of processor time an image
    (all its processes; unlike the rate it hardly knows of other work). `state` is "ok" or why there are none."""

    entry: Entry
    state: str = "ok"
    versions: dict[str, str] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def choose(entries: Sequence[Entry], only: str | None) -> list[Entry]:
    """The entries named in `only` (comma-separated), or all. Raises SystemExit for a name that is none of them."""
    if not only:
        return list(entries)
    names = only.split(",")
    unknown = sorted(set(names) - {entry.name for entry in entries})
    if unknown:
        known = ", ".join(entry.name for entry in entries)
        raise SystemExit(f"error: --only {','.join(unknown)}: no such contestant; expected some of {known}")
    return [entry for entry in entries if entry.name in names]


def start_child(
    row: Row, pythons: Sequence[Path], script: Path, job: Mapping[str, Any], cpus: set[int], folder: Path
) -> Child | None:
    """The contestant in the first of `pythons` that has its libraries; None, and the reason in `row.state`, else."""
    reasons = []
    for python in pythons:
        try:
            child = Child(python, script, row.entry.name, job, cpus, folder / f"{row.entry.name}.log")
        except ModuleNotFoundError as error:
            reasons.append(str(error))
        except Failed as error:
            row.state = f"failed: {error}"
            return None
        else:
            row.versions = child.versions
            return child
    row.state = f"not installed: {reasons[-1] if reasons else 'no interpreter with the peers given (--python)'}"
    return None


def alternate(
    children: dict[str, Child],
    rows: Mapping[str, Row],
    *,
    num_rounds: int,
    arguments: Mapping[str, Any],
    on_turn: Callable[[int, str, float], None] = lambda number, name, rate: None,
) -> list[float]:
    """Ask each child to `run` in turn, `num_rounds` times, beginning with another one each round.

    `run(**arguments)` answers [images, seconds, images worked on in all, untimed ones too]. Rates go to the rows; a
    contestant that fails leaves the race with the reason in its row. Returns the cores found busy with foreign work
    before each turn.
    """
    foreign = []
    names = list(children)
    for number in range(num_rounds):
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            if rows[name].state != "ok":
                continue
            foreign.append(watch_foreign(LISTEN_S))
            cpu_s = children[name].count_cpu_s()
            try:
                images, seconds, all_images = children[name].ask("run", **arguments)
            except Failed as error:
                rows[name].state, rows[name].rates, rows[name].cpu_ms = f"failed: {error}", [], []
                continue
            rows[name].rates.append(images / seconds)
            rows[name].cpu_ms.append(1e3 * (children[name].count_cpu_s() - cpu_s) / all_images)
            on_turn(number, name, images / seconds)
    return foreign
