"""`alexnet-train`, `-eval`, `-report`, `-bench` as real processes, on a narrow net and the synthetic mini-shard.

"The same metrics" means equal but for the timing fields and events, as the format promises.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pipeline.manifest import MANIFEST
from tests.trainer.running import (
    DEADLINE_S,
    NARROW,
    assert_same_run,
    environment,
    read_records,
    run,
    start_training,
)
from trainer import checkpoint
from trainer.train import Run


def wait_for_middle_of_epoch_2(process: subprocess.Popen, run_folder: Path) -> None:
    """Until a record of epoch 2 is written, the one after its step 20 of 32, and the checkpoint of epoch 1."""
    deadline = time.monotonic() + DEADLINE_S
    last = run_folder / "checkpoints" / "last.pt"
    while not last.is_file() or not any(
        record["kind"] == "train" and record["epoch"] == 2 for record in read_records(run_folder)
    ):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)  # a poll, not a wait for something to have happened


def test_a_run_leaves_config_environment_metrics_and_checkpoints(finished):
    assert {path.name for path in finished.iterdir()} >= {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
    }
    records = read_records(finished)
    assert [record["step"] for record in records if record["kind"] == "train"] == [20, 32, 52, 64, 84, 96]
    evaluations = [record for record in records if record["kind"] == "eval"]
    assert [record["epoch"] for record in evaluations] == [1, 2, 3]
    assert all(record["num_images"] == 24 and record["crops"] == "centre" for record in evaluations)
    config = json.loads((finished / "config.json").read_text())
    assert config["recipe"]["width"] == 0.0625 and config["num_classes"] == 4 == len(config["classes"])
    assert (finished / "color.json").is_file() and (finished / "mean_image.npy").is_file()


def test_the_best_checkpoint_is_the_one_of_the_lowest_error(finished):
    errors = [record["top1_error"] for record in read_records(finished) if record["kind"] == "eval"]
    best = checkpoint.load(finished / "checkpoints" / "best.pt")
    assert best["epoch"] - 1 == 1 + errors.index(min(errors)) and best["best_error"] == min(errors)


def test_a_complete_run_says_so_and_what_comes_next_also_when_it_is_resumed(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "runs" / "demo")
    done = run("alexnet-train", "--resume", "demo", cwd=tmp_path)
    assert "complete after epoch 3; next: alexnet-eval runs/demo, alexnet-report runs/demo\n" in done.stderr
    assert run("alexnet-train", "--resume", "demo", "--quiet", cwd=tmp_path).stderr == ""


@pytest.mark.parametrize(
    ("variables", "cache_dir", "expected"),
    [
        ({}, None, "alexnet-train --resume 'my runs/demo'"),
        ({"ALEXNET_SHARDS": "my shards"}, None, "alexnet-train --resume 'my runs/demo'"),
        ({"ALEXNET_SHARDS": "others"}, None, "alexnet-train --resume 'my runs/demo' --shards 'my shards'"),
        ({}, "my cache", "alexnet-train --resume 'my runs/demo' --cache-dir 'my cache'"),
        ({"ALEXNET_CACHE": "my cache"}, "my cache", "alexnet-train --resume 'my runs/demo'"),
        ({"GPUS": "2"}, None, "alexnet-train --resume 'my runs/demo' --gpus 0"),
    ],
)
def test_how_to_go_on_has_the_flags_that_differ_from_what_would_be_taken(variables, cache_dir, expected, monkeypatch):
    for name in ("ALEXNET_SHARDS", "ALEXNET_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(variables.get("GPUS", "0")))
    job = SimpleNamespace(shards="my shards", cache_dir=cache_dir, use_gpu=False)
    run = SimpleNamespace(job=job, ranks=SimpleNamespace(world_size=1))
    assert Run._spell(run, "alexnet-train", "--resume", Path("my runs/demo")) == expected


def test_a_run_in_a_folder_with_a_space_is_named_in_quotes(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "my runs" / "demo")
    done = run("alexnet-train", "--resume", "my runs/demo", cwd=tmp_path)
    assert done.stderr.endswith("next: alexnet-eval 'my runs/demo', alexnet-report 'my runs/demo'\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_the_resumed_run_is_the_same(
    number, status, finished, ready_shards, tmp_path
):
    process = start_training(ready_shards, tmp_path)
    wait_for_middle_of_epoch_2(process, tmp_path / "runs" / "demo")
    process.send_signal(number)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == status, errors
    assert "alexnet-train --resume runs/demo" in errors and "Traceback" not in errors
    saved = checkpoint.load(tmp_path / "runs" / "demo" / "checkpoints" / "last.pt")
    assert 52 <= saved["step"] < 96
    run("alexnet-train", "--resume", "runs/demo", cwd=tmp_path)
    assert_same_run(tmp_path / "runs" / "demo", finished)


@pytest.mark.slow
def test_a_run_resumed_at_the_epoch_that_ends_the_colour_noise_equals_one_straight_through(ready_shards, tmp_path):
    words = ["--shards", ready_shards, *NARROW, "--set", "schedule=milestones", "--set", "lighting_off_epoch=2"]
    run("alexnet-train", *words, "--epochs", 2, "--name", "straight", cwd=tmp_path)
    run("alexnet-train", *words, "--epochs", 1, "--name", "halved", cwd=tmp_path)
    run("alexnet-train", "--resume", "halved", "--epochs", 2, cwd=tmp_path)
    assert_same_run(tmp_path / "runs" / "halved", tmp_path / "runs" / "straight")


def test_eval_gives_the_error_of_the_best_epoch_and_adds_ten_crops_to_the_metrics(finished, tmp_path):
    copy = tmp_path / "runs" / "demo"
    shutil.copytree(finished, copy)
    result = json.loads(run("alexnet-eval", "demo", "--json", cwd=tmp_path).stdout)
    errors = [record["top1_error"] for record in read_records(finished) if record["kind"] == "eval"]
    assert set(result) == {
        "run",
        "checkpoint",
        "num_images",
        "top1_error",
        "top5_error",
        "ten_crop_top1_error",
        "ten_crop_top5_error",
    }
    assert result["num_images"] == 24 and result["top1_error"] == min(errors)
    ten = [record for record in read_records(copy) if record.get("crops") == "ten"]
    assert len(ten) == 1 and ten[0]["top1_error"] == result["ten_crop_top1_error"]


def test_report_draws_every_picture_of_a_run_and_those_of_several_and_names_them(finished, tmp_path):
    copy = tmp_path / "runs" / "demo"
    shutil.copytree(finished, copy)
    shutil.copytree(finished, copy.with_name("again"))
    run("alexnet-report", "demo", "--images", "10", cwd=tmp_path)
    alone = (copy / "report.html").read_bytes()
    said = run("alexnet-report", "demo", "again", "runs/demo", "--images", "10", cwd=tmp_path).stdout
    assert (copy / "report.html").read_bytes() == alone
    both = tmp_path / "runs" / "demo+again"
    assert "</html>" in (both / "report.html").read_text() and "runs/demo+again/report.html" in said
    assert "not drawn" not in said
    one = ("curves.png", "conv1_kernels.png", "network.png", "guesses.png", "neighbours.png")
    pictures = [copy / "figures" / name for name in one]
    for picture in (*pictures, both / "training_errors.png", both / "training_and_validation.png"):
        assert str(picture.relative_to(tmp_path)) in said and picture.read_bytes().startswith(b"\x89PNG")


def test_one_image_one_class_one_shard_and_a_batch_of_one_are_enough_for_every_command(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "source" / split / "only").mkdir(parents=True)
        Image.effect_noise((300, 280), 50).convert("RGB").save(tmp_path / "source" / split / "only" / "one.jpg")
    run("alexnet-prep", "shard", "source", cwd=tmp_path)
    run("alexnet-prep", "pca", cwd=tmp_path)
    run("alexnet-train", *NARROW, "--global-batch-size", 1, cwd=tmp_path)
    evaluations = [record for record in read_records(tmp_path / "runs" / "demo") if record["kind"] == "eval"]
    assert [(record["num_images"], record["top1_error"]) for record in evaluations] == [(1, 0.0)] * 3
    assert json.loads(run("alexnet-eval", "demo", "--json", cwd=tmp_path).stdout)["top1_error"] == 0.0
    assert "not drawn" not in run("alexnet-report", "demo", cwd=tmp_path).stdout
    assert "1.0000 only" in run("alexnet-predict", "source/val/only/one.jpg", cwd=tmp_path).stdout


def test_bench_reports_the_rate_of_the_loader_with_its_spread(ready_shards, tmp_path):
    words = ["loader", "--shards", ready_shards, "--recipe", "demo", "--seconds", "0.6", "--json"]
    result = json.loads(run("alexnet-bench", *words, cwd=tmp_path).stdout)
    assert 0 < result["lowest"] <= result["images_per_s"] <= result["highest"] and result["num_rounds"] == 5


def test_two_ranks_under_torchrun_train_and_count_every_validation_image(ready_shards, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "trainer", "--shards", ready_shards]
    done = subprocess.run(
        [*map(str, words), *NARROW], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "runs" / "demo")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]
    assert [record["num_images"] for record in records if record["kind"] == "eval"] == [24, 24, 24]
    states = checkpoint.load(tmp_path / "runs" / "demo" / "checkpoints" / "last.pt")["ranks"]
    assert len(states) == 2 and not torch.equal(states[0]["random"]["cpu"], states[1]["random"]["cpu"])


def assert_refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    last = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part.lower() in last.lower(), last


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_bad_shards_are_refused_by_name_and_leave_no_run(ready_shards, tmp_path):
    def refuse(folder: Path, *parts: str) -> None:
        assert_refused(run("alexnet-train", "--shards", folder, *NARROW, cwd=tmp_path, status=1), "error: ", *parts)
        assert not (tmp_path / "runs").exists()

    refuse(tmp_path / "nowhere", "no such folder", "alexnet-prep shard")
    broken = tmp_path / "broken"
    shutil.copytree(ready_shards, broken)
    edit_json(broken / "color.json", shards_fingerprint="0" * 64)
    refuse(broken, "color.json", "computed on shards 000000000000", "alexnet-prep pca")
    (broken / "color.json").unlink()
    refuse(broken, "color.json", "missing", "alexnet-prep pca")
    tar = broken / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    refuse(broken, "train-000001.tar", "truncated", "--force")
    edit_json(broken / MANIFEST, schema=2)
    refuse(broken, "schema is 2, expected 1", "alexnet-prep shard")


def test_wrong_usage_is_status_2_and_leaves_no_run(ready_shards, tmp_path):
    def refuse(*arguments: object, part: str) -> None:
        words = ["--shards", ready_shards, "--recipe", "demo", *arguments]
        assert_refused(run("alexnet-train", *words, cwd=tmp_path, status=2), part)
        assert not (tmp_path / "runs").exists()

    refuse("--global-batch-size", 0, part="--global-batch-size")
    refuse("--gpus", torch.cuda.device_count() + 1, part=f"{torch.cuda.device_count()} visible")
    refuse("--resume", "demo", "--lr", 1, part="leave out --recipe, --lr")


def test_a_batch_larger_than_the_set_and_an_unknown_field_are_told_with_the_remedy(ready_shards, tmp_path):
    base = ["--shards", ready_shards, "--recipe", "demo"]
    large = run("alexnet-train", *base, "--global-batch-size", 1000, cwd=tmp_path, status=1)
    assert_refused(large, "64 training images", "--global-batch-size lower")
    unknown = run("alexnet-train", *base, "--set", "dropuot=0", cwd=tmp_path, status=1)
    assert_refused(unknown, "dropuot", "did you mean dropout")
    assert not (tmp_path / "runs").exists()


def damage(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def test_only_damaged_checkpoints_are_refused_and_nothing_is_changed(finished, tmp_path):
    copy = tmp_path / "runs" / "demo"
    shutil.copytree(finished, copy)
    for path in (copy / "checkpoints").glob("*.pt"):
        damage(path)
    before = (copy / "metrics.jsonl").read_bytes()
    assert_refused(run("alexnet-train", "--resume", "demo", cwd=tmp_path, status=1), "error: ", "last.pt")
    (copy / "checkpoints" / "last.pt").unlink()
    assert_refused(run("alexnet-eval", "demo", "--checkpoint", "last", cwd=tmp_path, status=1), "error: ", "last.pt")
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_in_place_of_a_damaged_checkpoint_the_one_before_is_used_and_both_are_named(finished, tmp_path):
    copy = tmp_path / "runs" / "demo"
    shutil.copytree(finished, copy)
    steps = ["step-00000032.pt", "step-00000064.pt", "step-00000096.pt"]
    folder = copy / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == steps
    for name in ("last.pt", steps[2]):
        damage(folder / name)
    errors = run("alexnet-train", "--resume", "demo", cwd=tmp_path).stderr
    warnings = [line for line in errors.splitlines() if line.startswith("warning: ")]
    assert [("last.pt" in line, steps[2] in line, f"{steps[1]}, of step 64" in line) for line in warnings] == [
        (True, False, True),
        (False, True, True),
    ], errors
    assert_same_run(copy, finished)


def test_another_number_of_ranks_is_refused_inside_an_epoch_and_its_start_is_not(finished, tmp_path):
    copy = tmp_path / "runs" / "demo"
    shutil.copytree(finished, copy)
    path = copy / "checkpoints" / "last.pt"
    state = checkpoint.load(path)
    state["ranks"] = [{**state["ranks"][0], "loader": {**state["ranks"][0]["loader"], "step": 5}}] * 2
    checkpoint.save(path, state)
    done = run("alexnet-train", "--resume", "demo", cwd=tmp_path, status=1)
    assert_refused(done, "5 steps of epoch 4 on 2 ranks, got 1 rank", "resume with as many", "--restart-epoch")
    run("alexnet-train", "--resume", "demo", "--restart-epoch", "--epochs", 4, cwd=tmp_path)
    assert [record["epoch"] for record in read_records(copy) if record["kind"] == "eval"] == [1, 2, 3, 4]
    (copy / "checkpoints" / "epoch.pt").unlink()
    done = run("alexnet-train", "--resume", "demo", "--restart-epoch", cwd=tmp_path, status=1)
    assert_refused(done, "no epoch of it has ended", "start a new run")
