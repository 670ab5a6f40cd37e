"""What the contestants of feed.py are fed: the same images as shards, raw shards and plain files, with their colours.

It is kept in the scratch folder, and made again only for another source or number.
"""

import argparse
import io
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from harness.source_images import lay_out, list_photographs, make_synthetic
from PIL import Image

SAMPLES_PER_SHARD = 128
COPIES = 64  # of the set in the list of shards (links): so that an epoch's end comes as seldom as ImageNet's


def prepare_data(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Shards of 256x256 q90 JPEGs and of the same pixels raw, colours, samples as plain files; kept in `root`."""
    from pipeline.shards import ShardSet
    from tools.sharding.make import make_shards
    from tools.sources.source import open_source

    mark = root / "data.json"
    wanted = {"source": options.source, "images": options.images}
    if mark.is_file():
        found = json.loads(mark.read_text(encoding="utf-8"))
        if found["wanted"] == wanted:
            return dict(found)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    source = Path(options.source) if options.source else make_synthetic(root / "synth", options.images)
    distinct, _ = list_photographs(source)
    if not distinct:
        raise SystemExit(f"error: {source}: no RGB or grey JPEG at any depth, expected at least one")
    lay_out(distinct, root / "tree", options.images, num_classes=len(distinct))
    make_shards(
        open_source(root / "tree"), root / "once", num_workers=options.workers, samples_per_shard=SAMPLES_PER_SHARD
    )
    once = ShardSet.open(root / "once")
    mean_bytes = write_samples(once, root / "samples", root / "stored")
    shards = {"jpeg": str(root / "jpeg"), "raw": str(root / "raw")}
    make_shards(
        open_source(root / "stored"),
        root / "once-raw",
        num_workers=options.workers,
        samples_per_shard=SAMPLES_PER_SHARD,
        encoding="raw",
    )
    repeat_shards(once, root / "jpeg")
    repeat_shards(ShardSet.open(root / "once-raw"), root / "raw")
    colors = compute_colors(once, [Path(folder) for folder in shards.values()], options.workers)
    data = {
        "wanted": wanted,
        "shards": shards,
        "num_distinct": min(len(distinct), options.images),
        "mean_bytes": mean_bytes,
        "mean": colors.mean.tolist(),
        "basis": colors.lighting_basis("paper").tolist(),
    }
    mark.write_text(json.dumps(data), encoding="utf-8")
    return data


def write_samples(shards: Any, folder: Path, tree: Path) -> int:
    """encoded.bin, ends.npy, labels.npy, raw.bin (decoded by Pillow) of all samples as stored. Their mean bytes.

    In `tree` the same JPEGs as files: resized to the size they have, that is not at all, they become the raw shards.
    """
    folder.mkdir()
    ends, labels = [], []
    with (folder / "encoded.bin").open("wb") as encoded, (folder / "raw.bin").open("wb") as raw:
        for path in shards.tars("train"):
            with tarfile.open(path) as tar:
                members = tar.getmembers()  # image, label, image, label
                for image, label in zip(members[::2], members[1::2], strict=True):
                    data, digits = (read_member(tar, member) for member in (image, label))
                    encoded.write(data)
                    raw.write(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes())
                    ends.append(encoded.tell())
                    labels.append(int(digits))
                    file = tree / "train" / f"class{labels[-1]:05d}" / f"{len(labels):09d}.jpg"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(data)
    np.save(folder / "ends.npy", np.array(ends, np.int64))
    np.save(folder / "labels.npy", np.array(labels, np.int64))
    return ends[-1] // len(ends)


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def repeat_shards(once: Any, out: Path) -> None:
    """The same shards COPIES times, as links: reading them costs what it costs, and an epoch is long."""
    from pipeline.common.files import write_json
    from pipeline.manifest import MANIFEST

    out.mkdir()
    named = []
    for number in range(COPIES * len(once.shards("train"))):
        shard = once.shards("train")[number % len(once.shards("train"))]
        file = f"train-{number:06d}.tar"
        for ending in (".tar", ".idx"):
            os.link((once.root / shard.file).with_suffix(ending), (out / file).with_suffix(ending))
        named.append(replace(shard, file=file))
    totals = {"train": COPIES * once.num_samples("train"), "val": 0}
    write_json(out / MANIFEST, replace(once.manifest, shards=tuple(named), totals=totals).to_json())


def compute_colors(once: Any, folders: Sequence[Path], num_threads: int) -> Any:
    """The colours of one copy, saved in each folder of shards under that folder's own fingerprint."""
    from pipeline.common.console import Progress
    from pipeline.shards import ShardSet
    from tools.pca import compute

    with Progress("pca", once.num_samples("train"), "images") as progress:
        colors = compute(once, device="cpu", num_threads=num_threads, progress=progress)
    for folder in folders:
        replace(colors, shards_fingerprint=ShardSet.open(folder).fingerprint).save(folder)
    return colors
