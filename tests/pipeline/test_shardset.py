"""The contract on disk: nothing but a whole, consistent folder of shards opens, and nothing is half written."""

import copy
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from pipeline.common.files import read_json, write_atomic, write_json
from pipeline.manifest import Manifest, index_header
from pipeline.shards import ShardSet

GOOD = {
    "schema": 1,
    "created_by": "alexnet-dali 0.1.0",
    "layout": "folder",
    "seed": 0,
    "size_px": 256,
    "encoding": "jpeg",
    "quality": 90,
    "samples_per_shard": 2,
    "classes": [{"index": 0, "wnid": "n1", "name": "one"}, {"index": 1, "wnid": "n2", "name": "two"}],
    "shards": [
        {"file": "train-000000.tar", "split": "train", "samples": 2, "bytes": 10, "sha256": "aa"},
        {"file": "train-000001.tar", "split": "train", "samples": 1, "bytes": 9, "sha256": "bb"},
        {"file": "val-000000.tar", "split": "val", "samples": 1, "bytes": 8, "sha256": "cc"},
    ],
    "totals": {"train": 3, "val": 1},
    "job": "f00",
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def parse_or_refuse(raw):
    """The manifest, or the words of the refusal."""
    try:
        return Manifest.parse(raw, Path("here"))
    except UserError as error:
        return str(error)


def is_manifest_or_one_line(result):
    return isinstance(result, Manifest) or (result.startswith("here: ") and "\n" not in result)


@pytest.mark.parametrize("wrong", ["2", 2.0, None, True])
@pytest.mark.parametrize("place", [("seed",), ("shards", 0, "samples"), ("classes", 1, "index"), ("totals", "val")])
def test_what_should_be_a_whole_number_and_is_not_is_refused(place, wrong):
    raw = copy.deepcopy(GOOD)
    inner = raw
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = wrong
    assert parse_or_refuse(raw).startswith("here: not a manifest (TypeError: ")


def make_folder(root: Path) -> Path:
    root.mkdir()
    for shard in GOOD["shards"]:
        (root / shard["file"]).write_bytes(b"x" * shard["bytes"])
        (root / shard["file"]).with_suffix(".idx").write_text(f"v1.2 {shard['samples']}\nrows\n")
    write_json(root / "manifest.json", GOOD)
    return root


@given(JSON)
def test_arbitrary_json_is_a_manifest_or_a_user_error(raw):
    assert is_manifest_or_one_line(parse_or_refuse(raw))


def places(value, path=()):
    """Paths to every value inside nested lists and dictionaries."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


@given(st.sampled_from(list(places(GOOD))), JSON)
def test_a_manifest_with_any_value_replaced_is_a_manifest_or_a_user_error(place, replacement):
    raw = copy.deepcopy(GOOD)
    holder = raw
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = replacement
    assert is_manifest_or_one_line(parse_or_refuse(raw))


@pytest.mark.parametrize("key", GOOD)
def test_a_manifest_without_any_one_field_is_refused(key):
    with pytest.raises(UserError, match=r"make the shards again with `alexnet-prep shard`"):
        Manifest.parse({name: value for name, value in GOOD.items() if name != key}, Path("here"))


def test_a_good_manifest_survives_writing_and_reading(tmp_path):
    manifest = Manifest.parse(GOOD, tmp_path)
    write_json(tmp_path / "m.json", manifest.to_json())
    assert Manifest.parse(read_json(tmp_path / "m.json"), tmp_path) == manifest
    assert read_json(tmp_path / "m.json") == GOOD


def change(**changes):
    raw = copy.deepcopy(GOOD)
    for place, value in changes.items():
        if place == "shard":
            raw["shards"][0] |= value
        elif place == "shards":
            raw["shards"] += value
        else:
            raw[place] = value
    return raw


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (change(schema=2), "schema is 2, expected 1"),
        (change(schema="1"), "schema is '1', expected 1"),
        ([], "schema is None, expected 1"),
        (change(shard={"file": "../train-000000.tar"}), "shard name '../train-000000.tar' is not of the form"),
        (change(shard={"file": "train-000000.tar\n"}), "is not of the form"),
        (change(shard={"file": "/etc/passwd"}), "is not of the form"),
        (change(shard={"split": "val"}), "says split 'val', expected the one in its name"),
        (change(shard={"samples": -1}), "has a negative count"),
        (change(shard={"bytes": -1}), "has a negative count"),
        (change(shards=[GOOD["shards"][0]]), "a shard is listed twice"),
        (change(classes=GOOD["classes"][::-1]), r"class indices are not 0\.\.1 in order"),
        (change(totals={"train": 4, "val": 1}), "total of train is 4, its shards hold 3"),
        (change(totals={"train": 3}), "not a manifest"),
        (change(seed="x"), "not a manifest"),
    ],
)
def test_an_inconsistent_manifest_is_refused_by_name(raw, message):
    with pytest.raises(UserError, match=f"here: .*{message}"):
        Manifest.parse(raw, Path("here"))


def test_a_whole_folder_opens(tmp_path):
    shards = ShardSet.open(str(make_folder(tmp_path / "s")))
    assert shards.tars("train") == [tmp_path / "s/train-000000.tar", tmp_path / "s/train-000001.tar"]
    assert shards.indices("val") == [tmp_path / "s/val-000000.idx"]
    assert (shards.num_samples("train"), shards.num_samples("val"), shards.num_classes) == (3, 1, 2)


def test_the_fingerprint_is_of_the_training_tars_and_their_order(tmp_path):
    shards = ShardSet.open(make_folder(tmp_path / "s"))

    def fingerprint(raw):
        return ShardSet(shards.root, Manifest.parse(raw, shards.root)).fingerprint

    assert shards.fingerprint == fingerprint(GOOD) and len(shards.fingerprint) == 64
    assert fingerprint(change(shard={"sha256": "ab"})) != shards.fingerprint
    assert fingerprint({**GOOD, "shards": [GOOD["shards"][n] for n in (1, 0, 2)]}) != shards.fingerprint
    assert fingerprint({**GOOD, "shards": GOOD["shards"][:2], "totals": {"train": 3, "val": 0}}) == shards.fingerprint


def remove_tar(root):
    (root / "train-000001.tar").unlink()


def cut_tar(root):
    (root / "train-000001.tar").write_bytes(b"x")


def remove_index(root):
    (root / "val-000000.idx").unlink()


def stale_index(root):
    (root / "val-000000.idx").write_text("v1.2 7\n")


def binary_index(root):
    (root / "val-000000.idx").write_bytes(bytes(range(128, 256)))


def remove_manifest(root):
    (root / "manifest.json").unlink()


def cut_manifest(root):
    (root / "manifest.json").write_text(json.dumps(GOOD)[:50])


def deep_manifest(root):
    (root / "manifest.json").write_text("[" * 100_000)


def remove_all(root):
    shutil.rmtree(root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_tar, r"train-000001\.tar: missing, expected 9 bytes; restore it, or run .* --force"),
        (cut_tar, r"train-000001\.tar: 1 bytes, expected 9 \(truncated or replaced\)"),
        (remove_index, r"val-000000\.idx: missing"),
        (stale_index, r"val-000000\.idx: starts with 'v1\.2 7', expected 'v1\.2 1' \(stale index\)"),
        (binary_index, r"val-000000\.idx: starts with .* \(stale index\)"),
        (remove_manifest, r"s: unfinished or not a folder of shards \(no manifest\.json\); make it with"),
        (cut_manifest, r"manifest\.json: cannot be read as JSON"),
        (deep_manifest, r"manifest\.json: cannot be read as JSON"),
        (remove_all, r"s: no such folder \(no manifest\.json\)"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, damage, message):
    damage(make_folder(tmp_path / "s"))
    with pytest.raises(UserError, match=message) as caught:
        ShardSet.open(tmp_path / "s")
    assert "\n" not in str(caught.value)


def test_a_set_opened_by_a_relative_name_stays_readable_when_the_current_folder_changes(tmp_path, monkeypatch):
    make_folder(tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    shards = ShardSet.open("shards")
    monkeypatch.chdir("/")
    shards.check("train")
    assert shards.root == tmp_path / "shards" and shards.location == str(tmp_path / "shards")
    assert all(path.is_file() for path in (*shards.tars("train"), *shards.indices("val")))


def test_the_index_header_is_that_of_dalis_version_1_2():
    assert index_header(17) == "v1.2 17"


def test_a_file_is_replaced_as_a_whole(tmp_path):
    write_atomic(tmp_path / "f", b"old")
    write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_atomic(tmp_path / "f", b"old")

    def fail(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"No space left.*{tmp_path / 'f'}"):
        write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
