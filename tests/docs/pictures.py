"""What the tests of preparation share: pictures of known content, files of them, and how near two pictures are."""

import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipeline.images.resize import read_square
from tests import oracle

SIDE = 256


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colourful picture, so that lossy coding and filters change little."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = rng.uniform(0.5, 3, size=(3, 2))
    planes = [127 + 110 * np.sin(a * 6 * x / width + b * 6 * y / height) for a, b in waves]
    return Image.fromarray(np.stack(planes, axis=2).round().astype(np.uint8))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """The hardest picture there is: every pixel and channel for itself."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8))


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 as Pillow decodes an encoded image."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


class Raw(NamedTuple):
    """The prepared pixels as bytes, which can be compared; what was repaired."""

    content: bytes
    repair: str | None


def prepare_raw(data: bytes) -> Raw:
    pixels, repair = read_square(data)
    return Raw(pixels.tobytes(), repair)


def square(data: bytes) -> np.ndarray:
    """(256, 256, 3) float64: the prepared pixels."""
    return np.frombuffer(prepare_raw(data).content, np.uint8).reshape(SIDE, SIDE, 3).astype(np.float64)


def distance(data: bytes, expected: Image.Image) -> float:
    """Mean difference in grey levels between `data` prepared and `expected` through the slow exact filter."""
    return float(np.abs(square(data) - oracle.central_square(np.asarray(expected.convert("RGB")))).mean())


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Decibels, for grey levels 0-255; 99 if equal."""
    error = ((one.astype(np.float64) - other.astype(np.float64)) ** 2).mean()
    return float(10 * np.log10(255**2 / error)) if error else 99.0
