"""Where the images are: a source laid out in folders, as a list of entries and a way to read one.

The decision that shaped it: what a source holds (class table, entries in canonical order) is plain data, and reading
is one picklable function, so that a worker process is sent entries and the function, never the whole listing. Class
indices are the ranks of the class names in sorted order, and the canonical order (train by class and base name, val by
base name) depends on names alone, so it is the same wherever the images lie. Left out: looking into the images.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.shardset import SPLITS, ClassEntry

IMAGE_ENDINGS = (".jpeg", ".jpg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")
_EXPECTED = "expected SOURCE/train/<class>/*.JPEG and, if there is one, SOURCE/val/<class>/*.JPEG"
_NUM_NAMED = 8


class Entry(NamedTuple):
    """One image: its path inside the source, by which it is traced, its class index, and, where the path does not say
    it, where the bytes are (numbers that the source's `read` understands)."""

    path: str
    label: int
    where: tuple[int, ...] = ()

    @property
    def base_name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """Images to prepare. `read(entry)` gives an image's bytes (raises OSError) and can be sent to another process.

    `splits` maps "train" and "val" to entries in canonical order; `remarks` tell what was seen and not used.
    """

    layout: str
    classes: tuple[ClassEntry, ...]
    splits: dict[str, list[Entry]]
    read: Callable[[Entry], bytes]
    remarks: tuple[str, ...] = ()

    def entries(self, split: str) -> list[Entry]:
        """The images of "train" or "val" in canonical order."""
        return self.splits[split]


def open_source(path: str | Path) -> Source:
    """List the images of the folder layout: PATH/train/<class>/* and optionally PATH/val/<class>/*.

    Hidden files are passed over, links followed, files without an image's ending counted in a remark. Raises UserError
    for anything that is not such a folder with at least one training image.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(f"{root}: no such folder; {_EXPECTED}")
    if not root.is_dir():
        raise UserError(f"{root}: is a file; {_EXPECTED}")
    found = _list_names(root)
    if not (root / "train").is_dir():
        held = f"holds {_name_some(found)}" if found else "is empty"
        raise UserError(f"{root}: {held} and no folder train/; {_EXPECTED}")

    folders, num_ignored = _list_split(root, "train")
    if not folders:
        raise UserError(f"{root / 'train'}: holds no folders, expected one per class; {_EXPECTED}")
    empty = sorted(name for name, files in folders.items() if not files)
    names = sorted(folders.keys() - set(empty))
    if not names:
        raise UserError(
            f"{root / 'train'}: none of its {len(empty)} class folders holds an image; expected files ending in "
            f"{' '.join(IMAGE_ENDINGS)} directly in each"
        )
    labels = {name: label for label, name in enumerate(names)}
    train = [Entry(f"train/{name}/{file}", labels[name]) for name in names for file in sorted(folders[name])]
    remarks = []
    if empty:
        remarks.append(f"train: {len(empty)} class folders without an image passed over: {_name_some(empty)}")

    val: list[Entry] = []
    if (root / "val").is_dir():
        val, num_ignored_val = _list_val(root, labels)
        num_ignored += num_ignored_val
    else:
        remarks.append("no folder val/: the shards will have no validation set")
    if num_ignored:
        remarks.append(f"{num_ignored} other files (not ending in {' '.join(IMAGE_ENDINGS)}) not used")
    if "test" in found:
        remarks.append("test/ not used: its images have no labels")
    classes = tuple(ClassEntry(index, name, name) for index, name in enumerate(names))
    return Source("folder", classes, dict(zip(SPLITS, (train, val), strict=True)), partial(_read, root), tuple(remarks))


def _list_val(root: Path, labels: dict[str, int]) -> tuple[list[Entry], int]:
    folders, num_ignored = _list_split(root, "val")
    if not any(folders.values()):
        raise UserError(
            f"{root / 'val'}: {len(folders)} class folders and {num_ignored} other files, but no image in a class "
            f"folder; {_EXPECTED}, or no val/ at all"
        )
    unknown = sorted(name for name, files in folders.items() if files and name not in labels)
    if unknown:
        raise UserError(
            f"{root / 'val'}: {len(unknown)} classes without training images: {_name_some(unknown)}; "
            "expected the classes of train/; rename or remove them"
        )
    entries = [Entry(f"val/{name}/{file}", labels[name]) for name, files in folders.items() for file in files]
    return sorted(entries, key=lambda entry: (entry.base_name, entry.label)), num_ignored


def _list_split(root: Path, split: str) -> tuple[dict[str, list[str]], int]:
    """Image names by class folder, and how many visible files are none."""
    folders: dict[str, list[str]] = {}
    num_ignored = 0
    with os.scandir(root / split) as items:
        for item in items:
            if item.name.startswith("."):
                continue
            if item.is_dir():
                folders[item.name], ignored = _list_images(item.path)
                num_ignored += ignored
            else:
                num_ignored += 1
    return folders, num_ignored


def _list_images(folder: str) -> tuple[list[str], int]:
    files, num_ignored = [], 0
    with os.scandir(folder) as items:
        for item in items:
            if item.name.startswith("."):
                continue
            # A broken link counts as an image: reading it fails, so it ends in the failure list and not in silence.
            if item.name.lower().endswith(IMAGE_ENDINGS) and (item.is_file() or _is_broken_link(item)):
                files.append(item.name)
            else:
                num_ignored += 1
    return files, num_ignored


def _is_broken_link(item: os.DirEntry[str]) -> bool:
    return item.is_symlink() and not os.path.exists(item.path)  # noqa: PTH110 - a path of 1.3 million


def _list_names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208 - names, not paths


def _name_some(names: list[str]) -> str:
    """The first few names, quoted, so that a message stays one line whatever they are."""
    shown = ", ".join(repr(name) for name in names[:_NUM_NAMED])
    return f"{shown} and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else shown


def _read(root: Path, entry: Entry) -> bytes:
    return (root / entry.path).read_bytes()
