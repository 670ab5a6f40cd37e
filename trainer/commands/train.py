"""`alexnet-train`: its flags become one Job; and the entry points of all commands about nets.

Nothing heavy is imported before the flags are understood: `--help` answers at once.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.common import console
from trainer.commands.options import (
    AUTO,
    GLOBAL_BATCH_SIZE,
    RECIPE_SETTINGS,
    SETTINGS,
    add_common_options,
    add_feed_options,
    add_rank_options,
    add_safety_options,
    check_divisible,
    check_same,
    choose_devices,
    choose_loader,
    choose_parallel,
    choose_safety,
    count_ranks,
    find_begun,
    read_feeding,
)
from trainer.recipe import RECIPES, Recipe, from_dict, override

if TYPE_CHECKING:
    from trainer.nets.weights import Weights

_NEWEST = "newest"


@click.command(cls=console.Command, context_settings=SETTINGS)
@add_common_options
@add_feed_options
@add_rank_options
@add_safety_options
@click.option("--recipe", "recipe_name", type=click.Choice(list(RECIPES)), show_default="paper",
              help="Network, data and optimisation as one name.")  # fmt: skip
@click.option("--epochs", type=click.IntRange(min=1), show_default="the recipe's", help="Epochs at the most.")
@GLOBAL_BATCH_SIZE
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), show_default="the recipe's", help="Learning rate.")
@click.option("--seed", type=click.IntRange(min=0), show_default="0", help="Seed of weights, order and draws.")
@click.option("--name", show_default="the recipe's name", help="Name of the run's folder; a number is added if taken.")
@click.option("--resume", is_flag=False, flag_value=_NEWEST, metavar="[RUN|auto]", show_default=False,
              help="Go on with RUN (a name or folder); without RUN, with the newest of that --name; auto: with that if "
                   "there is one, else begin it, so that the same command does both.")  # fmt: skip
@click.option("--weights", "weights_text", metavar="RUN|FILE", show_default=False,
              help="Start from the net of a run, or in a file (of alexnet-export, torchvision's, Caffe's); its recipe "
                   "is the default.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Say nothing but errors, and how to go on when stopped.")
@click.option("--json-logs", is_flag=True,
              help="Print what is logged to stdout, a JSON object a line (docs/metrics.md), and nothing else but "
                   "errors.")  # fmt: skip
@click.option("--tensorboard/--no-tensorboard", "tensorboard", default=None, show_default="if it is installed",
              help="Write events to RUN/tensorboard, for `tensorboard --logdir RUNS`.")  # fmt: skip
@RECIPE_SETTINGS
def _train(
    shards: str | None,
    runs: Path,
    cache_dir: str | None,
    num_gpus: int | None,
    num_threads: int | None,
    recipe_name: str | None,
    epochs: int | None,
    global_batch_size: int | None,
    lr: float | None,
    seed: int | None,
    name: str | None,
    resume: str | None,
    weights_text: str | None,
    settings: tuple[str, ...],
    max_restarts: int,
    restart_epoch: bool,
    quiet: bool,
    json_logs: bool,
    tensorboard: bool | None,
    **flags: Any,
) -> int:
    """Train AlexNet on shards, as the 2012 paper did.

    Makes RUNS/NAME with checkpoints, metrics and the record of its surroundings. Ctrl-C finishes the step, saves and
    says how to go on. Several ranks: --gpus N, or torchrun --nproc-per-node N -m trainer, or srun.
    """
    if quiet and json_logs:
        raise click.UsageError("--quiet and --json-logs contradict each other; leave out one of them")
    voice: console.Voice = "quiet" if quiet else "json" if json_logs else "words"
    console.set_voice(voice)
    from trainer.record.runs import find_run, read_whole_config, resolve_run

    of_recipe = {"epochs": epochs, "global_batch_size": global_batch_size, "lr": lr}
    given: dict[str, Any] = {field: value for field, value in of_recipe.items() if value is not None}

    def change(recipe: Recipe) -> Recipe:
        return override(replace(recipe, **given), settings)

    folder, weights_path = None, None
    config: dict[str, Any] = {}
    if restart_epoch and not resume:
        raise click.UsageError("--restart-epoch needs --resume: it goes back to the end of a run's last whole epoch")
    if resume and resume != AUTO:
        fixed = {"--recipe": recipe_name, "--seed": seed, "--lr": lr, "--global-batch-size": global_batch_size,
                 "--set": settings or None, "--weights": weights_text}  # fmt: skip
        clash = [flag for flag, value in fixed.items() if value is not None]
        if clash:
            raise click.UsageError(f"--resume goes on with the run's own settings; leave out {', '.join(clash)}")
        folder = find_run(runs, name or "paper") if resume == _NEWEST else resolve_run(runs, resume)
        config = read_whole_config(folder)
        recipe, seed = change(from_dict(config["recipe"])), config["seed"]
    elif weights_text:
        weights_path, weights = _read_weights(runs, weights_text)
        recipe = change(RECIPES[recipe_name] if recipe_name else weights.recipe)
        from trainer.nets.finetune import check_fits

        check_fits(recipe, weights)  # before any rank starts
        del weights
    else:
        recipe = change(RECIPES[recipe_name or "paper"])
    if resume == AUTO and (folder := find_begun(runs, name or recipe.name)):
        config = read_whole_config(folder)
        check_same(folder, config, recipe, seed or 0, weights_path is not None)
    shards = shards or config.get("shards", "shards")

    from pipeline.colors import ColorStats
    from pipeline.options import LoaderOptions
    from pipeline.shards import ShardSet

    opened = ShardSet.open(shards, cache_dir=cache_dir)
    ColorStats.load(opened.root, opened.fingerprint)  # a fault in the data is told before any rank starts
    from trainer.config import Job
    from trainer.distributed import under_launcher
    from trainer.launch import launch, run_as_rank
    from trainer.train import run_rank

    loader = read_feeding(config) | choose_loader(num_threads=num_threads, **flags)

    from trainer.report.tensorboard import is_wanted, open_board

    board = open_board if is_wanted(tensorboard) else None
    num_ranks, use_gpu = choose_devices(num_gpus)
    world_size = count_ranks(num_ranks)
    check_divisible(recipe, world_size)
    asked = {"mode": flags["parallel"], "gradients": flags["gradients"], "bucket_mib": flags["bucket_mib"]}
    job = Job(
        shards=shards,
        runs=runs,
        name=name or recipe.name,
        recipe=recipe,
        seed=seed or 0,
        use_gpu=use_gpu,
        resume=folder,
        weights=weights_path,
        cache_dir=cache_dir,
        loader=LoaderOptions(**loader),
        parallel=choose_parallel(recipe, world_size, asked=asked, saved=config.get("parallel", {})),
        restart_epoch=restart_epoch,
        voice=voice,
        or_new=resume == AUTO,
        safety=choose_safety(config.get("safety", {}), **flags),
    )
    opened.fetch("train", "val")  # here, where a signal ends it at once and nobody waits for a step
    if under_launcher():
        return run_as_rank(run_rank, job, board)
    return launch(run_rank, (job, board), num_ranks, max_restarts) if num_ranks > 1 else run_rank(job, board)


def _read_weights(runs: Path, text: str) -> "tuple[Path, Weights]":
    """Where the weights to start from are, and what they are."""
    from trainer.nets.formats import load_any
    from trainer.record.runs import resolve_run

    path = Path(text) if Path(text).is_file() else resolve_run(runs, text)
    return path.absolute(), load_any(path, is_completed=False)


def train() -> None:
    """The script alexnet-train."""
    console.run(_train)


def evaluate() -> None:
    """The script alexnet-eval."""
    from trainer.commands.nets import evaluate as command

    console.run(command)


def report() -> None:
    """The script alexnet-report."""
    from trainer.commands.report import report as command

    console.run(command)


def export() -> None:
    """The script alexnet-export."""
    from trainer.commands.nets import export as command

    console.run(command)


def predict() -> None:
    """The script alexnet-predict."""
    from trainer.commands.nets import predict as command

    console.run(command)


def bench() -> None:
    """The script alexnet-bench."""
    from trainer.commands.bench import command

    console.run(command)
