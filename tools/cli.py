"""`alexnet-prep`: what is done once, before training.

The decision that shaped it: flags and words only. Each command imports what it needs when it runs, so that `--help`
answers at once. Left out: the work itself; that is in the modules named in the imports.
"""

import os
import shutil
import sys
from dataclasses import asdict
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from pipeline.common import console
from pipeline.common.errors import UserError
from pipeline.manifest import ENDINGS
from tools.cli_inspect import COMMANDS, DEFAULT_SHARDS, SHARDS_VARIABLE
from tools.sources import LAYOUTS

if TYPE_CHECKING:
    from pipeline.colors import ColorStats
    from tools.sharding.hostcodec import Encoding
    from tools.sharding.lock import Part
    from tools.sharding.make import Summary
    from tools.sharding.preparer import Device


@click.group(cls=console.Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="alexnet-dali")
def group() -> None:
    """Prepare ImageNet for training: images -> shards, shards -> colour statistics."""


def main() -> None:
    """The script alexnet-prep."""
    console.run(group)


@group.command()
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option("--classes", "num_classes", default=10, type=click.IntRange(min=1), help="Number of classes.")
@click.option("--train", "num_train", default=1000, type=click.IntRange(min=1), help="Training images in all.")
@click.option("--val", "num_val", default=200, type=click.IntRange(min=0), help="Validation images in all.")
@click.option("--seed", default=0, type=click.IntRange(min=0), help="Seed of every draw.")
def synth(folder: str, num_classes: int, num_train: int, num_val: int, seed: int) -> None:
    """Paint a small synthetic ImageNet into DIR, for demos and tests."""
    from tools.synth import make_tree

    with console.Progress("synth", num_train + num_val, "images") as progress:
        make_tree(
            folder,
            num_classes=num_classes,
            num_train=num_train,
            num_val=num_val,
            seed=seed,
            on_progress=progress.advance,
        )
    console.say(f"{folder}: {num_classes} classes, {num_train} training and {num_val} validation images")
    console.say(f"next: alexnet-prep shard {quote(folder)}")


