"""What a layout finds, and what is the same for all layouts, from names alone: order, subset, validation share."""

import hashlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from pipeline.common.errors import UserError
from pipeline.images.imagenet import load_ilsvrc2012

_NUM_NAMED = 8
_WNID = re.compile(r"n[0-9]{8}")
_WNID_BEHIND = re.compile(r"_n[0-9]{8}(?=(\.[^.]*)?$)")
_TRAIN_NAME = re.compile(r"(n[0-9]{8})_")
_NUM_CONTRADICTIONS = 4  # that are shown


class Entry(NamedTuple):
    """One image: its path inside the source, its class index, and, where the path does not say it, where the bytes are
    (numbers that the source's `read` understands). A path out of an archive is a name, and never opened."""

    path: str
    label: int
    where: tuple[int, ...] = ()

    @property
    def base_name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass
class Listing:
    """What a layout holds, in any order. `labels` numbers its classes (wnids) provisionally; `titles` are names for
    people that come with the source; `told` has what images' names tell where classes are numbered: by label and wnid,
    how many do and the first of them; `is_undivided`: there is no word on what is for validation."""

    layout: str
    root: Path
    read: Callable[[Entry], bytes]
    train: list[Entry] = field(default_factory=list)
    val: list[Entry] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    told: dict[tuple[int, str], tuple[int, str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    is_undivided: bool = False

    def label_of(self, name: str) -> int:
        """The label of a class, a new one where it has none."""
        return self.labels.setdefault(name, len(self.labels))

    def tell(self, label: int, wnid: str, path: str) -> None:
        """Count an image whose name tells `wnid`."""
        count, example = self.told.get((label, wnid), (0, path))
        self.told[label, wnid] = count + 1, example

    @property
    def names(self) -> list[str]:
        """The class of each label."""
        return list(self.labels)


def name_some(names: list[str]) -> str:
    """The first few names, quoted, so that a message stays one line whatever they are."""
    shown = ", ".join(repr(name) for name in names[:_NUM_NAMED])
    return f"{shown} and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else shown


def split_stem(base_name: str) -> tuple[str, str]:
    """A name without its ending, and the ending: ("a.b", ".jpg"). An image is ordered by its stem: endings differ
    between layouts."""
    stem, dot, ending = base_name.rpartition(".")
    return (stem, dot + ending) if stem else (base_name, "")


def strip_wnid(base_name: str) -> str:
    """Without the `_<wnid>` that Hugging Face's copies put behind the official name."""
    return _WNID_BEHIND.sub("", base_name)


def find_wnid(name: str, base_name: str) -> str | None:
    """The wnid that an image's original and normalised base names tell: n01440764_10026.JPEG, or the one behind."""
    if behind := _WNID_BEHIND.search(name):
        return behind[0][1:]
    before = _TRAIN_NAME.match(base_name)
    return before[1] if before else None


def _refuse_lookalikes(listing: Listing) -> None:
    """Two classes whose names differ in how accents are written alone: macOS writes two marks."""
    seen: dict[str, str] = {}
    for name in listing.labels:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise UserError(
                f"{listing.root}: the classes {other!a} and {name!a} look alike, an accent is one character "
                "here and two there; give both the same name"
            )


def check_names(listing: Listing) -> str:
    """A remark on what is said twice, and differently: images whose names tell another wnid than their class, classes
    called as another one is; "" where nothing is. Raises UserError for classes whose names look alike."""
    _refuse_lookalikes(listing)
    names, table, odd = listing.names, load_ilsvrc2012(), []
    expected = {label: name for label, name in enumerate(names) if _WNID.fullmatch(name)}
    if listing.told:  # a class that is called by its number or name should still be one wnid, and no other's
        for (label, wnid), _ in sorted(listing.told.items(), key=lambda item: -item[1][0]):
            expected.setdefault(label, wnid)
        first: dict[str, int] = {}
        for label, wnid in sorted(expected.items()):
            if (other := first.setdefault(wnid, label)) != label:
                odd.append(f"{wnid} is {names[other]!r} and {names[label]!r}")
    else:
        for entry in chain(listing.train, listing.val):
            name = entry.base_name
            if not name.startswith(expected.get(entry.label, "")) and (said := find_wnid(name, name)):
                listing.tell(entry.label, said, entry.path)
    for (label, wnid), (count, example) in sorted(listing.told.items()):
        if wnid != expected[label]:
            odd.append(f"{count:,} of class {names[label]!r} tell {wnid}, such as {example!r}")
    by_title = {title: wnid for wnid, title in table.items()}
    for wnid, title in listing.titles.items():
        if title != table.get(wnid, title) and title in by_title:
            odd.append(f"{wnid} is called {title!r}, as {by_title[title]} is")
    if not odd:
        return ""
    more = f"; and {len(odd) - _NUM_CONTRADICTIONS} more" if len(odd) > _NUM_CONTRADICTIONS else ""
    return f"names of images or classes contradict the labels: {'; '.join(odd[:_NUM_CONTRADICTIONS])}{more}"


def pick_classes(listing: Listing, subset: Path) -> None:
    """Keep the images of the classes that the file lists: one a line, `#` before a comment. Raises UserError for names
    that `listing` does not have, or none at all."""
    try:
        lines = subset.read_text(encoding="utf-8-sig").splitlines()  # with the mark that Windows puts in front
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{subset}: {reason}; expected a text file of wnids, one a line") from error
    known, wanted = {unicodedata.normalize("NFC", name): name for name in listing.labels}, []
    for line in lines:
        name = unicodedata.normalize("NFC", re.sub(r"(^|\s)#.*", "", line).strip())
        if name:
            first = name.split()[0]
            wanted.append(first if name not in known and first in known else name)  # "wnid name" is a common form
    if not wanted:
        raise UserError(f"{subset}: names no class; expected wnids, one a line")
    if unknown := sorted(set(wanted) - known.keys()):
        raise UserError(
            f"{subset}: {len(unknown)} classes that {listing.root} does not have: {name_some(unknown)}; "
            f"expected names such as {name_some(sorted(known.values())[:2])}"
        )
    picked = {known[name] for name in wanted}
    kept = [name in picked for name in listing.names]
    num_before = len(listing.train) + len(listing.val)
    listing.train = [entry for entry in listing.train if kept[entry.label]]
    listing.val = [entry for entry in listing.val if kept[entry.label]]
    num_left = num_before - len(listing.train) - len(listing.val)
    listing.remarks.append(f"{len(picked)} classes of {subset}; {num_left:,} images of other classes not used")


def take_share(listing: Listing, fraction: float, seed: int) -> None:
    """Move `fraction` of each class's training images, rounded, to validation; at least one stays for training.

    Which ones follows from seed, class and name of each image alone. Raises UserError if that leaves none.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--val-fraction {fraction}: expected a number between 0 and 1, such as 0.05")
    by_class: dict[int, list[Entry]] = {}
    for entry in listing.train:
        by_class.setdefault(entry.label, []).append(entry)
    train: list[Entry] = []
    val: list[Entry] = []
    names = listing.names
    for label, entries in by_class.items():
        salt = f"{seed} {names[label]} "

        def draw(entry: Entry, salt: str = salt) -> tuple[bytes, tuple[str, ...]]:
            key = _sort_key(entry)
            return hashlib.sha256((salt + key[0]).encode("utf-8", "surrogateescape")).digest(), key[:3]

        entries.sort(key=draw)
        num_val = min(int(len(entries) * fraction + 0.5), len(entries) - 1)
        val.extend(entries[:num_val])
        train.extend(entries[num_val:])
    if not val:
        largest = max(len(entries) for entries in by_class.values())
        raise UserError(
            f"--val-fraction {fraction}: takes no image of any class, the largest has {largest}; expected a larger "
            "share, or classes of more images"
        )
    listing.train, listing.val = train, val


def put_in_order(listing: Listing) -> tuple[tuple[str, ...], list[Entry], list[Entry]]:
    """Sorted names of the classes that have training images; train and val in canonical order with final labels.

    Raises UserError for validation images of other classes.
    """
    names = listing.names
    by_class: list[list[Entry]] = [[] for _ in names]
    for entry in listing.train:
        by_class[entry.label].append(entry)
    listing.train = []  # 1.3 million of them: not to be held twice
    classes = sorted((name, label) for label, name in enumerate(names) if by_class[label])
    final = {label: index for index, (_, label) in enumerate(classes)}
    strangers = sorted({names[entry.label] for entry in listing.val if entry.label not in final})
    if strangers:
        raise UserError(
            f"{listing.root / 'val'}: {len(strangers)} classes without training images: {name_some(strangers)}; "
            "expected the classes of train/; rename or remove them, or choose classes by --subset"
        )
    train: list[Entry] = []
    for _, label in classes:
        by_class[label].sort(key=_sort_key)
        index = final[label]
        train.extend(Entry(path, index, where) for path, _, where in by_class[label])
        by_class[label] = []
    val = [Entry(path, final[label], where) for path, label, where in listing.val]
    val.sort(key=lambda entry: (_sort_key(entry)[0], entry.label, *_sort_key(entry)))
    return tuple(name for name, _ in classes), train, val


def _sort_key(entry: Entry) -> tuple[str, str, str, tuple[int, ...]]:
    path, _, where = entry
    base_name = path.rpartition("/")[2]
    return base_name.rpartition(".")[0] or base_name, base_name, path, where
