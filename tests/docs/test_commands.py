"""Every code block of the documents is tagged and does what its tag says: commands run, or are read by their parser."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.documents import (
    DOCUMENTS,
    PROJECT,
    ROOT,
    Misread,
    check_command,
    find_blocks,
    find_inline_commands,
    find_inline_flags,
    is_run,
    list_flags,
    read_blocks,
    split_commands,
)

BLOCKS = read_blocks()
# Flags in inline code that are other programs'.
FOREIGN_FLAGS = {"--rdzv-id", "--nproc-per-node", "--build-arg", "--shm-size", "--time", "--logdir"} | {
    "--help",
    "--debug",
}
# What makes a documented command small. Appended, so that of a flag given twice the last counts; a flag in BECOMES
# takes another value instead.
BECOMES = {"--gpus": "0", "--classes": "4", "--train": "48", "--val": "16", "--samples-per-shard": "16",
           "--seconds": "0.1"}  # fmt: skip
SMALL_NET = ["--set", "width=0.0625", "--global-batch-size", "8"]
APPENDED = {
    "alexnet-train": [*SMALL_NET, "--epochs", "1", "--gpus", "0"],
    "alexnet-bench": [*SMALL_NET, "--seconds", "0.1", "--rounds", "1", "--gpus", "0"],
    "alexnet-eval": ["--gpus", "0"],
    "alexnet-report": ["--images", "16"],
}
# Runs the commands on its standard input (a folder and words each) in one process, each as its script would be.
RUNNER = """
import importlib, json, os, sys
scripts, commands = json.load(sys.stdin)
for folder, *words in commands:
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    print("$", *words, flush=True)
    module, _, function = scripts[words[0]].partition(":")
    sys.argv = words
    try:
        getattr(importlib.import_module(module), function)()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{' '.join(words)}: status {end.code}")
