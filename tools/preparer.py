"""Any image's bytes -> the encoded sample that a shard holds.

The decision that shaped it: one encoder for every file, libjpeg-turbo's, behind the pipeline's own preparation of the
pixels, so that what is predicted from a file and what is trained on are the same. The same bytes come out for the same
input in any process, batch and order. A GPU gives other bytes, within a grey level or so (gpucodec.py). Left out: the
pixels (pipeline/imaging.py), where bytes come from (sources.py) and what becomes of a failure (sharder.py).
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import simplejpeg

from pipeline.decoding import BadImage, Pixels
from pipeline.imaging import read_square

Device = Literal["cpu", "gpu"]
Encoding = Literal["jpeg", "raw"]


class Prepared(NamedTuple):
    """A sample's bytes; `repair` says what was wrong with a file that could be used all the same."""

    content: bytes
    repair: str | None


Preparer = Callable[[Sequence[bytes]], list["Prepared | BadImage"]]


def make_preparer(*, device: Device, encoding: Encoding, quality: int) -> Preparer:
    """A function from encoded images to samples in the same order; a bad image becomes its BadImage.

    It raises nothing but MemoryError. `device="gpu"` decodes, resizes and encodes on the current CUDA device and
    leaves odd files to the CPU; raises UserError without such a device.
    """
    if device == "gpu":
        from tools.gpucodec import GpuPreparer

        return GpuPreparer(encoding=encoding, quality=quality)

    def prepare_all(contents: Sequence[bytes]) -> list[Prepared | BadImage]:
        return [try_prepare(data, encoding=encoding, quality=quality) for data in contents]

    return prepare_all


def try_prepare(data: bytes, *, encoding: Encoding, quality: int) -> Prepared | BadImage:
    """`prepare`, with the failure as a value."""
    try:
        return prepare(data, encoding=encoding, quality=quality)
    except BadImage as error:
        return error


def prepare(data: bytes, *, encoding: Encoding, quality: int) -> Prepared:
    """Encoded image -> baseline 4:2:0 JPEG without metadata, or 256x256x3 raw bytes (HWC, RGB). Raises BadImage."""
    pixels, repair = read_square(data)
    return Prepared(pixels.tobytes() if encoding == "raw" else encode(pixels, quality=quality), repair)


def encode(square: Pixels, *, quality: int) -> bytes:
    """(256, 256, 3) RGB -> baseline JPEG with 4:2:0 chroma and no metadata."""
    return simplejpeg.encode_jpeg(square, quality=quality, colorspace="RGB", colorsubsampling="420")
