"""`alexnet-report`: flags and words."""

from pathlib import Path

import click

from pipeline.common import console
from trainer.commands.options import RUNS, SETTINGS, VERSION
from trainer.nets.tables import check_target


@click.command(cls=console.Command, context_settings=SETTINGS)
@VERSION
@click.argument("runs_asked", metavar="RUN...", nargs=-1, required=True)
@RUNS
@click.option("--shards", type=click.Path(), show_default="the run's own", help="Shards whose images are shown.")
@click.option("--images", "num_images", type=click.IntRange(min=0), default=4096,
              help="Training images among which to look for neighbours; 0: no pictures of images.")  # fmt: skip
@click.option("--predictions", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              show_default="RUN/predictions.csv if there",
              help="What alexnet-eval --predictions wrote of RUN, for the table of classes; one RUN only.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False),
              show_default="report.html in RUN; of several, in RUNS/RUN+RUN",
              help="The page to write.")  # fmt: skip
def report(
    runs_asked: tuple[str, ...],
    runs: Path,
    shards: str | None,
    num_images: int,
    predictions: Path | None,
    out: Path | None,
) -> None:
    """Show what came of RUN: one HTML page, and its pictures as the paper draws its own.

    The page needs no network: curves of all runs together, errors beside the published ones, the first layer's
    kernels, eight images with their likeliest classes, nearest training images, the classes it gets wrong, speed,
    surroundings, and the command to repeat it. Pictures (PNG) go to RUN/figures. What compares several
    runs, page and pictures, goes beside them, to RUNS/RUN+RUN.
    """
    if predictions and len(runs_asked) > 1:
        raise click.UsageError("--predictions are those of one RUN; put each run's own in RUN/predictions.csv")
    if out:
        check_target(out)
    from trainer.record.runs import resolve_run
    from trainer.report.data import read_run
    from trainer.report.page import PAGE, write_page
    from trainer.report.summary import choose_place, compare, draw, format_summary, summarise

    folders = list({folder.resolve(): folder for run in runs_asked if (folder := resolve_run(runs, run))}.values())
    all_data = [read_run(folder, shards=shards, num_images=num_images, predictions=predictions) for folder in folders]
    for data in all_data:
        console.say(format_summary(summarise(data, draw(data))))
    place = folders[0]
    if len(all_data) > 1:
        place = choose_place(folders)
        console.say("\n".join(f"{'all runs':<12}{path}" for path in compare(all_data, place)))
    page = out or place / PAGE
    write_page(all_data, page)
    console.say(f"{'page':<12}{page}")
