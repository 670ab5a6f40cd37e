"""What came of a run: its pictures and the few numbers one asks for first.

The decision that shaped it: a report is made from what lies in the run's folder, at any time, also while the run goes
on; only pictures of images need the run's shards, and a picture that cannot be made is named with the reason. What
the first layer looks like (classes, towers) is read from the weights themselves. Left out: drawing (figures*.py,
diagram.py) and measuring (a run logs what it measures; alexnet-eval does more).
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.colorstats import ColorStats
from pipeline.errors import UserError
from pipeline.shardset import ShardSet
from trainer import checkpoint
from trainer.diagram import plot_network
from trainer.figures import plot_curves, plot_kernels
from trainer.figures_runs import name_runs, plot_overfitting, plot_training_errors
from trainer.model import AlexNet
from trainer.recipe import from_dict
from trainer.runlog import BEST, CHECKPOINTS, LAST, METRICS, read_config, read_metrics

FIGURES, CURVES, KERNELS, NETWORK = "figures", "curves.png", "conv1_kernels.png", "network.png"
GUESSES, NEIGHBOURS = "guesses.png", "neighbours.png"
TRAINING_ERRORS, OVERFITTING = "training_errors.png", "training_and_validation.png"


def report(run: Path, *, shards: str | None = None, num_images: int = 0) -> dict[str, Any]:
    """Draw the run's pictures into run/figures, and sum it up.

    Curves, kernels and the network's diagram come from the run alone. With `num_images`, also what the net says to
    eight validation images, and for five of them the nearest of so many training images; `shards` (default: the run's
    own) holds both.

    Returns, ready for JSON: run, num_epochs; top1_error, top5_error (%, centre crop) and best_epoch of the best
    evaluation; ten_crop_top1_error, ten_crop_top5_error (%) of the last one with ten crops; images_per_s (median),
    data_wait_fraction (mean, 0 to 1); checkpoint and figures (paths); left_out: what could not be drawn, and why. What
    the run does not have yet is None.

    Raises UserError if nothing has been measured yet, if the metrics or the checkpoint are damaged, or if the `shards`
    given are not the run's.
    """
    metrics = _read(run)
    train = [record for record in metrics if record["kind"] == "train"]
    evals = [record for record in metrics if record["kind"] == "eval"]
    saved = _best_checkpoint(run)
    state = checkpoint.load(saved) if saved else {}
    weights = _weights(state, saved) if saved else {}
    folder, left_out = run / FIGURES, list[str]()
    figures = [folder / CURVES]
    plot_curves(metrics, folder / CURVES, num_classes=len(weights["fc8.weight"]) if "fc8.weight" in weights else None)
    if saved:
        figures.append(folder / KERNELS)
        plot_kernels(weights["conv1.weight"].numpy(), folder / KERNELS, _num_towers(weights))
        try:
            model = _rebuild(state)
        except UserError as error:
            left_out.append(f"network and images: {error}")
        else:
            plot_network(model, folder / NETWORK)
            figures.append(folder / NETWORK)
            if num_images:
                figures += _draw_examples(run, model, state, shards, num_images, left_out)

    centre = [record for record in evals if record["crops"] == "centre" and record["top1_error"] is not None]
    best = min(centre, key=lambda record: record["top1_error"], default={})
    ten: dict[str, Any] = next((record for record in reversed(evals) if record["crops"] == "ten"), {})
    rates = [record["images_per_s"] for record in train if record["images_per_s"] is not None]
    waits = [record["data_wait_fraction"] for record in train if record["data_wait_fraction"] is not None]
    return {
        "run": str(run),
        "num_epochs": max(record["epoch"] for record in (*train, *evals)),
        "best_epoch": best.get("epoch"),
        "top1_error": best.get("top1_error"),
        "top5_error": best.get("top5_error"),
        "ten_crop_top1_error": ten.get("top1_error"),
        "ten_crop_top5_error": ten.get("top5_error"),
        "images_per_s": statistics.median(rates) if rates else None,
        "data_wait_fraction": statistics.fmean(waits) if waits else None,
        "checkpoint": str(saved) if saved else None,
        "figures": [str(figure) for figure in figures],
        "left_out": left_out,
    }


def compare(runs: Sequence[Path]) -> list[Path]:
    """Draw several runs into the first one's figures: training errors as the paper's figure 1, and training beside
    validation. Returns the paths. Raises UserError as `report` does."""
    configs = [read_config(run) for run in runs]
    labels = name_runs([run.resolve().name for run in runs], [config.get("recipe", {}) for config in configs])
    if len(set(labels)) < len(labels):
        labels = [str(run) for run in runs]
    metrics = dict(zip(labels, (_read(run) for run in runs), strict=True))
    folder = runs[0] / FIGURES
    plot_training_errors(metrics, folder / TRAINING_ERRORS)
    plot_overfitting(metrics, folder / OVERFITTING)
    return [folder / TRAINING_ERRORS, folder / OVERFITTING]


def format_summary(summary: dict[str, Any]) -> str:
    """`report`'s summary as plain lines for a person."""
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


