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
from pipeline.options import LoaderOptions
from pipeline.shards import ShardSet
from trainer.bench.advice import Readings, diagnose
from trainer.bench.rates import Clock, Rate, Task, Work, alternate, gpu_memory_bytes
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
from trainer.bench.usage import count_cores, list_tree, memory_bytes
from trainer.data import make_train_loader
from trainer.distributed import Ranks, gather, join
from trainer.recipe import Recipe
from trainer.record.environment import environment

DEFAULT_CLASSES = 1000
_VERSIONS = ("alexnet_dali", "python", "torch", "dali", "numpy", "cuda", "git_commit")
_HARDWARE = ("cpu", "num_cores", "memory_bytes", "gpus", "gpu_driver", "os")


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
        result = {"loader": measure_loader, "step": measure_step, "train": measure_train}[job.what](job, ranks)
        if not ranks.is_first:
            return 0
        if job.as_json:
            console.print_json(result)
        else:
            show(result)
    return 0


def measure_loader(job: BenchJob, ranks: Ranks, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Feeding with nobody consuming, beside decoding alone."""
    before = _read_memory(ranks)
    loader, shards = _open_loader(job, ranks)
    limit_words, limit, images = _make_limit(shards, ranks)
    tasks = {"loader": loader_task(endless(loader)), "limit": limit}
    rates = _alternate(tasks, job, ranks, clock)
    return {
        **_describe(job, ranks),
        **_describe_feed(loader, shards),
        **rates["loader"].to_json(),
        "cores_used": rates["loader"].cores_used,
        "limit": {"what": limit_words, **images, **rates["limit"].to_json()},
        "ratio": rates["loader"].ratio_to(rates["limit"]),
        "memory": _compare_memory(before, ranks),
    }


def measure_step(job: BenchJob, ranks: Ranks, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """The step on synthetic data that lies on the device, beside a matrix product."""
    num_classes = ShardSet.open(job.shards).num_classes if job.shards else DEFAULT_CLASSES
    before = _read_memory(ranks)
    trainee = Trainee(job.recipe, num_classes, ranks, clock)
    product_flops, product = product_task(ranks, trainee.dtype)
    tasks = {"step": step_task(trainee, make_batch(trainee, num_classes)), "limit": product}
    rates = _alternate(tasks, job, ranks, clock)
    step_s = job.recipe.global_batch_size / rates["step"].per_s
    parts_s = trainee.take_parts_s(rates["step"].num_done // job.recipe.global_batch_size)
    step_flops = count_step_flops(job.recipe, num_classes)
    return {
        **_describe(job, ranks),
        "precision": _name(trainee.dtype),
        "num_classes": num_classes,
        **rates["step"].to_json(),
        "ms_per_step": 1000 * step_s,
        "parts_ms": {name: 1000 * part_s for name, part_s in parts_s.items()},
        "forward_gmacs_per_image": sum(count_macs(job.recipe, num_classes).values()) / 1e9,
        "tflops": rates["step"].per_s * step_flops / 1e12,
        "limit": {
            "what": "a matrix product in the same precision",
            "tflops": rates["limit"].per_s * product_flops / 1e12,
            **rates["limit"].to_json("products"),
        },
        "ratio": rates["step"].ratio_to(rates["limit"]) * step_flops / product_flops,
        "cores_used": rates["step"].cores_used,
        "memory": _compare_memory(before, ranks),
    }


def measure_train(job: BenchJob, ranks: Ranks, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Feeding alone, the step alone and both together, in turns; and what limits."""
    before = _read_memory(ranks)
    loader, shards = _open_loader(job, ranks)
    limit_words, limit, images = _make_limit(shards, ranks)
    trainee, batches = Trainee(job.recipe, shards.num_classes, ranks, clock), endless(loader)
    tasks = {
        "train": train_task(trainee, batches, clock),
        "loader": loader_task(batches),
        "step": step_task(trainee, make_batch(trainee, shards.num_classes)),
        "limit": limit,
    }
    rates = _alternate(tasks, job, ranks, clock)
    waited = rates["train"].waited_fraction
    described = _describe(job, ranks)
    readings = Readings(
        feed=rates["loader"].per_s,
        step=rates["step"].per_s,
        together=rates["train"].per_s,
        data_wait_fraction=waited,
        decode_limit=rates["limit"].per_s,
        on_gpu=job.use_gpu,
        precision=_name(trainee.dtype),
        encoding=shards.manifest.encoding,
        decode=loader.spec.decode,
        threads_per_rank=loader.spec.num_threads,
        num_cores=count_cores(),
        num_ranks=ranks.world_size,
        num_gpus_visible=torch.cuda.device_count(),
        raw_bytes=shards.num_samples("train") * IMAGE_SIZE_PX**2 * 3,
    )
    return {
        **described,
        "precision": _name(trainee.dtype),
        **_describe_feed(loader, shards),
        **rates["train"].to_json(),
        "data_wait_fraction": waited,
        "loader": {
            **rates["loader"].to_json(),
            "cores_used": rates["loader"].cores_used,
            "ratio": rates["loader"].ratio_to(rates["limit"]),
        },
        "step": {**rates["step"].to_json(), "cores_used": rates["step"].cores_used},
        "limit": {"what": limit_words, **images, **rates["limit"].to_json()},
        "cores_used": rates["train"].cores_used,
        "memory": _compare_memory(before, ranks),
        "diagnosis": asdict(diagnose(readings)),
    }


def fit_batch(recipe: Recipe, num_samples: int, num_ranks: int) -> Recipe:
    """The recipe with a batch that a small set can fill; as it is where it can."""
    size = min(recipe.global_batch_size, num_samples) // num_ranks * num_ranks
    return recipe if size in (0, recipe.global_batch_size) else replace(recipe, global_batch_size=size)


def _alternate(tasks: dict[str, Task], job: BenchJob, ranks: Ranks, clock: Clock) -> dict[str, Rate]:
    return alternate(tasks, num_rounds=job.num_rounds, duration_s=job.duration_s, ranks=ranks, clock=clock)


def _open_loader(job: BenchJob, ranks: Ranks) -> tuple[TrainLoader, ShardSet]:
    assert job.shards is not None  # the command sees to it
    shards = ShardSet.open(job.shards)
    colors = ColorStats.load(shards.root, shards.fingerprint)
    loader = make_train_loader(shards, colors, job.recipe, ranks, 0, job.loader)
    return loader, shards


def _make_limit(shards: ShardSet, ranks: Ranks) -> tuple[str, Task, dict[str, Any]]:
    """(words, task, which images): the first rank measures with all cores, the others stand by."""
    places = find_samples(shards)
    images = {"num_distinct": len(places), "mean_bytes": statistics.mean(place.size for place in places)}
    words, task = limit_task(places, shards.manifest.encoding)
    return words, task if ranks.is_first else Task(lambda _: Work(0)), images


def _describe(job: BenchJob, ranks: Ranks) -> dict[str, Any]:
    found = environment()
    return {
        "bench": job.what,
        "recipe": job.recipe.name,
        "global_batch_size": job.recipe.global_batch_size,
        "device": ranks.device.type,
        "num_ranks": ranks.world_size,
        "started": found["started"],
        "versions": {name: found[name] for name in _VERSIONS},
        "hardware": {name: found[name] for name in _HARDWARE},
    }


def _describe_feed(loader: TrainLoader, shards: ShardSet) -> dict[str, Any]:
    spec = loader.spec
    return {"encoding": spec.encoding, "decode": spec.decode, "num_threads": spec.num_threads}


def _name(dtype: torch.dtype) -> Any:
    return "bf16" if dtype == torch.bfloat16 else "float32"


def _read_memory(ranks: Ranks) -> tuple[int, int | None]:
    return memory_bytes(list_tree()), gpu_memory_bytes(ranks)


def _compare_memory(before: tuple[int, int | None], ranks: Ranks) -> dict[str, Any]:
    """Peak of the resident memory, what of it came after `before`, and the GPU memory in use now, summed over ranks."""
    peak, gpu = memory_bytes(list_tree(), peak=True), gpu_memory_bytes(ranks)
    grown = None if gpu is None or before[1] is None else gpu - before[1]
    peaks, added, used, gpu_added = zip(*gather((peak, peak - before[0], gpu, grown), ranks), strict=True)
    on_gpu = gpu is not None
    return {
        "peak_rss_bytes": sum(peaks),
        "added_rss_bytes": sum(added),
        "gpu_bytes": sum(used) if on_gpu else None,
        "added_gpu_bytes": sum(gpu_added) if on_gpu else None,
    }


def show(result: dict[str, Any]) -> None:
    """The object as a table: each number beside its limit."""
    hardware, memory = result["hardware"], result["memory"]
    rows = {"loader": _loader_rows, "step": _step_rows, "train": _train_rows}[result["bench"]](result)
    cores = hardware["num_cores"]
    rows.append(["CPU cores used", f"{result['cores_used']:.1f}", f"{cores}", f"{result['cores_used'] / cores:.0%}"])
    rows.append(_memory_row("memory, peak", memory["peak_rss_bytes"], hardware["memory_bytes"]))
    if memory["gpu_bytes"] is not None:
        total = sum(gpu["memory_bytes"] for gpu in hardware["gpus"][: result["num_ranks"]])
        rows.append(_memory_row("GPU memory", memory["gpu_bytes"], total))
    what = [f"recipe {result['recipe']}", f"batch {result['global_batch_size']}", *_optional(result)]
    title = f"{result['bench']} on {result['num_ranks']} x {result['device']}: {', '.join(what)}"
    columns = ["", f"median of {result['num_rounds']} rounds (range)", "limit", "of it"]
    console.print_table(title, columns, rows)
    if "limit" in result:
        console.say(f"limit: {result['limit']['what']}")
    for line in _say_diagnosis(result.get("diagnosis")):
        console.say(line)


def _optional(result: dict[str, Any]) -> list[str]:
    words = [result["precision"]] if "precision" in result else []
    if "encoding" in result:
        words += [
            f"{result['encoding']} shards",
            f"decode {result['decode']}",
            f"threads a rank {result['num_threads']}",
        ]
    return words


def _rate_cell(rate: dict[str, Any]) -> str:
    return f"{rate['images_per_s']:,.0f} ({rate['lowest']:,.0f} to {rate['highest']:,.0f})"


def _memory_row(name: str, used: int, total: int) -> list[str]:
    return [name, f"{used / 2**30:.2f} GiB", f"{total / 2**30:.1f} GiB", f"{used / total:.0%}"]


def _loader_rows(result: dict[str, Any]) -> list[list[str]]:
    return [["images/s", _rate_cell(result), f"{result['limit']['images_per_s']:,.0f}", f"{result['ratio']:.0%}"]]


def _step_rows(result: dict[str, Any]) -> list[list[str]]:
    limit_rate = result["images_per_s"] / result["ratio"]
    rows = [
        ["images/s", _rate_cell(result), f"{limit_rate:,.0f}", f"{result['ratio']:.0%}"],
        ["TFLOP/s", f"{result['tflops']:.3g}", f"{result['limit']['tflops']:.3g}", f"{result['ratio']:.0%}"],
        ["ms a step", f"{result['ms_per_step']:,.2f}", f"{result['ms_per_step'] * result['ratio']:,.2f}", ""],
    ]
    for name, part_ms in result["parts_ms"].items():
        rows.append([f"  {name}", f"{part_ms:,.2f}", "", f"{part_ms / result['ms_per_step']:.0%} of the step"])
    return rows


def _train_rows(result: dict[str, Any]) -> list[list[str]]:
    loader, step, limit = result["loader"], result["step"], result["limit"]
    bound = min(loader["images_per_s"], step["images_per_s"])
    return [
        ["feeding alone, images/s", _rate_cell(loader), f"{limit['images_per_s']:,.0f}", f"{loader['ratio']:.0%}"],
        ["step alone, images/s", _rate_cell(step), "", ""],
        ["together, images/s", _rate_cell(result), f"{bound:,.0f}", f"{result['images_per_s'] / bound:.0%}"],
        ["waiting for data", f"{result['data_wait_fraction']:.0%} of the time", "", ""],
    ]


def _say_diagnosis(diagnosis: dict[str, Any] | None) -> list[str]:
    if diagnosis is None:
        return []
    return [diagnosis["finding"], *(f"  - {advice}" for advice in diagnosis["advice"])]
