"""Flags that several commands share: shards and runs, devices, the loader, ranks, safety."""

import os
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.common import console
from pipeline.common.errors import UserError
from trainer.recipe import Recipe, from_dict

if TYPE_CHECKING:
    from trainer.config import Parallel, Safety


SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}
VERSION = click.version_option(package_name="alexnet-dali")
RUNS = click.option("--runs", default="runs", envvar="ALEXNET_RUNS", show_envvar=True,
                    type=click.Path(path_type=Path), help="Folder of runs.")  # fmt: skip
GPUS = click.option("--gpus", "num_gpus", type=click.IntRange(min=0), show_default="all visible",
                    help="Number of GPUs; 0 computes on the CPU.")  # fmt: skip
THREADS = click.option("--threads", "num_threads", type=click.IntRange(min=1), show_default="one per CPU",
                       help="Decoding threads of each rank.")  # fmt: skip
RECIPE_SETTINGS = click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE",
                               help="Any field of the recipe; repeatable.")  # fmt: skip
GLOBAL_BATCH_SIZE = click.option("--global-batch-size", type=click.IntRange(min=1), show_default="the recipe's",
                                 help="Images a step, summed over ranks.")  # fmt: skip


def _group(*options: Callable[..., Any]) -> Callable[..., Any]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return add


# Of every command that reads shards and runs.
add_common_options = _group(
    VERSION,
    click.option("--shards", envvar="ALEXNET_SHARDS", show_envvar=True, type=click.Path(),
                 show_default="the run's own, else ./shards",
                 help="Folder of shards, or its URL (s3://bucket/prefix)."),
    RUNS,
    click.option("--cache-dir", envvar="ALEXNET_CACHE", show_envvar=True, type=click.Path(file_okay=False),
                 show_default="~/.cache/alexnet-dali",
                 help="Local folder to which shards behind a URL are downloaded."),
    GPUS,
    THREADS,
)  # fmt: skip

# Where images are decoded and kept: all None unless given, so that a resumed run keeps its own.
add_feed_options = _group(
    click.option("--decode", type=click.Choice(["auto", "cpu", "mixed", "hybrid"]), show_default="auto",
                 help="Decode JPEGs on the CPU's cores, on the GPU (mixed) or on both (hybrid); auto: mixed on a GPU."),
    click.option("--host-share", type=click.FloatRange(0, 1), show_default="0.5",
                 help="With hybrid: the share of each batch that the CPU decodes."),
    click.option("--hw-decoder-load", type=click.FloatRange(0, 1), show_default="0.9",
                 help="Of what the GPU decodes, the share of its JPEG engine."),
    click.option("--cache-gib", type=click.FloatRange(min=0), show_default="0",
                 help="With mixed: GPU memory in which decoded images are kept, GiB."),
    click.option("--prefetch", "prefetch_batches", type=click.IntRange(min=1), show_default="3",
                 help="Batches made ahead."),
)  # fmt: skip


def read_feeding(config: dict[str, Any]) -> dict[str, Any]:
    """The same of a run to be resumed, as its config.json has them, that of an earlier version too."""
    known = {name: value for name, value in (config.get("feeding") or {}).items() if name != "cache"}
    return known | ({"decode": "cpu"} if known.get("decode") == "host" else {})


def choose_loader(**given: Any) -> dict[str, Any]:
    """Fields of pipeline.LoaderOptions from those flags that were given."""
    from pipeline.options import LoaderOptions

    return _known(LoaderOptions, given)


