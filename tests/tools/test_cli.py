"""`alexnet-prep` as a person meets it: a real process, its words, its exit status."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sharding import PREP, hash_output, prep, wait_until, wait_until_gone

HEAVY = ("numpy", "torch", "PIL", "nvidia", "webdataset", "rich")
COMMANDS = ((), ("synth",), ("shard",), ("pca",))


def assert_one_line_error(done: subprocess.CompletedProcess, *parts: str) -> None:
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in done.stderr and done.stdout == ""
    for part in parts:
        assert part in last


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "alexnet-prep")
def test_help_imports_nothing_heavy(command):
    program = (
        "import sys, tools.cli\n"
        f"try: tools.cli.group.main([*{command!r}, '--help'], standalone_mode=False)\n"
        "except SystemExit: pass\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_help_answers_in_less_than_half_a_second():
    def time_help_s() -> float:
        start_s = time.perf_counter()
        prep("shard", "--help")
        return time.perf_counter() - start_s

    assert min(time_help_s() for _ in range(5)) < 0.5


def test_help_names_units_and_defaults():
    text = " ".join(prep("shard", "--help").stdout.split())
    for part in (
        "[env var: ALEXNET_SHARDS; default: shards]",
        "default: 5000",
        "default: 0.1%",
        "one per CPU",
        "1<=x<=100",
    ):
        assert part in text
    assert prep("--version").stdout.startswith("alexnet-prep, version 0.")


def test_synth_then_shard_needs_no_flags_in_one_folder(tmp_path):
    done = prep("synth", "tree", "--classes", 2, "--train", 6, "--val", 2, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "tree: 2 classes, 6 training and 2 validation images",
        "next: alexnet-prep shard tree",
    ]
    done = prep("shard", "tree", cwd=tmp_path)
    words = done.stdout.split()
    assert done.stdout.splitlines()[-1] == "next: alexnet-prep pca" and "no failures" in done.stdout
    assert words[words.index("train") :][:3] == ["train", "6", "1"] and words[words.index("val") :][:3] == [
        "val",
        "2",
        "1",
    ]
    assert (tmp_path / "shards/manifest.json").is_file() and "\x1b" not in done.stdout + done.stderr


def test_what_comes_next_is_printed_as_it_can_be_typed(tmp_path):
    def hint(*words, **environment):
        return prep(*words, cwd=tmp_path, **environment).stdout.splitlines()[-1].partition("next: ")[2]

    assert hint("synth", "my tree", "--classes", 1, "--train", 1, "--val", 1) == "alexnet-prep shard 'my tree'"
    assert hint("shard", "my tree", "--out", "it's") == """alexnet-prep pca --shards 'it'"'"'s'"""
    assert hint("pca", "--shards", "it's") == """alexnet-train --shards 'it'"'"'s'"""
    assert hint("pca", ALEXNET_SHARDS="it's") == "alexnet-train"
    assert hint("shard", "my tree", ALEXNET_SHARDS="it's") == "alexnet-prep pca"
    assert hint("shard", "my tree", "--out", "shards", ALEXNET_SHARDS="it's") == "alexnet-prep pca --shards shards"


def test_json_is_one_object_with_the_summary(synth_tree, tmp_path):
    arguments = ("shard", synth_tree, "--out", tmp_path / "out", "--workers", 2, "--samples-per-shard", 30, "--json")
    first = json.loads(prep(*arguments).stdout)
    assert first["images"] == {"train": 64, "val": 24} and first["shards"] == {"train": 3, "val": 1}
    assert (first["num_failures"], first["num_kept_shards"], first["was_complete"]) == (0, 0, False)
    assert first["num_prepared"] == 88 and first["images_per_s"] > 0 and first["duration_s"] > 0
    assert first["num_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    again = json.loads(prep(*arguments).stdout)
    assert (again["was_complete"], again["num_prepared"], again["num_bytes"]) == (True, 0, first["num_bytes"])


def test_the_output_folder_may_come_from_the_environment(synth_tree, tmp_path):
    done = prep("shard", synth_tree, cwd=tmp_path, ALEXNET_SHARDS="elsewhere")
    assert (tmp_path / "elsewhere/manifest.json").is_file() and not (tmp_path / "shards").exists()
    assert done.stdout.splitlines()[-1] == "next: alexnet-prep pca"


def test_a_finished_output_is_left_alone_and_said_to_be_complete(shard_dir, synth_tree, tmp_path):
    out = shutil.copytree(shard_dir, tmp_path / "out")
    done = prep("shard", synth_tree, "--out", out, "--samples-per-shard", 16)
    assert (
        done.stdout.splitlines()[0]
        == f"{out}: already complete by the names of its images, left as it is (--force makes it again)"
    )
    assert_one_line_error(prep("shard", synth_tree, "--out", out, status=1), "holds shards of another job", "--force")


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape", "ascii:strict"])
def test_a_folder_whose_name_is_not_unicode_is_told_with_escapes(shard_dir, tmp_path, encoding):
    folder = shutil.copytree(shard_dir, tmp_path / "caf\udce9-犬")
    shown = "caf\\udce9-" + ("\\u72ac" if "ascii" in encoding else "犬")
    assert shown in prep("info", "--shards", folder, PYTHONIOENCODING=encoding, PYTHONUTF8="0").stdout


def test_remarks_about_the_source_go_to_stderr(synth_tree, tmp_path):
    tree = shutil.copytree(synth_tree, tmp_path / "tree")
    (tree / "test").mkdir()
    (tree / "train/LICENSE").write_text("")
    done = prep("shard", tree, "--out", tmp_path / "out")
    assert "test/ not used: its images have no labels" in done.stderr and "1 other files" in done.stderr
    assert "test/" not in done.stdout


def test_failures_are_in_the_summary(synth_tree, tmp_path):
    tree = shutil.copytree(synth_tree, tmp_path / "tree")
    next((tree / "train").rglob("*.JPEG")).write_bytes(b"broken")
    done = prep("shard", tree, "--out", tmp_path / "out")
    assert f"1 images could not be used: {tmp_path / 'out/failures.jsonl'}" in done.stdout.replace("\n", "")
    for path in (tree / "train/n00000002").iterdir():
        path.write_bytes(b"broken")
    done = prep("shard", tree, "--out", tmp_path / "out2", status=1)
    assert_one_line_error(done, "of 88 images cannot be used, limit 1 (--max-failures 0.1%): 'train/")
    assert not (tmp_path / "out2/manifest.json").exists()


def test_bad_places_are_one_line_errors(synth_tree, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "out")
    assert_one_line_error(
        prep("shard", tmp_path / "none", *out, status=1), "none: no such folder; expected SOURCE/train/"
    )
    assert_one_line_error(prep("shard", tmp_path / "empty", *out, status=1), "is empty and no folder train/")
    assert_one_line_error(prep("shard", tmp_path / "file", *out, status=1), "file: is a file")
    assert not (tmp_path / "out").exists()
    done = prep("shard", synth_tree, "--out", tmp_path / "file/out", status=1)
    assert_one_line_error(done, "file/out", "choose another folder")
    assert_one_line_error(prep("synth", tmp_path, status=1), "not empty, expected a new or empty folder")
    assert_one_line_error(prep("pca", "--shards", tmp_path / "empty", status=1), "unfinished or not a folder of shards")


@pytest.mark.parametrize(
    "arguments",
    [
        ("shard",),
        ("shard", "x", "--samples-per-shard", "0"),
        ("shard", "x", "--workers", "0"),
        ("shard", "x", "--quality", "101"),
        ("shard", "x", "--seed", "-1"),
        ("shard", "x", "--max-failures", "some"),
        ("shard", "x", "--part", "0/8"),
        ("shard", "x", "--encoding", "png"),
        ("shard", "x", "--engine", "spark"),
        ("synth", "x", "--classes", "0"),
        ("pca", "--device", "tpu"),
        ("unknown",),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments):
    done = prep(*arguments, status=2)
    assert "Error: " in done.stderr and "Traceback" not in done.stderr


# Signals


def start_shard(tree: Path, out: Path) -> subprocess.Popen:
    command = [str(PREP), "shard", str(tree), "--out", str(out), "--samples-per-shard", "16", "--workers", "2"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts() -> None:
    """A suite that runs in the background of a shell, and so all it starts, would ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_record(out: Path, process: subprocess.Popen) -> None:
    wait_until(lambda: list(out.glob("*-*.json")) or process.poll() is not None, "the first record")
    assert process.poll() is None, "ended before the first record"


