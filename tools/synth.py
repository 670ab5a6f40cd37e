"""A synthetic ImageNet in miniature: a seeded `train/<wnid>/*.JPEG`, `val/<wnid>/*.JPEG` tree for demos and tests.

A class is a shape filled with a texture. Colours are drawn alike in all classes, so that a network has to look at form.
One file in ten is odd in one of the ways in which ImageNet's own are. None looks like a photograph.
"""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.common.errors import UserError

QUALITY = 90
SHORTER_SIDE_PX = (200, 400)
MAX_ASPECT_RATIO = 1.6
FRAME_PX = 256  # geometry is drawn in the frame of the central square, 256 units wide whatever the image's size
RADIUS_PX = (62.0, 100.0)
ODD_EVERY = 50  # one file in fifty is odd in each of these ways, at these positions
ODD_KINDS = {7: "greyscale", 17: "cmyk", 27: "progressive", 37: "exif", 47: "png"}
EXIF_ORIENTATION, EXIF_ROTATED = 0x0112, 6
_UNFINISHED = ".unfinished"
_TILE_PX = 512

Plane = NDArray[np.floating[Any]]  # float32 in practice


class _Picture(NamedTuple):
    split: str
    label: int
    position: int  # in its split, classes one after another: decides what is odd about the file
    number: int  # in its class (train) or in its split (val), as ImageNet names its files


