"""Errors of trained nets on the same validation images, and of the average of their softmax outputs (P 6: "5 CNNs").

Every rank keeps the outputs of its own images in the loaders' order, which is fixed, so that nets are averaged image by
image and nothing but counts and best classes crosses ranks.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.common.console import print_json
from pipeline.common.errors import UserError
from pipeline.images.imagenet import load_ilsvrc2012
from pipeline.manifest import KEY_DIGITS
from pipeline.options import LoaderOptions
from pipeline.shards import ShardSet
from trainer.distributed import Ranks, gather, join, reduce_sum
from trainer.evaluate import Crops, Errors, Keep, choose_dtype, count_errors, evaluate, make_eval_loader, to_errors
from trainer.nets.formats import load_any
from trainer.nets.predict import Guess, find_best
from trainer.nets.tables import print_errors, write_csv
from trainer.nets.weights import Weights, complete, make_net
from trainer.record.metrics import MetricsLog
from trainer.record.runs import CHECKPOINTS, METRICS

VIEWS: tuple[tuple[Crops, str], ...] = (("centre", ""), ("ten", "ten_crop_"))


@dataclass(frozen=True)
class Job:
    """What `alexnet-eval` was asked: nets (folders of runs, or files of weights), shards, where results go."""

    nets: tuple[Path, ...]
    checkpoint: str
    shards: str
    use_gpu: bool
    loader: LoaderOptions = LoaderOptions()
    cache_dir: str | None = None
    as_json: bool = False
    predictions: Path | None = None


@dataclass(frozen=True)
class Answer:
    """What the nets, averaged, take one image for."""

    key: int
    label: int
    best: tuple[Guess, ...]


Found = dict[Crops, Errors]
_Batches = list[tuple[Tensor, Tensor, Tensor]]  # softmax outputs (B, classes), labels (B,), keys (B,), on the CPU


def run_rank(job: Job) -> int:
    """The whole evaluation as seen by one rank; the first one prints."""
    with join(job.use_gpu) as ranks:
        shards = ShardSet.open(job.shards, cache_dir=job.cache_dir)
        nets = [load_any(path, job.checkpoint, shards) for path in job.nets]
        found, average, answers = evaluate_nets(
            nets, shards, ranks, options=job.loader, with_answers=job.predictions is not None
        )
        if not ranks.is_first:
            return 0
        for net, path, errors in zip(nets, job.nets, found, strict=True):
            _log_ten_crops(net, path, errors)
        if job.predictions:
            _write_answers(job.predictions, answers, shards)
        results = [
            {"run": str(path), "checkpoint": net.source, **summarise(errors)}
            for path, net, errors in zip(job.nets, nets, found, strict=True)
        ]
        averaged = None if average is None else {"num_nets": len(nets), **summarise(average)}
        if job.as_json:
            print_json(results[0] if averaged is None else {"runs": results, "average": averaged})
        else:
            wnids = [entry.wnid for entry in shards.manifest.classes]
            is_ilsvrc2012 = wnids == list(load_ilsvrc2012()) and shards.num_samples("val") == 50_000
            print_errors(results, averaged, is_ilsvrc2012=is_ilsvrc2012)
    return 0


def evaluate_nets(
    nets: Sequence[Weights],
    shards: ShardSet,
    ranks: Ranks,
    *,
    options: LoaderOptions = LoaderOptions(),
    with_answers: bool = False,
) -> tuple[list[Found], Found | None, list[Answer]]:
    """Errors of each net for both views; those of their average, if there are several; ten-crop answers, by key.

    The answers come on the first rank only, and only if asked for. Raises UserError for nets that were not trained on
    these shards, and for a set that is not seen whole, each image once.
    """
    nets = [complete(net, shards) for net in nets]
    for net in nets:
        check_belongs(net, shards)
    num_images = shards.num_samples("val")
    found: list[Found] = [{} for _ in nets]
    average: Found = {}
    answers: list[Answer] = []
    for crops, _ in VIEWS:
        batches: _Batches = []
        for weights, errors in zip(nets, found, strict=True):
            assert weights.colors is not None  # `complete` saw to that
            loader = make_eval_loader(shards, weights.colors, weights.recipe, ranks, crops, options)
            model, dtype = make_net(weights, ranks.device), choose_dtype(weights.recipe.precision, ranks.device)
            is_kept = len(nets) > 1 or (with_answers and crops == "ten")
            keep = _add_to(batches) if is_kept else None
            errors[crops] = evaluate(model, loader, ranks, dtype, num_images, keep)
        for outputs, _, _ in batches:
            outputs.div_(len(nets)).log_()
        if len(nets) > 1:
            counts = sum((count_errors(*batch[:2]) for batch in batches), torch.zeros(4, dtype=torch.float64))
            average[crops] = to_errors(reduce_sum(counts.to(ranks.device), ranks), num_images)
        if with_answers and crops == "ten":
            answers = _gather_answers(batches, nets[0], ranks, num_images)
    return found, average or None, answers


def _add_to(batches: _Batches) -> Keep:
    """What takes one net's outputs, a batch each, and adds them to those of the nets before it."""
    before = iter(batches.copy())

    def keep(log_outputs: Tensor, labels: Tensor, keys: Tensor) -> None:
        outputs = log_outputs.exp().cpu()
        kept = next(before, None)
        if kept is None:
            batches.append((outputs, labels.cpu(), keys.cpu()))
        else:
            kept[0].add_(outputs)

    return keep


