"""Any image's bytes -> RGB pixels, or the reason why not.

libjpeg-turbo, told to stop at its first warning, decodes every JPEG; a file that it objects to is used only if a copy
mended in its headers passes, and then counts as repaired. Orientation in EXIF and colour profiles are ignored,
transparency is dropped, the first frame of an animation is taken, CMYK and YCCK are read by Adobe's convention
(inverted) where Adobe's marker is, else as ink. Pillow reads the other formats.
"""

import io
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.images.jpegfile import SOI, SOS, Survey, is_plain, survey
from pipeline.manifest import IMAGE_SIZE_PX

# A file of more pixels is refused from its header, before anything is decoded. ImageNet's largest has about 20 million.
MAX_PIXELS = 150_000_000
# Each scan of a progressive JPEG visits all its pixels, however few bytes it has. Encoders make about ten scans.
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
# Bytes left over between the picture and the end marker; more than that is a scan read out of step.
MAX_EXTRANEOUS_BYTES = 1024
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
# A JPEG is decoded at 1/8, 1/4 or 1/2 if its shorter side still has this many pixels then (1.5 times the target).
MIN_DECODED_PX = IMAGE_SIZE_PX * 3 // 2
DIVISORS = (8, 4, 2)
_MAX_16_BIT = 65535
_EXTRANEOUS_AT_END = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_OUT_OF_MEMORY = re.compile("Insufficient memory|[Cc]an't allocate memory")

Pixels = NDArray[np.uint8]


class BadImage(Exception):
    """An image that cannot be used: the reason in words, and the name of the exception behind it."""

    def __init__(self, reason: str, exception: str) -> None:
        super().__init__(reason, exception)
        self.reason, self.exception = reason, exception

    def __str__(self) -> str:
        return f"{self.reason} ({self.exception})"

    @classmethod
    def of(cls, error: Exception) -> "BadImage":
        """The failure behind a decoder's exception; raises MemoryError if that is what it was."""
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            raise MemoryError(str(error)) from error  # a machine out of memory is no fault of the image's
        return cls(" ".join(str(error).split()) or "cannot be decoded", type(error).__name__)


class Decoded(NamedTuple):
    """RGB pixels (H, W, 3) uint8 of a picture of `height` x `width` pixels, decoded at 1 / `divisor`."""

    pixels: Pixels
    height: int
    width: int
    divisor: int
    repair: str | None


def decode(data: bytes) -> Decoded:
    """Decode an image; `repair` says what had to be mended. Raises BadImage."""
    try:
        return _decode_jpeg(data) if data.startswith(SOI) else _decode_with_pillow(data)
    except BadImage:
        raise
    except Exception as error:  # decoders raise anything when fed broken bytes
        raise BadImage.of(error) from error


def _decode_jpeg(data: bytes) -> Decoded:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):
        return _decode_unusual_jpeg(data)
    has_one_scan, is_cmyk = is_plain(data), space in ("CMYK", "YCCK")
    check_size(width, height, 1 if has_one_scan else data.count(SOS))
    found = survey(data) if is_cmyk or not has_one_scan else None
    repair = _check_scans(found) if found else None
    divisor = next((divisor for divisor in DIVISORS if min(height, width) >= MIN_DECODED_PX * divisor), 1)
    sides = {"min_height": -(-height // divisor), "min_width": -(-width // divisor)} if divisor > 1 else {}
    turbo = partial(simplejpeg.decode_jpeg, colorspace="CMYK" if is_cmyk else "RGB", min_factor=2, **sides)
    try:
        pixels = turbo(data, strict=True)
    except ValueError as error:
        pixels, repair = _decode_mended(found or survey(data), error, turbo)
    if is_cmyk:
        pixels = cmyk_to_rgb(pixels, is_inverted=found is not None and found.adobe is not None)
    return Decoded(pixels, height, width, divisor, repair)


def check_size(width: int, height: int, num_scans: int = 1) -> None:
    """Raises BadImage for a picture larger, or visited more often, than any real one."""
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, limit {MAX_PIXELS}", "TooManyPixels")
    if width * height * num_scans > MAX_SCANNED_PIXELS:
        raise BadImage(f"{num_scans} scans of {width} x {height} pixels, limit {MAX_SCANNED_PIXELS}", "TooManyPixels")


def _check_scans(found: Survey) -> str | None:
    """What to say of scans that are missing though nothing else is: libjpeg fills them in without a warning."""
    if not found.has_end or found.is_complete:
        return None
    if not found.is_begun:
        raise BadImage("scans are missing: not every component was sent", "MissingScans")
    return "progressive scans are missing: the lowest bits were not sent"


def _decode_mended(found: Survey | None, error: ValueError, turbo: Callable[..., Pixels]) -> tuple[Pixels, str]:
    """Pixels and repair of a file that the strict decoder refused with `error`."""
    warning = BadImage.of(error)
    if found is None or not (found.has_end or found.is_complete):
        raise warning from error
    try:
        return turbo(found.mended, strict=True), "; ".join([warning.reason, *found.repairs])
    except ValueError as remaining:
        last = BadImage.of(remaining)
        match = _EXTRANEOUS_AT_END.search(last.reason)
        if match is None or int(match[1]) > MAX_EXTRANEOUS_BYTES:
            raise last from remaining
    # Every scan was decoded without a warning and nothing follows, so that there is no other to be missed.
    return turbo(found.mended, strict=False), "; ".join(dict.fromkeys([warning.reason, last.reason, *found.repairs]))


def _decode_unusual_jpeg(data: bytes) -> Decoded:
    """A JPEG whose sampling has no name. Pillow ignores warnings: at least the markers must be in order."""
    found = survey(data)
    if found is None:
        raise BadImage("the file ends before its picture begins", "ValueError")
    check_size(found.width, found.height, data.count(SOS))
    repair = _check_scans(found)
    if not found.is_complete:
        return _decode_with_pillow(data)._replace(repair=repair)
    return _decode_with_pillow(found.mended)._replace(repair="; ".join(found.repairs) or None)


def cmyk_to_rgb(pixels: Pixels, *, is_inverted: bool) -> Pixels:
    """(H, W, 4) -> (H, W, 3): what the inks let through of white paper, rounded; inverted inks are that already."""
    light = (pixels if is_inverted else 255 - pixels).astype(np.uint16)
    return ((light[..., :3] * light[..., 3:] + 127) // 255).astype(np.uint8)


def _decode_with_pillow(data: bytes) -> Decoded:
    if not data:
        raise BadImage("the file is empty", "UnidentifiedImageError")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata of files that decode is not news
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise BadImage(f"not one of {', '.join(FORMATS)}", type(error).__name__) from error
        check_size(*image.size)
        pixels = np.array(_to_8_bit(image).convert("RGB"))
    height, width, _ = pixels.shape
    return Decoded(pixels, height, width, 1, None)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Decode to a mode that converts to RGB as it should: no palette, no transparency, 16 bits scaled to 8."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > _MAX_16_BIT:
            raise BadImage("pixel values beyond 16 bits", "UnsupportedMode")
        return Image.fromarray(((values * 255 + _MAX_16_BIT // 2) // _MAX_16_BIT).astype(np.uint8))
    if image.mode == "P":
        return image.convert("RGBA")  # by way of RGBA the transparent colour keeps its palette entry
    if image.mode in ("1", "L", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"):
        return image
    raise BadImage(f"pixel mode {image.mode} is not supported", "UnsupportedMode")
