"""Names that are known beforehand: endings of image files, and the 1000 classes of ILSVRC2012."""

from functools import lru_cache
from pathlib import Path

IMAGE_ENDINGS = (".jpeg", ".jpg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")


@lru_cache(maxsize=1)
def load_ilsvrc2012() -> dict[str, str]:
    """The 1000 wnids of ILSVRC2012 in sorted order, with their names."""
    lines = Path(__file__).with_name("ilsvrc2012.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines if not line.startswith("#"))
