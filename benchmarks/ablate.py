"""What does each part of AlexNet do? One run of `alexnet-train` for each effect the paper reports, on one dataset.

    python benchmarks/ablate.py SHARDS --out ablation --recipe small --epochs 8 --seeds 3

Trains the recipe as it is ("base") and once more for each effect, switched off by one flag or two, in OUT/NAME-sSEED. A
finished run is not made again, a broken one goes on. Evaluates the last checkpoint (the best one would be chosen by the
images it is judged by) and prints a table of the differences to base, paired image by image, with a plot.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.children import unwind_when_terminated
from harness.machine import describe_machine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.common.errors import UserError  # noqa: E402
from pipeline.common.files import read_json, write_json  # noqa: E402
from pipeline.options import LoaderOptions  # noqa: E402
from pipeline.shards import ShardSet  # noqa: E402
from trainer.recipe import RECIPES, Recipe, override, to_dict  # noqa: E402

VERDICTS = "verdicts.json"


@dataclass(frozen=True)
class Effect:
    """A variant: what is switched off, by which fields of the recipe; what the paper says and, in points of top-1 error
    on ImageNet, by how much the error grows without it (None: it gives no such number)."""

    name: str
    what: str
    settings: tuple[str, ...] = ()
    paper: str = ""
    paper_points: float | None = None


EFFECTS = (
    Effect("base", "the recipe as it is"),
    Effect("no-lrn", "no response normalisation", ("lrn=false",), "+1.4 (3.3)", 1.4),
    Effect("pool-2x2", "2x2 pooling, no overlap", ("overlapping_pool=false",), "+0.4 (3.4)", 0.4),
    Effect("tanh", "tanh for ReLU", ("activation=tanh",), "six times slower on CIFAR-10 (3.1)"),
    Effect("no-dropout", "no dropout", ("dropout=0",), '"substantial overfitting" (4.2)'),
    Effect("no-colour", "no colour noise", ("lighting=none",), '+1, "over" (4.1)', 1.0),
    Effect("no-crop-flip", "no crop, no flip", ("crop=false", "flip=false"), '"substantial overfitting" (4.1)'),
    Effect("no-decay", "no weight decay", ("weight_decay=0",), "training error rises (5)"),
    Effect("one-tower", "one tower, all kernels", ("num_towers=1",), "not compared (its 1.7 is half the kernels, 3.2)"),
)


@dataclass(frozen=True)
class Run:
    """One training run to be: the effect, the seed, the recipe with the effect's fields set, and the folder."""

    effect: Effect
    seed: int
    recipe: Recipe
    folder: Path
    settings: tuple[str, ...]


def main() -> None:
    options = parse_arguments()
    unwind_when_terminated()
    try:
        effects = choose(options.only)
        shards = ShardSet.open(options.shards)
        if not shards.num_samples("val"):
            raise UserError(f"{shards.root}: no validation images, by which variants are compared; shard it with some")
        runs = plan(options, effects)
        for run in runs:
            check(run, shards)  # all of them before any is trained
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        done = []
        for number, run in enumerate(runs, start=1):
            if not (run.folder / VERDICTS).exists():
                if options.no_training:
                    continue
                print(f"run {number} of {len(runs)}: {run.folder.name}", file=sys.stderr, flush=True)
                train(run, options)
                write_json(run.folder / VERDICTS, judge(run, shards, LoaderOptions(num_threads=options.threads)))
            done.append(run)
            if number < len(runs) and run.effect == effects[-1]:
                show(done, shards, options)  # a round of seeds is complete: the table so far
        print(show(done, shards, options))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One training run for each effect the paper reports; one table.")
    parser.add_argument("shards", nargs="?", default="shards", help="folder of shards, with colours and validation")
    parser.add_argument("--out", default="ablation", help="folder of the runs, the table and the plot")
    parser.add_argument("--recipe", choices=list(RECIPES), default="small")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant, with seeds 0, 1, ...")
    parser.add_argument("--only", help="comma-separated effects; base is always among them")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="FIELD=VALUE",
                        help="a field of the recipe, for every variant; repeatable")  # fmt: skip
    parser.add_argument("--threads", type=int, help="decoding threads (default: one per CPU)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each run; 0: the CPU")
    parser.add_argument("--no-training", action="store_true", help="only the table and plot of the finished runs")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: expected 1 or more")
    return options


def choose(only: str | None) -> list[Effect]:
    """The effects named, in the order of `EFFECTS`, base first and always. Raises UserError for an unknown name."""
    names = {"base", *(only.split(",") if only else (effect.name for effect in EFFECTS))}
    unknown = sorted(names - {effect.name for effect in EFFECTS})
    if unknown:
        known = ", ".join(effect.name for effect in EFFECTS)
        raise UserError(f"--only {','.join(unknown)}: no such effect; expected some of {known}")
    return [effect for effect in EFFECTS if effect.name in names]


def plan(options: argparse.Namespace, effects: Sequence[Effect]) -> list[Run]:
    """Every run, a whole round of effects for one seed before the next. Raises UserError for a wrong setting."""
    runs = []
    common = [f"epochs={options.epochs}", *options.settings]
    for seed in range(options.seeds):
        for effect in effects:
            settings = (*common, *effect.settings)
            recipe = override(RECIPES[options.recipe], settings)
            runs.append(Run(effect, seed, recipe, Path(options.out) / f"{effect.name}-s{seed}", settings))
    return runs


