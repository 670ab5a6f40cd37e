"""Any image's bytes -> RGB pixels, or the reason why not.

libjpeg-turbo decodes every JPEG and stops at its first warning. A file that it refuses is used only if a copy with
mended headers and an end marker passes, and counts as repaired. Orientation in EXIF and colour profiles are ignored,
transparency is dropped, the first frame of an animation is taken; CMYK and YCCK are inverted where Adobe's marker is.
Pillow reads the other formats.
"""

import io
import re
import warnings
from functools import partial
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

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

# Markers of a JPEG (ITU-T T.81, annex B). Within a scan, RSTn is data.
_SOI, _EOI, _SOS, _APP0, _APP14 = b"\xff\xd8", 0xD9, 0xDA, 0xE0, 0xEE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # but for DHT, JPG, DAC
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1, 0xC9), (0xC2, 0xCA)
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD8))  # TEM, RSTn
_MARKER, _MARKER_IN_SCAN = re.compile(rb"\xff([\x01-\xfe])"), re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_ALL_COEFFICIENTS = bytes([0, 63, 0])  # what a sequential scan's parameters have to be: first, last, bits

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
    """RGB pixels (H, W, 3) uint8 of a picture of `height` x `width` pixels, decoded at 1 / `divisor`; what had to be
    repaired."""

    pixels: Pixels
    height: int
    width: int
    divisor: int
    repair: str | None


def decode(data: bytes) -> Decoded:
    """Decode an image. Raises BadImage."""
    try:
        return _decode_jpeg(data) if data.startswith(_SOI) else _decode_with_pillow(data)
    except BadImage:
        raise
    except Exception as error:  # decoders raise anything when fed broken bytes
        raise BadImage.of(error) from error


class _Markers(NamedTuple):
    """What the markers of a JPEG say, up to the end of its first picture."""

    height: int
    width: int
    num_scans: int
    has_adobe: bool
    has_end: bool
    missing: str | None  # "components": not all were sent; "bits": the lowest were not
    parts: list[bytes | memoryview]  # of a copy with an end marker, headers put right and nothing between segments
    repairs: list[str]

    @property
    def mended(self) -> bytes:
        return b"".join(self.parts)


