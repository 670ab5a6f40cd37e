"""Shards: complete, the same bytes however they come about, and never a folder that only looks finished."""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import UserError
from pipeline.shardset import Manifest, ShardSet, read_json
from tools import sharder
from tools.imaging import prepare
from tools.sharder import limit_failures, make_shards, name_shards, order_samples, plan_units, refuse_failures
from tools.shardwriter import Failure, Setup, find_finished, write_unit
from tools.sources import open_source

BROKEN = b"this is no image"


@pytest.fixture(scope="session")
def small_tree(tmp_path_factory):
    """2 classes, 12 training and 4 validation images of 40 x 30 pixels."""
    root = tmp_path_factory.mktemp("small") / "tree"
    rng = np.random.default_rng(0)
    for split, num_images in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(num_images):
                pixels = rng.integers(0, 256, size=(30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name}_{number}.png")
    return root


@pytest.fixture
def tree(small_tree, tmp_path):
    """A copy of `small_tree` to break things in."""
    return shutil.copytree(small_tree, tmp_path / "tree")


def make(tree, out, **options):
    return make_shards(open_source(tree), out, **{"samples_per_shard": 4, "num_workers": 2, **options})


def hash_output(out: Path) -> dict[str, str]:
    """What design calls the output: tars and indices."""
    files = [path for path in out.iterdir() if path.suffix in (".tar", ".idx")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_samples(out: Path, split: str) -> dict[str, tuple[bytes, bytes]]:
    """Key -> (image, label) by Python's tarfile, in stored order."""
    members = {}
    for path in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    keys = list(dict.fromkeys(name.partition(".")[0] for name in members))
    assert set(members) == {f"{key}.{ending}" for key in keys for ending in ("jpg", "cls")}
    return {key: (members[f"{key}.jpg"], members[f"{key}.cls"]) for key in keys}


# The plan


@given(st.integers(0, 300), st.integers(1, 50), st.integers(0, 2**63))
def test_every_position_is_planned_once_and_shards_are_full_but_the_last(num_samples, samples_per_shard, seed):
    order = order_samples(num_samples, seed)
    assert sorted(order.tolist()) == list(range(num_samples))
    assert (order == order_samples(num_samples, seed)).all()
    names = name_shards("train", num_samples, samples_per_shard)
    assert len(names) == len(set(names)) and (len(names) - 1) * samples_per_shard < max(num_samples, 1)
    assert len(names) * samples_per_shard >= num_samples


def test_the_shuffle_of_a_seed_is_fixed_for_all_time():
    assert order_samples(10, 0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert order_samples(10, 1).tolist() != order_samples(10, 0).tolist()
    assert order_samples(10, None).tolist() == list(range(10))


def test_units_cover_the_source_train_shuffled_and_val_in_order(synth_tree):
    source = open_source(synth_tree)
    units = list(plan_units(source, seed=5, samples_per_shard=10))
    assert [unit.file for unit in units if unit.split == "val"] == [f"val-{n:06d}.tar" for n in range(3)]
    for split in ("train", "val"):
        planned = [pair for u in units if u.split == split for pair in zip(u.positions, u.entries, strict=True)]
        assert sorted(planned) == list(enumerate(source.entries(split)))
        assert (planned == sorted(planned)) == (split == "val")


def test_train_is_shuffled_over_the_whole_and_not_within_a_class(shard_dir):
    labels = [int(label) for _, label in read_samples(shard_dir, "train").values()]
    assert all(len(set(labels[start : start + 16])) == 4 for start in range(0, 64, 16))


# What is on disk


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
            assert sample["jpg"] == prepare(source.read(entry), quality=90)


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
    assert find_finished(out, "train-000000.tar", job) is not None
    (out / "train-000000.json").write_bytes(content.replace(b"J", job.encode()))
    assert find_finished(out, "train-000000.tar", job) is None


def test_half_written_files_of_dead_writers_are_removed_and_those_of_living_ones_are_not(tree, tmp_path):
    out = make(tree, tmp_path / "out").out
    (out / "manifest.json").unlink()
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    (out / f".train-000000.tar.tmp{dead}").write_bytes(b"half")
    (out / f".val-000000.tar.tmp{os.getpid()}").write_bytes(b"half")
    make(tree, out)
    assert [path.name for path in out.glob(".*")] == [f".val-000000.tar.tmp{os.getpid()}"]


def test_a_run_killed_before_its_first_shard_can_be_repeated(tree, tmp_path):
    whole = make(tree, tmp_path / "whole").out
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.job.json.tmp999999999").write_text("{")
    make(tree, tmp_path / "out")
    marked = tmp_path / "marked"
    marked.mkdir()
    shutil.copy(whole / "train-000000.tar", marked)  # renamed, but killed before index and record
    (marked / "job.json").write_text(json.dumps({"job": read_json(whole / "manifest.json")["job"]}))
    make(tree, marked)
    assert hash_output(tmp_path / "out") == hash_output(marked) == hash_output(whole)


# Images that cannot be used


def test_a_broken_image_leaves_a_gap_and_changes_no_other_byte(tree, tmp_path):
    whole = read_samples(make(tree, tmp_path / "whole").out, "train")
    (tree / "train/dog/dog_2.png").write_bytes(BROKEN)
    out = make(tree, tmp_path / "out").out
    missing = f"{6 + 2:09d}"
    assert read_samples(out, "train") == {key: value for key, value in whole.items() if key != missing}
    assert list(read_samples(out, "train")) == [key for key in whole if key != missing]
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert failures == [
        {"source": "train/dog/dog_2.png", "reason": "cannot identify image file", "exception": "UnidentifiedImageError"}
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
    assert "cannot identify image file (UnidentifiedImageError)" in text and "--force" in text and "\n" not in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "manifest.json" not in names and not [name for name in names if ".tmp" in name]
    assert make(tree, tmp_path / "out", max_failures="3").num_failures == 3


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
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_shard_without_a_usable_image_is_left_out_of_the_manifest(tree, tmp_path):
    for path in tree.glob("val/cat/*"):
        path.write_bytes(BROKEN)
    shards = ShardSet.open(make(tree, tmp_path / "out", samples_per_shard=2, max_failures="2").out)
    assert [shard.file for shard in shards.shards("val")] == ["val-000001.tar"]
    assert shards.num_samples("val") == 2


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
    monkeypatch.setattr(sharder, "BYTES_PER_IMAGE", 10**15)
    with pytest.raises(UserError, match=r"about 1.6e\+07 GB needed, .* GB free on its disk; free some space or choose"):
        make(tree, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_room_is_asked_for_what_is_left_to_do(tree, tmp_path, monkeypatch):
    out = make(tree, tmp_path / "out").out
    (out / "manifest.json").unlink()
    monkeypatch.setattr(sharder, "BYTES_PER_IMAGE", 10**15)
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
    monkeypatch.setattr(sharder, "BYTES_PER_IMAGE", 1)
    with pytest.raises(OSError) as caught:
        make(tree, small_disk / "out", quality=100)
    assert caught.value.errno == errno.ENOSPC and str(small_disk / "out") in caught.value.filename
    names = {path.name for path in (small_disk / "out").iterdir()}
    assert "manifest.json" not in names and not [name for name in names if ".tmp" in name]


def test_a_unit_that_cannot_be_written_leaves_no_file(small_tree, tmp_path):
    unit = next(plan_units(open_source(small_tree), seed=0, samples_per_shard=4))

    def interrupt(_tick):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_unit(Setup(tmp_path, "job", 90, open_source(small_tree).read), unit, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_on_disk_is_one_that_the_reader_accepts(shard_dir):
    raw = read_json(shard_dir / "manifest.json")
    assert json.loads(json.dumps(Manifest.parse(raw, shard_dir).to_json())) == raw
