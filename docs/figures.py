"""The figures and numbers of questions.md, from shards, a run and two runs to compare, in one command.

    python docs/figures.py --shards clothing-shards --run runs/dropout-05 --compare runs/dropout-05 runs/dropout-0

Whatever questions.md shows or states of data or a net is made here from the files named, the same from the same files,
and printed as JSON. What training itself draws: alexnet-report.
"""

import argparse
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.colors import ColorStats  # noqa: E402
from pipeline.common.errors import UserError  # noqa: E402
from pipeline.common.files import write_atomic  # noqa: E402
from pipeline.loader import EvalLoader, TrainLoader, read_pixels  # noqa: E402
from pipeline.options import Transform  # noqa: E402
from pipeline.shards import ShardSet  # noqa: E402
from trainer import checkpoint  # noqa: E402
from trainer.evaluate import count_errors  # noqa: E402
from trainer.model import AlexNet, local_response_norm  # noqa: E402
from trainer.recipe import from_dict  # noqa: E402
from trainer.record.metrics import read_metrics  # noqa: E402
from trainer.record.runs import CHECKPOINTS, LAST, METRICS, read_config  # noqa: E402
from trainer.report.curves import name_runs, overfitting_figure, training_error  # noqa: E402
from trainer.report.pictures import BLUE, GREEN, GREY, ORANGE, VERMILION, new_figure, style  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110
NUM_COLOURS = 256  # of a saved picture: photographs in a page need no more
BATCH = 64
LABEL_GREY = 14.0  # from the head of an arrow to its name
Image = NDArray[np.uint8]
Floats = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description="The figures and numbers of questions.md.")
    parser.add_argument("--shards", default="shards")
    parser.add_argument("--run", help="a run on these shards: response normalisation on its conv1")
    parser.add_argument("--compare", nargs="+", default=[], help="runs whose curves are set side by side")
    parser.add_argument("--image", type=int, default=0, help="position of the validation image that is shown")
    parser.add_argument("--out", default=str(ROOT / "docs" / "images"))
    options = parser.parse_args()
    try:
        print(json.dumps(make(options), indent=1))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def make(options: argparse.Namespace) -> dict[str, Any]:
    """Write every figure that the arguments allow; the numbers."""
    shards = ShardSet.open(options.shards)
    colors = ColorStats.load(shards.root, shards.fingerprint)
    out = Path(options.out)
    images = first_images(shards, "val", max(BATCH, options.image + 1))
    if options.image >= len(images):
        raise UserError(f"--image {options.image}: expected less than {len(images)}, the validation images there are")
    image = images[options.image]
    numbers: dict[str, Any] = {
        "mean": subtracting_the_mean(colors.mean, colors.covariance),
        "saturation": saturation(),
        "bits": bits(shards.num_classes, shards.num_samples("train"), label_counts(shards)),
        "colour": colour_shifts(colors) | {"rms_drawn": drawn_shifts(shards, colors)},
    }
    save(mean_figure(image, colors.mean_image, shards.num_samples("train")), out / "question-mean.png")
    save(saturation_figure(), out / "question-saturation.png")
    save(colour_figure(image, images, colors), out / "question-colour.png")
    if options.run:
        maps = conv1_maps(load_model(Path(options.run)), shards, colors)
        numbers["normalisation"] = normalisation(maps["relu"], maps["scale"])
        save(normalisation_figure(maps["relu"] * maps["scale"], maps["towers"]), out / "question-normalisation.png")
    if options.compare:
        runs = [Path(run) for run in options.compare]
        recipes = [read_config(run)["recipe"] for run in runs]
        names = name_runs([run.name for run in runs], recipes)
        metrics = {name: read_metrics(run / METRICS) for name, run in zip(names, runs, strict=True)}
        save(overfitting_figure(metrics), out / "question-dropout.png")
        numbers["runs"] = {
            name: run_numbers(metrics[name], load_model(run), shards, colors)
            for name, run in zip(names, runs, strict=True)
        }
    return numbers


# Data and nets.


def first_images(shards: ShardSet, split: str, number: int) -> list[Image]:
    """Up to `number` stored images (256, 256, 3) of a split."""
    images: list[Image] = []
    for batch in read_pixels(shards, split=split):
        images += list(batch.images.numpy().copy())
        if len(images) >= number:
            break
    return images[:number]


