"""What the tests of training share: a run that nothing disturbed, and small disks."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.trainer.running import NARROW, run


@pytest.fixture(scope="session")
def finished(ready_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three epochs that nothing disturbed; read-only."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run("alexnet-train", "--shards", ready_shards, *NARROW, cwd=folder)
    return folder / "runs" / "demo"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many MiB."""
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "disk"

    def make(size_mib: int) -> Path:
        folder.mkdir()
        words = [mount, "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
        if subprocess.run(words, capture_output=True).returncode:
            folder.rmdir()
            pytest.skip("this root may not mount a tmpfs")
        return folder

    yield make
    if folder.is_dir():
        subprocess.run(["umount", str(folder)], check=True)
