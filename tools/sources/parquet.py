"""Hugging Face's Parquet files of ImageNet: columns `image` (bytes and path) and `label`.

The decision that shaped it: the order of shards is a global shuffle, so that images are asked for one here, one there,
and decoding a row group for each would read the set a hundred times over. So values are located (parquet_pages.py) when
the source is listed, and an image is one read of its own bytes. Measured on files as Hugging Face writes them (row
groups of 100 ImageNet photographs, Snappy, dictionary), page cache warm, ms an image, median of 5: 0.11, against 26.4
by row group and 0.09 from a file of its own. Locating took 2.4 ms of CPU a row group (80 of them).
Where values cannot be located (zstd, gzip), row groups are decoded, and a remark says so.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common.errors import UserError
from tools.sources.archive import OpenFile, find_files, keep_open, scan_all
from tools.sources.listing import Entry, Listing, find_wnid, name_some, strip_wnid
from tools.sources.parquet_pages import Column, Place, Unlocatable, locate_values, read_place
from tools.sources.webdataset import call_labels, sort_by_split

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

EXPECTED = "SOURCE/data/train-*.parquet and validation-*.parquet with columns image and label"
_SPLITS = ("", "train", "val", "validation", "test")
FOLDERS = tuple(f"{folder}/{split}".strip("/") for folder in ("", "data", "default") for split in _SPLITS)
_MAX_GROUP_BYTES = 256 << 20  # decoded whole where values cannot be located
_NUM_KEPT_GROUPS = 2


def find(root: Path) -> Path | None:
    """`root`, if parquet files are where Hugging Face has them."""
    return root if find_files(root, FOLDERS, ".parquet") else None


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
        return read_row(path, -1 - first, rest[0], self.columns[number])


def scan(root: Path) -> Listing:
    """List the files in `root`. Raises UserError for a missing pyarrow, and for damaged or foreign files."""
    try:
        import pyarrow.parquet  # noqa: F401 - here, where its lack can be told in one line
    except ImportError as error:
        raise UserError(
            f"{root}: reading Parquet needs pyarrow; install it: pip install 'alexnet-dali[parquet]'"
        ) from error
    splits, remarks = sort_by_split(root, find_files(root, FOLDERS, ".parquet"))
    files = (*splits["train"], *splits["val"])
    num_train = len(splits["train"])
    listing = Listing("parquet", root, [], [], [], _no_reader, remarks=remarks)
    columns: list[str] = []
    wnids: dict[int, set[str | None]] = {}
    titles: dict[int, str] = {}
    reasons: set[str] = set()
    num_slow = 0
    for number, part in enumerate(scan_all(lambda file: _scan_one(root / file), files, "scan")):
        columns.append(part.column)
        reasons |= part.reasons
        num_slow += part.num_slow
        if part.titles and titles and part.titles != titles:
            raise UserError(
                f"{root / files[number]}: names its classes otherwise than {files[0]}; expected files of one set"
            )
        titles = titles or part.titles
        split = listing.train if number < num_train else listing.val
        for name, label, where in zip(part.names, part.labels, part.wheres, strict=True):
            base = strip_wnid(name)
            if number < num_train:
                wnids.setdefault(label, set()).add(find_wnid(name, base))
            split.append(Entry(f"{files[number]}/{base}", label, (number, *where)))
    if not listing.train:
        raise UserError(f"{root}: no row in {name_some(splits['train'])}; expected {EXPECTED}")
    if num_slow:
        remarks.append(
            f"{num_slow:,} images cannot be read singly ({'; '.join(sorted(reasons))}): each costs the reading of "
            "its row group; files with compression 'snappy' or 'none' are read a hundred times faster"
        )
    listing.read = ParquetReader(str(root), files, tuple(columns))
    call_labels(listing, wnids, titles)
    return listing


def _no_reader(entry: Entry) -> bytes:
    raise OSError(f"{entry.path}: not listed yet")


@dataclass
class _Part:
    """What a file holds, a row each: the image's name, its label, where it is."""

    column: str
    titles: dict[int, str]
    names: list[str]
    labels: list[int]
    wheres: list[tuple[int, ...]]
    reasons: set[str]
    num_slow: int = 0


