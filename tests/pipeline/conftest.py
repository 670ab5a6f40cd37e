"""What the tests of loaders share: the mini-set as JPEG and as raw shards, and loaders on it with short batches."""

import shutil
from pathlib import Path

import pytest

from pipeline.colors import ColorStats
from pipeline.loader import EvalLoader, TrainLoader
from pipeline.shards import ShardSet
from tests.pipeline.loading import make_raw


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
    return ShardSet.open(shutil.copytree(shards.root, tmp_path / "shards"))


@pytest.fixture
def make_train(shards: ShardSet, colors: ColorStats):
    def make(**options) -> TrainLoader:
        given = {"global_batch_size": 8, "seed": 5, "num_threads": 2, "with_draws": True, "mean": "channel", **options}
        return TrainLoader(given.pop("shards", shards), colors, **given)

    return make


@pytest.fixture
def make_eval(shards: ShardSet, colors: ColorStats):
    def make(**options) -> EvalLoader:
        given = {"batch_size": 3, "num_threads": 2, "mean": "channel", **options}
        return EvalLoader(given.pop("shards", shards), colors, **given)

    return make
