"""What is done around the code: lint before a commit, the container's recipe, versions, completion, the change log."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml

from tests.docs.documents import find_command

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCRIPTS = PROJECT["scripts"]
HOOKS = [
    hook
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    for hook in repository["hooks"]
]


def run_script(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as its script would run it, in a process of its own."""
    module, _, function = SCRIPTS[script].partition(":")
    program = (
        f"import importlib, sys; sys.argv = {[script, *words]!r}; importlib.import_module({module!r}).{function}()"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def read_recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile, with its variables filled in."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)+)", text, re.MULTILINE)
    assert found
    variables = dict(re.findall(r"^(\w+) [?:]= (.*)$", text, re.MULTILINE))
    recipe = found[1]
    while "$(" in recipe:
        recipe = re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], recipe)
    return [line.strip() for line in recipe.splitlines()]


def find_unquoted(source: str) -> list[str]:
    """The values in a program's f-strings that stand among the words of one of our commands and are not quoted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        before = ""
        for part in node.values if isinstance(node, ast.JoinedStr) else []:
            if isinstance(part, ast.Constant):
                before += part.value
                continue
            value = ast.unparse(part.value)
            is_word = re.search(r"alexnet-(?!dali)[a-z]+( [^\s;:,`()]+)* $", before)
            if is_word and not value.startswith(("quote(", "spell_command(", "shlex.")):
                found.append(value)
            before += "X"
    return found


def test_a_value_in_a_command_that_a_message_names_is_quoted():
    assert find_unquoted('f"see `alexnet-prep verify --shards {a}` {b}, {c}"') == ["a"]
    wrong = {
        f"{path.relative_to(ROOT)}: {value}"
        for package in ("pipeline", "tools", "trainer")
        for path in (ROOT / package).rglob("*.py")
        for value in find_unquoted(path.read_text(encoding="utf-8"))
    }
    assert wrong == set()


def test_the_hooks_before_a_commit_are_the_commands_of_make_lint():
    assert [hook["entry"] for hook in HOOKS] == read_recipe("lint")
    assert all(hook["language"] == "system" for hook in HOOKS)  # nothing is downloaded


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook["id"] != "mypy"], ids=lambda hook: hook["id"])
def test_the_command_of_a_hook_passes(hook):
    """All but mypy, which takes a minute; `make lint` runs it."""
    program, *words = shlex.split(hook["entry"])
    name = Path(program).name
    if name == "hadolint":
        found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if not found:
            pytest.skip("hadolint is not installed")
        command = [found, *words]
    else:
        command = [sys.executable, "-m", name, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def read_dockerfile() -> list[tuple[str, str]]:
    """(instruction, its words) in order, lines that go on joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.partition(" ")[0], " ".join(line.partition(" ")[2].split())) for line in joined if line.strip()]


def test_the_container_is_given_every_file_that_its_recipe_copies_and_no_other():
    copied = {word for name, words in read_dockerfile() if name == "COPY" for word in words.split()[:-1]}
    assert copied >= {"pyproject.toml", "README.md", "LICENSE", "pipeline", "trainer", "tools"}  # a build needs these
    assert all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied
    assert "*" in ignored


def test_the_container_states_the_least_driver_that_the_doctor_asks_for():
    from tools.checks.doctor import DALI_CUDA, OLDEST_DRIVER

    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (image,) = [words for name, words in read_dockerfile() if name == "FROM"]
    assert re.fullmatch(rf"nvidia/cuda:{DALI_CUDA}\.\d+\.\d+-runtime-ubuntu\d\d\.04", image)
    assert f"Least NVIDIA driver: {OLDEST_DRIVER[13]}" in text and f"{OLDEST_DRIVER[DALI_CUDA]}.60" in text
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"driver {OLDEST_DRIVER[DALI_CUDA]}.60" in readme and str(OLDEST_DRIVER[13]) in readme


def test_the_container_installs_extras_that_exist_and_starts_a_command_that_exists():
    recipe = " ".join(words for name, words in read_dockerfile() if name == "RUN")
    (extras,) = re.findall(r"\.\[([\w,]+)\]", recipe)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    (command,) = [words for name, words in read_dockerfile() if name == "CMD"]
    assert yaml.safe_load(command)[0] in SCRIPTS
    assert [words for name, words in read_dockerfile() if name == "USER"] not in ([], ["root"], ["0"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_tells_its_version(script):
    done = run_script(script, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{script}, version {PROJECT['version']}\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_80_columns_and_cuts_no_sentence_short(script):
    command = find_command(script)
    inner = command.commands if isinstance(command, click.Group) else {}
    for name, one in {"": command, **inner}.items():
        context = click.Context(one, info_name=f"{script} {name}".strip(), terminal_width=80, max_content_width=80)
        lines = one.get_help(context).splitlines()
        assert [line for line in lines if len(line) > 80 or (line.startswith("  ") and line.endswith("..."))] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_writes_its_completion_for_each_shell(script):
    variable = f"_{script.upper().replace('-', '_')}_COMPLETE"
    for shell, sign in (("bash", "complete -o nosort"), ("zsh", f"#compdef {script}"), ("fish", f"--command {script}")):
        done = run_script(script, **{variable: f"{shell}_source"})
        assert done.returncode == 0 and sign in done.stdout, done.stderr


def complete(script: str, line: str) -> list[str]:
    """What bash would offer at the end of `line`."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    done = run_script(script, **{f"_{script.upper().replace('-', '_')}_COMPLETE": "bash_complete", **words})
    assert done.returncode == 0, done.stderr
    return [offer.partition(",")[2] for offer in done.stdout.splitlines()]


def test_completion_offers_commands_flags_and_choices():
    assert complete("alexnet-prep", "alexnet-prep pre") == ["preview"]
    assert complete("alexnet-train", "alexnet-train --global") == ["--global-batch-size"]
    assert complete("alexnet-train", "alexnet-train --recipe o") == ["original", "owt"]


def test_the_change_log_is_in_the_form_of_keep_a_changelog():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    dated = [re.fullmatch(r"## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", line) for line in versions[1:]]
    assert all(dated)
    kinds = {line.removeprefix("### ") for line in lines if line.startswith("### ")}
    assert kinds and kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    entries = [line for line in lines if line.startswith("- ")]
    assert len(entries) > 20 and len(entries) == len(set(entries))
