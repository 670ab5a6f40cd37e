"""A run in which nothing moves ends, with the stacks of all threads; one that is slow or was frozen itself does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.trainer.running import DEADLINE_S, NARROW, assert_same_run, environment, read_records
from trainer.distributed import Ranks
from trainer.safety import START_S, STATUS_HUNG, Watchdog, dump_stacks, find_state

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 4

# alexnet-train, as if the machine had so many GPUs; the last rank stops moving, in some way, somewhere.
PROGRAM = """
import os, signal, threading
from trainer import train
from trainer import safety as watchdog
from trainer import train as run
from trainer.commands import train as cli

NUM_RANKS, HOW, WHERE = int(os.environ["NUM_RANKS"]), os.environ["HOW"], os.environ["WHERE"]

def this_never_returns():
    if int(os.environ.get("RANK", "0")) != NUM_RANKS - 1:
        return
    if HOW == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if HOW == "holding":  # the interpreter, as a library might
        import ctypes
        ctypes.PyDLL(None).sleep(1000)
    threading.Event().wait()

class Feed(run.TrainFeed):
    def __iter__(self):
        for batch in super().__iter__():
            if WHERE == "step" and self.step == 5:
                this_never_returns()
            yield batch

class Shards(run.ShardSet):
    @classmethod
    def open(cls, *words, **named):
        this_never_returns()
        return super().open(*words, **named)

if WHERE == "start":
    watchdog.START_S = 4
    run.ShardSet = Shards
if WHERE == "evaluation":
    evaluate = train.evaluate
    train.evaluate = lambda *words, **named: (evaluate(*words, **named), this_never_returns())[0]

cli.choose_devices = lambda _: (NUM_RANKS, False)
run.TrainFeed = Feed
if __name__ == "__main__":
    cli.train()
