"""Our way of preparing images as a contestant of prepare.py, and where the time of one of its workers goes."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.children import Contestant
from peers.prepare_pool import Job, Timed, read_tar

NUM_STAGE_PASSES = 4
STAGES = {  # functions of ours that make up a stage, by the names they are looked up under
    "decode": "pipeline.images.resize.decode",
    "resize and crop": "pipeline.images.resize.to_square",
    "encode": "tools.sharding.write.encode",
}


def ours(job: Job) -> Contestant:
    from tools.sharding.make import make_shards
    from tools.sources.source import open_source

    def run(num: int) -> Timed:
        out = job.fresh()
        start_s = time.perf_counter()
        source = open_source(Path(job.tree if num == len(job.files) else job.tree + "-tiny"))
        summary = make_shards(source, out, num_workers=job.workers, samples_per_shard=job.samples_per_shard)
        return summary.images["train"], time.perf_counter() - start_s, num

    def stored(folder: str) -> int:
        import json

        num = 0
        for tar in sorted(job.out.glob("*.tar")):
            sources = json.loads(tar.with_suffix(".json").read_text(encoding="utf-8"))["sources"]
            for name, data in read_tar(tar):
                if name.endswith(".jpg"):
                    position = int(Path(sources[name[:-4]]).name.partition("_")[0])
                    (Path(folder) / f"{position:09d}.jpg").write_bytes(data)
                    num += 1
        return num

    def stages() -> dict[str, float]:
        return time_stages(Path(job.tree + "-few"), job.fresh)

    packages = ("alexnet-dali", "nvidia-dali-cuda120", "pillow", "simplejpeg", "webdataset", "numpy")
    return Contestant({"run": run, "stored": stored, "stages": stages}, packages)


def time_stages(tree: Path, fresh: Callable[[], Path]) -> dict[str, float]:
    """Where the time of one worker goes: ms an image for reading, each of STAGES, and all the rest of writing a shard.

    `make_shards` runs in this process, with functions replaced by ones that count; a stage does not count what it calls
    of another stage. Of some passes the fastest counts: other work can only add.
    """
    import dataclasses
    import importlib
    from unittest.mock import patch

    import torch

    from tools.sharding import make as sharder
    from tools.sources.source import open_source

    spent: dict[str, float] = {}
    nested = [0.0]

    def count(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            nested.append(0.0)
            start_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took_s = time.perf_counter() - start_s
                spent[stage] = spent.get(stage, 0.0) + took_s - nested.pop()
                nested[-1] += took_s

        return counting

    def run_here(function: Callable[..., Any], units: Any, *, on_result: Any, on_progress: Any, **_: Any) -> None:
        for unit in units:
            on_result(count("tar, checksums, index, sync", function)(unit, on_progress))

    torch.set_num_threads(1)  # as a worker does
    source = open_source(tree)
    source = dataclasses.replace(source, read=count("read", source.read))
    num, passes = len(source.entries("train")), []
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(sharder, "run_units", run_here))
        for stage, name in STAGES.items():
            module, _, attribute = name.rpartition(".")
            owner = importlib.import_module(module)
            patches.enter_context(patch.object(owner, attribute, count(stage, getattr(owner, attribute))))
        for _ in range(NUM_STAGE_PASSES):
            spent.clear()
            sharder.make_shards(source, fresh(), num_workers=1)
            passes.append({stage: 1e3 * seconds / num for stage, seconds in spent.items()})
    return min(passes, key=lambda stages: sum(stages.values()))
