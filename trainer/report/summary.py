"""A run's pictures, and the few numbers one asks for first."""

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.record.runs import CONFIG
from trainer.report.curves import curves_figure, overfitting_figure, training_errors_figure
from trainer.report.data import RunData, count_towers
from trainer.report.diagram import network_figure
from trainer.report.pictures import guesses_figure, kernels_figure, neighbours_figure, write_png

FIGURES = "figures"
_LONGEST_NAME = 150  # bytes of a folder's name; file systems take 255
_SAID_OF_CONFIG = ("seed", "shards", "world_size", "device")


def draw(data: RunData) -> list[Path]:
    """The run's pictures, into run/figures: curves; of a run with a checkpoint kernels and the network's diagram; with
    examples, what the net says to eight images, and the training images nearest to some. Returns the paths."""
    figures = {"curves.png": curves_figure(data.metrics, data.num_classes)}
    if data.weights:
        figures["conv1_kernels.png"] = kernels_figure(data.weights["conv1.weight"].numpy(), count_towers(data.weights))
    if data.model:
        figures["network.png"] = network_figure(data.model)
    if data.examples:
        names, found = data.class_names, data.examples
        figures["guesses.png"] = guesses_figure(found.guesses, names)
        figures["neighbours.png"] = neighbours_figure(found.rows, names, found.num_searched)
    for name, figure in figures.items():
        write_png(figure, data.run / FIGURES / name)
    return [data.run / FIGURES / name for name in figures]


def choose_place(runs: Sequence[Path]) -> Path:
    """The folder for what compares several runs, beside the first of them: ONE+OTHER, which is no run's name."""
    names, first = [run.resolve().name for run in runs], runs[0]
    name = "+".join(names)
    if len(name.encode()) > _LONGEST_NAME:
        name = f"{names[0]}+{len(names) - 1}-others-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    parent = first.parent if first.name == names[0] else first.resolve().parent
    while (parent / name / CONFIG).exists():  # a run's folder after all, renamed by somebody
        name += "+"
    return parent / name


def compare(runs: Sequence[RunData], folder: Path) -> list[Path]:
    """Draw several runs into `folder`: training errors as the paper's figure 1, and training beside validation. Returns
    the paths."""
    metrics = dict(zip(label_runs(runs), (data.metrics for data in runs), strict=True))
    paths = [folder / name for name in ("training_errors.png", "training_and_validation.png")]
    write_png(training_errors_figure(metrics), paths[0])
    write_png(overfitting_figure(metrics), paths[1])
    return paths


def label_runs(runs: Sequence[RunData]) -> list[str]:
    """A label for each run: its name, or its folder where two have one name, and all that sets these runs apart."""
    names = [data.name for data in runs]
    if len(set(names)) < len(names):
        names = [str(data.run) for data in runs]
    settings = [_list_settings(data.config) for data in runs]
    known = list(dict.fromkeys(field for each in settings for field in each))
    differing = [field for field in known if len({each[field] for each in settings if field in each}) > 1]
    told = [", ".join(each[field] for field in differing if field in each) for each in settings]
    return [f"{name}: {text}" if text else name for name, text in zip(names, told, strict=True)]


def _list_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """What a run was asked to do, each as it is said."""
    recipe, weights, parallel = (config.get(name) or {} for name in ("recipe", "weights", "parallel"))
    said = {
        field: str(value) if field == "activation" else f"{'recipe' if field == 'name' else field} {value}".lower()
        for field, value in recipe.items()
    }
    said |= {name: f"{name.replace('_', ' ')} {config[name]}" for name in _SAID_OF_CONFIG if name in config}
    if recipe:
        said["weights"] = f"from {weights.get('source')}" if weights else "from new weights"
    if "world_size" in config:
        said["parallel"] = f"{parallel.get('mode', 'data')} parallel"
    return said


def summarise(data: RunData, figures: Sequence[Path] = ()) -> dict[str, Any]:
    """A run in a few numbers, ready for JSON: run, num_epochs; top1_error, top5_error (%, centre crop) and best_epoch
    of the best evaluation; ten_crop_top1_error, ten_crop_top5_error (%) of the last one with ten crops; images_per_s
    (median), data_wait_fraction (mean, 0 to 1); checkpoint and figures (paths); left_out: what could not be drawn, and
    why. What the run does not have yet is None."""
    train, evals = data.records("train"), data.records("eval")
    centre = [record for record in evals if record["crops"] == "centre" and record["top1_error"] is not None]
    best = min(centre, key=lambda record: record["top1_error"], default={})
    ten: dict[str, Any] = next((record for record in reversed(evals) if record["crops"] == "ten"), {})
    rates = [record["images_per_s"] for record in train if record["images_per_s"] is not None]
    waits = [record["data_wait_fraction"] for record in train if record["data_wait_fraction"] is not None]
    return {
        "run": str(data.run),
        "num_epochs": max(record["epoch"] for record in (*train, *evals)),
        "best_epoch": best.get("epoch"),
        "top1_error": best.get("top1_error"),
        "top5_error": best.get("top5_error"),
        "ten_crop_top1_error": ten.get("top1_error"),
        "ten_crop_top5_error": ten.get("top5_error"),
        "images_per_s": statistics.median(rates) if rates else None,
        "data_wait_fraction": statistics.fmean(waits) if waits else None,
        "checkpoint": str(data.checkpoint) if data.checkpoint else None,
        "figures": [str(figure) for figure in figures],
        "left_out": data.left_out,
    }


def format_summary(summary: dict[str, Any]) -> str:
    """What `summarise` returns as plain lines for a person."""
    lines = [("run", summary["run"]), ("epochs", str(summary["num_epochs"]))]
    if summary["best_epoch"] is not None:
        best = f"{_errors(summary['top1_error'], summary['top5_error'])}  (centre crop, epoch {summary['best_epoch']})"
        lines.append(("best error", best))
    if summary["ten_crop_top1_error"] is not None:
        lines.append(("ten crops", _errors(summary["ten_crop_top1_error"], summary["ten_crop_top5_error"])))
    if summary["images_per_s"] is not None:
        speed = f"{summary['images_per_s']:,.0f} images/s (median)"
        if summary["data_wait_fraction"] is not None:
            speed += f", {100 * summary['data_wait_fraction']:.1f} % of the time waiting for data"
        lines.append(("training", speed))
    if summary["checkpoint"] is None:
        lines.append(("kernels", "no checkpoint yet, so no picture of them"))
    lines += [("" if index else "pictures", path) for index, path in enumerate(summary["figures"])]
    lines += [("not drawn", reason) for reason in summary["left_out"]]
    return "\n".join(f"{label:<12}{text}" for label, text in lines)


def _errors(top1: float, top5: float | None) -> str:
    return f"top-1 {top1:.2f} %" + (f"  top-5 {top5:.2f} %" if top5 is not None else "")
