"""One image, bytes to JPEG bytes, by each library that prepare.py races: shorter side to 256, central 256x256, 4:2:0.

Libraries are imported in the process that uses them, so that one that is missing is one contestant less.
"""
# mypy: disable-error-code="import-not-found,import-untyped"

import io
from collections.abc import Callable

SIZE_PX = 256
QUALITY = 90
Encode = Callable[[bytes], bytes | None]


def _sizes(width: int, height: int) -> tuple[int, int, int, int]:
    """Resized width and height, then the crop's left and top."""
    shorter = min(width, height)
    wide, high = (max(SIZE_PX, round(side * SIZE_PX / shorter)) for side in (width, height))
    return wide, high, (wide - SIZE_PX) // 2, (high - SIZE_PX) // 2


def make_simplejpeg() -> Encode:
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)

    def prepare(data: bytes) -> bytes:
        pixels = simplejpeg.decode_jpeg(data, "RGB")
        wide, high, left, top = _sizes(pixels.shape[1], pixels.shape[0])
        small = cv2.resize(pixels, (wide, high), interpolation=cv2.INTER_AREA)
        square = small[top : top + SIZE_PX, left : left + SIZE_PX].copy()
        return simplejpeg.encode_jpeg(square, QUALITY, "RGB", "420")

    return prepare


def make_opencv() -> Encode:
    import cv2
    import numpy as np

    cv2.setNumThreads(1)

    def prepare(data: bytes) -> bytes:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        wide, high, left, top = _sizes(pixels.shape[1], pixels.shape[0])
        small = cv2.resize(pixels, (wide, high), interpolation=cv2.INTER_AREA)
        square = small[top : top + SIZE_PX, left : left + SIZE_PX]
        return cv2.imencode(".jpg", square, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()

    return prepare


def make_pillow() -> Encode:
    from PIL import Image

    def prepare(data: bytes) -> bytes:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        wide, high, left, top = _sizes(*image.size)
        small = image.resize((wide, high), Image.Resampling.LANCZOS)
        square = small.crop((left, top, left + SIZE_PX, top + SIZE_PX))
        buffer = io.BytesIO()
        square.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
        return buffer.getvalue()

    return prepare


def make_pyvips() -> Encode:
    import os

    os.environ["VIPS_CONCURRENCY"] = "1"
    import pyvips

    def prepare(data: bytes) -> bytes:
        square = pyvips.Image.thumbnail_buffer(
            data, SIZE_PX, height=SIZE_PX, crop="centre", size="both", no_rotate=True
        ).colourspace("srgb")
        return square.jpegsave_buffer(Q=QUALITY, keep="none", subsample_mode="on")

    return prepare


def make_decode_only() -> Encode:
    import simplejpeg

    def prepare(data: bytes) -> None:
        simplejpeg.decode_jpeg(data, "RGB")

    return prepare


def make_decode_and_encode() -> Encode:
    import numpy as np
    import simplejpeg

    def prepare(data: bytes) -> bytes:
        pixels = simplejpeg.decode_jpeg(data, "RGB")
        height, width = pixels.shape[:2]
        left, top = max(0, width - SIZE_PX) // 2, max(0, height - SIZE_PX) // 2
        square = np.ascontiguousarray(pixels[top : top + SIZE_PX, left : left + SIZE_PX])
        return simplejpeg.encode_jpeg(square, QUALITY, "RGB", "420")

    return prepare
