"""The race itself: children answer, stop and end; rounds alternate; nothing drops out of a report in silence."""

import os
import random
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPUS = set(sorted(os.sched_getaffinity(0))[:1])

CHILD = """
import os, subprocess, sys, time
from harness.children import Contestant, serve

def make(name, job):
    if name == "absent":
        import a_library_that_nobody_has
    if name == "broken":
        raise ValueError("cannot\\nbegin")
    print("a library that prints")
    helper = subprocess.Popen(["sleep", "600"])
    def run(**arguments):
        print("and prints again")
        if name == "failing":
            raise RuntimeError("no more")
        if name == "dying":
            os._exit(7)
        return [job["rate"] * arguments["seconds"], arguments["seconds"], 100]
    def burn(seconds):
        start_s = time.process_time()
        while time.process_time() - start_s < seconds:
            pass
    calls = {"run": run, "burn": burn, "pids": lambda: [os.getpid(), helper.pid],
             "cpus": lambda: sorted(os.sched_getaffinity(0)), "threads": lambda: os.environ["OMP_NUM_THREADS"]}
    return Contestant(calls, ("pytest", "no-such-package"))

serve(make)
"""


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def rounds():
    from harness import rounds

    return rounds


@pytest.fixture
def racetable():
    from harness import racetable

    return racetable


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "contestants.py"
    path.write_text(CHILD, encoding="utf-8")
    return path


@pytest.fixture
def start(rounds, script, tmp_path):
    """Makes (row, child or None) of a contestant by name; ends the children."""
    children = []

    def start(name, rate=1.0, pythons=(Path(sys.executable),)):
        row = rounds.Row(rounds.Entry(name, "peer", "a way"))
        job = {"rate": rate, "paths": [str(ROOT / "benchmarks")]}
        child = rounds.start_child(row, pythons, script, job, CPUS, tmp_path)
        children.extend([child] if child else [])
        return row, child

    yield start
    for child in children:
        child.close()


