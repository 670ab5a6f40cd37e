"""Images that cannot be used: named with their reason, counted against the limit, and never in the way of others."""

import errno
import json
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.common.files import read_json
from pipeline.shards import ShardSet
from tests.sharding import BROKEN, hash_output, make, read_samples
from tools.sharding.lock import Part
from tools.sharding.output import Failure, limit_failures, refuse_failures
from tools.sharding.store import FolderStore


def test_a_broken_image_leaves_a_gap_and_changes_no_other_byte(tree, tmp_path):
    whole = read_samples(make(tree, tmp_path / "whole").out, "train")
    (tree / "train/dog/dog_2.png").write_bytes(BROKEN)
    out = make(tree, tmp_path / "out").out
    missing = f"{6 + 2:09d}"
    assert read_samples(out, "train") == {key: value for key, value in whole.items() if key != missing}
    assert list(read_samples(out, "train")) == [key for key in whole if key != missing]
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert failures == [
        {
            "source": "train/dog/dog_2.png",
            "reason": "not one of JPEG, PNG, GIF, BMP, WEBP, TIFF",
            "exception": "UnidentifiedImageError",
        }
    ]
    assert ShardSet.open(out).manifest.totals == {"train": 11, "val": 4}
    assert make(tree, out).num_failures == 1  # also when it is only looked at


def test_an_image_that_cannot_be_read_is_a_failure_too(tree, tmp_path):
    (tree / "val/cat/cat_0.png").unlink()
    (tree / "val/cat/cat_0.png").symlink_to("nowhere")
    out = make(tree, tmp_path / "out").out
    failure = json.loads((out / "failures.jsonl").read_text())
    assert failure == {
        "source": "val/cat/cat_0.png",
        "reason": "No such file or directory",
        "exception": "FileNotFoundError",
    }


def test_a_stale_failure_list_is_removed_when_nothing_fails_any_more(tree, tmp_path):
    good = (tree / "train/dog/dog_2.png").read_bytes()
    (tree / "train/dog/dog_2.png").write_bytes(BROKEN)
    out = make(tree, tmp_path / "out").out
    (tree / "train/dog/dog_2.png").write_bytes(good)
    make(tree, out, force=True)
    assert not (out / "failures.jsonl").exists()
    assert hash_output(out) == hash_output(make(tree, tmp_path / "whole").out)


def test_too_many_failures_stop_the_run_and_leave_no_manifest(tree, tmp_path):
    for number in range(3):
        (tree / f"train/dog/dog_{number}.png").write_bytes(BROKEN)
    with pytest.raises(UserError) as caught:
        make(tree, tmp_path / "out", max_failures="2", num_workers=1)
    text = str(caught.value)
    assert text.startswith("3 of 16 images cannot be used, limit 2 (--max-failures 2): 'train/dog/dog_")
    assert "WEBP, TIFF (UnidentifiedImageError)" in text and "--force" in text and "\n" not in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "manifest.json" not in names and not [name for name in names if ".tmp" in name]
    assert make(tree, tmp_path / "out", max_failures="3").num_failures == 3


def read_failures(out: Path) -> set[str]:
    return {json.loads(line)["source"] for line in (out / "failures.jsonl").read_text().splitlines()}


@pytest.mark.parametrize("part", [None, Part(1, 1)])
def test_a_job_that_is_refused_lists_its_failures_and_says_where(tree, tmp_path, part):
    broken = {f"train/dog/dog_{number}.png" for number in range(3)}
    images = {name: (tree / name).read_bytes() for name in broken}
    for name in broken:
        (tree / name).write_bytes(BROKEN)
    out = tmp_path / "out"
    for _ in range(2):  # the second time, of shards that are kept too
        with pytest.raises(UserError, match="cannot be used, limit 1") as caught:
            make(tree, out, num_workers=1, part=part)
        assert f"listed in {out}/failures.jsonl" in str(caught.value)
        assert len(read_failures(out)) > 1 and read_failures(out) <= broken
    for name, data in images.items():
        (tree / name).write_bytes(data)
    done = make(tree, out, num_workers=1, part=part, max_failures="100%")
    assert done.is_complete and done.num_failures == (len(read_failures(out)) if done.num_failures else 0)
    assert (out / "failures.jsonl").exists() == bool(done.num_failures)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), UserError("s3://x: No space left")], ids=str)
