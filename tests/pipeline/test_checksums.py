"""Tars held to their SHA-256 beside a reader: each once, a damaged one named, and nobody kept waiting at the end."""

import gc
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline import download
from pipeline import shards as shards_module
from pipeline.common.errors import UserError
from pipeline.download import CHECKED
from pipeline.shards import Checksums, ShardSet
from tools.checks.verify import verify

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60  # far beyond what anything here takes


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of the tars that are read from now on."""
    names: list[str] = []

    def log(file, digest):
        names.append(Path(file.name).name)
        return download.hash_chunks(file, digest)

    monkeypatch.setattr(shards_module, "hash_chunks", log)
    return names


def flip_a_byte(path: Path) -> None:
    """Without a trace in size or time."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_each_tar_is_read_once_and_by_nobody_again_while_it_stays_as_it_is(private_shards, hashed):
    for _ in range(2):
        Checksums(private_shards, "train").wait()
        Checksums(ShardSet.open(private_shards.root), "train").wait()
        assert sorted(hashed) == [shard.file for shard in private_shards.shards("train")]
    Checksums(private_shards, "val").wait()
    assert len(hashed) == 6
    hashed.clear()
    os.utime(private_shards.tars("train")[1])
    Checksums(private_shards, "train").wait()
    Checksums(private_shards, "val").wait()
    assert hashed == ["train-000001.tar"]


def test_a_damaged_tar_is_named_and_not_remembered(private_shards):
    tar = private_shards.tars("train")[2]
    flip_a_byte(tar)
    found = json.dumps(private_shards.shards("train")[2].sha256[:12]).strip('"')
    message = rf"{tar}: SHA-256 is [0-9a-f]{{12}}, expected {found} \(damaged, or replaced\); restore it, or run `alexn"
    for _ in range(2):
        checksums = Checksums(private_shards, "train")
        with pytest.raises(UserError, match=message):
            checksums.wait()
        with pytest.raises(UserError, match=message):
            checksums.raise_if_damaged()
    Checksums(private_shards, "val").wait()


def swap(tar: Path) -> None:
    """For another file of the same size and time."""
    other = tar.with_name("other")
    shutil.copy2(tar, other)
    flip_a_byte(other)
    other.replace(tar)


@pytest.mark.parametrize("damage", [lambda tar: tar.write_bytes(bytes(tar.stat().st_size)), Path.unlink, swap])
def test_what_is_damaged_after_it_was_found_sound_is_named(private_shards, damage):
    Checksums(private_shards, "train").wait()
    damage(private_shards.tars("train")[0])
    with pytest.raises(UserError, match=r"train-000000.tar: (SHA-256 is|cannot be read \(No such file)"):
        Checksums(private_shards, "train").wait()


def test_a_tar_that_is_changed_while_it_is_read_is_read_again_next_time(private_shards, monkeypatch, hashed):
    tar = private_shards.tars("val")[0]

    def touch(file, digest):
        yield from download.hash_chunks(file, digest)
        os.utime(tar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "hash_chunks", touch)
        Checksums(private_shards, "val").wait()
    Checksums(private_shards, "val").wait()
    assert tar.name in hashed


@pytest.mark.parametrize("memory", [b"", b"[]", b'{"train-000000.tar": 5, "train-000001.tar": {}}', b"[" * 100_000])
def test_a_memory_that_is_none_counts_as_empty(private_shards, hashed, memory):
    (private_shards.root / CHECKED).write_bytes(memory)
    Checksums(private_shards, "train").wait()
    assert len(hashed) == 4


def test_where_nothing_can_be_written_all_is_read_again_without_a_word(private_shards, hashed, capfd):
    (private_shards.root / CHECKED).mkdir()  # as root, a folder without the right to write is none
    for _ in range(2):
        Checksums(private_shards, "train").wait()
    assert len(hashed) == 8 and capfd.readouterr() == ("", "")


def test_the_memory_is_a_part_of_the_set(private_shards):
    Checksums(private_shards, "train").wait()
    assert (private_shards.root / CHECKED).is_file()
    assert not any("no part of the set" in remark for remark in verify(private_shards.root, num_workers=1).remarks)


def test_what_was_downloaded_is_not_read_again(private_shards, tmp_path, hashed):
    pytest.importorskip("fsspec")
    remote = ShardSet.open(f"file://{private_shards.root}", cache_dir=tmp_path / "cache")
    remote.fetch("train")
    Checksums(remote, "train").wait()
    assert hashed == []


def never_end(file, digest):
    while True:
        yield 0


def test_the_thread_ends_with_its_owner(private_shards, monkeypatch):
    monkeypatch.setattr(shards_module, "hash_chunks", never_end)
    checksums = Checksums(private_shards, "train")
    checksums.raise_if_damaged()
    thread = checksums._thread
    assert thread.is_alive()
    del checksums
    gc.collect()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_a_process_ends_while_its_tars_are_still_being_read(private_shards):
    program = (
        "import sys\nfrom pipeline import shards\n"
        "def never_end(*_):\n    while True: yield 0\n"
        "shards.hash_chunks = never_end\n"
        "checksums = shards.Checksums(shards.ShardSet.open(sys.argv[1]), 'train')\n"
        "checksums.raise_if_damaged()\nprint(checksums._thread.is_alive())\n"
    )
    command = [sys.executable, "-c", program, str(private_shards.root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_a_forked_process_reads_for_itself(private_shards, monkeypatch):
    writing, go_on, first = threading.Event(), threading.Event(), []

    def pause(path, value):
        first.extend(value)
        writing.set()
        go_on.wait()

    def read_in_child() -> None:
        monkeypatch.undo()
        try:
            checksums.wait()
        except UserError as error:
            answers.put(str(error))

    monkeypatch.setattr(download, "write_json", pause)
    checksums = Checksums(private_shards, "train")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=read_in_child, daemon=True)
    assert writing.wait(DEADLINE_S)  # the thread holds the lock of what is remembered
    damaged = next(tar for tar in private_shards.tars("train") if tar.name not in first)
    flip_a_byte(damaged)
    child.start()
    try:
        assert f"{damaged}: SHA-256 is" in answers.get(timeout=DEADLINE_S)
    finally:
        go_on.set()  # the lock is the whole process's
