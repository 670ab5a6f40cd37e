"""Epochs, ranks and resuming: who gets which sample, how often, and again after a restart.

Training samples are known by their keys (`loader.draws`), evaluation images by their bytes.
"""

import io
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.colorstats import ColorStats
from pipeline.errors import UserError
from pipeline.loader import EvalLoader, TrainLoader, sample_key
from pipeline.shardset import ShardSet
from tests import oracle

ROOT = Path(__file__).resolve().parents[2]
NUM_TRAIN, NUM_VAL = 64, 24
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT)
DEADLINE_S = 60  # far beyond what an error takes
GPU_TOLERANCE_GREY = 1.5  # mean absolute difference between the decoders of CPU and GPU


@pytest.fixture(scope="module")
def shards(ready_shards):
    return ShardSet.open(ready_shards)


@pytest.fixture(scope="module")
def colors(shards):
    return ColorStats.load(shards.root, shards.fingerprint)


@pytest.fixture
def make_train(shards, colors):
    def make(**options) -> TrainLoader:
        given = {"global_batch_size": 8, "seed": 5, "num_threads": 2, "with_draws": True, "mean": "channel", **options}
        return TrainLoader(given.pop("shards", shards), colors, **given)

    return make


@pytest.fixture
def make_eval(shards, colors):
    def make(**options) -> EvalLoader:
        given = {"batch_size": 3, "num_threads": 2, "mean": "channel", **options}
        return EvalLoader(given.pop("shards", shards), colors, **given)

    return make


@pytest.fixture
def private_shards(shards, tmp_path):
    return ShardSet.open(shutil.copytree(shards.root, tmp_path / "shards"))


def read_keys(loader) -> list[list[str]]:
    """The keys of the batches of one epoch."""
    return [loader.draws.keys for _ in loader]


