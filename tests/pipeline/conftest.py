"""What the tests of the pipeline share: the mini-set as JPEG and raw shards and behind a URL; loaders on it."""

import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from pipeline import download
from pipeline.colors import ColorStats
from pipeline.download import CHECKED
from pipeline.loader import EvalLoader, TrainLoader
from pipeline.manifest import IMAGE_SIZE_PX
from pipeline.options import LoaderOptions, Transform
from pipeline.shards import ShardSet
from tests.pipeline.downloading import RANGE_BYTES
from tests.pipeline.loader.loading import make_raw


@pytest.fixture(scope="module")
def shards(ready_shards: Path) -> ShardSet:
    return ShardSet.open(ready_shards)


@pytest.fixture(scope="module")
def colors(shards: ShardSet) -> ColorStats:
    return ColorStats.load(shards.root, shards.fingerprint)


@pytest.fixture(scope="session")
def raw_dir(ready_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ready_shards` with the pixels that Pillow decodes in place of the JPEGs."""
    return make_raw(ready_shards, tmp_path_factory.mktemp("raw") / "shards")


@pytest.fixture(scope="module")
def raw_shards(raw_dir: Path) -> ShardSet:
    return ShardSet.open(raw_dir)


@pytest.fixture
def private_shards(shards: ShardSet, tmp_path: Path) -> ShardSet:
    ignored = shutil.ignore_patterns(CHECKED)  # what DALI's operators leave is of other files
    return ShardSet.open(shutil.copytree(shards.root, tmp_path / "shards", ignore=ignored))


def split_options(given: dict) -> tuple[Transform, LoaderOptions, dict]:
    """Keywords sorted by whose they are: the transform's, the options', the loader's own."""
    names = [{field.name for field in fields(kind)} for kind in (Transform, LoaderOptions)]
    of_transform, of_options = ({name: given[name] for name in given if name in known} for known in names)
    own = {name: value for name, value in given.items() if name not in set.union(*names)}
    return Transform(**of_transform), LoaderOptions(**of_options), own


@pytest.fixture
def make_train(shards: ShardSet, colors: ColorStats):
    def make(**given) -> TrainLoader:
        given = {"global_batch_size": 8, "seed": 5, "num_threads": 2, "mean": "channel", **given}
        transform, options, own = split_options(given)
        return TrainLoader(own.pop("shards", shards), colors, transform, options, **own)

    return make


@pytest.fixture
def make_eval(shards: ShardSet, colors: ColorStats):
    def make(**given) -> EvalLoader:
        given = {"batch_size": 3, "num_threads": 2, "mean": "channel", **given}
        transform, options, own = split_options(given)
        return EvalLoader(own.pop("shards", shards), colors, transform, options, **own)

    return make


@pytest.fixture
def without_pauses(monkeypatch):
    """Downloads that do not wait, in small ranges."""
    monkeypatch.setattr(download, "BACKOFF_S", (0.0, 0.0))
    monkeypatch.setattr(download, "OPENING_BACKOFF_S", (0.0, 0.0))
    monkeypatch.setattr(download, "POLL_S", 0.01)
    monkeypatch.setattr(download, "RANGE_BYTES", RANGE_BYTES)


@pytest.fixture(scope="module")
def whole_set(shard_dir, tmp_path_factory) -> Path:
    """Shards with colour statistics, made up: this is about their transport."""
    out = shutil.copytree(shard_dir, tmp_path_factory.mktemp("whole") / "set")
    products = [[70_000 + 1000 * (i == j) for j in range(3)] for i in range(3)]
    image_sum = np.full((IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), 100, np.int64)
    ColorStats.from_sums(1, products, image_sum, ShardSet.open(out).fingerprint).save(out)
    return out


@pytest.fixture
def url(whole_set, s3_bucket) -> str:
    return s3_bucket.upload(whole_set, "set")


@pytest.fixture
def open_shards(tmp_path):
    """Opens a URL with a cache of the test's own."""
    return lambda url, **options: ShardSet.open(url, cache_dir=tmp_path / "cache", **options)
