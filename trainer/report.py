"""What came of a run: its pictures and the few numbers one asks for first.

The decision that shaped it: a report is made from what lies in the run's folder and from nothing else, so it can be
made anywhere, at any time, also while the run goes on. What the net looks like (classes, towers) is read from the
weights themselves. Left out: drawing (figures.py) and measuring (a run logs what it measures; alexnet-eval does more).
"""

import statistics
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from trainer import checkpoint
from trainer.figures import plot_curves, plot_kernels
from trainer.runlog import BEST, CHECKPOINTS, LAST, METRICS, read_metrics

FIGURES, CURVES, KERNELS = "figures", "curves.png", "conv1_kernels.png"


def report(run: Path) -> dict[str, Any]:
    """Draw the run's curves and kernels into run/figures, and sum it up.

    Returns, ready for JSON: run, num_epochs; top1_error, top5_error (%, centre crop) and best_epoch of the best
    evaluation; ten_crop_top1_error, ten_crop_top5_error (%) of the last one with ten crops; images_per_s (median),
    data_wait_fraction (mean, 0 to 1); checkpoint and figures (paths). What the run does not have yet is None.

    Raises UserError if nothing has been measured yet, or if the metrics or the checkpoint are damaged.
    """
    path = run / METRICS
    metrics = read_metrics(path) if path.exists() else []
    train = [record for record in metrics if record["kind"] == "train"]
    evals = [record for record in metrics if record["kind"] == "eval"]
    if not train and not evals:
        raise UserError(
            f"{path}: no measurements yet, expected at least one line of training; "
            "let the run go on (alexnet-train --resume), or name another run"
        )
    saved = _best_checkpoint(run)
    weights = _weights(saved) if saved else {}
    figures = [run / FIGURES / CURVES]
    plot_curves(metrics, figures[0], num_classes=len(weights["fc8.weight"]) if "fc8.weight" in weights else None)
    if saved:
        figures.append(run / FIGURES / KERNELS)
        plot_kernels(weights["conv1.weight"].numpy(), figures[1], _num_towers(weights))

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
    }


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
    return "\n".join(f"{label:<12}{text}" for label, text in lines)


def _errors(top1: float, top5: float | None) -> str:
    return f"top-1 {top1:.2f} %" + (f"  top-5 {top5:.2f} %" if top5 is not None else "")


def _best_checkpoint(run: Path) -> Path | None:
    saved = (run / CHECKPOINTS / name for name in (BEST, LAST))
    return next((path for path in saved if path.is_file()), None)


def _weights(path: Path) -> dict[str, torch.Tensor]:
    """The net's tensors, as float32. Raises UserError for a checkpoint that holds no AlexNet."""
    model = checkpoint.load(path).get("model")
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
