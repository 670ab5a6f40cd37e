"""Which classes a net gets wrong, and what it takes them for."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from trainer.nets.tables import TOP

_COLUMNS = ("label", "label_wnid", *(f"wnid_{place}" for place in range(1, TOP + 1)))
_REMEDY = "with `alexnet-eval RUN --predictions`"


@dataclass(frozen=True, eq=False)
class Predictions:
    """Of N images: classes (N,); the likeliest five (N, 5), best first, -1 where there are fewer; what they are of."""

    labels: NDArray[np.int64]
    best: NDArray[np.int64]
    crops: str  # "centre" or "ten"
    source: str

    @property
    def errors(self) -> tuple[float, float]:
        """Top-1 and top-5 error, %."""
        right = self.best == self.labels[:, None]
        return 100 * float(1 - right[:, 0].mean()), 100 * float(1 - right.any(axis=1).mean())


@dataclass(frozen=True)
class ClassErrors:
    """A class: its images, errors in %, and what it is taken for instead: (class, images), commonest first."""

    index: int
    num_images: int
    top1_error: float
    top5_error: float
    instead: tuple[tuple[int, int], ...]


def list_classes(predictions: Predictions) -> list[ClassErrors]:
    """Every class that has images, the worst first: by top-1 error, then top-5 error, then index."""
    found = []
    for index in np.unique(predictions.labels).tolist():
        best = predictions.best[predictions.labels == index]
        wrong1, wrong5 = best[:, 0] != index, ~(best == index).any(axis=1)
        counts = Counter(best[wrong1, 0].tolist())
        instead = tuple(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
        found.append(ClassErrors(index, len(best), 100 * wrong1.mean(), 100 * wrong5.mean(), instead))
    return sorted(found, key=lambda one: (-one.top1_error, -one.top5_error, one.index))


def choose_worst(classes: Sequence[ClassErrors], most: int) -> list[int]:
    """At most `most` classes for a table of who is taken for whom: the worst, each with what it is mostly taken for."""
    pairs = ((one.index, *(other for other, _ in one.instead[:1])) for one in classes)
    return list(dict.fromkeys(index for pair in pairs for index in pair))[:most]


def count_pairs(predictions: Predictions, shown: Sequence[int]) -> NDArray[np.int64]:
    """(K, K + 1): images of the k-th class shown that are taken for each of them; last column: for any other."""
    place = {index: position for position, index in enumerate(shown)}
    counts = np.zeros((len(shown), len(shown) + 1), np.int64)
    for label, guess in zip(predictions.labels.tolist(), predictions.best[:, 0].tolist(), strict=True):
        if label in place:
            counts[place[label], place.get(guess, len(shown))] += 1
    return counts


def read_predictions(path: Path, wnids: Sequence[str]) -> Predictions:
    """A file of `alexnet-eval --predictions` by a net of these classes. Raises UserError naming what does not fit."""
    index = {wnid: position for position, wnid in enumerate(wnids)} | {"": -1}
    rows = []
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            lines = csv.DictReader(file, strict=True)
            missing = [name for name in _COLUMNS if name not in (lines.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{path}: no column {', '.join(missing)}, expected a file of `alexnet-eval RUN --predictions FILE`"
                )
            for line in lines:
                named = [line[column] or "" for column in _COLUMNS[1:]]  # the label, then the likeliest classes
                unknown = [wnid for wnid in named if wnid not in index]
                if unknown or "" in named[:2]:
                    raise UserError(
                        f"{path}: line {lines.line_num}: class {(unknown or [''])[0]!r:.40} is none of the net's "
                        f"{len(wnids)}; name the predictions of this run"
                    )
                rows.append([index[wnid] for wnid in named])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); write it {_REMEDY}") from error
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file ({error}); write it anew {_REMEDY}") from error
    if not rows:
        raise UserError(f"{path}: no predictions; write it {_REMEDY}")
    table = np.array(rows)
    return Predictions(table[:, 0], table[:, 1:], "ten", path.name)
