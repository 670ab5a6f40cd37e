"""What lies in a run's folder, read once for everything that is made of it: summary, pictures, the page."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.colors import ColorStats
from pipeline.common.console import spell_command
from pipeline.common.errors import UserError
from pipeline.shards import ShardSet
from trainer import checkpoint
from trainer.model import AlexNet
from trainer.nets.weights import Classes, Weights, make_net, parse_classes
from trainer.recipe import from_dict
from trainer.record.metrics import read_metrics
from trainer.record.runs import BEST, CHECKPOINTS, CONFIG, ENVIRONMENT, LAST, METRICS, read_config
from trainer.report.confusion import Predictions, read_predictions

if TYPE_CHECKING:
    from trainer.report.examples import Examples

PREDICTIONS = "predictions.csv"
Record = dict[str, Any]


@dataclass(eq=False)
class RunData:
    """A run as it is, also while it goes on: what is not there yet is None or empty.

    metrics: the records of metrics.jsonl; checkpoint: the best net so far, else the last; weights: its
    tensors, float32, by name; classes: by index, empty if unknown; left_out: what cannot be had, and why.
    """

    run: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[Record]
    checkpoint: Path | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    model: AlexNet | None = None
    classes: Classes = ()
    examples: "Examples | None" = None
    predictions: Predictions | None = None
    left_out: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.run.resolve().name

    @property
    def num_classes(self) -> int | None:
        return len(self.weights["fc8.weight"]) if "fc8.weight" in self.weights else len(self.classes) or None

    @property
    def class_names(self) -> list[str]:
        return [entry.name for entry in self.classes]

    def records(self, kind: str) -> list[Record]:
        return [record for record in self.metrics if record["kind"] == kind]


def read_run(run: Path, *, shards: str | None = None, num_images: int = 0, predictions: Path | None = None) -> RunData:
    """Everything about a run. With `num_images`, what the net says to validation images, and for five of them the
    nearest of so many training images; `shards` (default: the run's own) holds both. `predictions`: a file of
    `alexnet-eval --predictions`, default: the run's predictions.csv if there is one.

    Raises UserError if nothing has been measured yet, if a file is damaged, or if what was named cannot be used.
    """
    config = read_config(run) if (run / CONFIG).is_file() else {}
    data = RunData(run, config, _read_environment(run), read_measurements(run))
    classes = config.get("classes", [])
    data.classes = parse_classes(classes, f"{run / CONFIG}", len(classes) if isinstance(classes, list) else 0)
    saved = (run / CHECKPOINTS / name for name in (BEST, LAST))
    data.checkpoint = next((path for path in saved if path.is_file()), None)
    if data.checkpoint:
        state = checkpoint.load(data.checkpoint)
        data.weights = _read_weights(state, data.checkpoint)
        try:
            data.model = _make_model(state, data.weights)
        except UserError as error:
            data.left_out.append(f"network and images: {error}")
        if data.model and num_images:
            _look_at_images(data, data.model, shards, str(state.get("shards_fingerprint", "")), num_images)
    file = predictions or run / PREDICTIONS
    if (predictions or file.is_file()) and data.classes:
        data.predictions = read_predictions(file, [entry.wnid for entry in data.classes])
    elif predictions:
        raise UserError(
            f"{run}: does not hold its classes, so {file} cannot be read; name the run's shards with --shards"
        )
    elif file.is_file():
        data.left_out.append(f"{file.name}: the run does not hold its classes; name its shards with --shards")
    return data


def read_measurements(run: Path) -> list[Record]:
    """The records of a run. Raises UserError if it has measured nothing yet."""
    path = run / METRICS
    metrics = read_metrics(path) if path.exists() else []
    if not any(record["kind"] in ("train", "eval") for record in metrics):
        raise UserError(
            f"{path}: no measurements yet, expected at least one line of training; "
            f"let the run go on ({spell_command('alexnet-train', '--resume', run)}), or name another run"
        )
    return metrics


def _read_environment(run: Path) -> dict[str, Any]:
    """Best effort, as the record itself: a report does not fail for want of it."""
    try:
        found = json.loads((run / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_weights(state: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """The net's tensors, as float32. Raises UserError for a checkpoint that holds no AlexNet."""
    model = state.get("model")
    tensors = model.items() if isinstance(model, dict) else ()
    weights = {name: value.detach().float() for name, value in tensors if isinstance(value, torch.Tensor)}
    shape = tuple(weights["conv1.weight"].shape) if "conv1.weight" in weights else None
    if shape is None or len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise UserError(
            f"{path}: conv1.weight has shape {shape}, expected (kernels, 3, height, width); "
            "use a checkpoint that alexnet-train saved"
        )
    return weights


def _make_model(state: dict[str, Any], weights: dict[str, torch.Tensor]) -> AlexNet:
    """The net of a checkpoint. Raises UserError for one without a recipe, or of another version's."""
    if not isinstance(state.get("recipe"), dict) or not isinstance(state.get("num_classes"), int):
        raise UserError("the checkpoint holds no recipe; draw them from one that alexnet-train saved")
    return make_net(Weights("", from_dict(state["recipe"]), weights), torch.device("cpu"))


def _look_at_images(data: RunData, model: AlexNet, shards: str | None, fingerprint: str, num_images: int) -> None:
    """Where the shards are at hand, else a line in `left_out`; shards that were named must be."""
    from trainer.report.examples import find_examples  # here: this needs DALI, all else does not

    try:
        location = shards or data.config.get("shards", "")
        if not shards and "://" in location:
            raise UserError(f"the shards are at {location}; name them with --shards to fetch some of them")
        opened = ShardSet.open(location)
        data.examples = find_examples(model, opened, ColorStats.load(opened.root, fingerprint), num_images)
    except UserError as error:
        if shards:
            raise
        data.left_out.append(f"images: {error}")
        return
    data.classes = opened.manifest.classes
    data.predictions = data.examples.predictions


def count_towers(weights: dict[str, torch.Tensor]) -> int:
    """A kernel of conv2 sees one tower's maps: their number tells the towers apart."""
    kernels, conv2 = len(weights["conv1.weight"]), weights.get("conv2.weight")
    maps = conv2.shape[1] if conv2 is not None and conv2.ndim == 4 else kernels
    return kernels // maps if maps and kernels % maps == 0 else 1