def label_counts(shards: ShardSet) -> list[int]:
    """Training images of each class."""
    counts = np.zeros(shards.num_classes, dtype=np.int64)
    for batch in read_pixels(shards, split="train"):
        counts += np.bincount(batch.labels.numpy(), minlength=len(counts))
    return counts.tolist()


def load_model(run: Path) -> AlexNet:
    """The net of a run's last checkpoint."""
    state = checkpoint.load(run / CHECKPOINTS / LAST)
    model = AlexNet.from_recipe(from_dict(state["recipe"]), state["num_classes"])
    model.load_state_dict(state["model"])
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def eval_loader(model: AlexNet, shards: ShardSet, colors: ColorStats, split: str) -> EvalLoader:
    return EvalLoader(shards, colors, model.recipe.transform(train=False), batch_size=BATCH, split=split)


@torch.no_grad()
def conv1_maps(model: AlexNet, shards: ShardSet, colors: ColorStats) -> dict[str, Any]:
    """Of a batch of validation images: what conv1 gives after the ReLU (B, maps, 55, 55); the number of towers; what
    brings these maps to pixels of 0-255, on which the paper's constants were set (1 where the net saw such)."""
    images, _ = next(iter(eval_loader(model, shards, colors, "val")))
    kept: list[Tensor] = []
    hook = model.conv1.register_forward_hook(lambda _, __, output: kept.append(torch.relu(output)))
    model(images)
    hook.remove()
    scale = float(colors.std.mean()) if model.recipe.unit_variance else 1.0
    return {"relu": kept[0], "towers": model.recipe.num_towers, "scale": scale}


@torch.no_grad()
def run_numbers(
    metrics: Sequence[dict[str, Any]], model: AlexNet, shards: ShardSet, colors: ColorStats
) -> dict[str, float]:
    """Errors in % of the last epoch as logged, and of its checkpoint on the training images without noise."""
    last = [record for record in metrics if record["kind"] == "eval" and record["crops"] == "centre"][-1]
    sums = torch.zeros(4, dtype=torch.float64)
    for images, labels in eval_loader(model, shards, colors, "train"):
        sums += count_errors(model(images), labels)
    count, loss, wrong, _ = sums.tolist()
    logged = {field: dict(zip(*training_error(metrics, field), strict=True)) for field in ("top1_error", "loss")}
    return {
        "epochs": last["epoch"],
        "training_error_with_noise": logged["top1_error"][last["epoch"]],  # a later epoch may be under way
        "training_loss_with_noise": logged["loss"][last["epoch"]],
        "training_error": 100 * wrong / count,
        "training_loss": loss / count,
        "validation_error": last["top1_error"],
        "validation_loss": last["loss"],
        "lowest_validation_loss": min(r["loss"] for r in metrics if r["kind"] == "eval" and r["crops"] == "centre"),
    }


# Numbers.


def subtracting_the_mean(mean: Floats, covariance: Floats) -> dict[str, float]:
    """The curvature that a weight vector on one pixel's colours sees, with the mean in and out of the pixels."""
    raw = np.linalg.eigvalsh(covariance + np.outer(mean, mean))
    centred = np.linalg.eigvalsh(covariance)
    return {
        "share_of_mean_square_that_is_the_mean": float(mean @ mean / (np.trace(covariance) + mean @ mean)),
        "largest_curvature_raw": float(raw[-1]),
        "largest_curvature_centred": float(centred[-1]),
        "condition_raw": float(raw[-1] / raw[0]),
        "condition_centred": float(centred[-1] / centred[0]),
    }


def saturation() -> dict[str, float]:
    """Slopes of tanh and the logistic function, and what seven layers leave of a gradient."""
    slopes = {x: 1.0 - math.tanh(x) ** 2 for x in (0.0, 1.0, 2.0, 3.0)}
    return {f"tanh_slope_at_{x:g}": slope for x, slope in slopes.items()} | {
        "logistic_largest_slope": 0.25,
        "seven_tanh_layers_at_1": slopes[1.0] ** 7,
        "seven_tanh_layers_at_2": slopes[2.0] ** 7,
    }


def bits(num_classes: int, num_images: int, counts: Sequence[int]) -> dict[str, float]:
    """What a label says at most, in bits: of 1000 classes and of the shards' own; and what an image holds."""
    shares = np.array([count for count in counts if count]) / sum(counts)
    return {
        "log2_1000": math.log2(1000),
        "imagenet_labels_bits": 1_281_167 * math.log2(1000),
        "image_bits": 224 * 224 * 3 * 8,
        "log2_classes": math.log2(num_classes),
        "entropy_of_labels": float(-(shares * np.log2(shares)).sum()),
        "labels_bits": float(-(shares * np.log2(shares)).sum()) * num_images,
    }


