"""What tests share: a small synthetic tree, its shards, and the folder of real images where there is one.

Session-scoped and read-only: a test that changes files copies them first.
"""

import ctypes
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.every_command import places  # noqa: F401 - a fixture
from tests.s3_server import s3_bucket, s3_client, s3_endpoint  # noqa: F401 - fixtures
from tools.sharding.make import make_shards
from tools.sources.source import open_source
from tools.synth import make_tree

SAMPLES_PER_SHARD = 16


@pytest.fixture(autouse=True)
def no_safe_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that a test runs in this process keeps the folder it is in off the path of those it starts: that is for
    its own processes, not for those of later tests."""
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # so that it is put back afterwards
    monkeypatch.delenv("PYTHONSAFEPATH")


@pytest.fixture(autouse=True)
def give_memory_back() -> Iterator[None]:
    """What is freed stays with a process (trainer/kernels/native.py asks for that): one that runs thousands of tests
    grew to 5 GiB."""
    yield
    resident_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident_bytes > 1 << 30:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def synth_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 classes, 64 training and 24 validation images, odd files of every kind among them."""
    root = tmp_path_factory.mktemp("synth") / "tree"
    make_tree(root, num_classes=4, num_train=64, num_val=24, seed=0)
    return root


@pytest.fixture(scope="session")
def shard_dir(synth_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of `synth_tree`: 4 for training, 2 for validation, without colour statistics."""
    out = tmp_path_factory.mktemp("shards") / "shards"
    make_shards(open_source(synth_tree), out, samples_per_shard=SAMPLES_PER_SHARD, num_workers=2)
    return out


@pytest.fixture(scope="session")
def ready_shards(shard_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `shard_dir` with its colour statistics: what training and evaluation read."""
    from pipeline.common.console import Progress  # here: the modules below take seconds to import
    from pipeline.shards import ShardSet
    from tools.pca import compute

    out = tmp_path_factory.mktemp("ready") / "shards"
    shutil.copytree(shard_dir, out)
    shards = ShardSet.open(out)
    progress = Progress("pca", shards.num_samples("train"), "images")
    compute(shards, device="cpu", num_threads=2, progress=progress).save(out)
    return out


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The folder named by ALEXNET_TEST_IMAGES; the test is skipped without it."""
    folder = os.environ.get("ALEXNET_TEST_IMAGES")
    if not folder:
        pytest.skip("ALEXNET_TEST_IMAGES is not set: no real images")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"ALEXNET_TEST_IMAGES={folder} is not a folder")
    return path
