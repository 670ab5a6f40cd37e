"""A user's own pipeline.py, tools.py and trainer.py in the current folder: no command imports them, nor do the
processes that it starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.every_command import COMMANDS, TRAIN, TWO_RANKS, WITH_RAY, fill
from tests.trainer.running import BIN, environment

OWN = ("pipeline", "tools", "trainer")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: importing one of its modules is seen, and ends the process."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in OWN:
        body = f"import os, sys\nopen({str(tmp_path / 'imported')!r}, 'a').write({name!r})\nos._exit(99)\n"
        (folder / f"{name}.py").write_text(body)
    return folder


def run_beside(words: list[str], folder: Path, **changes: str) -> None:
    """Run to a good end, with what is installed and nothing else on the path."""
    variables = {k: v for k, v in environment().items() if not k.startswith("PYTHON")}
    done = subprocess.run(words, cwd=folder, env={**variables, **changes}, capture_output=True, text=True, timeout=300)
    imported = folder.parent / "imported"
    assert not imported.exists(), f"{imported.read_text()} was imported"
    assert done.returncode == 0, done.stderr


IN_PROCESSES = ["shard", "verify", "doctor"]  # of their own


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[] if name in IN_PROCESSES else pytest.mark.slow) for name in COMMANDS]
)
def test_a_command_imports_nothing_from_the_users_folder(command, places, folder):
    script, *words = fill(COMMANDS[command], places, folder)
    run_beside([str(BIN / script), *words], folder)


@pytest.mark.slow
@WITH_RAY
@pytest.mark.ray
def test_rays_workers_import_nothing_from_the_users_folder(places, folder):
    _, *words = fill(COMMANDS["shard"], places, folder)
    run_beside([str(BIN / "alexnet-prep"), *words, "--engine", "ray"], folder)


@pytest.mark.slow
@WITH_RAY
@pytest.mark.ray
def test_images_are_found_by_rays_workers_under_a_relative_name(places, tmp_path):
    (tmp_path / "images").symlink_to(places["TREE"])
    run_beside([str(BIN / "alexnet-prep"), "shard", "images", "--engine", "ray", "--workers", "1"], tmp_path)


def test_ranks_import_nothing_from_the_users_folder(places, folder, tmp_path):
    program = tmp_path / "ranks.py"
    program.write_text(TWO_RANKS)
    _, *words = fill(TRAIN, places, folder)
    run_beside([sys.executable, str(program), *words], folder)


LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"],
}


@pytest.mark.parametrize("launcher", ["python", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_python_m_trainer_finds_our_packages(launcher, places, folder):
    (folder / "trainer.py").unlink()  # which Python would take
    _, *words = fill(TRAIN, places, folder)
    run_beside([*LAUNCHERS[launcher], "-m", "trainer", *words], folder)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_python_m_trainer_is_ours_beside_a_trainer_of_the_users_where_the_docs_remedy_is_followed(
    launcher, places, folder
):
    _, *words = fill(TRAIN, places, folder)
    run_beside([*LAUNCHERS[launcher], "-m", "trainer", *words], folder, PYTHONSAFEPATH="1")
