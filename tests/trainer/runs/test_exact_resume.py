"""A run that is killed again and again, at moments drawn at random, equals one that nothing disturbed: to the last bit.

Each start is the same command, `--resume auto`. A moment is a number of lines in metrics.jsonl, and then a delay of up
to 60 ms, in which steps, records and the writing of checkpoints go on; or a time within the start-up.
"""

import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trainer.running import DEADLINE_S, NARROW, assert_same_run, environment, read_records

ROOT = Path(__file__).resolve().parents[3]
OFTEN = ["--checkpoint-minutes", "0.0001", "--resume", "auto"]  # at every record


def start(num_ranks: int, shards: Path, cwd: Path, epochs: int, *words: str) -> list[subprocess.Popen]:
    flags = ["--shards", str(shards), *NARROW, "--epochs", str(epochs), *words]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if num_ranks > 1 else {}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "trainer", *flags],
            cwd=cwd,
            env={**environment(), "PYTHONPATH": str(ROOT), **meeting, **({"RANK": str(rank)} if meeting else {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]


def end(ranks: list[subprocess.Popen]) -> str:
    return "".join(rank.communicate(timeout=DEADLINE_S)[1] for rank in ranks)


def kill_when(ranks: list[subprocess.Popen], run: Path, num_lines: int, delay_s: float, draw: random.Random) -> bool:
    """Kill the ranks, in random order, `delay_s` after the run has so many lines; False if they had ended before."""
    deadline = time.monotonic() + DEADLINE_S
    while num_lines and len(read_records(run)) < num_lines and all(rank.poll() is None for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.002)  # a poll
    time.sleep(delay_s)  # the moment that was drawn
    has_ended = all(rank.poll() == 0 for rank in ranks)
    for rank in draw.sample(ranks, len(ranks)):
        rank.send_signal(signal.SIGKILL)
    errors = end(ranks)
    assert has_ended or all(rank.returncode == -signal.SIGKILL for rank in ranks), errors
    return not has_ended


def disturb(shards: Path, cwd: Path, *, num_ranks: int, epochs: int, num_kills: int, seed: int) -> int:
    """How often the run demo was killed on its way to its end."""
    draw, run, num_lines = (
        random.Random(seed),
        cwd / "runs" / "demo",
        3 * epochs,
    )  # of an epoch: 2 records, 1 evaluation
    moments = sorted(draw.randrange(0, num_lines - 2) for _ in range(num_kills))
    killed = 0
    for moment in moments:
        delay_s = draw.uniform(0, 0.06) if moment else draw.uniform(0, 4)
        killed += kill_when(start(num_ranks, shards, cwd, epochs, *OFTEN), run, moment, delay_s, draw)
    ranks = start(num_ranks, shards, cwd, epochs, *OFTEN)
    errors = end(ranks)
    assert all(rank.returncode == 0 for rank in ranks), errors
    return killed


def test_a_run_killed_at_five_random_moments_equals_the_undisturbed_run(finished, ready_shards, tmp_path):
    killed = disturb(ready_shards, tmp_path, num_ranks=1, epochs=3, num_kills=5, seed=1)
    assert killed >= 4  # a moment near the end may come after it
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]
    assert_same_run(tmp_path / "runs" / "demo", finished)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_killed_at_thirty_random_moments_equals_the_undisturbed_run(num_ranks, ready_shards, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    ranks = start(num_ranks, ready_shards, straight, 12)
    errors = end(ranks)
    assert all(rank.returncode == 0 for rank in ranks), errors
    num_kills = disturb(ready_shards, killed, num_ranks=num_ranks, epochs=12, num_kills=30, seed=num_ranks)
    print(f"{num_ranks} ranks: killed {num_kills} times")
    assert num_kills >= 28
    assert_same_run(killed / "runs" / "demo", straight / "runs" / "demo")
    assert list((killed / "runs" / "demo" / "checkpoints").glob(".*")) == []
