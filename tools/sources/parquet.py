"""Hugging Face's Parquet files of ImageNet: columns `image` (bytes and path) and `label`.

Shards are a global shuffle: images are asked for one here, one there. Each is read by itself (parquet_pages.py):
0.1 ms for one of ImageNet's, where decoding its row group takes 26. A remark says where that cannot be (zstd, gzip).
"""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.common.errors import UserError
from tools.sources.archive import OpenFile, keep_open
from tools.sources.listing import Entry, Listing, name_some
from tools.sources.numbered import Part, find_files, list_images
from tools.sources.parquet_pages import Column, Place, Unlocatable, locate_values, read_place

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

EXPECTED = "SOURCE/data/train-*.parquet and validation-*.parquet with columns image and label"
_SPLITS = ("", "train", "val", "validation", "test")
FOLDERS = tuple(f"{folder}/{split}".strip("/") for folder in ("", "data", "default") for split in _SPLITS)
_BYTES = ("binary", "large_binary", "binary_view")  # types of Arrow
_TEXT = ("string", "large_string", "string_view")
_MAX_GROUP_BYTES = 256 << 20  # decoded whole where values cannot be located
_NUM_KEPT_GROUPS = 2


@dataclass
class _File(Part):
    """Besides the rows: the column of the images; why how many of them cannot be located."""

    column: str = ""
    reasons: set[str] = field(default_factory=set)
    num_slow: int = 0


@dataclass(frozen=True)
class ParquetReader:
    """`read` of a Source whose entries are (number of the file, a Place's numbers), or (number of the file, row group,
    row) with the row group counted from -1 down."""

    root: str
    files: tuple[str, ...]
    columns: tuple[str, ...]

    def __call__(self, entry: Entry) -> bytes:
        number, first, *rest = entry.where
        path = f"{self.root}/{self.files[number]}"
        if first >= 0:
            return read_place(keep_open(path), Place(first, *rest))
        value = _load_group(path, -1 - first, self.columns[number])[rest[0]].as_py()
        if not isinstance(value, bytes):
            raise OSError(f"row {rest[0]} of row group {-1 - first} has no image")
        return value


@lru_cache(maxsize=_NUM_KEPT_GROUPS)
def _load_group(path: str, group: int, column: str) -> "pyarrow.Array":
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            images = file.read_row_group(group, columns=[column], use_threads=False).column(0).combine_chunks()
    except pyarrow.ArrowException as error:
        raise OSError(f"damaged Parquet file ({error})") from error
    return images.field("bytes") if pyarrow.types.is_struct(images.type) else images


def find(root: Path) -> Path | None:
    """`root`, if parquet files are where Hugging Face has them."""
    return root if list_files(root) else None


def list_files(root: Path) -> list[str]:
    """The Parquet files of `root`, of all splits."""
    return find_files(root, FOLDERS, ".parquet")


def scan(root: Path, remarks: list[str] | None = None) -> Listing:
    """List the files in `root`. Raises UserError for a missing pyarrow, and for damaged or foreign files."""
    try:
        import pyarrow.parquet  # noqa: F401 - here, where its lack can be told in one line
    except ImportError as error:
        raise UserError(
            f"{root}: reading Parquet needs pyarrow; install it: pip install 'alexnet-dali[parquet]'"
        ) from error
    listing, files, parts = list_images("parquet", root, list_files(root), _scan_one, remarks)
    if not listing.train:
        raise UserError(f"{root}: no row in {name_some(list(files))}; expected {EXPECTED}")
    if num_slow := sum(part.num_slow for part in parts):
        reasons = "; ".join(sorted({reason for part in parts for reason in part.reasons}))
        listing.remarks.append(
            f"{num_slow:,} images cannot be read singly ({reasons}): each costs the reading of its row group; files "
            "with compression 'snappy' or 'none' are read a hundred times faster"
        )
    listing.read = ParquetReader(str(root), files, tuple(part.column for part in parts))
    return listing


def _scan_one(path: Path) -> _File:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            is_struct, has_path = _check_schema(path, file.schema_arrow)
            table = file.read(columns=["label", *(["image.path"] if has_path else [])], use_threads=False)
            labels = table.column("label").to_pylist()
            paths = [""] * len(labels)
            if has_path:
                paths = table.column("image").combine_chunks().field("path").to_pylist()
            part = _File(labels=labels, titles=_read_titles(file.schema_arrow))
            part.column = "image.bytes" if is_struct else "image"
            _locate_images(path, file, part)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a whole Parquet file ({reason}); fetch it again") from error
    for row, label in enumerate(labels):
        if label is None or label < 0:
            raise UserError(f"{path}: row {row} has label {label}, expected a number from 0 on; files without labels "
                            "belong in 'test'")  # fmt: skip
    part.names = [(name or "").rpartition("/")[2] or f"{path.stem}-{row:06d}" for row, name in enumerate(paths)]
    return part


def _check_schema(path: Path, schema: "pyarrow.Schema") -> tuple[bool, bool]:
    """Whether the column `image` is a struct and not the bytes themselves, and whether images come with a path."""
    import pyarrow

    types = {field.name: field.type for field in schema}
    image, label = types.get("image"), types.get("label")
    shown = ", ".join(f"{name} {kind}"[:80] for name, kind in types.items())
    if label is None or image is None or not pyarrow.types.is_integer(label):
        raise UserError(f"{path}: columns {shown!r}, expected image and label (a whole number)")
    if str(image) in _BYTES:
        return False, False
    parts = {field.name: str(field.type) for field in image} if pyarrow.types.is_struct(image) else {}
    if parts.get("bytes") not in _BYTES:
        raise UserError(f"{path}: column image is {str(image)[:80]!r}, expected a struct of bytes and path, or bytes")
    # A path that cannot be read is refused, not left out: the order of the images and their classes' names hang on it.
    if (kind := parts.get("path", "null")) not in (*_TEXT, "null"):
        raise UserError(f"{path}: image.path is {kind[:80]!r}, expected text; write the files again")
    return True, kind in _TEXT


def _read_titles(schema: "pyarrow.Schema") -> dict[int, str]:
    """Names of the classes from what Hugging Face's `datasets` leaves in the schema's metadata; {} without."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return {}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return {}
    return {label: " ".join(name.split()) for label, name in enumerate(names)}


def _locate_images(path: Path, file: "ParquetFile", part: _File) -> None:
    opened = OpenFile(str(path))
    index = next(i for i in range(len(file.schema)) if file.schema.column(i).path == part.column)
    for group in range(file.metadata.num_row_groups):
        chunk = file.metadata.row_group(group).column(index)
        starts = [chunk.data_page_offset, *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])]
        level = file.schema.column(index).max_definition_level
        column = Column(min(starts), chunk.total_compressed_size, chunk.num_values, level, chunk.compression)
        try:
            part.places += [tuple(place) if place.size >= 0 else place[:2] for place in locate_values(opened, column)]
        except Unlocatable as error:
            if chunk.total_uncompressed_size > _MAX_GROUP_BYTES:
                raise UserError(
                    f"{path}: row group {group} has {chunk.total_uncompressed_size / 1e6:,.0f} MB, readable as a whole "
                    f"only (by {chunk.compression}), expected at most {_MAX_GROUP_BYTES / 1e6:,.0f} MB; write the "
                    "files again with compression='snappy' or row_group_size=100"
                ) from error
            part.reasons.add(str(error))
            part.num_slow += chunk.num_values
            part.places += [(-1 - group, row) for row in range(chunk.num_values)]
