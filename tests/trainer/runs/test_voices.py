"""`--json-logs` prints what metrics.jsonl gets, and more; `--quiet` says nothing; the two exclude each other."""

import json

from tests.trainer.running import NARROW, read_records, run


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


def test_quiet_and_json_logs_exclude_each_other(tmp_path):
    done = run("alexnet-train", "--quiet", "--json-logs", cwd=tmp_path, status=2)
    assert "--quiet and --json-logs" in done.stderr and not list(tmp_path.iterdir())
