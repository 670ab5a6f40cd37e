"""Shards: what the contract promises, and the same bytes however they come about."""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.common.files import read_json
from pipeline.common.machine import machine_id
from pipeline.manifest import Manifest
from pipeline.shards import ShardSet
from tests.sharding import hash_output, make, read_samples
from tools.sharding.lock import Part
from tools.sharding.make import make_shards
from tools.sharding.output import TEMPORARY_AGE_S, find_finished
from tools.sharding.store import FolderStore
from tools.sharding.write import prepare
from tools.sources.source import open_source

# What is on disk


def test_train_is_shuffled_over_the_whole_and_not_within_a_class(shard_dir):
    labels = [int(label) for _, label in read_samples(shard_dir, "train").values()]
    assert all(len(set(labels[start : start + 16])) == 4 for start in range(0, 64, 16))


def test_samples_read_back_with_webdataset_are_rgb_squares_with_the_right_labels(shard_dir, synth_tree):
    source = open_source(synth_tree)
    for split, expected in (("train", 64), ("val", 24)):
        urls = [str(path) for path in ShardSet.open(shard_dir).tars(split)]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        assert len(samples) == expected
        for sample in samples:
            entry = source.entries(split)[int(sample["__key__"])]
            assert int(sample["cls"]) == entry.label and len(sample["cls"]) == 5
            with Image.open(io.BytesIO(sample["jpg"])) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (256, 256))
            assert sample["jpg"] == prepare(source.read(entry), encoding="jpeg", quality=90).content


def test_every_image_has_its_position_in_the_canonical_order_as_key(shard_dir):
    assert sorted(read_samples(shard_dir, "train")) == [f"{position:09d}" for position in range(64)]
    assert list(read_samples(shard_dir, "val")) == [f"{position:09d}" for position in range(24)]


def test_tar_headers_carry_no_time_user_or_group(shard_dir):
    with tarfile.open(shard_dir / "train-000000.tar") as tar:
        headers = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in tar}
    assert headers == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


def test_the_index_is_what_dalis_own_tool_makes_of_the_tar(shard_dir, tmp_path):
    tool = Path(sys.executable).with_name("wds2idx")
    if not tool.is_file():
        pytest.skip("wds2idx is not installed")
    for path in (shard_dir / "train-000001.tar", shard_dir / "val-000001.tar"):
        subprocess.run([sys.executable, str(tool), str(path), str(tmp_path / "idx")], check=True, capture_output=True)
        assert path.with_suffix(".idx").read_text().split() == (tmp_path / "idx").read_text().split()


def test_the_index_points_at_the_bytes(shard_dir):
    data = (shard_dir / "val-000000.tar").read_bytes()
    header, *rows = (shard_dir / "val-000000.idx").read_text().splitlines()
    assert header == "v1.2 16" and len(rows) == 16
    samples = read_samples(shard_dir, "val")
    for row in rows:
        jpg, at, size, name, cls, label_at, label_size, label_name = row.split()
        key = name.partition(".")[0]
        assert (jpg, name, cls, label_name) == ("jpg", f"{key}.jpg", "cls", f"{key}.cls")
        image, label = samples[key]
        assert data[int(at) : int(at) + int(size)] == image
        assert data[int(label_at) : int(label_at) + int(label_size)] == label


def test_the_record_traces_each_key_to_its_source(shard_dir, synth_tree):
    source = open_source(synth_tree)
    manifest = ShardSet.open(shard_dir).manifest
    for shard in manifest.shards:
        record = read_json((shard_dir / shard.file).with_suffix(".json"))
        assert {key: record[key] for key in ("file", "split", "samples", "bytes", "sha256")} == vars(shard)
        assert record["job"] == manifest.job and record["failures"] == []
        index = (shard_dir / shard.file).with_suffix(".idx").read_bytes()
        assert record["idx_sha256"] == hashlib.sha256(index).hexdigest()
        assert len(record["sources"]) == shard.samples
        for key, path in record["sources"].items():
            assert source.entries(shard.split)[int(key)].path == path


def test_the_manifest_says_what_was_made_and_how(shard_dir):
    manifest = ShardSet.open(shard_dir).manifest
    assert (manifest.layout, manifest.seed, manifest.size_px, manifest.encoding) == ("folder", 0, 256, "jpeg")
    assert (manifest.quality, manifest.samples_per_shard) == (90, 16)
    assert manifest.totals == {"train": 64, "val": 24}
    assert [(c.index, c.wnid) for c in manifest.classes] == [(n, f"n{n + 1:08d}") for n in range(4)]
    for shard in manifest.shards:
        assert hashlib.sha256((shard_dir / shard.file).read_bytes()).hexdigest() == shard.sha256


