"""The code blocks of the documents: their tags, their commands, and each command read by the parser it is meant for.

A block is tagged by an HTML comment on the line before it, which no reader sees:

    <!-- run -->               every command is run, small (tests/docs/test_commands.py); or "run in FOLDER"
    <!-- parsed -->            every command is read by its own parser: two GPUs, Slurm, real ImageNet, object storage
    <!-- program: TEST -->     Python, run by the test file named
    <!-- text -->              no command: a formula, a map, a file
"""

import contextlib
import io
import itertools
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import click
from markdown_it import MarkdownIt

from pipeline.common import console

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TAG = re.compile(r"^<!-- (run(?: in \w+)?|parsed|text|program: \S+) -->$")
FOREIGN = {"apt-get", "cd", "complete", "docker", "export", "git", "mkdir", "pre-commit", "source", "sudo"}
FOREIGN |= {
    "aws",
    "kaggle",
    "mv",
    "nvidia-smi",
    "scancel",
    "scontrol",
    "squeue",
    "tar",
    "tensorboard",
    "test",
    "wget",
    "xdg-open",
}


@dataclass(frozen=True)
class Block:
    """A code block: `line` counts from 1, `tag` is None where there is none."""

    document: str
    line: int
    tag: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def find_blocks(text: str, document: str) -> list[Block]:
    """Every code block, indented or fenced, in lists too."""
    tokens = MarkdownIt().parse(text)
    blocks = []
    for position, token in enumerate(tokens):
        if token.type not in ("fence", "code_block"):
            continue
        before = tokens[position - 1] if position else None
        found = TAG.match(before.content.strip()) if before and before.type == "html_block" else None
        assert token.map
        blocks.append(Block(document, token.map[0] + 1, found[1] if found else None, textwrap.dedent(token.content)))
    return blocks


