"""What the tests of training share: a run that nothing disturbed."""

from pathlib import Path

import pytest

from tests.trainer.commands import NARROW, run


@pytest.fixture(scope="session")
def finished(ready_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three epochs that nothing disturbed; read-only."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run("alexnet-train", "--shards", ready_shards, *NARROW, cwd=folder)
    return folder / "runs" / "demo"
