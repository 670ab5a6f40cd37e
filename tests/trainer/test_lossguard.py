"""A loss that is not finite stops a run or is left out, with the samples' keys kept; one stuck at guessing is named."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.common.errors import UserError
from pipeline.loader import Batch
from tests.trainer.trained import DEMO, PAPER
from trainer import checkpoint, train
from trainer import safety as lossguard
from trainer import train as run
from trainer.config import Job, Safety
from trainer.distributed import Ranks
from trainer.launch import launch
from trainer.safety import LossGuard, StuckLoss
from trainer.step import Learner

ALONE = Ranks(0, 1, torch.device("cpu"))
RECIPE = replace(DEMO, global_batch_size=8, epochs=1, schedule="milestones")


class Poisoned(run.TrainFeed):
    """Feeds images that are not numbers at some steps, on the last rank."""

    steps: tuple[int, ...] = (3,)

    def __iter__(self):
        for batch in super().__iter__():
            if self.step in self.steps and self._ranks.rank == self._ranks.world_size - 1:
                batch = Batch(torch.full_like(batch.images, math.nan), batch.labels)
            yield batch


def make_job(shards: Path, runs: Path, mode: str, recipe=RECIPE) -> Job:
    safety = Safety(on_nonfinite=mode, checkpoint_minutes=0)
    return Job(shards=str(shards), runs=runs, name="run", recipe=recipe, seed=0, use_gpu=False, safety=safety)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_samples(ready_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "TrainFeed", Poisoned)
    seen = []
    monkeypatch.setattr(run.LossGuard, "begin", remember(run.LossGuard.begin, seen))
    with pytest.raises(UserError, match=r"nan after step 8, .*: step 3 was the first, .*; .*--lr") as told:
        train.run_rank(make_job(ready_shards, tmp_path, "stop"))
    (line,) = read_lines(tmp_path / "run" / "nonfinite.jsonl")
    assert str(tmp_path / "run" / "nonfinite.jsonl") in str(told.value)
    assert (line["step"], line["epoch"], line["action"]) == (3, 1, "stopped")
    assert line["ranks"] == [{"loss_finite": False, "keys": [f"{key:09d}" for key in seen[2]]}] and len(seen[2]) == 8
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []  # nothing was made of ruined weights
    assert "no checkpoint" in str(told.value) and "is kept" not in str(told.value)


def remember(begin, seen: list):
    def begun(self, step, keys, **about):
        seen.append(keys.tolist())
        begin(self, step, keys, **about)

    return begun


def test_skipped_steps_are_counted_and_the_run_goes_on(ready_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "TrainFeed", Poisoned)
    monkeypatch.setattr(Poisoned, "steps", (3, 5))
    assert train.run_rank(make_job(ready_shards, tmp_path, "skip")) == 0
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    skipped = [record for record in records if record.get("name") == "nonfinite_skipped"]
    assert [(record["step"], record["total"]) for record in skipped] == [(3, 1), (5, 2)]
    assert all(math.isfinite(record["loss"]) for record in records if record["kind"] == "train")
    lines = read_lines(tmp_path / "run" / "nonfinite.jsonl")
    assert [(line["step"], line["action"]) for line in lines] == [(3, "skipped"), (5, "skipped")]
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert saved["skipped"] == 2 and saved["step"] == 8


def test_a_skipped_step_leaves_weights_and_velocity_as_they_are():
    learner = Learner(RECIPE, 4, ALONE)
    learner.schedule.begin_step(1, 0, 8)
    guard = LossGuard(ALONE, Path("unused"), "skip", list(learner.model.parameters()))
    guard._save_keys = lambda *_: "nowhere"
    images, labels = torch.randn(4, 3, 224, 224), torch.tensor([0, 1, 2, 3])
    learner.step(images, labels, guard.may_update)
    assert guard.skipped == 0
    before = [tensor.clone() for tensor in flatten(learner)]
    images[2, 1, 5, 5] = math.inf
    learner.step(images, labels, guard.may_update)
    assert guard.skipped == 1 and guard.has_skipped
    assert all(torch.equal(now, then) for now, then in zip(flatten(learner), before, strict=True))
    learner.step(images.nan_to_num(posinf=0.0), labels, guard.may_update)
    assert not all(torch.equal(now, then) for now, then in zip(flatten(learner), before, strict=True))


def flatten(learner: Learner) -> list[torch.Tensor]:
    velocities = [values["momentum_buffer"] for values in learner.optimizer.state.values()]
    return [*learner.model.state_dict().values(), *velocities]


def test_gradients_that_are_not_finite_are_skipped_though_the_loss_is():
    weight = torch.ones(3)
    guard = LossGuard(ALONE, Path("unused"), "skip", [weight])
    guard._save_keys = lambda *_: "nowhere"
    for gradient, expected in (([1.0, 2.0, 3.0], True), ([1.0, math.inf, 3.0], False), ([math.nan, 0.0, 0.0], False)):
        weight.grad = torch.tensor(gradient)
        assert guard.may_update(torch.tensor(1.5)) is expected
    weight.grad = torch.full((3,), 3e38)  # large, but a number
    assert guard.may_update(torch.tensor(1.5))


def test_skipping_ends_when_every_step_is_skipped(tmp_path):
    guard = LossGuard(ALONE, tmp_path, "skip", [])
    for step in range(1, 20):
        guard.begin(step, torch.tensor([step]), epoch=1, lr=0.1)
        assert not guard.may_update(torch.tensor(math.nan))
    guard.begin(20, torch.tensor([20]), epoch=1, lr=0.1)
    with pytest.raises(UserError, match=r"20 steps in a row up to step 20"):
        guard.may_update(torch.tensor(math.inf))
    assert len(read_lines(tmp_path / "nonfinite.jsonl")) == 20


def test_skipped_steps_that_good_ones_come_between_end_no_run_however_many(tmp_path):
    guard = LossGuard(ALONE, tmp_path, "skip", [], skipped=15)  # of a run resumed
    for step in range(1, 201):
        guard.begin(step, torch.tensor([step]), epoch=1, lr=0.1)
        is_good = step % 20 == 0  # 19 bad ones in a row, ten times
        assert guard.may_update(torch.tensor(1.5 if is_good else math.nan)) == is_good
    assert guard.skipped == 15 + 190


def test_the_first_step_that_was_not_finite_is_remembered_without_reading_the_loss(tmp_path):
    guard = LossGuard(ALONE, tmp_path, "stop", [])
    for step, loss in ((41, 1.0), (42, math.inf), (43, math.nan), (44, 1.0)):
        guard.begin(step, torch.tensor([step, 7]), epoch=3, lr=0.5)
        guard.saw(torch.tensor(loss, dtype=torch.float64))
    with pytest.raises(UserError, match=r"after step 44, .*: step 42 was the first"):
        guard.stop(math.nan)
    (line,) = read_lines(tmp_path / "nonfinite.jsonl")
    expected = {"step": 42, "epoch": 3, "lr": 0.5, "action": "stopped"}
    assert line == {**expected, "ranks": [{"loss_finite": False, "keys": ["000000042", "000000007"]}]}


def test_keys_that_cannot_be_written_do_not_hide_the_loss(tmp_path):
    guard = LossGuard(ALONE, tmp_path / "gone", "stop", [])
    guard.begin(1, torch.tensor([1]), epoch=1, lr=0.1)
    with pytest.raises(UserError, match=r"training loss is nan .*\(not written: .*No such file"):
        guard.stop(math.nan)


def train_poisoned(job: Job) -> int:
    run.TrainFeed = Poisoned
    try:
        return train.run_rank(job)
    except UserError as error:
        (job.runs / f"told-{torch.distributed.get_rank()}").write_text(str(error))
        return 0


@pytest.mark.slow
def test_ranks_agree_when_only_one_of_them_has_a_loss_that_is_not_finite(ready_shards, tmp_path):
    for mode in ("skip", "stop"):
        runs = tmp_path / mode
        assert launch(train_poisoned, (make_job(ready_shards, runs, mode),), 2) == 0
        (line,) = read_lines(runs / "run" / "nonfinite.jsonl")
        assert line["step"] == 3 and [len(rank["keys"]) for rank in line["ranks"]] == [4, 4]
        assert not set(line["ranks"][0]["keys"]) & set(line["ranks"][1]["keys"])
        assert [rank["loss_finite"] for rank in line["ranks"]] == [True, False]
    told = [(tmp_path / "stop" / f"told-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1] and "step 3 was the first" in told[0]
    assert not list((tmp_path / "skip").glob("told-*"))


def test_a_loss_at_guessing_for_long_is_told_once_with_the_rate():
    stuck, guessing = StuckLoss(1000, 10_000), math.log(1000)
    said = [stuck.watch(guessing + 0.05, 20, 0.01) for _ in range(249)]
    assert said == [None] * 249
    assert "5000 steps" in (line := stuck.watch(guessing, 20, 0.01)) and "--lr is 0.01" in line and "labels" in line
    assert "--set init=he" in line and "--set hidden_bias=0.1" in line  # the commonest report, and Caffe's remedy
    assert [stuck.watch(guessing, 20, 0.01) for _ in range(300)] == [None] * 300


@pytest.mark.parametrize(("steps_per_epoch", "long"), [(32, 500), (200, 1000), (10_000, 5000)])
def test_how_long_is_long_follows_from_the_epochs_between_limits(steps_per_epoch, long):
    stuck = StuckLoss(4, steps_per_epoch)
    told = next(number for number in range(1, 1000) if stuck.watch(math.log(4), 20, 0.1))
    assert told * 20 == long


def test_a_loss_that_leaves_guessing_for_a_moment_is_not_stuck():
    stuck = StuckLoss(4, 32)
    for _ in range(10):
        assert not any(stuck.watch(math.log(4), 20, 0.1) for _ in range(24))
        assert stuck.watch(1.2, 20, 0.1) is None
    assert stuck.watch(math.nan, 20, 0.1) is None


def test_a_run_whose_rate_is_too_low_says_so_and_records_it(ready_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lossguard, "_STUCK_FEWEST", 8)
    monkeypatch.setattr(lossguard, "_STUCK_EPOCHS", 1)
    monkeypatch.setattr(lossguard, "_STUCK_MARGIN", 0.05)  # a sixteenth of the net begins further from it
    recipe = replace(PAPER, global_batch_size=8, epochs=1, schedule="milestones", lr=1e-9)
    assert train.run_rank(make_job(ready_shards, tmp_path, "stop", recipe)) == 0
    assert "warning: for 8 steps the loss has been that of guessing, ln(4) = 1.386" in capsys.readouterr().err
    assert [record["step"] for record in read_lines(tmp_path / "run" / "metrics.jsonl") if record.get("name")] == [8]
