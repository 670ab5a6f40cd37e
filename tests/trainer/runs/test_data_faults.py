"""Damaged data under the real commands: one line that names the file, status 1, no hang, on one and on two ranks."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.manifest import MANIFEST
from pipeline.operators import load_operators
from pipeline.shards import ShardSet
from tests.pipeline.loader.test_faults import garble_one_image
from tests.pipeline.loader.test_replaced import flip_a_byte, write_label
from tests.trainer.trained import DEMO, make_run
from trainer.commands.nets import evaluate, predict
from trainer.commands.train import _train
from trainer.launch import launch
from trainer.nets import ensemble

BIN = Path(sys.executable).parent
NARROW = ["--recipe", "demo", "--set", "width=0.0625", "--global-batch-size", "4", "--epochs", "3"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0", "-m", "trainer"]
DEADLINE_S = 120  # of a command that should end at once


def told(words: str) -> str:
    """Our operators name the sample; without them its shard is named, by the SHA-256."""
    return words if load_operators() else "SHA-256 is"


def garble(shards: ShardSet) -> str:
    return "train-000001.tar: " + told(f"sample {garble_one_image(shards, 'train')} cannot be decoded (")


def mislabel(shards: ShardSet) -> str:
    return "train-000001.tar: " + told(f"sample {write_label(shards, 'train', b'00009')} has the label b'00009', exp")


def spoil_index(shards: ShardSet) -> str:
    path = shards.indices("train")[2]
    path.write_text(path.read_text().replace(".cls\n", ".txt\n", 1))
    return "train-000002.idx: has the row"


def truncate(shards: ShardSet) -> str:
    os.truncate(shards.tars("train")[3], 4096)
    return "train-000003.tar: 4096 bytes, expected"


def lose_colors(shards: ShardSet) -> str:
    (shards.root / "color.json").unlink()
    return "color.json: missing; run `alexnet-prep pca"


def spoil_mean(shards: ShardSet) -> str:
    import numpy as np

    np.save(shards.root / "mean_image.npy", np.full((256, 256, 3), np.nan, np.float32))
    return "mean_image.npy: damaged, expected pixel values 0 to 255; run"


FAULTS = [garble, mislabel, spoil_index, truncate, lose_colors, spoil_mean]


@pytest.fixture
def spoilt(ready_shards: Path, tmp_path: Path) -> ShardSet:
    """Shards of one's own, to be damaged."""
    return ShardSet.open(shutil.copytree(ready_shards, tmp_path / "spoilt"))


@pytest.mark.parametrize("fault", FAULTS)
def test_training_names_what_is_damaged(spoilt, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    expected = fault(spoilt)
    with pytest.raises(UserError) as caught:
        _train.main(["--shards", str(spoilt.root), "--gpus", "0", *NARROW], standalone_mode=False)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("runs/*/checkpoints/*"))  # nothing that looks as if an epoch had ended


@pytest.mark.parametrize("damage", ["image", "label", "replaced", "classes"])
def test_evaluation_names_what_is_damaged(spoilt, tmp_path, damage):
    run = make_run(tmp_path / "runs", "run", spoilt.root, DEMO)
    expected = "val-000001.tar: "
    if damage == "image":
        expected += told(f"sample {garble_one_image(spoilt, 'val')} cannot be decoded (")
    elif damage == "label":
        expected += told(f"sample {write_label(spoilt, 'val', b'00009')} has the label b'00009'")
    elif damage == "replaced":
        tar = spoilt.tars("val")[1]
        tar.write_bytes(tar.read_bytes()[:-512])
        expected += f"{tar.stat().st_size} bytes, expected"
    else:
        manifest = json.loads((spoilt.root / MANIFEST).read_text())
        manifest["classes"].append({"index": 4, "wnid": "z", "name": "z"})
        (spoilt.root / MANIFEST).write_text(json.dumps(manifest))
        expected = f"a net of 4 classes, but {spoilt.root} has 5"
    with pytest.raises(UserError) as caught:
        evaluate.main([str(run), "--gpus", "0", "--json"], standalone_mode=False)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["image", "label"])
def test_evaluation_on_two_ranks_names_it_once_and_ends(spoilt, tmp_path, capfd, damage):
    run = make_run(tmp_path / "runs", "run", spoilt.root, DEMO)
    if damage == "image":
        expected = told(f"sample {garble_one_image(spoilt, 'val')} cannot be decoded (")
    else:
        expected = told(f"sample {write_label(spoilt, 'val', b'00009')} has the label")
    job = ensemble.Job(nets=(run,), checkpoint="best", shards=str(spoilt.root), use_gpu=False)
    assert launch(ensemble.run_rank, (job,), 2) == 1
    assert_one_line(capfd.readouterr().err, f"val-000001.tar: {expected}")


