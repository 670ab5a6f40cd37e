"""Folders: train/<class>/* and val/<class>/*, or class folders alone, of which a share is taken for validation."""

import os
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.images.imagenet import IMAGE_ENDINGS
from tools.sources.listing import Entry, Listing, name_some

EXPECTED = "SOURCE/train/<class>/*.JPEG and, if there is one, SOURCE/val/<class>/*.JPEG"
_SPLIT_NAMES = frozenset({"train", "val", "validation", "valid", "test"})
_MIN_CLASSES = 2  # one folder of images beside other things is no set of classes


def find(root: Path) -> Path | None:
    """`root`, if it has train/ with something else in it than archives, or at least two folders of images."""
    if (root / "train").is_dir():
        names = list_names(root / "train")
        archives = [name for name in names if name.endswith((".tar", ".parquet"))]
        return root if len(archives) < len(names) or not names else None
    return root if _is_undivided(root) else None


def _is_undivided(root: Path) -> bool:
    names = list_names(root)
    if _SPLIT_NAMES & set(names):
        return False
    classes = (name for name in names if (root / name).is_dir() and list_images(root / name)[0])
    return len(list(islice(classes, _MIN_CLASSES))) == _MIN_CLASSES


def scan(root: Path, remarks: list[str] | None = None) -> Listing:
    """List `root`. Raises UserError for a tree without a training image."""
    is_undivided = not (root / "train").is_dir()
    listing = Listing(
        "folder", root, partial(read_file, root), remarks=[] if remarks is None else remarks, is_undivided=is_undivided
    )
    add_train(listing, "" if is_undivided else "train")
    if (root / "val").is_dir() and not is_undivided:
        folders, ignored = list_split(root / "val")
        if not any(folders.values()):
            raise UserError(
                f"{root / 'val'}: {len(folders)} class folders and {len(ignored)} other files, but no image in a class "
                f"folder; expected {EXPECTED}, or no val/ at all"
            )
        add_val(listing, folders, ignored)
    others = [name for name in list_names(root) if name in _SPLIT_NAMES - {"train", "val", "test"}]
    if others and not is_undivided:
        listing.remarks.append(f"{name_some(others)} not used: validation images are looked for in val/")
    if (root / "test").is_dir():
        listing.remarks.append("test/ not used: its images have no labels")
    return listing


def add_train(listing: Listing, split: str) -> None:
    """Add the class folders of the folder `split`, and their names."""
    folder = listing.root / split
    folders, ignored = list_split(folder)
    if not folders:
        raise UserError(f"{folder}: holds no folders, expected one per class; expected {EXPECTED}")
    empty = sorted(name for name, files in folders.items() if not files)
    if len(empty) == len(folders):
        raise UserError(
            f"{folder}: none of its {len(empty)} class folders holds an image; expected files ending in "
            f"{' '.join(IMAGE_ENDINGS)} directly in each"
        )
    head = f"{split}/" if split else ""
    for name, files in sorted(folders.items()):
        listing.train += [Entry(f"{head}{name}/{file}", listing.label_of(name)) for file in files]
    if empty:
        listing.remarks.append(
            f"{split or folder}: {len(empty)} class folders without an image passed over: {name_some(empty)}"
        )
    remark_ignored(listing, split or str(folder), ignored)


def add_val(listing: Listing, folders: dict[str, list[str]], ignored: list[str]) -> None:
    """Add validation images by class folder; a class that train/ does not have gets a label of its own."""
    for name, files in sorted(folders.items()):
        listing.val += [Entry(f"val/{name}/{file}", listing.label_of(name)) for file in files]
    remark_ignored(listing, "val", ignored)


def remark_ignored(listing: Listing, folder: str, ignored: list[str], place: str = "a class folder") -> None:
    """Name what is there besides the images, which are expected directly in `place`."""
    if ignored:
        listing.remarks.append(
            f"{folder}: {len(ignored)} other files and folders not used: {name_some(sorted(ignored))}; images end in "
            f"{' '.join(IMAGE_ENDINGS)} and lie directly in {place}"
        )


def list_split(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Image names by class folder, and the names, from `folder` on, of whatever else is visible."""
    folders: dict[str, list[str]] = {}
    ignored: list[str] = []
    with os.scandir(folder) as items:
        for item in items:
            if item.name.startswith("."):
                continue
            if _leads_to(item.is_dir):
                folders[item.name], others = list_images(item.path)
                ignored += [f"{item.name}/{name}" for name in others]
            else:
                ignored.append(item.name)
    return folders, ignored


def list_images(folder: str | Path) -> tuple[list[str], list[str]]:
    """Names of the images directly in `folder`, and of whatever else is visible there."""
    files: list[str] = []
    ignored: list[str] = []
    with os.scandir(folder) as items:
        for item in items:
            if not item.name.startswith("."):
                (files if _is_image(item) else ignored).append(item.name)
    return files, ignored


def _is_image(item: os.DirEntry[str]) -> bool:
    if not item.name.lower().endswith(IMAGE_ENDINGS):
        return False
    # A broken link counts as an image: reading it fails, so it ends in the failure list and not in silence.
    return _leads_to(item.is_file) or (item.is_symlink() and not os.path.exists(item.path))  # noqa: PTH110


def _leads_to(is_kind: Callable[[], bool]) -> bool:
    """An entry's `is_file` or `is_dir`, but False for a link to itself or to where we may not look: they raise."""
    try:
        return is_kind()
    except OSError:
        return False


def list_names(folder: Path) -> list[str]:
    """Sorted names in a folder, without hidden ones."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208 - names, not paths


def read_file(root: Path, entry: Entry) -> bytes:
    """`read` of a Source whose images are files."""
    return (root / entry.path).read_bytes()
