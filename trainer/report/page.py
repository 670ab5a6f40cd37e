"""One HTML file about one run or several, complete in itself and without a script.

Its own policy forbids the browser to load or to run anything, so that a hostile class name could do nothing even if it
were not escaped; the template escapes everything but the charts.
"""

import base64
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.files import write_atomic
from pipeline.images.imagenet import load_ilsvrc2012
from trainer.nets.tables import PUBLISHED
from trainer.recipe import RECIPES, Recipe, from_dict
from trainer.record.progress import spell_duration
from trainer.report.confusion import choose_worst, count_pairs, list_classes
from trainer.report.curves import LEARNING, SPEED, Chart, chart_figure
from trainer.report.data import RunData, count_towers
from trainer.report.pictures import kernel_grid, name_class, swatch_figure, to_svg
from trainer.report.summary import label_runs, summarise

PAGE = "report.html"
_TEMPLATE = Path(__file__).with_name("page.html")
_KERNELS_WIDTH_PX = 600
_MOST_PAIRS, _MOST_WORST = 12, 20
_NAME_LETTERS = 40


def write_page(runs: Sequence[RunData], path: Path) -> None:
    """Write the page, atomically; the same runs give the same bytes. Raises UserError for a recipe that is unknown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render(runs).encode("utf-8", "replace"))


def render(runs: Sequence[RunData]) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    labels = label_runs(runs)
    metrics = dict(zip(labels, (data.metrics for data in runs), strict=True))
    known = {data.num_classes for data in runs}
    num_classes = known.pop() if len(known) == 1 else None

    def draw(charts: Sequence[Chart]) -> list[str]:
        return [to_svg(chart_figure(chart, metrics, num_classes), chart.title) for chart in charts]

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"data_url": _to_url}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=", ".join(data.name for data in runs),
        runs=[_describe(data, label, run) for run, (data, label) in enumerate(zip(runs, labels, strict=True))],
        learning=draw(LEARNING),
        speed=draw(SPEED),
        errors=list_errors(runs),
        is_comparable=all(_is_ilsvrc2012(data) for data in runs),
        class_of=lambda data, index: name_class(data.class_names, index, _NAME_LETTERS),
    )


def _describe(data: RunData, label: str, run: int) -> dict[str, Any]:
    """What the template shows of a run."""
    kernels, confusion = [], None
    if data.weights:
        kernels = kernel_grid(data.weights["conv1.weight"].numpy(), count_towers(data.weights), _KERNELS_WIDTH_PX)
    if data.predictions:
        classes = list_classes(data.predictions)
        shown = choose_worst(classes, _MOST_PAIRS)
        pairs = zip(shown, count_pairs(data.predictions, shown).tolist(), strict=True)
        confusion = {"worst": classes[:_MOST_WORST], "others": classes[_MOST_WORST:], "shown": shown, "pairs": pairs}
    return {
        "data": data,
        "label": label,
        "swatch": to_svg(swatch_figure(run), f"How {label} is drawn", "chart swatch"),
        "summary": _summary(data),
        "kernels": kernels,
        "confusion": confusion,
        "environment": _environment(data),
        "command": repeat_command(data.config) if data.config.get("recipe") else None,
    }


def _summary(data: RunData) -> list[tuple[str, str]]:
    """The first table: what, and the value in words; what the run does not have yet is left out."""
    found, last, config = summarise(data), (data.records("train") or [{}])[-1], data.config
    rows = [("data", _dataset(data))]
    if config.get("recipe"):
        recipe = from_dict(config["recipe"])
        changes = spell_changes(recipe, RECIPES.get(recipe.name, RECIPES["paper"]))
        said = [("changed", ", ".join(f"{field} {text}" for field, text in changes.items()))] if changes else []
        rows = [("recipe", recipe.name), *said, *rows]
    if found["top1_error"] is not None:
        best = f"{_pair(found['top1_error'], found['top5_error'])}, epoch {found['best_epoch']}"
        rows.append(("best error, centre crop", best))
    if found["ten_crop_top1_error"] is not None:
        rows.append(("ten crops", _pair(found["ten_crop_top1_error"], found["ten_crop_top5_error"])))
    rows.append(("epochs", str(found["num_epochs"])))
    if last:
        rows.append(("steps", f"{last['step']:,}"))
    if last.get("time_s") is not None:
        rows.append(("training time", spell_duration(last["time_s"])))
    if found["images_per_s"] is not None:
        rows.append(("speed", f"{found['images_per_s']:,.0f} images/s (median)"))
    if found["data_wait_fraction"] is not None:
        rows.append(("waiting for data", f"{100 * found['data_wait_fraction']:.1f} % of the time"))
    if config.get("device"):
        rows.append(("trained on", f"{config.get('world_size', 1)} × {config['device']}"))
    if data.weights:
        rows.append(("parameters", f"{sum(tensor.numel() for tensor in data.weights.values()):,}"))
    return rows


def _pair(top1: float, top5: float | None) -> str:
    return f"top-1 {top1:.2f} %" + (f", top-5 {top5:.2f} %" if top5 is not None else "")


def list_errors(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Rows for the table of errors, ours first: whose, net, data, and top-1 and top-5 error (%) for both views."""
    rows = []
    for data in runs:
        found = summarise(data)
        ours = [found[name] for name in ("top1_error", "top5_error", "ten_crop_top1_error", "ten_crop_top5_error")]
        if ours[2] is None and data.predictions and data.predictions.crops == "ten":
            ours[2:] = data.predictions.errors
        rows.append(("ours", data.name, _dataset(data), ours))
    rows += [("published", net, on, errors) for net, on, *errors in PUBLISHED]
    return [
        {
            "whose": whose,
            "net": net,
            "data": on,
            "errors": ["" if error is None else f"{error:.2f}" for error in errors],
        }
        for whose, net, on, errors in rows
    ]


