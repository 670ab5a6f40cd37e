"""`alexnet-train`: flags and words; and the entry points of all commands about nets (cli_*.py).

The decision that shaped it: flags become one frozen Job before anything heavy is imported or any folder is made, so
that `--help` answers at once and a wrong flag costs nothing. Left out: the work; that is in the modules imported below.
"""

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
from trainer.recipe import RECIPES, from_dict, override

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
    decode: str | None,
    host_share: float | None,
    hw_decoder_load: float | None,
    cache_gib: float | None,
    prefetch_batches: int | None,
    parallel: str | None,
    gradients: str | None,
    bucket_mib: float | None,
    max_restarts: int,
    restart_epoch: bool,
    quiet: bool,
    json_logs: bool,
    tensorboard: bool | None,
    checkpoint_minutes: float | None,
    keep_checkpoints: int | None,
    on_nonfinite: str | None,
    timeout_s: float | None,
) -> int:
    """Train AlexNet on shards, as the 2012 paper did.

    Makes RUNS/NAME with checkpoints, metrics and the record of its surroundings. Ctrl-C finishes the step, saves and
    says how to go on. Several ranks: --gpus N, or torchrun --nproc-per-node N -m trainer, or srun.
    """
    if quiet and json_logs:
        raise click.UsageError("--quiet and --json-logs contradict each other; leave out one of them")
    voice: console.Voice = "quiet" if quiet else "json" if json_logs else "words"
    console.set_voice(voice)
    from trainer.record.runs import read_whole_config

    given = {"epochs": epochs, "global_batch_size": global_batch_size, "lr": lr}
    changes = [f"{field}={value}" for field, value in given.items() if value is not None] + list(settings)
    folder, weights_path, weights = None, None, None
    config: dict[str, Any] = {}
    if restart_epoch and not resume:
        raise click.UsageError("--restart-epoch needs --resume: it goes back to the end of a run's last whole epoch")
    if resume and resume != AUTO:
        fixed = {"--recipe": recipe_name, "--seed": seed, "--lr": lr, "--global-batch-size": global_batch_size,
                 "--set": settings or None, "--weights": weights_text}  # fmt: skip
        clash = [flag for flag, value in fixed.items() if value is not None]
        if clash:
            raise click.UsageError(f"--resume goes on with the run's own settings; leave out {', '.join(clash)}")
        folder = _find_run(runs, resume, name or "paper")
        config = read_whole_config(folder)
        recipe, seed = from_dict(config["recipe"]), config["seed"]
    else:
        recipe = RECIPES[recipe_name or "paper"]
        if weights_text:
            weights_path, weights = _read_weights(runs, weights_text)
            recipe = RECIPES[recipe_name] if recipe_name else weights.recipe
    recipe = override(recipe, changes)
    if resume == AUTO and (folder := find_begun(runs, name or recipe.name)):
        config = read_whole_config(folder)
        check_same(folder, config, recipe, seed or 0, weights_path is not None)
    shards = shards or config.get("shards", "shards")
    if weights:
        from trainer.nets.finetune import check_fits

        check_fits(recipe, weights)  # before any rank starts
        weights = None

    from pipeline.colors import ColorStats
    from pipeline.options import LoaderOptions
    from pipeline.shards import ShardSet

    opened = ShardSet.open(shards, cache_dir=cache_dir)
    ColorStats.load(opened.root, opened.fingerprint)  # a fault in the data is told before any rank starts
    from trainer.config import Job
    from trainer.distributed import under_launcher
    from trainer.launch import launch, run_as_rank
    from trainer.train import run_rank

    loader = read_feeding(config) | choose_loader(
        decode=decode, host_share=host_share, hw_decoder_load=hw_decoder_load, prefetch_batches=prefetch_batches,
        cache_gib=cache_gib, num_threads=num_threads,
    )  # fmt: skip

    from trainer.report.tensorboard import is_wanted

    write_events = is_wanted(tensorboard)
    num_ranks, use_gpu = choose_devices(num_gpus)
    world_size = count_ranks(num_ranks)
    check_divisible(recipe, world_size)
    asked = {"mode": parallel, "gradients": gradients, "bucket_mib": bucket_mib}
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
        tensorboard=write_events,
        or_new=resume == AUTO,
        safety=choose_safety(
            config.get("safety", {}),
            checkpoint_minutes=checkpoint_minutes,
            keep_checkpoints=keep_checkpoints,
            on_nonfinite=on_nonfinite,
            timeout_s=timeout_s,
        ),
    )
    opened.fetch("train", "val")  # here, where a signal ends it at once and nobody waits for a step
    if under_launcher():
        return run_as_rank(run_rank, job)
    return launch(run_rank, (job,), num_ranks, max_restarts) if num_ranks > 1 else run_rank(job)


def _read_weights(runs: Path, text: str) -> "tuple[Path, Weights]":
    """Where the weights to start from are, and what they are."""
    from trainer.nets.formats import load_any
    from trainer.record.runs import resolve_run

    path = Path(text) if Path(text).is_file() else resolve_run(runs, text)
    return path.absolute(), load_any(path, is_completed=False)


def _find_run(runs: Path, resume: str, name: str) -> Path:
    from trainer.record.runs import find_run, resolve_run

    return find_run(runs, name) if resume == _NEWEST else resolve_run(runs, resume)


def train() -> None:
    """The script alexnet-train."""
    console.run(_train)


def evaluate() -> None:
    """The script alexnet-eval."""
    from trainer.commands.nets import evaluate

    console.run(evaluate)


def report() -> None:
    """The script alexnet-report."""
    from trainer.commands.report import report

    console.run(report)


def export() -> None:
    """The script alexnet-export."""
    from trainer.commands.nets import export

    console.run(export)


def predict() -> None:
    """The script alexnet-predict."""
    from trainer.commands.nets import predict

    console.run(predict)


def bench() -> None:
    """The script alexnet-bench."""
    from trainer.commands.bench import command

    console.run(command)
