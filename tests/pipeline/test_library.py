"""The loader in somebody else's loop: the programs of docs/library.md, with torchvision's ResNet-50 rebuilt small, and
of README.md."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.docs.documents import find_blocks

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "library.md"


class Bottleneck(nn.Module):
    """A block of He et al. 2015 in the layout of torchvision's ResNet-50."""

    def __init__(self, num_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        self.shortcut = nn.Sequential(nn.Conv2d(num_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def make_net(num_classes: int) -> nn.Module:
    # At half of these widths torch 2.13 crashes in its backward pass on the CPU, with any channels-last input.
    stem = [nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [Bottleneck(16, 8, 2), Bottleneck(32, 16, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def read_programs(path: Path) -> list[str]:
    """The code blocks of a document that are programs."""
    blocks = find_blocks(path.read_text(encoding="utf-8"), path.name)
    return [block.text for block in blocks if (block.tag or "").startswith("program")]


def test_the_documents_loop_trains_and_evaluates_a_net_that_is_not_ours(ready_shards, capsys):
    program = read_programs(DOCUMENT)[0]
    for written, here in {
        "from torchvision.models import resnet50\n": "",
        "resnet50(num_classes=shards.num_classes)": "make_net(shards.num_classes)",
        '"shards"': repr(str(ready_shards)),
        '"gpu"': '"cpu"',
        ".cuda()": "",
        "range(90)": "range(2)",
        "global_batch_size=256": "global_batch_size=8",
    }.items():
        assert written in program, written
        program = program.replace(written, here)
    torch.manual_seed(0)
    names = {"make_net": make_net}
    exec(compile(program, str(DOCUMENT), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all(re.fullmatch(r"epoch \d: top-1 error \d+\.\d %", line) for line in printed)
    assert names["num_right"] <= 24 and names["num_seen"] == 24  # every validation image once


def test_the_documents_options_are_those_of_the_loader(ready_shards):
    from pipeline import ColorStats, LoaderOptions, ShardSet, TrainLoader, Transform

    text = DOCUMENT.read_text(encoding="utf-8")
    for kind in (Transform, LoaderOptions):
        table = text.split(f"\n| `{kind.__name__}(...)` |")[1].split("\n\n")[0].splitlines()[2:]
        named = [name for row in table for name in re.findall(r"`(\w+)`", row.split("|")[1])]
        assert named == [field.name for field in fields(kind)]
    shards = ShardSet.open(ready_shards)
    names = {"shards": shards, "colors": ColorStats.load(ready_shards, shards.fingerprint)}
    names |= {"TrainLoader": TrainLoader, "transform": Transform()}
    program = read_programs(DOCUMENT)[1].replace('"gpu"', '"cpu"').replace("256", "8")
    exec(compile(program, str(DOCUMENT), "exec"), names)
    assert (names["loader"].spec.num_on_host, names["loader"].spec.num_threads) == (2, 8)
    assert len(next(iter(names["loader"])).images) == 8


def test_the_readmes_loop_sees_every_epoch_whole(ready_shards):
    (program,) = read_programs(ROOT / "README.md")
    for written, here in {
        '"shards"': repr(str(ready_shards)),
        '"gpu"': '"cpu"',
        "range(90)": "range(2)",
        "global_batch_size=128": "global_batch_size=8",
        "...": "seen.append((images, labels))",
    }.items():
        assert written in program, written
        program = program.replace(written, here)
    seen = []
    exec(compile(program, "README.md", "exec"), {"seen": seen})
    assert len(seen) == 2 * 64 // 8
    assert {(tuple(images.shape), images.dtype, labels.dtype) for images, labels in seen} == {
        ((8, 3, 224, 224), torch.float32, torch.int64)
    }


def test_a_state_by_other_operators_is_refused_and_both_are_named(ready_shards, monkeypatch):
    from pipeline import ColorStats, ShardSet, TrainLoader, UserError
    from pipeline.operators import load_operators

    if not load_operators():
        pytest.skip("the operators cannot be compiled here: no C++ compiler, or no headers of libjpeg-turbo")
    shards = ShardSet.open(ready_shards)
    colors = ColorStats.load(ready_shards, shards.fingerprint)
    state = TrainLoader(shards, colors, global_batch_size=8).state_dict()
    monkeypatch.setenv("ALEXNET_OPERATORS", "stock")
    words = "decoder cpu, our own operators, this one has cpu, DALI's operators"
    with pytest.raises(UserError, match=words):
        TrainLoader(shards, colors, global_batch_size=8).load_state_dict(state)


def test_the_documents_resuming_goes_on_where_it_was(ready_shards, tmp_path, monkeypatch):
    from pipeline import ColorStats, ShardSet, TrainLoader

    shards = ShardSet.open(ready_shards)
    colors = ColorStats.load(ready_shards, shards.fingerprint)
    monkeypatch.chdir(tmp_path)
    loader, fresh = (TrainLoader(shards, colors, global_batch_size=8) for _ in range(2))
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    save, load = read_programs(DOCUMENT)[2].strip().split("\n\n")
    exec(compile(save, str(DOCUMENT), "exec"), {"torch": torch, "loader": loader})
    exec(compile(load, str(DOCUMENT), "exec"), {"torch": torch, "loader": fresh})
    assert fresh.step == 3
    assert all(torch.equal(one.images, other.images) for one, other in zip(batches, fresh, strict=True))
