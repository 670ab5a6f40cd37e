"""Training on several ranks as a whole: fed by halves, another number of ranks or another mode from an epoch on, and a
rank that dies. The narrow net on the synthetic mini-shard; a number of ranks in a process's place, by our launcher.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.operators import load_operators
from pipeline.options import LoaderOptions
from pipeline.shards import ShardSet
from trainer import checkpoint
from trainer.checkpoint import check_resumable, choose_streams, find_launched
from trainer.config import Job, Parallel
from trainer.data import TrainFeed
from trainer.distributed import Ranks, gather, join
from trainer.launch import launch
from trainer.recipe import RECIPES
from trainer.train import run_rank

ROOT = Path(__file__).resolve().parents[3]
RECIPE = replace(RECIPES["demo"], width=1 / 16, global_batch_size=8, epochs=1, schedule="milestones")
TIMING = {"images_per_s", "data_wait_fraction", "time_s"}

# alexnet-train, as if the machine had two GPUs; in epoch 2 the second rank dies, once, if told to.
PROGRAM = """
import os, signal
from trainer import distributed
from trainer import train as run
from trainer.commands import train as cli

class Feed(run.TrainFeed):
    def begin_epoch(self, epoch):
        super().begin_epoch(epoch)
        if epoch == 2 and "DIES" in os.environ and os.environ["RANK"] == "1" and not distributed.restart_count():
            os.kill(os.getpid(), signal.SIGKILL)

cli.choose_devices = lambda _: (2, False)
run.TrainFeed = Feed
if __name__ == "__main__":
    cli.train()
