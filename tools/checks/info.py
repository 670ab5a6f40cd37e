"""What is in a folder of shards, told without reading it: manifest, records, indices, and a few labels.

The decision that shaped it: the canonical order sorts training images by class, so the label of an image need not be
read if those before and behind it have the same one. Images per class cost some reads per class, not one per image;
the validation set, in the order of its names, is read label by label, at the offsets of its index. Left out: whether
any of it is true (verify.py).
"""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.colors import COLOR_FILE, ColorStats
from pipeline.common.errors import UserError
from pipeline.common.files import read_json
from pipeline.manifest import CLS_DIGITS, ENDINGS, MANIFEST, SPLITS, Shard, index_header
from pipeline.shards import ShardSet
from tools.sharding.lock import find_holders
from tools.sharding.output import FAILURES_FILE, JOB_FILE
from tools.sharding.store import FolderStore

_ROW_WORDS = 8  # of an index: ext offset size name, of the image and of the label


class _Split(NamedTuple):
    """Where the labels of a split are: by position in canonical order, the number of the shard and the offset in it;
    and the size of each image, bytes."""

    keys: NDArray[np.int64]
    shards: NDArray[np.int64]
    offsets: NDArray[np.int64]
    image_bytes: NDArray[np.int64]


def describe(root: str | Path) -> dict[str, Any]:
    """The facts about a finished or an unfinished folder of shards, as one JSON object.

    Raises UserError for a folder that holds neither, or whose manifest or indices are damaged.
    """
    root = Path(root)
    if not (root / MANIFEST).is_file() and (root / JOB_FILE).is_file():
        return {"root": str(root), "state": "unfinished", **_describe_unfinished(root)}
    shards = ShardSet.open(root)
    manifest = shards.manifest
    records = {shard.file: _read_record(root / shard.file) for shard in manifest.shards}
    return {
        "root": str(root),
        "state": "finished",
        "created_by": manifest.created_by,
        "layout": manifest.layout,
        "encoding": manifest.encoding,
        "quality": manifest.quality,
        "size_px": manifest.size_px,
        "seed": manifest.seed,
        "samples_per_shard": manifest.samples_per_shard,
        "num_classes": shards.num_classes,
        "splits": {split: _describe_split(shards, split) for split in SPLITS},
        "num_failures": _count_lines(root / FAILURES_FILE),
        "num_repaired": sum(_count(record.get("repaired")) for record in records.values()),
        "num_records": sum(1 for record in records.values() if record),
        "fingerprint": shards.fingerprint,
        "job": manifest.job,
        "colors": _describe_colors(shards),
        "holders": list_holders(root),
    }


def _describe_split(shards: ShardSet, split: str) -> dict[str, Any]:
    num_images, files = shards.num_samples(split), shards.shards(split)
    facts: dict[str, Any] = {
        "images": num_images,
        "shards": len(files),
        "bytes": sum(shard.bytes for shard in files),
        "mean_image_bytes": None,
        "classes": None,
    }
    if not num_images:
        return facts
    where = _read_indices(shards, split)
    counts = count_labels(shards, split, where)
    per_class = sorted(counts.get(label, 0) for label in range(shards.num_classes))
    facts["mean_image_bytes"] = round(float(where.image_bytes.mean()), 1)
    facts["classes"] = {
        "with_images": len(counts),
        "min_images": per_class[0],
        "median_images": median(per_class),
        "max_images": per_class[-1],
    }
    return facts


def count_labels(shards: ShardSet, split: str, where: _Split | None = None) -> dict[int, int]:
    """Images by label. Raises UserError for a label that is none, or beyond the class table."""
    where = where or _read_indices(shards, split)
    order = np.argsort(where.keys, kind="stable")
    if split != "train":  # the canonical order is by name: every label is read, in the order of the files
        order = np.arange(len(order))
    files = [path.open("rb", buffering=0) for path in shards.tars(split)]
    try:
        for file in files:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # five bytes are wanted, not what follows them

        def read_label(position: int) -> int:
            at = order[position]
            number, offset = where.shards[at], int(where.offsets[at])
            data = os.pread(files[number].fileno(), CLS_DIGITS, offset)
            label = int(data) if data.isdigit() and len(data) == CLS_DIGITS else -1
            if not 0 <= label < shards.num_classes:
                raise UserError(
                    f"{shards.tars(split)[number]}: label {data!r} at byte {offset}, expected {CLS_DIGITS} digits, 0 "
                    f"to {shards.num_classes - 1}; find out more with `alexnet-prep verify --shards {shards.root}`"
                )
            return label

        if split == "train":
            return count_sorted(len(order), read_label)
        return dict(Counter(map(read_label, range(len(order)))))
    finally:
        for file in files:
            file.close()