"""


class Clock:
    def __init__(self) -> None:
        self.now_s, self.written, self.ended = 0.0, [], []

    def make(self, timeout_s: float = 10.0) -> Watchdog:
        alone = Ranks(0, 1, torch.device("cpu"))
        return Watchdog(alone, timeout_s, end=self.ended.append, clock=lambda: self.now_s, write=self.written.append)

    def tick(self, watchdog: Watchdog, num: int, step_s: float = 1.0) -> bool:
        ended = False
        for _ in range(num):
            self.now_s += step_s
            ended = watchdog.tick() or ended
        return ended


def test_nothing_happens_while_something_moves_however_slowly():
    clock = Clock()
    watchdog = clock.make(timeout_s=10)
    for _ in range(5):
        assert not clock.tick(watchdog, 9)
        watchdog.beat("a batch of the evaluation")
    assert not clock.ended


def test_after_the_timeout_the_stacks_of_all_threads_are_shown_with_what_moved_last():
    clock = Clock()
    watchdog = clock.make(timeout_s=10)
    watchdog.beat("step 7 of epoch 2")
    assert not clock.tick(watchdog, 10)  # the first tick sees the beat
    assert clock.tick(watchdog, 1) and clock.ended == [STATUS_HUNG]
    said = "".join(clock.written)
    assert "nothing has moved for 10 s, since step 7 of epoch 2" in said and "--resume" in said
    assert "test_watchdog.py" in said and "most recent call first" in said


@pytest.mark.parametrize("jump_s", [1e6, -1e6])
def test_a_process_that_was_frozen_and_a_clock_that_jumps_do_not_count(jump_s):
    clock = Clock()
    watchdog = clock.make(timeout_s=10)
    watchdog.beat("step 7 of epoch 2")
    assert not clock.tick(watchdog, 6)  # the first tick sees the beat
    clock.now_s += jump_s
    assert not clock.tick(watchdog, 3)
    assert clock.tick(watchdog, 3)


def test_a_start_without_beats_may_take_minutes_but_not_for_ever():
    clock = Clock()
    watchdog = clock.make(timeout_s=10)
    assert not clock.tick(watchdog, int(START_S) - 1)
    assert clock.tick(watchdog, 1) and f"nothing has moved for {START_S:g} s, since the start" in clock.written[0]


def test_stacks_name_the_function_and_a_stopped_process_is_known_as_such():
    assert "test_stacks_name_the_function" in dump_stacks()
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        assert find_state(child.pid) == "stopped"
    finally:
        child.kill()
        child.communicate()
    assert find_state(child.pid) == "gone"


def run_hanging(shards: Path, cwd: Path, num_ranks: int, how: str, where: str) -> tuple[str, int]:
    """(stderr, status) of a training in which one rank stops moving."""
    program = cwd / "train.py"
    program.write_text(PROGRAM)
    words = [program, "--shards", shards, *NARROW, "--timeout-s", TIMEOUT_S]
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**environment(), "PYTHONPATH": str(ROOT), "NUM_RANKS": str(num_ranks), "HOW": how, "WHERE": where},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=DEADLINE_S)[1], process.returncode
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_step_that_hangs_ends_with_the_stacks(ready_shards, tmp_path):
    errors, status = run_hanging(ready_shards, tmp_path, 1, "waits", "step")
    assert status == 1, errors
    assert f"error: nothing has moved for {TIMEOUT_S} s, since step 4 of epoch 1" in errors
    assert "in this_never_returns" in errors
    assert errors.rstrip().splitlines()[-1].startswith("error: ended after --timeout-s; the last checkpoint is kept")


@pytest.mark.slow
def test_a_step_that_hangs_holding_the_interpreter_ends_too_with_the_stacks(ready_shards, tmp_path):
    errors, status = run_hanging(ready_shards, tmp_path, 1, "holding", "step")
    assert status == 1 and "in this_never_returns" in errors, errors


def test_a_start_that_hangs_ends_with_the_stacks(ready_shards, tmp_path):
    errors, status = run_hanging(ready_shards, tmp_path, 1, "waits", "start")
    assert status == 1 and f"error: nothing has moved for {TIMEOUT_S} s, since the start" in errors, errors
    assert "in this_never_returns" in errors and list(tmp_path.glob("runs/*")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "other"), [("start", "in check_alike"), ("step", "in train_step"), ("evaluation", "in gather")]
)
def test_when_one_rank_hangs_the_stacks_of_all_are_shown_and_all_end(ready_shards, tmp_path, where, other):
    started_s = time.monotonic()
    errors, status = run_hanging(ready_shards, tmp_path, 2, "waits", where)
    assert status == 1, errors
    assert errors.count("nothing has moved for") == 1 and errors.count("in this_never_returns") == 1
    assert other in errors, errors  # where the other one waits for it
    assert time.monotonic() - started_s < DEADLINE_S


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_the_run_ends(ready_shards, tmp_path):
    errors, status = run_hanging(ready_shards, tmp_path, 2, "stopped", "step")
    assert status == 1, errors
    assert "error: rank 0: nothing has moved" in errors and "rank 1 (process " in errors and ", stopped):" in errors


def test_a_clock_that_jumps_changes_nothing(ready_shards, tmp_path, finished):
    program = tmp_path / "train.py"
    program.write_text(
        "import itertools, time\n"
        "jumps = itertools.cycle([0.0, -1e9, 1e9, 5.0])\n"
        "time.time = lambda: 1.7e9 + next(jumps)\n"
        "from trainer.commands import train\n"
        "if __name__ == '__main__':\n    train.train()\n"
    )
    words = [sys.executable, program, "--shards", ready_shards, *NARROW, "--timeout-s", 60]
    done = subprocess.run(
        [str(word) for word in words], cwd=tmp_path, env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    times = [record["time_s"] for record in read_records(tmp_path / "runs" / "demo") if record["kind"] == "train"]
    assert times == sorted(times) and times[0] > 0 and times[-1] < 300
    assert_same_run(tmp_path / "runs" / "demo", finished)


def test_no_wall_clock_is_read_in_training():
    allowed = {"environment.py", "tensorboard.py"}  # when something was written, for a person
    reading = {
        path.name
        for path in (ROOT / "trainer").glob("*.py")
        if any(word in path.read_text() for word in ("time.time(", "datetime.now(", "time.localtime(", "utcnow("))
    }
    assert reading <= allowed
