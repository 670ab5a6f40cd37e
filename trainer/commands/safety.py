"""Flags about what may happen to a run: how often it is saved, what ends it, and going on with the same command.

The decision that shaped it: one command starts a run and goes on with it (`--resume auto`), so that a scheduler may
repeat it; whatever would make it another run is compared and refused. Left out: the work (saving.py, watchdog.py,
lossguard.py).
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.common.errors import UserError
from trainer.recipe import Recipe, from_dict

if TYPE_CHECKING:
    from trainer.config import Safety

AUTO = "auto"  # of --resume
_FREE = {"name", "epochs"}  # fields of a recipe that may change in the middle of a run


def add_safety_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All None unless given, so that a resumed run keeps its own."""
    minutes = click.option("--checkpoint-minutes", type=click.FloatRange(min=0), show_default="10",
                           help="Save after so many minutes within an epoch, too; 0: only at its end.")  # fmt: skip
    keep = click.option("--keep-checkpoints", type=click.IntRange(min=1), show_default="3",
                        help="How many of the last checkpoints are kept, besides the best.")  # fmt: skip
    nonfinite = click.option("--on-nonfinite", type=click.Choice(["stop", "skip"]), show_default="stop",
                             help="When a loss is not finite: stop, or leave that update out and count.")  # fmt: skip
    timeout = click.option("--timeout-s", type=click.FloatRange(min=1), show_default="600",
                           help="End, with what all threads are doing, when nothing moves for so long, s.")  # fmt: skip
    for option in (timeout, nonfinite, keep, minutes):
        function = option(function)
    return function


def choose_safety(saved: dict[str, Any], **given: Any) -> "Safety":
    """What was asked for, else what the run to resume had, else the default."""
    from trainer.config import Safety

    known = asdict(Safety())
    kept = {name: value for name, value in saved.items() if name in known}
    return Safety(**{**kept, **{name: value for name, value in given.items() if value is not None}})


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