def _check_limit(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    from tools.sharding.failures import limit_failures

    try:
        limit_failures(value, 1)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return value


def _check_part(_context: click.Context, _parameter: click.Parameter, value: str | None) -> "Part | None":
    from tools.sharding.lock import parse_part

    try:
        return parse_part(value) if value else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _is_given(option: str) -> bool:
    """Whether an option stands on the command line, not in the environment."""
    return click.get_current_context().get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE


@group.command()
@click.argument("source", metavar="SOURCE", type=click.Path())
@click.option("--out", default=DEFAULT_SHARDS, envvar=SHARDS_VARIABLE, show_envvar=True, type=click.Path(),
              help="Folder, or s3://bucket/prefix, to write the shards to.")  # fmt: skip
@click.option("--layout", type=click.Choice(LAYOUTS), show_default="as found", help="What SOURCE is.")
@click.option("--val-fraction", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="SHARE",
              help="Share of each class's images for validation, where SOURCE has no validation images.")  # fmt: skip
@click.option("--subset", type=click.Path(), metavar="FILE",
              help="Only the classes in FILE: wnids, one a line, # before a comment.")  # fmt: skip
@click.option("--samples-per-shard", default=5000, type=click.IntRange(min=1), help="Images per shard.")
@click.option("--workers", type=click.IntRange(min=1), show_default="one per CPU",
              help="Worker processes; with --engine ray: tasks at a time.")  # fmt: skip
@click.option("--seed", default=0, type=click.IntRange(min=0), help="Seed of the shuffle and of --val-fraction.")
@click.option("--quality", default=90, type=click.IntRange(1, 100), help="JPEG quality, 1 to 100.")
@click.option("--encoding", default="jpeg", type=click.Choice(list(ENDINGS)),
              help="jpeg, or raw: 192 KiB of pixels for each image, which need no decoding.")  # fmt: skip
@click.option("--device", default="cpu", type=click.Choice(["cpu", "gpu"]),
              help="Where images are decoded and encoded; the two differ in the last bits.")  # fmt: skip
@click.option("--engine", default="local", type=click.Choice(["local", "ray"]), help="Where workers run.")
@click.option("--ray-address", envvar="RAY_ADDRESS", show_envvar=True, metavar="ADDRESS",
              help="Cluster of --engine ray; auto: this machine's. Without it Ray is started here.")  # fmt: skip
@click.option("--part", metavar="K/N", callback=_check_part,
              help="Make only the K-th of N shares of the shards; the last to end completes.")  # fmt: skip
@click.option("--max-failures", default="0.1%", metavar="N|P%", callback=_check_limit,
              help="Images, in all, that may be unusable: a count, or a percentage (then at least 1).")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the shards in the output folder, whatever job they are of.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def shard(
    source: str,
    out: str,
    layout: str | None,
    val_fraction: float | None,
    subset: str | None,
    samples_per_shard: int,
    workers: int | None,
    seed: int,
    quality: int,
    encoding: "Encoding",
    device: "Device",
    engine: str,
    ray_address: str | None,
    part: "Part | None",
    max_failures: str,
    force: bool,
    as_json: bool,
) -> None:
    """Turn the images of SOURCE into shards of 256x256 JPEGs.

    SOURCE is a folder that holds ImageNet in one of five layouts: train/<class>/* and val/<class>/* (folder); Kaggle's
    ILSVRC/Data/CLS-LOC with its lists (kaggle); ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the devkit, read
    in place (official); Hugging Face's files (parquet); tars of images and labels (webdataset).

    Images are resized (shorter side to 256 pixels, antialiased) and cropped to the central square; EXIF orientation is
    ignored. An interrupted run is taken up by the same command; shards that are complete are left alone.
    """
    if ray_address and engine != "ray" and _is_given("ray_address"):
        raise UserError(f"--ray-address {ray_address}: goes with --engine ray, got --engine {engine}; give both")
    from tools.sharding.make import make_shards
    from tools.sources.source import open_source

    opened = open_source(source, layout=layout, val_fraction=val_fraction, seed=seed, subset=subset)
    for remark in opened.remarks:
        console.note(f"{source}: {remark}")
    summary = make_shards(
        opened,
        out,
        num_workers=workers,
        samples_per_shard=samples_per_shard,
        seed=seed,
        quality=quality,
        encoding=encoding,
        device=device,
        engine=engine,
        ray_address=ray_address,
        part=part,
        max_failures=max_failures,
        force=force,
    )
    if as_json:
        console.print_json(summary.to_json())
    else:
        _print_summary(out, summary)


def _print_summary(out: str, summary: "Summary") -> None:
    if summary.was_complete:
        console.say(f"{out}: already complete by the names of its images, left as it is (--force makes it again)")
    rows = [[split, f"{num_images:,}", f"{summary.shards[split]:,}"] for split, num_images in summary.images.items()]
    console.print_table(f"{out}", ["split", "images", "shards"], rows)
    console.say(f"{summary.num_bytes / 1e6:,.1f} MB in tars, {_count_failures(out, summary)}")
    if not summary.was_complete:
        console.say(
            f"{summary.num_prepared:,} images in {summary.duration_s:,.1f} s ({summary.images_per_s:,.0f} images/s), "
            f"{summary.num_kept_shards} shards kept from before"
        )
    if not summary.is_complete:
        parts = ", ".join(map(str, summary.missing_parts))
        console.say(f"{summary.num_missing_shards} shards of other parts ({parts}) are still missing: no manifest yet")
        return
    suffix = "" if out == os.environ.get(SHARDS_VARIABLE, DEFAULT_SHARDS) else f" --shards {quote(out)}"
    console.say(f"next: alexnet-prep pca{suffix}")


def _count_failures(out: str, summary: "Summary") -> str:
    repaired = f"; {summary.num_repaired} damaged images repaired" if summary.num_repaired else ""
    if not summary.num_failures:
        return f"no failures{repaired}"
    where = f"{out}/failures.jsonl" if summary.is_complete else "the list comes with the manifest"
    return f"{summary.num_failures} images could not be used: {where}{repaired}"


@group.command(short_help="Compute the mean and the colour axes of the training set.")
@click.option("--shards", default=DEFAULT_SHARDS, envvar=SHARDS_VARIABLE, show_envvar=True, type=click.Path(),
              help="Folder of shards; the statistics are written into it.")  # fmt: skip
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "gpu"]), help="Where images are decoded.")
@click.option("--threads", type=click.IntRange(min=1), show_default="one per CPU", help="Decoding threads.")
@click.option("--json", "as_json", is_flag=True, help="Print the statistics as one JSON object.")
def pca(shards: str, device: str, threads: int | None, as_json: bool) -> None:
    """Compute the mean and the RGB eigenbasis of all training pixels of the shards.

    Writes color.json and mean_image.npy beside the shards; training needs both.
    """
    from pipeline.shards import ShardSet

    opened = ShardSet.open(shards)  # before the imports below, which take seconds
    opened.fetch("train")
    from tools.pca import compute
    from tools.sharding.workers import count_cpus

    with console.Progress("pca", opened.num_samples("train"), "images") as progress:
        stats = compute(opened, device=device, num_threads=threads or count_cpus(), progress=progress)
    stats.save(opened.root)
    if opened.remote:
        opened.remote.publish_colors(opened.root)
    if as_json:
        console.print_json(_list_stats(stats))
    else:
        _print_stats(stats)
        where = opened.remote.url if opened.remote else opened.root
        console.say(f"written to {where}/color.json; next: alexnet-train")


