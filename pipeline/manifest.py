"""The contract on disk: what the manifest of a folder of shards says, and the constants of the files beside it.

The manifest is written last, atomically: a folder without one is unfinished. Standard library only.
"""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pipeline.common.errors import UserError

SCHEMA = 1
IMAGE_SIZE_PX = 256
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
ENDINGS = {"jpeg": "jpg", "raw": "rgb"}  # of a sample's image, by the manifest's encoding
CLS_DIGITS = 5  # a label is stored as five ASCII digits: int() reads it, DALI sees a fixed width
KEY_DIGITS = 9
_SHARD_NAME = re.compile(r"(train|val)-\d{6}\.tar")
Record = TypeVar("Record")


@dataclass(frozen=True)
class Shard:
    """One tar: its name inside the folder, its split, its number of samples, its size in bytes, its SHA-256 (hex)."""

    file: str
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ClassEntry:
    """One class: its index (rank of the wnid in sorted order), its wnid (or folder name), a name for people."""

    index: int
    wnid: str
    name: str


@dataclass(frozen=True)
class Manifest:
    """What was made, from what, and how. `job` identifies the work (sources and options), not its output."""

    schema: int
    created_by: str
    layout: str
    seed: int
    size_px: int
    encoding: str
    quality: int
    samples_per_shard: int
    classes: tuple[ClassEntry, ...]
    shards: tuple[Shard, ...]
    totals: dict[str, int]
    job: str

    @classmethod
    def parse(cls, raw: Any, where: Path | str) -> "Manifest":
        """A checked manifest from decoded JSON. Raises UserError, naming `where`, for anything that is not one."""
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if schema != SCHEMA:
            raise UserError(
                f"{where}: schema is {schema!r}, expected {SCHEMA}; make the shards again with `alexnet-prep shard`"
            )
        try:
            classes = tuple(_read_record(ClassEntry, entry) for entry in raw["classes"])
            shards = tuple(_read_record(Shard, entry) for entry in raw["shards"])
            totals = {split: _check("totals", int, raw["totals"][split]) for split in SPLITS}
            manifest = _read_record(cls, {**raw, "classes": classes, "shards": shards, "totals": totals})
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise UserError(
                f"{where}: not a manifest ({type(error).__name__}: {error}); "
                "make the shards again with `alexnet-prep shard`"
            ) from error
        problem = manifest._inconsistency()
        if problem:
            raise UserError(f"{where}: {problem}; make the shards again with `alexnet-prep shard`")
        return manifest

    def _inconsistency(self) -> str | None:
        for shard in self.shards:
            if not _SHARD_NAME.fullmatch(shard.file):  # a name from a file is never used as a path unchecked
                return f"shard name {shard.file!r} is not of the form train-000000.tar"
            if shard.split not in SPLITS or not shard.file.startswith(shard.split + "-"):
                return f"shard {shard.file} says split {shard.split!r}, expected the one in its name"
            if shard.samples < 0 or shard.bytes < 0:
                return f"shard {shard.file} has a negative count"
        if len({shard.file for shard in self.shards}) != len(self.shards):
            return "a shard is listed twice"
        if [c.index for c in self.classes] != list(range(len(self.classes))):
            return f"class indices are not 0..{len(self.classes) - 1} in order"
        for split in SPLITS:
            counted = sum(shard.samples for shard in self.shards if shard.split == split)
            if counted != self.totals[split]:
                return f"total of {split} is {self.totals[split]}, its shards hold {counted}"
        return None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _read_record(kind: type[Record], raw: dict[str, Any]) -> Record:
    """A dataclass from decoded JSON, each field of its type; others are ignored. Raises KeyError or TypeError."""
    return kind(**{field.name: _check(field.name, field.type, raw[field.name]) for field in fields(kind)})  # type: ignore[arg-type]


def _check(name: str, kind: Any, value: Any) -> Any:
    if type(value) is not (get_origin(kind) or kind):
        raise TypeError(f"{name}: got {value!r}, expected {kind}")
    return value


def index_header(num_samples: int) -> str:
    """First line of a DALI index, version 1.2."""
    return f"v1.2 {num_samples}"


def check_header(index: bytes, shard: Shard, where: Path | str, remedy: str) -> None:
    """Raises UserError, naming `where`, for the beginning of an index that is not this shard's."""
    header, expected = index[:64].split(b"\n")[0].decode("ascii", "replace").strip(), index_header(shard.samples)
    if header != expected:
        raise UserError(f"{where}: starts with {header[:40]!r}, expected {expected!r} (stale index); {remedy}")
