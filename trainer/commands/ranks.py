"""Flags about ranks: how many, on which devices, how the net is spread over them, what happens when one dies.

The decision that shaped it: as in cli.py, everything is checked before anything heavy is made. Left out: starting the
ranks (launch.py).
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from pipeline.common import console
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from trainer.parallel import Parallel


def add_rank_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All None unless given, so that a resumed run keeps its own."""
    parallel = click.option("--parallel", type=click.Choice(["auto", "data", "columns", "hybrid"]), show_default="data",
                            help="data: each GPU a share of the batch; columns: the paper's two towers; hybrid: "
                                 "convolutions by batch, the rest by unit; auto: what a model of the link says is "
                                 "fastest.")  # fmt: skip
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

    from trainer import slurm
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


def choose_parallel(
    recipe: Recipe,
    num_classes: int,
    world_size: int,
    *,
    use_gpu: bool,
    asked: dict[str, Any],
    saved: dict[str, Any],
) -> "Parallel":
    """What was asked for, else what the run to resume had, else the default; "auto" becomes a mode, and says why.

    A saved mode that this number of ranks does not allow becomes data, and says so. Raises UserError for one asked for.
    """
    from pipeline.common.errors import UserError
    from trainer.interconnect import CPU, Device, choose, find_link
    from trainer.parallel import Parallel, check

    wanted = {**saved, **{name: value for name, value in asked.items() if value is not None}}
    says = os.environ.get("RANK", "0") == "0"
    if world_size == 1:
        return Parallel(**{**wanted, "mode": "data"})
    if wanted.get("mode") == "auto":
        device = Device() if use_gpu else CPU
        wanted["mode"], why = choose(recipe, num_classes, world_size, find_link(use_gpu, world_size), device)
        if says:
            console.note(why)
    parallel = Parallel(**wanted)
    try:
        check(parallel.mode, recipe, world_size)
    except UserError as error:
        if asked.get("mode") is not None or parallel.mode == "data":
            raise
        if says:
            console.note(f"the run had --parallel {parallel.mode}, this one has data ({error})")
        parallel = Parallel(**{**wanted, "mode": "data"})
    return parallel
