"""What a run leaves behind: its folder, and no process, shared memory or temporary file, however it ends."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_S = 120  # far beyond what an end takes
PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path
from trainer.launch import launch
from trainer.recipe import RECIPES
from trainer.config import Job
from trainer.train import run_rank
if __name__ == "__main__":
    shards, runs, num_ranks, epochs = sys.argv[1:]
    recipe = replace(RECIPES["demo"], width=1 / 16, global_batch_size=8, epochs=int(epochs))
    job = Job(shards, Path(runs), "run", recipe, seed=0, use_gpu=False)
    sys.exit(launch(run_rank, (job,), int(num_ranks)) if num_ranks != "1" else run_rank(job))
"""


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    """benchmarks/soak.py, which knows how processes and their shared memory are found."""
    spec = importlib.util.spec_from_file_location("soak", ROOT / "benchmarks" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_rank(pid: int) -> bool:
    """Whether a process is one that multiprocessing has spawned to work, not to keep its books."""
    words = Path("/proc", str(pid), "cmdline").read_bytes()
    return b"spawn_main" in words


def wait_for_checkpoint(process: subprocess.Popen, runs: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not list(runs.glob("*/checkpoints/last.pt")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)  # a poll


@pytest.mark.parametrize(
    ("num_ranks", "ending", "status"),
    [
        (2, "SIGKILL", 1),
        pytest.param(2, "launcher killed", -9, marks=pytest.mark.slow),
        pytest.param(1, "end", 0, marks=pytest.mark.slow),
        pytest.param(1, "SIGTERM", 143, marks=pytest.mark.slow),
        pytest.param(2, "end", 0, marks=pytest.mark.slow),
        pytest.param(2, "SIGTERM", 143, marks=pytest.mark.slow),
    ],
)
def test_a_run_leaves_its_folder_and_nothing_else(ready_shards, tmp_path, soak, num_ranks, ending, status):
    temporary, runs, program = tmp_path / "tmp", tmp_path / "runs", tmp_path / "train.py"
    temporary.mkdir()
    program.write_text(PROGRAM)
    mark, epochs = f"TMPDIR={temporary}", "2" if ending == "end" else "100000"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ALEXNET_", "TORCHELASTIC_"))}
    process = subprocess.Popen(
        [sys.executable, str(program), str(ready_shards), str(runs), str(num_ranks), epochs],
        cwd=tmp_path,
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_checkpoint(process, runs)
        pids = soak.list_processes(mark)
        shared = soak.find_shared(pids)
        if ending == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        elif ending == "launcher killed":
            process.kill()
        elif ending == "SIGKILL":
            os.kill(max(filter(is_rank, pids)), signal.SIGKILL)
        _, errors = process.communicate(timeout=DEADLINE_S)
        left = soak.list_processes(mark)
        deadline = time.monotonic() + DEADLINE_S
        while left and ending == "launcher killed" and time.monotonic() < deadline:
            time.sleep(0.1)  # a poll: nobody waits for the process that keeps multiprocessing's books
            left = soak.list_processes(mark)
    finally:
        for pid in soak.list_processes(mark):
            os.kill(pid, signal.SIGKILL)
    assert len(pids) >= (1 if num_ranks == 1 else 3) or ending == "end"
    if ending == "SIGKILL":  # the launcher is run bare here; the command says it in one line and leaves with 1
        assert "was killed by SIGKILL" in errors
    assert process.returncode == status, errors
    assert left == []
    assert [path for path in shared if Path(path).exists()] == []
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")] == []
    assert {path.name for path in runs.iterdir()} == {"run"} and not list(runs.rglob("*.tmp"))