def test_a_list_that_cannot_be_written_does_not_hide_the_failures(tree, tmp_path, monkeypatch, error):
    for number in range(3):
        (tree / f"train/dog/dog_{number}.png").write_bytes(BROKEN)
    write = FolderStore.write

    def refuse(store, name, data):
        if name == "failures.jsonl":
            raise error
        write(store, name, data)

    monkeypatch.setattr(FolderStore, "write", refuse)
    with pytest.raises(UserError, match=r"limit 1.*; their list could not be written: .*No space left"):
        make(tree, tmp_path / "out", num_workers=1)


def test_failures_of_shards_kept_from_before_count(tree, tmp_path):
    for number in range(3):
        (tree / f"train/dog/dog_{number}.png").write_bytes(BROKEN)
    out = make(tree, tmp_path / "out", max_failures="3").out
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="3 of 16 images cannot be used, limit 1"):
        make(tree, out)


@pytest.mark.parametrize(
    ("text", "num_images", "limit"),
    [("25", 9, 25), ("0", 9, 0), ("0.1%", 9, 1), ("0.1%", 1000, 1), ("0.1%", 2999, 2), ("0.3%", 1000, 3), ("0%", 9, 1)],
)
def test_the_limit_is_a_count_or_a_share_of_at_least_one(text, num_images, limit):
    assert limit_failures(text, num_images) == limit
    failures = [Failure("train/a/1.JPEG", "why", "Error")] * limit
    refuse_failures(failures, text, num_images)
    with pytest.raises(UserError):
        refuse_failures([*failures, failures[0] if failures else Failure("a", "b", "c")], text, num_images)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "%", "ten", "1e3", "5 %", "٣"])
def test_another_limit_is_refused(text):
    with pytest.raises(ValueError, match="expected a count"):
        limit_failures(text, 10)


def test_a_split_of_which_nothing_is_left_is_an_error_and_not_a_set(tree, tmp_path):
    for path in tree.glob("val/*/*"):
        path.write_bytes(BROKEN)
    with pytest.raises(
        UserError, match=r"val: none of 4 images can be used, expected at least one; 'val/cat/cat_0.png'"
    ):
        make(tree, tmp_path / "out", max_failures="100%")
    assert len(read_failures(tmp_path / "out")) == 4
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_shard_without_a_usable_image_is_left_out_of_the_manifest(tree, tmp_path):
    for path in tree.glob("val/cat/*"):
        path.write_bytes(BROKEN)
    shards = ShardSet.open(make(tree, tmp_path / "out", samples_per_shard=2, max_failures="2").out)
    assert [shard.file for shard in shards.shards("val")] == ["val-000001.tar"]
    assert shards.num_samples("val") == 2


def test_the_failure_list_is_in_the_order_of_the_shards_whoever_was_first(tree, tmp_path):
    names = [
        "train/cat/cat_1.png",
        "train/dog/dog_0.png",
        "train/dog/dog_5.png",
        "val/cat/cat_1.png",
        "val/dog/dog_0.png",
    ]
    for name in names:
        (tree / name).write_bytes(BROKEN)
    lists = []
    for num_workers in (1, 3):
        out = make(
            tree, tmp_path / str(num_workers), max_failures="5", num_workers=num_workers, samples_per_shard=2
        ).out
        lists.append((out / "failures.jsonl").read_bytes())
        expected = [f for shard in sorted(out.glob("*-*.json")) for f in read_json(shard)["failures"]]
        assert [json.loads(line) for line in lists[-1].splitlines()] == expected and len(expected) == 5
    assert lists[0] == lists[1]
