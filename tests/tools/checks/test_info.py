"""`alexnet-prep info`: every fact against what Python's tarfile finds, and few reads for it."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from pipeline.shards import ShardSet
from tests import oracle
from tests.tools.checks.forging import forge, read_json, read_members, write_json
from tools.checks import info
from tools.checks.info import count_labels, count_sorted, describe
from tools.sharding.lock import lock_store
from tools.sharding.make import make_shards
from tools.sharding.store import open_store
from tools.sources.source import open_source


@pytest.fixture
def folder(ready_shards, tmp_path) -> Path:
    return shutil.copytree(ready_shards, tmp_path / "shards")


def test_every_fact_is_what_the_tars_and_the_manifest_hold(ready_shards):
    facts = describe(ready_shards)
    shards = ShardSet.open(ready_shards)
    for split, num_images, num_shards in (("train", 64, 4), ("val", 24, 2)):
        stored = oracle.read_samples(shards.tars(split))
        counts = Counter(label for _, label in stored.values())
        images = [data for tar in shards.tars(split) for name, data in read_members(tar) if name.endswith(".jpg")]
        told = facts["splits"][split]
        assert (told["images"], told["shards"]) == (num_images, num_shards) == (len(stored), len(shards.tars(split)))
        assert told["bytes"] == sum(path.stat().st_size for path in shards.tars(split))
        assert told["mean_image_bytes"] == round(sum(map(len, images)) / num_images, 1)
        assert told["classes"] == {
            "with_images": len(counts),
            "min_images": min(counts.values()),
            "median_images": median(counts.values()),
            "max_images": max(counts.values()),
        }
        assert count_labels(shards, split) == counts
    manifest = read_json(ready_shards / "manifest.json")
    for name in ("created_by", "layout", "encoding", "quality", "seed", "size_px", "samples_per_shard", "job"):
        assert facts[name] == manifest[name]
    assert (facts["state"], facts["num_classes"], facts["fingerprint"]) == ("finished", 4, shards.fingerprint)
    assert (facts["num_failures"], facts["num_repaired"]) == (0, 0)
    assert facts["colors"]["state"] == "matching"
    assert json.loads(json.dumps(facts)) == facts


def test_failures_and_repairs_are_counted(synth_tree, tmp_path):
    tree = shutil.copytree(synth_tree, tmp_path / "tree")
    for path in list((tree / "train/n00000002").iterdir())[:3]:
        path.write_bytes(b"broken")
    for folder in ("train/n00000003", "val/n00000001"):
        path = next(path for path in (tree / folder).iterdir() if path.read_bytes().endswith(b"\xff\xd9"))
        path.write_bytes(path.read_bytes()[:-2])
    make_shards(open_source(tree), tmp_path / "out", samples_per_shard=30, num_workers=1, max_failures="3")
    facts = describe(tmp_path / "out")
    assert (facts["num_failures"], facts["num_repaired"]) == (3, 2)
    classes = facts["splits"]["train"]["classes"]
    assert (classes["min_images"], classes["max_images"]) == (13, 16)
    assert facts["colors"] == {"state": "missing", "remedy": f"alexnet-prep pca --shards {tmp_path / 'out'}"}


def test_colour_statistics_of_other_shards_are_told(folder):
    write_json(folder / "color.json", {**read_json(folder / "color.json"), "shards_fingerprint": "0" * 64})
    colors = describe(folder)["colors"]
    assert colors["state"] == "unusable" and "computed on shards 000000000000" in colors["reason"]


def test_an_unfinished_job_tells_how_far_it_has_come(folder):
    job = read_json(folder / "manifest.json")["job"]
    (folder / "manifest.json").unlink()
    write_json(folder / "job.json", {"schema": 1, "job": job})
    for name in ("train-000001", "val-000000"):
        (folder / f"{name}.json").unlink()
    write_json(folder / "train-000002.json", {**read_json(folder / "train-000002.json"), "job": "another"})
    facts = describe(folder)
    assert (facts["state"], facts["job"]) == ("unfinished", job)
    assert facts["splits"] == {"train": {"images": 32, "shards": 2}, "val": {"images": 8, "shards": 1}}
    assert "run the same `alexnet-prep shard` again" in facts["remedy"]


def test_who_holds_the_folder_is_told(folder):
    with lock_store(open_store(folder), "job", None):
        (told,) = describe(folder)["holders"]
        assert told["is_alive"] and told["holder"].startswith(f"process {os.getpid()} on ")
        (folder / ".lock-1-of-2").write_bytes((folder / ".lock").read_bytes())  # nobody holds that
        assert [holder["is_alive"] for holder in describe(folder)["holders"]] == [True, False]
    assert [holder["is_alive"] for holder in describe(folder)["holders"]] == [False]


@pytest.mark.parametrize(
    "text", ["v1.2 16\n", "v1.2 16\nx 1 2 3\n", "v1.2 16\n" + "png 1 2 0.png cls 3 5 0.cls\n" * 16], ids=range(3)
)
def test_a_damaged_index_is_an_error_that_names_verify(folder, text):
    (folder / "train-000002.idx").write_text(text)
    with pytest.raises(UserError, match=r"train-000002.idx: damaged index .*alexnet-prep verify --shards"):
        describe(folder)


def test_a_label_out_of_range_is_an_error_that_names_verify(folder):
    members = read_members(folder / "val-000001.tar")
    forge(folder / "val-000001.tar", [(n, b"00004" if n.endswith("cls") else data) for n, data in members])
    with pytest.raises(UserError, match=r"val-000001.tar: label b'00004' at byte \d+, expected 5 digits, 0 to 3"):
        describe(folder)


def test_what_is_no_folder_of_shards_is_an_error(tmp_path):
    with pytest.raises(UserError, match="unfinished or not a folder of shards"):
        describe(tmp_path)


@given(st.lists(st.integers(0, 30), max_size=200))
def test_counting_a_sorted_sequence_reads_few_of_it_and_counts_all(values):
    values.sort()
    num_reads = 0

    def read(position: int) -> int:
        nonlocal num_reads
        num_reads += 1
        return values[position]

    assert count_sorted(len(values), read) == Counter(values)
    assert num_reads <= 2 + 2 * 8 * len(set(values))  # two reads a halving, at most 8 halvings a boundary


def test_training_labels_are_read_by_the_class_and_not_by_the_image(ready_shards, monkeypatch):
    reads = []
    monkeypatch.setattr(info.os, "pread", lambda *where, real=info.os.pread: reads.append(where) or real(*where))
    shards = ShardSet.open(ready_shards)
    assert count_labels(shards, "train") == dict.fromkeys(range(4), 16)
    assert len(reads) <= 2 + 2 * 6 * 3