def test_a_finished_folder_holds_nothing_but_the_contract(shard_dir):
    names = {f"{stem}.{ending}" for stem in ("train-00000{0}", "val-00000{0}") for ending in ("tar", "idx", "json")}
    expected = {name.format(n) for name in names for n in range(4) if n < 2 or name.startswith("train")}
    assert {path.name for path in shard_dir.iterdir()} == expected | {"manifest.json"}


def test_400_real_photographs_give_400_samples_and_no_failure(real_images, tmp_path):
    source = open_source(real_images / "imagenet-sample")
    summary = make_shards(source, tmp_path / "out", samples_per_shard=100, num_workers=2)
    assert (summary.images, summary.num_failures) == ({"train": 400, "val": 0}, 0)
    urls = [str(path) for path in ShardSet.open(tmp_path / "out").tars("train")]
    labels = Counter()
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        with Image.open(io.BytesIO(sample["jpg"])) as image:
            assert (image.mode, image.size) == ("RGB", (256, 256))
            image.load()
        wnid = Path(source.entries("train")[int(sample["__key__"])].path).parent.name
        assert wnid == source.classes[int(sample["cls"])].wnid
        labels[int(sample["cls"])] += 1
    assert labels == Counter(range(400))


def test_the_manifest_on_disk_is_one_that_the_reader_accepts(shard_dir):
    raw = read_json(shard_dir / "manifest.json")
    assert json.loads(json.dumps(Manifest.parse(raw, shard_dir).to_json())) == raw


# The same bytes, however they come about


@pytest.mark.parametrize("num_workers", [1, 3])
def test_output_does_not_depend_on_the_number_of_workers(synth_tree, shard_dir, tmp_path, num_workers):
    make(synth_tree, tmp_path / "out", samples_per_shard=16, num_workers=num_workers)
    assert hash_output(tmp_path / "out") == hash_output(shard_dir)
    assert (tmp_path / "out/manifest.json").read_bytes() == (shard_dir / "manifest.json").read_bytes()


def test_seed_and_quality_change_the_output(tree, tmp_path):
    outputs = [make(tree, tmp_path / str(n), **o).out for n, o in enumerate([{}, {"seed": 1}, {"quality": 80}])]
    tars = [(out / "train-000000.tar").read_bytes() for out in outputs]
    assert len(set(tars)) == 3
    vals = [(out / "val-000000.tar").read_bytes() for out in outputs]
    assert vals[0] == vals[1] != vals[2]
    assert len({read_json(out / "manifest.json")["job"] for out in outputs}) == 3


def test_a_complete_output_is_recognised_and_left_alone(tree, tmp_path):
    first = make(tree, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in first.out.iterdir()}
    again = make(tree, tmp_path / "out")
    assert again.was_complete and not first.was_complete
    assert (again.images, again.shards, again.num_bytes) == (first.images, first.shards, first.num_bytes)
    assert {path.name: path.stat().st_mtime_ns for path in first.out.iterdir()} == before


def test_a_finished_output_is_looked_at_on_a_disk_that_takes_no_write(small_tree, tmp_path, monkeypatch):
    """As a read-only mount answers: it refuses to remove a file that is not there, too."""
    out = make(small_tree, tmp_path / "out").out
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    def refuse(*_arguments, **_options):
        raise OSError(errno.EROFS, "Read-only file system")

    for place, name in ((Path, "unlink"), (Path, "mkdir"), (Path, "replace"), (os, "fsync"), (Path, "write_bytes")):
        monkeypatch.setattr(place, name, refuse)
    for part in (None, Part(1, 2)):
        assert make(small_tree, out, part=part).was_complete
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_an_unfinished_output_is_completed_to_the_same_bytes_and_what_was_finished_is_kept(tree, tmp_path, capsys):
    whole = make(tree, tmp_path / "whole").out
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    (out / "manifest.json").unlink()
    (out / "train-000000.json").unlink()  # killed before the record
    (out / "train-000001.tar").write_bytes(b"cut")
    (out / "val-000000.idx").write_text("v1.2 4\nstale\n")
    kept_ns = (out / "train-000002.tar").stat().st_mtime_ns
    summary = make(tree, out)
    assert (summary.num_kept_shards, summary.num_prepared) == (1, 12)
    assert "1 of 4 shards were finished before and are kept" in capsys.readouterr().err
    assert (out / "train-000002.tar").stat().st_mtime_ns == kept_ns
    assert hash_output(out) == hash_output(whole)
    assert (out / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"job": 3}', b'{"job": "J", "file": "train-000000.tar"}'])
