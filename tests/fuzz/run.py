"""All readers under mutation for some minutes: `python -m tests.fuzz.run --minutes 20`, with atheris where it is there.

Each target has a process of its own, so that a crash or an endless loop does not keep the others from being run;
findings are kept as files and named at the end. With atheris (pip install atheris) what comes next follows the branches
that were taken; without it, mutants are counted through (--engine mutants).
"""

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.mutants import mutate

NAMES = (
    *("manifest", "index", "colors", "mean_image", "shard", "webdataset", "official", "devkit", "kaggle", "parquet"),
    *("checkpoint", "image", "other_image"),
)
LIMIT_MIB, LIMIT_S = 4096, 60  # of one run of a target


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutated bytes into every reader.")
    parser.add_argument("--minutes", type=float, default=20.0, help="for all targets together")
    parser.add_argument("--engine", choices=["atheris", "mutants"], default="atheris")
    parser.add_argument("--only", default=",".join(NAMES), help="names of targets")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="folder for inputs that were findings")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target:
        run_one(options.target, options.engine, options.seconds, options.out)
        return
    names, failed = options.only.split(","), []
    for name in names:
        seconds, out = 60 * options.minutes / len(names), options.out / name
        out.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "tests.fuzz.run", "--engine", options.engine, "--out", str(out)]
        done = subprocess.run(
            [*words, "--target", name, "--seconds", str(seconds)], capture_output=True, text=True, check=False
        )
        said = [line for line in done.stderr.splitlines() if line.startswith("Done ")] or done.stderr.splitlines()[-3:]
        print(f"{name}: {'; '.join(said)} {'' if done.returncode == 0 else f'STATUS {done.returncode}'}", flush=True)
        if done.returncode:
            failed.append(name)
            (out / "output.txt").write_text(done.stdout + done.stderr)
    if failed:
        sys.exit(f"findings in {', '.join(failed)}: see {options.out}")


def run_one(name: str, engine: str, seconds: float, out: Path) -> None:
    """One target until its time is over, in this process; ends it with a status at the first finding."""
    with tempfile.TemporaryDirectory(prefix="alexnet-fuzz-") as text:
        folder = Path(text)
        if engine == "atheris":
            import atheris

            with atheris.instrument_imports(include=["pipeline", "tools", "trainer"]):
                target = make_target(name, folder)
            corpus = folder / "corpus"
            corpus.mkdir()
            for number, seed in enumerate(target.seeds):
                (corpus / str(number)).write_bytes(seed)
            flags = [f"-max_total_time={int(seconds)}", f"-rss_limit_mb={LIMIT_MIB}", f"-timeout={LIMIT_S}"]
            flags += [f"-artifact_prefix={out}/", f"-max_len={2 * max(map(len, target.seeds)) + 64}", "-verbosity=1"]
            atheris.Setup([name, *flags, str(corpus)], lambda data: target.read(data))
            atheris.Fuzz()
            return
        target, number, num_read, end_s = make_target(name, folder), 0, 0, time.monotonic() + seconds
        while time.monotonic() < end_s:
            rng = random.Random(f"{name} {number}")
            data = mutate(target.seeds[number % len(target.seeds)], target.seeds, rng)
            (out / "current").write_bytes(data)  # what it was, if the process does not come back
            num_read += target.read(data)
            number += 1
        (out / "current").unlink()
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"Done {number} runs, {num_read} read, the others refused; peak {peak_mib:.0f} MiB", file=sys.stderr)


def make_target(name: str, folder: Path):
    from tests.fuzz.mutants import make_jpegs, make_others
    from tests.fuzz.targets import Target, make_targets, read_image

    if name in ("image", "other_image"):
        return Target(read_image, make_jpegs(64) if name == "image" else make_others(64))
    return make_targets(*make_inputs(folder), folder)[name]


def make_inputs(folder: Path) -> tuple[Path, dict[str, Path], Path]:
    """A small set of shards with colours, a source of each layout, and a checkpoint."""
    import numpy as np
    import torch

    from pipeline.colors import ColorStats
    from pipeline.shards import ShardSet
    from tests.layout_builders import BUILDERS
    from tools.sharding.make import make_shards
    from tools.sources.source import open_source
    from tools.synth import make_tree
    from trainer import checkpoint

    tree, shards = folder / "tree", folder / "made"
    make_tree(tree, num_classes=2, num_train=8, num_val=4, seed=0)
    make_shards(open_source(tree), shards, samples_per_shard=4, num_workers=1)
    image = np.full((256, 256, 3), 100, np.float32)
    stats = ColorStats.from_moments(np.full(3, 100.0), np.eye(3), image, 1, ShardSet.open(shards).fingerprint)
    stats.save(shards)
    sources = {name: BUILDERS[name](tree, folder / f"source-{name}") for name in BUILDERS if name != "folder"}
    weights = folder / "net.pt"
    checkpoint.save(weights, {"model": {"fc8.bias": torch.zeros(2)}, "step": 1, "name": "net"})
    return shards, sources, weights


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
