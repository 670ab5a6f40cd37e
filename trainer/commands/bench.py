"""`alexnet-bench`: flags and words. Everything is checked before anything heavy is imported."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.common import console
from pipeline.common.console import spell_command
from pipeline.common.errors import UserError
from trainer.commands.options import (
    GLOBAL_BATCH_SIZE,
    GPUS,
    RECIPE_SETTINGS,
    SETTINGS,
    THREADS,
    VERSION,
    add_feed_options,
    check_divisible,
    choose_devices,
    choose_loader,
    count_ranks,
)
from trainer.recipe import RECIPES, override

if TYPE_CHECKING:
    from pipeline.shards import ShardSet


@click.command(cls=console.Command, context_settings=SETTINGS)
@VERSION
@click.argument("what", type=click.Choice(["loader", "step", "train"]), default="loader")
@click.option("--shards", envvar="ALEXNET_SHARDS", show_envvar=True, type=click.Path(),
              show_default="./shards; step needs none", help="Folder of shards, or its URL.")  # fmt: skip
@click.option("--recipe", "recipe_name", type=click.Choice(list(RECIPES)), default="paper",
              help="Network, data and optimisation as one name.")  # fmt: skip
@GPUS
@THREADS
@add_feed_options
@GLOBAL_BATCH_SIZE
@click.option("--seconds", "duration_s", default=10.0, type=click.FloatRange(min=0.1),
              help="How long to measure each rate, s; warming up comes on top.")  # fmt: skip
@click.option("--rounds", "num_rounds", default=5, type=click.IntRange(min=1), help="Rounds to take the median of.")
@RECIPE_SETTINGS
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def command(
    what: str,
    shards: str | None,
    recipe_name: str,
    num_gpus: int | None,
    num_threads: int | None,
    global_batch_size: int | None,
    duration_s: float,
    num_rounds: int,
    settings: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> int:
    """Measure WHAT limits training, each rate beside the limit of this machine.

    \b
    loader  images/s of feeding alone, beside decoding the same images alone
    step    images/s and TFLOP/s of training alone, beside a matrix product
    train   both together: which of the two limits, or their overlap

    With step, data are synthetic and on the device already. train says what to change.
    Rates alternate in rounds; medians and spread are printed. Several GPUs: the sum over ranks.
    """
    changes = [*([f"global_batch_size={global_batch_size}"] if global_batch_size else []), *settings]
    recipe = override(RECIPES[recipe_name], changes)
    folder = shards if what == "step" else shards or "shards"
    opened = _open_shards(folder) if folder else None
    from pipeline.options import LoaderOptions
    from trainer.bench.run import BenchJob, fit_batch, run_rank
    from trainer.distributed import under_launcher
    from trainer.launch import launch, run_as_rank

    num_ranks, use_gpu = choose_devices(num_gpus)
    world_size = count_ranks(num_ranks)
    if opened and what != "step" and not any("global_batch_size" in change for change in changes):
        num_images, asked = opened.num_samples("train"), recipe.global_batch_size
        recipe = fit_batch(recipe, num_images, world_size)
        if recipe.global_batch_size != asked:
            batches = f"batches of {recipe.global_batch_size} instead of {asked}"
            console.note(f"{opened.root}: {num_images} training images, so {batches}")
    check_divisible(recipe, world_size)
    loader = LoaderOptions(**choose_loader(num_threads=num_threads, **given))
    job = BenchJob(what, recipe, folder, use_gpu, duration_s, num_rounds, as_json, loader)
    if opened and what != "step":
        opened.fetch("train")
    if under_launcher():
        return run_as_rank(run_rank, job)
    return launch(run_rank, (job,), num_ranks) if num_ranks > 1 else run_rank(job)


def _open_shards(folder: str) -> "ShardSet":
    """The shards with their colours, both checked; without any, the error says how to make some."""
    from pipeline.colors import ColorStats
    from pipeline.manifest import MANIFEST
    from pipeline.shards import ShardSet

    if "://" not in folder and not (Path(folder) / MANIFEST).is_file():
        raise UserError(
            f"{folder}: no shards ({MANIFEST}) here; name a folder with --shards, or make synthetic ones: alexnet-prep "
            f"synth images && {spell_command('alexnet-prep', 'shard', 'images', '--out', folder)} && "
            + spell_command("alexnet-prep", "pca", shards=folder)
        )
    opened = ShardSet.open(folder)
    ColorStats.load(opened.root, opened.fingerprint)
    return opened
