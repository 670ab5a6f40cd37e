"""The paper's figure 1: how many epochs until a four-layer net has 25 % training error on CIFAR-10, with ReLU or tanh?

    python benchmarks/figure1.py cifar10 --out figure1            # cifar10/train/<class>/*.jpg; hours on two cores
    python benchmarks/figure1.py cifar10 --out figure1 --weights small --pixels raw

Each non-linearity is trained at each rate of a grid with the first seed, then at its best rate with the other seeds
("learning rates ... were chosen independently to make training as fast as possible. No regularization of any kind was
employed"). A run that was broken off goes on; one that is there is not made again.

What the paper says is that sentence, the dataset, the 25 % and the factor of six. Inferred here, from cuda-convnet's
nets for CIFAR-10 (its `layers-18pct` without response normalisation): the layers, batch 128, momentum 0.9.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.common.files import write_atomic, write_json  # noqa: E402
from trainer.report.pictures import BLUE, VERMILION, style, write_png  # noqa: E402

GOAL_PERCENT = 25.0
BATCH, MOMENTUM = 128, 0.9
RATES = (0.03, 0.01, 0.1, 0.003, 0.001, 0.3)  # the likeliest first: the others give up when they fall behind
Activation = Literal["relu", "tanh"]
Weights = Literal["scaled", "small"]
Pixels = Literal["scaled", "raw"]


@dataclass(frozen=True)
class Setting:
    """One run. `weights`: "scaled" to each layer's inputs (LeCun for tanh, He for ReLU), or "small" as cuda-convnet's
    files have them; `pixels`: "scaled" to unit variance, or "raw", 0 to 255; the mean image is subtracted always."""

    activation: Activation
    rate: float
    seed: int
    weights: Weights = "scaled"
    pixels: Pixels = "scaled"

    @property
    def name(self) -> str:
        return f"{self.activation}-{self.rate:g}-s{self.seed}-{self.weights}-{self.pixels}"


class Net(nn.Module):
    """Three convolutions of 32, 32 and 64 kernels of 5x5, each pooled 3x3 every 2 pixels, and one layer of classes."""

    def __init__(self, setting: Setting, num_classes: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 5, padding=2) for a, b in ((3, 32), (32, 32), (32, 64)))
        self.classes = nn.Linear(64 * 4 * 4, num_classes)
        self.activate = torch.relu if setting.activation == "relu" else torch.tanh
        gain = 2.0 if setting.activation == "relu" else 1.0
        generator = torch.Generator().manual_seed(setting.seed)
        for layer, small in zip([*self.convolutions, self.classes], (0.0001, 0.01, 0.01, 0.1), strict=True):
            spread = small if setting.weights == "small" else (gain / layer.weight[0].numel()) ** 0.5
            nn.init.normal_(layer.weight, 0.0, spread, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.convolutions
        x = self.activate(F.max_pool2d(first(x), 3, 2, ceil_mode=True))
        x = F.avg_pool2d(self.activate(second(x)), 3, 2, ceil_mode=True)
        x = F.avg_pool2d(self.activate(third(x)), 3, 2, ceil_mode=True)
        return self.classes(x.flatten(1))


def read_images(folder: Path, out: Path) -> tuple[Tensor, Tensor]:
    """Pixels uint8 (N, 3, 32, 32) and labels int64 (N,) of folder/train/<class>/*, kept in `out` for the next time."""
    kept = out / "images.pt"
    if kept.is_file():
        stored = torch.load(kept, weights_only=True)
        return stored["pixels"], stored["labels"]
    classes = sorted(path for path in (folder / "train").iterdir() if path.is_dir())
    files = [(path, label) for label, one in enumerate(classes) for path in sorted(one.iterdir())]
    if not files:
        sys.exit(f"error: {folder}/train: no images, expected CIFAR-10 as train/<class>/*.jpg")
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in files])
    stored = {
        "pixels": torch.from_numpy(pixels).movedim(-1, 1).contiguous(),
        "labels": torch.tensor([label for _, label in files]),
    }
    out.mkdir(parents=True, exist_ok=True)
    torch.save(stored, kept)
    return stored["pixels"], stored["labels"]


def prepare(pixels: Tensor, how: Pixels) -> Tensor:
    """float32: less the mean image, and by the spread of all of it if `how` says so."""
    centred = pixels.float() - pixels.float().mean(0)
    return centred / centred.std() if how == "scaled" else centred


def train(setting: Setting, images: Tensor, labels: Tensor, out: Path, most_epochs: float) -> list[dict[str, Any]]:
    """Train until the goal, `most_epochs`, or a loss that is not finite; a record each epoch, in out/runs/NAME.jsonl.

    The error is of all training images, after the epoch. A state beside the records lets the run go on.
    """
    folder = out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    log, kept = folder / f"{setting.name}.jsonl", folder / f"{setting.name}.pt"
    net = Net(setting, int(labels.max()) + 1)
    optimizer = torch.optim.SGD(net.parameters(), setting.rate, MOMENTUM)
    shuffle = torch.Generator().manual_seed(setting.seed)
    records: list[dict[str, Any]] = []
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        shuffle.set_state(state["shuffle"])
        records = state["records"]
    else:
        records.append({"epoch": 0, "error": measure(net, images, labels), "loss": None, "time_s": 0.0})
    while not is_over(records) and records[-1]["epoch"] < most_epochs:
        started, losses = time.perf_counter(), []
        for chosen in torch.randperm(len(labels), generator=shuffle).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        mean, epoch = float(torch.stack(losses).mean()), records[-1]["epoch"] + 1
        took_s = time.perf_counter() - started
        records.append({"epoch": epoch, "error": measure(net, images, labels), "loss": mean, "time_s": took_s})
        print(f"{setting.name}: epoch {epoch}, training error {records[-1]['error']:.1f} %, {took_s:.0f} s", flush=True)
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "shuffle": shuffle.get_state()}
        torch.save({**state, "records": records}, kept.with_suffix(".new"))
        kept.with_suffix(".new").replace(kept)
    lines = [json.dumps(record) for record in [asdict(setting), *records]]
    write_atomic(log, ("\n".join(lines) + "\n").encode())
    return records


@torch.inference_mode()
def measure(net: Net, images: Tensor, labels: Tensor) -> float:
    """Top-1 error in percent."""
    wrong = sum(int((net(x).argmax(1) != y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True))
    return 100.0 * wrong / len(labels)


def is_over(records: Sequence[dict[str, Any]]) -> bool:
    """The goal is reached, or the loss is lost."""
    last = records[-1]
    return last["error"] <= GOAL_PERCENT or (last["loss"] is not None and not np.isfinite(last["loss"]))


def epochs_to_goal(records: Sequence[dict[str, Any]]) -> float | None:
    """Where the line through the errors of two epochs crosses the goal; None if it never does."""
    if records[0]["error"] <= GOAL_PERCENT:
        return 0.0
    for before, after in pairwise(records):
        if after["error"] <= GOAL_PERCENT:
            share = (before["error"] - GOAL_PERCENT) / (before["error"] - after["error"])
            return before["epoch"] + share * (after["epoch"] - before["epoch"])
    return None


def search(
    options: argparse.Namespace, images: Tensor, labels: Tensor
) -> Iterator[tuple[Setting, list[dict[str, Any]]]]:
    """Each non-linearity's grid, then its best rate with the other seeds."""
    for activation in ("relu", "tanh"):
        best: tuple[float, float] | None = None
        for rate in options.rates:
            setting = Setting(activation, rate, options.seeds[0], options.weights, options.pixels)
            # A rate that is behind the best one so far after as many epochs is not the fastest.
            most = options.epochs if best is None else int(best[0]) + 1
            records = train(setting, images, labels, options.out, most)
            yield setting, records
            reached = epochs_to_goal(records)
            if reached is not None and (best is None or reached < best[0]):
                best = reached, rate
        if best is not None:
            for seed in options.seeds[1:]:
                setting = Setting(activation, best[1], seed, options.weights, options.pixels)
                yield setting, train(setting, images, labels, options.out, options.epochs)


def summarise(runs: Sequence[tuple[Setting, list[dict[str, Any]]]]) -> dict[str, Any]:
    """For each non-linearity its best rate and the epochs of each seed there; the ratios of all pairs of seeds."""
    found: dict[str, Any] = {}
    for activation in ("relu", "tanh"):
        reached = {
            setting: epochs for setting, records in runs
            if setting.activation == activation and (epochs := epochs_to_goal(records)) is not None
        }  # fmt: skip
        if reached:
            first_seed = min(setting.seed for setting in reached)
            rate = min((s for s in reached if s.seed == first_seed), key=lambda s: reached[s]).rate
            found[activation] = {"rate": rate, "epochs": [e for s, e in reached.items() if s.rate == rate]}
    if len(found) == 2:
        pairs = [slow / fast for slow in found["tanh"]["epochs"] for fast in found["relu"]["epochs"]]
        found["ratio"] = {"median": median(pairs), "min": min(pairs), "max": max(pairs)}
    return found


def draw(runs: Sequence[tuple[Setting, list[dict[str, Any]]]], summary: dict[str, Any], path: Path) -> None:
    """As the paper's figure: training error over epochs, ReLU solid, tanh dashed; each seed a line, the best rates."""
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for activation, color, dashes in (("relu", BLUE, "-"), ("tanh", VERMILION, "--")):
            shown = [r for s, r in runs if s.activation == activation and s.rate == summary[activation]["rate"]]
            for number, records in enumerate(shown):
                label = f"{activation}, rate {summary[activation]['rate']:g}" if number == 0 else None
                x, y = [r["epoch"] for r in records], [r["error"] for r in records]
                axes.plot(x, y, color=color, linestyle=dashes, label=label)
        axes.axhline(GOAL_PERCENT, color="black", linewidth=1, linestyle=":")
        axes.set(xlabel="epoch", ylabel="training error (%)", ylim=(0, 92), xlim=(0, None))
        axes.legend()
        write_png(figure, path)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The paper's figure 1 on CIFAR-10.")
    parser.add_argument("images", type=Path, help="folder with train/<class>/*.jpg of 32x32 pixels")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, figure1.png and figure1.json")
    parser.add_argument("--rates", type=lambda t: [float(x) for x in t.split(",")], default=list(RATES))
    parser.add_argument("--seeds", type=lambda t: [int(x) for x in t.split(",")], default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=60, help="at most, of a run (default: 60)")
    parser.add_argument("--weights", choices=("scaled", "small"), default="scaled", help="initial weights, see Setting")
    parser.add_argument("--pixels", choices=("scaled", "raw"), default="scaled", help="inputs, see Setting")
    return parser.parse_args(words)


def main() -> None:
    options = parse_arguments()
    pixels, labels = read_images(options.images, options.out)
    images = prepare(pixels, options.pixels)
    runs = list(search(options, images, labels))
    summary = summarise(runs)
    for setting, records in runs:
        reached = epochs_to_goal(records)
        last = records[-1]
        what = f"{reached:.1f} epochs" if reached is not None else f"{last['error']:.1f} % after {last['epoch']} epochs"
        print(f"| {setting.activation} | {setting.rate:g} | {setting.seed} | {what} |")
    print(json.dumps(summary))
    name = f"figure1-{options.weights}-{options.pixels}"
    document = {"torch": torch.__version__, "goal_percent": GOAL_PERCENT, **summary}
    write_json(options.out / f"{name}.json", document)
    if {"relu", "tanh"} <= set(summary):
        draw(runs, summary, options.out / f"{name}.png")


if __name__ == "__main__":
    main()