"""


def make_job(shards: Path, runs: Path, **changes) -> Job:
    return Job(**{"shards": str(shards), "runs": runs, "name": "run", "recipe": RECIPE, "seed": 0, "use_gpu": False,
                  **changes})  # fmt: skip


def compare_feeds(shards: str, variants: tuple[dict, ...]) -> int:
    with join(use_gpu=False) as ranks:
        opened = ShardSet.open(shards)
        colors = ColorStats.load(opened.root, opened.fingerprint)
        for changes in variants:
            recipe = replace(RECIPE, **changes)
            apart, whole = (
                TrainFeed(opened, colors, recipe, ranks, seed=5, options=LoaderOptions(), whole=whole)
                for whole in (False, True)
            )
            for _, own, both in zip(range(3), apart, whole, strict=False):
                expected = torch.cat(gather(own.images.clone(), ranks))
                torch.testing.assert_close(both.images, expected, rtol=0, atol=0 if load_operators() else 1e-3)
                assert torch.equal(both.labels, own.labels)
                assert len(both.images) == recipe.global_batch_size and expected.std() > 0
    return 0


def test_columns_are_fed_the_bits_that_both_ranks_would_have_fed_themselves(ready_shards):
    variants = ({"lighting": "paper", "mean": "image", "unit_variance": False}, {"lighting": "original"})
    assert launch(compare_feeds, (str(ready_shards), variants), 2) == 0


def read_evals(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "eval"]


@pytest.mark.slow
def test_every_mode_and_number_of_ranks_goes_on_from_the_epoch_of_another(ready_shards, tmp_path):
    run = tmp_path / "run"
    steps = [(2, "columns"), (1, "data"), (2, "hybrid"), (4, "data"), (2, "columns")]
    for epoch, (num_ranks, mode) in enumerate(steps, start=1):
        recipe = replace(RECIPE, epochs=epoch)
        job = make_job(
            ready_shards, tmp_path, recipe=recipe, parallel=Parallel(mode), resume=run if epoch > 1 else None
        )
        assert (launch(run_rank, (job,), num_ranks) if num_ranks > 1 else run_rank(job)) == 0
        state = checkpoint.load(run / "checkpoints" / "last.pt")
        assert len(state["ranks"]) == num_ranks and state["epoch"] == epoch + 1
        assert state["model"]["conv3.weight"].shape == (24, 16, 3, 3)  # whole, whoever saved it
        assert state["optimizer"]["state"][0]["momentum_buffer"].shape == state["model"]["conv1.weight"].shape
    evals = read_evals(run)
    assert [(record["epoch"], record["num_images"]) for record in evals] == [(n, 24) for n in range(1, 6)]


def test_streams_never_repeat_when_the_number_of_ranks_changes():
    saved = {"feed_seed": 0, "epoch": 4, "ranks": [{}] * 2}
    two, three = Ranks(0, 2, torch.device("cpu")), [Ranks(n, 3, torch.device("cpu")) for n in range(3)]
    assert choose_streams(0, saved, two) == choose_streams(0, None, two)  # gone on with from where it was
    changed = [choose_streams(0, saved, ranks) for ranks in three]
    assert len({streams.feed for streams in changed}) == 1 and changed[0].feed != 0
    assert len({streams.dropout for streams in [*changed, choose_streams(0, None, two)]}) == 4
    later = choose_streams(0, {**saved, "epoch": 5}, three[0])
    assert later.feed != changed[0].feed and later.dropout != changed[0].dropout


def test_inside_an_epoch_another_number_of_ranks_is_refused_with_the_reason_and_the_way_back(ready_shards):
    shards = ShardSet.open(ready_shards)
    saved = {"ranks": [{"loader": {"step": 3}}] * 2, "epoch": 4, "shards_fingerprint": shards.fingerprint}
    check_resumable(saved, Path("run"), shards, Ranks(0, 2, torch.device("cpu")))
    with pytest.raises(UserError, match=r"3 steps of epoch 4 on 2 ranks, got 1 rank; .* --restart-epoch"):
        check_resumable(saved, Path("run"), shards, Ranks(0, 1, torch.device("cpu")))
    saved["ranks"][0]["loader"]["step"] = 0
    check_resumable(saved, Path("run"), shards, Ranks(0, 1, torch.device("cpu")))


def test_after_a_restart_the_run_of_the_same_launch_is_found(tmp_path):
    for name, launched in (("run", "a"), ("run-2", "b"), ("run-3", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"launch_id": launched}))
    assert find_launched(tmp_path, "b") == tmp_path / "run-2"
    assert find_launched(tmp_path, "c") is None and find_launched(tmp_path / "none", "a") is None
    assert find_launched(tmp_path, None) is None  # no launcher: nothing is ours


def train(program: Path, shards: Path, cwd: Path, *words: object, status: int = 0, **changes: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ALEXNET_", "TORCHELASTIC_"))}
    flags = ["--shards", shards, "--recipe", "demo", "--set", "width=0.0625", "--global-batch-size", 8, "--epochs", 3]
    done = subprocess.run(
        [sys.executable, str(program), *map(str, [*flags, *words])],
        cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stderr


def without_timing(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMING} for r in records if r["kind"] != "event"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["data", "columns"])
def test_a_run_whose_rank_was_killed_is_restarted_to_the_same_numbers(ready_shards, tmp_path, mode):
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    train(program, ready_shards, tmp_path, "--name", "straight", "--parallel", mode)
    errors = train(
        program, ready_shards, tmp_path, "--name", "killed", "--parallel", mode, "--max-restarts", 1, DIES="1"
    )
    assert "rank 1 was killed by SIGKILL (out of memory? see dmesg): restart 1 of 1, from the last checkpoint" in errors
    assert "restart 1: goes on after step 8" in errors and "Traceback" not in errors
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["killed", "straight"]
    one, other = (tmp_path / "runs" / name for name in ("straight", "killed"))
    assert without_timing(one) == without_timing(other)
    states = [checkpoint.load(run / "checkpoints" / "last.pt") for run in (one, other)]
    assert all(torch.equal(weight, states[1]["model"][name]) for name, weight in states[0]["model"].items())
