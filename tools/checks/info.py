"""What is in a folder of shards, told without reading the images: manifest, records, indices, and a few labels."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.colors import COLOR_FILE, ColorStats
from pipeline.common.errors import UserError
from pipeline.common.files import read_json
from pipeline.manifest import CLS_DIGITS, ENDINGS, MANIFEST, SPLITS
from pipeline.shards import Index, ShardSet
from tools.checks.shards import open_index, peek_record
from tools.sharding.lock import find_holders
from tools.sharding.output import FAILURES_FILE, JOB_FILE
from tools.sharding.store import FolderStore

_Samples = tuple[NDArray[np.int64], Index]  # of a split, in stored order: the number of the shard of each; the index


def describe(root: str | Path) -> dict[str, Any]:
    """The facts about a finished or an unfinished folder of shards, as one JSON object.

    Raises UserError for a folder that holds neither, or whose manifest or indices are damaged.
    """
    root = Path(root)
    if not (root / MANIFEST).is_file() and (root / JOB_FILE).is_file():
        return {"root": str(root), "state": "unfinished", **_describe_unfinished(root)}
    shards = ShardSet.open(root)
    manifest = shards.manifest
    records = [record for shard in manifest.shards if (record := peek_record(root / shard.file))]
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
        "num_repaired": sum(len(record.repaired) for record in records),
        "num_records": len(records),
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
    samples = _read_indices(shards, split)
    counts = count_labels(shards, split, samples)
    per_class = sorted(counts.get(label, 0) for label in range(shards.num_classes))
    facts["mean_image_bytes"] = round(float(samples[1].sizes.mean()), 1)
    facts["classes"] = {
        "with_images": len(counts),
        "min_images": per_class[0],
        "median_images": median(per_class),
        "max_images": per_class[-1],
    }
    return facts


def count_labels(shards: ShardSet, split: str, samples: _Samples | None = None) -> dict[int, int]:
    """Images by label. Raises UserError for a label that is none, or beyond the class table.

    Training images are in canonical order sorted by class: those between two of one class need not be read. Validation
    images are sorted by name, and every label is read, in the order of the files.
    """
    owners, index = samples or _read_indices(shards, split)
    order = np.argsort(index.keys, kind="stable") if split == "train" else np.arange(len(index.keys))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("rb", buffering=0)) for path in shards.tars(split)]
        for file in files:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # five bytes are wanted, not what follows them

        def read_label(position: int) -> int:
            number, offset = owners[order[position]], int(index.labels[order[position]])
            data = os.pread(files[number].fileno(), CLS_DIGITS, offset)
            label = int(data) if data.isdigit() and len(data) == CLS_DIGITS else -1
            if not 0 <= label < shards.num_classes:
                raise UserError(
                    f"{shards.tars(split)[number]}: label {data!r} at byte {offset}, expected {CLS_DIGITS} digits, 0 "
                    f"to {shards.num_classes - 1}; find out more with `alexnet-prep verify --shards "
                    f"{quote(str(shards.root))}`"
                )
            return label

        if split == "train":
            return count_sorted(len(order), read_label)
        return dict(Counter(map(read_label, range(len(order)))))


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


def _read_indices(shards: ShardSet, split: str) -> _Samples:
    ending = ENDINGS.get(shards.manifest.encoding, "")
    indices = [open_index(shards.root / shard.file, shard, ending) for shard in shards.shards(split)]
    owners = np.repeat(np.arange(len(indices)), [len(index.keys) for index in indices])
    return owners, Index(*map(np.concatenate, zip(*indices, strict=True)))


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
    paths = [path for split in SPLITS for path in sorted(root.glob(f"{split}-*.json"))]
    records = [record for path in paths if (record := peek_record(path)) and record.job == job]
    return {
        "job": job,
        "holders": list_holders(root),
        "splits": {
            split: {
                "images": sum(record.samples for record in records if record.split == split),
                "shards": sum(1 for record in records if record.split == split),
            }
            for split in SPLITS
        },
        "num_failures": sum(len(record.failures) for record in records),
        "num_repaired": sum(len(record.repaired) for record in records),
        "remedy": "run the same `alexnet-prep shard` again to go on",
    }


def list_holders(root: Path) -> list[dict[str, Any]]:
    """Who holds the folder, or died holding it: the locks of jobs that write to it."""
    return [{"holder": each.words, "is_alive": each.is_alive} for each in find_holders(FolderStore(root))]


def _count_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.is_file() else 0