def _best_checkpoint(run: Path) -> Path | None:
    saved = (run / CHECKPOINTS / name for name in (BEST, LAST))
    return next((path for path in saved if path.is_file()), None)


def _read(run: Path) -> list[dict[str, Any]]:
    """The records of a run. Raises UserError if it has measured nothing yet."""
    path = run / METRICS
    metrics = read_metrics(path) if path.exists() else []
    if not any(record["kind"] in ("train", "eval") for record in metrics):
        raise UserError(
            f"{path}: no measurements yet, expected at least one line of training; "
            "let the run go on (alexnet-train --resume), or name another run"
        )
    return metrics


def _rebuild(state: dict[str, Any]) -> AlexNet:
    """The net of a checkpoint. Raises UserError for one without a recipe, or of another version's."""
    if not isinstance(state.get("recipe"), dict) or not isinstance(state.get("num_classes"), int):
        raise UserError("the checkpoint holds no recipe; draw them from one that alexnet-train saved")
    model = AlexNet.from_recipe(from_dict(state["recipe"]), state["num_classes"])
    model.load_state_dict(state["model"])
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def _draw_examples(
    run: Path, model: AlexNet, state: dict[str, Any], shards: str | None, num_images: int, left_out: list[str]
) -> list[Path]:
    """Pictures of images where the shards are at hand, else a line in `left_out`; shards that were named must be."""
    from trainer.examples import find_examples  # here: these need DALI, all else does not
    from trainer.figures_images import plot_guesses, plot_neighbours

    try:
        location = shards or read_config(run).get("shards", "")
        if not shards and "://" in location:
            raise UserError(f"the shards are at {location}; name them with --shards to fetch some of them")
        opened = ShardSet.open(location)
        colors = ColorStats.load(opened.root, state.get("shards_fingerprint", ""))
        examples = find_examples(model, opened, colors, num_images)
    except UserError as error:
        if shards:
            raise
        left_out.append(f"images: {error}")
        return []
    names = [entry.name for entry in opened.manifest.classes]
    plot_guesses(examples, names, run / FIGURES / GUESSES)
    plot_neighbours(examples, names, run / FIGURES / NEIGHBOURS)
    return [run / FIGURES / GUESSES, run / FIGURES / NEIGHBOURS]


def _weights(state: dict[str, Any], path: Path | None) -> dict[str, torch.Tensor]:
    """The net's tensors, as float32. Raises UserError for a checkpoint that holds no AlexNet."""
    model = state.get("model")
    weights = {
        name: value.detach().float()
        for name, value in (model.items() if isinstance(model, dict) else ())
        if isinstance(value, torch.Tensor)
    }
    shape = tuple(weights["conv1.weight"].shape) if "conv1.weight" in weights else None
    if shape is None or len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise UserError(
            f"{path}: conv1.weight has shape {shape}, expected (kernels, 3, height, width); "
            "use a checkpoint that alexnet-train saved"
        )
    return weights


def _num_towers(weights: dict[str, torch.Tensor]) -> int:
    """A kernel of conv2 sees one tower's maps: their number tells the towers apart."""
    kernels, conv2 = len(weights["conv1.weight"]), weights.get("conv2.weight")
    maps = conv2.shape[1] if conv2 is not None and conv2.ndim == 4 else kernels
    return kernels // maps if maps and kernels % maps == 0 else 1
