"""What grows with the data, and how: start-up, memory and time against samples, classes and ranks; ends of epochs.

    python benchmarks/growth.py --json growth.json              # some minutes
    python benchmarks/growth.py --samples 1000 --classes 10 --ranks 1 --skip start,epochs --quick

Every line is measured in a process of its own; the time to the first step is that of the real command, from its start.
cpu_s is processor time, which other work on the machine hardly changes.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.growth_data import make_shards
from harness.machine import choose_cpus, describe_machine

ROOT = Path(__file__).resolve().parent.parent
IMAGENET, EVAL_SHARE = 1_300_000, 0.039  # 50,000 validation images to 1.28 million
PARTS = ("samples", "classes", "ranks", "start", "epochs")


def main() -> None:
    options = parse_arguments()
    if options.one:
        print(json.dumps(ONE[options.one](**json.loads(options.arguments))))
        return
    choose_cpus(1)
    scratch = Path(tempfile.mkdtemp(prefix="growth-", dir=options.scratch))
    try:
        document = measure(options, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(float(word)) for word in text.split(",")]

    parser = argparse.ArgumentParser(description="Start-up, memory and time against samples, classes and ranks.")
    parser.add_argument("--samples", type=numbers, default=numbers("1e3,1e4,1e5,1.3e6,1.4e7"))
    parser.add_argument("--classes", type=numbers, default=[10, 100, 1000, 10000, 21841])
    parser.add_argument("--ranks", type=numbers, default=[1, 2, 3, 4])
    parser.add_argument("--skip", type=lambda text: text.split(","), default=[], help=f"of {','.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=3, help="of each line; the median is shown")
    parser.add_argument("--quick", action="store_true", help="a narrow net, one repeat: to see that it runs")
    parser.add_argument("--scratch", metavar="DIR", help="where the shards are made (default: the temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="write everything measured there")
    parser.add_argument("--one", choices=list(ONE), help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.repeats = 1
    return options


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    width = 0.0625 if options.quick else 1.0
    document: dict[str, Any] = {"machine": describe_machine(os.sched_getaffinity(0))}

    def run(part: str, one: str, lines: list[dict[str, Any]]) -> None:
        if part in options.skip:
            return
        rows = [{**line, **repeat(one, line, options.repeats)} for line in lines]
        document[part] = [{key: value for key, value in row.items() if key != "shards"} for row in rows]
        print_rows(part, document[part])

    def shards(num_samples: int, num_classes: int = 1000, num_val: int = 0) -> str:
        folder = scratch / f"{num_samples}-{num_classes}-{num_val}"
        if not folder.exists():
            make_shards(folder, num_samples, num_classes, num_val)
        return str(folder)

    data = {} if "samples" in options.skip else {number: shards(number) for number in options.samples}
    run("samples", "loader", [{"samples": n, "world_size": 1, "shards": folder} for n, folder in data.items()])
    run("classes", "net", [{"classes": n, "width": width} for n in options.classes])
    most = IMAGENET if not options.quick else min(options.samples)
    if {"ranks", "start"} - set(options.skip):
        large = shards(most)
        run("ranks", "loader", [{"samples": most, "world_size": n, "shards": large} for n in options.ranks])
        run("start", "command", [{"samples": most, "width": width, "shards": large, "stop": True}])
    if "epochs" not in options.skip:
        small = shards(640, 10, round(640 * EVAL_SHARE))
        run("epochs", "command", [{"samples": 640, "width": width, "shards": small, "stop": False}])
    return document


def repeat(one: str, arguments: dict[str, Any], times: int) -> dict[str, Any]:
    """Medians of `times` fresh processes, after one that warms the disk's cache."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", one, json.dumps(arguments)]
    found = []
    for _ in range(times + 1):
        environment = {**os.environ, "GROWTH_STARTED": repr(time.time()), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"error: {one} {arguments}: status {done.returncode}\n{done.stderr[-2000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: sorted(run[key] for run in found[1:])[times // 2] for key in found[0]}


def print_rows(part: str, rows: list[dict[str, Any]]) -> None:
    heads = list(rows[0])
    print(f"\n### {part}\n\n| {' | '.join(heads)} |\n|{'---:|' * len(heads)}")
    for row in rows:
        cells = (f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" for value in row.values())
        print(f"| {' | '.join(cells)} |", flush=True)


# One line, in a process of its own.


def measure_loader(samples: int, world_size: int, shards: str) -> dict[str, Any]:
    """A rank's way from shards on disk to its first batch of 64."""
    begun = time.perf_counter()
    from pipeline import ColorStats, LoaderOptions, ShardSet, TrainLoader

    imported, before, cpu_s = time.perf_counter(), memory_mib(), -time.process_time()
    opened = ShardSet.open(shards)
    colors = ColorStats.load(opened.root, opened.fingerprint)
    checked = time.perf_counter()
    options = LoaderOptions(num_threads=2)
    loader = TrainLoader(
        opened, colors, options=options, global_batch_size=64 * world_size, rank=world_size - 1, world_size=world_size
    )
    built = time.perf_counter()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    cpu_s += time.process_time()  # of all that follows the imports: on a busy machine, the figure to trust
    return {
        "import_s": imported - begun,
        "open_s": checked - imported,
        "build_s": built - checked,
        "first_batch_s": first - built,
        "cpu_s": cpu_s,
        "memory_mib": memory_mib() - before,
    }


def measure_net(classes: int, width: float) -> dict[str, Any]:
    """The network and a step of 16 images; its least memory is eight bytes a weight, and four for the gradient."""
    import torch

    from trainer.distributed import Ranks
    from trainer.recipe import RECIPES, override
    from trainer.step import Learner

    before, begun = memory_mib(), time.perf_counter()
    recipe = override(RECIPES["paper"], ["global_batch_size=16", f"width={width}"])
    learner = Learner(recipe, classes, Ranks(0, 1, torch.device("cpu")))
    drawn_s = time.perf_counter() - begun
    images, labels = torch.randn(16, 3, 224, 224), torch.arange(16) % classes
    learner.schedule.begin_step(1, 0, 10)
    learner.net.train()
    steps = []
    for _ in range(4):
        begun = time.perf_counter()
        learner.step(images, labels)
        steps.append(time.perf_counter() - begun)
    return {
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        "draw_weights_s": drawn_s,
        "step_s": min(steps[1:]),
        "memory_mib": memory_mib() - before,
    }


def measure_command(samples: int, width: float, shards: str, stop: bool) -> dict[str, Any]:
    """`alexnet-train`, with clocks at its steps, its evaluation and its checkpoints: to the first step, or 2 epochs."""
    from trainer.commands import train as command

    marks: list[tuple[str, float, float]] = []
    cpu_s: list[float] = []

    def watch(owner: Any, name: str, kind: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            begun = time.time()
            cpu_s.append(time.process_time())
            result = original(*arguments, **options)
            marks.append((kind, begun, time.time()))
            if stop and kind == "step":
                raise KeyboardInterrupt
            return result

        setattr(owner, name, watched)

    from trainer import step, train

    watch(step.Learner, "step", "step")
    watch(train, "evaluate", "evaluate")
    watch(train.Run, "_save", "save")  # what training waits for: the file is written beside it
    started = float(os.environ["GROWTH_STARTED"])
    with tempfile.TemporaryDirectory() as runs:
        sys.argv = ["alexnet-train", "--shards", shards, "--runs", runs, "--gpus", "0", "--epochs", "2"]
        sys.argv += ["--set", f"width={width}", "--set", "schedule=cosine", "--global-batch-size", "64"]
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            command.train()
    steps = [mark for mark in marks if mark[0] == "step"]
    first = {"to_first_step_s": steps[0][1] - started, "first_step_s": steps[0][2] - steps[0][1], "cpu_s": cpu_s[0]}
    if stop:
        return {**first, "memory_mib": memory_mib()}
    per_epoch = samples // 64
    last, following = steps[per_epoch - 1], steps[per_epoch]
    between = {
        kind: sum(m[2] - m[1] for m in marks if m[0] == kind and last[2] <= m[1] < following[1]) for kind in KINDS
    }
    gaps = [b[1] - a[2] for a, b in itertools.pairwise(steps[1:per_epoch])]
    epoch_s = steps[per_epoch - 1][2] - steps[0][1]
    return {
        **first,
        "step_s": sorted(m[2] - m[1] for m in steps)[len(steps) // 2],
        "between_steps_s": sorted(gaps)[len(gaps) // 2],
        "epoch_s": epoch_s,
        "evaluate_s": between["evaluate"],
        "save_s": between["save"],
        "else_between_epochs_s": following[1] - last[2] - sum(between.values()),
    }


KINDS = ("evaluate", "save")
ONE: dict[str, Callable[..., dict[str, Any]]] = {
    "loader": measure_loader,
    "net": measure_net,
    "command": measure_command,
}


def memory_mib() -> float:
    """The most that this process has had in memory so far, MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024


if __name__ == "__main__":
    main()