def test_prediction_names_the_files_it_cannot_use_and_goes_on(ready_shards, synth_tree, tmp_path, capsys):
    run = make_run(tmp_path / "runs", "run", ready_shards, DEMO)
    good = next(path for path in sorted(synth_tree.rglob("*.JPEG")) if path.stat().st_size > 5000)
    data, folder = good.read_bytes(), tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(data[: len(data) // 2])
    (folder / "b.jpg").write_bytes(data)
    (folder / "c.jpg").write_bytes(b"")
    (folder / "d.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    words = [str(folder), "--run", str(run), "--gpus", "0", "--json"]
    assert predict.main(words, standalone_mode=False) == 1
    said = capsys.readouterr()
    assert [line.partition(": ")[2].split(":")[0][-5:] for line in said.err.splitlines()] == ["a.jpg", "c.jpg", "d.png"]
    assert "b.jpg" in said.out


def test_a_run_does_not_go_on_with_other_classes_or_other_shards(spoilt, tmp_path):
    words = ["--shards", str(spoilt.root), "--gpus", "0", *NARROW, "--epochs", "1", "--runs", str(tmp_path / "runs")]
    assert _train.main(words, standalone_mode=False) == 0
    run = tmp_path / "runs" / "demo"
    go_on = ["--resume", str(run), "--gpus", "0", "--epochs", "2"]
    whole = json.loads((spoilt.root / MANIFEST).read_text())
    more = [*whole["classes"], {"index": 4, "wnid": "z", "name": "z"}]
    (spoilt.root / MANIFEST).write_text(json.dumps({**whole, "classes": more}))
    with pytest.raises(UserError, match=r"demo: a net of 4 classes, but .*manifest.json lists 5; restore that file"):
        _train.main(go_on, standalone_mode=False)
    whole["shards"][0]["sha256"] = "0" * 64
    (spoilt.root / MANIFEST).write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"color.json: computed on shards [0-9a-f]{12}, but these are [0-9a-f]{12}"):
        _train.main(go_on, standalone_mode=False)
    colors = json.loads((spoilt.root / "color.json").read_text())
    colors["shards_fingerprint"] = ShardSet.open(spoilt.root).fingerprint
    (spoilt.root / "color.json").write_text(json.dumps(colors))
    with pytest.raises(UserError, match=r"demo: was trained on shards [0-9a-f]{12}, .* holds [0-9a-f]{12}; name the"):
        _train.main(go_on, standalone_mode=False)


def start(words: list[str], cwd: Path) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ALEXNET_")}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen(words, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)


def assert_one_line(errors: str, expected: str) -> None:
    named = {line for line in errors.splitlines() if "error: " in line}  # ranks that never met say the same
    assert len(named) == 1 and expected in named.pop(), errors
    assert "pipeline/" not in errors  # no traceback of ours


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_command_says_it_in_one_line_and_ends(spoilt, tmp_path, fault, num_ranks):
    expected = fault(spoilt)
    words = [str(BIN / "alexnet-train"), "--gpus", "0"] if num_ranks == 1 else TORCHRUN
    process = start([*words, "--shards", str(spoilt.root), *NARROW], tmp_path)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert_one_line(errors if num_ranks == 1 else "\n".join(errors.splitlines()[:3]), expected)


def shorten(path: Path) -> None:
    os.truncate(path, 1024)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink, shorten])
def test_damage_done_while_the_command_runs_costs_no_more_than_the_epoch(spoilt, tmp_path, damage, num_ranks):
    words = [str(BIN / "alexnet-train"), "--gpus", "0"] if num_ranks == 1 else TORCHRUN
    process = start([*words, "--shards", str(spoilt.root), *NARROW, "--epochs", "1000"], tmp_path)
    saved, deadline = tmp_path / "runs" / "demo" / "checkpoints" / "last.pt", time.monotonic() + DEADLINE_S
    while not saved.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)  # a poll
    damage(spoilt.tars("train")[1])
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert any("error: " in line and "train-000001.tar: " in line for line in errors.splitlines()), errors
    assert saved.stat().st_size > 0 and not list(saved.parent.glob(".*"))
