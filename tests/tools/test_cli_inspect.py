"""`alexnet-prep info`, `verify` and `preview` as processes: what they print, where, and their exit statuses."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PREP = Path(sys.executable).with_name("alexnet-prep")


def prep(*arguments, status: int = 0, cwd=None) -> subprocess.CompletedProcess:
    command = [str(PREP), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=120)
    assert done.returncode == status, done.stderr + done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    return done


@pytest.fixture
def folder(ready_shards, tmp_path) -> Path:
    return shutil.copytree(ready_shards, tmp_path / "shards")


def damage(folder: Path) -> None:
    path = folder / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    (folder / "val-000000.idx").write_text("v1.2 1\n")


def test_verify_of_a_clean_folder_exits_0_and_says_how_fast_it_read(folder):
    done = prep("verify", cwd=folder.parent)
    first, second = done.stdout.splitlines()
    assert first.startswith("shards: 88 images in 6 shards, ") and first.endswith(" MB/s)")
    assert second == "no problems found"
    assert "read and decoded in" in prep("verify", "--decode", "--workers", 1, cwd=folder.parent).stdout


def test_verify_of_a_damaged_folder_exits_1_with_a_table_and_the_remedy(folder):
    damage(folder)
    (folder / "notes").write_text("")
    done = prep("verify", "--shards", folder, status=1)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["file", "key", "found", "expected", "remedy"] in rows
    assert [row[0] for row in rows if row and row[0].endswith((".tar", ".idx"))] == ["train-000001.tar"] + [
        "val-000000.idx"
    ] * (sum(row[:1] == ["val-000000.idx"] for row in rows))
    assert f"to mend, delete: {folder}/manifest.json {folder}/train-000001.json {folder}/val-000000.json" in done.stdout
    assert done.stdout.splitlines()[-2:] == [
        f"then run: alexnet-prep shard SOURCE --out {folder}  # the source and the options of before",
        f"then run: alexnet-prep pca --shards {folder}",
    ]
    assert done.stderr.splitlines() == [f"{folder}: 'notes' is no part of the set"]


def test_verify_with_json_prints_one_object_and_the_same_status(folder):
    assert json.loads(prep("verify", "--shards", folder, "--json").stdout)["is_clean"] is True
    damage(folder)
    facts = json.loads(prep("verify", "--shards", folder, "--json", status=1).stdout)
    assert facts["is_clean"] is False and facts["num_problems"] == len(facts["problems"])
    assert {problem["shard"] for problem in facts["problems"]} == {"train-000001.tar", "val-000000.idx"}
    assert set(facts["problems"][0]) == {"shard", "key", "what", "expected", "remedy"}
    assert facts["remedy"]["delete"] == ["manifest.json", "train-000001.json", "val-000000.json"]


def test_info_tells_what_is_there_in_lines_and_as_json(folder):
    done = prep("info", "--shards", folder)
    rows = [line.split() for line in done.stdout.splitlines()]
    train = next(row for row in rows if row[:1] == ["train"])
    assert train[1:3] == ["64", "4"] and train[-3:] == ["16", "16", "16"]
    assert ["colours", "matching"] in rows and ["classes", "4"] in rows
    facts = json.loads(prep("info", "--shards", folder, "--json").stdout)
    assert facts["splits"]["val"]["images"] == 24 and facts["colors"]["state"] == "matching"


def test_preview_writes_a_png_where_it_is_told(folder, tmp_path):
    done = prep("preview", "--shards", folder, "--samples", 2, "--split", "val", "--seed", 1, cwd=tmp_path)
    assert done.stdout == f"written to preview.png: 2 val images of {folder}, drawn with seed 1\n"
    with Image.open(tmp_path / "preview.png") as image:
        assert image.format == "PNG"


def test_commands_to_run_next_can_be_pasted_whatever_the_folder_is_called(folder):
    mine = folder.rename(folder.parent / "my shards")
    (mine / "color.json").unlink()
    (mine / "train-000001.tar").unlink()
    done = prep("verify", "--shards", mine, status=1).stdout.splitlines()
    (deleted,) = (line.partition("delete: ")[2] for line in done if "to mend, delete: " in line)
    assert shlex.split(deleted) == [str(mine / "manifest.json"), str(mine / "train-000001.json")]
    (again,) = (line.partition("run: ")[2] for line in done if "run: alexnet-prep shard" in line)
    assert shlex.split(again, comments=True) == ["alexnet-prep", "shard", "SOURCE", "--out", str(mine)]
    error = prep("preview", "--shards", folder.parent / "other shards", status=1).stderr
    assert f"--out '{folder.parent}/other shards'`" in error


@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_url_is_called_one_and_not_a_folder_that_is_missing(command):
    error = prep(command, "--shards", "s3://bucket/shards", status=1).stderr
    assert error.startswith("error: s3://bucket/shards: is a URL, expected a folder on a disk here; copy all its files")


def test_bad_input_is_one_line_and_writes_nothing(folder, tmp_path):
    (folder / "color.json").unlink()
    out = tmp_path / "out.png"
    for arguments, words in (
        (("preview", "--shards", folder, "--out", out), "color.json: missing; run `alexnet-prep pca --shards"),
        (("preview", "--shards", folder, "--out", folder / "manifest.json"), "expected the name of a PNG file"),
        (("preview", "--shards", tmp_path / "none"), "no such folder"),
        (("verify", "--shards", tmp_path / "none"), "no such folder"),
        (("info", "--shards", tmp_path), "unfinished or not a folder of shards"),
    ):
        done = prep(*arguments, status=1)
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ") and words in done.stderr
    assert not out.exists()
    assert "Error: " in prep("preview", "--samples", 0, status=2).stderr