def _gather_answers(batches: _Batches, net: Weights, ranks: Ranks, num_images: int) -> list[Answer]:
    mine = [
        Answer(key, label, find_best(row, net.classes))
        for outputs, labels, keys in batches
        for row, label, key in zip(outputs, labels.tolist(), keys.tolist(), strict=True)
    ]
    answers = sorted((answer for part in gather(mine, ranks) for answer in part), key=lambda answer: answer.key)
    if len({answer.key for answer in answers}) != num_images or len(answers) != num_images:
        raise UserError(f"predicted {len(answers)} images, expected {num_images}, each once; check the shards' indices")
    return answers if ranks.is_first else []


def _write_answers(path: Path, answers: list[Answer], shards: ShardSet) -> None:
    sources, wnids = read_sources(shards), [entry.wnid for entry in shards.manifest.classes]
    rows = [
        ([f"{one.key:0{KEY_DIGITS}d}", sources.get(one.key, ""), one.label, wnids[one.label]], one.best)
        for one in answers
    ]
    write_csv(path, ["key", "source", "label", "label_wnid"], rows)


def check_belongs(weights: Weights, shards: ShardSet) -> None:
    """Raises UserError, by name, for a net of other classes or other training shards than these."""
    if weights.num_classes != shards.num_classes:
        raise UserError(
            f"{weights.source}: a net of {weights.num_classes} classes, but {shards.root} has {shards.num_classes}; "
            "name the run's own shards with --shards"
        )
    if weights.shards_fingerprint not in (None, shards.fingerprint):
        raise UserError(
            f"{weights.source}: was trained on shards {str(weights.shards_fingerprint)[:12]}, but {shards.root} holds "
            f"{shards.fingerprint[:12]}; name the run's own with --shards, or leave it out"
        )
    ours = [entry.wnid for entry in shards.manifest.classes]
    theirs = [entry.wnid for entry in weights.classes or shards.manifest.classes]
    for index, (one, other) in enumerate(zip(theirs, ours, strict=True)):
        if one != other:
            raise UserError(
                f"{weights.source}: its class {index} is {one!r}, but that of {shards.root} is {other!r}; "
                "name shards of the same classes with --shards"
            )


def summarise(found: Found) -> dict[str, Any]:
    """The numbers of `alexnet-eval --json`: errors in percent."""
    result: dict[str, Any] = {"num_images": found["centre"].num_images}
    for crops, prefix in VIEWS:
        result |= {f"{prefix}top{k}_error": getattr(found[crops], f"top{k}_error") for k in (1, 5)}
    return result


def read_sources(shards: ShardSet, split: str = "val") -> dict[int, str]:
    """The source of each sample by its key, as far as the shards' records tell; a set without records gives none."""
    sources: dict[int, str] = {}
    for tar in shards.tars(split):
        try:
            record = json.loads(tar.with_suffix(".json").read_text(encoding="utf-8"))
            sources |= {int(key): str(source) for key, source in record["sources"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # behind a URL, or deleted: not needed
            continue
    return sources


def _log_ten_crops(net: Weights, run: Path, found: Found) -> None:
    """Into the run's metrics, if the checkpoint is the run's own."""
    if net.step is not None and Path(net.source).resolve().parent == (run / CHECKPOINTS).resolve():
        step, epoch = net.step
        with MetricsLog.open(run / METRICS, sys.maxsize) as log:
            log.eval(step=step, epoch=epoch, crops="ten", **asdict(found["ten"]))
