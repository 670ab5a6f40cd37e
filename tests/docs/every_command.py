"""Every command, small: what tests of all of them run, and what their words stand for."""

import importlib.util
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.trainer.running import NARROW, run

# Not importorskip: Ray reads its token when it is imported, and other tests of this process want another.
WITH_RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
TRAIN = ["alexnet-train", "--shards", "SHARDS", *NARROW, "--epochs", "1", "--gpus", "0", "--no-tensorboard"]
_BENCH = ["--recipe", "demo", "--set", "width=0.0625", "--global-batch-size", "8", "--gpus", "0", "--seconds", "0.1"]
# TREE: images; SHARDS: with their colours; COPY: the same, to be written to; RUN: a run on them.
COMMANDS = {
    "synth": ["alexnet-prep", "synth", "images", "--classes", "2", "--train", "2", "--val", "2"],
    "shard": ["alexnet-prep", "shard", "TREE", "--workers", "2", "--samples-per-shard", "32"],
    "pca": ["alexnet-prep", "pca", "--shards", "COPY"],
    "verify": ["alexnet-prep", "verify", "--shards", "SHARDS", "--workers", "2", "--decode"],
    "info": ["alexnet-prep", "info", "--shards", "SHARDS"],
    "preview": ["alexnet-prep", "preview", "--shards", "SHARDS", "--samples", "1"],
    "doctor": ["alexnet-prep", "doctor", "--shards", "SHARDS"],
    "train": TRAIN,
    "train --json-logs": [*TRAIN, "--json-logs"],
    "eval": ["alexnet-eval", "RUN", "--gpus", "0"],
    "predict": ["alexnet-predict", "TREE/val", "--run", "RUN", "--gpus", "0"],
    "report": ["alexnet-report", "RUN", "--images", "0", "--out", "page.html"],
    "export": ["alexnet-export", "RUN", "--out", "net.safetensors"],
    "bench": ["alexnet-bench", "loader", "--shards", "SHARDS", *_BENCH, "--rounds", "1"],
}
# alexnet-train as if the machine had two GPUs: ranks that its own launcher starts
TWO_RANKS = """
from trainer.commands import train as cli
cli.choose_devices = lambda _: (2, False)
if __name__ == "__main__":
    cli.train()
"""


@pytest.fixture(scope="session")
def places(synth_tree: Path, ready_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the words of COMMANDS stand for; read-only."""
    folder = tmp_path_factory.mktemp("trained")
    run("alexnet-train", "--shards", ready_shards, *NARROW, "--epochs", "1", cwd=folder)
    return {"TREE": str(synth_tree), "SHARDS": str(ready_shards), "RUN": str(folder / "runs" / "demo")}


def fill(words: list[str], places: Mapping[str, str], folder: Path) -> list[str]:
    """The words of a command that is to be run in `folder`."""
    if "COPY" in words:
        subprocess.run(["cp", "-r", places["SHARDS"], str(folder / "copy")], check=True)
    known = {**places, "COPY": str(folder / "copy")}
    return [os.path.join(known.get(first, first), *rest) for first, *rest in (word.split("/") for word in words)]  # noqa: PTH118