def make_tree(
    root: str | Path,
    *,
    num_classes: int = 10,
    num_train: int = 1000,
    num_val: int = 200,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Fill the folder `root` with images; num_train and num_val are totals, spread evenly over the classes.

    The bytes depend on the arguments alone. The tree appears in `root` when it is complete, `train/` last.
    `on_progress(1)` is called after each image. Raises UserError for a destination that is not empty, for more classes
    than shapes and textures give, and for fewer training images than classes.
    """
    root = Path(root)
    max_classes = len(SHAPES) * len(TEXTURES)
    if not 1 <= num_classes <= max_classes:
        raise UserError(f"{num_classes} classes: expected 1 to {max_classes} ({len(SHAPES)} shapes x {len(TEXTURES)} "
                        "textures); ask for fewer")  # fmt: skip
    if num_train < num_classes:
        raise UserError(f"{num_train} training images for {num_classes} classes: expected at least one per class; "
                        "ask for more images or fewer classes")  # fmt: skip
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: is a file, expected a new or empty folder; choose another name")
    if root.is_dir() and any(root.iterdir()):
        raise UserError(f"{root}: not empty, expected a new or empty folder; delete it or choose another name")
    is_new = not root.is_dir()
    unfinished = root / _UNFINISHED
    unfinished.mkdir(parents=True)
    try:
        tile = _noise_tile(seed)
        for picture in _list_pictures(num_classes, num_train, num_val):
            path = unfinished / _file_name(picture)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_encode(*_paint(picture, seed, tile)))
            if on_progress:
                on_progress(1)
        for split in ("val", "train"):
            if (unfinished / split).is_dir():
                (unfinished / split).rename(root / split)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if is_new and not any(root.iterdir()):
            root.rmdir()


def _file_name(picture: _Picture) -> str:
    wnid = f"n{picture.label + 1:08d}"
    if picture.split == "train":
        return f"train/{wnid}/{wnid}_{picture.number}.JPEG"
    return f"val/{wnid}/ILSVRC2012_val_{picture.number:08d}.JPEG"


def _list_pictures(num_classes: int, num_train: int, num_val: int) -> list[_Picture]:
    pictures = []
    for split, total in (("train", num_train), ("val", num_val)):
        # Round robin: numbers of the validation set run across the classes, as ImageNet's do.
        pairs = sorted((number % num_classes, number // num_classes) for number in range(total))
        for position, (label, number) in enumerate(pairs):
            shown = number if split == "train" else number * num_classes + label + 1
            pictures.append(_Picture(split, label, position, shown))
    return pictures


def _star(u: Plane, v: Plane) -> Plane:
    outer, inner, step = 1.0, 0.42, np.pi / 5
    angle = np.abs((np.arctan2(v, u) + step) % (2 * step) - step)
    edge = outer * inner * np.sin(step) / (outer * np.sin(angle) + inner * np.sin(step - angle))
    return np.hypot(u, v) - edge


# Signed distance in units of the radius, negative inside. None is another's mirror image.
SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "disc": lambda u, v: np.hypot(u, v) - 0.85,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.75,
    "triangle": lambda u, v: np.maximum(v, np.abs(u) * 0.866 - v * 0.5) - 0.5,
    "cross": lambda u, v: np.minimum(
        np.maximum(np.abs(u) - 0.95, np.abs(v) - 0.3), np.maximum(np.abs(u) - 0.3, np.abs(v) - 0.95)
    ),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.68) - 0.22,
    "bar": lambda u, v: np.maximum(np.abs(u) - 1.0, np.abs(v) - 0.36),
    "star": _star,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.92, 0.68 - np.hypot(u - 0.45, v)),
    "trefoil": lambda u, v: np.hypot(u, v) - (0.6 + 0.38 * np.cos(3 * np.arctan2(v, u))),
    "hourglass": lambda u, v: np.maximum(np.abs(u) - 0.85, np.abs(v) - 0.95 * np.abs(u) - 0.06),
}


def _saw(x: Plane) -> Plane:
    """Distance to the nearest whole number, 0 to 0.5."""
    return np.abs(x - np.round(x))


# Negative where the first colour shows, positive where the second does, about half of the area each.
# (s, t) are pixels of the frame from the middle of the object; `tile` is smooth noise.
TEXTURES: dict[str, Callable[[Plane, Plane, Plane], Plane]] = {
    "stripes": lambda s, t, tile: np.sin(s * (2 * np.pi / 24)),
    "dots": lambda s, t, tile: 6 * (np.hypot(_saw(s / 30), _saw(t / 30)) - 0.38),
    "zigzag": lambda s, t, tile: np.sin((s + 28 * _saw(t / 36)) * (2 * np.pi / 22)),
    "checker": lambda s, t, tile: 1.5 * np.sin(s * (np.pi / 22)) * np.sin(t * (np.pi / 22)),
    "halves": lambda s, t, tile: s / 6,
    "speckle": lambda s, t, tile: tile[(s * 7).astype(np.intp) % _TILE_PX, (t * 7).astype(np.intp) % _TILE_PX],
    "grid": lambda s, t, tile: 4 * (np.minimum(_saw(s / 36), _saw(t / 36)) - 0.14),
    "rings": lambda s, t, tile: np.sin(np.hypot(s, t) * (2 * np.pi / 24)),
    "spokes": lambda s, t, tile: np.sin(np.arctan2(t, s) * 8),
    "blobs": lambda s, t, tile: 2 * tile[s.astype(np.intp) % _TILE_PX, t.astype(np.intp) % _TILE_PX],
}


def form_of(label: int) -> tuple[int, int]:
    """Indices into SHAPES and TEXTURES: every pair once, and any ten classes in a row differ in both."""
    row, shape = divmod(label, len(SHAPES))
    return shape, (shape + row) % len(TEXTURES)


def _noise_tile(seed: int) -> Plane:
    """Smooth, seamless noise of zero median and unit deviation, features about 16 px wide."""
    noise = np.random.default_rng([seed, 1]).standard_normal((_TILE_PX, _TILE_PX))
    frequency = np.hypot(np.fft.fftfreq(_TILE_PX)[:, None], np.fft.rfftfreq(_TILE_PX)[None])
    smooth = np.fft.irfft2(np.fft.rfft2(noise) * np.exp(-((frequency * 30) ** 2)), s=noise.shape)
    return ((smooth - np.median(smooth)) / smooth.std()).astype(np.float32)


def draw_colors(rng: np.random.Generator) -> NDArray[np.float32]:
    """(3, 3) RGB, 0-255: background, first and second texture colour, exchangeable, at least 50 grey levels apart."""
    levels = rng.permutation(np.array([55.0, 127.0, 200.0]) + rng.uniform(-11, 11, size=3))
    chroma = rng.normal(0, 28, size=(3, 3))
    luma = np.array([0.299, 0.587, 0.114])
    return (levels[:, None] + chroma - (chroma @ luma)[:, None]).astype(np.float32)


def _paint(picture: _Picture, seed: int, tile: Plane) -> tuple[Image.Image, str | None]:
    """The picture, and what is odd about its file."""
    rng = np.random.default_rng([seed, 2 + (picture.split == "val"), picture.label, picture.number])
    shorter = int(rng.integers(SHORTER_SIDE_PX[0], SHORTER_SIDE_PX[1] + 1))
    longer = round(shorter * rng.uniform(1.0, MAX_ASPECT_RATIO))
    height, width = (shorter, longer) if rng.random() < 0.6 else (longer, shorter)
    colors = draw_colors(rng)
    scale = FRAME_PX / shorter  # frame units per pixel
    x = ((np.arange(width) + 0.5 - width / 2) * scale).astype(np.float32)[None, :]
    y = ((np.arange(height) + 0.5 - height / 2) * scale).astype(np.float32)[:, None]

    slope = rng.normal(0, 0.09, size=2)
    ground = np.clip(slope[0] * x + slope[1] * y, -30, 30).astype(np.float32)
    pixels = colors[0][:, None, None] + ground  # planes first: three times as fast to work on

    radius = rng.uniform(*RADIUS_PX)
    reach = 0.85 * (FRAME_PX / 2 - radius)
    middle = rng.uniform(-reach, reach, size=2)
    rows = slice(*np.searchsorted(y[:, 0], [middle[1] - 1.2 * radius, middle[1] + 1.2 * radius]))
    columns = slice(*np.searchsorted(x[0], [middle[0] - 1.2 * radius, middle[0] + 1.2 * radius]))
    dx, dy = x[:, columns] - np.float32(middle[0]), y[rows] - np.float32(middle[1])
    shape, texture = form_of(picture.label)
    u, v = _rotate(dx / radius, dy / radius, rng.uniform(0, 2 * np.pi), stretch=rng.uniform(0.88, 1.14))
    distance = list(SHAPES.values())[shape](u, v)
    s, t = _rotate(dx, dy, rng.uniform(0, 2 * np.pi), stretch=rng.uniform(0.88, 1.14))
    pattern = list(TEXTURES.values())[texture](s, t, tile)
    mix = np.clip(0.5 + 3 * pattern, 0, 1)
    inside = np.clip(0.5 - distance * (radius / scale), 0, 1)
    filled = colors[1][:, None, None] + mix * (colors[2] - colors[1])[:, None, None]
    pixels[:, rows, columns] += inside * (filled - pixels[:, rows, columns])

    pixels += rng.standard_normal((height, width), dtype=np.float32) * np.float32(rng.uniform(4, 14))
    pixels += 0.5
    image = Image.fromarray(np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)))
    return image, ODD_KINDS.get(picture.position % ODD_EVERY)


def _rotate(x: Plane, y: Plane, angle: float, *, stretch: float) -> tuple[Plane, Plane]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return (x * cos + y * sin) * np.float32(stretch), (y * cos - x * sin) / np.float32(stretch)


def _encode(image: Image.Image, odd: str | None) -> bytes:
    buffer = io.BytesIO()
    if odd == "png":
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    mode = {"greyscale": "L", "cmyk": "CMYK"}.get(odd or "", "RGB")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = EXIF_ROTATED
    options: dict[str, Any] = {"exif": exif} if odd == "exif" else {}
    image.convert(mode).save(buffer, "JPEG", quality=QUALITY, progressive=odd == "progressive", **options)
    return buffer.getvalue()
