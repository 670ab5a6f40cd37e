"""What two or more ranks send each other in a step of each mode, and how long a step takes.

    python benchmarks/parallel.py [--ranks 2 4] [--global-batch-size 128] [--width 1] [--rounds 3] [--out FILE]

Bytes are counted where collectives are issued (trainer/parallel.py), in real steps of the full net, compared with the
sum over the net's shapes and, on the CPU, with what the loopback device carried. Images are noise that lies on the
device.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.options import CROP_SIZE_PX
from trainer.bench.rates import Task, Work, alternate, synchronise
from trainer.config import MODES, Mode, Parallel
from trainer.data import exchange_pixels
from trainer.distributed import Ranks, gather, join
from trainer.launch import launch
from trainer.model import shapes_of
from trainer.parallel import Traffic, count_traffic
from trainer.recipe import RECIPES, Recipe
from trainer.step import Learner

NUM_CLASSES = 1000
KINDS = ("parameters", "activations", "input")
SHIFT_BYTES = 12  # of an image's colour shift, sent with its pixels


def predict_traffic(
    mode: Mode, recipe: Recipe, num_classes: int, world_size: int, *, activation_bytes: int = 4, gradient_bytes: int = 4
) -> Traffic:
    """What each rank sends in one step: bytes of ring collectives by the shapes, as count_traffic counts them.

    Buckets of gradients are not known here: their number stands as one.
    """
    shapes = shapes_of(recipe, num_classes)
    batch, others = recipe.global_batch_size, world_size - 1
    share = others / world_size
    traffic = Traffic()
    if mode != "columns":
        averaged = sum(s.num_parameters for name, s in shapes.items() if mode == "data" or name.startswith("conv"))
        traffic.add("parameters", 2 * share * averaged * gradient_bytes)
    if mode == "data":
        return traffic
    if mode == "columns":
        traffic.add("input", others * batch / world_size * CROP_SIZE_PX**2 * 3)
        traffic.add("input", others * batch / world_size * SHIFT_BYTES)
    for layer in ("conv3", "fc6", "fc7") if mode == "columns" else ("fc6", "fc7"):
        size = math.prod(shapes[layer].taken)  # gathered going forward; the gradient is summed and scattered going back
        traffic.add("activations", share * batch * size * activation_bytes)
        traffic.add("activations", share * batch * size * activation_bytes)
    for _ in range(2):  # fc8's outputs and their gradient, in float32
        traffic.add("activations", share * batch * num_classes * 4)
    return traffic


def make_step(learner: Learner, recipe: Recipe, ranks: Ranks) -> Callable[[], int]:
    """A step as training does one, input exchange included; returns this rank's images."""
    size = recipe.global_batch_size // ranks.world_size
    generator = torch.Generator().manual_seed(ranks.rank)
    pixels = torch.randint(256, (size, 224, 224, 3), dtype=torch.uint8, generator=generator).to(ranks.device)
    labels = torch.randint(NUM_CLASSES, (size,), generator=generator).to(ranks.device)
    shift = torch.zeros(size, 3)
    columns = learner.split.mode == "columns"
    own = pixels.permute(0, 3, 1, 2)

    def step() -> int:
        images = exchange_pixels(own, shift)[0].permute(0, 3, 1, 2) if columns else own
        learner.step(images.float(), labels)
        return size

    return step


