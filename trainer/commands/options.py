"""Flags that several commands share: where shards and runs lie, which devices, how images are fed.

The decision that shaped it: one place for each flag, so that it has one name, one default and one sentence everywhere.
Left out: flags about ranks (cli_ranks.py) and about what goes wrong (cli_safety.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

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


def add_common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Those of every command that reads shards and runs."""
    shards = click.option("--shards", envvar="ALEXNET_SHARDS", show_envvar=True, type=click.Path(),
                          show_default="the run's own, else ./shards",
                          help="Folder of shards, or its URL (s3://bucket/prefix).")  # fmt: skip
    cache_dir = click.option("--cache-dir", envvar="ALEXNET_CACHE", show_envvar=True,
                             type=click.Path(file_okay=False), show_default="~/.cache/alexnet-dali",
                             help="Local folder to which shards behind a URL are downloaded.")  # fmt: skip
    for option in (THREADS, GPUS, cache_dir, RUNS, shards, VERSION):
        function = option(function)
    return function


def add_feed_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where images are decoded and kept: all None unless given, so that a resumed run keeps its own."""
    decode = click.option("--decode", type=click.Choice(["auto", "cpu", "mixed", "hybrid"]), show_default="auto",
                          help="Decode JPEGs on the CPU's cores, on the GPU (mixed) or on both (hybrid); auto: mixed "
                               "on a GPU.")  # fmt: skip
    share = click.option("--host-share", type=click.FloatRange(0, 1), show_default="0.5",
                         help="With hybrid: the share of each batch that the CPU decodes.")  # fmt: skip
    load = click.option("--hw-decoder-load", type=click.FloatRange(0, 1), show_default="0.9",
                        help="Of what the GPU decodes, the share of its JPEG engine.")  # fmt: skip
    cache = click.option("--cache-gib", type=click.FloatRange(min=0), show_default="0",
                         help="With mixed: GPU memory in which decoded images are kept, GiB.")  # fmt: skip
    prefetch = click.option("--prefetch", "prefetch_batches", type=click.IntRange(min=1), show_default="3",
                            help="Batches made ahead.")  # fmt: skip
    for option in (prefetch, cache, load, share, decode):
        function = option(function)
    return function


def read_feeding(config: dict[str, Any]) -> dict[str, Any]:
    """The same of a run to be resumed, as its config.json has them, that of an earlier version too."""
    known = {name: value for name, value in (config.get("feeding") or {}).items() if name != "cache"}
    return known | ({"decode": "cpu"} if known.get("decode") == "host" else {})


def choose_loader(**given: Any) -> dict[str, Any]:
    """Fields of pipeline.LoaderOptions from those flags that were given."""
    return {name: value for name, value in given.items() if value is not None}
