"""How well the order mixes, measured on the worst input there is: shards sorted by class, one class to a shard."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import graph
from pipeline.colors import ColorStats
from pipeline.loader import TrainLoader
from pipeline.manifest import MANIFEST, SCHEMA, index_header
from pipeline.options import LoaderOptions, make_spec
from pipeline.shards import ShardSet
from tests.tools.checks.forging import write_json

NUM_CLASSES, SAMPLES_PER_SHARD, BATCH_SIZE = 20, 16, 16
NUM_SAMPLES = NUM_CLASSES * SAMPLES_PER_SHARD


@pytest.fixture(scope="module")
def sorted_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 grey images in 20 classes: shard k holds class k and nothing else."""
    from webdataset import TarWriter

    out = tmp_path_factory.mktemp("sorted")
    buffer = io.BytesIO()
    Image.new("RGB", (256, 256), (128, 128, 128)).save(buffer, "JPEG")
    shards = []
    for label in range(NUM_CLASSES):
        path, rows = out / f"train-{label:06d}.tar", []
        with TarWriter(str(path), mtime=0, encoder=False) as tar:
            for number in range(SAMPLES_PER_SHARD):
                key, row = f"{label * SAMPLES_PER_SHARD + number:09d}", []
                for ending, content in (("jpg", buffer.getvalue()), ("cls", b"%05d" % label)):
                    row.append(f"{ending} {tar.tarstream.offset + 512} {len(content)} {key}.{ending}")
                    tar.write({"__key__": key, ending: content})
                rows.append(" ".join(row))
        path.with_suffix(".idx").write_text("\n".join([index_header(len(rows)), *rows]) + "\n")
        data = path.read_bytes()
        shards.append(
            {
                "file": path.name,
                "split": "train",
                "samples": SAMPLES_PER_SHARD,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
    classes = [{"index": label, "wnid": f"c{label:02d}", "name": ""} for label in range(NUM_CLASSES)]
    manifest = {
        "schema": SCHEMA,
        "created_by": "a test",
        "layout": "folder",
        "seed": 0,
        "size_px": 256,
        "encoding": "jpeg",
        "quality": 90,
        "samples_per_shard": SAMPLES_PER_SHARD,
        "classes": classes,
        "shards": shards,
        "totals": {"train": NUM_SAMPLES, "val": 0},
        "job": "0" * 64,
    }
    write_json(out / MANIFEST, manifest)
    return out


def read_epochs(path: Path, num_epochs: int) -> list[list[int]]:
    """The samples' positions (in class order) as they come, an epoch a list."""
    shards = ShardSet.open(path)
    pixels = 256 * 256 * NUM_SAMPLES
    products = [[pixels * 128 * 128 + (pixels if i == j else 0) for j in range(3)] for i in range(3)]
    image_sum = np.full((256, 256, 3), 128 * NUM_SAMPLES, np.int64)
    colors = ColorStats.from_sums(NUM_SAMPLES, products, image_sum, shards.fingerprint)
    loader = TrainLoader(shards, colors, options=LoaderOptions(num_threads=1), global_batch_size=BATCH_SIZE)
    return [[key for _ in loader for key in loader.keys.tolist()] for _ in range(num_epochs)]


def count_classes(epoch: list[int]) -> float:
    """Mean number of different classes in a batch."""
    batches = np.array(epoch).reshape(-1, BATCH_SIZE) // SAMPLES_PER_SHARD
    return float(np.mean([len(set(batch)) for batch in batches.tolist()]))


def rank_correlation(one: list[int], other: list[int]) -> float:
    """Spearman's: of the places that the samples have in two orders."""
    return float(np.corrcoef(np.argsort(one), np.argsort(other))[0, 1])


def test_a_buffer_that_holds_an_epoch_mixes_sorted_shards_like_a_fair_draw(sorted_shards):
    epochs = read_epochs(sorted_shards, 3)
    fair = NUM_CLASSES * (1 - (1 - 1 / NUM_CLASSES) ** BATCH_SIZE)  # 11.2 different classes among 16 fair draws
    assert all(abs(count_classes(epoch) - fair) < 1.5 for epoch in epochs)
    # A fair order's correlation with another, or with the order of classes, has a spread of 1 / sqrt(319) = 0.056.
    pairs = [(epochs[0], epochs[1]), (epochs[1], epochs[2]), (epochs[0], list(range(NUM_SAMPLES)))]
    assert all(abs(rank_correlation(one, other)) < 0.28 for one, other in pairs)


def test_a_buffer_of_a_fifth_of_an_epoch_still_mixes_several_shards_and_reorders_them(sorted_shards, monkeypatch):
    monkeypatch.setattr(graph, "MAX_BUFFERED_SAMPLES", 64)
    epochs = read_epochs(sorted_shards, 3)
    assert all(count_classes(epoch) > 4 for epoch in epochs)  # 64 samples are 4 shards; without a buffer it would be 1
    assert all(sorted(epoch) == list(range(NUM_SAMPLES)) for epoch in epochs)
    # Shards come in a new order each epoch: 20 of them, so that a fair order's correlation has a spread of 0.23.
    assert abs(rank_correlation(epochs[0], epochs[1])) < 0.6  # 0.75 if they kept their order
    firsts = [tuple(dict.fromkeys(position // SAMPLES_PER_SHARD for position in epoch)) for epoch in epochs]
    assert len(set(firsts)) == 3


def test_the_buffer_is_bounded_whatever_the_size_of_the_set(sorted_shards, monkeypatch):
    shards = ShardSet.open(sorted_shards)
    spec = make_spec(shards, "train", LoaderOptions(), batch_size=16, device="cpu", world_size=2)
    assert graph.count_buffered(shards, spec) == NUM_SAMPLES // 2
    monkeypatch.setattr(graph, "MAX_BUFFERED_SAMPLES", 64)
    assert graph.count_buffered(shards, spec) == 64
