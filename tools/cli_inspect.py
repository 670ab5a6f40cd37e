"""The commands of `alexnet-prep` that look at a folder of shards: `info`, `verify`, `preview`.

The decision that shaped it: flags and words only, as in cli.py, which adds `COMMANDS` to its group. Each command
imports what it needs when it runs. Left out: the work itself.
"""

import shlex
from typing import TYPE_CHECKING, Any

import click

from pipeline.common import console
from pipeline.common.errors import UserError

if TYPE_CHECKING:
    from tools.checks.verify import Report

DEFAULT_SHARDS, SHARDS_VARIABLE = "shards", "ALEXNET_SHARDS"
_LOG_WIDTH = 2000  # of a table that goes to a file: nothing is cut off, a row is a line

_shards = click.option("--shards", default=DEFAULT_SHARDS, envvar=SHARDS_VARIABLE, show_envvar=True, type=click.Path(),
                       help="Folder of shards to look at.")  # fmt: skip


def _check_local(shards: str) -> str:
    """Raises UserError for a URL: of what is behind one, only what training needs is ever fetched."""
    if "://" in shards:
        raise UserError(
            f"{shards}: is a URL, expected a folder on a disk here; copy all its files into one, records included, and "
            "name that with --shards"
        )
    return shards


@click.command(cls=console.Command)
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


@click.command(cls=console.Command, short_help="Check a folder of shards from end to end.")
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
    print_columns(
        f"{report.num_problems:,} problems",
        ("file", "key", "found", "expected", "remedy"),
        [(p.file, p.key, p.what, p.expected, REMEDIES[p.mend]) for p in report.problems],
    )
    if report.delete:
        console.say("to mend, delete: " + shlex.join(str(report.root / name) for name in report.delete))
    for number, command in enumerate(report.run):
        console.say(f"{'then' if number or report.delete else 'to mend,'} run: {command}")


def print_columns(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table of texts to stdout, all left-aligned, taken literally whatever they hold; folded on a terminal."""
    import sys

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


@click.command(cls=console.Command, short_help="Draw a contact sheet of what the network will see.")
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
    from tools.checks.contactsheet import write_sheet  # these take seconds to import
    from tools.checks.preview import draw_samples

    write_sheet(draw_samples(opened, colors, num_samples=num_samples, seed=seed, split=split), colors, path)
    console.say(f"written to {path}: {num_samples} {split} images of {shards}, drawn with seed {seed}")


COMMANDS = (info, verify, preview)