def check(run: Run, shards: ShardSet) -> None:
    """Raises UserError if the run's folder holds a run of other settings or other shards."""
    from trainer.record.runs import CONFIG, read_config

    if not (run.folder / CONFIG).exists():
        return
    found = read_config(run.folder)
    wanted = {"recipe": to_dict(run.recipe), "seed": run.seed, "shards_fingerprint": shards.fingerprint}
    different = [name for name, value in wanted.items() if found.get(name) != value]
    if different:
        raise UserError(f"{run.folder}: holds a run of another {', '.join(different)}; choose another --out")


def train(run: Run, options: argparse.Namespace) -> None:
    """`alexnet-train` in a process of its own, resumed where it was broken off. Raises UserError if it fails."""
    from trainer.record.runs import CHECKPOINTS, LAST

    command = [sys.executable, "-m", "trainer", "--gpus", str(options.gpus)]
    if options.threads:
        command += ["--threads", str(options.threads)]
    if (run.folder / CHECKPOINTS / LAST).exists():
        command += ["--resume", str(run.folder.resolve())]
    else:
        shutil.rmtree(run.folder, ignore_errors=True)  # broken off within the first epoch
        command += ["--shards", str(Path(options.shards).resolve()), "--runs", str(run.folder.parent.resolve())]
        command += ["--name", run.folder.name, "--recipe", options.recipe, "--seed", str(run.seed)]
        command += [word for setting in run.settings for word in ("--set", setting)]
    running = subprocess.Popen(command, cwd=ROOT)
    try:
        status = running.wait()
    except BaseException:  # also a signal: let it save what it has
        running.terminate()
        running.wait()
        raise
    if status:
        raise UserError(f"{run.folder.name}: alexnet-train ended with status {status}; mend that and start again")


def judge(run: Run, shards: ShardSet, options: LoaderOptions = LoaderOptions()) -> dict[str, Any]:
    """The last checkpoint on every validation image, in the shards' order: whether its top-1 class is wrong.

    {"centre": [0, 1, ...], "ten": [...]}: the mistakes that `alexnet-eval --checkpoint last` counts. On the CPU.
    """
    import torch

    from pipeline.colors import ColorStats
    from trainer.checkpoint import load
    from trainer.distributed import Ranks
    from trainer.evaluate import choose_dtype, log_probabilities, make_eval_loader
    from trainer.model import AlexNet
    from trainer.record.runs import CHECKPOINTS, LAST

    state = load(run.folder / CHECKPOINTS / LAST)
    colors = ColorStats.load(shards.root, state["shards_fingerprint"])
    device = torch.device("cpu")
    ranks, dtype = Ranks(0, 1, device), choose_dtype(run.recipe.precision, device)
    model = AlexNet.from_recipe(run.recipe, shards.num_classes)
    model.load_state_dict(state["model"])
    model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    verdicts: dict[str, Any] = {}
    for crops in ("centre", "ten"):
        wrong: list[int] = []
        loader = make_eval_loader(shards, colors, run.recipe, ranks, crops, options)  # type: ignore[arg-type]
        with torch.no_grad():
            for images, labels in loader:
                wrong += (log_probabilities(model, images, dtype).argmax(dim=1) != labels).int().tolist()
        verdicts[crops] = wrong
    return verdicts


def final_training_error(metrics: Iterable[dict[str, Any]]) -> float:
    """Top-1 training error of the last epoch (%, augmentation and dropout on): records weighted by their steps."""
    train = [record for record in metrics if record["kind"] == "train"]
    steps = [record["step"] for record in train]
    weights = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    last = [(r["top1_error"], w) for r, w in zip(train, weights, strict=True) if r["epoch"] == train[-1]["epoch"]]
    return sum(error * weight for error, weight in last) / sum(weight for _, weight in last)


def show(done: Sequence[Run], shards: ShardSet, options: argparse.Namespace) -> str:
    """Write OUT/ablation.md, .json and .png of the runs that are done; the table."""
    from ablate_table import compare, format_table, plot

    from trainer.record.metrics import read_metrics
    from trainer.record.runs import METRICS

    results: dict[str, dict[int, dict[str, Any]]] = {}
    for run in done:
        verdicts = read_json(run.folder / VERDICTS)
        error = final_training_error(read_metrics(run.folder / METRICS))
        results.setdefault(run.effect.name, {})[run.seed] = {**verdicts, "training_error": error}
    if "base" not in results:
        raise UserError(f"{options.out}: no finished run of base, to which all others are compared")
    rows = compare([effect for effect in EFFECTS if effect.name in results], results)
    machine = describe_machine(os.sched_getaffinity(0))
    settings = " ".join(f"--set {setting}" for setting in options.settings)
    notes = [
        f"`python benchmarks/ablate.py {options.shards} --recipe {options.recipe} --epochs {options.epochs} "
        f"--seeds {options.seeds}{' ' + settings if settings else ''}`",
        f"{shards.num_samples('train'):,} training and {shards.num_samples('val'):,} validation images in "
        f"{shards.num_classes} classes. {machine['date']}, {machine['cpu']}, {machine['cores_used']} of "
        f"{machine['cores_of_machine']} cores.",
    ]
    text = format_table(rows, notes)
    out = Path(options.out)
    (out / "ablation.md").write_text(text + "\n", encoding="utf-8")
    document = {"machine": machine, "settings": vars(options), "rows": [vars(row) for row in rows]}
    (out / "ablation.json").write_text(json.dumps(document, indent=1, default=vars) + "\n", encoding="utf-8")
    plot(rows, out / "ablation.png")
    return text


if __name__ == "__main__":
    main()