def count_sorted(num_values: int, read: Callable[[int], int]) -> dict[int, int]:
    """How often each value occurs in a sorted sequence `read(0) ... read(num_values - 1)`, reading few of them."""
    counts: Counter[int] = Counter()
    spans = [(0, num_values - 1, read(0), read(num_values - 1))] if num_values else []
    while spans:
        first, last, low, high = spans.pop()
        if low == high:
            counts[low] += last - first + 1
            continue
        if last == first + 1:
            counts.update((low, high))
            continue
        middle = (first + last) // 2
        value, following = read(middle), read(middle + 1)
        spans += [(first, middle, low, value), (middle + 1, last, following, high)]
    return dict(counts)


def _read_indices(shards: ShardSet, split: str) -> _Split:
    ending = ENDINGS.get(shards.manifest.encoding, "")
    parts: list[tuple[list[int], list[int], list[int]]] = []
    files = shards.shards(split)
    for shard, path in zip(files, shards.indices(split), strict=True):
        parts.append(_read_index(shard, path, ending))
    keys, offsets, sizes = (np.array([n for part in parts for n in part[column]], np.int64) for column in range(3))
    return _Split(keys, np.repeat(np.arange(len(files)), [shard.samples for shard in files]), offsets, sizes)


def _read_index(shard: Shard, path: Path, ending: str) -> tuple[list[int], list[int], list[int]]:
    """Keys, offsets of labels, sizes of images, in stored order."""
    header, _, rest = path.read_bytes().partition(b"\n")
    words = rest.split()
    try:
        if header.decode() != index_header(shard.samples) or len(words) != _ROW_WORDS * shard.samples:
            raise ValueError(f"{len(words)} words, expected {_ROW_WORDS * shard.samples}")
        if {*words[0::_ROW_WORDS], *words[4::_ROW_WORDS]} - {ending.encode(), b"cls"}:
            raise ValueError(f"other endings than {ending} and cls")
        keys = [int(name.partition(b".")[0]) for name in words[3::_ROW_WORDS]]
        return keys, list(map(int, words[5::_ROW_WORDS])), list(map(int, words[2::_ROW_WORDS]))
    except ValueError as error:
        raise UserError(
            f"{path}: damaged index ({error}); find out more with `alexnet-prep verify --shards {path.parent}`"
        ) from error


def _describe_colors(shards: ShardSet) -> dict[str, Any]:
    remedy = f"alexnet-prep pca --shards {quote(str(shards.root))}"
    if not (shards.root / COLOR_FILE).is_file():
        return {"state": "missing", "remedy": remedy}
    try:
        stats = ColorStats.load(shards.root, shards.fingerprint)
    except UserError as error:
        return {"state": "unusable", "remedy": remedy, "reason": str(error)}
    return {"state": "matching", "mean": stats.mean.tolist(), "std": stats.std.tolist()}


def _describe_unfinished(root: Path) -> dict[str, Any]:
    """How far the job of a folder without a manifest has come: what its records say."""
    mark = read_json(root / JOB_FILE)
    job = mark.get("job") if isinstance(mark, dict) else None
    names = [path for split in SPLITS for path in sorted(root.glob(f"{split}-*.json"))]
    records = [record for path in names if (record := _read_record(path)).get("job") == job]
    return {
        "job": job,
        "holders": list_holders(root),
        "splits": {
            split: {
                "images": sum(_count(record.get("samples")) for record in records if record.get("split") == split),
                "shards": sum(1 for record in records if record.get("split") == split),
            }
            for split in SPLITS
        },
        "num_failures": sum(_count(record.get("failures")) for record in records),
        "num_repaired": sum(_count(record.get("repaired")) for record in records),
        "remedy": "run the same `alexnet-prep shard` again to go on",
    }


def list_holders(root: Path) -> list[dict[str, Any]]:
    """Who holds the folder, or died holding it: the locks of jobs that write to it."""
    return [{"holder": each.words, "is_alive": each.is_alive} for each in find_holders(FolderStore(root))]


def _read_record(path: Path) -> dict[str, Any]:
    """A unit's record, {} if it is missing or damaged: that is for verify.py to say."""
    try:
        raw = read_json(path.with_suffix(".json"))
    except UserError:
        return {}
    return raw if isinstance(raw, dict) else {}


def _count(value: Any) -> int:
    """A number of things, told as such or as a list of them."""
    return len(value) if isinstance(value, list | dict) else value if isinstance(value, int) else 0


def _count_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.is_file() else 0
