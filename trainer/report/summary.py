"""What came of a run: its pictures and the few numbers one asks for first.

The decision that shaped it: everything is made from a Study (study.py), so that pictures, summary and page say the same
of a run, and a picture that cannot be made is named with the reason. Left out: drawing (figures*.py, diagram.py), the
page (htmlreport.py) and measuring (a run logs what it measures; alexnet-eval does more).
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.report.curves import curves_figure, name_runs, overfitting_figure, training_errors_figure
from trainer.report.data import Study, num_towers, read_study
from trainer.report.diagram import network_figure
from trainer.report.pictures import guesses_figure, kernels_figure, neighbours_figure, write_png

FIGURES, CURVES, KERNELS, NETWORK = "figures", "curves.png", "conv1_kernels.png", "network.png"
GUESSES, NEIGHBOURS = "guesses.png", "neighbours.png"
TRAINING_ERRORS, OVERFITTING = "training_errors.png", "training_and_validation.png"


def report(run: Path, *, shards: str | None = None, num_images: int = 0) -> dict[str, Any]:
    """Draw the run's pictures into run/figures, and sum it up: `read_study`, `draw`, `summarise`."""
    study = read_study(run, shards=shards, num_images=num_images)
    return summarise(study, draw(study))


def draw(study: Study) -> list[Path]:
    """The run's pictures, into run/figures: curves; of a run with a checkpoint kernels and the network's diagram; with
    examples, what the net says to eight images, and the training images nearest to some."""
    folder = study.run / FIGURES
    figures = {CURVES: curves_figure(study.metrics, study.num_classes)}
    if study.weights:
        figures[KERNELS] = kernels_figure(study.weights["conv1.weight"].numpy(), num_towers(study.weights))
    if study.model:
        figures[NETWORK] = network_figure(study.model)
    if study.examples:
        names = [name for _, name in study.classes]
        figures[GUESSES] = guesses_figure(study.examples.guesses, names)
        figures[NEIGHBOURS] = neighbours_figure(study.examples.rows, names, study.examples.num_searched)
    for name, figure in figures.items():
        write_png(figure, folder / name)
    return [folder / name for name in figures]


def summarise(study: Study, figures: Sequence[Path] = ()) -> dict[str, Any]:
    """A run in a few numbers, ready for JSON: run, num_epochs; top1_error, top5_error (%, centre crop) and best_epoch
    of the best evaluation; ten_crop_top1_error, ten_crop_top5_error (%) of the last one with ten crops; images_per_s
    (median), data_wait_fraction (mean, 0 to 1); checkpoint and figures (paths); left_out: what could not be drawn, and
    why. What the run does not have yet is None."""
    train, evals = study.records("train"), study.records("eval")
    centre = [record for record in evals if record["crops"] == "centre" and record["top1_error"] is not None]
    best = min(centre, key=lambda record: record["top1_error"], default={})
    ten: dict[str, Any] = next((record for record in reversed(evals) if record["crops"] == "ten"), {})
    rates = [record["images_per_s"] for record in train if record["images_per_s"] is not None]
    waits = [record["data_wait_fraction"] for record in train if record["data_wait_fraction"] is not None]
    return {
        "run": str(study.run),
        "num_epochs": max(record["epoch"] for record in (*train, *evals)),
        "best_epoch": best.get("epoch"),
        "top1_error": best.get("top1_error"),
        "top5_error": best.get("top5_error"),
        "ten_crop_top1_error": ten.get("top1_error"),
        "ten_crop_top5_error": ten.get("top5_error"),
        "images_per_s": statistics.median(rates) if rates else None,
        "data_wait_fraction": statistics.fmean(waits) if waits else None,
        "checkpoint": str(study.saved) if study.saved else None,
        "figures": [str(figure) for figure in figures],
        "left_out": study.left_out,
    }


def label_runs(studies: Sequence[Study]) -> list[str]:
    """A label for each run, all different: what sets their recipes apart, else their names, else their folders."""
    labels = name_runs([study.name for study in studies], [study.config.get("recipe", {}) for study in studies])
    return labels if len(set(labels)) == len(labels) else [str(study.run) for study in studies]


def compare(studies: Sequence[Study]) -> list[Path]:
    """Draw several runs into the first one's figures: training errors as the paper's figure 1, and training beside
    validation. Returns the paths."""
    metrics = dict(zip(label_runs(studies), (study.metrics for study in studies), strict=True))
    folder = studies[0].run / FIGURES
    write_png(training_errors_figure(metrics), folder / TRAINING_ERRORS)
    write_png(overfitting_figure(metrics), folder / OVERFITTING)
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
