"""The statistics, the table and the plot of ablate.py.

An interval covers which images are in the validation set (paired differences, image by image) and which run one
happens to get (the spread between seeds, pooled over all variants, by Student's t). The two are added in squares, which
counts what a run does to single images twice and so errs on the wide side. With one seed the second is not known.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Z95 = 1.959964


@dataclass(frozen=True)
class Row:
    """One variant, in percent and points of top-1 error: means over seeds; `plus_minus`: half a 95 % interval."""

    effect: Any  # ablate.Effect
    num_seeds: int
    num_images: int
    error: float  # centre crop
    error_plus_minus: float  # of the images alone, binomial
    ten_crop_error: float
    training_error: float  # last epoch, augmentation and dropout on
    difference: float  # centre crop, to base, the same seeds; 0 for base itself
    plus_minus: float
    seed_sd: float | None  # between runs, pooled over all variants; None: one seed

    @property
    def is_significant(self) -> bool:
        return abs(self.difference) > self.plus_minus


def compare(effects: Sequence[Any], results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[Row]:
    """A row for each effect. `results`: name -> seed -> {"centre", "ten": 0 or 1 an image, "training_error"}.

    Differences are between runs of the same seeds; each effect needs one seed, at least, that base has too.
    """
    seed_variance, freedom = pooled_variance(
        [[100 * np.mean(run["centre"]) for run in by_seed.values()] for by_seed in results.values()]
    )
    rows = []
    for effect in effects:
        seeds = sorted(set(results[effect.name]) & set(results["base"]))
        runs, base = ([results[name][seed] for seed in seeds] for name in (effect.name, "base"))
        wrong, base_wrong = (100 * np.array([run["centre"] for run in of], dtype=np.float64) for of in (runs, base))
        error, num_images = float(wrong.mean()), wrong.shape[1]
        is_base = effect.name == "base"
        rows.append(
            Row(
                effect=effect,
                num_seeds=len(seeds),
                num_images=num_images,
                error=error,
                error_plus_minus=Z95 * math.sqrt(error * (100 - error) / num_images),
                ten_crop_error=float(100 * np.mean([run["ten"] for run in runs])),
                training_error=float(np.mean([run["training_error"] for run in runs])),
                difference=float((wrong - base_wrong).mean()),
                plus_minus=0.0 if is_base else half_interval(wrong, base_wrong, seed_variance, freedom),
                seed_sd=math.sqrt(seed_variance) if freedom else None,
            )
        )
    return rows


def pooled_variance(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Variance within groups, each about its own mean, and its degrees of freedom; (0, 0) without repetitions."""
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(float(((np.asarray(group) - np.mean(group)) ** 2).sum()) for group in groups)
    return (squares / freedom, freedom) if freedom else (0.0, 0)


def half_interval(wrong: np.ndarray, base_wrong: np.ndarray, seed_variance: float, freedom: int) -> float:
    """Half of the 95 % interval of mean(wrong - base_wrong); both (seeds, images), 0 or 100.

    Images: 1.96 standard errors of the differences, each the mean over seeds. Runs: Student's t for the pooled variance
    of one run's error, twice (two variants), divided by the number of seeds.
    """
    from scipy.stats import t

    num_seeds, num_images = wrong.shape
    differences = (wrong - base_wrong).mean(axis=0)
    of_images = Z95**2 * differences.var(ddof=1) / num_images
    of_runs = t.ppf(0.975, freedom) ** 2 * 2 * seed_variance / num_seeds if freedom else 0.0
    return math.sqrt(of_images + of_runs)


def format_table(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table as Markdown, with what it rests on below it."""
    heads = ["effect", "top-1 error, %", "ten crops", "training", "difference, points", "the paper's", "reading"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---:|---:|---:|---:|---|---|"]
    for row in rows:
        is_base = row.effect.name == "base"
        cells = [
            f"{row.effect.what}" + (f" (`{' '.join(row.effect.settings)}`)" if row.effect.settings else ""),
            f"{row.error:.1f} ± {row.error_plus_minus:.1f}",
            f"{row.ten_crop_error:.1f}",
            f"{row.training_error:.1f}",
            "" if is_base else f"{row.difference:+.1f} ± {row.plus_minus:.1f}",
            row.effect.paper,
            "" if is_base else read(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    base = rows[0]
    seeds = sorted({row.num_seeds for row in rows})
    spread = (
        "and of runs (one run's error varies between seeds with a standard deviation of "
        f"{base.seed_sd:.1f} points, pooled over all variants)"
        if base.seed_sd is not None
        else "alone: with one seed, how much a run varies by itself is not known, and is not in it"
    )
    lines += [
        "",
        f"Mean of {' or '.join(map(str, seeds))} seed{'s' if seeds != [1] else ''} a variant, last checkpoint, centre "
        f"crop, {base.num_images} validation images. ± after an error: 95 %, binomial. ± after a difference: 95 %, of "
        f"images (paired) {spread}. Training: top-1 error of the last epoch, augmentation and dropout on. "
        f"Of {len(rows) - 1} comparisons at 95 %, {0.05 * (len(rows) - 1):.1f} come out significant by chance alone.",
        *notes,
    ]
    return "\n".join(lines)


def read(row: Row) -> str:
    """What the interval allows to say, and how that stands to the paper's number where it has one."""
    own = ("worse without" if row.difference > 0 else "better without") if row.is_significant else "not significant"
    expected = row.effect.paper_points
    if expected is None:
        return own
    inside = abs(row.difference - expected) <= row.plus_minus
    return own + ("; the paper's is within" if inside else "; the paper's is outside")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write `differences_figure` as a PNG."""
    from trainer.report.pictures import style, write_png

    with style():
        write_png(differences_figure(rows), path)


def differences_figure(rows: Sequence[Row]) -> "Figure":
    """Each effect's difference to base with its 95 % interval, filled where it excludes 0; the paper's as a diamond."""
    from matplotlib.figure import Figure

    from trainer.report.pictures import BLUE, GREY, VERMILION, style

    shown = [row for row in rows if row.effect.name != "base"]
    with style():
        figure = Figure(figsize=(9.0, 1.6 + 0.5 * len(shown)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0.0, color=GREY, linewidth=1.2)
        for index, row in enumerate(shown):
            axes.errorbar(
                row.difference, index, xerr=row.plus_minus, color=BLUE, marker="o", markersize=8, capsize=4,
                markerfacecolor=BLUE if row.is_significant else "white", linewidth=1.8,
            )  # fmt: skip
            if row.effect.paper_points is not None:
                axes.plot(row.effect.paper_points, index, marker="D", color=VERMILION, markersize=7, linestyle="")
        axes.plot([], [], marker="o", color=BLUE, markersize=8, label="here, 95 %: excludes 0")
        axes.plot([], [], marker="o", color=BLUE, markersize=8, markerfacecolor="white", label="here, 95 %: holds 0")
        axes.plot([], [], marker="D", color=VERMILION, markersize=7, linestyle="", label="paper, on ImageNet")
        axes.set_yticks(range(len(shown)), [row.effect.what for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("change of top-1 error when switched off, points (right: worse)")
        figure.legend(loc="outside upper center", ncols=3)
    return figure
