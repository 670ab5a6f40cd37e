"""Every reader of bytes from outside as a function of bytes, which may do one of two things: read them or refuse them.

A target is what the commands call, and lets nothing through but the reader's own refusal, in one line. Whatever else
comes out (another exception, a crash, no end) is a finding.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.colors import COLOR_FILE, MEAN_IMAGE_FILE, ColorStats
from pipeline.common.errors import UserError
from pipeline.manifest import MANIFEST
from pipeline.shards import ShardSet, check_index, check_places, read_index

Read = Callable[[bytes], bool]  # whether the bytes were read; False: refused
NUM_READ_BACK = 4  # entries of a source that are read as well as listed


class Target(NamedTuple):
    """A reader, and sound files of its kind to begin from."""

    read: Read
    seeds: list[bytes]


def make_targets(shards: Path, sources: dict[str, Path], weights: Path, folder: Path) -> dict[str, Target]:
    """Targets by name. `shards`: a set with colours; `sources`: by layout; `weights`: a checkpoint; `folder`: to write
    in."""

    def on_file(name: str, read: Callable[[ShardSet], object]) -> Target:
        """Of a set of its own, in which one file is replaced."""
        copy = Path(shutil.copytree(shards, folder / f"of-{name}"))
        opened = ShardSet.open(copy)
        return Target(_on_file(copy / name, lambda: read(opened)), [(copy / name).read_bytes()])

    tar = ShardSet.open(shards).tars("train")[0]
    return {
        "manifest": on_file(MANIFEST, lambda opened: ShardSet.open(opened.root)),
        "index": on_file(tar.with_suffix(".idx").name, _read_index),
        "colors": on_file(COLOR_FILE, lambda opened: ColorStats.load(opened.root, opened.fingerprint)),
        "mean_image": on_file(MEAN_IMAGE_FILE, lambda opened: ColorStats.load(opened.root, opened.fingerprint)),
        "shard": Target(lambda data: _check_shard(folder / "shard.tar", data), [tar.read_bytes()]),
        "webdataset": _source(folder, sources["webdataset"], "webdataset", "set-train-0000.tar"),
        "official": _source(folder, sources["official"], "official", "ILSVRC2012_img_train.tar"),
        "devkit": _source(folder, sources["official"], "official", "ILSVRC2012_devkit_t12.tar.gz"),
        "kaggle": _source(folder, sources["kaggle"], "kaggle", "LOC_val_solution.csv"),
        "parquet": _source(folder, sources["parquet"], "parquet", "data/train-00000-of-00002.parquet"),
        "checkpoint": Target(lambda data: _read_weights(folder / "net.pt", data), [weights.read_bytes()]),
    }


def _on_file(path: Path, read: Callable[[], object]) -> Read:
    def run(data: bytes) -> bool:
        path.write_bytes(data)
        return refuses_in_one_line(read)

    return run


def refuses_in_one_line(read: Callable[[], object]) -> bool:
    """Whether `read` came to an end; a UserError must be one line, of nothing that steers a terminal."""
    try:
        read()
    except UserError as error:
        text = str(error)
        assert text and len(text) < 4000 and not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in text), repr(text)
        return False
    return True


def _read_index(shards: ShardSet) -> None:
    shard, path = shards.shards("train")[0], shards.indices("train")[0]
    check_index(path, shard, "jpg")
    check_places(path, shard, "jpg")
    read_index(path, shard, "jpg")


def _check_shard(path: Path, data: bytes) -> bool:
    """`alexnet-prep verify` has no refusal: whatever is in a tar becomes a list of problems."""
    from tools.checks.shards import Findings, Samples, TarReader

    path.write_bytes(data)
    found = Findings()
    with path.open("rb") as file:
        reader = TarReader(file)
        samples = Samples(found, path.name, ending="jpg", num_classes=4, decode=True)
        for member in reader.members(lambda what, expected: found.add("structure", path.name, what, expected)):
            samples.add(member)
        samples.close()
        assert reader.offset == len(data) and (reader.is_whole or found.num_problems)
    return not found.num_problems


def _source(folder: Path, root: Path, layout: str, name: str) -> Target:
    """A source in which one file is replaced. Listed, and some of it read: an image that cannot be is an OSError."""
    import importlib

    module = importlib.import_module(f"tools.sources.{layout}")
    copy = Path(shutil.copytree(root, folder / f"{layout}-{Path(name).stem}"))

    def read() -> None:
        found = module.find(copy)
        if found is None:
            raise UserError(f"{copy}: is no {layout}")
        listing = module.scan(found)
        for entry in [*listing.train[:NUM_READ_BACK], *listing.val[:NUM_READ_BACK]]:
            try:
                assert isinstance(listing.read(entry), bytes)
            except OSError:
                continue

    seeds = [(copy / name).read_bytes()]
    return Target(_on_file(copy / name, read), seeds)


def _read_weights(path: Path, data: bytes) -> bool:
    from trainer import checkpoint
    from trainer.nets.formats import read_tensors

    path.write_bytes(data)
    refuses_in_one_line(lambda: checkpoint.load(path))
    return refuses_in_one_line(lambda: read_tensors(path))


def read_image(data: bytes) -> bool:
    """As sharding and prediction read a picture: pixels, or a reason for the list of failures."""
    from pipeline.images.decode import BadImage
    from pipeline.images.resize import read_square

    try:
        return read_square(data).pixels.shape == (256, 256, 3)
    except BadImage as error:
        assert error.reason
        return False
