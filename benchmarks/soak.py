"""Batches for as long as you like, and whether memory stays flat: a line fitted to what the process holds.

    python benchmarks/soak.py shards --minutes 30
    python benchmarks/soak.py shards --minutes 30 --device gpu

The decision that shaped it: every batch is taken and dropped, epoch after epoch, an evaluation after each; resident
memory is read at even intervals and the first quarter, in which buffers fill, is left out of the fit. Exits with 1 if
memory grows by more than --limit-mib an hour. Left out: speed (feed.py).
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import ColorStats, EvalLoader, ShardSet, TrainLoader

WARM_UP_SHARE = 0.25


def main() -> None:
    options = parse_arguments()
    shards = ShardSet.open(options.shards)
    colors = ColorStats.load(shards.root, shards.fingerprint)
    device: Any = options.device
    train = TrainLoader(
        shards,
        colors,
        global_batch_size=options.batch,
        device=device,
        decode=options.decode,
        cache=options.cache,
        num_threads=options.threads,
    )
    evaluation = EvalLoader(shards, colors, batch_size=options.batch, device=device, num_threads=options.threads)
    times_s, memory_mib, files = [], [], []
    start_s, num_images, next_s = time.monotonic(), 0, 0.0
    for num_batch in endless(train, evaluation):
        num_images += num_batch
        now_s = time.monotonic() - start_s
        if now_s >= next_s:
            next_s = now_s + options.interval_s
            times_s.append(now_s)
            memory_mib.append(read_resident_mib())
            files.append(len(list(Path("/proc/self/fd").iterdir())))
        if now_s > 60 * options.minutes:
            break
    slope, error = fit_slope(times_s, memory_mib)
    print(
        f"{num_images:,} images, {train.epoch - 1} epochs in {now_s / 60:.1f} min on {options.device}, decode "
        f"{train.feed.decode}: resident memory {memory_mib[0]:.0f} MiB at first, {memory_mib[-1]:.0f} at last, at most "
        f"{max(memory_mib):.0f}; slope {slope:+.1f} ± {error:.1f} MiB an hour (95 %, n = {len(times_s)}); open files "
        f"{files[0]} to {files[-1]}; DALI {version('nvidia-dali-cuda120')}, torch {version('torch')}"
    )
    if slope - error > options.limit_mib or files[-1] > files[len(files) // 2]:
        sys.exit("memory or the number of open files grows")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Resident memory while batches are taken, and its slope.")
    parser.add_argument("shards", help="folder of shards, with color.json")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--interval-s", type=float, default=5.0, help="between two readings")
    parser.add_argument("--limit-mib", type=float, default=20.0, help="growth an hour that is too much")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--decode", choices=["auto", "host", "mixed", "hybrid"], default="auto")
    parser.add_argument("--cache", choices=["raw"], default=None)
    return parser.parse_args()


def endless(train: TrainLoader, evaluation: EvalLoader) -> Iterator[int]:
    """The number of images in each batch, of a training epoch, an evaluation, a training epoch, ..."""
    while True:
        for loader in (train, evaluation):
            for batch in loader:
                yield len(batch.labels)


def read_resident_mib() -> float:
    """What this process holds now (proc(5), VmRSS)."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def fit_slope(times_s: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Slope an hour of a line through the later three quarters, and half of its 95 % interval (two standard errors)."""
    t, v = (np.asarray(series, float)[int(WARM_UP_SHARE * len(times_s)) :] for series in (times_s, values))
    if len(t) < 3:
        raise SystemExit(f"error: {len(t)} readings after the warm-up, expected 3 or more; raise --minutes")
    hours = (t - t.mean()) / 3600
    slope = (hours @ (v - v.mean())) / (hours @ hours)
    residuals = v - v.mean() - slope * hours
    return slope, 2 * np.sqrt(residuals @ residuals / (len(t) - 2) / (hours @ hours))


if __name__ == "__main__":
    main()
