"""One HTML file about one run or several: what came of them, shown, and how to repeat it.

The decision that shaped it: the page is self-contained and has no script. Pictures are inline, switches are check boxes
and style sheets, and its own policy forbids the browser to load or to run anything, so that a hostile class name could
do nothing even if it were not escaped; the template escapes everything that is not drawn here. Left out: the
template's looks (report.html), the curves' (svgchart.py).
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.files import write_atomic
from pipeline.images.imagenet import load_ilsvrc2012
from trainer.nets.tables import PUBLISHED
from trainer.recipe import RECIPES, from_dict
from trainer.record.progress import spell_duration
from trainer.report.confusion import choose_shown, count_pairs, list_classes
from trainer.report.curves import LEARNING, SPEED, chart_figure
from trainer.report.data import Study, num_towers
from trainer.report.pictures import kernel_grid, shorten, swatch_figure, to_svg
from trainer.report.repeat import repeat_command, spell_changes
from trainer.report.summary import label_runs, summarise

PAGE = "report.html"
_TEMPLATE = Path(__file__).with_name("page.html")
_KERNELS_WIDTH_PX = 600
_MOST_PAIRS, _MOST_WORST = 12, 20
_JPEG_QUALITY = 85


def write_page(studies: Sequence[Study], path: Path) -> None:
    """Write the page, atomically; the same runs give the same bytes. Raises UserError as `read_study` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render(studies).encode("utf-8", "replace"))


def render(studies: Sequence[Study]) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    labels = label_runs(studies)
    metrics = dict(zip(labels, (study.metrics for study in studies), strict=True))
    known = {study.num_classes for study in studies}
    num_classes = known.pop() if len(known) == 1 else None
    charts = {chart: to_svg(chart_figure(chart, metrics, num_classes), chart.title) for chart in LEARNING + SPEED}
    runs = [_describe(study, label, run) for run, (study, label) in enumerate(zip(studies, labels, strict=True))]
    return template.render(
        title=", ".join(study.name for study in studies),
        runs=runs,
        learning=[charts[chart] for chart in LEARNING],
        speed=[charts[chart] for chart in SPEED],
        errors=list_errors(studies),
        is_comparable=all(_is_ilsvrc2012(study) for study in studies),
    )


def _describe(study: Study, label: str, run: int) -> dict[str, Any]:
    """What the template shows of a run."""
    return {
        "name": study.name,
        "label": label,
        "swatch": to_svg(swatch_figure(run), f"How {label} is drawn", "chart swatch"),
        "summary": _summary(study),
        "kernels": _kernels(study),
        "guesses": _guesses(study),
        "neighbours": _neighbours(study),
        "num_searched": study.examples.num_searched if study.examples else 0,
        "confusion": _confusion(study),
        "environment": _environment(study),
        "command": _command(study),
        "left_out": study.left_out,
    }


def _summary(study: Study) -> list[tuple[str, str]]:
    """The first table: what, and the value in words; what the run does not have yet is left out."""
    found, train, config = summarise(study), study.records("train"), study.config
    rows: list[tuple[str, str]] = []
    if config.get("recipe"):
        recipe = from_dict(config["recipe"])
        changes = spell_changes(recipe, RECIPES.get(recipe.name, RECIPES["paper"]))
        rows.append(("recipe", recipe.name))
        if changes:
            rows.append(("changed", ", ".join(f"{field} {text}" for field, text in changes.items())))
    rows.append(("data", _dataset(study)))
    if found["top1_error"] is not None:
        rows.append(
            (
                "best error, centre crop",
                f"{_pair(found['top1_error'], found['top5_error'])}, epoch {found['best_epoch']}",
            )
        )
    if found["ten_crop_top1_error"] is not None:
        rows.append(("ten crops", _pair(found["ten_crop_top1_error"], found["ten_crop_top5_error"])))
    rows.append(("epochs", str(found["num_epochs"])))
    if train:
        rows.append(("steps", f"{train[-1]['step']:,}"))
        if train[-1]["time_s"] is not None:
            rows.append(("training time", spell_duration(train[-1]["time_s"])))
    if found["images_per_s"] is not None:
        rows.append(("speed", f"{found['images_per_s']:,.0f} images/s (median)"))
    if found["data_wait_fraction"] is not None:
        rows.append(("waiting for data", f"{100 * found['data_wait_fraction']:.1f} % of the time"))
    if config.get("device"):
        rows.append(("trained on", f"{config.get('world_size', 1)} × {config['device']}"))
    if study.weights:
        rows.append(("parameters", f"{sum(tensor.numel() for tensor in study.weights.values()):,}"))
    return rows


def _pair(top1: float, top5: float | None) -> str:
    return f"top-1 {top1:.2f} %" + (f", top-5 {top5:.2f} %" if top5 is not None else "")


