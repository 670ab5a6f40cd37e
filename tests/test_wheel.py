"""The wheel: what is in it, and whether its commands work where nothing of the checkout is."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("pipeline", "trainer", "tools")
LEFT_OUT = {"tools/demo.sh"}  # of the checkout's Makefile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the files that git would have: the build leaves its traces there, not here."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if name.startswith(PACKAGES) or name in ("pyproject.toml", "README.md", "LICENSE"):
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(folder / "source")],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a fresh environment that has the wheel, and borrows its dependencies from this one."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")  # their own .pth files are not followed
    install = ["install", "--no-deps", "--no-index", "--ignore-installed", "--quiet", str(wheel)]
    python = ["--python", str(folder / "bin" / "python")]
    subprocess.run([sys.executable, "-m", "pip", *python, *install], check=True, timeout=300)
    return folder / "bin"


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {
        "pipeline/operators/plugin.cc",
        "pipeline/operators/decode.c",
        "pipeline/operators/finish.c",
        "pipeline/operators/cuda/cuda_runtime_api.h",
        "trainer/kernels/native.c",
        "pipeline/images/ilsvrc2012.txt",
    } <= wanted
    assert wanted - inside == LEFT_OUT
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in inside)


def test_the_wheel_names_its_version_licence_and_dependencies(wheel):
    name = f"alexnet_dali-{PROJECT['version']}"
    assert wheel.name == f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{name}.dist-info/METADATA").decode()
        assert f"{name}.dist-info/licenses/LICENSE" in archive.namelist()
    assert "License-Expression: Apache-2.0" in metadata
    assert all(f"Provides-Extra: {extra}" in metadata for extra in PROJECT["optional-dependencies"])
    assert "# alexnet-dali" in metadata


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_each_command_of_an_installed_wheel_answers(installed, script, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for flag, sign in (("--version", f"{script}, version {PROJECT['version']}"), ("--help", f"Usage: {script}")):
        done = subprocess.run(
            [str(installed / script), flag], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "") and sign in done.stdout


def test_an_installed_wheel_compiles_its_own_operators(installed, tmp_path):
    from pipeline.operators import load_operators

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = "import pipeline.operators as found; print(found.__file__, found.load_operators())"
    done = subprocess.run(
        [str(installed / "python"), "-c", program],
        cwd=tmp_path, env={**environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}, check=True, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    place, is_loaded = done.stdout.split()
    assert place.startswith(str(installed.parent)) and is_loaded == str(load_operators())
    assert len(list((tmp_path / "cache").rglob("*.so"))) == load_operators(), done.stderr


def test_an_installed_wheel_makes_shards_by_its_own_files(installed, tmp_path):
    prep = [str(installed / "alexnet-prep")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for words in (
        ["synth", "images", "--classes", "2", "--train", "8", "--val", "4"],
        ["shard", "images", "--workers", "1"],
        ["pca"],
        ["verify"],
    ):
        subprocess.run([*prep, *words], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    where = subprocess.run(
        [str(installed / "python"), "-c", "import pipeline.images.imagenet as found; print(found.__file__)"],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert where.stdout.startswith(str(installed.parent))
    assert (tmp_path / "shards" / "color.json").is_file()
