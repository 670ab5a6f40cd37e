"""On a GPU: are the batches the CPU's, how fast does each way feed it, and does feeding cost its steps anything?

    python benchmarks/gpu.py shards --json gpu.json                  # on a machine with a GPU: about 15 minutes
    python benchmarks/gpu.py shards --device cpu --quick             # the same calls on the CPU, at a small size

Five parts: `check` takes batches of every way of decoding and compares them with the CPU's (samples and draws must be
the same, pixels may differ by what the decoders differ); `feed` times every way with nobody consuming; `train` times
the step on data that lies on the device, and with each way feeding it; `cost` sets the time of a step's own kernels
beside that of the same step while batches are made, from the device's clock; `step` times the step on data that lies
on the device in both precisions, with normalisation and without. What a part compares is measured in alternated rounds
of one process. Other loaders: feed.py.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.colors import ColorStats
from pipeline.common.console import note, print_table
from pipeline.common.errors import UserError
from pipeline.loader import TrainLoader
from pipeline.manifest import IMAGE_SIZE_PX
from pipeline.options import Device, LoaderOptions
from pipeline.shards import ShardSet
from trainer.bench.rates import Rate, alternate, gpu_memory_bytes
from trainer.bench.tasks import (
    Trainee,
    count_step_flops,
    endless,
    loader_task,
    make_batch,
    product_task,
    step_task,
    train_task,
)
from trainer.distributed import Ranks
from trainer.recipe import RECIPES, Recipe, override
from trainer.record.environment import environment

Options = dict[str, Any]
PARTS = ("check", "feed", "train", "cost", "step")
LARGEST_MEAN_DIFFERENCE_GREY = 1.5  # between two JPEG decoders; another crop is 10 and more
WAYS: dict[str, Options] = {
    "mixed": {"decode": "mixed"},
    "mixed, engine 0": {"decode": "mixed", "hw_decoder_load": 0.0},
    "mixed, engine 1": {"decode": "mixed", "hw_decoder_load": 1.0},
    "cpu": {"decode": "cpu"},
    "hybrid, host 0.25": {"decode": "hybrid", "host_share": 0.25},
    "hybrid": {"decode": "hybrid"},  # half of each batch
    "hybrid, host 0.75": {"decode": "hybrid", "host_share": 0.75},
    "cache": {"decode": "mixed"},  # and `cache_gib` for all images
    "raw": {},
}
CHECKED = ("mixed", "cpu", "hybrid", "cache", "raw")
TRAINED = ("mixed", "cpu", "hybrid", "cache", "raw")
HALF = ("mixed", "cpu", "cache", "raw")
ROOM = 1.1  # of the cache, to the pixels in it


def main() -> int:
    options = parse_arguments()
    bench = Bench(options)
    document: dict[str, Any] = {
        "environment": environment(),
        "arguments": {k: str(v) for k, v in vars(options).items()},
    }
    for part in PARTS:
        if part in options.parts:
            note(f"{part} ...")
            document[part] = getattr(bench, part)()
    if options.json:
        options.json.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    return 0 if all(row["ok"] for row in document.get("check", [])) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shards", help="folder of JPEG shards, with colour statistics")
    parser.add_argument("--raw", help="folder of the same images as raw shards, for the rows `raw`")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="gpu")
    parser.add_argument("--recipe", choices=list(RECIPES), default="paper")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--threads", type=int, help="decoding threads (default: one per core)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each row, all rounds together")
    parser.add_argument("--quick", action="store_true", help="a narrow net, short rounds: to see that it runs")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"--parts {','.join(unknown)}: expected some of {','.join(PARTS)}")
    if options.quick:
        options.rounds, options.seconds = 2, 0.2
        options.settings = ["width=0.0625", "global_batch_size=8", *options.settings]
    return options


class Bench:
    """The shards, the device, and what each part does with them."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.device == "gpu" and not torch.cuda.is_available():
            raise UserError("--device gpu: no CUDA GPU is visible; use --device cpu --quick to see the script run")
        self.options = options
        self.jpeg = ShardSet.open(options.shards)
        self.raw = ShardSet.open(options.raw) if options.raw else None
        self.colors = ColorStats.load(self.jpeg.root, self.jpeg.fingerprint)
        recipe = override(RECIPES[options.recipe], options.settings)
        self.recipe: Recipe = replace(
            recipe, global_batch_size=min(recipe.global_batch_size, self.jpeg.num_samples("train") // 2)
        )
        self.ranks = Ranks(0, 1, torch.device("cuda" if options.device == "gpu" else "cpu"))

    def ways(self, names: tuple[str, ...]) -> dict[str, Options]:
        """Those that these shards and this device have: raw shards may be missing, only a GPU has a cache."""
        missing = {"raw"} if self.raw is None else set()
        if self.options.device == "cpu":
            missing.add("cache")
        ways = {name: WAYS[name] for name in names if name not in missing}
        if "cache" in ways:
            num_bytes = self.jpeg.num_samples("train") * IMAGE_SIZE_PX**2 * 3
            ways["cache"] = {**ways["cache"], "cache_gib": ROOM * num_bytes / 2**30}
        return ways

    def make_loader(
        self, name: str, *, dtype: str = "float32", device: Device | None = None, **options: Any
    ) -> TrainLoader:
        return TrainLoader(
            self.raw if name == "raw" and self.raw else self.jpeg,
            self.colors,
            replace(self.recipe.transform(train=True), dtype=dtype),
            LoaderOptions(num_threads=self.options.threads, **options),
            global_batch_size=self.recipe.global_batch_size,
            device=device or self.options.device,
            seed=1,
        )

    def check(self) -> list[dict[str, Any]]:
        """Every way against the CPU on JPEG shards. The cache is followed into its second epoch: from memory."""
        rows = []
        for name, options in self.ways(CHECKED).items():
            here = self.make_loader(name, **options)
            there = self.make_loader("cpu", device="cpu", decode="cpu")
            num_batches = len(here) * 3 // 2 if name == "cache" else min(len(here), 40)
            same, differences, largest = True, [], 0.0
            for one, other, _ in zip(endless(here), endless(there), range(num_batches), strict=False):
                assert here.draws is not None and there.draws is not None
                same &= torch.equal(one.labels.cpu(), other.labels)
                same &= all(torch.equal(a, b) for a, b in zip(here.draws, there.draws, strict=True))
                difference = (one.images.cpu().float() - other.images).abs()
                differences.append(difference.mean().item())
                largest = max(largest, difference.max().item())
            grey = float(self.colors.std.mean()) if self.recipe.unit_variance else 1.0
            mean = grey * sum(differences) / len(differences)
            rows.append(
                {
                    "way": name,
                    "batches": num_batches,
                    "same_samples_and_draws": same,
                    "mean_difference": mean,
                    "largest_difference": largest,
                    "ok": same and mean <= LARGEST_MEAN_DIFFERENCE_GREY,
                }
            )
        print_table(
            f"Batches of {self.where} against the CPU's (grey levels)",
            ["decoded by", "batches", "same samples, draws", "mean |difference|", "largest"],
            [
                [
                    row["way"],
                    str(row["batches"]),
                    "yes" if row["same_samples_and_draws"] else "NO",
                    f"{row['mean_difference']:.3f}",
                    f"{row['largest_difference']:.3f}",
                ]
                for row in rows
            ],
        )
        return rows

    @property
    def where(self) -> str:
        return torch.cuda.get_device_name() if self.options.device == "gpu" else "the CPU (standing in)"

    def feed(self) -> list[dict[str, Any]]:
        """Every way with nobody consuming, in single precision, and some in half."""
        wanted = [(name, "float32", given) for name, given in self.ways(tuple(WAYS)).items()]
        wanted += [(name, "float16", given) for name, given in self.ways(HALF).items()]
        loaders = {f"{name}, {dtype}": self.make_loader(name, dtype=dtype, **given) for name, dtype, given in wanted}
        batches = {name: endless(loader) for name, loader in loaders.items()}
        for name, stream in batches.items():  # a cache is filled before the clock runs
            for _ in range(len(loaders[name]) if "cache" in name else 1):
                next(stream)
        rates = self.alternate({name: loader_task(stream) for name, stream in batches.items()})
        rows = self.describe(rates)
        for row in rows:
            spec = loaders[row["way"]].spec
            row["host_share"] = spec.num_on_host / spec.batch_size
        self.show(f"Feeding {self.where}, nobody consuming", rows)
        return rows

    def train(self) -> list[dict[str, Any]]:
        """The step alone, and with each way feeding it."""
        alone = Trainee(self.recipe, self.jpeg.num_classes, self.ranks)
        tasks = {"no feeding": step_task(alone, make_batch(alone, self.jpeg.num_classes))}
        for name, given in self.ways(TRAINED).items():
            tasks[name] = train_task(Trainee(self.recipe, self.jpeg.num_classes, self.ranks), self.stream(name, given))
        rows = self.describe(self.alternate(tasks))
        self.show(f"Training on {self.where}, {self.recipe.name}, batch {self.recipe.global_batch_size}", rows)
        return rows

    def stream(self, name: str, given: Options) -> Iterator[Any]:
        loader = self.make_loader(name, **given)
        stream = endless(loader)
        for _ in range(len(loader) if name == "cache" else 1):
            next(stream)
        return stream

    def cost(self) -> list[dict[str, Any]]:
        """A step's own time on the device, from its clock: alone, and on the same data while a loader is drained."""
        trainees, tasks = {}, {}
        for name, given in {"no feeding": None, **self.ways(("cpu", "mixed"))}.items():
            trainee = trainees[name] = Trainee(self.recipe, self.jpeg.num_classes, self.ranks)
            batch = make_batch(trainee, self.jpeg.num_classes)
            if given is None:
                tasks[name] = step_task(trainee, batch)
            else:  # batches are made and dropped; the step sees what it sees without them
                tasks[name] = train_task(trainee, map(lambda _, same=batch: same, self.stream(name, given)))
        rates = self.alternate(tasks)
        rows = self.describe(rates)
        for row in rows:
            num_steps = rates[row["way"]].num_done // self.recipe.global_batch_size
            parts = trainees[row["way"]].take_parts_s(num_steps)
            row["step_ms"] = 1000 * sum(parts.values())
            row["parts_ms"] = {part: 1000 * value for part, value in parts.items()}
            row["cost_percent"] = 100 * (row["step_ms"] / rows[0]["step_ms"] - 1)
        print_table(
            f"What feeding costs the steps of {self.where}",
            ["fed by", "step, ms", "more than alone, %"],
            [[row["way"], f"{row['step_ms']:.2f}", f"{row['cost_percent']:+.1f}"] for row in rows],
        )
        return rows

    def step(self) -> list[dict[str, Any]]:
        """The step alone by precision, what of it is normalisation, and what of large products' rate it reaches."""
        ways = {f"{p}{'' if lrn else ', no LRN'}": (p, lrn) for p in ("float32", "bf16") for lrn in (True, False)}
        tasks, flops = {}, {}
        for name, (precision, lrn) in ways.items():
            recipe = replace(self.recipe, precision=precision, lrn=lrn)
            trainee = Trainee(recipe, self.jpeg.num_classes, self.ranks)
            tasks[name] = step_task(trainee, make_batch(trainee, self.jpeg.num_classes))
            flops[name], tasks[f"products, {precision}"] = product_task(self.ranks, trainee.dtype)
        rates = self.alternate(tasks)
        rows = self.describe({name: rates[name] for name in ways})
        for row in rows:
            precision, _ = ways[row["way"]]
            without = rates[f"{precision}, no LRN"]
            row["lrn_percent"] = 100 * (1 - rates[row["way"]].ratio_to(without))
            products = rates[f"products, {precision}"].per_s * flops[row["way"]]
            row["products_tflops"] = products / 1e12
            per_image = count_step_flops(self.recipe, self.jpeg.num_classes)
            row["of_products_percent"] = 100 * row["images_per_s"] * per_image / products
        print_table(
            f"The step alone on {self.where}, {self.recipe.name}, batch {self.recipe.global_batch_size}",
            ["precision", "images/s", "LRN, % of the step", "of large products, %", "products, TFLOP/s"],
            [
                [
                    row["way"],
                    f"{row['images_per_s']:,.0f}",
                    f"{row['lrn_percent']:.1f}",
                    f"{row['of_products_percent']:.0f}",
                    f"{row['products_tflops']:.1f}",
                ]
                for row in rows
            ],
        )
        return rows

    def alternate(self, tasks: dict[str, Any]) -> dict[str, Rate]:
        rounds, seconds = self.options.rounds, self.options.seconds
        return alternate(tasks, num_rounds=rounds, duration_s=seconds, ranks=self.ranks)

    def describe(self, rates: dict[str, Rate]) -> list[dict[str, Any]]:
        first = next(iter(rates.values()))
        return [
            {
                "way": name,
                **rate.to_json(),
                "ratio": rate.ratio_to(first),
                "cores_used": rate.cores_used,
                "waited_fraction": rate.waited_fraction,
                "gpu_memory_bytes": gpu_memory_bytes(self.ranks),
            }
            for name, rate in rates.items()
        ]

    def show(self, title: str, rows: list[dict[str, Any]]) -> None:
        print_table(
            f"{title}; images/s, median of {self.options.rounds} rounds",
            ["fed by", "images/s", "lowest", "highest", "ratio", "cores", "waited, %"],
            [
                [
                    row["way"],
                    f"{row['images_per_s']:,.0f}",
                    f"{row['lowest']:,.0f}",
                    f"{row['highest']:,.0f}",
                    f"{row['ratio']:.2f}",
                    f"{row['cores_used']:.1f}",
                    f"{100 * row['waited_fraction']:.0f}",
                ]
                for row in rows
            ],
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
