"""What `make` installs for which target, and what `make demo` does to a folder that it finds: with stubs in the places
of pip and of the commands; one test has pip itself install from a folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.docs.documents import PROJECT, ROOT, read_blocks, split_commands

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
COPIED = ("Makefile", "pyproject.toml", "constraints.txt", "tools/demo.sh")
# A Python that makes a .venv whose Python notes what it is to do, and whose commands note what they are told to.
PYTHON = """#!{python}
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
here = Path({here!r})
def note(words):
    with (here / "log").open("a") as log:
        log.write(json.dumps(words) + "\\n")
if words[:2] == ["-m", "venv"]:
    folder = Path(words[2]) / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ["python", *{scripts!r}]:
        (folder / name).write_bytes(Path(__file__).read_bytes())
        (folder / name).chmod(0o755)
elif Path(__file__).name in {scripts!r}:
    note([Path(__file__).name, *words])
    made = dict(synth="images/train/a", shard="shards/manifest.json", pca="shards/color.json")
    path = Path(made.get(words[0], "runs/demo/checkpoints/last.pt"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
elif words[:1] != ["-c"]:
    note(words)
    if "--index-url" in words and os.environ.get("REAL_PIP"):
        os.execv({python!r}, [{python!r}, *words, "--target", str(here / "site")])
    sys.exit("--index-url" in words and "unreachable" in " ".join(words))
"""


class Clone:
    """A folder with the project's Makefile, in which nothing is installed for real."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
        self._python = folder / "python3"
        self._python.write_text(
            PYTHON.format(python=sys.executable, here=str(folder), scripts=list(PROJECT["scripts"]))
        )
        self._python.chmod(0o755)

    def make(self, *words: str, status: int = 0, **variables: str) -> str:
        """What `make` prints."""
        environment = {k: v for k, v in os.environ.items() if k not in ("TORCH", "MAKEFLAGS", "MAKELEVEL")}
        done = subprocess.run(
            ["make", f"PYTHON={self._python}", *words],
            cwd=self.folder,
            env={**environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def take_log(self) -> list[list[str]]:
        """What was to be done since the last time."""
        log = self.folder / "log"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def take_installed(self) -> list[str]:
        """What pip was to install since the last time."""
        return [words[-1] for words in self.take_log() if words[:3] == ["-m", "pip", "install"]]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_the_demo_installs_what_it_runs_and_the_tests_the_rest_each_once(clone):
    clone.make("demo", "TORCH=cuda")
    assert clone.take_installed() == ["."]
    clone.make("demo", "TORCH=cuda")
    assert clone.take_installed() == []
    clone.make("test", "TORCH=cuda")
    assert clone.take_installed() == [".[dev]"]
    clone.make("test", "demo", "TORCH=cuda")
    assert clone.take_installed() == []


@pytest.mark.parametrize("target", ["setup", "test", "docs", "wheel"])
def test_other_targets_install_everything(clone, target):
    clone.make(target, "TORCH=cuda")
    assert clone.take_installed() == [".", ".[dev]"]


def test_everything_is_installed_anew_when_the_requirements_change(clone):
    clone.make("setup", "TORCH=cuda")
    clone.take_log()
    now = (clone.folder / ".venv" / ".development").stat().st_mtime
    os.utime(clone.folder / "constraints.txt", (now + 9, now + 9))
    clone.make("setup", "TORCH=cuda")
    assert clone.take_installed() == [".", ".[dev]"]


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


@pytest.mark.skipif(has_driver(), reason="an NVIDIA driver is here")
def test_without_a_driver_pytorch_comes_for_the_cpu_and_with_one_or_on_request_as_pip_finds_it(clone, tmp_path):
    said = clone.make(".venv/.runtime")
    torch, project = (words for words in clone.take_log() if words[:3] == ["-m", "pip", "install"])
    assert torch[-1] == "torch" and "--no-deps" in torch and project[-1] == "."
    assert torch[torch.index("--index-url") + 1] == "https://download.pytorch.org/whl/cpu"
    assert torch[torch.index("--constraint") + 1] == "constraints.txt"
    assert "no PyTorch for the CPU found" not in said

    shutil.rmtree(clone.folder / ".venv")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    clone.make(".venv/.runtime", PATH=path)
    assert clone.take_installed() == ["."]

    shutil.rmtree(clone.folder / ".venv")
    clone.make(".venv/.runtime", "TORCH=cpu", PATH=path)
    assert clone.take_installed() == ["torch", "."]


def test_an_index_that_cannot_be_reached_costs_one_line(clone):
    reached = clone.make(".venv/.runtime", "TORCH=cpu", "TORCH_CPU_INDEX=http://reachable").splitlines()
    shutil.rmtree(clone.folder / ".venv")
    lines = clone.make(".venv/.runtime", "TORCH=cpu", "TORCH_CPU_INDEX=http://unreachable").splitlines()
    assert clone.take_installed() == ["torch", "."] * 2
    assert len(lines) == len(reached) + 1
    assert "no PyTorch for the CPU found there: pip's usual one, which may bring CUDA's libraries" in lines


def test_another_torch_than_the_two_is_refused_before_anything_is_installed(clone):
    said = clone.make("demo", "TORCH=gpu", status=2)
    assert "error: TORCH=gpu: expected cpu or cuda" in said and clone.take_log() == []


@pytest.mark.parametrize("is_there", [True, False], ids=["an index", "nothing"])
def test_pip_takes_the_cpus_pytorch_from_a_folder_that_is_an_index(clone, tmp_path, is_there):
    pytest.importorskip("pip", reason="pip is not installed")
    index = tmp_path / "whl" / "torch"
    index.mkdir(parents=True)
    (version,) = re.findall(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    name = f"torch-{version}+cpu-py3-none-any.whl"
    with zipfile.ZipFile(index / name, "w") as wheel:
        wheel.writestr("torch/version.py", f"__version__ = '{version}+cpu'\n")
        folder = f"torch-{version}+cpu.dist-info"
        wheel.writestr(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}+cpu\n")
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "")
    (index / "index.html").write_text(f'<a href="{name}">{name}</a>')
    place = index.parent if is_there else tmp_path / "none"
    alone = {name: "" for name in os.environ if name.startswith("PIP_")} | {"PIP_CONFIG_FILE": os.devnull}
    said = clone.make(".venv/.runtime", "TORCH=cpu", f"TORCH_CPU_INDEX=file://{place}", REAL_PIP="1", **alone)
    assert clone.take_installed() == ["torch", "."]
    assert ("no PyTorch for the CPU found there" in said) is not is_there
    assert (tmp_path / "site" / "torch" / "version.py").exists() is is_there


def test_the_readmes_demo_is_that_of_make_demo(clone):
    shown = next(block for block in read_blocks() if block.tag == "run in demo")
    said = clone.make("demo", "TORCH=cuda")
    assert [words for words in clone.take_log() if words[0] in PROJECT["scripts"]] == split_commands(shown.text)
    assert said.splitlines()[-1] == "done: open demo/runs/demo/report.html"
    assert (clone.folder / "demo" / "runs" / "demo").is_dir()


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_demo_goes_on_with_what_is_there_and_a_users_own_files_stay(clone):
    clone.make("demo", "TORCH=cuda")
    clone.take_log()
    for name in ("notes.txt", "images/train/mine.jpg", "runs/demo/thoughts.md", "runs/mine/config.json"):
        path = clone.folder / "demo" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    before = read_all(clone.folder / "demo")
    said = clone.make("demo", "TORCH=cuda")
    assert "demo is there: the demo goes on with what is in it, and deletes nothing" in said
    assert [words[:3] for words in clone.take_log()] == [
        ["alexnet-train", "--resume", "demo"],
        ["alexnet-eval", "demo", "--gpus"],
        ["alexnet-bench", "loader", "--recipe"],
        ["alexnet-report", "demo"],
    ]
    assert read_all(clone.folder / "demo") == before
    clone.make("clean")
    assert read_all(clone.folder / "demo") == before


@pytest.mark.parametrize(
    ("lost", "command"),
    [
        ("shards/color.json", ["alexnet-prep", "pca"]),
        ("shards/manifest.json", ["alexnet-prep", "shard", "images", "--samples-per-shard", "125"]),
        ("runs/demo/checkpoints/last.pt", ["alexnet-train", "--recipe", "demo", "--gpus", "0", "--resume", "auto"]),
    ],
)
def test_a_demo_that_was_interrupted_takes_up_where_it_was(clone, lost, command):
    clone.make("demo", "TORCH=cuda")
    clone.take_log()
    (clone.folder / "demo" / lost).unlink()
    clone.make("demo", "TORCH=cuda")
    assert clone.take_log()[0] == command


def test_the_demo_names_its_page_as_seen_from_the_clones_folder_wherever_it_is(clone, tmp_path):
    said = clone.make("demo", "TORCH=cuda", f"DEMO={tmp_path}/another place")
    assert said.splitlines()[-1] == f"done: open {tmp_path}/another place/runs/demo/report.html"
    assert (tmp_path / "another place" / "images").is_dir()


@pytest.fixture
def ci(clone, tmp_path):
    """The clone with .ci/run; in the place of make, what notes its words and its environment."""
    (clone.folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", clone.folder / ".ci" / "run")
    (tmp_path / "bin").mkdir()
    noting = f"#!{sys.executable}\nimport json, os, sys\nopen({str(clone.folder / 'log')!r}, 'a').write("
    (tmp_path / "bin" / "make").write_text(noting + "json.dumps([sys.argv[1:], dict(os.environ)]) + '\\n')\n")
    (tmp_path / "bin" / "make").chmod(0o755)
    return clone


def test_ci_runs_in_the_environment_of_a_new_user(ci, tmp_path):
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    given = {"HOME": str(tmp_path), "PATH": path, "LANG": "C.UTF-8", "CI": "true", "ALEXNET_TEST_IMAGES": "/some where",
             "PIP_FIND_LINKS": "/wheels", "SSL_CERT_FILE": "/certificates", "HTTPS_PROXY": "http://proxy"}  # fmt: skip
    ours = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": "/x",
        "PYTHONDONTWRITEBYTECODE": "1",
        "VIRTUAL_ENV": "/y",
        "DEMO": "z",
    }
    command = ["bash", str(ci.folder / ".ci" / "run")]
    subprocess.run(command, env={**given, **ours}, stdin=subprocess.DEVNULL, check=True, timeout=60)
    calls = ci.take_log()
    assert [words[1] for words, _ in calls] == ["test-all", "lint", "docs", "demo"]
    for words, variables in calls:
        assert variables == {**given, **{name: variables[name] for name in ("LC_CTYPE",) if name in variables}}
        assert words[0] in ("PYTHON=/usr/bin/python3", "PYTHON=python3")
