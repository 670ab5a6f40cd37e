"""What the tests of preparation share: a tiny tree to shard, and one to break things in."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def small_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 classes, 12 training and 4 validation images of 40 x 30 pixels."""
    root = tmp_path_factory.mktemp("small") / "tree"
    rng = np.random.default_rng(0)
    for split, num_images in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(num_images):
                pixels = rng.integers(0, 256, size=(30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name}_{number}.png")
    return root


@pytest.fixture
def tree(small_tree: Path, tmp_path: Path) -> Path:
    """A copy of `small_tree` to break things in."""
    return shutil.copytree(small_tree, tmp_path / "tree")