def read_blocks() -> list[Block]:
    return [
        block
        for path in DOCUMENTS
        for block in find_blocks(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]


def split_commands(text: str) -> list[list[str]]:
    """The words of each command, without comments; a backslash at a line's end goes on with the next."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def is_run(block: Block) -> bool:
    return (block.tag or "").startswith("run")


class Misread(Exception):
    """A command that its program would not take: what, and the program's own words."""


def check_command(words: Sequence[str]) -> None:
    """Read one command as its program would. Raises Misread."""
    words = [word.replace("$SLURM_ARRAY_TASK_ID", "1") for word in words]
    settings = {}
    while words and re.fullmatch(r"\w+=.*", words[0]):
        name, _, settings[name] = words[0].partition("=")
        words = words[1:]
    for sign in (">", ">>"):
        words = words[: words.index(sign)] if sign in words else words
    program, rest = Path(words[0]).name, words[1:]
    completion = [name for name in settings if "_COMPLETE" in name]
    if completion:
        _check_completion(completion[0], settings[completion[0]], program)
    elif program in PROJECT["scripts"]:
        _check_ours(program, rest)
    elif program == "torchrun":
        _check_torchrun(rest)
    elif program in ("srun", "sbatch", "docker"):
        _check_inner(rest)
    elif program in ("python", "python3", "python3.11"):
        _check_python(rest)
    elif program == "make":
        _check_make(rest)
    elif program in ("pip", "pip3"):
        _check_pip(rest)
    elif program == "source" and rest[0].startswith("<("):  # of what a command prints
        check_command(shlex.split(" ".join(rest)[2:-1]))
    elif program not in FOREIGN:
        raise Misread(f"{shlex.join(words)}: the program is not known here (tests/docs/documents.py)")


def find_command(script: str) -> click.Command:
    """The click command behind a script of pyproject.toml."""
    module, _, function = PROJECT["scripts"][script].partition(":")
    found: list[click.Command] = []
    usual = console.run
    console.run = found.append  # type: ignore[assignment]
    try:
        getattr(import_module(module), function)()
    finally:
        console.run = usual
    return found[0]


def list_flags() -> dict[str, set[str]]:
    """The flags of each command, "alexnet-prep shard" for those of a group."""
    flags = {}
    for script in PROJECT["scripts"]:
        command = find_command(script)
        flags[script] = _list_options(command)
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                flags[f"{script} {name}"] = _list_options(inner)
    return flags


def _list_options(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def _check_ours(script: str, words: list[str]) -> None:
    command = find_command(script)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if isinstance(command, click.Group) and words and not words[0].startswith("-"):
                context = click.Context(command, info_name=script)
                inner = command.get_command(context, words[0])
                if inner is None:
                    raise Misread(f"{script} {words[0]}: no such command")
                inner.make_context(words[0], words[1:], parent=context)
            else:
                command.make_context(script, words)
    except click.exceptions.Exit:
        return  # --help and --version
    except click.ClickException as error:
        raise Misread(f"{script} {shlex.join(words)}: {error.format_message()}") from None


def _check_completion(name: str, value: str, program: str) -> None:
    if name != f"_{program.upper().replace('-', '_')}_COMPLETE" or value not in {
        "bash_source",
        "zsh_source",
        "fish_source",
    }:
        raise Misread(f"{name}={value} {program}: not what click answers to")


def _check_inner(words: list[str]) -> None:
    """Behind a launcher's own flags: what it launches, as words or as one quoted command."""
    for position, word in enumerate(words):
        if word == "python" or word in PROJECT["scripts"]:
            return check_command(words[position:])
        if " " in word and word.split()[0] in {*PROJECT["scripts"], "python"}:
            return check_command(shlex.split(word))
    return None


def _check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            options = get_args_parser().parse_args(words)
    except SystemExit:
        raise Misread(f"torchrun {shlex.join(words)}: {complaint.getvalue().splitlines()[-1]}") from None
    if not options.module or options.training_script != "trainer":
        raise Misread(f"torchrun {shlex.join(words)}: expected -m trainer")
    _check_ours("alexnet-train", options.training_script_args)


def _check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "trainer"]:
        return _check_ours("alexnet-train", words[2:])
    if words[:1] == ["-m"]:
        if words[1] not in ("venv", "pip", "build", "pytest"):
            raise Misread(f"python {shlex.join(words)}: the module is not known here (tests/docs/documents.py)")
        return None
    script = ROOT / words[0]
    if not script.is_file():
        raise Misread(f"python {words[0]}: no such file")
    source = script.read_text(encoding="utf-8")
    imported = re.findall(r"^(?:from|import) ([\w.]+)(?: import (\w+))?", source, re.MULTILINE)
    modules = {".".join(filter(None, names)) for module, inner in imported for names in ((module,), (module, inner))}
    beside = [script.parent / f"{module.replace('.', '/')}.py" for module in sorted(modules)]
    source += "".join(path.read_text(encoding="utf-8") for path in beside if path.is_file())
    known = set(re.findall(r'"(--[\w-]+)"', source))
    wrong = {word.partition("=")[0] for word in words[1:] if word.startswith("--")} - known
    if wrong:
        raise Misread(f"python {words[0]}: no option {', '.join(sorted(wrong))}")
    return None


def _check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    wrong = {word for word in words if "=" not in word} - targets
    if wrong:
        raise Misread(f"make: no target {', '.join(sorted(wrong))}")


def _check_pip(words: list[str]) -> None:
    for extras in re.findall(r"(?:alexnet-dali|\.)\[([\w,]+)\]", " ".join(words)):
        wrong = set(extras.split(",")) - set(PROJECT["optional-dependencies"])
        if wrong:
            raise Misread(f"pip {shlex.join(words)}: no extra {', '.join(sorted(wrong))}")


def find_anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings: lower case, spaces as hyphens, punctuation gone."""
    tokens = MarkdownIt().parse(text)
    anchors: set[str] = set()
    for opening, content in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            shown = "".join(child.content for child in content.children or [])
            slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
            same = sum(
                anchor == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", anchor) is not None for anchor in anchors
            )
            anchors.add(f"{slug}-{same}" if same else slug)
    return anchors


def find_links(text: str) -> list[str]:
    """Where links and pictures lead."""
    found = []
    for token in MarkdownIt().enable("table").parse(text):
        for child in token.children or []:
            found += [str(child.attrs[name]) for name in ("href", "src") if name in child.attrs]
    return found


def find_broken_links(path: Path) -> list[str]:
    """Links of a document to files, or headings in files, that are not there. Other sites are not asked."""
    broken = []
    for link in find_links(path.read_text(encoding="utf-8")):
        place, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = path.parent / place if place else path
        if not target.exists() or (anchor and anchor not in find_anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def find_inline_commands(text: str) -> Iterator[list[str]]:
    """Our commands with their words in inline code, `alexnet-eval RUN --json`; placeholders filled in."""
    usual = {"M": "1", "N": "1", "MODE": "data", "NAME": "paper", "URL": "s3://bucket/prefix", "...": ""}
    for token in MarkdownIt().enable("table").parse(text):
        for child in token.children or []:
            words = child.content.replace(r"\|", "|").split() if child.type == "code_inline" else []
            if len(words) > 1 and words[0] in PROJECT["scripts"] and "|" not in child.content:
                yield [usual.get(word, word) for word in words if usual.get(word, word)]


def find_inline_flags(text: str) -> Iterator[str]:
    """Flags in inline code, `--gpus 2` or `alexnet-eval --json`."""
    for token in MarkdownIt().enable("table").parse(text):
        for child in token.children or []:
            if child.type == "code_inline":
                yield from re.findall(r"(?<![\w-])--[a-z][\w-]*", child.content)
