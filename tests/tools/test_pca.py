"""`alexnet-prep pca` against NumPy in float64 on the pixels Pillow decodes, to one part in a million."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.colors import ColorStats
from pipeline.common.console import Progress
from pipeline.common.errors import UserError
from pipeline.shards import ShardSet
from tests import oracle
from tools import pca
from tools.sharding.make import make_shards
from tools.sources.source import open_source

RELATIVE_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def pixels(shard_dir):
    return read_pixels(shard_dir)


@pytest.fixture(scope="module")
def stats(shard_dir):
    return compute(shard_dir)


def read_pixels(folder: Path) -> np.ndarray:
    return np.stack([image for image, _ in oracle.read_samples(sorted(folder.glob("train-*.tar"))).values()])


def compute(folder: Path, **options) -> ColorStats:
    progress = Progress("pca", 1, "images")
    return pca.compute(ShardSet.open(folder), progress=progress, **{"device": "cpu", "num_threads": 2, **options})


def sum_with_python_integers(images: np.ndarray) -> list[list[int]]:
    colours = [[int(value) for value in colour] for colour in images.reshape(-1, 3)]
    return [[sum(colour[i] * colour[j] for colour in colours) for j in range(3)] for i in range(3)]


def assert_agrees_with_numpy(stats: ColorStats, pixels: np.ndarray) -> None:
    mean, covariance = oracle.color_moments(pixels)
    np.testing.assert_allclose(stats.mean, mean, rtol=RELATIVE_TOLERANCE)
    np.testing.assert_allclose(stats.covariance, covariance, rtol=RELATIVE_TOLERANCE)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    np.testing.assert_allclose(stats.eigenvalues, eigenvalues[::-1], rtol=RELATIVE_TOLERANCE)
    for vector, expected in zip(stats.eigenvectors.T, eigenvectors.T[::-1], strict=True):
        assert vector[np.abs(vector).argmax()] > 0
        np.testing.assert_allclose(vector, expected * np.sign(expected @ vector), atol=RELATIVE_TOLERANCE)
    assert stats.num_pixels == len(pixels) * 256 * 256


def test_moments_and_eigenbasis_agree_with_numpy(stats, pixels):
    assert len(pixels) == 64
    assert_agrees_with_numpy(stats, pixels)


def test_the_mean_image_is_exact(stats, pixels):
    expected = pixels.sum(axis=0, dtype=np.int64) / len(pixels)
    assert stats.mean_image.dtype == np.float32
    assert np.array_equal(stats.mean_image, expected.astype(np.float32))


@pytest.mark.parametrize("kind", ["random", "all 255", "all 0", "one channel"])
def test_sums_of_products_equal_python_integers(kind):
    images = np.random.default_rng(0).integers(0, 256, size=(3, 16, 8, 3), dtype=np.uint8)
    if kind == "all 255":
        images[:] = 255
    elif kind == "all 0":
        images[:] = 0
    elif kind == "one channel":
        images[..., :2] = 0
    sums = pca.sum_products(torch.from_numpy(images))
    assert sums.dtype == torch.int64
    assert sums.tolist() == sum_with_python_integers(images)


def test_a_whole_batch_of_white_images_is_summed_exactly():
    white = torch.full((1, 256, 256, 3), 255, dtype=torch.uint8).expand(pca.BATCH_SIZE, -1, -1, -1)
    assert pca.sum_products(white).tolist() == [[pca.BATCH_SIZE * 256 * 256 * 255**2] * 3] * 3


def test_results_do_not_depend_on_batches_or_threads(shard_dir, stats, monkeypatch):
    for batch_size, num_threads in ((1, 1), (7, 2)):
        monkeypatch.setattr(pca, "BATCH_SIZE", batch_size)
        other = compute(shard_dir, num_threads=num_threads)
        for name in ("mean", "covariance", "eigenvalues", "eigenvectors", "mean_image"):
            assert getattr(other, name).tobytes() == getattr(stats, name).tobytes(), name


def test_a_shard_set_without_training_images_is_refused(shard_dir, tmp_path):
    shutil.copytree(shard_dir, tmp_path / "shards")
    path = tmp_path / "shards/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"] = [shard for shard in manifest["shards"] if shard["split"] == "val"]
    manifest["totals"]["train"] = 0
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no training images"):
        compute(tmp_path / "shards")


def test_the_command_prints_and_writes_the_same_statistics(shard_dir, stats, tmp_path):
    shutil.copytree(shard_dir, tmp_path / "shards")
    words = [str(Path(sys.executable).with_name("alexnet-prep")), "pca", "--json", "--device", "cpu", "--threads", "2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    saved = ColorStats.load(tmp_path / "shards", ShardSet.open(shard_dir).fingerprint)
    for name in ("mean", "std", "covariance", "eigenvalues", "eigenvectors"):
        assert printed[name] == getattr(saved, name).tolist() == getattr(stats, name).tolist()
    assert printed["num_pixels"] == saved.num_pixels == 64 * 256 * 256
    assert printed["shards_fingerprint"] == saved.shards_fingerprint
    assert np.array_equal(saved.mean_image, stats.mean_image)


def test_400_photographs_agree_with_numpy(real_images, tmp_path):
    make_shards(open_source(real_images / "imagenet-sample"), tmp_path / "shards", num_workers=2)
    assert_agrees_with_numpy(compute(tmp_path / "shards"), read_pixels(tmp_path / "shards"))