def _is_ilsvrc2012(data: RunData) -> bool:
    counts = [record["num_images"] for record in data.records("eval")]
    return [entry.wnid for entry in data.classes] == list(load_ilsvrc2012()) and counts[-1:] == [50_000]


def _dataset(data: RunData) -> str:
    if _is_ilsvrc2012(data):
        return "ILSVRC-2012 validation"
    said = [str(data.config.get("shards", "unknown shards"))]
    said += [f"{record['num_images']:,} validation images" for record in data.records("eval")[-1:]]
    said += [f"{data.num_classes:,} classes"] if data.num_classes else []
    return ", ".join(said)


def _environment(data: RunData) -> list[tuple[str, str]]:
    rows = []
    for name, value in {**data.environment, "shards_fingerprint": data.config.get("shards_fingerprint")}.items():
        if name == "gpus" and isinstance(value, list):
            value = ", ".join(str(gpu.get("name")) for gpu in value if isinstance(gpu, dict)) or None
        if name == "memory_bytes" and isinstance(value, int):
            name, value = "memory", f"{value / 2**30:.0f} GiB"
        if value is not None:
            rows.append((name.replace("_", " "), str(value)))
    return rows


def _to_url(pixels: NDArray[np.uint8], kind: str, step: int = 1) -> str:
    """Every step-th pixel of a picture (H, W, 3) as a data: URL of a "jpeg" or a "png"."""
    from PIL import Image

    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": 85} if kind == "jpeg" else {"optimize": True}
    Image.fromarray(np.ascontiguousarray(pixels[::step, ::step])).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


_OWN_FLAGS = {"epochs": "--epochs", "global_batch_size": "--global-batch-size", "lr": "--lr"}
_FEEDING = {"decode": "--decode", "host_share": "--host-share", "cache_gib": "--cache-gib"}


def repeat_command(config: dict[str, Any]) -> str:
    """The line for a shell that makes a run again, from its config.json: a recipe, and what differs from it.

    Raises UserError for a recipe that this version does not know.
    """
    recipe = from_dict(config["recipe"])
    known = RECIPES.get(recipe.name, RECIPES["paper"])
    words = ["--shards", str(config.get("shards", "shards")), "--recipe", known.name]
    for field, text in spell_changes(recipe, known).items():
        words += [_OWN_FLAGS[field], text] if field in _OWN_FLAGS else ["--set", f"{field}={text}"]
    words += ["--seed", str(config.get("seed", 0))]
    weights, parallel, feeding = (config.get(name) or {} for name in ("weights", "parallel", "feeding"))
    if weights:
        words += ["--weights", str(weights.get("source", ""))]
    num_ranks, on_gpu = int(config.get("world_size", 1)), config.get("device") == "cuda"
    if num_ranks > 1 and parallel:
        words += ["--parallel", str(parallel.get("mode", "data"))]
        if parallel.get("gradients", "float32") != "float32":
            words += ["--gradients", str(parallel["gradients"])]
    for field, flag in _FEEDING.items():
        if feeding.get(field) not in (None, "auto"):
            words += [flag, str(feeding[field])]
    if on_gpu or num_ranks == 1:
        start = ["alexnet-train", "--gpus", str(num_ranks if on_gpu else 0)]
    else:
        start = ["torchrun", "--nproc-per-node", str(num_ranks), "-m", "trainer", "--gpus", "0"]
    return shlex.join([*start, *words])


def spell_changes(recipe: Recipe, known: Recipe) -> dict[str, str]:
    """The fields in which `recipe` differs from `known`, but for the name, as `--set` takes them."""
    pairs = {field: (getattr(recipe, field), getattr(known, field)) for field in vars(known) if field != "name"}
    return {field: _spell_value(value) for field, (value, other) in pairs.items() if value != other}


def _spell_value(value: Any) -> str:
    """A field's value in the form that recipe.override reads."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(":".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)
    return str(value)
