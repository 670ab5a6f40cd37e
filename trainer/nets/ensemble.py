"""Errors of trained nets on the same validation images, and of the average of their softmax outputs (P 6: "5 CNNs").

The decision that shaped it: every rank keeps the outputs of its own part of the images, in the loaders' fixed order, so
that nets are averaged image by image without anything but counts and best classes crossing ranks. What is predicted is
put in order by key and counted before anything is written. Left out: crops and counting of one net (evaluate.py), words
(cli_nets.py).
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
from pipeline.manifest import KEY_DIGITS
from pipeline.options import LoaderOptions
from pipeline.shards import ShardSet
from trainer.distributed import Ranks, gather, join, reduce_sum
from trainer.evaluate import Crops, Errors, choose_dtype, count_errors, evaluate, make_eval_loader, to_errors
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
            print_errors(results, averaged, is_ilsvrc2012=_is_ilsvrc2012(shards))
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
        outputs = _Outputs()
        for number, weights in enumerate(nets):
            assert weights.colors is not None  # `complete` saw to that
            loader = make_eval_loader(shards, weights.colors, weights.recipe, ranks, crops, options)
            model, dtype = make_net(weights, ranks.device), choose_dtype(weights.recipe.precision, ranks.device)
            is_kept = len(nets) > 1 or (with_answers and crops == "ten")
            keep = outputs.begin() if is_kept else None
            found[number][crops] = evaluate(model, loader, ranks, dtype, num_images, keep)
        if len(nets) > 1:
            average[crops] = to_errors(reduce_sum(outputs.count().to(ranks.device), ranks), num_images)
        if with_answers and crops == "ten":
            answers = _gather_answers(outputs, nets[0], ranks, num_images)
    return found, average or None, answers


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


class _Outputs:
    """The sum of several nets' softmax outputs for this rank's images, in the loaders' order, in host memory."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.labels: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._num_nets = 0

    def begin(self) -> "_Outputs":
        """For the next net's outputs."""
        self._num_nets, self._next = self._num_nets + 1, 0
        return self

    def __call__(self, log_outputs: Tensor, labels: Tensor, keys: Tensor) -> None:
        probabilities = log_outputs.exp().cpu()
        if self._num_nets == 1:
            self._sums.append(probabilities)
            self.labels.append(labels.cpu())
            self.keys += keys.tolist()
        else:
            self._sums[self._next] += probabilities
            self._next += 1

    def average(self) -> list[Tensor]:
        """Log of the mean outputs, a batch each."""
        return [(total / self._num_nets).log() for total in self._sums]

    def count(self) -> Tensor:
        """As count_errors."""
        zero = torch.zeros(4, dtype=torch.float64)
        return sum((count_errors(*pair) for pair in zip(self.average(), self.labels, strict=True)), zero)


def _gather_answers(outputs: _Outputs, net: Weights, ranks: Ranks, num_images: int) -> list[Answer]:
    best = [find_best(row, net.classes) for batch in outputs.average() for row in batch]
    labels = [int(label) for batch in outputs.labels for label in batch]
    mine = [Answer(*values) for values in zip(outputs.keys, labels, best, strict=True)]
    answers = sorted((answer for part in gather(mine, ranks) for answer in part), key=lambda answer: answer.key)
    if len({answer.key for answer in answers}) != num_images or len(answers) != num_images:
        raise UserError(f"predicted {len(answers)} images, expected {num_images}, each once; check the shards' indices")
    return answers if ranks.is_first else []


def _write_answers(path: Path, answers: list[Answer], shards: ShardSet) -> None:
    sources, classes = read_sources(shards), shards.manifest.classes
    rows = (
        (
            [f"{answer.key:0{KEY_DIGITS}d}", sources.get(answer.key, ""), answer.label, classes[answer.label].wnid],
            answer.best,
        )
        for answer in answers
    )
    write_csv(path, ["key", "source", "label", "label_wnid"], rows)


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


def _is_ilsvrc2012(shards: ShardSet) -> bool:
    """Whether these are the images that the paper's errors are of."""
    from pipeline.images.imagenet import load_ilsvrc2012

    wnids = [entry.wnid for entry in shards.manifest.classes]
    return wnids == list(load_ilsvrc2012()) and shards.num_samples("val") == 50_000