def _scan_one(path: Path) -> _Part:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            has_path = _check_schema(path, file.schema_arrow)
            bytes_column = "image.bytes" if has_path is not None else "image"
            wanted = ["label", *(["image.path"] if has_path else [])]
            table = file.read(columns=wanted, use_threads=False)
            labels = table.column("label").to_pylist()
            paths = (
                table.column("image").combine_chunks().field("path").to_pylist() if has_path else [None] * len(labels)
            )
            part = _Part(bytes_column, _read_titles(file.schema_arrow), [], labels, [], set())
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
    stem = path.name.removesuffix(".parquet")
    part.names = [(name or "").rpartition("/")[2] or f"{stem}-{row:06d}" for row, name in enumerate(paths)]
    return part


def _check_schema(path: Path, schema: "pyarrow.Schema") -> bool | None:
    """Whether images come with a path; None if the column `image` is the bytes themselves."""
    import pyarrow

    types = {field.name: field.type for field in schema}
    image, label = types.get("image"), types.get("label")
    shown = ", ".join(f"{name} {kind}"[:80] for name, kind in types.items())
    if label is None or image is None or not pyarrow.types.is_integer(label):
        raise UserError(f"{path}: columns {shown!r}, expected image and label (a whole number)")
    if _is_binary(image):
        return None
    if (
        not pyarrow.types.is_struct(image)
        or image.get_field_index("bytes") < 0
        or not _is_binary(image.field("bytes").type)
    ):
        raise UserError(f"{path}: column image is {str(image)[:80]!r}, expected a struct of bytes and path, or bytes")
    if image.get_field_index("path") < 0:
        return False
    path_type = image.field("path").type
    # A path that cannot be read is refused, not left out: the order of the images and their classes' names hang on it.
    if not (_is_string(path_type) or pyarrow.types.is_null(path_type)):
        raise UserError(f"{path}: image.path is {str(path_type)[:80]!r}, expected text; write the files again")
    return bool(_is_string(path_type))


def _is_binary(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_string(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _read_titles(schema: "pyarrow.Schema") -> dict[int, str]:
    """Names of the classes from what Hugging Face's `datasets` leaves in the schema's metadata; {} without."""
    import json

    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return {}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return {}
    return {label: " ".join(name.split()) for label, name in enumerate(names)}


def _locate_images(path: Path, file: "ParquetFile", part: _Part) -> None:
    metadata = file.metadata
    schema = file.schema
    index = next(i for i in range(len(schema)) if schema.column(i).path == part.column)
    opened = OpenFile(str(path))
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(index)
        starts = [chunk.data_page_offset, *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])]
        level = schema.column(index).max_definition_level
        column = Column(min(starts), chunk.total_compressed_size, chunk.num_values, level, chunk.compression)
        try:
            part.wheres += [tuple(place) if place.size >= 0 else place[:2] for place in locate_values(opened, column)]
        except Unlocatable as error:
            _check_group(path, group, metadata.row_group(group).num_rows, chunk, part.column)
            part.reasons.add(str(error))
            part.num_slow += chunk.num_values
            part.wheres += [(-1 - group, row) for row in range(chunk.num_values)]


def _check_group(path: Path, group: int, num_rows: int, chunk: Any, column: str) -> None:
    """Refuse a row group that has to be decoded whole and is too large for that."""
    if chunk.total_uncompressed_size > _MAX_GROUP_BYTES:
        raise UserError(
            f"{path}: row group {group} has {chunk.total_uncompressed_size / 1e6:,.0f} MB, readable as a whole "
            f"only (by {chunk.compression}), expected at most {_MAX_GROUP_BYTES / 1e6:,.0f} MB; write the files "
            "again with compression='snappy' or row_group_size=100"
        )


def read_row(path: str, group: int, row: int, column: str) -> bytes:
    """The image of a row, by way of its row group, of which a process keeps the last few. Raises OSError."""
    value = _load_group(path, group, column)[row].as_py()
    if not isinstance(value, bytes):
        raise OSError(f"row {row} of row group {group} has no image")
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
