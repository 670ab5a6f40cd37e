"""The images that prepare.py and feed.py start from: somebody's photographs or a synthetic set, linked into a tree."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def make_synthetic(root: Path, num: int) -> Path:
    from tools.synth import make_tree

    if not (root / "train").is_dir():
        make_tree(root, num_train=min(num, 400), num_val=10)
    return root / "train"


def list_photographs(source: Path) -> tuple[list[Path], int]:
    """RGB and grey JPEGs under `source` in sorted order, and how many other files there are: simplejpeg has no more."""
    found, num_other = [], 0
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        try:
            with Image.open(path) as image:
                is_plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        except OSError:
            is_plain = False
        found += [path] if is_plain else []
        num_other += not is_plain
    return found, num_other


def lay_out(distinct: Sequence[Path], tree: Path, num: int, *, num_classes: int = 10) -> list[str]:
    """`num` links to the images in turn, as tree/train/<class>/<position>_<name>: their paths in order.

    With as many classes as there are distinct images, each of them is a class of its own.
    """
    shutil.rmtree(tree, ignore_errors=True)
    files = []
    for position in range(num):
        target = distinct[position % len(distinct)].absolute()
        folder = f"class{position % len(distinct) % num_classes:05d}"
        link = tree / "train" / folder / f"{position:09d}_{target.stem}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
        files.append(str(link))
    return files
