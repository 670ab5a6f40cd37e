"""A report says what the run's files say, and says in one line what is missing."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.common.errors import UserError
from pipeline.shards import ShardSet
from trainer import checkpoint
from trainer.model import AlexNet
from trainer.recipe import RECIPES, override, to_dict
from trainer.record.metrics import MetricsLog
from trainer.record.runs import BEST, CHECKPOINTS, LAST, METRICS, create_run, write_config
from trainer.report.data import RunData, read_run
from trainer.report.summary import choose_place, compare, draw, format_summary, label_runs, summarise

TRAIN = {"loss": 2.0, "top1_error": 80.0, "top5_error": 30.0, "lr": 0.01, "time_s": 1.0}
EVAL = {"num_images": 200, "loss": 1.5}
MODEL = {
    "conv1.weight": torch.randn(6, 3, 11, 11, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "conv2.weight": torch.zeros(16, 3, 5, 5),
    "fc8.weight": torch.zeros(10, 256),
}


def report(run, **options):
    data = read_run(run, **options)
    return summarise(data, draw(data))


@pytest.fixture
def run(tmp_path):
    made = create_run(tmp_path, "demo")
    with MetricsLog.open(made / METRICS, None) as log:
        for epoch, (rate, wait, error) in enumerate(
            [(1.0, 0.5, 60.0), (210.0, 0.1, 40.5), (220.0, 0.0, 45.0)], start=1
        ):
            log.train(step=10 * epoch, epoch=epoch, images_per_s=rate, data_wait_fraction=wait, **TRAIN)
            log.eval(step=10 * epoch, epoch=epoch, crops="centre", top1_error=error, top5_error=error / 10, **EVAL)
        log.eval(step=30, epoch=3, crops="ten", top1_error=39.0, top5_error=3.5, **EVAL)
    checkpoint.save(made / CHECKPOINTS / LAST, {"model": MODEL})
    return made


@pytest.fixture
def trained(run, ready_shards):
    """A run with a whole net and the place of its shards."""
    shards, recipe = ShardSet.open(ready_shards), override(RECIPES["demo"], ["width=0.0625"])
    state = {"recipe": to_dict(recipe), "num_classes": 4, "shards_fingerprint": shards.fingerprint}
    checkpoint.save(run / CHECKPOINTS / LAST, {**state, "model": AlexNet.from_recipe(recipe, 4).state_dict()})
    write_config(run, {"recipe": to_dict(recipe), "shards": str(ready_shards)})
    return run


def test_the_summary_says_what_the_files_say(run):
    summary = report(run)
    assert json.loads(json.dumps(summary)) == summary
    assert summary == {
        "run": str(run),
        "num_epochs": 3,
        "best_epoch": 2,
        "top1_error": 40.5,
        "top5_error": 4.05,
        "ten_crop_top1_error": 39.0,
        "ten_crop_top5_error": 3.5,
        "images_per_s": 210.0,
        "data_wait_fraction": pytest.approx(0.2),
        "checkpoint": str(run / CHECKPOINTS / LAST),
        "figures": [str(run / "figures" / "curves.png"), str(run / "figures" / "conv1_kernels.png")],
        "left_out": ["network and images: the checkpoint holds no recipe; draw them from one that alexnet-train saved"],
    }


def test_the_pictures_are_where_the_summary_says(run, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "trainer.report.summary.kernels_figure", lambda weight, towers: drawn.update(k=(weight, towers))
    )
    monkeypatch.setattr(
        "trainer.report.summary.curves_figure", lambda metrics, classes: drawn.update(c=(metrics, classes))
    )
    monkeypatch.setattr("trainer.report.summary.write_png", lambda _figure, path: None)
    report(run)
    assert drawn["c"][1] == 10
    assert drawn["k"][1] == 2  # conv2's kernels see three of conv1's six maps
    assert torch.equal(torch.from_numpy(drawn["k"][0]), MODEL["conv1.weight"].float())
    monkeypatch.undo()
    for path in report(run)["figures"]:
        Image.open(path).verify()


def test_the_best_checkpoint_goes_before_the_last(run):
    checkpoint.save(run / CHECKPOINTS / BEST, {"model": MODEL})
    assert report(run)["checkpoint"] == str(run / CHECKPOINTS / BEST)


def test_a_run_without_checkpoint_or_evaluation_is_reported_with_gaps(run):
    (run / CHECKPOINTS / LAST).unlink()
    first = (run / METRICS).read_bytes().splitlines(keepends=True)[0]
    (run / METRICS).write_bytes(first)
    summary = report(run)
    assert summary["num_epochs"] == 1
    assert summary["figures"] == [str(run / "figures" / "curves.png")]
    assert summary["checkpoint"] is summary["top1_error"] is summary["ten_crop_top1_error"] is None
    assert "best error" not in format_summary(summary)
    assert "no checkpoint yet" in format_summary(summary)


@pytest.mark.parametrize("content", [None, b"", b'{"kind": "event", "name": "started"}\n', b'{"kind": "tra'])
def test_a_run_that_has_measured_nothing_yet_is_refused_with_the_remedy(run, content):
    (run / METRICS).unlink()
    if content is not None:
        (run / METRICS).write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl: no measurements yet.*let the run go on"):
        report(run)
    assert not (run / "figures").exists()


@pytest.mark.parametrize(
    "state",
    [{}, {"model": [1]}, {"model": {}}, {"model": {"conv1.weight": 1}}, {"model": {"conv1.weight": torch.zeros(6, 3)}}],
)
def test_a_checkpoint_that_holds_no_alexnet_is_refused(run, state):
    checkpoint.save(run / CHECKPOINTS / LAST, state)
    with pytest.raises(UserError, match=r"last\.pt: conv1\.weight has shape"):
        report(run)


def test_a_damaged_checkpoint_is_refused_by_name(run):
    (run / CHECKPOINTS / LAST).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"last\.pt"):
        report(run)


def test_a_person_reads_errors_speed_and_paths_on_plain_lines(run):
    text = format_summary(report(run))
    assert "top-1 40.50 %  top-5 4.05 %  (centre crop, epoch 2)" in text
    assert "top-1 39.00 %  top-5 3.50 %" in text
    assert "210 images/s (median), 20.0 % of the time waiting for data" in text
    assert str(run / "figures" / "curves.png") in text
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def names(summary):
    return [path.rsplit("/", 1)[1] for path in summary["figures"]]


OF_THE_RUN = ["curves.png", "conv1_kernels.png", "network.png"]


def test_a_whole_run_with_its_shards_gets_every_picture(trained):
    summary = report(trained, num_images=20)
    assert names(summary) == [*OF_THE_RUN, "guesses.png", "neighbours.png"] and summary["left_out"] == []
    for path in summary["figures"]:
        Image.open(path).verify()
    assert names(report(trained)) == OF_THE_RUN


def test_a_run_away_from_its_shards_says_so_and_draws_the_rest(trained, tmp_path):
    write_config(trained, {"recipe": {}, "shards": str(tmp_path / "gone")})
    summary = report(trained, num_images=20)
    assert names(summary) == OF_THE_RUN
    (reason,) = summary["left_out"]
    assert reason.startswith("images: ") and "gone: no such folder" in reason
    assert f"not drawn   {reason}" in format_summary(summary)


def test_shards_that_were_named_must_be_there_and_must_be_the_runs(trained, ready_shards, tmp_path):
    with pytest.raises(UserError, match="gone: no such folder"):
        report(trained, shards=str(tmp_path / "gone"), num_images=20)
    state = checkpoint.load(trained / CHECKPOINTS / LAST)
    state.pop("schema")
    checkpoint.save(trained / CHECKPOINTS / LAST, {**state, "shards_fingerprint": "of others"})
    with pytest.raises(UserError, match="other"):
        report(trained, shards=str(ready_shards), num_images=20)


def test_shards_behind_a_url_are_not_fetched_unasked(trained):
    write_config(trained, {"recipe": {}, "shards": "s3://bucket/shards"})
    (reason,) = report(trained, num_images=20)["left_out"]
    assert "s3://bucket/shards" in reason and "--shards" in reason


def test_several_runs_are_compared_by_what_differs(trained, tmp_path, monkeypatch):
    other = create_run(tmp_path, "tanh")
    (other / METRICS).write_bytes((trained / METRICS).read_bytes())
    write_config(other, {"recipe": to_dict(override(RECIPES["demo"], ["width=0.0625", "activation=tanh"]))})
    drawn = {}
    monkeypatch.setattr("trainer.report.summary.training_errors_figure", lambda runs: runs)
    monkeypatch.setattr("trainer.report.summary.overfitting_figure", lambda runs: runs)
    monkeypatch.setattr("trainer.report.summary.write_png", lambda runs, path: drawn.update({path.name: runs}))
    place = tmp_path / "place"
    assert compare([read_run(trained), read_run(other)], place) == [place / name for name in drawn]
    assert list(drawn) == ["training_errors.png", "training_and_validation.png"]
    assert [list(runs) for runs in drawn.values()] == [label_runs([read_run(trained), read_run(other)])] * 2
    monkeypatch.undo()
    for path in compare([read_run(trained), read_run(other)], place):
        Image.open(path).verify()


def label(folder, *configs):
    """The labels of runs in folders a/run, b/run, ... or, given with a name, in that."""
    found = []
    for name, config in configs:
        run = folder / name
        run.mkdir(parents=True)
        write_config(run, config)
        found.append(RunData(run, config, {}, []))
    return label_runs(found)


BASE = {"recipe": to_dict(RECIPES["demo"]), "seed": 0, "shards": "/s", "world_size": 1, "device": "cpu"}


def base_with(*settings, **config):
    return {**BASE, "recipe": to_dict(override(RECIPES["demo"], settings)), **config}


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([("a", BASE), ("b", BASE)], ["a", "b"]),
        ([("a", BASE), ("b", base_with("activation=tanh"))], ["a: relu", "b: tanh"]),
        ([("a", BASE), ("b", base_with("activation=tanh")), ("c", BASE)], ["a: relu", "b: tanh", "c: relu"]),
        (
            [("a", BASE), ("b", base_with("dropout=0.25", "lr=1", "width=0.5", "momentum=0.5"))],
            ["a: width 0.25, dropout 0.2, momentum 0.9, lr 0.005", "b: width 0.5, dropout 0.25, momentum 0.5, lr 1.0"],
        ),
        ([("a", BASE), ("b", {**BASE, "seed": 1, "shards": "/t"})], ["a: seed 0, shards /s", "b: seed 1, shards /t"]),
        (
            [("a", BASE), ("b", {**BASE, "world_size": 2, "parallel": {"mode": "columns"}})],
            ["a: world size 1, data parallel", "b: world size 2, columns parallel"],
        ),
        (
            [("a", BASE), ("b", {**BASE, "weights": {"source": "runs/a"}})],
            ["a: from new weights", "b: from runs/a"],
        ),
        ([("a", {}), ("b", BASE)], ["a", "b"]),
    ],
)
def test_the_label_of_a_run_is_its_name_and_all_that_differs(configs, expected, tmp_path):
    assert label(tmp_path, *configs) == expected


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    assert label(tmp_path, ("x/run", BASE), ("y/run", BASE)) == [str(tmp_path / "x/run"), str(tmp_path / "y/run")]


def test_a_comparison_has_a_place_of_its_own_whatever_the_runs_are_called(tmp_path, monkeypatch):
    runs = [tmp_path / name for name in ("small", "paper", "x" * 200)]
    for run in runs:
        run.mkdir()
    assert choose_place(runs[:2]) == tmp_path / "small+paper"
    assert choose_place(runs[1::-1]) == tmp_path / "paper+small"
    long, other = choose_place(runs), choose_place([runs[0], runs[2]])
    assert long != other and long.parent == tmp_path and long.name.startswith("small+2-others-")
    (tmp_path / "small+paper").mkdir()
    write_config(tmp_path / "small+paper", BASE)
    assert choose_place(runs[:2]) == tmp_path / "small+paper+"
    monkeypatch.chdir(runs[0])
    assert choose_place([Path(), runs[1]]) == tmp_path / "small+paper+"
