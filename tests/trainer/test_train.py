"""`alexnet-train`, `-eval`, `-report`, `-bench` as real processes, on a narrow net and the synthetic mini-shard.

"The same metrics" means equal but for the timing fields and events, as the format promises.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.shardset import MANIFEST
from trainer import checkpoint

BIN = Path(sys.executable).parent
TIMING = {"images_per_s", "data_wait_fraction", "time_s"}
NARROW = ["--recipe", "demo", "--set", "width=0.0625", "--global-batch-size", "2", "--epochs", "3"]
DEADLINE_S = 120


def environment() -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if not k.startswith("ALEXNET_")}, "OMP_NUM_THREADS": "1"}


def run(command: str, *arguments: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess:
    words = [str(BIN / command), *map(str, arguments)]
    done = subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stderr
    return done


def start_training(shards: Path, cwd: Path, *arguments: object) -> subprocess.Popen:
    words = [str(BIN / "alexnet-train"), "--shards", str(shards), *NARROW, *map(str, arguments)]
    return subprocess.Popen(
        words,
        cwd=cwd,
        env=environment(),
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


def wait_for_middle_of_epoch_2(process: subprocess.Popen, run_folder: Path) -> None:
    """Until a record of epoch 2 is written: with 32 steps an epoch, the one after its step 20."""
    deadline = time.monotonic() + DEADLINE_S
    while not any(record["kind"] == "train" and record["epoch"] == 2 for record in read_records(run_folder)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)  # a poll, not a wait for something to have happened


@pytest.fixture(scope="module")
def finished(ready_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run("alexnet-train", "--shards", ready_shards, *NARROW, cwd=folder)
    return folder / "runs" / "demo"


def model_of(run_folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run_folder / "checkpoints" / "last.pt")["model"]


def assert_same_run(got: Path, expected: Path) -> None:
    assert without_timing(read_records(got)) == without_timing(read_records(expected))
    weights, expected_weights = model_of(got), model_of(expected)
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


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


def test_a_run_killed_in_epoch_2_and_resumed_equals_the_undisturbed_run(finished, ready_shards, tmp_path):
    process = start_training(ready_shards, tmp_path)
    wait_for_middle_of_epoch_2(process, tmp_path / "runs" / "demo")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE_S)
    assert len(read_records(tmp_path / "runs" / "demo")) < len(read_records(finished))
    run("alexnet-train", "--name", "demo", "--resume", cwd=tmp_path)
    assert_same_run(tmp_path / "runs" / "demo", finished)


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
    said = run("alexnet-report", "demo", "again", "--images", "10", cwd=tmp_path).stdout
    assert "not drawn" not in said
    one = ("curves.png", "conv1_kernels.png", "network.png", "guesses.png", "neighbours.png")
    for picture in (*one, "training_errors.png", "training_and_validation.png"):
        assert picture in said and (copy / "figures" / picture).read_bytes().startswith(b"\x89PNG")


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


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(finished, tmp_path):
    copy = tmp_path / "runs" / "demo"
    shutil.copytree(finished, copy)
    last = copy / "checkpoints" / "last.pt"
    damaged = bytearray(last.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    last.write_bytes(damaged)
    before = (copy / "metrics.jsonl").read_bytes()
    assert_refused(run("alexnet-train", "--resume", "demo", cwd=tmp_path, status=1), "error: ", "last.pt")
    last.unlink()
    assert_refused(run("alexnet-eval", "demo", "--checkpoint", "last", cwd=tmp_path, status=1), "error: ", "last.pt")
    assert (copy / "metrics.jsonl").read_bytes() == before


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
