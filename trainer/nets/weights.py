"""A trained network apart from the loop that made it: its numbers, its recipe, its colours, the names of its classes.

Whatever uses a trained net (evaluation, prediction, export, fine-tuning) takes one `Weights`, wherever it came from, so
that all of them check shapes, classes and colours alike.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.colors import COLOR_FILE, ColorStats
from pipeline.common.errors import UserError
from pipeline.manifest import ClassEntry
from pipeline.shards import ShardSet
from trainer import checkpoint
from trainer.model import AlexNet
from trainer.recipe import Recipe, from_dict
from trainer.record.runs import BEST, CHECKPOINTS, CONFIG, LAST, read_config

Classes = tuple[ClassEntry, ...]


@dataclass(frozen=True, eq=False)
class Weights:
    """A trained network. `source` says in messages where it came from; what a file does not tell is None.

    state: tensors by the names of AlexNet, on the CPU; layout: whose names and order the file had.
    """

    source: str
    recipe: Recipe
    state: dict[str, Tensor]
    colors: ColorStats | None = None
    classes: Classes | None = None
    shards_fingerprint: str | None = None
    step: tuple[int, int] | None = None  # of training: steps and epochs done
    layout: str = "alexnet-dali"

    @property
    def num_classes(self) -> int:
        return len(self.state["fc8.bias"])


def load_run(run: Path, which: str = "best", shards: ShardSet | None = None, *, is_completed: bool = True) -> Weights:
    """A checkpoint of a run: "best", "last", or the path of one. Raises UserError for one that cannot be used.

    shards: where colours and names are if the run does not have them; None: the run's own. is_completed=False: they
    may be missing.
    """
    names = {"best": BEST, "last": LAST}
    weights = load_checkpoint(run / CHECKPOINTS / names[which] if which in names else Path(which))
    config = read_config(run) if (run / CONFIG).is_file() else {}
    if (run / COLOR_FILE).is_file():
        weights = replace(weights, colors=ColorStats.load(run, str(weights.shards_fingerprint)))
    if "classes" in config:
        weights = replace(weights, classes=parse_classes(config["classes"], f"{run / CONFIG}", weights.num_classes))
    if is_completed and (weights.colors is None or weights.classes is None) and "shards" in config:
        weights = complete(weights, shards or ShardSet.open(config["shards"]))
    return weights


def load_checkpoint(path: Path) -> Weights:
    """The net in a checkpoint file alone, without colours or names. Raises UserError."""
    state = checkpoint.load(path)
    try:
        recipe, tensors = from_dict(state["recipe"]), dict(state["model"])
        fingerprint, step = str(state["shards_fingerprint"]), (int(state["step"]), int(state["epoch"]) - 1)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a checkpoint of a training run (no {error}); name another with --checkpoint PATH"
        ) from error
    return check(Weights(str(path), recipe, tensors, shards_fingerprint=fingerprint, step=step))


def complete(weights: Weights, shards: ShardSet) -> Weights:
    """With colours and class names from the shards it was trained on, where it lacks them. Raises UserError."""
    colors, classes = weights.colors, weights.classes
    if colors is None:
        colors = ColorStats.load(shards.root, weights.shards_fingerprint or shards.fingerprint)
    if classes is None and shards.num_classes == weights.num_classes:
        classes = shards.manifest.classes
    return replace(weights, colors=colors, classes=classes)


def check(weights: Weights) -> Weights:
    """The same weights. Raises UserError naming tensors that are missing, unknown, of another shape, or no numbers."""
    state, source = weights.state, weights.source
    if not isinstance(state.get("fc8.bias"), Tensor) or state["fc8.bias"].dim() != 1 or not len(state["fc8.bias"]):
        raise UserError(f"{source}: no tensor fc8.bias of one number a class; expected the weights of an AlexNet")
    wrong = find_misfits(state, expected_shapes(weights.recipe, weights.num_classes))
    if wrong:
        raise UserError(f"{source}: {'; '.join(wrong[:3])}; expected the net of recipe {weights.recipe.name}")
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise UserError(f"{source}: {name} holds {tensor.dtype}, expected floating-point numbers")
        if not tensor.float().isfinite().all():
            raise UserError(
                f"{source}: {name} holds infinities or NaN, so the net says nothing: its training had diverged, or "
                "the file is damaged; name an earlier checkpoint with --checkpoint, or another file"
            )
    return weights


def expected_shapes(recipe: Recipe, num_classes: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a net of `recipe`, by its name; no memory is taken."""
    with torch.device("meta"):
        net = AlexNet(recipe, num_classes)
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def find_misfits(state: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with some tensors, in words, a fault each; empty if nothing is."""

    def by(shape: Any) -> str:
        return " x ".join(map(str, shape)) or "a single number"

    faults = []
    for name, shape in shapes.items():
        tensor = state.get(name)
        if not isinstance(tensor, Tensor):
            faults.append(f"no tensor {name}")
        elif tuple(tensor.shape) != shape:
            faults.append(f"{name} is {by(tensor.shape)}, expected {by(shape)}")
    return faults + [f"unknown tensor {name!r:.60}" for name in state if name not in shapes]


def make_net(weights: Weights, device: torch.device) -> AlexNet:
    """The network on `device`, in evaluation mode, float32, channels last."""
    with torch.device("meta"):  # no initial weights are drawn in vain
        net = AlexNet(weights.recipe, weights.num_classes)
    net.load_state_dict({name: tensor.float() for name, tensor in weights.state.items()}, assign=True)
    net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net.eval()


def parse_classes(raw: Any, where: str, num_classes: int) -> Classes:
    """Class names as JSON holds them: [wnid, name] each, in the order of the outputs. Raises UserError."""
    try:
        classes = tuple(ClassEntry(index, str(wnid), str(name)) for index, (wnid, name) in enumerate(raw))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: class names cannot be read ({error}); expected pairs of wnid and name") from error
    if len(classes) != num_classes:
        raise UserError(f"{where}: {len(classes)} class names for a net of {num_classes} classes")
    return classes


def list_classes(classes: Classes) -> list[list[str]]:
    """What `parse_classes` reads."""
    return [[entry.wnid, entry.name] for entry in classes]


def find_newest(runs: Path) -> Path:
    """The run in `runs` that saved a checkpoint last. Raises UserError if there is none."""
    found = [path for path in runs.glob(f"*/{CHECKPOINTS}/{LAST}") if path.is_file()] if runs.is_dir() else []
    if not found:
        raise UserError(f"{runs}: no run with a checkpoint; name one with --run, or a file with --weights")
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent.parent
