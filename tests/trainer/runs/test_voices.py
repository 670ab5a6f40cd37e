"""`--json-logs` prints what metrics.jsonl gets, and more; `--quiet` says nothing; the two exclude each other."""

import json
import shutil
import signal
import subprocess

import pytest

from tests.sharding import make, prep
from tests.trainer.running import DEADLINE_S, NARROW, read_records, run, start_training


def test_json_logs_hold_every_record_and_a_quiet_run_says_nothing(ready_shards, tmp_path):
    words = ["--shards", ready_shards, *NARROW, "--gpus", "0"]
    done = run("alexnet-train", *words, "--epochs", "1", "--json-logs", cwd=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.stderr == ""
    folder = tmp_path / "runs" / "demo"
    assert [line for line in lines if line["kind"] in ("train", "eval", "event")] == read_records(folder)
    (begun,) = [line for line in lines if line["kind"] == "run"]
    assert begun["run"] == "runs/demo" and begun["steps_per_epoch"] == 32 and begun["step"] == 0
    (epoch,) = [line for line in lines if line["kind"] == "epoch"]
    (evaluation,) = [line for line in lines if line["kind"] == "eval"]
    assert epoch["best_error"] == evaluation["top1_error"] and epoch["left_s"] == 0.0
    assert lines[-1] == {"kind": "end", "status": 0, "step": 32, "text": ""}
    assert (folder / "tensorboard").is_dir()

    done = run("alexnet-train", "--resume", "runs/demo", "--epochs", "2", "--quiet", "--no-tensorboard", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("", "")
    assert [record["epoch"] for record in read_records(folder) if record["kind"] == "eval"] == [1, 2]
    assert len(list((folder / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(("epochs", "number", "status"), [(2, None, 1), (50, signal.SIGINT, 130)])
def test_training_goes_on_without_the_reader_of_its_json_lines(epochs, number, status, ready_shards, tmp_path):
    words = ["--gpus", "0", "--epochs", epochs, "--json-logs"]
    process = start_training(ready_shards, tmp_path, *words, stdout=subprocess.PIPE)
    while json.loads(process.stdout.readline())["kind"] != "run":
        pass
    process.stdout.close()
    said = [process.stderr.readline()]
    if number:
        process.send_signal(number)
    said += process.communicate(timeout=DEADLINE_S)[1].splitlines()
    assert process.returncode == status, said
    assert said[0].startswith("warning: standard output: Broken pipe; no more JSON lines, the work goes on"), said
    folder = tmp_path / "runs" / "demo"
    if number:
        assert "go on with: alexnet-train --resume runs/demo" in said[-1]
    else:
        assert said[1:] == ["complete after step 64; runs/demo/metrics.jsonl has what the JSON lines lack"]
        assert [record["epoch"] for record in read_records(folder) if record["kind"] == "eval"] == [1, 2]
    assert (folder / "checkpoints" / "last.pt").is_file()


def test_quiet_and_json_logs_exclude_each_other(tmp_path):
    done = run("alexnet-train", "--quiet", "--json-logs", cwd=tmp_path, status=2)
    assert "--quiet and --json-logs" in done.stderr and not list(tmp_path.iterdir())


def test_shards_without_validation_images_train_and_where_these_are_missed_val_fraction_is_named(synth_tree, tmp_path):
    shutil.copytree(synth_tree / "train", tmp_path / "tree/train")
    make(tmp_path / "tree", tmp_path / "shards", samples_per_shard=32)
    prep("pca", cwd=tmp_path)
    remedy = "give `alexnet-prep shard` a source with val/, or --val-fraction 0.05 for a share of the training images"
    done = run("alexnet-train", *NARROW, "--epochs", "1", "--gpus", "0", cwd=tmp_path)
    assert f"shards: no validation images, so no error is measured; {remedy}" in done.stderr
    for words in (["alexnet-train", "--gpus", "0"], ["alexnet-eval", "demo", "--gpus", "0"]):
        refused = run(*words, cwd=tmp_path, status=1).stderr.splitlines()[-1]
        assert "shards: no validation images" in refused and refused.endswith(remedy)
