"""What the tests of `alexnet-prep verify` share: a small finished folder, a copy of it to damage, and ways to look.

Shards of 4 images: for training four, with 4, 4, 4 and 2 planned images, for validation one. One image is broken and
one had to be repaired.
"""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.colors import ColorStats
from pipeline.shards import ShardSet
from tools.checks import verify as verify_module
from tools.checks.verify import Report, verify
from tools.sharding.make import make_shards
from tools.sources.source import open_source

TAR, SHARD = "train-000001.tar", "train-000001"
NUM_TRAIN, NUM_VAL = 14, 4
BROKEN = b"this is no image"


def encode(size: tuple[int, int], mode: str, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """2 classes, 14 training images of which one is broken and one lacks its end, 4 validation images."""
    root = tmp_path_factory.mktemp("verify") / "tree"
    rng = np.random.default_rng(0)
    for split, num_images in (("train", NUM_TRAIN // 2), ("val", NUM_VAL // 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(num_images):
                pixels = rng.integers(0, 256, size=(3, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name}_{split}_{number}.png")
    (root / "train/dog/dog_train_2.png").write_bytes(BROKEN)
    (root / "train/cat/cat_train_1.png").write_bytes(encode((40, 30), "RGB")[:-2])
    return root


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory) -> Path:
    """Shards of 4 images: four for training, with 4, 4, 4 and 2 planned images, and one for validation."""
    out = tmp_path_factory.mktemp("verify") / "shards"
    shard(tree, out)
    image = np.arange(256 * 256 * 3, dtype=np.int64).reshape(256, 256, 3) % 251
    flat = image.reshape(-1, 3)
    stats = ColorStats.from_sums(1, (flat.T @ flat).tolist(), image, ShardSet.open(out).fingerprint)
    ColorStats(**{**vars(stats), "num_pixels": (NUM_TRAIN - 1) * 256 * 256}).save(out)
    return out


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of `finished` to damage."""
    return shutil.copytree(finished, tmp_path / "shards")


@pytest.fixture(autouse=True)
def in_this_process(request, monkeypatch):
    """Most tests check many folders of little: worker processes would be most of the time."""

    def run_here(function, units, *, on_result, on_progress, **_options):
        for unit in units:
            on_result(function(unit, on_progress))

    if "in_workers" not in request.fixturenames:
        monkeypatch.setattr(verify_module, "run_units", run_here)


def shard(tree: Path, out: Path, **options) -> None:
    make_shards(open_source(tree), out, **{"samples_per_shard": 4, "num_workers": 1, "max_failures": "9", **options})


def check(folder: Path, **options) -> Report:
    return verify(folder, **{"num_workers": 1, **options})


def find(report: Report, file: str, words: str) -> list:
    return [problem for problem in report.problems if problem.file == file and words in problem.what]


def flip(path: Path, position: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)
