"""What the tests of trained nets share: narrow nets whose outputs differ between images, and runs made by hand."""

from dataclasses import replace
from pathlib import Path

import torch

from pipeline.colors import ColorStats
from pipeline.shards import ShardSet
from trainer import checkpoint
from trainer.model import AlexNet
from trainer.nets.weights import list_classes
from trainer.recipe import RECIPES, Recipe, to_dict
from trainer.record.runs import BEST, CHECKPOINTS, LAST, create_run, write_config

PAPER = replace(RECIPES["paper"], width=1 / 16)  # the mean image, raw pixels, two towers
DEMO = replace(RECIPES["demo"], width=1 / 16)  # three means, unit variance


def draw_state(recipe: Recipe, num_classes: int, seed: int = 0, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """Weights by He's rule times `factor`, so that every layer matters, whatever the recipe's own rule."""
    net = AlexNet.from_recipe(recipe, num_classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.normal_(0.0, factor * (2.0 / fan_in) ** 0.5, generator=generator)
        if not recipe.unit_variance:
            net.conv1.weight /= 50  # its input is in grey levels
    return dict(net.state_dict())


def make_run(runs: Path, name: str, folder: Path, recipe: Recipe, seed: int = 0) -> Path:
    """A run as training leaves it after its first epoch, on the shards in `folder`."""
    shards = ShardSet.open(folder)
    run = create_run(runs, name)
    ColorStats.load(folder, shards.fingerprint).save(run)
    common = {
        "recipe": to_dict(recipe),
        "num_classes": shards.num_classes,
        "shards_fingerprint": shards.fingerprint,
        "seed": seed,
    }
    write_config(run, {**common, "shards": str(folder), "classes": list_classes(shards.manifest.classes)})
    state = {"model": draw_state(recipe, shards.num_classes, seed), **common, "step": 32, "epoch": 2}
    checkpoint.save(run / CHECKPOINTS / LAST, state)
    checkpoint.link(run / CHECKPOINTS / LAST, run / CHECKPOINTS / BEST)
    return run