def list_errors(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """Rows for the table of errors, ours first: whose, net, data, and top-1 and top-5 error (%) for both views."""
    rows = []
    for study in studies:
        found = summarise(study)
        ours = [found["top1_error"], found["top5_error"], found["ten_crop_top1_error"], found["ten_crop_top5_error"]]
        if ours[2] is None and study.answers is not None and study.answers.crops == "ten":
            ours[2:] = study.answers.errors
        rows.append({"whose": "ours", "net": study.name, "data": _dataset(study), "errors": ours})
    for net, data, *errors in PUBLISHED:
        rows.append({"whose": "published", "net": net, "data": data, "errors": errors})
    for row in rows:
        row["errors"] = ["" if error is None else f"{error:.2f}" for error in row["errors"]]
    return rows


def _is_ilsvrc2012(study: Study) -> bool:
    counts = [record["num_images"] for record in study.records("eval")]
    return [wnid for wnid, _ in study.classes] == list(load_ilsvrc2012()) and counts[-1:] == [50_000]


def _dataset(study: Study) -> str:
    if _is_ilsvrc2012(study):
        return "ILSVRC-2012 validation"
    counts = [record["num_images"] for record in study.records("eval")]
    said = [str(study.config.get("shards", "unknown shards"))]
    if counts:
        said.append(f"{counts[-1]:,} validation images")
    if study.num_classes:
        said.append(f"{study.num_classes:,} classes")
    return ", ".join(said)


def _kernels(study: Study) -> list[dict[str, Any]]:
    """A picture for each tower."""
    if not study.weights:
        return []
    weight = study.weights["conv1.weight"].numpy()
    grids = kernel_grid(weight, num_towers(study.weights), _KERNELS_WIDTH_PX)
    return [{"source": _encode(grid, "png"), "width": grid.shape[1], "height": grid.shape[0]} for grid in grids]


def _name(study: Study, index: int) -> str:
    """ImageNet's names are lists of synonyms: the first says enough."""
    known = 0 <= index < len(study.classes)
    return shorten(study.classes[index][1].split(",")[0], 40) if known else f"class {index}"


def _guesses(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "source": _encode(guess.pixels, "jpeg"),
            "label": _name(study, guess.label),
            "is_right": guess.classes[:1] == (guess.label,),
            "bars": [
                {"name": _name(study, index), "percent": 100 * probability, "is_label": index == guess.label}
                for index, probability in zip(guess.classes, guess.probabilities, strict=True)
            ],
        }
        for guess in (study.examples.guesses if study.examples else ())
    ]


def _neighbours(study: Study) -> list[list[dict[str, Any]]]:
    return [
        [
            {
                "source": _encode(found.pixels[::2, ::2], "jpeg"),
                "label": _name(study, found.label),
                "is_same": found.label == row[0].label,
                "distance": f"{found.distance:.3g}",
            }
            for found in row
        ]
        for row in (study.examples.rows if study.examples else ())
    ]


def _confusion(study: Study) -> dict[str, Any] | None:
    if study.answers is None:
        return None
    classes = list_classes(study.answers)
    shown = choose_shown(classes, _MOST_PAIRS)
    counts = count_pairs(study.answers, shown)
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = [
        {
            "name": _name(study, one.index),
            "num_images": one.num_images,
            "top1": f"{one.top1_error:.1f}",
            "top5": f"{one.top5_error:.1f}",
            "instead": ", ".join(
                f"{_name(study, index)} {100 * n / one.num_images:.0f} %" for index, n in one.instead[:3]
            ),
        }
        for one in classes
    ]
    return {
        "source": study.answers.source,
        "crops": "ten crops" if study.answers.crops == "ten" else "centre crop",
        "num_images": len(study.answers.labels),
        "worst": rows[:_MOST_WORST],
        "others": rows[_MOST_WORST:],
        "names": [_name(study, index) for index in shown],
        "pairs": [
            [{"count": int(count), "share": round(float(count / total), 3)} for count in line]
            for line, total in zip(counts, totals[:, 0], strict=True)
        ],
    }


def _environment(study: Study) -> list[tuple[str, str]]:
    rows = []
    for name, value in study.environment.items():
        if name == "gpus" and isinstance(value, list):
            value = ", ".join(str(gpu.get("name")) for gpu in value if isinstance(gpu, dict)) or None
        if name == "memory_bytes" and isinstance(value, int):
            name, value = "memory", f"{value / 2**30:.0f} GiB"
        if value is not None:
            rows.append((name.replace("_", " "), str(value)))
    fingerprint = study.config.get("shards_fingerprint")
    return rows + ([("shards fingerprint", str(fingerprint))] if fingerprint else [])


def _command(study: Study) -> str | None:
    return repeat_command(study.config) if study.config.get("recipe") else None


def _encode(pixels: NDArray[np.uint8], kind: str) -> str:
    """A data: URL."""
    from PIL import Image

    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": _JPEG_QUALITY} if kind == "jpeg" else {"optimize": True}
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
