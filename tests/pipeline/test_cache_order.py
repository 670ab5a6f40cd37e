"""The order of reading, foretold: DALI never touches a shard that was not asked for before."""

import io
import math
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from pipeline.common.errors import UserError
from pipeline.manifest import ClassEntry, Manifest, Shard, index_header
from pipeline.readahead import Gate, ShardOrder
from pipeline.shards import ShardSet

SIZES = (3, 8, 5, 4, 9, 2, 7, 6, 4, 8, 5, 3)  # samples of each shard: 64 in all
SAMPLE_BYTES = 3000
SEED = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> ShardSet:
    """Shards whose samples are their number, over and over."""
    root = tmp_path_factory.mktemp("order")
    shards, number = [], 0
    for position, size in enumerate(SIZES):
        tar, rows = root / f"train-{position:06d}.tar", [index_header(size)]
        with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
            for _ in range(size):
                member = tarfile.TarInfo(f"{number:09d}.jpg")
                member.size = SAMPLE_BYTES
                rows.append(f"jpg {archive.offset + 512} {SAMPLE_BYTES} {member.name}")
                archive.addfile(member, io.BytesIO(bytes([1 + number]) * SAMPLE_BYTES))
                number += 1
        tar.with_suffix(".idx").write_text("\n".join(rows) + "\n")
        shards.append(Shard(tar.name, "train", size, tar.stat().st_size, "0" * 64))
    classes = (ClassEntry(0, "n", "one"),)
    totals = {"train": number, "val": 0}
    return ShardSet(root, Manifest(1, "test", "folder", 0, 256, "jpeg", 90, 8, classes, tuple(shards), totals, "job"))


def read(shards: ShardSet, *, batch_size=4, buffer=1, prefetch=2, rank=0, world_size=1):
    """The reader of the training graph, copying what it reads when it reads it: endless batches of sample numbers."""

    @pipeline_def(
        batch_size=batch_size, num_threads=1, device_id=None, prefetch_queue_depth=prefetch, exec_dynamic=True,
        enable_checkpointing=True,
    )  # fmt: skip
    def define():
        return fn.readers.webdataset(
            name="reader",
            paths=[str(path) for path in shards.tars("train")],
            index_paths=[str(path) for path in shards.indices("train")],
            ext=["jpg"],
            random_shuffle=True,
            initial_fill=buffer,
            shuffle_after_epoch=True,
            shuffle_after_epoch_seed=SEED,
            seed=5,
            shard_id=rank,
            num_shards=world_size,
            pad_last_batch=True,
            tensor_init_bytes=SAMPLE_BYTES,
            dont_use_mmap=True,
        )

    iterator = DALIGenericIterator(
        define(), ["data"], reader_name="reader", last_batch_policy=LastBatchPolicy.FILL, prepare_first_batch=False
    )
    while True:
        for outputs in iterator:
            rows = outputs[0]["data"]
            assert (rows == rows[:, :1]).all()
            yield [int(value) for value in rows[:, 0]]
        iterator.reset()


def shard_of(number: int) -> int:
    return next(position for position in range(len(SIZES)) if number <= sum(SIZES[: position + 1]))


def part_size(rank: int, world_size: int) -> int:
    total = sum(SIZES)
    return total * (rank + 1) // world_size - total * rank // world_size


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2), (2, 5)])
def test_the_order_and_the_parts_are_those_of_dali(folder, rank, world_size):
    gate = Gate(folder, ShardOrder(len(SIZES), SEED), batch_size=1, buffer=1, rank=rank, world_size=world_size)
    numbers = (number for batch in read(folder, batch_size=1, rank=rank, world_size=world_size) for number in batch)
    steps = math.ceil(sum(SIZES) / world_size)  # DALI pads the parts to the longest
    for epoch in range(1, 6):
        seen = [next(numbers) for _ in range(steps)][: part_size(rank, world_size)]
        names, ends = gate._part(epoch)
        positions = [int(name[6:12]) for name in names]
        assert [shard_of(number) for number in seen] == [
            position
            for position, start, end in zip(positions, [0, *ends], ends, strict=False)
            for _ in range(start, end)
        ]


@pytest.mark.parametrize("num_shards", [1, 2, 300])
def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone(num_shards):
    order = ShardOrder(num_shards, SEED)
    late = ShardOrder(num_shards, SEED)(3)
    assert late == order(3) and order(1) == order(1)
    for epoch in (1, 2, 3):
        assert sorted(order(epoch)) == list(range(num_shards))
    if num_shards == 300:
        assert order(1) != order(2) and order(1) != ShardOrder(num_shards, SEED + 1)(1)


class FillOnDemand:
    """A fetcher by which a shard's bytes are there from the moment they are asked for, and not before."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.there: set[str] = set()
        self.preferred: list[str] = []

    def prefer(self, names) -> None:
        self.preferred = list(dict.fromkeys(names))

    def wait(self, names) -> None:
        for name in set(names) - self.there:
            with (self.target / name).open("r+b") as file:
                file.write((self.source / name).read_bytes())
            self.there.add(name)


@pytest.fixture
def empty(folder, tmp_path) -> ShardSet:
    """The same shards with zeros for tars, and a fetcher that fills them when asked."""
    for index in folder.indices("train"):
        (tmp_path / index.name).write_bytes(index.read_bytes())
    for shard in folder.shards("train"):
        (tmp_path / shard.file).write_bytes(bytes(shard.bytes))
    return ShardSet(tmp_path, folder.manifest, SimpleNamespace(fetcher=FillOnDemand(folder.root, tmp_path)))


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
@pytest.mark.parametrize(("batch_size", "buffer", "prefetch"), [(1, 1, 2), (1, 5, 1), (2, 3, 2), (4, 1, 3), (3, 9, 2)])
def test_dali_reads_no_byte_before_the_gate_opened_for_it(empty, batch_size, buffer, prefetch, rank, world_size):
    sizes = {"batch_size": batch_size, "buffer": buffer, "rank": rank, "world_size": world_size}
    gate = Gate(empty, ShardOrder(len(SIZES), SEED), prefetch_batches=prefetch, **sizes)
    batches = read(empty, prefetch=prefetch, **sizes)
    steps = sum(SIZES) // (batch_size * world_size)
    left_over = math.ceil(math.ceil(sum(SIZES) / world_size) / batch_size) - steps  # read to the epoch's end, ungated
    for epoch in (1, 2, 3):
        seen = []
        for step in range(steps + left_over):
            if step < steps:
                gate.wait(epoch, step)
            seen += next(batches)
        assert 0 not in seen  # what was read too early is zeros
        assert len(set(seen)) == part_size(rank, world_size)
    if batch_size == 1 and world_size == 1:  # and it did not take everything at once to be sure of that
        other = Gate(empty, ShardOrder(len(SIZES), SEED), prefetch_batches=prefetch, **sizes)
        empty.remote.fetcher.there.clear()
        other.wait(1, 0)
        assert len(empty.remote.fetcher.there) <= 4


def test_without_the_gate_the_reader_does_see_bytes_that_are_not_there(empty):
    assert 0 in next(read(empty))


def test_an_epochs_end_asks_for_the_beginning_of_the_next(empty):
    order = ShardOrder(len(SIZES), SEED)
    gate = Gate(empty, order, batch_size=1, buffer=1, prefetch_batches=0, rank=0, world_size=2)
    gate.wait(1, part_size(0, 2) - 1)
    first, second = (gate._part(epoch)[0] for epoch in (1, 2))
    assert empty.remote.fetcher.there >= {*first, second[0]}
    assert empty.remote.fetcher.there < {*first, *second}


def test_fetching_follows_the_epoch_then_validation_then_the_epochs_to_come(empty):
    manifest = empty.manifest
    val = Shard("val-000000.tar", "val", 1, 10, "0" * 64)
    shards = ShardSet(
        empty.root,
        Manifest(**{**vars(manifest), "shards": (val, *manifest.shards), "totals": {"train": sum(SIZES), "val": 1}}),
        empty.remote,
    )
    gate = Gate(shards, ShardOrder(len(SIZES), SEED), batch_size=1, buffer=1, rank=1, world_size=4)
    gate.wait(1, 3)
    preferred, first = empty.remote.fetcher.preferred, gate._part(1)[0]
    assert preferred[: len(first) + 1] == [*first, val.file]
    assert sorted(preferred) == sorted([val.file, *(shard.file for shard in manifest.shards)])
    gate.wait(5, 3)
    assert empty.remote.fetcher.preferred[: len(gate._part(5)[0])] == gate._part(5)[0]


def test_a_local_shard_that_went_missing_is_named_when_an_epoch_begins(folder, tmp_path):
    for path in folder.root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shards = ShardSet(tmp_path, folder.manifest)
    gate = Gate(shards, ShardOrder(len(SIZES), SEED), batch_size=1, buffer=1)
    gate.wait(1, 0)
    tar = shards.tars("train")[3]
    tar.write_bytes(tar.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{tar}: 100 bytes, expected \d+ \(truncated or replaced\)"):
        gate.wait(2, 0)
    tar.unlink()
    with pytest.raises(UserError, match=rf"{tar}: missing, expected \d+ bytes"):
        gate.wait(3, 0)
