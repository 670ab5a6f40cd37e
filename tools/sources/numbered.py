"""Sets of numbered files with numbered classes (parquet, tars of samples): splits by file names, names of classes."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pipeline.common.errors import UserError
from pipeline.images.imagenet import load_ilsvrc2012
from tools.sources.archive import MemberReader, scan_all
from tools.sources.listing import Entry, Listing, find_wnid, name_some, strip_wnid

SPLIT_OF_WORD = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Part:
    """What a file holds, an image each: its name, the number of its class, where it is; `titles` names the classes."""

    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    places: list[tuple[int, ...]] = field(default_factory=list)
    titles: dict[int, str] = field(default_factory=dict)


_OF_A_TOTAL = re.compile(r"(.*?)([0-9]+)-of-([0-9]+)")
_IN_A_ROW = re.compile(r"(.*?)([0-9]+)([^0-9]*)")
_MAX_NUMBER = 1_000_000  # larger ones are something else than the numbers of files

AnyPart = TypeVar("AnyPart", bound=Part)


def find_files(root: Path, folders: Sequence[str], ending: str) -> list[str]:
    """Names, relative to `root` and sorted, of the visible files with that ending directly in one of its `folders`."""
    found = []
    for folder in folders:
        if (root / folder).is_dir():
            names = os.listdir(root / folder)  # noqa: PTH208 - a class folder may hold very many
            wanted = [name for name in names if name.endswith(ending) and not name.startswith(".")]
            found += [f"{folder}/{name}" if folder else name for name in wanted if (root / folder / name).is_file()]
    return sorted(found)


def sort_by_split(root: Path, files: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Files by split, which their names or folders tell by a word such as "train" or "validation", and remarks.

    Raises UserError if some tell and others do not; if none does, all are for training.
    """
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": [], "": []}
    for file in files:
        words = re.split(r"[^a-z]+", file.rpartition(".")[0].lower())
        told = {SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD}
        splits[told.pop() if len(told) == 1 else ""].append(file)
    untold = splits.pop("")
    if untold and any(splits.values()):
        raise UserError(
            f"{root}: {name_some(untold)} tell neither train nor val by their names, as the others do; rename "
            "or move them"
        )
    remarks = []
    if untold:
        splits["train"] = untold
        remarks.append(f"no name tells train or val: all {len(untold)} files are taken for training")
    if splits["test"]:
        remarks.append(f"{len(splits['test'])} files of test not used: ImageNet's have no labels")
    if not splits["train"]:
        others = name_some([*splits["val"], *splits["test"]])
        raise UserError(f"{root}: holds {others}, none for training; expected names with 'train' in them")
    return splits, remarks


def find_missing(files: Iterable[str]) -> list[str]:
    """Files, without their endings, that the numbers in the others' names tell of: of 00000-of-00003 those of the three
    that are not there, of 0000, 0002 the one between. Numbers that are mostly gaps (years, wnids) tell of none."""
    rows: dict[tuple[str, str, bool], dict[int, str]] = {}
    for file in files:
        of_a_total = _OF_A_TOTAL.match(file)
        match = of_a_total or _IN_A_ROW.fullmatch(file)
        if match and int(match[2]) <= _MAX_NUMBER:
            rows.setdefault((match[1], match[3], bool(of_a_total)), {})[int(match[2])] = match[2]
    is_from_0 = any(0 in row for row in rows.values())
    missing = []
    for (head, last, has_total), row in rows.items():
        if has_total:
            total = min(int(last), _MAX_NUMBER)
            wanted = range(total) if 0 in row or total not in row else range(1, total + 1)
        else:
            wanted = range(0 if is_from_0 and 1 in row else min(row), max(row) + 1)
        absent = [number for number in wanted if number not in row]
        if has_total or min(row) <= 1 or len(absent) < len(row):
            width = min(map(len, row.values()))
            missing += [f"{head}{number:0{width}d}{f'-of-{last}' if has_total else ''}" for number in absent]
    return missing


def check_complete(root: Path, files: Iterable[str], *, allow_missing: bool) -> str:
    """A remark on files that are missing by the others' names, "" where none is. Raises UserError unless allowed."""
    splits, _ = sort_by_split(root, files)
    missing = find_missing([*splits["train"], *splits["val"]])
    if not missing:
        return ""
    told = f"files are missing by the numbers in the others' names: {name_some(missing)}"
    if not allow_missing:
        raise UserError(f"{root}: {told}; fetch them, or go without by --allow-missing")
    return told