def _list_stats(stats: "ColorStats") -> dict[str, Any]:
    return {
        "num_pixels": stats.num_pixels,
        "mean": stats.mean.tolist(),
        "std": stats.std.tolist(),
        "covariance": stats.covariance.tolist(),
        "eigenvalues": stats.eigenvalues.tolist(),
        "eigenvectors": stats.eigenvectors.tolist(),
        "shards_fingerprint": stats.shards_fingerprint,
    }


def _print_stats(stats: "ColorStats") -> None:
    import numpy as np

    channels = [
        [name, f"{mean:.3f}", f"{std:.3f}"]
        for name, mean, std in zip(("red", "green", "blue"), stats.mean, stats.std, strict=True)
    ]
    console.print_table(f"{stats.num_pixels:,} training pixels, values 0-255", ["channel", "mean", "std"], channels)
    axes = [
        [str(number), f"{value:,.2f}", *(f"{part:+.4f}" for part in vector)]
        for number, (value, vector) in enumerate(zip(stats.eigenvalues, stats.eigenvectors.T, strict=True), start=1)
    ]
    console.print_table("principal axes of colour", ["axis", "eigenvalue", "red", "green", "blue"], axes)
    shifts = []
    for kind in ("paper", "original"):
        rms = np.sqrt((stats.lighting_basis(kind) ** 2).sum(axis=1))
        shifts.append([kind, *(f"{value:.2f}" for value in rms)])
    console.print_table("rms colour shift, grey levels", ["lighting", "red", "green", "blue"], shifts)


for _command in COMMANDS:
    group.add_command(_command)


@group.command(short_help="Check this machine: driver, GPUs, decoders, memory, disk.")
@click.option("--shards", default=DEFAULT_SHARDS, envvar=SHARDS_VARIABLE, show_envvar=True, type=click.Path(),
              help="Folder of shards whose disk is timed.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the checks as one JSON object.")
def doctor(shards: str, as_json: bool) -> int:
    """Check this machine: driver, GPUs, CUDA, DALI's decoders, NCCL, memory, disk.

    Each line is ok, a warning or a problem with its remedy. Exits 1 if there is a problem; no GPU is a warning.
    """
    from tools.checks.doctor import examine
    from tools.checks.verdicts import STATE_WIDTH, spell

    checks = examine(shards)
    num_problems = sum(check.state == "problem" for check in checks)
    if as_json:
        console.print_json({"ok": not num_problems, "checks": [asdict(check) for check in checks]})
        return min(num_problems, 1)
    width = max(len(check.name) for check in checks)
    colors = {"ok": "green", "warning": "yellow", "problem": "red"}
    for check in checks:
        first, *others = spell(check, width, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
        console.say(click.style(first[:STATE_WIDTH], fg=colors[check.state]) + first[STATE_WIDTH:])
        for line in others:
            console.say(line)
    return min(num_problems, 1)
