"""Batches, or a whole training run, for as long as you like, and whether memory stays flat: a line fitted to it.

    python benchmarks/soak.py shards --minutes 30
    python benchmarks/soak.py shards --minutes 30 --train --ranks 2

Resident memory is read at even intervals; the first quarter, in which buffers fill, does not count. `--train` watches
the processes of the command itself, and ends it as a scheduler would. Exits with 1 if memory grows by more than
--limit-mib an hour, if files or threads become more, or if anything is left behind.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WARM_UP_SHARE = 0.25
_END_S = 90  # the launcher gives its ranks 60 s to save
_NOT_OURS = ("torchinductor_", "torchelastic_")  # torch's cache, one for all runs of a user; torchrun's folder of logs


class Reading(NamedTuple):
    """What some processes hold at a moment: seconds since the start, MiB, numbers of files, threads and zombies."""

    time_s: float
    memory_mib: float
    files: int
    threads: int
    zombies: int = 0


def main() -> None:
    options = parse_arguments()
    what, readings, left = watch_training(options) if options.train else watch_loaders(options)
    slope, error = fit_slope([reading.time_s for reading in readings], [reading.memory_mib for reading in readings])
    memory = [reading.memory_mib for reading in readings]
    first, middle, last = readings[0], readings[len(readings) // 2], readings[-1]
    print(
        f"{what}: resident memory {memory[0]:.0f} MiB at first, {memory[-1]:.0f} at last, at most {max(memory):.0f}; "
        f"slope {slope:+.1f} ± {error:.1f} MiB an hour (95 %, n = {len(readings)}); open files {first.files}, "
        f"{middle.files}, {last.files} at first, in the middle, at last; threads {first.threads}, {middle.threads}, "
        f"{last.threads}; zombies at most {max(reading.zombies for reading in readings)}; left behind: "
        f"{', '.join(left) or 'nothing'}; DALI {version('nvidia-dali-cuda120')}, torch {version('torch')}"
    )
    counts = [reading.files for reading in readings], [reading.threads for reading in readings]
    if slope - error > options.limit_mib or any(map(has_grown, counts)):
        sys.exit("memory, open files or threads grow")
    if left or any(reading.zombies for reading in readings[1:]):
        sys.exit("something is left behind")


def has_grown(counts: Sequence[int]) -> bool:
    """Whether the least of the last quarter is more than the most of the first half: a thread that writes a checkpoint
    comes and goes, what is never closed stays."""
    return min(counts[-max(1, len(counts) // 4) :]) > max(counts[: max(1, len(counts) // 2)])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Resident memory while batches are taken, and its slope.")
    parser.add_argument("shards", help="folder of shards, with color.json")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--interval-s", type=float, default=5.0, help="between two readings")
    parser.add_argument("--limit-mib", type=float, default=20.0, help="growth an hour that is too much")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--decode", choices=["auto", "cpu", "mixed", "hybrid"], default="auto")
    parser.add_argument("--cache-gib", type=float, default=0.0, help="of GPU memory for decoded images")
    parser.add_argument("--train", action="store_true", help="watch alexnet-train instead of the loaders alone")
    parser.add_argument("--ranks", type=int, default=1, help="of --train, under torchrun if more than 1")
    parser.add_argument("--width", type=float, default=1 / 16, help="of --train's net")
    parser.add_argument("--readings", type=Path, default=None, help="write every reading to this CSV file")
    return parser.parse_args()


def watch_loaders(options: argparse.Namespace) -> tuple[str, list[Reading], list[str]]:
    """What was done, and readings of this process taking batches."""
    from pipeline import ColorStats, EvalLoader, LoaderOptions, ShardSet, TrainLoader

    shards = ShardSet.open(options.shards)
    colors = ColorStats.load(shards.root, shards.fingerprint)
    device: Any = options.device
    given = LoaderOptions(decode=options.decode, cache_gib=options.cache_gib, num_threads=options.threads)
    train = TrainLoader(shards, colors, options=given, global_batch_size=options.batch, device=device)
    given = LoaderOptions(num_threads=options.threads)
    evaluation = EvalLoader(shards, colors, options=given, batch_size=options.batch, device=device)
    readings: list[Reading] = []
    start_s, num_images, next_s = time.monotonic(), 0, 0.0
    for num_batch in endless(train, evaluation):
        num_images += num_batch
        now_s = time.monotonic() - start_s
        if now_s >= next_s:
            next_s = now_s + options.interval_s
            readings.append(read_processes([os.getpid()], now_s))
            keep(readings[-1], options.readings)
        if now_s > 60 * options.minutes:
            break
    what = (
        f"{num_images:,} images, {train.epoch - 1} epochs in {now_s / 60:.1f} min on {options.device}, decode "
        f"{train.spec.decode}"
    )
    return what, readings, []


def endless(train: Any, evaluation: Any) -> Iterator[int]:
    """The number of images in each batch, of a training epoch, an evaluation, a training epoch, ..."""
    while True:
        for loader in (train, evaluation):
            for batch in loader:
                yield len(batch.labels)


def watch_training(options: argparse.Namespace) -> tuple[str, list[Reading], list[str]]:
    """What was done, readings of all processes of a training run, and what it left behind after SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="alexnet-soak-") as folder:
        temporary = Path(folder, "tmp")
        temporary.mkdir()
        mark = f"TMPDIR={temporary}"
        shared: set[str] = set()
        started = [sys.executable, "-m", "trainer"]
        if options.ranks > 1:
            started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks)]
            started += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "trainer"]
        flags = ["--shards", options.shards, "--runs", folder, "--name", "soak", "--recipe", "demo"]
        flags += ["--global-batch-size", str(options.batch), "--set", f"width={options.width}"]
        flags += ["--epochs", "1000000", "--decode", options.decode, "--cache-gib", str(options.cache_gib)]
        flags += ["--gpus", "0"] if options.device == "cpu" and options.ranks == 1 else []
        flags += [] if options.threads is None else ["--threads", str(options.threads)]
        process = subprocess.Popen(
            [*started, *flags],
            env={**os.environ, "TMPDIR": str(temporary)},
            stderr=subprocess.DEVNULL,
        )
        metrics, readings, start_s = Path(folder, "soak", "metrics.jsonl"), list[Reading](), time.monotonic()
        try:
            while (now_s := time.monotonic() - start_s) < 60 * options.minutes:
                time.sleep(options.interval_s)
                if process.poll() is not None:
                    raise SystemExit(f"error: training ended by itself with status {process.returncode}")
                if metrics.exists():  # from the first record on: before it everything is being built
                    pids = list_processes(mark)
                    readings.append(read_processes(pids, now_s))
                    shared |= find_shared(pids)
                    keep(readings[-1], options.readings)
            process.send_signal(signal.SIGTERM)
            status = process.wait(_END_S)
        finally:
            for pid in list_processes(mark):
                os.kill(pid, signal.SIGKILL)
        left = [] if status in (143, -signal.SIGTERM, 1) else [f"exit status {status}"]
        left += [f"process {pid}" for pid in list_processes(mark)]
        left += [path for path in sorted(shared) if Path(path).exists()]
        left += [path.name for path in temporary.iterdir() if not path.name.startswith(_NOT_OURS)]
        lines = metrics.read_text().splitlines()
        num_epochs = sum('"kind": "eval"' in line for line in lines)
    what = f"{num_epochs} epochs of training in {options.minutes:.1f} min, {options.ranks} rank(s) on {options.device}"
    return what, readings, left


