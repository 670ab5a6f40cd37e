"""The command of a report makes the same run again: it is read back by the command's own parser."""

import shlex
from dataclasses import replace

import pytest

from trainer.recipe import RECIPES, override, to_dict
from trainer.report.page import repeat_command, spell_changes


def read_back(command):
    """What `alexnet-train` would make of its words, up to the recipe."""
    from trainer.commands.train import _train

    words = shlex.split(command)
    start = words.index("--gpus")
    with _train.make_context("alexnet-train", words[start:]) as context:
        given = context.params
    fields = ("epochs", "global_batch_size", "lr")
    flags = [f"{field}={given[field]}" for field in fields if given[field] is not None]
    return override(RECIPES[given["recipe_name"]], [*flags, *given["settings"]]), given, words[:start]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["lr=0.02", "epochs=7", "global_batch_size=64"],
        ["dropout=0", "lrn=false", "activation=tanh", "width=0.5", "lighting=none", "lr_milestones=3,5"],
        ["conv1_lr_events=2:1e-05,3:0.0", "lighting_off_epoch=none", "warmup_epochs=1.5"],
        ["conv1_lr_events=none"],
    ],
)
def test_the_recipe_comes_back_whatever_was_changed(name, settings):
    recipe = override(RECIPES[name], settings)
    config = {"recipe": to_dict(recipe), "seed": 3, "shards": "/data/my shards", "world_size": 1, "device": "cpu"}
    again, given, _ = read_back(repeat_command(config))
    assert again == recipe
    assert given["seed"] == 3 and given["shards"] == "/data/my shards" and given["num_gpus"] == 0


def test_every_field_can_be_told():
    other = {"paper": "owt", "owt": "original"}
    for name, base in other.items():
        changed = override(RECIPES[base], [f"{k}={v}" for k, v in spell_changes(RECIPES[name], RECIPES[base]).items()])
        assert replace(changed, name=name) == RECIPES[name]


def test_ranks_parallel_modes_feeding_and_weights_are_part_of_it():
    config = {
        "recipe": to_dict(RECIPES["paper"]), "seed": 0, "shards": "s3://bucket/shards", "world_size": 2,
        "device": "cuda", "parallel": {"mode": "columns", "gradients": "bf16"},
        "feeding": {"decode": "mixed", "cache_gib": 2.5, "host_share": None}, "weights": {"source": "runs/a"},
    }  # fmt: skip
    _, given, _ = read_back(repeat_command(config))
    assert given["num_gpus"] == 2 and given["parallel"] == "columns" and given["gradients"] == "bf16"
    assert given["decode"] == "mixed" and given["cache_gib"] == 2.5 and given["weights_text"] == "runs/a"
    _, given, start = read_back(repeat_command({**config, "device": "cpu"}))
    assert start == ["torchrun", "--nproc-per-node", "2", "-m", "trainer"] and given["num_gpus"] == 0


def test_a_hostile_folder_is_one_word_of_the_shell():
    config = {"recipe": to_dict(RECIPES["demo"]), "shards": "a; rm -rf $HOME"}
    assert shlex.split(repeat_command(config))[4] == "a; rm -rf $HOME"
