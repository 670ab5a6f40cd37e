"""What loaders refuse, and what they do with shards that are damaged while they read."""

import gc
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import graph
from pipeline.common.errors import UserError
from pipeline.loader import EvalLoader, TrainLoader, read_pixels
from pipeline.operators import load_operators
from pipeline.options import count_local_ranks, count_threads
from pipeline.shards import ShardSet
from tests.pipeline.loader.loading import NUM_TRAIN, named

ROOT = Path(__file__).resolve().parents[3]
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT)
DEADLINE_S = 60  # far beyond what an error takes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 0}, "global batch size 0: expected a positive multiple of the 1 ranks"),
        ({"global_batch_size": -8}, "global batch size -8: expected a positive"),
        ({"global_batch_size": 9, "world_size": 2}, "global batch size 9: expected a positive multiple of the 2 ranks"),
        ({"global_batch_size": 65}, "64 training images, fewer than one global batch of 65; set --global-batch-size"),
        ({"global_batch_size": 8.0}, "global_batch_size is 8.0, expected a whole number"),
        ({"seed": "1"}, "seed is '1', expected a whole number"),
        ({"shards": "shards"}, r"shards is 'shards', expected a ShardSet: ShardSet.open\('shards'\)"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"rank": -1, "world_size": 2}, "rank -1 of 2"),
        ({"world_size": 0}, "rank 0 of 0"),
        ({"device": "tpu"}, "device 'tpu': expected 'cpu' or 'gpu'"),
        ({"mean": "none"}, "mean is 'none', expected one of image, channel"),
        ({"decode": "fast"}, "decode 'fast': expected one of auto, cpu, mixed, hybrid"),
        ({"decode": "host"}, "decode 'host': expected one of auto, cpu, mixed, hybrid"),
        ({"cache_gib": -1.0}, "cache_gib -1.0: expected a number of GiB, 0 or more"),
        (
            {"cache_gib": 1.0},
            "cache_gib 1: keeps what a GPU has decoded, got device 'cpu' and decode 'cpu'; set decode",
        ),
        ({"decode": "hybrid", "host_share": 1.5}, "host_share 1.5: expected 0 to 1"),
        ({"hw_decoder_load": -0.1}, "hw_decoder_load -0.1: expected 0 to 1"),
        ({"decode": "cpu", "host_share": 0.5}, "host_share 0.5: of no use to decode 'cpu'; set decode 'hybrid'"),
        ({"prefetch_batches": 0}, "prefetch_batches 0: expected a whole number, 1 or more"),
        ({"num_threads": 0}, "num_threads 0: expected a whole number, 1 or more"),
        ({"num_threads": 1.5}, "num_threads 1.5: expected a whole number, 1 or more"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_training_arguments_that_do_not_fit_are_refused(make_train, options, message):
    with pytest.raises(UserError, match=message):
        make_train(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size 0: expected 1 or more"),
        ({"batch_size": "3"}, "batch_size is '3', expected a whole number"),
        ({"split": "test"}, "split 'test': expected 'train' or 'val'"),
        ({"shards": Path("shards")}, r"expected a ShardSet: ShardSet.open\('shards'\)"),
        ({"rank": 3, "world_size": 3}, "rank 3 of 3"),
        ({"crops": "five"}, "crops 'five': expected 'centre' or 'ten'"),
        ({"device": "tpu"}, "device 'tpu': expected 'cpu' or 'gpu'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_evaluation_arguments_that_do_not_fit_are_refused(make_eval, options, message):
    with pytest.raises(UserError, match=message):
        make_eval(**options)


def test_a_folder_in_place_of_its_colours_is_refused(shards):
    for loader in (TrainLoader, EvalLoader):
        with pytest.raises(UserError, match=r"expected ColorStats: ColorStats.load\(shards.root, shards.fingerprint\)"):
            loader(shards, str(shards.root))


def test_a_decoder_for_raw_shards_is_refused(make_train, make_eval, raw_shards):
    for make in (make_train, make_eval):
        with pytest.raises(UserError, match="raw shards need no decoder, got decode 'mixed'; leave it out"):
            make(shards=raw_shards, decode="mixed")


def test_a_shard_that_is_gone_when_an_epoch_begins_is_named(make_train, private_shards):
    loader = make_train(shards=private_shards)
    list(loader)
    private_shards.tars("train")[2].unlink()
    with pytest.raises(UserError, match=r"train-000002.tar: missing, expected \d+ bytes"):
        list(loader)


@pytest.mark.parametrize(
    ("said", "world_size", "expected"), [("", 4, 4), ("2", 4, 2), ("8", 4, 4), ("x", 4, 4), ("0", 4, 4)]
)
def test_ranks_on_this_machine_are_what_the_launcher_says_or_all(monkeypatch, said, world_size, expected):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
    assert count_local_ranks(world_size) == expected


def test_ranks_share_the_cores_and_each_has_one_at_least(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(7)))
    assert [count_threads(num_ranks) for num_ranks in (1, 2, 7, 8)] == [7, 3, 1, 1]


def test_shards_without_validation_images_are_refused_for_evaluation(make_eval, shards):
    manifest = shards.manifest
    train = tuple(shard for shard in manifest.shards if shard.split == "train")
    without = ShardSet(shards.root, replace(manifest, shards=train, totals={"train": NUM_TRAIN, "val": 0}))
    with pytest.raises(UserError, match=r"no validation images; .*--val-fraction"):
        make_eval(shards=without)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is visible")
def test_the_gpu_is_refused_where_there_is_none(make_train, make_eval):
    for make in (make_train, make_eval):
        with pytest.raises(UserError, match="no CUDA GPU is visible; use device 'cpu'"):
            make(device="gpu")


READ_PROGRAM = """
import sys
from pipeline.colors import ColorStats
from pipeline.loader import EvalLoader, TrainLoader, read_pixels
from pipeline.options import LoaderOptions
from pipeline.shards import ShardSet
options = LoaderOptions(num_threads=2)
shards = ShardSet.open(sys.argv[1])
colors = ColorStats.load(shards.root, shards.fingerprint)
print("opened", flush=True)
for _ in {make}: pass
print("read to the end", flush=True)
"""


def with_sizes_on_disk(shards) -> dict:
    """The manifest, telling the sizes the tars have now: damage that opening the shards cannot see."""
    manifest = shards.manifest.to_json()
    for shard in manifest["shards"]:
        shard["bytes"] = (shards.root / shard["file"]).stat().st_size
    return manifest


def garble_one_image(shards, split) -> str:
    """Overwrite the first JPEG of the split's second shard with zeros, its tar header left alone. Returns its key."""
    line = next(line for line in shards.indices(split)[1].read_text().splitlines()[1:] if "jpg" in line).split()
    offset, size = int(line[1]), int(line[2])
    with shards.tars(split)[1].open("r+b") as file:
        file.seek(offset)
        assert file.read(2) == b"\xff\xd8"  # where a JPEG begins
        file.seek(offset)
        file.write(bytes(size))
    return line[3][:9]


def cut_in_half(shards, split) -> None:
    path = shards.tars(split)[1]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


@pytest.mark.parametrize("reader", ["train", "eval", "ten", "pixels"])
def test_an_image_that_cannot_be_decoded_is_named(private_shards, colors, make_train, make_eval, reader):
    split = "train" if reader in ("train", "pixels") else "val"
    key = garble_one_image(private_shards, split)
    private_shards = ShardSet.open(private_shards.root)  # it was like this before anything looked at it
    batches = {
        "train": lambda: make_train(shards=private_shards),
        "eval": lambda: make_eval(shards=private_shards),
        "ten": lambda: make_eval(shards=private_shards, crops="ten"),
        "pixels": lambda: read_pixels(private_shards, batch_size=4),
    }[reader]()
    tar = private_shards.tars(split)[1].name
    with pytest.raises(
        UserError, match=f"{tar}: " + named(rf"sample {key} cannot be decoded \(.+\); list all such with")
    ):
        list(batches)


@pytest.mark.parametrize("reader", ["train", "eval"])
def test_a_shard_that_was_cut_under_the_reader_ends_the_process_with_a_failure(private_shards, reader):
    cut_in_half(private_shards, "val" if reader == "eval" else "train")
    make = {
        "train": "TrainLoader(shards, colors, options=options, global_batch_size=4)",
        "eval": "EvalLoader(shards, colors, options=options, batch_size=4)",
    }[reader]
    program = READ_PROGRAM.format(make=make)
    (private_shards.root / "manifest.json").write_text(json.dumps(with_sizes_on_disk(private_shards)))
    done = subprocess.run(  # a process of its own: DALI 2.4 may crash after an error, and a hang ends in TimeoutExpired
        [sys.executable, "-c", program, str(private_shards.root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert "opened" in done.stdout and "read to the end" not in done.stdout
    assert done.returncode != 0
    assert "UserError" in done.stderr or done.returncode in CRASHES


CUT_PROGRAM = """
import os, sys
from pipeline import graph
from pipeline.colors import ColorStats
from pipeline.loader import TrainLoader
from pipeline.options import LoaderOptions
from pipeline.shards import ShardSet
graph.MAX_BUFFERED_SAMPLES = 1  # or the few samples of a test are all read before the first batch
shards = ShardSet.open(sys.argv[1])
colors = ColorStats.load(shards.root, shards.fingerprint)
options = LoaderOptions(num_threads=1, prefetch_batches=1)
batches = iter(TrainLoader(shards, colors, options=options, global_batch_size=4))
next(batches)
for path in shards.tars("train"):
    os.truncate(path, 512)
for _ in batches: pass
print("read to the end", flush=True)
"""


def test_a_shard_that_is_cut_in_the_middle_of_an_epoch_is_named(private_shards):
    done = subprocess.run(
        [sys.executable, "-c", CUT_PROGRAM, str(private_shards.root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode != 0 and "read to the end" not in done.stdout
    assert "train-000000.tar: 512 bytes, expected" in done.stderr


def test_many_shards_raise_the_limit_of_open_files(monkeypatch):
    limits = []
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr("resource.setrlimit", lambda _, wanted: limits.append(wanted))
    for num_files in (10, 2000, 4000):
        graph._allow_open_files(Path("shards"), num_files)
    assert limits == [(3024, 4096), (4096, 4096)]


def test_more_shards_than_files_may_be_open_are_refused_with_the_limit(monkeypatch, make_train, shards):
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 64))
    with pytest.raises(UserError, match=f"{shards.root}: 4 files have to be open at once, this process may open 64"):
        make_train()


def test_raw_pixels_are_given_open_files_of_their_own(monkeypatch, make_train, raw_shards):
    """The reader reads the labels of every tar, and an operator the pixels by their offsets."""
    if not load_operators():
        pytest.skip("the operators cannot be compiled here")
    limits = []
    monkeypatch.setattr("resource.getrlimit", lambda _: (4, 4096))
    monkeypatch.setattr("resource.setrlimit", lambda _, wanted: limits.append(wanted))
    gc.collect()  # loaders of other tests
    before = count_open_tars()
    loader = make_train(shards=raw_shards)
    list(loader)
    assert limits == [(4 + count_open_tars() - before, 4096)]


def count_open_tars() -> int:
    return sum(".tar" in link.readlink().name for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