def colour_shifts(colors: ColorStats) -> dict[str, Any]:
    """Share of the colours' variance along each axis, and the root-mean-square shift a channel, in grey levels."""
    share = colors.eigenvalues / colors.eigenvalues.sum()
    rms = {kind: np.sqrt((colors.lighting_basis(kind) ** 2).sum(axis=1)).tolist() for kind in ("paper", "original")}
    return {"share": share.tolist(), "eigenvectors": colors.eigenvectors.tolist(), "rms_shift": rms}


def drawn_shifts(shards: ShardSet, colors: ColorStats) -> dict[str, list[float]]:
    """The root-mean-square colour shift a channel, in grey levels, as the training loader drew it for one epoch."""
    drawn = {}
    for kind in ("paper", "original"):
        loader = TrainLoader(shards, colors, Transform(lighting=kind, dtype="uint8"), global_batch_size=BATCH)
        shifts = torch.cat([loader.draws.shift for _ in loader if loader.draws is not None])
        drawn[kind] = shifts.double().square().mean(0).sqrt().tolist()
    return drawn


def normalisation(relu: Tensor, scale: float) -> dict[str, float]:
    """Response and batch normalisation of the same maps: the range of the divisor, and who depends on the other images.

    `relu` (B, maps, rows, columns) as the net has them; times `scale`, as the paper's net would.
    """
    found: dict[str, float] = {}
    for name, maps in (("as_trained", relu), ("on_0_255", relu * scale)):
        active = maps > 0
        divisor = (maps / local_response_norm(maps))[active]
        low, high = torch.quantile(
            divisor.float()[:: max(1, len(divisor) // 10**6)], torch.tensor([0.01, 0.99])
        ).tolist()
        found |= {f"divisor_1_percent_{name}": low, f"divisor_99_percent_{name}": high}
    half = len(relu) // 2
    alone, crowd = relu[:half] * scale, relu * scale
    for name, norm in (("response", local_response_norm), ("batch", batch_norm)):
        one, other = norm(alone), norm(crowd)[:half]
        found[f"{name}_change_with_other_images"] = float((one - other).norm() / other.norm())
    return found


def batch_norm(maps: Tensor) -> Tensor:
    """Each map to mean 0 and variance 1 over the batch and all places (Ioffe & Szegedy, 2015), before its own scale."""
    return functional.batch_norm(maps, None, None, training=True, eps=1e-5)


# Figures.


@style()
def mean_figure(image: Image, mean: Floats, num_images: int) -> "Figure":
    difference = np.clip(127.5 + (image - mean) / 2, 0, 255).astype(np.uint8)
    panels = [
        (image, "an image"),
        (np.clip(np.rint(mean), 0, 255).astype(np.uint8), f"the mean of {num_images:,} images"),
        (difference, "image - mean (mid-grey is 0)"),
    ]
    figure = new_figure(9.6, 3.6)
    for axes, (pixels, title) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.imshow(pixels)
        axes.set_title(title, fontsize=13)
        axes.set_axis_off()
    return figure


@style()
def saturation_figure() -> "Figure":
    x = np.linspace(-5, 5, 501)
    logistic = 1 / (1 + np.exp(-x))
    curves = [
        ("tanh", np.tanh(x), 1 - np.tanh(x) ** 2, VERMILION, (0, (5, 2))),
        ("logistic", logistic, logistic * (1 - logistic), GREEN, (0, (1, 1.5))),
        ("ReLU", np.maximum(x, 0), np.where(x > 0, 1.0, 0.0), BLUE, "-"),
    ]
    figure = new_figure(9.6, 3.9)
    left, right = figure.subplots(1, 2)
    for name, value, slope, colour, dash in curves:
        left.plot(x, value, color=colour, linestyle=dash, label=name)
        right.plot(x, slope, color=colour, linestyle=dash, label=name)
    left.set(title="f(x)", xlabel="x", ylim=(-1.3, 3.2))
    right.set(title="slope f'(x): what a gradient is multiplied by", xlabel="x", ylim=(-0.08, 1.2))
    left.legend(loc="upper left")
    for axes in (left, right):
        for side in ((-5, -2), (2, 5)):
            axes.axvspan(*side, color=GREY, alpha=0.12, linewidth=0)
    right.text(3.5, 0.5, "tanh is flat\nwithin 7 %", ha="center", fontsize=11, color="#333333")
    return figure


@style()
def normalisation_figure(maps: Tensor, num_towers: int) -> "Figure":
    """One place of one image, where most is going on: its maps as conv1 gives them, and after each normalisation."""
    energy = (maps * maps).sum(dim=1)
    image, row, column = np.unravel_index(int(energy.argmax()), energy.shape)
    rows = [
        ("after the ReLU: a", maps),
        (
            "after response normalisation: b = a / (2 + 0.0001 Σ a²)^0.75",
            local_response_norm(maps, num_towers=num_towers),
        ),
        ("after batch normalisation: (a - mean of the map) / its deviation", batch_norm(maps)),
    ]
    number = maps.shape[1]
    figure = new_figure(9.6, 6.4)
    for axes, (title, values) in zip(figure.subplots(3, 1, sharex=True), rows, strict=True):
        heights = values[image, :, row, column].double().numpy()
        towers = np.arange(number) // (number // num_towers)
        axes.bar(np.arange(number), heights, color=[(BLUE, ORANGE)[tower % 2] for tower in towers])
        axes.axhline(0, color=GREY, linewidth=1.0)
        axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel(f"the {number} maps of conv1 at one place of one image" + "; colours: towers" * (num_towers > 1))
    return figure


@style()
def colour_figure(image: Image, images: Sequence[Image], colors: ColorStats) -> "Figure":
    """Pixels in the plane of red and green with the ellipse of their covariance, and an image moved along each axis."""
    from matplotlib.patches import Ellipse

    pixels = np.concatenate([picture[8::32, 8::32].reshape(-1, 3) for picture in images]).astype(np.float64)
    plane = colors.covariance[:2, :2]
    values, vectors = np.linalg.eigh(plane)
    angle = math.degrees(math.atan2(vectors[1, 1], vectors[0, 1]))
    figure = new_figure(11.0, 5.2)
    grid = figure.add_gridspec(3, 6)
    axes = figure.add_subplot(grid[:, :3])
    axes.scatter(pixels[:, 0], pixels[:, 1], s=9, c=pixels / 255, edgecolors="none")
    for deviations in (1, 2):
        width, height = 2 * deviations * np.sqrt(values[::-1])
        axes.add_patch(
            Ellipse(tuple(colors.mean[:2]), width, height, angle=angle, fill=False, edgecolor="black",
                    linewidth=1.8, linestyle="-" if deviations == 1 else "--")
        )  # fmt: skip
    for axis in range(3):
        step = math.sqrt(colors.eigenvalues[axis]) * colors.eigenvectors[:2, axis]
        axes.annotate("", tuple(colors.mean[:2] + step), tuple(colors.mean[:2]),
                      arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 2.2})  # fmt: skip
        away = step * (1 + LABEL_GREY / max(float(np.linalg.norm(step)), 1e-9))
        axes.annotate(f"axis {axis + 1}", tuple(colors.mean[:2] + away), fontsize=12, ha="center", va="center",
                      bbox={"facecolor": "white", "alpha": 0.85, "pad": 1.5, "edgecolor": "none"})  # fmt: skip
    axes.set(xlim=(-5, 260), ylim=(-5, 260), xlabel="red", ylabel="green", title="pixels; 1 and 2 deviations")
    axes.set_aspect("equal")
    for axis in range(3):
        shift = 0.5 * math.sqrt(colors.eigenvalues[axis]) * colors.eigenvectors[:, axis]
        for place, sign in enumerate((-1, 0, 1)):
            panel = figure.add_subplot(grid[axis, 3 + place])
            panel.imshow(np.clip(np.rint(image + sign * shift), 0, 255).astype(np.uint8))
            panel.set_title(f"axis {axis + 1}: {'−' if sign < 0 else '+'}½" if sign else "image", fontsize=11, pad=3)
            panel.set_axis_off()
    return figure


def save(figure: "Figure", path: Path) -> None:
    """As a PNG of few colours: small enough for a page, the same bytes for the same figure."""
    from PIL import Image as Pictures

    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=DPI)
    picture = Pictures.open(buffer).convert("RGB").quantize(NUM_COLOURS, dither=Pictures.Dither.FLOYDSTEINBERG)
    small = io.BytesIO()
    picture.save(small, format="png", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, small.getvalue())


if __name__ == "__main__":
    main()
