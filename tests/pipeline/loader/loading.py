"""What the tests of loaders do: take batches, write them down, and turn JPEG shards into raw ones."""

import hashlib
import io
import itertools
import json
import shutil
import tarfile
from pathlib import Path

import torch

from pipeline.manifest import MANIFEST, index_header
from pipeline.operators import load_operators
from pipeline.shards import ShardSet
from tests import oracle

NUM_TRAIN, NUM_VAL = 64, 24  # of the fixture `ready_shards`


def name_keys(loader) -> list[str]:
    """The keys of the latest batch, as members of the tars are named."""
    return [f"{key:09d}" for key in loader.keys.tolist()]


def read_keys(loader) -> list[list[str]]:
    """The keys of the batches of one epoch."""
    return [name_keys(loader) for _ in loader]


def flatten(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


def to_bytes(images) -> bytes:
    """The values in the order of the shape, whatever the layout in memory; NumPy knows no bfloat16."""
    return images.contiguous().view(torch.uint8).numpy().tobytes()


def record(loader, num_batches=None) -> list[tuple]:
    """The next batches, as bytes and draws that can be compared."""
    return [
        (
            to_bytes(batch.images),
            batch.labels.tolist(),
            *(d.tolist() for d in loader.draws),
        )
        for batch in itertools.islice(loader, num_batches)
    ]


def named(words: str) -> str:
    """What the error of a damaged sample says: our operators name it; without them its shard is, by the SHA-256."""
    return words if load_operators() else "SHA-256 is [0-9a-f]{12}, expected"


def list_images(batches) -> list[tuple[bytes, int]]:
    return [
        (to_bytes(image), label)
        for batch in batches
        for image, label in zip(batch.images, batch.labels.tolist(), strict=True)
    ]


def advance(loader, num_batches) -> None:
    """Take batches across epochs; a whole number of epochs ends at the start of the next one."""
    while num_batches >= len(loader):
        num_batches -= len(list(loader))
    for _ in itertools.islice(loader, num_batches):
        pass


def make_raw(source: Path, out: Path) -> Path:
    """A copy of a folder of JPEG shards with the decoded pixels in their place, as `--encoding raw` lays them out."""
    shutil.copytree(source, out)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["encoding"] = "raw"
    for shard in manifest["shards"]:
        path, rows = out / shard["file"], []
        samples = oracle.read_samples([path])
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, (pixels, label) in samples.items():
                row = []
                for ending, data in (("rgb", pixels.tobytes()), ("cls", b"%05d" % label)):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    row += [ending, tar.offset + tarfile.BLOCKSIZE, len(data), member.name]
                    tar.addfile(member, io.BytesIO(data))
                rows.append(" ".join(map(str, row)))
        path.with_suffix(".idx").write_text("\n".join([index_header(len(rows)), *rows]) + "\n")
        data = path.read_bytes()
        shard["bytes"], shard["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (out / MANIFEST).write_text(json.dumps(manifest))
    colors = json.loads((out / "color.json").read_text())
    colors["shards_fingerprint"] = ShardSet.open(out).fingerprint
    (out / "color.json").write_text(json.dumps(colors))
    return out