def list_processes(mark: str) -> list[int]:
    """The processes that have `mark` in the environment they were started with, and their children that are zombies.

    torchrun gives each rank a session and a group of its own, and a lost child loses its parent: this stays.
    """
    parents, dead = set(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                parents.add(int(folder.name))
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if state == "Z":
            dead[int(folder.name)] = int(parent)
    return sorted(parents | {pid for pid, parent in dead.items() if parent in parents})


def read_processes(pids: Sequence[int], time_s: float) -> Reading:
    """What these processes hold now, together (proc(5): VmRSS, Threads, fd); those that end meanwhile count nothing."""
    memory_mib, files, threads, zombies = 0.0, 0, 0, 0
    for pid in pids:
        folder = Path("/proc", str(pid))
        try:
            lines = (folder / "status").read_text(encoding="ascii", errors="replace").splitlines()
            status = {name: value for name, _, value in (line.partition(":\t") for line in lines)}
            zombies += status["State"].startswith("Z")
            memory_mib += int(status.get("VmRSS", "0 kB").split()[0]) / 1024
            threads += int(status["Threads"])
            files += len(list((folder / "fd").iterdir()))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return Reading(time_s, memory_mib, files, threads, zombies)


def find_shared(pids: Sequence[int]) -> set[str]:
    """Shared memory with a name that these processes have mapped (proc(5), maps)."""
    found = set()
    for pid in pids:
        try:
            lines = Path("/proc", str(pid), "maps").read_text(errors="replace").splitlines()
        except OSError:
            continue
        found |= {path for line in lines if (path := line[line.find("/") :]).startswith("/dev/shm/")}
    return found


def keep(reading: Reading, path: Path | None) -> None:
    if path is not None:
        with path.open("a", encoding="ascii") as file:
            file.write(",".join(f"{value:g}" for value in reading) + "\n")


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
