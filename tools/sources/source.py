"""Where the images are: any of the forms in which ImageNet lies on disks, as a list of entries and a way to read one.

Class indices are the ranks of the class names. Training images are in order of class and base name, validation images
of base name, endings aside: by names alone, so that shards are the same wherever the images lie.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.console import note
from pipeline.common.errors import UserError
from pipeline.images.imagenet import load_ilsvrc2012
from pipeline.manifest import SPLITS, ClassEntry
from tools.sources import LAYOUTS, folder, kaggle, official, parquet, webdataset
from tools.sources.archive import keep_open
from tools.sources.folder import list_names
from tools.sources.listing import Entry, Listing, check_names, name_some, pick_classes, put_in_order, take_share
from tools.sources.numbered import check_complete

__all__ = ["Entry", "Source", "open_source"]

_MODULES = dict(zip(LAYOUTS, (folder, kaggle, official, parquet, webdataset), strict=True))
_MAX_FOLDERS_DOWN = 32  # in a folder with more in it, we do not go looking


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


def open_source(
    path: str | Path,
    *,
    layout: str | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    subset: str | Path | None = None,
    allow_missing: bool = False,
) -> Source:
    """List the images in the folder `path`, in the layout that is found there, or in `layout`.

    `val_fraction` of each class's training images, chosen by `seed`, is for validation where the source does not say
    what is; `subset` names a file of class names (wnids) to keep, one a line; `allow_missing`: go on without files that
    the numbers in the others' names tell of. Raises UserError for what is none of the layouts or not whole, and for
    options that do not fit it; OSError for what cannot be read.
    """
    keep_open.cache_clear()
    name, at = _find_layout(Path(path), layout)
    module = _MODULES[name]
    remarks = [f"{name} layout found in {at}"] if at != Path(path) else []
    has_collector = gc.isenabled()
    gc.disable()  # it would walk over millions of tuples again and again, none of which is in a cycle
    try:
        if name in ("parquet", "webdataset"):
            remarks += filter(None, [check_complete(at, module.list_files(at), allow_missing=allow_missing)])
        listing: Listing = module.scan(at, remarks)
        remarks += filter(None, [check_names(listing)])
        return _make_source(listing, at, val_fraction, seed, None if subset is None else Path(subset))
    except (UserError, OSError):
        for remark in remarks:  # there will be no source that has them, and they may say why
            note(f"{path}: {remark}")
        raise
    finally:
        if has_collector:
            gc.enable()


def _make_source(listing: Listing, at: Path, val_fraction: float | None, seed: int, subset: Path | None) -> Source:
    if subset is not None:
        pick_classes(listing, subset)
    if not listing.train:
        raise UserError(f"{at}: no training image of these classes, expected at least one; choose others by --subset")
    _divide(listing, val_fraction, seed)
    names, train, val = put_in_order(listing)
    titles = load_ilsvrc2012() | listing.titles
    classes = tuple(ClassEntry(index, name, titles.get(name, name)) for index, name in enumerate(names))
    splits = dict(zip(SPLITS, (train, val), strict=True))
    return Source(listing.layout, classes, splits, listing.read, tuple(listing.remarks))


def _divide(listing: Listing, val_fraction: float | None, seed: int) -> None:
    if val_fraction is not None:
        if listing.val:
            raise UserError(
                f"{listing.root}: has {len(listing.val):,} validation images, and --val-fraction takes more out of the "
                "training images; give one or the other: leave --val-fraction out, or move the validation images away"
            )
        take_share(listing, val_fraction, seed)
    elif listing.is_undivided:
        raise UserError(
            f"{listing.root}: class folders and no folder train/, so nothing says which images are for validation; "
            "give --val-fraction 0.05 to take that share of each class, or put the class folders into train/"
        )
    elif not listing.val:
        wanted = "no folder val/" if listing.layout in ("folder", "kaggle") else "no validation images"
        listing.remarks.append(f"{wanted}: the shards will have no validation set (--val-fraction takes a share)")


def _find_layout(root: Path, layout: str | None) -> tuple[str, Path]:
    """The layout and the folder to scan: `root`, a folder that the layout has below it, or, if that is the
    only one there, a folder in `root`."""
    if layout is not None and layout not in _MODULES:
        raise UserError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    names = LAYOUTS if layout is None else (layout,)
    expected = "expected " + ", or ".join(f"{_MODULES[name].EXPECTED} ({name})" for name in names)
    if not root.exists():
        raise UserError(f"{root}: no such folder; {expected}")
    if not root.is_dir():
        raise UserError(f"{root}: is a file; give the folder it is in; {expected}")
    found = _match(root, names)
    if not found:
        held = list_names(root)
        folders = [root / name for name in held if (root / name).is_dir()]
        if len(folders) <= _MAX_FOLDERS_DOWN:
            found = [pair for folder in folders for pair in _match(folder, names)]
        if not found:
            shown = f"holds {name_some(held)}" if held else "is empty"
            train = " and no folder train/" if layout in (None, "folder") else ""
            above = _match(root.absolute().parent, names) if root.name in ("train", "val", "data") else []
            hint = f"; did you mean {above[0][1]}?" if above else ""
            raise UserError(f"{root}: {shown}{train}; {expected}{hint}")
    if len(found) > 1:
        seen = ", ".join(f"{name} in {at}" for name, at in found)
        raise UserError(f"{root}: more than one source: {seen}; give one's folder, or choose by --layout")
    return found[0]


def _match(root: Path, names: tuple[str, ...]) -> list[tuple[str, Path]]:
    found = {name: at for name in names if (at := _MODULES[name].find(root))}
    if "kaggle" in found and found["kaggle"] == found.get("folder"):
        del found["folder"]  # Kaggle's CLS-LOC/ has train/ and val/ like any other
    return list(found.items())
