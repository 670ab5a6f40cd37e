"""`alexnet-prep`: flags and words."""

import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from pipeline.common import console
from pipeline.common.console import DEFAULT_SHARDS, SHARDS_VARIABLE, spell_command
from pipeline.common.errors import UserError
from pipeline.manifest import ENDINGS
from tools.sources import LAYOUTS

if TYPE_CHECKING:
    from pipeline.colors import ColorStats
    from tools.checks.verify import Report
    from tools.sharding.lock import Part
    from tools.sharding.make import Summary


_LOG_WIDTH = 2000  # of a table that goes to a file: nothing is cut off, a row is a line


def _folder_option(name: str, help_text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option that names a folder of shards."""
    return click.option(
        name, default=DEFAULT_SHARDS, envvar=SHARDS_VARIABLE, show_envvar=True, type=click.Path(), help=help_text
    )


_shards = _folder_option("--shards", "Folder of shards to look at.")


@click.group(cls=console.Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="alexnet-dali")
def group() -> None:
    """Prepare ImageNet for training: images -> shards, shards -> colour statistics."""


def main() -> None:
    """The script alexnet-prep."""
    console.run(group)


def _check_local(shards: str) -> str:
    """Raises UserError for a URL: of what is behind one, only what training needs is ever fetched."""
    if "://" in shards:
        raise UserError(
            f"{shards}: is a URL, expected a folder on a disk here; copy all its files into one, records included, and "
            "name that with --shards"
        )
    return shards


@group.command()
@_shards
@click.option("--json", "as_json", is_flag=True, help="Print the facts as one JSON object.")
def info(shards: str, as_json: bool) -> None:
    """Tell what is in a folder of shards, without reading the images."""
    from tools.checks.info import describe

    facts = describe(_check_local(shards))
    if as_json:
        console.print_json(facts)
    else:
        _print_facts(facts)


def _print_facts(facts: dict[str, Any]) -> None:
    if facts["state"] == "unfinished":
        done = ", ".join(f"{split} {each['shards']}" for split, each in facts["splits"].items())
        num_images = sum(each["images"] for each in facts["splits"].values())
        console.say(f"{facts['root']}: unfinished job {str(facts['job'])[:12]}; shards done: {done}; "
                    f"{num_images:,} images, {facts['num_failures']:,} failures")  # fmt: skip
        _print_holders(facts)
        console.say(facts["remedy"])
        return
    rows = []
    for split, each in facts["splits"].items():
        size = "-" if each["mean_image_bytes"] is None else f"{each['mean_image_bytes']:,.0f}"
        classes = each["classes"]
        spread = [f"{classes[f'{name}_images']:,g}" for name in ("min", "median", "max")] if classes else ["-"] * 3
        rows.append([split, f"{each['images']:,}", f"{each['shards']:,}", f"{each['bytes'] / 1e6:,.1f}", size, *spread])
    columns = ["split", "images", "shards", "MB", "bytes each", "min", "median", "max"]
    console.print_table(f"{facts['root']} (min, median, max: images of a class)", columns, rows)
    how = f"{facts['encoding']}, quality {facts['quality']}" if facts["encoding"] == "jpeg" else facts["encoding"]
    side = facts["size_px"]
    colors = facts["colors"]
    lines = {
        "classes": f"{facts['num_classes']:,}",
        "images": f"{side}x{side} {how}",
        "source": f"{facts['layout']} layout, seed {facts['seed']}, {facts['samples_per_shard']:,} a shard",
        "failures": f"{facts['num_failures']:,} images could not be used, {facts['num_repaired']:,} repaired",
        "colours": colors["state"] + (f"; {colors['remedy']}" if "remedy" in colors else ""),
        "fingerprint": facts["fingerprint"],
        "job": facts["job"],
        "made by": facts["created_by"],
    }
    for name, text in lines.items():
        console.say(f"{name:12} {text}")
    _print_holders(facts)


def _print_holders(facts: dict[str, Any]) -> None:
    for each in facts["holders"]:
        console.say(f"{'in use by' if each['is_alive'] else 'left by'} {each['holder']}")


@group.command(short_help="Check a folder of shards from end to end.")
@_shards
@click.option("--decode", is_flag=True, help="Decode every image too.")
@click.option("--workers", type=click.IntRange(min=1), show_default="one per CPU", help="Worker processes.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object.")
@click.pass_context
def verify(context: click.Context, shards: str, decode: bool, workers: int | None, as_json: bool) -> None:
    """Check a folder of shards from end to end, and tell everything that is wrong.

    Every byte of the tars is read and held against checksums, indices, records and the plan they came from. Exit status
    1 if anything is wrong, with the files to delete and the commands to run.
    """
    from tools.checks.verify import verify as run_verify
    from tools.sharding.workers import count_cpus

    report = run_verify(_check_local(shards), num_workers=workers or count_cpus(), decode=decode)
    for remark in report.remarks:
        console.note(f"{shards}: {remark}")
    if as_json:
        console.print_json(report.to_json())
    else:
        _print_report(report)
    if report.num_problems:
        context.exit(console.STATUS_FAILED)


def _print_report(report: "Report") -> None:
    from tools.checks.verify import REMEDIES

    read = "read and decoded" if report.decoded else "read"
    console.say(
        f"{report.root}: {report.num_samples:,} images in {report.num_shards:,} shards, "
        f"{report.num_bytes / 1e6:,.1f} MB {read} in {report.duration_s:,.1f} s ({report.megabytes_per_s:,.0f} MB/s)"
    )
    if not report.num_problems:
        console.say("no problems found")
        return
    _print_columns(
        f"{report.num_problems:,} problems",
        ("file", "key", "found", "expected", "remedy"),
        [(p.file, p.key, p.what, p.expected, REMEDIES[p.mend]) for p in report.problems],
    )
    if report.delete:
        console.say("to mend, delete: " + shlex.join(str(report.root / name) for name in report.delete))
    for number, command in enumerate(report.run):
        console.say(f"{'then' if number or report.delete else 'to mend,'} run: {command}")


def _print_columns(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table of texts to stdout, all left-aligned, taken literally whatever they hold; folded on a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    is_terminal = sys.stdout.isatty()
    Console(width=None if is_terminal else _LOG_WIDTH, soft_wrap=not is_terminal).print(table)


@group.command(short_help="Draw a contact sheet of what the network will see.")
@_shards
@click.option("--out", default="preview.png", type=click.Path(), help="PNG to write.")
@click.option("--samples", "num_samples", default=8, type=click.IntRange(1, 64), help="Images to show.")
@click.option("--split", default="train", type=click.Choice(["train", "val"]), help="Which images.")
@click.option("--seed", default=0, type=click.IntRange(min=0), help="Seed of the choice and of the draws.")
def preview(shards: str, out: str, num_samples: int, split: str, seed: int) -> None:
    """Draw a contact sheet: images as stored, as the network sees them, and the colour axes.

    The crops, mirrorings and colour shifts are drawn by the training loader itself; what was drawn stands below each.
    """
    from pathlib import Path

    from pipeline.colors import ColorStats
    from pipeline.shards import ShardSet

    path = Path(out)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"{out}: expected the name of a PNG file, such as preview.png; choose another --out")
    opened = ShardSet.open(shards)
    colors = ColorStats.load(opened.root, opened.fingerprint)
    from tools.checks.preview import draw_samples, write_sheet  # these take seconds to import

    write_sheet(draw_samples(opened, colors, num_samples=num_samples, seed=seed, split=split), colors, path)
    console.say(f"written to {path}: {num_samples} {split} images of {shards}, drawn with seed {seed}")


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
    console.say(f"next: {spell_command('alexnet-prep', 'shard', folder)}")


def _check_limit(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    from tools.sharding.output import limit_failures

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
@_folder_option("--out", "Folder, or s3://bucket/prefix, to write the shards to.")
@click.option("--layout", type=click.Choice(LAYOUTS), show_default="as found", help="What SOURCE is.")
@click.option("--val-fraction", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="SHARE",
              help="Share of each class's images for validation, where SOURCE has no validation images.")  # fmt: skip
@click.option("--subset", type=click.Path(), metavar="FILE",
              help="Only the classes in FILE: wnids, one a line, # before a comment.")  # fmt: skip
@click.option("--allow-missing", is_flag=True,
              help="Go on where the numbers in the names of SOURCE's files tell that some are missing.")  # fmt: skip
@click.option("--samples-per-shard", default=5000, type=click.IntRange(min=1), help="Images per shard.")
@click.option("--workers", "num_workers", type=click.IntRange(min=1), show_default="one per CPU",
              help="Worker processes; with --engine ray: tasks at a time.")  # fmt: skip
@click.option("--seed", default=0, type=click.IntRange(min=0), help="Seed of the shuffle and of --val-fraction.")
@click.option("--quality", default=90, type=click.IntRange(1, 100), help="JPEG quality, 1 to 100.")
@click.option("--encoding", default="jpeg", type=click.Choice(list(ENDINGS)),
              help="jpeg, or raw: 192 KiB of pixels for each image, which need no decoding.")  # fmt: skip
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
    allow_missing: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn the images of SOURCE into shards of 256x256 JPEGs.

    SOURCE is a folder that holds ImageNet in one of five layouts: train/<class>/* and val/<class>/* (folder); Kaggle's
    ILSVRC/Data/CLS-LOC with its lists (kaggle); ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the devkit, read
    in place (official); Hugging Face's files (parquet); tars of images and labels (webdataset).

    Images are resized (shorter side to 256 pixels, antialiased) and cropped to the central square; EXIF orientation is
    ignored. An interrupted run is taken up by the same command; shards that are complete are left alone.
    """
    engine, address = options["engine"], options["ray_address"]
    if address and engine != "ray" and _is_given("ray_address"):
        raise UserError(f"--ray-address {address}: goes with --engine ray, got --engine {engine}; give both")
    from tools.sharding.make import make_shards
    from tools.sources.source import open_source

    opened = open_source(
        source,
        layout=layout,
        val_fraction=val_fraction,
        seed=options["seed"],
        subset=subset,
        allow_missing=allow_missing,
    )
    for remark in opened.remarks:
        console.note(f"{source}: {remark}")
    summary = make_shards(opened, out, **options)
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
    console.say(f"next: {spell_command('alexnet-prep', 'pca', shards=out)}")


def _count_failures(out: str, summary: "Summary") -> str:
    repaired = f"; {summary.num_repaired} damaged images repaired" if summary.num_repaired else ""
    if not summary.num_failures:
        return f"no failures{repaired}"
    where = f"{out}/failures.jsonl" if summary.is_complete else "the list comes with the manifest"
    return f"{summary.num_failures} images could not be used: {where}{repaired}"


@group.command(short_help="Compute the mean and the colour axes of the training set.")
@_folder_option("--shards", "Folder of shards; the statistics are written into it.")
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
        console.say(f"written to {where}/color.json; next: {spell_command('alexnet-train', shards=shards)}")


def _list_stats(stats: "ColorStats") -> dict[str, Any]:
    arrays = ("mean", "std", "covariance", "eigenvalues", "eigenvectors")
    return {
        "num_pixels": stats.num_pixels,
        **{name: getattr(stats, name).tolist() for name in arrays},
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


@group.command(short_help="Check this machine: driver, GPUs, decoders, memory, disk.")
@_folder_option("--shards", "Folder of shards whose disk is timed.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as one JSON object.")
def doctor(shards: str, as_json: bool) -> int:
    """Check this machine: driver, GPUs, CUDA, DALI's decoders, NCCL, memory, disk.

    Each line is ok, a warning or a problem with its remedy. Exits 1 if there is a problem; no GPU is a warning.
    """
    from tools.checks.doctor import STATE_WIDTH, examine, spell

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