def list_images(
    layout: str, root: Path, files: list[str], scan: Callable[[Path], AnyPart], remarks: list[str] | None = None
) -> tuple[Listing, tuple[str, ...], list[AnyPart]]:
    """A listing of the images that `scan` finds in each of the files; the files in use, by which entries name them, and
    what else their parts tell (the lists of images are taken out of them)."""
    remarks = [] if remarks is None else remarks
    splits, said = sort_by_split(root, files)
    remarks += said
    used = (*splits["train"], *splits["val"])
    listing = Listing(layout, root, MemberReader(str(root), used), remarks=remarks)
    parts: list[AnyPart] = []
    wnids: dict[int, set[str | None]] = {}
    titles: dict[int, str] = {}
    for number, part in enumerate(scan_all(lambda file: scan(root / file), used, "scan")):
        is_train = number < len(splits["train"])
        split = listing.train if is_train else listing.val
        for name, label, place in zip(part.names, part.labels, part.places, strict=True):
            base = strip_wnid(name)
            wnid = find_wnid(name, base)
            if is_train:
                wnids.setdefault(label, set()).add(wnid)
            if wnid:
                listing.tell(label, wnid, f"{used[number]}/{name}")
            split.append(Entry(f"{used[number]}/{base}", label, (number, *place)))
        if part.titles and titles and part.titles != titles:
            raise UserError(
                f"{root / used[number]}: names its classes otherwise than {used[0]}; expected files of one set"
            )
        titles = titles or part.titles
        part.names, part.labels, part.places = [], [], []
        parts.append(part)
    _name_classes(listing, wnids, titles)
    return listing, used, parts


def _name_classes(listing: Listing, wnids: dict[int, set[str | None]], titles: dict[int, str]) -> None:
    """Turn the numbers that a source gives its classes into provisional labels with names."""
    called, remark = name_labels(set(wnids), wnids, titles)
    # A label that no training image has is refused by its name, unless --subset leaves it out.
    for label in sorted({entry.label for entry in listing.val} - called.keys()):
        name = titles.get(label, str(label))
        called[label] = f"label {label}" if name in called.values() else name
    label_of = {number: listing.label_of(called[number]) for number in sorted(called)}
    listing.titles = {name: titles[number] for number, name in called.items() if number in titles}
    listing.told = {(label_of[number], wnid): said for (number, wnid), said in listing.told.items()}
    if any(number != label for number, label in label_of.items()):
        listing.train = [Entry(path, label_of[number], where) for path, number, where in listing.train]
        listing.val = [Entry(path, label_of[number], where) for path, number, where in listing.val]
    if remark:
        listing.remarks.append(remark)


def name_labels(
    labels: set[int], wnids: dict[int, set[str | None]], titles: dict[int, str] | None = None
) -> tuple[dict[int, str], str]:
    """Class names of the training labels of a source that numbers its classes, and a remark ("" where none is due).

    `wnids`: what the names of a label's images tell. Tried in turn: one wnid for each label, another for each; the
    sorted wnids of ILSVRC2012, if the labels, or `titles` (the source's own names) that fit, are 0 to 999; those
    titles, if no two are the same; the numbers, padded so that they sort as numbers.
    """
    told = {label: next(iter(wnids[label])) for label in labels if len(wnids.get(label, ())) == 1}
    by_image = {label: wnid for label, wnid in told.items() if wnid}
    if len(by_image) == len(labels) == len(set(by_image.values())):
        return by_image, ""
    table = load_ilsvrc2012()
    if set(titles or labels) == set(range(len(table))) and (not titles or _fit(titles, table)):
        return dict(enumerate(table)), "labels 0 to 999 are taken for the sorted wnids of ILSVRC2012"
    if titles and labels <= titles.keys() and len(set(titles.values())) == len(titles):
        return titles, ""
    width = len(str(max(labels, default=0)))
    return {label: f"{label:0{width}d}" for label in labels}, "classes are called by their numbers, for want of names"


def _fit(titles: dict[int, str], table: dict[str, str]) -> bool:
    """Whether these are ILSVRC2012's classes: editions of the list differ in a few words."""
    same = [titles[label].split(",")[0] == name.split(",")[0] for label, name in enumerate(table.values())]
    return sum(same) > len(same) // 2
