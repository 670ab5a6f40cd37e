"""Shards of any number of samples that take hardly any room on the disk, for growth.py.

One real tar of up to 5,000 samples (flat 256x256 pictures) has as many names as it takes, by links, with an index each.
The checksums in the manifest are made up.
"""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SAMPLES_PER_SHARD, NUM_PICTURES, SIZE_PX = 5000, 16, 256


def make_shards(folder: Path, num_samples: int, num_classes: int, num_val: int) -> None:
    """A folder of shards, complete but for the truth of its checksums: nothing here reads the data to check them."""
    from pipeline.colors import ColorStats
    from pipeline.common.files import write_json
    from pipeline.manifest import MANIFEST, SCHEMA, ClassEntry, Manifest, Shard
    from pipeline.shards import ShardSet

    folder.mkdir(parents=True)
    shards = []
    for split, total in (("train", num_samples), ("val", num_val)):
        whole, rest = divmod(total, SAMPLES_PER_SHARD)
        real: dict[int, Path] = {}
        for number, size in enumerate([SAMPLES_PER_SHARD] * whole + [rest] * bool(rest)):
            tar = folder / f"{split}-{number:06d}.tar"
            if size in real:
                for ending in (".tar", ".idx"):
                    os.link(real[size].with_suffix(ending), tar.with_suffix(ending))
            else:
                real[size] = write_tar(tar, size, num_classes)
            shards.append(Shard(tar.name, split, size, tar.stat().st_size, f"{number:064x}"))
    manifest = Manifest(
        schema=SCHEMA,
        created_by="benchmarks/growth.py",
        layout="folder",
        seed=0,
        size_px=SIZE_PX,
        encoding="jpeg",
        quality=90,
        samples_per_shard=SAMPLES_PER_SHARD,
        classes=tuple(ClassEntry(i, f"n{i:08d}", f"class {i}") for i in range(num_classes)),
        shards=tuple(shards),
        totals={"train": num_samples, "val": num_val},
        job="0" * 64,
    )
    write_json(folder / MANIFEST, manifest.to_json())
    image = np.full((SIZE_PX, SIZE_PX, 3), 127.0, np.float32)
    fingerprint = ShardSet.open(folder).fingerprint
    ColorStats.from_moments(np.full(3, 127.0), np.eye(3) * 4000, image, 1 << 20, fingerprint).save(folder)


def write_tar(path: Path, num_samples: int, num_classes: int) -> Path:
    pictures = []
    for grey in np.linspace(20, 235, NUM_PICTURES).astype(np.uint8):
        file = io.BytesIO()
        Image.new("RGB", (SIZE_PX, SIZE_PX), (int(grey),) * 3).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    rows = [f"v1.2 {num_samples}"]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(num_samples):
            row = []
            label = b"%05d" % (number % num_classes)
            for ending, data in (("jpg", pictures[number % NUM_PICTURES]), ("cls", label)):
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(data)
                row.append(f"{ending} {tar.offset + tarfile.BLOCKSIZE} {len(data)} {member.name}")
                tar.addfile(member, io.BytesIO(data))
            rows.append(" ".join(row))
    path.with_suffix(".idx").write_text("\n".join([*rows, ""]), encoding="ascii")
    return path