def test_a_damaged_record_counts_as_unfinished(tree, tmp_path, content):
    out = make(tree, tmp_path / "out").out
    job = read_json(out / "manifest.json")["job"]
    store = FolderStore(out)
    assert list(find_finished(store, store.list(), ["train-000000.tar"], job)) == ["train-000000.tar"]
    (out / "train-000000.json").write_bytes(content.replace(b"J", job.encode()))
    assert find_finished(store, store.list(), ["train-000000.tar"], job) == {}


def test_half_written_files_are_removed_once_their_writers_are_dead(tree, tmp_path):
    out = make(tree, tmp_path / "out").out
    (out / "manifest.json").unlink()
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    here, elsewhere = machine_id(), "0123abcd"
    kept = [
        f".val-000000.tar.{here}.tmp{os.getpid()}",
        f".val-000000.tar.{elsewhere}.tmp{dead}",  # a number that means nothing here
        f".notes.txt.{here}.tmp{dead}",  # not ours
    ]
    removed = [f".train-000000.tar.{here}.tmp{dead}", f".job.json.{elsewhere}.tmp{os.getpid()}", ".manifest.json.tmp1"]
    for name in kept + removed:
        (out / name).write_bytes(b"half")
    for name in removed[1:]:
        long_ago_s = time.time() - TEMPORARY_AGE_S - 60
        os.utime(out / name, (long_ago_s, long_ago_s))
    make(tree, out)
    assert sorted(path.name for path in out.glob(".*")) == sorted(kept)


def test_a_run_killed_before_its_first_shard_can_be_repeated(tree, tmp_path):
    whole = make(tree, tmp_path / "whole").out
    (tmp_path / "out").mkdir()
    (tmp_path / f"out/.job.json.{machine_id()}.tmp999999999").write_text("{")
    make(tree, tmp_path / "out")
    marked = tmp_path / "marked"
    marked.mkdir()
    shutil.copy(whole / "train-000000.tar", marked)  # renamed, but killed before index and record
    (marked / "job.json").write_text(json.dumps({"job": read_json(whole / "manifest.json")["job"]}))
    make(tree, marked)
    assert hash_output(tmp_path / "out") == hash_output(marked) == hash_output(whole)


# Raw pixels, repaired images


def test_raw_shards_hold_the_pixels_and_say_so(tree, tmp_path):
    out = make(tree, tmp_path / "out", encoding="raw").out
    manifest = ShardSet.open(out).manifest
    assert (manifest.encoding, manifest.quality) == ("raw", 100)
    samples = read_samples(out, "train", "rgb")
    assert len(samples) == 12 and {len(image) for image, _ in samples.values()} == {256 * 256 * 3}
    source = open_source(tree)
    for key, (image, _) in samples.items():
        data = source.read(source.entries("train")[int(key)])
        assert image == prepare(data, encoding="raw", quality=90).content
    assert (out / "train-000000.idx").read_text().splitlines()[1].startswith("rgb 512 196608 ")
    assert make(tree, out, encoding="raw", quality=50).was_complete  # pixels have no quality


def test_raw_shards_too_do_not_depend_on_the_number_of_workers(tree, tmp_path):
    outputs = [make(tree, tmp_path / str(n), encoding="raw", num_workers=n).out for n in (1, 3)]
    assert hash_output(outputs[0]) == hash_output(outputs[1])


def test_repaired_images_are_used_and_counted_by_key(tmp_path, small_tree):
    tree = shutil.copytree(small_tree, tmp_path / "tree")
    pixels = np.random.default_rng(0).integers(0, 256, size=(300, 300, 3), dtype=np.uint8)
    for name in ("train/cat/cat_0.png", "val/dog/dog_1.png"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        (tree / name).write_bytes(buffer.getvalue()[:-2])  # without the mark of its end
    summary = make(tree, tmp_path / "out", samples_per_shard=3)
    assert (summary.num_repaired, summary.num_failures) == (2, 0)
    assert summary.to_json()["num_repaired"] == 2
    repaired = {}
    for path in summary.out.glob("*-*.json"):
        repaired |= {(read_json(path)["split"], key): what for key, what in read_json(path)["repaired"].items()}
    assert set(repaired) == {("train", "000000000"), ("val", "000000003")} and all(repaired.values())
    assert make(tree, summary.out, samples_per_shard=3).num_repaired == 2  # also when it is only looked at