def measure(job: dict[str, Any]) -> int:
    """What one rank does: a counted step of each mode, then alternated rounds of all; the first rank writes."""
    with join(job["use_gpu"]) as ranks:
        recipe = replace(RECIPES["paper"], width=job["width"], global_batch_size=job["batch"])
        modes: list[Mode] = [mode for mode in MODES if mode != "columns" or ranks.world_size == 2]
        found: dict[str, Any] = {}
        steps = {}
        for mode in modes:
            learner = Learner(recipe, NUM_CLASSES, ranks, parallel=Parallel(mode, gradients=job["gradients"]))
            learner.schedule.begin_step(1, 0, 1)
            learner.net.train()
            steps[mode] = make_step(learner, recipe, ranks)
            steps[mode]()  # DistributedDataParallel settles its buckets in the first
            gather(None, ranks)
            before = read_loopback()
            with count_traffic() as traffic:
                steps[mode]()
            gather(None, ranks)
            carried = read_loopback() - before
            counted = gather((traffic.sent_bytes, traffic.collectives), ranks)
            found[mode] = {
                "sent_bytes": counted[0][0],
                "collectives": counted[0][1],
                "sent_bytes_of_all_ranks": sum(sum(sent.values()) for sent, _ in counted),
                "loopback_bytes": None if job["use_gpu"] else carried,
                "predicted": predict_traffic(
                    mode, recipe, NUM_CLASSES, ranks.world_size, gradient_bytes=2 if job["gradients"] == "bf16" else 4
                ).sent_bytes,
            }
            if not job["num_rounds"]:
                del learner, steps[mode]
        if job["num_rounds"]:
            for mode, rate in measure_rates(steps, job, ranks).items():
                found[mode]["images_per_s"] = rate
        if ranks.is_first:
            Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")
    return 0


def measure_rates(steps: dict[Mode, Callable[[], int]], job: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    def task(step: Callable[[], int]) -> Task:
        def run(num_steps: int) -> Work:
            done = sum(step() for _ in range(num_steps))
            synchronise(ranks)
            return Work(done)

        return Task(run)

    tasks = {mode: task(step) for mode, step in steps.items()}
    rates = alternate(tasks, num_rounds=job["num_rounds"], duration_s=job["duration_s"], ranks=ranks)
    return {mode: {**rate.to_json(), "ratio_to_data": rate.ratio_to(rates["data"])} for mode, rate in rates.items()}


def read_loopback() -> int:
    """Bytes that the loopback device has carried, other processes' included; 0 where the system does not say."""
    try:
        lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")), 0)


def print_traffic(num_ranks: int, found: dict[str, Any]) -> None:
    print(f"\n{num_ranks} ranks: sent by each rank in a step, MB\n")
    print("| mode | gradients | activations | images | in all | collectives | by the shapes | loopback / counted |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for mode, row in found.items():
        sent = [row["sent_bytes"][kind] / 1e6 for kind in KINDS]
        shapes, carried = sum(row["predicted"].values()) / 1e6, row["loopback_bytes"]
        ratio = f"{carried / row['sent_bytes_of_all_ranks']:.2f}" if carried else "-"
        cells = [mode, *(f"{value:.2f}" for value in (*sent, sum(sent))), str(sum(row["collectives"].values()))]
        print(f"| {' | '.join([*cells, f'{shapes:.2f}', ratio])} |")


def print_rates(num_ranks: int, batch: int, device: str, found: dict[str, Any]) -> None:
    print(f"\n{num_ranks} {device} ranks, batch {batch}: images/s, median (min to max) of rounds\n")
    print("| mode | images/s | s a step | ratio to data |\n|---|---:|---:|---:|")
    for mode, row in found.items():
        rate = row["images_per_s"]
        spread = f"{rate['images_per_s']:.1f} ({rate['lowest']:.1f} to {rate['highest']:.1f})"
        print(f"| {mode} | {spread} | {batch / rate['images_per_s']:.3f} | {rate['ratio_to_data']:.2f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks; the first is timed")
    parser.add_argument("--global-batch-size", type=int, default=128)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--gradients", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="0: count, do not time")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each mode")
    parser.add_argument("--out", type=Path, default=Path("parallel.json"))
    options = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    results: dict[str, Any] = {}
    for position, num_ranks in enumerate(options.ranks):
        job = {
            "use_gpu": num_gpus >= num_ranks,
            "width": options.width,
            "batch": options.global_batch_size,
            "gradients": options.gradients,
            "num_rounds": options.rounds if position == 0 else 0,
            "duration_s": options.seconds,
            "out": str(options.out),
        }
        status = launch(measure, (job,), num_ranks)
        if status:
            return status
        found = results[str(num_ranks)] = json.loads(options.out.read_text(encoding="utf-8"))
        print_traffic(num_ranks, found)
        if job["num_rounds"]:
            print_rates(num_ranks, options.global_batch_size, "GPU" if job["use_gpu"] else "CPU (gloo)", found)
    options.out.write_text(json.dumps({"torch": torch.__version__, "num_gpus": num_gpus, "ranks": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
