"""Tars of samples, read in place: <key>.jpg (or .jpeg, .png) beside <key>.cls, as WebDataset's writers make them."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.images.imagenet import IMAGE_ENDINGS
from tools.sources.archive import OpenFile, scan_tar
from tools.sources.listing import Listing, name_some
from tools.sources.numbered import SPLIT_OF_WORD, Part, find_files, list_images

EXPECTED = "SOURCE/*train*.tar and SOURCE/*val*.tar of <key>.jpg and <key>.cls"
_ENDINGS = frozenset(ending.removeprefix(".") for ending in IMAGE_ENDINGS)
_MAX_LABEL_BYTES = 32
_OWN_FILES = ("manifest.json", "job.json")  # of a folder that this project has written


@dataclass
class _Tar(Part):
    """Besides the samples: names of images with a dot too many, other members, labels without an image."""

    dotted: list[str] = field(default_factory=list)
    num_others: int = 0
    num_lonely: int = 0


def find(root: Path) -> Path | None:
    """`root`, if tars are in it that are not the official ones."""
    return root if list_files(root) else None


def list_files(root: Path) -> list[str]:
    """The tars of `root`, of all splits."""
    files = find_files(root, ("", *SPLIT_OF_WORD), ".tar")
    return [name for name in files if not name.rpartition("/")[2].startswith("ILSVRC2012_")]


def scan(root: Path, remarks: list[str] | None = None) -> Listing:
    """List the tars in `root`. Raises UserError for truncated tars, images without labels and shards of our own."""
    if any((root / name).is_file() for name in _OWN_FILES):
        raise UserError(
            f"{root}: holds shards made by alexnet-prep, expected full-size images; give what they were made of"
        )
    listing, files, tars = list_images("webdataset", root, list_files(root), _scan_one, remarks)
    if num_others := sum(tar.num_others for tar in tars):
        listing.remarks.append(f"{num_others:,} members that are neither images nor labels not used")
    if num_lonely := sum(tar.num_lonely for tar in tars):
        listing.remarks.append(f"{num_lonely:,} labels without an image")
    dotted = [name for tar in tars for name in tar.dotted]
    told = f"{len(dotted):,} images not used for their names, whose endings begin at the first dot: {name_some(dotted)}"
    if not listing.train:
        reason = f"{told}; write the tars again with no dot in a key" if dotted else f"expected {EXPECTED}"
        raise UserError(f"{root}: no sample in {name_some(list(files))}; {reason}")
    if dotted:
        listing.remarks.append(f"{told}; expected <key>.jpg, no dot in the key")
    return listing


def _scan_one(path: Path) -> _Tar:
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    tar, file = _Tar(), OpenFile(str(path))
    for member in scan_tar(path):
        folder, slash, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")  # WebDataset's rule: a key has no dot
        key, ending = folder + slash + stem, ending.lower()
        if not member.isreg() or not stem:
            tar.num_others += 1
        elif ending in _ENDINGS:
            if key in images:
                raise UserError(f"{path}: {key!r} has two images, expected one per key; make the tar again")
            images[key] = f"{stem}.{ending}", member.offset_data, member.size
        elif ending == "cls":
            if key in labels:
                raise UserError(f"{path}: {key!r} has two labels, expected one per key; make the tar again")
            text = file.read(member.offset_data, min(member.size, _MAX_LABEL_BYTES + 1)).strip()
            if not re.fullmatch(rb"[0-9]{1,9}", text):
                raise UserError(f"{path}: label of {key!r} is {text[:_MAX_LABEL_BYTES]!r}, expected a number from 0 on")
            labels[key] = int(text)
        elif ending.rpartition(".")[2] in _ENDINGS:
            tar.dotted.append(base)
        else:
            tar.num_others += 1
    # One that was left out for want of a label would never be missed.
    if unlabelled := sorted(images.keys() - labels.keys()):
        hint = "" if labels else "; a tar of one class belongs unpacked into a folder of its name"
        raise UserError(
            f"{path}: {len(unlabelled)} of {len(images)} images have no label: {name_some(unlabelled)}; expected "
            f"<key>.cls beside each{hint}"
        )
    for key, (name, *place) in images.items():
        tar.names.append(name)
        tar.labels.append(labels[key])
        tar.places.append(tuple(place))
    tar.num_lonely = len(labels.keys() - images.keys())
    return tar
