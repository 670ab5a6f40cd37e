"""The output folder: whose it is, and a disk that does not play along."""

import errno
import json
import os
import stat
import subprocess

import pytest

from pipeline.common.errors import UserError
from pipeline.common.files import read_json
from tests.sharding import hash_output, make
from tools.sharding import plan as planning
from tools.sharding.plan import Options, Plan
from tools.sharding.store import FolderStore
from tools.sharding.write import Setup, write_unit
from tools.sources.source import open_source

# Whose folder it is


def test_shards_of_another_job_are_refused_and_replaced_with_force(tree, tmp_path):
    out = make(tree, tmp_path / "out", samples_per_shard=2).out
    for name in ("color.json", "mean_image.npy"):
        (out / name).write_text("of the old shards")
    (out / "notes.txt").write_text("mine")
    before = hash_output(out)
    with pytest.raises(UserError, match=r"holds shards of another job \(\w{12}, this one is \w{12}\).*--force"):
        make(tree, out)
    assert hash_output(out) == before
    make(tree, out, force=True)
    assert hash_output(out) == hash_output(make(tree, tmp_path / "whole").out)
    assert not (out / "color.json").exists() and not (out / "mean_image.npy").exists()
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("left", ["manifest.json", "job.json", "train-000000.json"])
def test_one_file_that_names_another_job_is_enough_to_refuse(tree, tmp_path, left):
    out = make(tree, tmp_path / "out").out
    job = read_json(out / "manifest.json")["job"]
    (out / "job.json").write_text(json.dumps({"schema": 1, "job": job}))
    for path in list(out.iterdir()):
        if path.name != left:
            path.unlink()
    with pytest.raises(UserError, match="another job"):
        make(tree, out, seed=1)


def test_a_folder_of_other_files_is_refused_also_with_force(tree, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000000.tar").write_bytes(b"somebody's shard")
    (out / "manifest.json").write_text('{"version": 7}')
    for force in (False, True):
        with pytest.raises(UserError, match=r"holds 2 files that are no shards made here.*choose another --out"):
            make(tree, out, force=force)
    assert (out / "train-000000.tar").read_bytes() == b"somebody's shard"


def test_force_makes_the_same_job_again(tree, tmp_path):
    out = make(tree, tmp_path / "out").out
    before, made_ns = hash_output(out), (out / "train-000000.tar").stat().st_mtime_ns
    (out / "val-000000.tar").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"truncated or replaced.*--force"):
        make(tree, out)
    assert make(tree, out, force=True).num_kept_shards == 0
    assert hash_output(out) == before and (out / "train-000000.tar").stat().st_mtime_ns > made_ns


# A disk that does not play along


def test_output_below_or_at_a_file_is_refused(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file, expected a folder; choose another --out"):
        make(tree, tmp_path / "file")
    with pytest.raises(NotADirectoryError):
        make(tree, tmp_path / "file/out")


def test_too_little_room_is_found_out_before_work_starts(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "BYTES_PER_IMAGE", 10**15)
    with pytest.raises(UserError, match=r"about 1.6e\+07 GB needed, .* GB free on its disk; free some space or choose"):
        make(tree, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_room_is_asked_for_what_is_left_to_do(tree, tmp_path, monkeypatch):
    out = make(tree, tmp_path / "out").out
    (out / "manifest.json").unlink()
    monkeypatch.setattr(planning, "BYTES_PER_IMAGE", 10**15)
    assert make(tree, out).num_prepared == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_is_one_error_and_leaves_no_half_files(tree, small_disk, monkeypatch):
    with pytest.raises(UserError, match=r"needed, 0\.000262 GB free"):
        make(tree, small_disk / "out")
    monkeypatch.setattr(planning, "BYTES_PER_IMAGE", 1)
    with pytest.raises(OSError) as caught:
        make(tree, small_disk / "out", quality=100)
    assert caught.value.errno == errno.ENOSPC and str(small_disk / "out") in caught.value.filename
    names = {path.name for path in (small_disk / "out").iterdir()}
    assert "manifest.json" not in names and not [name for name in names if ".tmp" in name]


@pytest.mark.parametrize("kind", ["write", "create"])
def test_a_file_is_synced_then_named_then_its_folder_is_synced(tmp_path, monkeypatch, kind):
    events = []
    sync, name = os.fsync, os.replace

    def note_sync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def note_name(source, target):
        events.append("name")
        name(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_name)
    store = FolderStore(tmp_path)
    if kind == "write":
        store.write("train-000000.idx", b"1")
    else:
        with store.create("train-000000.tar") as file:
            file.write(b"1")
    assert events[:3] == ["file", "name", "folder"]


def test_a_unit_that_cannot_be_written_leaves_no_file(small_tree, tmp_path):
    plan = Plan(open_source(small_tree), Options(samples_per_shard=4))
    unit = next(plan.units(plan.shards))

    def interrupt(_tick):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_unit(Setup(FolderStore(tmp_path), plan.job, plan.options, plan.source.read), unit, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_outlived_its_job_does_not_write_into_the_folder_of_another(small_tree, tmp_path):
    plan = Plan(open_source(small_tree), Options(samples_per_shard=4))
    setup = Setup(FolderStore(tmp_path), plan.job, plan.options, plan.source.read)
    unit = next(plan.units(plan.shards))
    (tmp_path / "job.json").write_text(json.dumps({"schema": 1, "job": "another job"}))
    with pytest.raises(
        UserError, match=r"belongs to another job by now \(another job, .*train-000000.tar is not written"
    ):
        write_unit(setup, unit, id)
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]
    (tmp_path / "job.json").write_text(json.dumps({"schema": 1, "job": plan.job}))
    assert write_unit(setup, unit, id).shard.samples == 4
