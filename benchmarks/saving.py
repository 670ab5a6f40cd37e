"""For how long does a checkpoint stop training? The paper's net at full width: 244 MB of weights, 244 MB of velocity.

    python benchmarks/saving.py --saves 10 --folder /data/scratch --json saving.json     # a minute or two
    python benchmarks/saving.py --saves 1 --width 0.0625 --batch 2                        # to see that it runs

Measures, one after the other: steps alone; `Saver.begin`, which training waits for, then steps until the write is done;
and the same state written by the training's own thread. The memory of the copy, taken once at the start, is shown by
itself. On a GPU, if there is one, else on the CPU.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from trainer import checkpoint
from trainer.bench.rates import list_tree, memory_bytes
from trainer.checkpoint import Saver
from trainer.distributed import Ranks
from trainer.recipe import RECIPES
from trainer.step import Learner


def time_s(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def measure(folder: Path, num_saves: int, batch: int, width: float) -> dict[str, float]:
    """Seconds, and bytes of memory that the copy takes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = Ranks(0, 1, device)
    learner = Learner(replace(RECIPES["paper"], width=width, lr=1e-9), 1000, ranks)
    learner.schedule.begin_step(1, 0, 1)
    images = torch.randn(batch, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def step() -> float:
        return time_s(lambda: learner.step(images, labels), device)

    def fail(number: int, what: str, _kept: str) -> None:
        sys.exit(f"error: save {number}: {what}")

    saver = Saver(folder, ranks, keep=2, minutes=1e-9, before=lambda: None, tell=fail)
    for _ in range(5):
        step()
    alone = [step() for _ in range(20)]
    before_bytes = memory_bytes(list_tree())
    prepare_s = time_s(lambda: saver.prepare(learner.state_dict()), device)
    stalls, during, writes = [], [], []
    for number in range(1, num_saves + 1):
        state = {**learner.state_dict(), "step": number}
        stalls.append(time_s(lambda s=state, n=number: saver.begin(s, n), device))  # type: ignore[misc]
        start_s = time.perf_counter()
        while not saver.is_due():  # the write is under way
            during.append(step())
        writes.append(time.perf_counter() - start_s)
        saver.wait()
    held_bytes = memory_bytes(list_tree()) - before_bytes
    own = [time_s(lambda: checkpoint.save(folder / "own.pt", learner.state_dict()), device) for _ in range(num_saves)]
    return {
        "file_bytes": (folder / "last.pt").stat().st_size,
        "prepare_s": prepare_s,
        "stall_s": statistics.median(stalls),
        "shortest_stall_s": min(stalls),
        "longest_stall_s": max(stalls),
        "step_s": statistics.median(alone),
        "longest_step_s": max(alone),
        "step_while_writing_s": statistics.median(during),
        "longest_step_while_writing_s": max(during),
        "write_s": statistics.median(writes),
        "in_the_own_thread_s": statistics.median(own),
        "held_bytes": held_bytes,
        "saves": num_saves,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="For how long does a checkpoint stop training?")
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--width", type=float, default=1.0, help="fraction of the net's")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), options.saves, options.batch, options.width)
    for name, value in found.items():
        print(f"{name:<30} {value:,.3f}" if name.endswith("_s") else f"{name:<30} {value:,}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
