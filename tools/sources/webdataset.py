"""Tars of samples: <key>.jpg (or .jpeg, .png) beside <key>.cls, as WebDataset's writers make them.

The decision that shaped it: a tar is scanned by its headers and read in place; the few bytes of a label come with the
header before them. Every image has a label or the source is refused: one left out by itself would never be missed.
What else a sample holds (.json, .txt, .mask.png) is counted in a remark, and a name with a dot too many is shown.
"""

import re
from pathlib import Path
from typing import NamedTuple

from pipeline.common.errors import UserError
from pipeline.images.imagenet import IMAGE_ENDINGS
from tools.sources.archive import MemberReader, find_files, scan_all, scan_tar
from tools.sources.listing import Entry, Listing, find_wnid, name_labels, name_some, strip_wnid

EXPECTED = "SOURCE/*train*.tar and SOURCE/*val*.tar of <key>.jpg and <key>.cls"
FOLDERS = ("", "train", "val", "valid", "validation", "test")
SPLIT_OF_WORD = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_ENDINGS = frozenset(ending.removeprefix(".") for ending in IMAGE_ENDINGS)
_MAX_LABEL_BYTES = 32
_OWN_FILES = ("manifest.json", "job.json")  # of a folder that this project has written


class _Sample(NamedTuple):
    key: str
    ending: str
    label: int
    offset: int
    size: int


class _Part(NamedTuple):
    """What a tar holds: samples, names of images with a dot too many, other members, labels without an image."""

    samples: list[_Sample]
    dotted: list[str]
    num_others: int
    num_lonely: int


def find(root: Path) -> Path | None:
    """`root`, if tars are in it that are not the official ones."""
    return root if _list_tars(root) else None


def _list_tars(root: Path) -> list[str]:
    return [name for name in find_files(root, FOLDERS, ".tar") if not name.rpartition("/")[2].startswith("ILSVRC2012_")]


def sort_by_split(root: Path, files: list[str]) -> tuple[dict[str, list[str]], list[str]]:
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
        raise UserError(f"{root}: holds {name_some(files)}, none for training; expected names with 'train' in them")
    return splits, remarks


def scan(root: Path) -> Listing:
    """List the tars in `root`. Raises UserError for truncated tars, images without labels and shards of our own."""
    if any((root / name).is_file() for name in _OWN_FILES):
        raise UserError(
            f"{root}: holds shards made by alexnet-prep, expected full-size images; give what they were made of"
        )
    splits, remarks = sort_by_split(root, _list_tars(root))
    files = (*splits["train"], *splits["val"])
    listing = Listing("webdataset", root, [], [], [], MemberReader(str(root), files), remarks=remarks)
    num_train, num_others, num_lonely = len(splits["train"]), 0, 0
    dotted: list[str] = []
    wnids: dict[int, set[str | None]] = {}
    for number, part in enumerate(scan_all(lambda file: _scan_one(root / file), files, "scan")):
        num_others, num_lonely = num_others + part.num_others, num_lonely + part.num_lonely
        dotted += part.dotted
        split = listing.train if number < num_train else listing.val
        for sample in part.samples:
            name = sample.key.rpartition("/")[2]
            base = strip_wnid(name)
            if number < num_train:
                wnids.setdefault(sample.label, set()).add(find_wnid(name, base))
            where = (number, sample.offset, sample.size)
            split.append(Entry(f"{files[number]}/{base}.{sample.ending}", sample.label, where))
    if not listing.train:
        raise UserError(f"{root}: no sample in {name_some(splits['train'])}; expected {EXPECTED}")
    if num_others:
        remarks.append(f"{num_others:,} members that are neither images nor labels not used")
    if dotted:
        remarks.append(
            f"{len(dotted):,} images not used for their names, whose endings begin at the first dot: "
            f"{name_some(dotted)}; expected <key>.jpg, no dot in the key"
        )
    if num_lonely:
        remarks.append(f"{num_lonely:,} labels without an image")
    call_labels(listing, wnids)
    return listing


def call_labels(listing: Listing, wnids: dict[int, set[str | None]], titles: dict[int, str] | None = None) -> None:
    """Turn the numbers that a source gives its classes into provisional labels with names."""
    called, remark = name_labels(set(wnids), wnids, titles)
    for label in {entry.label for entry in listing.val} - called.keys():
        called[label] = (titles or {}).get(label, str(label))  # no training image has it: refused by that name
    numbers = sorted(called)
    listing.names = [called[number] for number in numbers]
    if titles:
        listing.titles = {called[number]: titles[number] for number in numbers if number in titles}
    if numbers != list(range(len(numbers))):
        label_of = {number: label for label, number in enumerate(numbers)}
        listing.train = [Entry(path, label_of[number], where) for path, number, where in listing.train]
        listing.val = [Entry(path, label_of[number], where) for path, number, where in listing.val]
    if remark:
        listing.remarks.append(remark)


def _scan_one(path: Path) -> _Part:
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    num_others, dotted = 0, []
    for member, read in scan_tar(path):
        folder, slash, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")  # WebDataset's rule: a key has no dot
        key, ending = folder + slash + stem, ending.lower()
        if not member.is_file or not stem:
            num_others += 1
        elif ending in _ENDINGS:
            if key in images:
                raise UserError(f"{path}: {key!r} has two images, expected one per key; make the tar again")
            images[key] = ending, member.offset, member.size
        elif ending == "cls":
            if key in labels:
                raise UserError(f"{path}: {key!r} has two labels, expected one per key; make the tar again")
            text = read(_MAX_LABEL_BYTES + 1).strip()
            if not re.fullmatch(rb"[0-9]{1,9}", text):
                raise UserError(f"{path}: label of {key!r} is {text[:_MAX_LABEL_BYTES]!r}, expected a number from 0 on")
            labels[key] = int(text)
        elif ending.rpartition(".")[2] in _ENDINGS:
            dotted.append(base)
        else:
            num_others += 1
    unlabelled = sorted(images.keys() - labels.keys())
    if unlabelled:
        hint = "" if labels else "; a tar of one class belongs unpacked into a folder of its name"
        raise UserError(
            f"{path}: {len(unlabelled)} of {len(images)} images have no label: {name_some(unlabelled)}; expected "
            f"<key>.cls beside each{hint}"
        )
    samples = [_Sample(key, ending, labels[key], offset, size) for key, (ending, offset, size) in images.items()]
    return _Part(samples, dotted, num_others, len(labels.keys() - images.keys()))
