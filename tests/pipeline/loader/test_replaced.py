"""Labels that no class has, and shards that become others while they are read."""

import json
import os
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.loader import read_pixels
from pipeline.manifest import MANIFEST
from pipeline.shards import ShardSet
from tests.pipeline.loader.loading import named


def write_label(shards: ShardSet, split: str, label: bytes) -> str:
    """Overwrite the third label of a split's second shard, as if it had always been there. Returns its key."""
    words = shards.indices(split)[1].read_text().splitlines()[3].split()
    with shards.tars(split)[1].open("r+b") as file:
        file.seek(int(words[5]))
        file.write(label)
    return words[7][:9]


READERS = {
    "train": lambda shards, make_train, make_eval: make_train(shards=shards),
    "eval": lambda shards, make_train, make_eval: make_eval(shards=shards),
    "pixels": lambda shards, make_train, make_eval: read_pixels(shards, batch_size=4),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_label_beyond_the_classes_is_named_with_shard_and_key(private_shards, make_train, make_eval, reader):
    split = "val" if reader == "eval" else "train"
    key = write_label(private_shards, split, b"00004")
    batches = READERS[reader](ShardSet.open(private_shards.root), make_train, make_eval)
    message = named(rf"sample {key} has the label b'00004', expected 5 digits, 0 to 3 \(the classes of")
    with pytest.raises(UserError, match=f"{split}-000001.tar: {message}"):
        list(batches)


@pytest.mark.parametrize("label", [b"ab\0zz", b"-0001", b"    1", b"1:003"])  # '1:' would count as 20
def test_a_label_that_is_no_number_is_shown(private_shards, make_train, label):
    key = write_label(private_shards, "train", label)
    with pytest.raises(UserError, match=named(rf"sample {key} has the label b")):
        list(make_train(shards=ShardSet.open(private_shards.root)))


def test_a_manifest_of_fewer_classes_than_the_labels_is_noticed(private_shards, make_train):
    path = private_shards.root / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "classes": manifest["classes"][:2]}))
    with pytest.raises(UserError, match=r"has the label b'0000[23]', expected 5 digits, 0 to 1"):
        list(make_train(shards=ShardSet.open(private_shards.root)))


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 1)  # in the padding: no image is any different
        file.write(b"\1")


def replace(path: Path, change) -> None:
    """By a copy under the same name: whoever has the old file open keeps it."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    change(other)
    other.replace(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, r"was replaced while it was in use \(SHA-256 [0-9a-f]{12}, expected [0-9a-f]{12}\); restore it"),
        (lambda path: replace(path, flip_a_byte), "was replaced while it was in use"),
        (lambda path: replace(path, lambda other: os.truncate(other, 1024)), r"1024 bytes, expected \d+ \(truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + bytes(512)), r"\d+ bytes, expected \d+ \(truncated or repl"),
        (Path.unlink, "missing, expected"),
    ],
    ids=["in place", "by another", "by a shorter one", "longer", "deleted"],
)
def test_an_epoch_of_shards_that_became_others_does_not_count(private_shards, make_train, damage, message):
    loader = make_train(shards=private_shards)
    batches = iter(loader)
    next(batches)
    damage(private_shards.tars("train")[2])
    with pytest.raises(UserError, match=rf"train-000002.tar: {message}"):
        list(batches)
    assert loader.epoch == 1


@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink])
def test_validation_shards_that_became_others_are_named_at_the_next_evaluation(private_shards, make_eval, damage):
    loader = make_eval(shards=private_shards)
    assert sum(len(batch.labels) for batch in loader) == 24
    damage(private_shards.tars("val")[1])
    with pytest.raises(UserError, match=r"val-000001.tar: (was replaced while it was in use|missing)"):
        list(loader)


def test_a_shard_that_was_only_touched_or_copied_back_is_the_same_shard(private_shards, make_train):
    loader = make_train(shards=private_shards)
    list(loader)
    os.utime(private_shards.tars("train")[0], (0, 0))
    replace(private_shards.tars("train")[1], lambda other: None)
    assert len(list(loader)) == 8 and loader.epoch == 3