"""


def shrink(words: list[str], data: Path) -> list[str]:
    """The same command, small: on `data` for /data, without a GPU, with a sixteenth of the network for an epoch."""
    small = [word.replace("/data/", f"{data}/") for word in words]
    for position, word in enumerate(small[:-1]):
        small[position + 1] = BECOMES.get(word, small[position + 1])
    appended = APPENDED.get(words[0], [])
    if "--resume" in words:  # its settings are the run's
        appended = ["--gpus", "0"]
    return small + appended


def test_a_block_is_found_with_its_tag_and_one_without_has_none():
    text = "a\n\n<!-- run -->\n    one \\\n      two # three\n\n- b\n\n  <!-- parsed -->\n  ```sh\n  four 'five six'\n"
    text += "  ```\n\nc\n\n    seven\n"
    blocks = find_blocks(text, "d")
    assert [(block.tag, block.line) for block in blocks] == [("run", 4), ("parsed", 10), (None, 16)]
    assert [split_commands(block.text) for block in blocks] == [[["one", "two"]], [["four", "five six"]], [["seven"]]]


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("alexnet-train --gpu 2", "No such option"),
        ("alexnet-train --recipe papers", "is not one of"),
        ("alexnet-prep shards here", "no such command"),
        ("alexnet-prep shard", "Missing argument"),
        ("torchrun --nodes-here 2 -m trainer", "nodes-here"),
        ("torchrun --nproc-per-node 2 -m trainer --epoch 2", "No such option"),
        ("srun --nodes 2 python -m trainer --epochs none", "not a valid integer"),
        ("sbatch --wrap 'alexnet-prep shard here --parts 1/2'", "No such option"),
        ("FOO=1 .venv/bin/alexnet-eval", "Missing argument"),
        ("python benchmarks/feed.py --second 3", "no option --second"),
        ("python benchmarks/feeds.py", "no such file"),
        ("make tests", "no target tests"),
        ("pip install 'alexnet-dali[s4]'", "no extra s4"),
        ("nobody --knows this", "not known here"),
        ("_ALEXNET_TRAIN_COMPLETE=bash_source alexnet-eval >> there", "not what click answers to"),
        ("source <(_ALEXNET_TRAIN_COMPLETED=bash_source alexnet-train)", "not what click answers to"),
        ("docker run --gpus all alexnet-dali alexnet-prep doctors", "no such command"),
    ],
)
def test_a_command_that_its_program_would_not_take_is_found(command, complaint):
    (words,) = split_commands(command)
    with pytest.raises(Misread, match=complaint):
        check_command(words)


def test_every_block_is_tagged():
    assert [str(block) for block in BLOCKS if block.tag is None] == []
    assert {block.tag for block in BLOCKS} >= {"run", "run in demo", "parsed", "text"}


@pytest.mark.parametrize("block", [block for block in BLOCKS if is_run(block) or block.tag == "parsed"], ids=str)
def test_every_command_is_one_that_its_program_takes(block):
    commands = split_commands(block.text)
    assert commands
    for words in commands:
        check_command(words)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.tag == "text"], ids=str)
def test_what_is_tagged_as_text_holds_no_command(block):
    programs = {*PROJECT["scripts"], "make", "python", "pip", "torchrun", "srun", "sbatch"}
    assert programs.isdisjoint(line.split()[0] for line in block.text.splitlines() if line.strip())


@pytest.mark.parametrize("block", [block for block in BLOCKS if (block.tag or "").startswith("program")], ids=str)
def test_the_test_of_a_program_reads_its_document(block):
    source = (ROOT / block.tag.removeprefix("program: ")).read_text(encoding="utf-8")
    assert Path(block.document).name in source


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_named_in_passing_is_one_that_its_program_takes(path):
    for words in find_inline_commands(path.read_text(encoding="utf-8")):
        try:
            check_command(words)
        except Misread as error:
            if not re.search(
                "Missing argument|requires an argument", str(error)
            ):  # `alexnet-eval --json`: the flag alone
                raise


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_named_in_passing_exists(path):
    known = set().union(*list_flags().values()) | FOREIGN_FLAGS
    for script in (ROOT / "benchmarks").rglob("*.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', script.read_text(encoding="utf-8")))
    assert set(find_inline_flags(path.read_text(encoding="utf-8"))) - known == set()


def test_each_option_of_the_table_is_one_of_its_command():
    flags = list_flags()
    flags |= {f"alexnet-bench {what}": flags["alexnet-bench"] for what in ("loader", "step", "train")}
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    section = text.split("## Options people need")[1].split("\n## ")[0]
    command, checked = "", 0
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.replace(r"\|", "/").strip("|").split(" | ")]
        if not line.startswith("| ") or cells[0] == "command":
            continue
        command = cells[0].strip("` ") or command
        named = set(find_inline_flags(cells[1] if len(cells) > 1 else ""))
        assert named <= flags[command], f"{command}: {named - flags[command]}"
        checked += len(named)
    assert checked > 40


@pytest.mark.slow
@pytest.mark.parametrize("document", sorted({block.document for block in BLOCKS if is_run(block)}))
def test_the_commands_of_a_document_run_one_after_the_other(document, synth_tree, tmp_path):
    photo = next((synth_tree / "val").rglob("*.[jJ][pP]*[gG]"))
    data, here = tmp_path / "data", tmp_path / "here"
    (here / "folder").mkdir(parents=True)
    data.mkdir()
    (data / "imagenet").symlink_to(synth_tree)
    for name in ("photo.jpg", "folder/other.jpg"):
        shutil.copyfile(photo, here / name)
    commands = [
        [folder, *shrink(words, data)]
        for block in BLOCKS
        if block.document == document and is_run(block)
        for folder in [str(here / (block.tag or "").removeprefix("run").removeprefix(" in "))]
        for words in split_commands(block.text)
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALEXNET_")}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([PROJECT["scripts"], commands]),
        cwd=here,
        env=environment | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert sum(line.startswith("$ ") for line in done.stdout.splitlines()) == len(commands)
