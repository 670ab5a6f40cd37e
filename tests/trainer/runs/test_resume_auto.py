"""One command that begins a run and goes on with it, and a second SIGINT, which leaves at once."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from tests.trainer.running import (
    DEADLINE_S,
    NARROW,
    assert_same_run,
    environment,
    run,
)
from trainer.commands.options import check_same, choose_safety, find_begun
from trainer.config import Safety
from trainer.kernels.native import load_native
from trainer.recipe import RECIPES, override, to_dict

ROOT = Path(__file__).resolve().parents[3]
CONFIG = {"recipe": to_dict(RECIPES["demo"]), "seed": 3, "weights": None}


def test_a_complete_run_is_left_as_it_is_by_the_same_command(finished, ready_shards, tmp_path):
    copy = tmp_path / "runs" / "demo"
    shutil.copytree(finished, copy)
    run("alexnet-train", "--shards", ready_shards, *NARROW, "--resume", "auto", cwd=tmp_path)
    assert_same_run(copy, finished)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]


def test_a_run_that_was_killed_before_its_first_checkpoint_is_begun_again_in_its_folder(
    finished, ready_shards, tmp_path
):
    copy = tmp_path / "runs" / "demo"
    shutil.copytree(finished, copy)
    for path in (copy / "checkpoints").iterdir():
        path.unlink()
    run("alexnet-train", "--shards", ready_shards, *NARROW, "--resume", "auto", cwd=tmp_path)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]
    assert_same_run(copy, finished)


def test_a_run_that_goes_on_with_other_arithmetic_says_so_and_only_then(finished, ready_shards, tmp_path, monkeypatch):
    if load_native() is None:
        pytest.skip("no C compiler")
    shutil.copytree(finished, tmp_path / "runs" / "demo")
    words = ["alexnet-train", "--shards", ready_shards, "--resume", "demo", "--epochs"]
    assert "the same bits" not in run(*words, 4, cwd=tmp_path).stderr
    monkeypatch.setenv("CC", "false")
    errors = run(*words, 5, cwd=tmp_path).stderr
    assert "not to the same bits (LRN: compiled C before, torch's operations now)" in errors


@pytest.mark.parametrize(
    ("changes", "seed", "weights", "named"),
    [
        (["lr=0.5"], 3, False, "lr 0.005, got 0.5"),
        ([], 4, False, "seed 3, got 4"),
        ([], 3, True, "weights to start from False, got True"),
        (["dropout=0.1", "epochs=1"], 3, False, "dropout 0.2, got 0.1"),
    ],
)
def test_another_setting_than_the_runs_own_is_refused_by_name(changes, seed, weights, named):
    recipe = override(RECIPES["demo"], changes)
    with pytest.raises(UserError, match=f"--resume auto: run was begun with {named}; .*--name"):
        check_same(Path("run"), CONFIG, recipe, seed, weights)


def test_the_same_settings_and_another_number_of_epochs_are_taken():
    check_same(Path("run"), CONFIG, override(RECIPES["demo"], ["epochs=99"]), 3, False)


def test_the_newest_run_of_the_name_is_gone_on_with_saved_yet_or_not(tmp_path):
    assert find_begun(tmp_path / "none", "run") is None
    for name in ("run", "run-2", "run-10", "runner", "run-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "run-11").mkdir()  # killed before it was anything
    assert find_begun(tmp_path, "run") == tmp_path / "run-10"
    assert find_begun(tmp_path, "other") is None


def test_a_resumed_run_keeps_its_own_safety_unless_told_otherwise():
    saved = {"keep_checkpoints": 7, "on_nonfinite": "skip", "unknown": 1}
    given = {"checkpoint_minutes": None, "keep_checkpoints": None, "on_nonfinite": "stop", "timeout_s": 5.0}
    assert choose_safety(saved, **given) == Safety(keep_checkpoints=7, on_nonfinite="stop", timeout_s=5.0)
    assert choose_safety({}, **dict.fromkeys(given)) == Safety(10.0, 3, "stop", 600.0)


# alexnet-train whose checkpoints are never done being written
PROGRAM = """
import threading
from trainer import checkpoint
from trainer.commands import train as cli
checkpoint.save = lambda *_: (print("writing", flush=True), threading.Event().wait())
if __name__ == "__main__":
    cli.train()
"""


def test_a_second_sigint_leaves_at_once_and_nothing_looks_finished(ready_shards, tmp_path):
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(program), "--shards", str(ready_shards), *NARROW],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=2)  # it waits for its checkpoint
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130 and "Traceback" not in errors and "go on with" not in errors, errors
    assert list((tmp_path / "runs" / "demo" / "checkpoints").iterdir()) == []


def test_the_safety_of_a_run_is_on_record(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["safety"] == {
        "checkpoint_minutes": 10.0,
        "keep_checkpoints": 3,
        "on_nonfinite": "stop",
        "timeout_s": 600.0,
    }
