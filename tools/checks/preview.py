"""Some samples as they are stored and as the network sees them: pixels and draws, for the contact sheet.

The decision that shaped it: what is shown is what training does. The chosen samples are copied, byte by byte, into a
set of shards of their own, and the training loader runs over that: the same graph, crop, flip and colour noise, each
epoch another draw of every sample. Left out: what the sheet looks like (contactsheet.py).
"""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.loader import TrainLoader, read_pixels
from pipeline.manifest import CLS_DIGITS, KEY_DIGITS, Shard, index_header
from pipeline.options import LoaderOptions
from pipeline.shards import ShardSet

BLOCK_BYTES = 512
NUM_DRAWS = 4
_CROP_PX = 224
_ROW_WORDS = 8  # of an index: ext offset size name, of the image and of the label


class View(NamedTuple):
    """One draw of a sample: crop offset (y, x), whether mirrored, colour shift (3,) in grey levels, and what came of
    it: float32 (224, 224, 3), the mean added back, so that it is stored pixel + shift."""

    offset: tuple[int, int]
    flip: bool
    shift: NDArray[np.float32]
    pixels: NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """A stored image, uint8 (256, 256, 3), with its key, class and views."""

    key: str
    label: int
    class_name: str
    stored: NDArray[np.uint8]
    views: tuple[View, ...]


class _Span(NamedTuple):
    """Where a sample lies in a tar, headers and padding included, and its row of the index."""

    first: int
    last: int
    words: tuple[str, ...]

    def row(self, moved: int) -> str:
        words = list(self.words)
        words[1], words[5] = str(int(words[1]) + moved), str(int(words[5]) + moved)
        return " ".join(words)


def draw_samples(
    shards: ShardSet,
    colors: ColorStats,
    *,
    num_samples: int = 8,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
    split: str = "train",
) -> list[Sample]:
    """`num_samples` images of `split`, chosen by `seed`, each with `num_draws` views as training with that seed draws.

    Raises UserError if the split has fewer images, or if an index does not fit its tar.
    """
    num_held = shards.num_samples(split)
    if num_samples > num_held:
        asked = f"{num_held} {split} images, {num_samples} asked for"
        raise UserError(f"{shards.root}: {asked}; set --samples lower, or another --split")
    # The raw stream of a bit generator never changes between versions of NumPy.
    chosen = np.sort(np.argsort(np.random.PCG64(seed).random_raw(num_held), kind="stable")[:num_samples])
    with tempfile.TemporaryDirectory(prefix="alexnet-preview-") as folder:
        copied = copy_samples(shards, split, chosen.tolist(), Path(folder))
        rows = copied.indices("train")[0].read_text(encoding="ascii").splitlines()[1:]
        keys = [row.split()[3].partition(".")[0] for row in rows]
        stored = [(image, int(label)) for batch in read_pixels(copied, num_threads=1)
                  for image, label in zip(batch.images.numpy().copy(), batch.labels, strict=True)]  # fmt: skip
        views: dict[str, list[View]] = {key: [] for key in keys}
        for key, view in _draw_views(copied, colors, num_draws, seed):
            views[key].append(view)
    names = [entry.name for entry in shards.manifest.classes]
    return [
        Sample(key, label, names[label], image, tuple(views[key]))
        for key, (image, label) in zip(keys, stored, strict=True)
    ]


def _draw_views(shards: ShardSet, colors: ColorStats, num_draws: int, seed: int) -> Iterator[tuple[str, View]]:
    num_samples = shards.num_samples("train")
    loader = TrainLoader(shards, colors, options=LoaderOptions(num_threads=1), global_batch_size=num_samples, seed=seed)
    edge = (colors.mean_image.shape[0] - _CROP_PX) // 2
    mean = colors.mean_image[edge : edge + _CROP_PX, edge : edge + _CROP_PX]
    for _ in range(num_draws):
        for images, _ in loader:
            draws = loader.draws
            assert draws is not None  # a batch was given
            for number, key in enumerate(draws.keys.tolist()):
                pixels = images[number].numpy().transpose(1, 2, 0) + mean
                y, x = draws.offset[number].tolist()
                yield (
                    f"{key:0{KEY_DIGITS}d}",
                    View((y, x), bool(draws.flip[number]), draws.shift[number].numpy().copy(), pixels),
                )


def copy_samples(shards: ShardSet, split: str, positions: list[int], folder: Path) -> ShardSet:
    """A set in `folder` whose one training shard holds the samples at `positions` (in stored order) of `split`.

    Only these samples and the indices of their shards are read.
    """
    tar, rows, copied = folder / "train-000000.tar", [], 0
    chosen, first = [], 0
    for shard in shards.shards(split):
        here = [position - first for position in sorted(positions) if first <= position < first + shard.samples]
        first += shard.samples
        if here:
            chosen.append((shard, here))
    if shards.remote:
        shards.keep_only(split, [shard for shard, _ in chosen]).fetch(split)
    with tar.open("wb") as out:
        for shard, here in chosen:
            path = shards.root / shard.file
            with path.open("rb") as file:
                for span in _find_spans(path, here):
                    file.seek(span.first)
                    out.write(file.read(span.last - span.first))
                    rows.append(span.row(copied - span.first))
                    copied += span.last - span.first
        out.write(bytes(2 * BLOCK_BYTES))
    tar.with_suffix(".idx").write_text("\n".join([index_header(len(rows)), *rows, ""]), encoding="ascii")
    data = tar.read_bytes()
    one = Shard(tar.name, "train", len(rows), len(data), hashlib.sha256(data).hexdigest())
    return ShardSet(folder, replace(shards.manifest, shards=(one,), totals={"train": len(rows), "val": 0}))


def _find_spans(tar: Path, numbers: list[int]) -> list[_Span]:
    """Where the samples of these rows are. Raises UserError for an index that does not fit."""
    path = tar.with_suffix(".idx")
    lines = path.read_bytes().decode("ascii", "backslashreplace").splitlines()[1:]
    spans = []
    for number in numbers:
        words = tuple(lines[number].split()) if number < len(lines) else ()
        try:
            image, size, label = (int(words[position]) for position in (1, 2, 5))
            end = image + -(-size // BLOCK_BYTES) * BLOCK_BYTES
            if len(words) != _ROW_WORDS or label != end + BLOCK_BYTES or int(words[6]) != CLS_DIGITS:
                raise ValueError("image and label are not side by side")
            if label + BLOCK_BYTES > tar.stat().st_size:
                raise ValueError("beyond the end of the tar")
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{path}: row {number + 1} does not fit its tar ({error}); find out more with "
                f"`alexnet-prep verify --shards {tar.parent}`"
            ) from error
        spans.append(_Span(image - BLOCK_BYTES, label + BLOCK_BYTES, words))
    return spans
