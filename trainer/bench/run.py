"""`alexnet-bench`: the measurements put together, each with its limit, as an object and as a table."""

import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pipeline.colors import ColorStats
from pipeline.common import console
from pipeline.loader import TrainLoader
from pipeline.manifest import IMAGE_SIZE_PX
from pipeline.options import LoaderOptions, count_threads
from pipeline.shards import ShardSet
from trainer.bench.advice import Readings, diagnose
from trainer.bench.rates import Clock, Rate, Task, Work, alternate, gpu_memory_bytes, list_tree, memory_bytes
from trainer.bench.tasks import (
    Trainee,
    count_macs,
    count_step_flops,
    endless,
    find_samples,
    limit_task,
    loader_task,
    make_batch,
    product_task,
    step_task,
    train_task,
)
from trainer.data import make_train_loader
from trainer.distributed import Ranks, gather, join
from trainer.recipe import Recipe
from trainer.record.environment import environment

DEFAULT_CLASSES = 1000
_VERSIONS = ("alexnet_dali", "python", "torch", "dali", "numpy", "cuda", "git_commit")
_HARDWARE = ("cpu", "num_cores", "memory_bytes", "gpus", "gpu_driver", "os")

Result = dict[str, Any]


@dataclass(frozen=True)
class BenchJob:
    """What to measure ("loader", "step" or "train"), on what, for how long in all and in how many rounds."""

    what: str
    recipe: Recipe
    shards: str | None
    use_gpu: bool
    duration_s: float
    num_rounds: int
    as_json: bool
    loader: LoaderOptions = LoaderOptions()


def run_rank(job: BenchJob) -> int:
    """The measurement as one rank does it; the first one prints. Returns the exit status."""
    with join(job.use_gpu) as ranks:
        result = measure(job, ranks)
        if ranks.is_first:
            (console.print_json if job.as_json else show)(result)
    return 0


def measure(job: BenchJob, ranks: Ranks, clock: Clock = time.perf_counter) -> Result:
    """The object that --json prints, over all ranks: rates in turns, each beside the limit of this machine."""
    before = memory_bytes(list_tree()), gpu_memory_bytes(ranks)
    found = environment()
    what = {"loader": _measure_loader, "step": _measure_step, "train": _measure_train}[job.what]
    return {
        "bench": job.what,
        "recipe": job.recipe.name,
        "global_batch_size": job.recipe.global_batch_size,
        "device": ranks.device.type,
        "num_ranks": ranks.world_size,
        "started": found["started"],
        "versions": {name: found[name] for name in _VERSIONS},
        "hardware": {name: found[name] for name in _HARDWARE},
        **what(job, ranks, clock),
        "memory": _compare_memory(*before, ranks),
    }


def _measure_loader(job: BenchJob, ranks: Ranks, clock: Clock) -> Result:
    """Feeding with nobody consuming, beside decoding alone."""
    loader, _, limit, about_limit = _open_feed(job, ranks)
    rates = _alternate({"loader": loader_task(endless(loader)), "limit": limit}, job, ranks, clock)
    return {
        **_describe_feed(loader),
        **_describe_rate(rates["loader"]),
        "limit": {**about_limit, **rates["limit"].to_json()},
        "ratio": rates["loader"].ratio_to(rates["limit"]),
    }


