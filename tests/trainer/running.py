"""What the tests of whole commands share: processes of the narrow net on the synthetic mini-shard, and their records.

"The same metrics" means equal but for the timing fields and events, as the format promises.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer import checkpoint

BIN = Path(sys.executable).parent
TIMING = {"images_per_s", "data_wait_fraction", "time_s", "gpu_utilisation", "gpu_memory_bytes"}
NARROW = ["--recipe", "demo", "--set", "width=0.0625", "--global-batch-size", "2", "--epochs", "3"]
DEADLINE_S = 120


def environment() -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if not k.startswith("ALEXNET_")}, "OMP_NUM_THREADS": "1"}


def run(command: str, *arguments: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess:
    words = [str(BIN / command), *map(str, arguments)]
    done = subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stderr
    return done


def start_training(shards: Path, cwd: Path, *arguments: object, stdout: int | None = None) -> subprocess.Popen:
    words = [str(BIN / "alexnet-train"), "--shards", str(shards), *NARROW, *map(str, arguments)]
    return subprocess.Popen(
        words,
        cwd=cwd,
        env=environment(),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        # a suite started in the background ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def read_records(run_folder: Path) -> list[dict]:
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def without_timing(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records if record["kind"] != "event"]


def model_of(run_folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run_folder / "checkpoints" / "last.pt")["model"]


def assert_same_run(got: Path, expected: Path) -> None:
    assert without_timing(read_records(got)) == without_timing(read_records(expected))
    weights, expected_weights = model_of(got), model_of(expected)
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    assert_events_are_the_records(got)


def assert_events_are_the_records(run_folder: Path) -> None:
    """TensorBoard shows each step once, after however many kills, with the record's number."""
    if not (run_folder / "tensorboard").is_dir():
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for tag, kind in (("loss/training", "train"), ("loss/validation", "eval")):
        records = [record for record in read_records(run_folder) if record["kind"] == kind]
        expected = [
            (record["step"], pytest.approx(record["loss"])) for record in records if record.get("crops") != "ten"
        ]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected
