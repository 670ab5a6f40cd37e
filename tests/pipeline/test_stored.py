"""Pixels from raw shards and from memory: found by key, read exactly, decoded once, counted before they are taken."""

import numpy as np
import pytest
import torch
from pipeline.stored import ROW_BYTES, SAMPLE_BYTES, MemoryPixels, SampleTable, available_bytes, choose_memory

from pipeline import stored
from pipeline.common.errors import UserError
from pipeline.shards import ShardSet
from tests import oracle
from tests.pipeline.loading import make_raw, read_keys

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples(raw_shards, shards):
    return {split: oracle.read_samples(shards.tars(split)) for split in ("train", "val")}


@pytest.fixture
def private_raw(shards, tmp_path):
    return ShardSet.open(make_raw(shards.root, tmp_path / "raw"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_sample_is_found_by_its_key_and_read_to_the_byte(shards, raw_shards, samples, split):
    jpeg, raw = SampleTable(shards, split), SampleTable(raw_shards, split)
    assert len(jpeg) == len(raw) == len(samples[split])
    keys = list(samples[split])
    positions = raw.find(np.array([int(key) for key in keys]))
    assert sorted(positions) == list(range(len(keys))) and positions == jpeg.find(np.array([int(key) for key in keys]))
    for key, position in zip(keys, positions, strict=True):
        pixels = samples[split][key][0]
        assert raw.read(position).tobytes() == pixels.tobytes()
        assert jpeg.read(position)[:2].tobytes() == b"\xff\xd8"  # where a JPEG begins


def test_only_the_rows_asked_for_are_read(raw_shards, samples):
    table = SampleTable(raw_shards, "train")
    key, (pixels, _) = next(iter(samples["train"].items()))
    (position,) = table.find(np.array([int(key)]))
    rows = np.zeros((30, 256, 3), np.uint8)
    table.read_into(position, rows.reshape(-1), 20 * ROW_BYTES)
    assert np.array_equal(rows, pixels[20:50])


def test_a_key_that_no_index_has_is_named(private_raw):
    with pytest.raises(UserError, match="sample 987654321 is in no index"):
        SampleTable(private_raw, "train").find(np.array([0, 987654321]))
    path = private_raw.indices("train")[0]
    row = path.read_text().splitlines()[1]
    key = row.split()[3][:9]
    path.write_text(path.read_text().replace(key, "987654321"))
    with pytest.raises(UserError, match=f"sample {key} is in no index"):
        SampleTable(private_raw, "train").find(np.array([987654321, int(key)]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("rgb 512 196607 000000001.rgb cls 197632 5 000000001.cls", "000000001 has 196607 bytes, expected 196608"),
        ("png 512 196608 000000001.png cls 197632 5 000000001.cls", "has the row 'png 512 .*, expected 'rgb OFFSET"),
        ("rgb x 196608 000000001.rgb cls 197632 5 000000001.cls", "has the row 'rgb x 196608"),
        ("rgb", "has the row 'rgb', expected 'rgb OFFSET BYTES KEY.rgb cls OFFSET 5 KEY.cls'"),
        (None, "15 rows, expected 16"),
    ],
)
def test_a_damaged_index_is_refused_by_name(private_raw, row, message):
    path = private_raw.indices("train")[0]
    lines = path.read_text().splitlines()
    lines[1:2] = [] if row is None else [row]
    path.write_text("\n".join([*lines, ""]))
    with pytest.raises(UserError, match=message) as caught:
        SampleTable(private_raw, "train")
    assert path.stem in str(caught.value)


def test_a_raw_shard_that_ends_early_or_is_gone_is_named(private_raw):
    table = SampleTable(private_raw, "train")
    tar = private_raw.tars("train")[0]
    first = int(next(word for word in private_raw.indices("train")[0].read_text().split() if len(word) == 13)[:9])
    with tar.open("r+b") as file:
        file.truncate(1000)
    (position,) = table.find(np.array([first]))
    with pytest.raises(UserError, match=rf"{tar.name}: sample {first:09d} cannot be read .the file ends there"):
        table.read(position)
    tar.unlink()
    with pytest.raises(UserError, match=rf"{tar.name}: cannot be opened"):
        SampleTable(private_raw, "train").read(position)


# The cache


def test_from_the_second_epoch_on_nothing_is_read_or_decoded(make_train, monkeypatch):
    loader = make_train(cache="raw")
    num_read = []
    read = SampleTable.read
    monkeypatch.setattr(SampleTable, "read", lambda self, position: num_read.append(position) or read(self, position))
    read_keys(loader)
    assert sorted(num_read) == list(range(64))
    read_keys(loader)
    assert len(num_read) == 64


def test_a_cache_holds_the_stored_images(make_train, samples):
    loader = make_train(cache="raw", global_batch_size=16)
    read_keys(loader)
    memory = loader._assemble.memory
    assert memory.num_missing == 0 and memory.pixels.shape == (64, 256, 256, 3)
    for key, image in zip(sorted(samples["train"]), memory.pixels, strict=True):
        assert np.array_equal(image.numpy(), samples["train"][key][0])


def test_a_cache_knows_what_it_has():
    memory = MemoryPixels(4, CPU)
    memory.pixels[2] = 1
    memory.mark([2])
    assert [memory.has(position) for position in range(4)] == [False, False, True, False]
    assert memory.num_missing == 3 and memory.array[2].min() == 1


def test_the_memory_needed_is_said_before_it_is_taken(make_train, capsys):
    make_train(cache="raw")
    assert "cache: 64 images take 0.0 GiB of the host's" in capsys.readouterr().err
    said: list[str] = []
    assert choose_memory(1000, CPU, 1, said.append) == CPU
    assert said[0].startswith("cache: 1,000 images take 0.2 GiB of the host's ")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_cache_that_does_not_fit_is_refused_with_the_numbers(make_train, monkeypatch, num_ranks):
    needed = 64 * SAMPLE_BYTES
    enough = stored.HOST_RESERVE_BYTES + num_ranks * needed
    monkeypatch.setattr(stored, "available_bytes", lambda: enough)
    options = {"cache": "raw", "world_size": num_ranks, "num_local_ranks": num_ranks}
    make_train(**options)
    monkeypatch.setattr(stored, "available_bytes", lambda: enough - 1)
    with pytest.raises(UserError, match=r"64 images need 0.0 GiB of memory.*the host has 2.0 GiB available and must "):
        make_train(**options)


def test_available_memory_is_what_the_kernel_says(tmp_path):
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       24000000 kB\nMemAvailable:   12345678 kB\n")
    assert available_bytes(path) == 12345678 * 1024
    path.write_text("MemTotal:       24000000 kB\n")
    with pytest.raises(UserError, match="no MemAvailable"):
        available_bytes(path)


class FakeGpu:
    """What torch.cuda.mem_get_info says of a GPU that is not there."""

    def __init__(self, monkeypatch, free: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))


def test_a_cache_goes_to_the_gpu_where_it_fits_there_and_else_to_the_host(monkeypatch):
    gpu, needed = torch.device("cuda", 0), 1000 * SAMPLE_BYTES
    FakeGpu(monkeypatch, needed + stored.GPU_RESERVE_BYTES)
    assert choose_memory(1000, gpu, 1, lambda _: None) == gpu
    FakeGpu(monkeypatch, needed + stored.GPU_RESERVE_BYTES - 1)
    assert choose_memory(1000, gpu, 1, lambda _: None) == CPU
    monkeypatch.setattr(stored, "available_bytes", lambda: 0)
    with pytest.raises(UserError, match=r"the GPU has 12.2 GiB free and must keep 12.0 GiB; leave out --cache raw"):
        choose_memory(1000, gpu, 1, lambda _: None)
