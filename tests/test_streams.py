"""Every command where nobody can take what it writes: a full disk, a reader that has left, a stream that was closed.

Its remarks may be lost, its work and its status are not; a result that cannot be written is one line and status 1.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.documents import PROJECT, ROOT
from tests.docs.every_command import COMMANDS, TWO_RANKS, WITH_RAY, fill
from tests.streams import KINDS, STDERR, STDOUT, open_broken, run_broken
from tests.trainer.running import NARROW, environment

# Runs each case on its standard input (a folder, a stream, what takes its place, words) as its script would, in a fork
# of a process that has imported what takes long. Prints (status, what was written to the other stream) of all.
RUNNER = """
import importlib, json, os, sys, tempfile
import matplotlib, torch
scripts, cases = json.load(sys.stdin)
results = []
for folder, stream, descriptor, words in cases:
    other = tempfile.TemporaryFile()
    child = os.fork()
    if not child:
        break
    _, status = os.waitpid(child, 0)
    other.seek(0)
    results.append((os.waitstatus_to_exitcode(status), other.read().decode()))
else:
    print(json.dumps(results))
    sys.exit()
os.chdir(folder)
os.dup2(other.fileno(), 3 - stream)
if descriptor is None:
    os.close(stream)
    name = {1: "stdout", 2: "stderr"}[stream]
    setattr(sys, name, None)
    setattr(sys, f"__{name}__", None)
else:
    os.dup2(descriptor, stream)
sys.argv = words
module, _, function = scripts[words[0]].partition(":")
getattr(importlib.import_module(module), function)()
"""
SILENT = {"train"}  # nothing on stdout


def run_all(command: str, cases: list[tuple[int, str]], unbuffered: str, places: dict[str, str], folder: Path):
    """(status, what the other stream got) for each case: a stream, and what it is."""
    jobs = []
    with open_broken("full") as full, open_broken("left") as left:
        descriptors = {"full": full, "left": left, "closed": None}
        for number, (stream, kind) in enumerate(cases):
            here = folder / str(number)
            here.mkdir()
            jobs.append((str(here), stream, descriptors[kind], fill(COMMANDS[command], places, here)))
        done = subprocess.run(
            [sys.executable, "-c", RUNNER],
            input=json.dumps([PROJECT["scripts"], jobs]),
            env={**environment(), "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(ROOT)},
            pass_fds=[full, left],
            capture_output=True,
            text=True,
            timeout=400,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(command: str, stream: int, kind: str, status: int, said: str) -> None:
    has_results = stream == STDOUT and command not in SILENT
    assert status == (1 if has_results and kind != "closed" else 0), said
    assert "Traceback" not in said and "Exception ignored" not in said, said
    complaints = [line for line in said.splitlines() if line.startswith("error")]
    expected = ["error: standard output: No space left on device; free some space or choose another folder"]
    assert complaints == (expected if has_results and kind == "full" else [])


@pytest.mark.parametrize("command", ["info", "shard", "train --json-logs"])  # the others, and in all ways: below
def test_a_full_disk_under_the_log_or_the_results_of_a_command(command, places, tmp_path):
    cases = [(STDERR, "full"), (STDOUT, "full")]
    for (stream, kind), (status, said) in zip(cases, run_all(command, cases, "", places, tmp_path), strict=True):
        check(command, stream, kind, status, said)


# As Python has its streams usually, and with PYTHONUNBUFFERED.
CASES = {
    "": [(stream, kind) for stream in (STDERR, STDOUT) for kind in KINDS],
    "1": [(STDERR, "full"), (STDERR, "left"), (STDOUT, "full")],
}


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", CASES, ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_nobody_listens_to(command, unbuffered, places, tmp_path):
    cases = CASES[unbuffered]
    results = run_all(command, cases, unbuffered, places, tmp_path)
    for (stream, kind), (status, said) in zip(cases, results, strict=True):
        check(command, stream, kind, status, said)


def start_training(how: str, folder: Path, shards: Path) -> list[str]:
    flags = ["--shards", str(shards), *NARROW, "--epochs", "1", "--no-tensorboard"]
    if how == "two ranks":
        (folder / "ranks.py").write_text(TWO_RANKS)
        return [sys.executable, "ranks.py", *flags]
    if how == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
        launcher += ["--rdzv-endpoint", "localhost:0", "--log-dir", str(folder / "logs")]
        return [sys.executable, *launcher, "-m", "trainer", *flags, "--gpus", "0"]
    return [sys.executable, "-m", "trainer", *flags, "--gpus", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "unbuffered"), [("full", ""), ("left", ""), ("closed", ""), ("full", "1")])
@pytest.mark.parametrize("how", ["python -m trainer", "two ranks", "torchrun"])
def test_training_goes_on_to_its_end_though_nobody_reads_its_log(how, kind, unbuffered, ready_shards, tmp_path):
    variables = {**environment(), "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(ROOT)}
    status, said = run_broken(start_training(how, tmp_path, ready_shards), STDERR, kind, variables, tmp_path)
    assert (status, said) == (0, "")
    assert (tmp_path / "runs" / "demo" / "checkpoints" / "epoch.pt").is_file()


@pytest.mark.slow
@WITH_RAY
@pytest.mark.ray
@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_made_by_ray_though_nobody_reads_its_log(kind, synth_tree, tmp_path):
    words = [str(Path(sys.executable).with_name("alexnet-prep")), "shard", str(synth_tree), "--engine", "ray"]
    variables = {**environment(), "PYTHONUNBUFFERED": ""}
    status, said = run_broken([*words, "--workers", "2"], STDERR, kind, variables, tmp_path)
    assert status == 0 and "next: alexnet-prep pca" in said