def _known(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the dataclass's fields that were given."""
    return {field.name: given[field.name] for field in fields(kind) if given.get(field.name) is not None}


def add_rank_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All None unless given, so that a resumed run keeps its own."""
    parallel = click.option("--parallel", type=click.Choice(["data", "columns", "hybrid"]), show_default="data",
                            help="data: each GPU a share of the batch; columns: the paper's two towers; hybrid: "
                                 "convolutions by batch, the rest by unit.")  # fmt: skip
    gradients = click.option("--gradients", type=click.Choice(["float32", "bf16"]), show_default="float32",
                             help="How gradients are sent where they are averaged; bf16: half the bytes.")  # fmt: skip
    bucket = click.option("--bucket-mib", type=click.FloatRange(min=0, min_open=True), show_default="25",
                          help="Gradients sent at a time, MiB.")  # fmt: skip
    restarts = click.option("--max-restarts", type=click.IntRange(min=0), default=0, show_default=True,
                            help="When a rank dies, go on from the last checkpoint, so many times.")  # fmt: skip
    restart = click.option("--restart-epoch", is_flag=True, show_default=False,
                           help="With --resume: from its last whole epoch's end, on any number of GPUs.")  # fmt: skip
    for option in (restart, restarts, bucket, gradients, parallel):
        function = option(function)
    return function


def choose_devices(num_gpus: int | None) -> tuple[int, bool]:
    """(ranks on this machine, whether on GPUs). Wrong usage if more are asked for than are visible."""
    import torch

    from trainer import launch as slurm
    from trainer.distributed import under_launcher

    slurm.adopt(os.environ)
    found = torch.cuda.device_count()
    if num_gpus is not None and num_gpus > found:
        raise click.UsageError(
            f"--gpus {num_gpus}: {found} visible; use --gpus {found}"
            + (" (the CPU)" if found == 0 else "")
            + ", or check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    wanted = found if num_gpus is None else num_gpus
    if wanted == 0 and num_gpus is None and os.environ.get("RANK", "0") == "0":
        console.note("no GPU is visible: using the CPU")
    return (1 if under_launcher() else max(wanted, 1)), wanted > 0


def count_ranks(num_ranks: int) -> int:
    """Of the whole job: what a launcher says, else those about to be started."""
    return int(os.environ.get("WORLD_SIZE", num_ranks))


def check_divisible(recipe: Recipe, world_size: int) -> None:
    """Wrong usage if the recipe's batch cannot be divided among the ranks."""
    if recipe.global_batch_size % world_size:
        raise click.UsageError(
            f"--global-batch-size {recipe.global_batch_size} cannot be divided among {world_size} GPUs; "
            f"use {recipe.global_batch_size // world_size * world_size or world_size}"
        )


def choose_parallel(recipe: Recipe, world_size: int, *, asked: dict[str, Any], saved: dict[str, Any]) -> "Parallel":
    """What was asked for, else what the run to resume had, else the default.

    A saved mode that this number of ranks does not allow becomes data, and says so. Raises UserError for one asked for.
    """
    from trainer.config import Parallel
    from trainer.parallel import check

    wanted = {**saved, **{name: value for name, value in asked.items() if value is not None}}
    if world_size == 1:
        return Parallel(**{**wanted, "mode": "data"})
    parallel = Parallel(**wanted)
    try:
        check(parallel.mode, recipe, world_size)
    except UserError as error:
        if asked.get("mode") is not None or parallel.mode == "data":
            raise
        if os.environ.get("RANK", "0") == "0":
            console.note(f"the run had --parallel {parallel.mode}, this one has data ({error})")
        parallel = Parallel(**{**wanted, "mode": "data"})
    return parallel


AUTO = "auto"  # of --resume
_FREE = {"name", "epochs"}  # fields of a recipe that may change in the middle of a run
# All None unless given, so that a resumed run keeps its own.
add_safety_options = _group(
    click.option("--checkpoint-minutes", type=click.FloatRange(min=0), show_default="10",
                 help="Save after so many minutes within an epoch, too; 0: only at its end."),
    click.option("--keep-checkpoints", type=click.IntRange(min=1), show_default="3",
                 help="How many of the last checkpoints are kept, besides the best."),
    click.option("--on-nonfinite", type=click.Choice(["stop", "skip"]), show_default="stop",
                 help="When a loss is not finite: stop, or leave that update out and count."),
    click.option("--timeout-s", type=click.FloatRange(min=1), show_default="600",
                 help="End, with what all threads are doing, when nothing moves for so long, s."),
)  # fmt: skip


def choose_safety(saved: dict[str, Any], **given: Any) -> "Safety":
    """What was asked for, else what the run to resume had, else the default."""
    from trainer.config import Safety

    return Safety(**_known(Safety, saved) | _known(Safety, given))


def find_begun(runs: Path, name: str) -> Path | None:
    """The run that `--resume auto` goes on with: the newest of that name, saved yet or not."""
    from trainer.record.runs import CONFIG, find_newest

    return find_newest(runs, name, CONFIG)


def check_same(folder: Path, config: dict[str, Any], recipe: Recipe, seed: int, weights: bool) -> None:
    """Raises UserError if `--resume auto` was given settings that are not those of the run in `folder`."""
    begun, asked = asdict(from_dict(config["recipe"])), asdict(recipe)
    pairs = [(name, begun[name], value) for name, value in asked.items() if name not in _FREE]
    pairs += [("seed", config["seed"], seed), ("weights to start from", bool(config.get("weights")), weights)]
    for name, was, value in pairs:
        if was != value:
            raise UserError(
                f"--resume auto: {folder} was begun with {name} {was}, got {value}; repeat the command that began it, "
                "or choose another --name"
            )
