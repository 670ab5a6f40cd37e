"""Training that starts from a trained net: fine-tuning on one's own classes.

Every layer is taken as it is and none is cut to fit; only fc8, whose rows are classes, stays as freshly drawn where the
classes are others.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.common.errors import UserError
from pipeline.manifest import ClassEntry
from trainer.model import AlexNet
from trainer.nets.formats import compare_functions
from trainer.nets.weights import Weights, expected_shapes, find_misfits
from trainer.recipe import Recipe


@dataclass(frozen=True)
class Start:
    """Where a run started: for config.json. differences: what the recipe computes otherwise than the net's own."""

    source: str
    sha256: str
    layout: str
    num_classes: int
    is_fc8_new: bool
    differences: tuple[str, ...]

    def describe(self) -> str:
        what = f"starting from {self.source} ({self.layout})"
        if self.is_fc8_new:
            what += f", with a new fc8: its {self.num_classes} classes are others"
        if self.differences:
            what += f"; trained with {', '.join(self.differences)}"
        return what


def check_fits(recipe: Recipe, weights: Weights) -> None:
    """Raises UserError naming the layers that a net of `recipe` has in another shape, fc8 left aside."""
    found, shapes = dict(weights.state), expected_shapes(recipe, weights.num_classes)
    for name in ("fc8.weight", "fc8.bias"):
        found.pop(name, None)
        shapes.pop(name)
    wrong = find_misfits(found, shapes)
    if wrong:
        raise UserError(
            f"{weights.source}: {'; '.join(wrong[:4])}; it is a net of recipe {weights.recipe.name}, width "
            f"{weights.recipe.width:g}: leave out --recipe and --set, or set the same"
        )


def start_from(model: AlexNet, weights: Weights, classes: Sequence[ClassEntry]) -> Start:
    """Copy the weights into `model`, all but fc8 if `classes` are not the net's own. Raises UserError as check_fits."""
    check_fits(model.recipe, weights)
    theirs = [entry.wnid for entry in weights.classes] if weights.classes else None
    is_new = weights.num_classes != len(classes) or theirs not in (None, [entry.wnid for entry in classes])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not (is_new and name.startswith("fc8.")):
                parameter.copy_(weights.state[name])
    return Start(
        source=weights.source,
        sha256=hash_file(Path(weights.source)),
        layout=weights.layout,
        num_classes=weights.num_classes,
        is_fc8_new=is_new,
        differences=tuple(find_differences(model.recipe, weights.recipe)),
    )


def find_differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """The fields in which `theirs` computes another function of pixels, as "field=value"."""
    differences = compare_functions(ours, theirs, also=("mean", "unit_variance"))
    return [f"{field}={value}" for field, (_, value) in differences.items()]


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
