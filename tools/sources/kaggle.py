"""ImageNet as Kaggle's object localisation challenge unpacks: ILSVRC/Data/CLS-LOC/, its labels in LOC_*.csv and .txt.

val/ that somebody has sorted into class folders is taken as it lies.
"""

import csv
import re
from functools import partial
from pathlib import Path

from pipeline.common.errors import UserError
from tools.sources.folder import add_train, add_val, list_images, list_split, read_file, remark_ignored
from tools.sources.listing import Entry, Listing, name_some, split_stem

EXPECTED = (
    "SOURCE/ILSVRC/Data/CLS-LOC/{train/<wnid>,val}/, SOURCE/LOC_val_solution.csv and SOURCE/LOC_synset_mapping.txt"
)
_SOLUTION, _MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_DOWN = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
_NUM_FOLDERS_UP = 3  # CLS-LOC/ lies that deep


def find(root: Path) -> Path | None:
    """The CLS-LOC folder in `root` or, by its name, `root` itself."""
    for folder in _DOWN:
        if (root / folder / "train").is_dir():
            return root / folder
    return root if root.name == "CLS-LOC" and (root / "train").is_dir() else None


def scan(root: Path, remarks: list[str] | None = None) -> Listing:
    """List the CLS-LOC folder `root`. Raises UserError where labels are missing or do not fit the images."""
    listing = Listing("kaggle", root, partial(read_file, root), remarks=[] if remarks is None else remarks)
    add_train(listing, "train")
    if mapping := _find_list(root, _MAPPING):
        listing.titles = read_mapping(mapping)
    else:
        listing.remarks.append(f"{_MAPPING} not found: classes have the names that come with this project")
    if (root / "val").is_dir():
        _add_val(listing)
    if (root / "test").is_dir():
        listing.remarks.append("test/ not used: its images have no labels")
    return listing


def _find_list(root: Path, name: str) -> Path | None:
    folders = [root, *root.absolute().parents[:_NUM_FOLDERS_UP]]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _add_val(listing: Listing) -> None:
    root = listing.root
    files, others = list_images(root / "val")
    if not files:
        folders, ignored = list_split(root / "val")
        if not any(folders.values()):
            raise UserError(f"{root / 'val'}: holds no image, expected {EXPECTED}")
        add_val(listing, folders, ignored)
        return
    solution = _find_list(root, _SOLUTION)
    if solution is None:
        raise UserError(
            f"{root / 'val'}: {len(files)} images and no {_SOLUTION} there or up to {_NUM_FOLDERS_UP} folders above "
            f"{root}; it has their labels: fetch it from Kaggle and put it beside ILSVRC/"
        )
    wnids = read_solution(solution)
    unlabelled = sorted(file for file in files if split_stem(file)[0] not in wnids)
    if unlabelled:
        raise UserError(
            f"{solution}: no label for {len(unlabelled)} of the {len(files)} images of {root / 'val'}: "
            f"{name_some(unlabelled)}; expected a row each, fetch the file again"
        )
    remark_ignored(listing, "val", others, "val/")
    listing.val = [Entry(f"val/{file}", listing.label_of(wnids[split_stem(file)[0]])) for file in files]
    if num_absent := len(wnids) - len(files):
        listing.remarks.append(f"val: {num_absent} images of {_SOLUTION} are not there")


def read_solution(path: Path) -> dict[str, str]:
    """Wnid by image id, from rows "ILSVRC2012_val_00048981,n03995372 85 1 499 272"; all boxes of an image agree."""
    wnids: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if header[:2] != ["ImageId", "PredictionString"]:
                raise UserError(f"{path}: begins with {header!r}, expected ImageId,PredictionString; fetch it again")
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                words = row[1].split() if len(row) == 2 else []
                if not words or not re.fullmatch(r"[^\s/]+", words[0]) or len(set(words[0::5])) != 1:
                    raise UserError(f"{where}: {','.join(row)!r}, expected an image id and one wnid with boxes")
                if wnids.setdefault(row[0], words[0]) != words[0]:
                    raise UserError(
                        f"{where}: {row[0]!r} is {words[0]!r} here and {wnids[row[0]]!r} before, expected one class; "
                        "fetch it again"
                    )
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error}); fetch it again") from error
    return wnids


def read_mapping(path: Path) -> dict[str, str]:
    """Name by wnid, from lines "n01440764 tench, Tinca tinca"."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; fetch it again") from error
    for number, line in enumerate(lines, start=1):
        if line and " " not in line:
            raise UserError(f"{path}, line {number}: {line!r}, expected a wnid and a name; fetch it again")
    return dict(line.split(" ", 1) for line in lines if line)