def _decode_jpeg(data: bytes) -> Decoded:
    markers = _read_markers(data)
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):
        return _decode_unusual_jpeg(data, markers)
    check_size(width, height, markers.num_scans if markers else 1)
    repair = _check_scans(markers) if markers else None
    divisor = next((divisor for divisor in DIVISORS if min(height, width) >= MIN_DECODED_PX * divisor), 1)
    sides = {"min_height": -(-height // divisor), "min_width": -(-width // divisor)} if divisor > 1 else {}
    is_cmyk = space in ("CMYK", "YCCK")
    turbo = partial(simplejpeg.decode_jpeg, colorspace="CMYK" if is_cmyk else "RGB", min_factor=2, **sides)
    try:
        pixels = turbo(data, strict=True)
    except ValueError as error:
        warning = BadImage.of(error)
        if markers is None or not (markers.has_end or markers.missing is None):
            raise warning from error
        told = [warning.reason]
        try:
            pixels = turbo(markers.mended, strict=True)
        except ValueError as remaining:
            last = BadImage.of(remaining)
            match = _EXTRANEOUS_AT_END.search(last.reason)
            if match is None or int(match[1]) > MAX_EXTRANEOUS_BYTES:
                raise last from remaining
            # Every scan was decoded without a warning and nothing follows, so that there is no other to be missed.
            pixels = turbo(markers.mended, strict=False)
            told.append(last.reason)
        repair = "; ".join(dict.fromkeys(told + markers.repairs))
    if is_cmyk:
        pixels = cmyk_to_rgb(pixels, is_inverted=markers is not None and markers.has_adobe)
    return Decoded(pixels, height, width, divisor, repair)


def _decode_unusual_jpeg(data: bytes, markers: _Markers | None) -> Decoded:
    """A JPEG whose sampling has no name. Pillow ignores warnings: at least the markers must be in order."""
    if markers is None:
        raise BadImage("the file ends before its picture begins", "ValueError")
    check_size(markers.width, markers.height, markers.num_scans)
    repair = _check_scans(markers)
    if markers.missing:
        return _decode_with_pillow(data)._replace(repair=repair)
    return _decode_with_pillow(markers.mended)._replace(repair="; ".join(markers.repairs) or None)


def check_size(width: int, height: int, num_scans: int = 1) -> None:
    """Raises BadImage for a picture larger, or visited more often, than any real one."""
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, limit {MAX_PIXELS}", "TooManyPixels")
    if width * height * num_scans > MAX_SCANNED_PIXELS:
        raise BadImage(f"{num_scans} scans of {width} x {height} pixels, limit {MAX_SCANNED_PIXELS}", "TooManyPixels")


def _check_scans(markers: _Markers) -> str | None:
    """What to say of scans that are missing though nothing else is: libjpeg fills them in without a warning."""
    if not markers.has_end or not markers.missing:
        return None
    if markers.missing == "components":
        raise BadImage("scans are missing: not every component was sent", "MissingScans")
    return "progressive scans are missing: the lowest bits were not sent"


def _read_markers(data: bytes) -> _Markers | None:
    """Read the markers of a file that begins with SOI; None if it ends before its first scan."""
    parts, repairs, position, num_dropped, num_scans = list[bytes | memoryview]([_SOI]), list[str](), len(_SOI), 0, 0
    frame, size, adobe, has_end = 0, (0, 0), 0, False
    unsent = dict[int, bytearray]()  # of each component: bits that are still to come of each coefficient, 255 for all
    while found := _MARKER.search(data, position):
        marker, body = found[1][0], found.end()
        num_dropped += len(data[position : found.start()].rstrip(b"\xff"))  # fill bytes are part of the format
        position = body
        if has_end := marker == _EOI:
            break
        if marker in _WITHOUT_LENGTH:
            continue
        length = int.from_bytes(data[body : body + 2])
        if length < 2 or body + length > len(data):
            break
        part, position = bytearray(data[body : body + length]), body + length
        scan: bytes | memoryview = b""
        if marker in _FRAMES and not frame and length >= 8:
            frame, size = marker, (int.from_bytes(part[3:5]), int.from_bytes(part[5:7]))
            unsent = {component: bytearray([255]) * 64 for component in part[8 : 8 + 3 * part[7] : 3]}
        elif marker == _APP0 and part[2:7] == b"JFIF\0" and length >= 9 and part[7] != 1:
            repairs.append(f"JFIF revision {part[7]} read as 1")
            part[7] = 1
        elif marker == _APP14 and part[2:7] == b"Adobe" and length >= 14:
            adobe = len(parts)
        elif marker == _SOS and frame:
            num_scans += 1
            if _note_scan(frame, part, unsent):
                repairs.append("scan parameters of a sequential picture ignored")
            end = _MARKER_IN_SCAN.search(data, position)
            stop = end.start() if end else len(data)
            scan, position = memoryview(data)[position:stop], stop
        parts += [bytes([0xFF, marker]) + part, scan]
    if not num_scans:
        return None
    if num_dropped:
        repairs.append(f"{num_dropped} bytes between segments dropped")
    if not has_end:
        repairs.append("end marker supplied")
    allowed = (0, 2) if len(unsent) == 4 else (0, 1)
    if adobe and (code := parts[adobe][15]) not in allowed:
        repairs.append(f"Adobe colour transform {code} read as {allowed[1]}")
        parts[adobe : adobe + 1] = [parts[adobe][:15], bytes(allowed[1:]), parts[adobe][16:]]
    bits = b"".join(unsent.values())
    missing = "components" if 255 in bits else "bits" if any(bits) else None
    parts.append(bytes([0xFF, _EOI]))
    return _Markers(*size, num_scans, adobe > 0, has_end, missing, parts, repairs)


def _note_scan(frame: int, header: bytearray, unsent: dict[int, bytearray]) -> bool:
    """Note what a scan sends. True if a sequential scan's parameters, which decoders ignore, had to be put right."""
    at = 3 + 2 * header[2] if len(header) > 2 else 3
    if len(header) < at + 3:
        return False
    is_odd = frame in _SEQUENTIAL and header[at : at + 3] != _ALL_COEFFICIENTS
    if is_odd:
        header[at : at + 3] = _ALL_COEFFICIENTS
    first, last, bits = header[at : at + 3] if frame in _PROGRESSIVE else _ALL_COEFFICIENTS
    last = min(last, 63)
    for component in header[3:at:2]:
        if component in unsent and first <= last:
            unsent[component][first : last + 1] = bytes([bits & 15]) * (last + 1 - first)
    return is_odd


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
