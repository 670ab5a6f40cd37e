"""Any image's bytes -> the 256x256 RGB JPEG that a shard holds.

The decision that shaped it: AlexNet's preparation exactly (paper, section 2: shorter side to 256, then the central
256x256), with an antialiased filter, and one way of doing it for every file. ImageNet's oddities get the reading that
everyone's ImageNet has: EXIF orientation and colour profiles are ignored, transparency is dropped, the first frame of
an animation is taken, CMYK and YCCK JPEGs are read by Adobe's convention (inverted). Left out: where bytes come from
(sources.py) and what becomes of a failure (sharder.py).
"""

import io
import warnings

import numpy as np
from PIL import Image

from pipeline.shardset import IMAGE_SIZE_PX

# A file of more pixels is refused from its header, before anything is decoded. ImageNet's largest has about 20 million.
MAX_PIXELS = 150_000_000
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as the result is still this many times the target.
MIN_DECODED_SCALE = 2
_MAX_16_BIT = 65535


class BadImage(Exception):
    """An image that cannot be used: the reason in words, and the name of the exception behind it."""

    def __init__(self, reason: str, exception: str) -> None:
        super().__init__(reason, exception)
        self.reason, self.exception = reason, exception

    def __str__(self) -> str:
        return f"{self.reason} ({self.exception})"


def prepare(data: bytes, *, quality: int) -> bytes:
    """Encoded image -> baseline 4:2:0 JPEG of 256x256 RGB pixels without metadata. Raises BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata of files that decode is not news
            return encode(to_square(data), quality=quality)
    except (BadImage, MemoryError):  # a machine out of memory is no fault of the image's
        raise
    except Exception as error:  # decoders raise anything when fed broken bytes
        reason = " ".join(str(error).split()) or "cannot be decoded"
        # Pillow names the memory address of the stream.
        raise BadImage(reason.partition(" <_io.")[0], type(error).__name__) from error


def to_square(data: bytes) -> Image.Image:
    """Encoded image -> RGB, shorter side resized to 256 (Lanczos, antialiased), central 256x256.

    The longer side becomes round(longer * 256 / shorter) and the crop starts at (that - 256) // 2. Only the pixels in
    the crop are computed. That is as near to an exact Lanczos filter as resizing all and then cropping (55 dB on
    photographs), but not bit by bit the same: Pillow rounds between its two passes and picks their order by cost.
    """
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, limit {MAX_PIXELS}", "TooManyPixels")
    least = IMAGE_SIZE_PX * MIN_DECODED_SCALE
    drafted = image.draft(None, (least, least))  # None for formats other than JPEG
    extent = drafted[1][2:] if drafted else image.size  # of the picture inside the decoded pixels; need not be whole
    shorter = min(width, height)
    resized = [max(IMAGE_SIZE_PX, round(side * IMAGE_SIZE_PX / shorter)) for side in (width, height)]
    left, top = ((side - IMAGE_SIZE_PX) // 2 for side in resized)
    x_scale, y_scale = extent[0] / resized[0], extent[1] / resized[1]
    box = (left * x_scale, top * y_scale, (left + IMAGE_SIZE_PX) * x_scale, (top + IMAGE_SIZE_PX) * y_scale)
    plain = to_8_bit(image)
    square = plain.resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX), Image.Resampling.LANCZOS, box=box)
    return square.convert("RGB")


def to_8_bit(image: Image.Image) -> Image.Image:
    """Decode to mode L or RGB, the two that can be filtered: no palette, no transparency, 16 bits scaled to 8."""
    if image.mode in ("L", "RGB"):
        image.load()
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > _MAX_16_BIT:
            raise BadImage("pixel values beyond 16 bits", "UnsupportedMode")
        return Image.fromarray(((values * 255 + _MAX_16_BIT // 2) // _MAX_16_BIT).astype(np.uint8))
    if image.mode == "P":
        return image.convert("RGBA").convert("RGB")  # by way of RGBA the transparent colour keeps its palette entry
    if image.mode in ("LA", "RGBA", "RGBX", "PA", "CMYK", "YCbCr"):
        return image.convert("RGB")
    raise BadImage(f"pixel mode {image.mode} is not supported", "UnsupportedMode")


def encode(image: Image.Image, *, quality: int) -> bytes:
    """RGB image -> baseline JPEG with 4:2:0 chroma and no metadata; the same bytes for the same pixels."""
    image.info.clear()  # a comment would be carried over
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()
