"""The contract on disk: what a folder of shards holds, and how any part of the project reads or writes it.

The decision that shaped it: the manifest is the completion mark. It is written last, atomically, and names every
shard with its size and checksum; a folder without one is unfinished, whatever else lies in it. `ShardSet.open` checks
what can be checked without reading image data (schema, names, sizes, index headers). Left out: reading the images
(graph.py) and verifying checksums byte by byte (a job for a preparation tool). Standard library only.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.machine import temporary_for

if TYPE_CHECKING:
    from pipeline.cache import Remote

SCHEMA = 1
IMAGE_SIZE_PX = 256
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
ENDINGS = {"jpeg": "jpg", "raw": "rgb"}  # of a sample's image, by the manifest's encoding
CLS_DIGITS = 5  # a label is stored as five ASCII digits: int() reads it, DALI sees a fixed width
KEY_DIGITS = 9
_SHARD_NAME = re.compile(r"(train|val)-\d{6}\.tar")


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
            classes = tuple(ClassEntry(int(c["index"]), str(c["wnid"]), str(c["name"])) for c in raw["classes"])
            shards = tuple(
                Shard(str(s["file"]), str(s["split"]), int(s["samples"]), int(s["bytes"]), str(s["sha256"]))
                for s in raw["shards"]
            )
            manifest = cls(
                schema=SCHEMA,
                created_by=str(raw["created_by"]),
                layout=str(raw["layout"]),
                seed=int(raw["seed"]),
                size_px=int(raw["size_px"]),
                encoding=str(raw["encoding"]),
                quality=int(raw["quality"]),
                samples_per_shard=int(raw["samples_per_shard"]),
                classes=classes,
                shards=shards,
                totals={split: int(raw["totals"][split]) for split in SPLITS},
                job=str(raw["job"]),
            )
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


@dataclass(frozen=True)
class ShardSet:
    """A finished folder of shards. Open one with `ShardSet.open(path)`.

    Behind a URL, `root` is the local folder that caches it: everything small lies there, every tar has its size, but
    its bytes arrive when asked for. Readers therefore `wait` for a split, or go step by step (readahead.Gate).
    """

    root: Path
    manifest: Manifest
    remote: "Remote | None" = field(default=None, compare=False, repr=False)
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(
        cls, root: str | Path, *, cache_dir: str | Path | None = None, cache_gib: float | None = None
    ) -> "ShardSet":
        """The shards in `root`, checked: every tar present and of its recorded size, every index of its sample count.

        `root` may be a URL (s3://bucket/prefix and whatever fsspec knows): then `cache_dir` (default: $ALEXNET_CACHE or
        the user's cache folder) keeps up to `cache_gib` GiB of shards (default: what the disk holds), see cache.py.
        Raises UserError for a folder without a manifest, with one of another schema, or with a missing, truncated or
        stale file. Checksums are not read here: that would cost as long as reading the data set.
        """
        if "://" in str(root):
            from pipeline.cache import open_cached  # here: it needs numpy, and the extra `s3`

            return cls(*open_cached(str(root), cache_dir, cache_gib))
        root = Path(root)
        path = root / MANIFEST
        if not path.is_file():
            what = "unfinished or not a folder of shards" if root.is_dir() else "no such folder"
            raise UserError(
                f"{root}: {what} (no {MANIFEST}); "
                f"make it with `alexnet-prep shard SOURCE --out {root}`, or name another with --shards"
            )
        manifest = Manifest.parse(read_json(path), path)
        shards = cls(root, manifest)
        for split in SPLITS:
            shards.check(split)
        return shards

    @property
    def location(self) -> str:
        """Where the shards come from: their URL, or their folder's absolute path. `open` takes it."""
        return self.remote.url if self.remote else str(self.root.resolve())

    def check(self, split: str) -> None:
        """Raises UserError naming the first tar or index of `split` that is missing, truncated, stale or, since it was
        checked first, replaced by other bytes."""
        for shard in self.shards(split):
            _check_files(self.root, shard)
            if not self.remote:  # what a cache fetches is checked when it comes
                self._check_unchanged(shard)

    def _check_unchanged(self, shard: Shard) -> None:
        """The bytes are read only where the file is another one, or was written to, since it was looked at last."""
        status = (self.root / shard.file).stat()
        now = status.st_ino, status.st_mtime_ns
        if self._seen.setdefault(shard.file, now) == now:
            return
        with (self.root / shard.file).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise UserError(
                f"{self.root / shard.file}: was replaced while it was in use (SHA-256 {found[:12]}, expected "
                f"{shard.sha256[:12]}); restore it, and go on from a checkpoint of before"
            )
        self._seen[shard.file] = now

    def wait(self, split: str, samples: range | None = None) -> None:
        """Block until every shard of `split` is in `root`, and check them. Raises UserError for one not to be had.

        `samples`: only those shards that hold samples of these positions, counted in stored order.
        """
        if self.remote:
            wanted, first = [], 0
            for shard in self.shards(split):
                if samples is None or (first < samples.stop and first + shard.samples > samples.start):
                    wanted.append(shard.file)
                first += shard.samples
            self.remote.fetcher.wait(wanted)
        self.check(split)

    def shards(self, split: str) -> list[Shard]:
        return [shard for shard in self.manifest.shards if shard.split == split]

    def tars(self, split: str) -> list[Path]:
        return [self.root / shard.file for shard in self.shards(split)]

    def indices(self, split: str) -> list[Path]:
        return [path.with_suffix(".idx") for path in self.tars(split)]

    def num_samples(self, split: str) -> int:
        return self.manifest.totals[split]

    @property
    def num_classes(self) -> int:
        return len(self.manifest.classes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the ordered (file name, SHA-256) pairs of the training tars: what the statistics describe."""
        digest = hashlib.sha256()
        for shard in self.shards("train"):
            digest.update(f"{shard.file} {shard.sha256}\n".encode())
        return digest.hexdigest()


def _check_files(root: Path, shard: Shard) -> None:
    tar = root / shard.file
    index = tar.with_suffix(".idx")
    remedy = "restore it, or run `alexnet-prep shard` again with --force"
    if not tar.is_file():
        raise UserError(f"{tar}: missing, expected {shard.bytes} bytes; {remedy}")
    size = tar.stat().st_size
    if size != shard.bytes:
        raise UserError(f"{tar}: {size} bytes, expected {shard.bytes} (truncated or replaced); {remedy}")
    expected = index_header(shard.samples)
    try:
        with index.open("rb") as file:
            header = file.readline(64).decode("ascii", errors="replace").strip()
    except FileNotFoundError:
        raise UserError(f"{index}: missing; {remedy}") from None
    if header != expected:
        raise UserError(f"{index}: starts with {header!r}, expected {expected!r} (stale index); {remedy}")


def index_header(num_samples: int) -> str:
    """First line of a DALI index, version 1.2."""
    return f"v1.2 {num_samples}"


def read_json(path: Path) -> Any:
    """Decoded JSON of `path`. Raises UserError if it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); restore the file or make it again") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` so that a reader sees the old file or the whole new one, never a part."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename. On any failure the temporary file is removed and `path` is as it was."""
    temporary = temporary_for(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