def flatten(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


def record(loader, num_batches=None) -> list[tuple]:
    """The next batches, as bytes and draws that can be compared."""
    return [
        (
            batch.images.numpy().tobytes(),
            batch.labels.tolist(),
            *(d.tolist() for d in loader.draws[:3]),
            loader.draws.keys,
        )
        for batch in itertools.islice(loader, num_batches)
    ]


def list_images(batches) -> list[tuple[bytes, int]]:
    return [
        (image.numpy().tobytes(), label)
        for batch in batches
        for image, label in zip(batch.images, batch.labels.tolist(), strict=True)
    ]


# Evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, NUM_VAL, NUM_VAL + 3])
def test_every_evaluation_image_comes_exactly_once_over_all_ranks(make_eval, shards, colors, world_size):
    parts = []
    for rank in range(world_size):
        loader = make_eval(rank=rank, world_size=world_size)
        parts.append(list(loader))
        assert len(parts[-1]) == len(loader) == len(parts[0])  # so that every rank joins every reduction
    stored = oracle.read_samples(shards.tars("val")).values()
    expected = Counter(
        (oracle.central_crop(pixels, mean=colors.mean.astype(np.float32)).astype(np.float32).tobytes(), label)
        for pixels, label in stored
    )
    assert len(expected) == NUM_VAL
    assert Counter(list_images(flatten(parts))) == expected
    sizes = [sum(len(batch.labels) for batch in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("batch_size", "sizes"), [(24, [24]), (25, [24]), (10, [10, 10, 4]), (1, [1] * 24)])
def test_the_last_evaluation_batch_holds_what_is_left(make_eval, batch_size, sizes):
    loader = make_eval(batch_size=batch_size)
    assert [len(batch.images) for batch in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize(("crops", "views"), [("centre", ()), ("ten", (10,))])
def test_a_rank_without_images_gets_empty_batches_of_the_right_shape(make_eval, crops, views):
    batches = list(make_eval(rank=NUM_VAL, world_size=NUM_VAL + 1, crops=crops, dtype="float16"))
    assert [batch.images.shape for batch in batches] == [(0, *views, 3, 224, 224)]
    assert batches[0].images.dtype == torch.float16
    assert batches[0].labels.shape == (0,) and batches[0].labels.dtype == torch.int64


def test_evaluation_can_be_repeated(make_eval):
    loader = make_eval(batch_size=10)
    first = list_images(loader)
    assert len(first) == NUM_VAL
    assert list_images(loader) == first
    assert list_images(loader) == first


@pytest.mark.parametrize("num_taken", [1, 2, 3])
def test_an_evaluation_left_early_starts_anew(make_eval, num_taken):
    loader = make_eval(batch_size=10)
    whole = list_images(loader)
    assert len(list(itertools.islice(loader, num_taken))) == num_taken
    assert list_images(loader) == whole


def test_the_training_split_can_be_evaluated(make_eval):
    loader = make_eval(split="train", batch_size=20)
    assert (len(loader), len(set(list_images(loader)))) == (4, NUM_TRAIN)


# Training: an epoch over ranks


@pytest.mark.parametrize(
    ("world_size", "global_batch_size", "num_steps"),
    [(1, 8, 8), (2, 8, 8), (3, 6, 10), (7, 7, 9), (2, 10, 6), (1, 64, 1)],
)
def test_ranks_share_an_epoch_of_distinct_samples_in_equal_steps(
    make_train, shards, world_size, global_batch_size, num_steps
):
    loaders = [
        make_train(rank=rank, world_size=world_size, global_batch_size=global_batch_size) for rank in range(world_size)
    ]
    for _ in range(3):
        parts = [read_keys(loader) for loader in loaders]
        for loader, part in zip(loaders, parts, strict=True):
            assert len(loader) == len(part) == num_steps
            assert {len(keys) for keys in part} == {global_batch_size // world_size}
        seen = flatten(flatten(parts))
        assert len(seen) == len(set(seen)) == num_steps * global_batch_size
        assert set(seen) <= set(oracle.read_samples(shards.tars("train")))
    assert {loader.epoch for loader in loaders} == {4}


def test_the_remainder_of_an_epoch_is_dropped_and_is_another_one_each_time(make_train):
    loader = make_train(global_batch_size=10)
    epochs = [set(flatten(read_keys(loader))) for _ in range(4)]
    assert [len(keys) for keys in epochs] == [60] * 4
    assert len(set(map(frozenset, epochs))) == 4
    assert len(set.union(*epochs)) == NUM_TRAIN


def test_ranks_draw_different_crops_flips_and_shifts(make_train):
    loaders = [make_train(rank=rank, world_size=2) for rank in range(2)]
    for _ in zip(*loaders, strict=True):
        one, other = (loader.draws for loader in loaders)
        assert not torch.equal(one.offset, other.offset)
        assert not torch.equal(one.shift, other.shift)
    flips = [[loader.draws.flip.tolist() for _ in loader] for loader in loaders]
    assert flips[0] != flips[1]


def test_order_and_draws_differ_between_epochs_and_between_seeds(make_train):
    loader = make_train()
    epochs = [record(loader), record(loader), record(make_train(seed=6))]
    for one, other in itertools.combinations(epochs, 2):
        for field in range(2, 6):  # offset, flip, shift, keys
            assert [batch[field] for batch in one] != [batch[field] for batch in other]


def test_a_batch_mixes_images_of_several_shards(make_train, shards):
    shard_of = {key: tar.name for tar in shards.tars("train") for key in oracle.read_samples([tar])}
    num_mixed = [len({shard_of[key] for key in keys}) for keys in read_keys(make_train())]
    assert min(num_mixed) >= 2 and max(num_mixed) >= 3


@pytest.mark.parametrize("other", [{}, {"num_threads": 1}], ids=["same arguments", "one thread"])
def test_the_same_seed_gives_the_same_bits(make_train, other):
    one, same = make_train(), make_train(**other)
    for _ in range(2):
        assert record(one) == record(same)


def test_a_batch_that_is_kept_keeps_its_values(make_train, make_eval):
    for loader in (make_train(), make_eval()):
        kept, copies = [], []
        for batch in loader:
            kept.append(batch)
            copies.append((batch.images.clone(), batch.labels.clone()))
        list(loader)
        for batch, (images, labels) in zip(kept, copies, strict=True):
            assert torch.equal(batch.images, images) and torch.equal(batch.labels, labels)


def test_a_training_loop_left_early_goes_on_where_it_was(make_train):
    loader, whole = make_train(), make_train()
    parts = [record(loader, 3), record(loader, 1)]
    assert (loader.epoch, loader.step) == (1, 4)
    assert parts[0] + parts[1] + record(loader) == record(whole)
    assert (loader.epoch, loader.step) == (2, 0)


def test_a_key_is_cut_from_what_dali_says_of_a_sample():
    assert sample_key("/a.b:c/train-000000.tar:1536:000000042.jpg") == "000000042"


# Resuming


def advance(loader, num_batches) -> None:
    """Take batches across epochs; a whole number of epochs ends at the start of the next one."""
    while num_batches >= len(loader):
        num_batches -= len(list(loader))
    for _ in itertools.islice(loader, num_batches):
        pass


@pytest.mark.parametrize(
    ("num_batches", "epoch", "step"),
    [(0, 1, 0), (1, 1, 1), (7, 1, 7), (8, 2, 0), (11, 2, 3), (15, 2, 7), (16, 3, 0), (20, 3, 4)],
)
def test_a_restored_loader_gives_the_same_remaining_batches_and_epochs(make_train, num_batches, epoch, step):
    loader, restored = make_train(), make_train()
    advance(loader, num_batches)
    state = loader.state_dict()
    restored.load_state_dict(state)
    assert (restored.epoch, restored.step) == (epoch, step)
    expected = [record(loader) for _ in range(3)]
    assert [len(batches) for batches in expected] == [8 - step, 8, 8]
    assert [record(restored) for _ in range(3)] == expected


@pytest.mark.parametrize("global_batch_size", [8, 10], ids=["no remainder", "with a remainder"])
def test_a_state_taken_inside_the_loop_at_the_last_batch_resumes_at_the_next_epoch(make_train, global_batch_size):
    loader = make_train(global_batch_size=global_batch_size)
    restored = make_train(global_batch_size=global_batch_size)
    states = [loader.state_dict() for _ in itertools.chain(loader, loader)]
    assert (states[-1]["epoch"], states[-1]["step"]) == (2, len(loader))
    restored.load_state_dict(states[-1])
    assert record(restored) == []  # nothing is left of epoch 2
    for _ in range(2):
        assert record(restored) == record(loader)


def test_taking_states_does_not_change_the_batches(make_train):
    loader, undisturbed = make_train(), make_train()
    keys = []
    for _ in loader:
        loader.state_dict()
        keys.append(loader.draws.keys)
    assert keys == read_keys(undisturbed)


def test_each_rank_resumes_from_its_own_state_with_a_remainder(make_train):
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "global_batch_size": 10}
        loader, restored = make_train(**options), make_train(**options)
        advance(loader, 8)
        restored.load_state_dict(loader.state_dict())
        for _ in range(2):
            assert record(restored) == record(loader)


def test_a_loader_that_has_run_can_be_set_back(make_train):
    loader = make_train()
    advance(loader, 10)
    state = loader.state_dict()
    first = record(loader)
    record(loader)
    loader.load_state_dict(state)
    assert record(loader) == first


def test_a_restored_loader_saves_a_state_that_restores(make_train):
    loader, second, third = make_train(), make_train(), make_train()
    advance(loader, 10)
    second.load_state_dict(loader.state_dict())
    advance(second, 3)
    third.load_state_dict(second.state_dict())
    advance(loader, 3)
    assert record(third) == record(second) == record(loader)


def test_a_state_survives_json_and_a_weights_only_load(make_train):
    loader = make_train()
    advance(loader, 11)
    state = loader.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == state
    restored = make_train()
    restored.load_state_dict(json.loads(json.dumps(state)))
    assert record(restored) == record(loader)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seed", {"seed": 6}),
        ("global batch size", {"global_batch_size": 16}),
        ("world size", {"world_size": 2}),
        ("rank", {"world_size": 2, "rank": 1}),
        ("transform", {"flip": False}),
        ("transform", {"dtype": "float16"}),
        ("draws kept", {"with_draws": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(reversed(value)),
)
def test_a_state_of_another_run_is_refused_by_what_differs(make_train, name, options):
    state = make_train(**({"world_size": 2} if name == "rank" else {})).state_dict()
    other = make_train(**options)
    with pytest.raises(UserError, match=f"^the loader's state was saved with {name} .*, this one has "):
        other.load_state_dict(state)
    assert (other.epoch, other.step, len(list(other))) == (1, 0, len(other))  # and the loader is as it was


def test_a_state_of_other_shards_is_refused(make_train, shards):
    first, *others = shards.manifest.shards
    changed = ShardSet(shards.root, replace(shards.manifest, shards=(replace(first, sha256="0" * 64), *others)))
    with pytest.raises(UserError, match=f"saved with shards {shards.fingerprint}"):
        make_train(shards=changed).load_state_dict(make_train().state_dict())


# What is refused, and what is broken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 0}, "global batch size 0: expected a positive multiple of the 1 ranks"),
        ({"global_batch_size": -8}, "global batch size -8: expected a positive"),
        ({"global_batch_size": 9, "world_size": 2}, "global batch size 9: expected a positive multiple of the 2 ranks"),
        ({"global_batch_size": 65}, "64 training images, fewer than one global batch of 65; set --global-batch-size"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"rank": -1, "world_size": 2}, "rank -1 of 2"),
        ({"world_size": 0}, "rank 0 of 0"),
        ({"device": "tpu"}, "device 'tpu': expected 'cpu' or 'gpu'"),
        ({"mean": "none"}, "mean is 'none', expected one of image, channel"),
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
        ({"rank": 3, "world_size": 3}, "rank 3 of 3"),
        ({"crops": "five"}, "crops 'five': expected 'centre' or 'ten'"),
        ({"device": "tpu"}, "device 'tpu': expected 'cpu' or 'gpu'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_evaluation_arguments_that_do_not_fit_are_refused(make_eval, options, message):
    with pytest.raises(UserError, match=message):
        make_eval(**options)


def test_shards_without_validation_images_are_refused_for_evaluation(make_eval, shards):
    manifest = shards.manifest
    train = tuple(shard for shard in manifest.shards if shard.split == "train")
    without = ShardSet(shards.root, replace(manifest, shards=train, totals={"train": NUM_TRAIN, "val": 0}))
    with pytest.raises(UserError, match="no val images; add a val/ folder"):
        make_eval(shards=without)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is visible")
def test_the_gpu_is_refused_where_there_is_none(make_train, make_eval):
    for make in (make_train, make_eval):
        with pytest.raises(UserError, match="no CUDA GPU is visible; use device 'cpu'"):
            make(device="gpu")


READ_PROGRAM = """
import sys
from pipeline.colorstats import ColorStats
from pipeline.loader import EvalLoader, TrainLoader, read_pixels
from pipeline.shardset import ShardSet
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


def garble_one_image(shards, split) -> None:
    """Overwrite the first JPEG of the split's second shard with zeros, its tar header left alone."""
    line = next(line for line in shards.indices(split)[1].read_text().splitlines()[1:] if "jpg" in line).split()
    offset, size = int(line[1]), int(line[2])
    with shards.tars(split)[1].open("r+b") as file:
        file.seek(offset)
        assert file.read(2) == b"\xff\xd8"  # where a JPEG begins
        file.seek(offset)
        file.write(bytes(size))


def cut_in_half(shards, split) -> None:
    path = shards.tars(split)[1]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "reader"),
    [(garble_one_image, "train"), (garble_one_image, "pixels"), (cut_in_half, "train"), (cut_in_half, "eval")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_shard_damaged_under_the_reader_ends_the_process_with_a_failure(private_shards, damage, reader):
    damage(private_shards, "val" if reader == "eval" else "train")
    make = {
        "train": "TrainLoader(shards, colors, global_batch_size=4, num_threads=2)",
        "eval": "EvalLoader(shards, colors, batch_size=4, num_threads=2)",
        "pixels": "read_pixels(shards, batch_size=4, num_threads=2)",
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
    assert "RuntimeError: Critical error in pipeline" in done.stderr or done.returncode in CRASHES


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible")
@pytest.mark.parametrize("mean", ["image", "channel"])
def test_the_gpu_gives_the_cpus_samples_draws_and_nearly_its_pixels(make_train, make_eval, mean):
    on_cpu, on_gpu = make_train(mean=mean), make_train(mean=mean, device="gpu")
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert other.images.is_cuda and other.labels.is_cuda
        assert on_cpu.draws.keys == on_gpu.draws.keys
        assert all(torch.equal(a, b) for a, b in zip(on_cpu.draws[:3], on_gpu.draws[:3], strict=True))
        assert torch.equal(one.labels, other.labels.cpu())
        assert (one.images - other.images.cpu()).abs().mean() < GPU_TOLERANCE_GREY
    for crops in ("centre", "ten"):
        pairs = zip(make_eval(mean=mean, crops=crops), make_eval(mean=mean, crops=crops, device="gpu"), strict=True)
        for one, other in pairs:
            assert torch.equal(one.labels, other.labels.cpu())
            assert (one.images - other.images.cpu()).abs().mean() < GPU_TOLERANCE_GREY


def test_a_new_loop_over_an_evaluation_loader_sees_everything_while_an_old_one_is_held(ready_shards):
    shards = ShardSet.open(ready_shards)
    loader = EvalLoader(shards, ColorStats.load(shards.root, shards.fingerprint), batch_size=5)
    held = iter(loader)
    next(held)
    assert sum(len(batch.labels) for batch in loader) == 24
    assert held is not None
