"""What both benchmarks share: contestants in processes of their own, alternated rounds, statistics, tables.

The decision that shaped it: every contestant is a child process with its own interpreter that answers one line of JSON
with one line of JSON, so libraries that clash can meet in one run. A child is stopped (SIGSTOP) whenever it is not its
turn: nobody prefetches on another's time, and whatever keeps the cores busy in between is foreign work, which is
measured and reported. A contestant whose library is missing, or that fails, keeps its row and says so. Left out: what
is measured (prepare.py, feed.py) and how (peers_prepare.py, peers_feed.py). Standard library only, because the
children import this file in any environment.
"""

import contextlib
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LISTEN_S = 0.2  # how long foreign work is watched before each turn
REPLY_LIMIT_S = 1200.0


@dataclass(frozen=True)
class Contestant:
    """What a child offers: functions callable by name with JSON arguments, and the packages whose versions count."""

    calls: Mapping[str, Callable[..., Any]]
    packages: Sequence[str]
    close: Callable[[], object] = lambda: None


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


class Failed(Exception):
    """A contestant that could not start or answer: the reason in one line."""


def serve(make: Callable[[str, dict[str, Any]], Contestant]) -> None:
    """The life of a child (argv: name, job as JSON): make the contestant, then answer calls until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print; the pipe is for replies alone
    name, job = sys.argv[1], json.loads(sys.argv[2])

    def reply(**message: Any) -> None:
        print(json.dumps(message), file=replies, flush=True)

    try:
        contestant = make(name, job)
    except ImportError as error:
        traceback.print_exc()
        reply(missing=" ".join(str(error).split()))
        return
    except Exception as error:  # noqa: BLE001 - carried to the parent, which reports it in the contestant's row
        traceback.print_exc()
        reply(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
        return
    reply(value={"python": platform.python_version(), **find_versions(contestant.packages)})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply(value=contestant.calls[request["call"]](**request["arguments"]))
        except Exception as error:  # noqa: BLE001 - as above
            traceback.print_exc()
            reply(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
    contestant.close()


def find_versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class Child:
    """A contestant's process and all that it starts, one process group: stopped except while it is asked something."""

    def __init__(
        self, python: Path, script: Path, name: str, job: Mapping[str, Any], cpus: set[int], log: Path
    ) -> None:
        self._log = log
        threads = str(len(cpus))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "NUMBA_NUM_THREADS": threads,
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "PYTHONPATH": os.pathsep.join([str(script.parent), *job.get("paths", [])]),
        }
        with log.open("ab") as file, _on_cpus(cpus):  # not preexec_fn: a signal's exception is lost in its fork hooks
            self._process = subprocess.Popen(
                [str(python), str(script), name, json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                process_group=0,  # same session: should we die, the kernel wakes and hangs up a stopped group
            )
        self._buffer = b""
        try:
            self.versions: dict[str, str] = self._receive()
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def ask(self, call: str, **arguments: Any) -> Any:
        """The answer of the child's function `call`. Raises Failed if it has none."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write((json.dumps({"call": call, "arguments": arguments}) + "\n").encode())
            self._process.stdin.flush()
            return self._receive()
        except BrokenPipeError:
            raise Failed(f"ended with status {self._process.wait()} (log: {self._log.name})") from None
        finally:
            self._signal(signal.SIGSTOP)

    def count_cpu_s(self) -> float:
        """Processor time that the group has used so far, ended processes included."""
        return _sum_cpu_ticks(self._process.pid) / os.sysconf("SC_CLK_TCK")

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        limit_s = time.monotonic() + REPLY_LIMIT_S
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, limit_s - time.monotonic()))
            if not ready:
                raise Failed(f"no answer in {REPLY_LIMIT_S:.0f} s (log: {self._log.name})")
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                raise Failed(f"ended with status {self._process.wait()} (log: {self._log.name})")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = json.loads(line)
        if "missing" in message:
            raise ModuleNotFoundError(message["missing"])
        if "error" in message:
            raise Failed(message["error"])
        return message["value"]

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End the whole group: kindly if the child answers to the end of its input, else at once."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._signal(signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def _on_cpus(cpus: set[int]) -> Iterator[None]:
    """What is started in the block runs on `cpus`."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


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


def watch_foreign(duration_s: float) -> float:
    """Cores busy while all of ours are stopped: other work on this machine."""
    before = _read_cpu_ticks()
    time.sleep(duration_s)
    after = _read_cpu_ticks()
    return max(0.0, (after[0] - before[0]) / max(1, after[1] - before[1]) * (os.cpu_count() or 1))


def _sum_cpu_ticks(group: int) -> int:
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


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """n, median, min, max and quartiles, and the values themselves."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "rounds": [round(value, 4) for value in values],
    }


def compare(rates: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Ratios round by round: neighbours in time share the machine's mood."""
    return summarise([ours / theirs for ours, theirs in zip(rates, base, strict=True)])


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


def report(
    title: str,
    rows: Sequence[Row],
    *,
    base: str | None,
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    foreign: Sequence[float],
    columns: Mapping[str, Callable[[Row], str]],
    notes: Sequence[str] = (),
) -> tuple[str, dict[str, Any]]:
    """The table as Markdown, and the same and more for a JSON file. Rows in order of speed, those without one last."""
    base_rates = next((row.rates for row in rows if row.entry.name == base and row.rates), None)
    found = []
    for row in sorted(rows, key=lambda row: -statistics.median(row.rates) if row.rates else 1.0):
        result: dict[str, Any] = {**vars(row.entry), "state": row.state, "versions": row.versions, **row.extra}
        if row.rates:
            result["images_per_s"] = summarise(row.rates)
            result["cpu_ms_per_image"] = summarise(row.cpu_ms)
            if base_rates:
                result["ratio"] = compare(row.rates, base_rates)
        found.append((row, result))

    lines = [f"### {title}", ""]
    heads = ["way", "kind", "images/s: median (min to max)", f"ratio to {base}: median (min to max)"]
    heads += ["CPU ms an image", *columns]
    lines += ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row, result in found:
        rate, ratio = result.get("images_per_s"), result.get("ratio")
        cells = [
            f"{row.entry.name}: {row.entry.what}",
            row.entry.kind,
            _show(rate, "{:,.0f}") if rate else row.state.replace("|", "/"),
            _show(ratio, "{:.2f}") if ratio else "",
            f"{statistics.median(row.cpu_ms):.3f}" if row.cpu_ms else "",
            *(column(row) for column in columns.values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    num_rounds = max((len(row.rates) for row in rows), default=0)
    load = f"{statistics.median(foreign):.2f} cores, at most {max(foreign):.2f}" if foreign else "not watched"
    lines += [
        "",
        f"n = {num_rounds} alternated rounds after a warm-up. {machine['date']}, {machine['cpu']}, "
        f"{machine['cores_used']} of {machine['cores_of_machine']} cores, {machine['memory_gib']} GiB. "
        f"Other work between the turns: median {load}.",
        "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        *notes,
        "Versions: " + _list_versions(rows) + ".",
    ]
    document = {
        "benchmark": title,
        "machine": dict(machine),
        "settings": dict(settings),
        "base": base,
        "foreign_cores": summarise(foreign) if foreign else None,
        "notes": list(notes),
        "contestants": [result for _, result in found],
    }
    return "\n".join(lines), document


def _show(summary: Mapping[str, Any], form: str) -> str:
    median, low, high = (form.format(summary[name]) for name in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def _list_versions(rows: Sequence[Row]) -> str:
    seen: dict[str, set[str]] = {}
    for row in rows:
        for package, number in row.versions.items():
            seen.setdefault(package, set()).add(number)
    return ", ".join(f"{package} {' and '.join(sorted(numbers))}" for package, numbers in sorted(seen.items()))


def unwind_when_terminated() -> None:
    """SIGTERM ends this process by way of its `finally` clauses: no child and no temporary folder stays behind."""
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def closing_all(children: Mapping[str, Child]) -> Iterator[None]:
    """End every child, whatever happens."""
    try:
        yield
    finally:
        for child in children.values():
            child.close()


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