@pytest.fixture(scope="module")
def bigger_tree(tmp_path_factory):
    """Enough work that a run is still busy when its first shard is finished."""
    root = tmp_path_factory.mktemp("bigger") / "tree"
    prep("synth", root, "--classes", 4, "--train", 240, "--val", 16)
    return root


@pytest.fixture(scope="module")
def bigger_shards(bigger_tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("bigger") / "shards"
    prep("shard", bigger_tree, "--out", out, "--samples-per-shard", 16)
    return hash_output(out)


def test_a_killed_run_leaves_no_manifest_and_no_process_and_the_next_gives_the_same_bytes(
    bigger_tree, bigger_shards, tmp_path
):
    out = tmp_path / "out"
    with start_shard(bigger_tree, out) as process:
        wait_for_record(out, process)
        process.kill()
    wait_until_gone(process.pid)
    assert not (out / "manifest.json").exists()
    done = prep("shard", bigger_tree, "--out", out, "--samples-per-shard", 16)
    assert "of 16 shards were finished before and are kept" in done.stderr
    assert hash_output(out) == bigger_shards
    assert not list(out.glob(".*")) and not (out / "job.json").exists()


@pytest.mark.parametrize(
    ("number", "status", "words"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interrupted_run_says_so_in_a_word_and_cleans_up(bigger_tree, tmp_path, number, status, words):
    out = tmp_path / "out"
    with start_shard(bigger_tree, out) as process:
        wait_for_record(out, process)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: to every process of the group
        else:
            process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr.split()) == (status, "", [words])
    wait_until_gone(process.pid)
    assert not list(out.glob(".*")) and not (out / "manifest.json").exists()


def test_a_worker_that_is_killed_ends_the_run_with_one_line(bigger_tree, tmp_path):
    out = tmp_path / "out"
    with start_shard(bigger_tree, out) as process:
        wait_for_record(out, process)
        temporary = wait_until(lambda: next(iter(out.glob(".*.tar.*.tmp*")), None), "a shard being written")
        writer = int(temporary.name.rpartition("tmp")[2])
        os.kill(writer, signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and len(stderr.splitlines()) == 1
    assert "its worker process was killed by SIGKILL" in stderr
    assert not list(out.glob(".*")) and not (out / "manifest.json").exists()