def _measure_step(job: BenchJob, ranks: Ranks, clock: Clock) -> Result:
    """The step on synthetic data that lies on the device, beside a matrix product."""
    num_classes = ShardSet.open(job.shards).num_classes if job.shards else DEFAULT_CLASSES
    trainee = Trainee(job.recipe, num_classes, ranks, clock)
    product_flops, product = product_task(ranks, trainee.dtype)
    tasks = {"step": step_task(trainee, make_batch(trainee, num_classes)), "limit": product}
    rates = _alternate(tasks, job, ranks, clock)
    parts_s = trainee.take_parts_s(rates["step"].num_done // job.recipe.global_batch_size)
    step_flops = count_step_flops(job.recipe, num_classes)
    return {
        "precision": _name(trainee.dtype),
        "num_classes": num_classes,
        **_describe_rate(rates["step"]),
        "ms_per_step": 1000 * job.recipe.global_batch_size / rates["step"].per_s,
        "parts_ms": {name: 1000 * part_s for name, part_s in parts_s.items()},
        "forward_gmacs_per_image": sum(count_macs(job.recipe, num_classes).values()) / 1e9,
        "tflops": rates["step"].per_s * step_flops / 1e12,
        "limit": {
            "what": "a matrix product in the same precision",
            "tflops": rates["limit"].per_s * product_flops / 1e12,
            **rates["limit"].to_json("products"),
        },
        "ratio": rates["step"].ratio_to(rates["limit"]) * step_flops / product_flops,
    }


def _measure_train(job: BenchJob, ranks: Ranks, clock: Clock) -> Result:
    """Feeding alone, the step alone and both together, in turns; and what limits."""
    loader, shards, limit, about_limit = _open_feed(job, ranks)
    trainee, batches = Trainee(job.recipe, shards.num_classes, ranks, clock), endless(loader)
    tasks = {
        "train": train_task(trainee, batches, clock),
        "loader": loader_task(batches),
        "step": step_task(trainee, make_batch(trainee, shards.num_classes)),
        "limit": limit,
    }
    rates = _alternate(tasks, job, ranks, clock)
    readings = Readings(
        feed=rates["loader"].per_s,
        step=rates["step"].per_s,
        together=rates["train"].per_s,
        data_wait_fraction=rates["train"].waited_fraction,
        decode_limit=rates["limit"].per_s,
        on_gpu=job.use_gpu,
        precision=_name(trainee.dtype),
        encoding=shards.manifest.encoding,
        decode=loader.spec.decode,
        threads_per_rank=loader.spec.num_threads,
        num_cores=count_threads(),
        num_ranks=ranks.world_size,
        num_gpus_visible=torch.cuda.device_count(),
        raw_bytes=shards.num_samples("train") * IMAGE_SIZE_PX**2 * 3,
    )
    return {
        "precision": readings.precision,
        **_describe_feed(loader),
        **_describe_rate(rates["train"]),
        "data_wait_fraction": readings.data_wait_fraction,
        "loader": {**_describe_rate(rates["loader"]), "ratio": rates["loader"].ratio_to(rates["limit"])},
        "step": _describe_rate(rates["step"]),
        "limit": {**about_limit, **rates["limit"].to_json()},
        "diagnosis": asdict(diagnose(readings)),
    }


def fit_batch(recipe: Recipe, num_samples: int, num_ranks: int) -> Recipe:
    """The recipe with a batch that a small set can fill; as it is where it can."""
    size = min(recipe.global_batch_size, num_samples) // num_ranks * num_ranks
    return recipe if size in (0, recipe.global_batch_size) else replace(recipe, global_batch_size=size)


def _open_feed(job: BenchJob, ranks: Ranks) -> tuple[TrainLoader, ShardSet, Task, Result]:
    """The loader, its shards, what it is held against, and what that is. The first rank measures the limit with all
    cores, the others stand by."""
    assert job.shards is not None  # the command sees to it
    shards = ShardSet.open(job.shards)
    colors = ColorStats.load(shards.root, shards.fingerprint)
    loader = make_train_loader(shards, colors, job.recipe, ranks, 0, job.loader)
    places = find_samples(shards)
    words, limit = limit_task(places, shards.manifest.encoding)
    mean_bytes = statistics.mean(place.size for place in places)
    about = {"what": words, "num_distinct": len(places), "mean_bytes": mean_bytes}
    return loader, shards, limit if ranks.is_first else Task(lambda _: Work(0)), about


def _alternate(tasks: dict[str, Task], job: BenchJob, ranks: Ranks, clock: Clock) -> dict[str, Rate]:
    return alternate(tasks, num_rounds=job.num_rounds, duration_s=job.duration_s, ranks=ranks, clock=clock)


def _describe_feed(loader: TrainLoader) -> Result:
    return {name: getattr(loader.spec, name) for name in ("encoding", "decode", "num_threads")}


def _describe_rate(rate: Rate) -> Result:
    return {**rate.to_json(), "cores_used": rate.cores_used}


def _name(dtype: torch.dtype) -> Any:
    return "bf16" if dtype == torch.bfloat16 else "float32"


def _compare_memory(resident: int, on_gpu: int | None, ranks: Ranks) -> Result:
    """Peak of the resident memory, what of it was added, and the GPU memory in use now, summed over ranks."""
    peak, gpu = memory_bytes(list_tree(), peak=True), gpu_memory_bytes(ranks)
    mine = {"peak_rss_bytes": peak, "added_rss_bytes": peak - resident, "gpu_bytes": gpu, "added_gpu_bytes": None}
    if gpu is not None and on_gpu is not None:
        mine["added_gpu_bytes"] = gpu - on_gpu
    every = gather(mine, ranks)
    return {name: None if value is None else sum(one[name] for one in every) for name, value in mine.items()}


def show(result: Result) -> None:
    """The object as a table: each number beside its limit."""
    hardware, memory, cores = result["hardware"], result["memory"], result["hardware"]["num_cores"]
    rows = {"loader": _list_loader, "step": _list_step, "train": _list_train}[result["bench"]](result)
    rows.append(["CPU cores used", f"{result['cores_used']:.1f}", f"{cores}", f"{result['cores_used'] / cores:.0%}"])
    rows.append(_list_memory("memory, peak", memory["peak_rss_bytes"], hardware["memory_bytes"]))
    if memory["gpu_bytes"] is not None:
        total = sum(gpu["memory_bytes"] for gpu in hardware["gpus"][: result["num_ranks"]])
        rows.append(_list_memory("GPU memory", memory["gpu_bytes"], total))
    what = [f"recipe {result['recipe']}", f"batch {result['global_batch_size']}"]
    what += [result["precision"]] if "precision" in result else []
    if "encoding" in result:
        threads = f"threads a rank {result['num_threads']}"
        what += [f"{result['encoding']} shards", f"decode {result['decode']}", threads]
    title = f"{result['bench']} on {result['num_ranks']} x {result['device']}: {', '.join(what)}"
    console.print_table(title, ["", f"median of {result['num_rounds']} rounds (range)", "limit", "of it"], rows)
    console.say(f"limit: {result['limit']['what']}")
    if "diagnosis" in result:
        console.say("\n  - ".join([result["diagnosis"]["finding"], *result["diagnosis"]["advice"]]))


def _list_rate(name: str, rate: Result, limit: float | None = None, ratio: float | None = None) -> list[str]:
    cell = f"{rate['images_per_s']:,.0f} ({rate['lowest']:,.0f} to {rate['highest']:,.0f})"
    return [name, cell, "" if limit is None else f"{limit:,.0f}", "" if ratio is None else f"{ratio:.0%}"]


def _list_memory(name: str, used: int, total: int) -> list[str]:
    return [name, f"{used / 2**30:.2f} GiB", f"{total / 2**30:.1f} GiB", f"{used / total:.0%}"]


def _list_loader(result: Result) -> list[list[str]]:
    return [_list_rate("images/s", result, result["limit"]["images_per_s"], result["ratio"])]


def _list_step(result: Result) -> list[list[str]]:
    step_ms, ratio = result["ms_per_step"], result["ratio"]
    return [
        _list_rate("images/s", result, result["images_per_s"] / ratio, ratio),
        ["TFLOP/s", f"{result['tflops']:.3g}", f"{result['limit']['tflops']:.3g}", f"{ratio:.0%}"],
        ["ms a step", f"{step_ms:,.2f}", f"{step_ms * ratio:,.2f}", ""],
        *(
            [f"  {name}", f"{part_ms:,.2f}", "", f"{part_ms / step_ms:.0%} of the step"]
            for name, part_ms in result["parts_ms"].items()
        ),
    ]


def _list_train(result: Result) -> list[list[str]]:
    loader, step = result["loader"], result["step"]
    bound = min(loader["images_per_s"], step["images_per_s"])
    return [
        _list_rate("feeding alone, images/s", loader, result["limit"]["images_per_s"], loader["ratio"]),
        _list_rate("step alone, images/s", step),
        _list_rate("together, images/s", result, bound, result["images_per_s"] / bound),
        ["waiting for data", f"{result['data_wait_fraction']:.0%} of the time", "", ""],
    ]
