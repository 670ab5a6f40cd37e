"""Preparation on the CPU: one image's bytes -> the encoded sample that a shard holds.

The decision that shaped it: one encoder for every file, libjpeg-turbo's, behind the pipeline's own preparation of the
pixels, so that what is predicted from a file and what is trained on are the same. The same bytes come out for the same
input in any process, batch and order. Left out: the pixels (pipeline/images/), and the GPU's way (gpucodec.py).
"""

from typing import Literal, NamedTuple

import simplejpeg

from pipeline.images.decode import BadImage, Pixels
from pipeline.images.resize import read_square

Encoding = Literal["jpeg", "raw"]


class Prepared(NamedTuple):
    """A sample's bytes; `repair` says what was wrong with a file that could be used all the same."""

    content: bytes
    repair: str | None


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