def state_of(pid: int) -> str:
    """One letter: R, S, T (stopped), Z...; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_a_child_answers_though_its_libraries_print(start):
    row, child = start("talking", rate=50.0)
    assert child.ask("run", seconds=2.0) == [100.0, 2.0, 100]
    assert child.ask("run", seconds=4.0) == [200.0, 4.0, 100]
    assert set(row.versions) == {"python", "pytest"}


def test_a_child_has_the_given_cpus_and_as_many_threads(start):
    _, child = start("bound")
    assert child.ask("cpus") == sorted(CPUS)
    assert child.ask("threads") == "1"


def test_a_child_and_all_it_started_are_stopped_between_questions_and_gone_after_close(start):
    _, child = start("quiet")
    pids = child.ask("pids")
    assert all(comes_to(pid, "T") for pid in pids)
    child.close()
    assert all(comes_to(pid, "", "Z") for pid in pids)


def comes_to(pid: int, *states: str) -> bool:
    """Whether a process gets into one of `states` soon: a signal lands when its target next runs."""
    return any(state_of(pid) in states for _ in range(2_000_000))


def test_processor_time_of_a_child_is_counted(start):
    _, child = start("busy")
    before = child.count_cpu_s()
    child.ask("burn", seconds=0.3)
    assert 0.25 < child.count_cpu_s() - before < 1.0


def test_a_missing_library_is_named_in_the_row(start):
    row, child = start("absent")
    assert child is None
    assert row.state == "not installed: No module named 'a_library_that_nobody_has'"


def test_another_interpreter_is_tried_when_the_first_lacks_the_library(start, tmp_path):
    lacking = tmp_path / "lacking"
    lacking.write_text(f'#!/bin/sh\nexec {sys.executable} $1 absent "$3"\n', encoding="utf-8")
    lacking.chmod(0o755)
    row, child = start("found", pythons=(lacking, Path(sys.executable)))
    assert child is not None and row.state == "ok"


def test_a_contestant_that_cannot_start_is_a_failed_row_of_one_line(start):
    row, child = start("broken")
    assert child is None
    assert row.state == "failed: ValueError: cannot begin"


def test_rounds_alternate_and_begin_with_another_contestant_each_time(rounds, start):
    started = {name: start(name, rate) for name, rate in (("a", 10.0), ("b", 20.0), ("c", 30.0))}
    turns = []
    foreign = rounds.alternate(
        {name: child for name, (_, child) in started.items()},
        {name: row for name, (row, _) in started.items()},
        num_rounds=3,
        arguments={"seconds": 2.0},
        on_turn=lambda number, name, rate: turns.append((number, name, rate)),
    )
    assert [name for _, name, _ in turns] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert {name: row.rates for name, (row, _) in started.items()} == {
        "a": [10.0] * 3,
        "b": [20.0] * 3,
        "c": [30.0] * 3,
    }
    assert len(foreign) == 9 and min(foreign) >= 0


@pytest.mark.parametrize(
    ("name", "reason"), [("failing", "RuntimeError: no more"), ("dying", "ended with status 7 (log: dying.log)")]
)
def test_a_contestant_that_fails_leaves_the_race_and_the_others_go_on(rounds, start, name, reason):
    started = {"sound": start("sound", 5.0), name: start(name)}
    rows = {name: row for name, (row, _) in started.items()}
    rounds.alternate(
        {name: child for name, (_, child) in started.items()}, rows, num_rounds=2, arguments={"seconds": 1.0}
    )
    assert rows["sound"].rates == [5.0, 5.0]
    assert rows[name].rates == [] and rows[name].state == f"failed: {reason}"


def test_the_summary_of_known_values(racetable):
    values = [4.0, 1.0, 3.0, 2.0, 10.0]
    summary = racetable.summarise(random.Random(0).sample(values, 5))
    assert {key: summary[key] for key in ("n", "median", "min", "max", "q1", "q3")} == {
        "n": 5, "median": 3.0, "min": 1.0, "max": 10.0, "q1": 2.0, "q3": 4.0
    }  # fmt: skip
    assert racetable.summarise([7.0])["q1"] == racetable.summarise([7.0])["q3"] == 7.0


def test_ratios_are_taken_round_by_round(racetable):
    # the machine slows down by ten in the second round, and nobody's ratio notices
    ratio = racetable.compare([200.0, 20.0, 220.0], [100.0, 10.0, 100.0])
    assert (ratio["median"], ratio["min"], ratio["max"]) == (2.0, 2.0, 2.2)


def test_a_report_keeps_every_row_with_its_reason_and_all_rounds(rounds, racetable):
    from harness.machine import describe_machine

    fast = rounds.Row(rounds.Entry("fast", "ours", "x"), "ok", {"numpy": "2.0"}, [30.0, 40.0], [1.0, 1.0])
    slow = rounds.Row(rounds.Entry("slow", "peer", "y"), "ok", {"numpy": "2.1"}, [10.0, 20.0], [3.0, 5.0])
    absent = rounds.Row(rounds.Entry("absent", "peer", "z"), "not installed: No module named 'z'")
    text, document = racetable.report(
        "Racing",
        [absent, slow, fast],
        base="slow",
        machine=describe_machine(CPUS),
        settings={"batch": 128},
        foreign=[0.0, 0.5],
        columns={"name's length": lambda row: str(len(row.entry.name))},
    )
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split(":")[0] for line in lines[2:]] == ["| fast", "| slow", "| absent"]
    assert len({line.count("|") for line in lines}) == 1
    assert "| 35 (30 to 40) | 2.50 (2.00 to 3.00) | 1.000 | 4 |" in lines[2]
    assert "not installed: No module named 'z'" in lines[4]
    assert "n = 2 alternated rounds" in text and "numpy 2.0 and 2.1" in text and "batch 128" in text
    results = {result["name"]: result for result in document["contestants"]}
    assert results["slow"]["images_per_s"]["rounds"] == [10.0, 20.0]
    assert results["slow"]["cpu_ms_per_image"]["median"] == 4.0
    assert results["absent"]["state"].startswith("not installed") and "images_per_s" not in results["absent"]
    assert document["machine"]["cores_used"] == 1 and document["machine"]["date"]


def test_names_that_are_no_contestants_are_refused(rounds):
    entries = [rounds.Entry(name, "peer", "") for name in ("a", "b", "c")]
    assert [entry.name for entry in rounds.choose(entries, "c,a")] == ["a", "c"]
    with pytest.raises(SystemExit, match="--only d: no such contestant; expected some of a, b, c"):
        rounds.choose(entries, "a,d")


@pytest.mark.parametrize("on_hangup", ["SIG_DFL", "SIG_IGN"])  # as nohup has it
def test_a_parent_that_is_killed_leaves_no_child_behind(script, tmp_path, on_hangup):
    import subprocess

    program = f"""
import signal, sys, time
signal.signal(signal.SIGHUP, signal.{on_hangup})
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from pathlib import Path
from harness.children import Child
python, script, log = map(Path, ({sys.executable!r}, {str(script)!r}, {str(tmp_path / "log")!r}))
job = {{"rate": 1.0, "paths": sys.path[:1]}}
child = Child(python, script, "orphan", job, {CPUS!r}, log)
print(*child.ask("pids"), flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(comes_to(pid, "T") for pid in pids)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert all(comes_to(pid, "", "Z") for pid in pids)
