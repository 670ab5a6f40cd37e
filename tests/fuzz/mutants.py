"""Broken files out of sound ones: what a bad cable, a full disk, a careless program or somebody of ill will makes.

A mutant is a function of its number, so that one that does harm can be made again.
"""

import io
import random
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

_TOKENS = (
    b"\0", b"\xff", b"\xff\xff", b"\x7f", b"-1", b"0", b"1e999", b"NaN", b"Infinity", b"null", b"[]", b"{}", b'"',
    b"\n", b"../", b"/etc/passwd", b"99999999999999999999", b"\xff\xd8", b"\xff\xd9", b"\xff\xda",
    b"\xff\xc2", b"\xff\xc4",
)  # fmt: skip


def mutate(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """One to eight changes: bits, bytes, numbers, pieces removed, doubled, moved, taken from elsewhere; the end cut."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        near_start = rng.random() < 0.5  # where headers are
        size = len(changed)
        at = rng.randrange(min(size, 700) if near_start else size) if size else 0
        length = min(rng.choice((1, 2, 4, 16, 64, 512, 4096)), size - at)
        match rng.randrange(9):
            case 0 if size:
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if size:
                changed[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            case 2:
                changed[at : at + length] = rng.randbytes(length)
            case 3:
                del changed[at : at + length]
            case 4:
                changed[at:at] = changed[at : at + length] * rng.choice((1, 1, 2, 50))
            case 5:
                changed[at:at] = rng.choice(_TOKENS)
            case 6:
                token = rng.choice(_TOKENS)
                changed[at : at + len(token)] = token
            case 7:
                other = rng.choice(others)
                start = rng.randrange(len(other)) if other else 0
                changed[at : at + length] = other[start : start + length]
            case _:
                if rng.random() < 0.3:
                    del changed[at:]
    return bytes(changed)


def make_jpegs(side: int = 256) -> list[bytes]:
    """Sound JPEGs of every kind that Pillow writes, side x side: samplings, grey, CMYK, progressive, restart marks."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    smooth = np.stack([127 + 100 * np.sin(x / (9 + 4 * c) + y / 23) for c in range(3)], 2) + rng.normal(
        0, 6, (side, side, 3)
    )
    picture = Image.fromarray(smooth.clip(0, 255).astype(np.uint8))
    found = []
    for mode, options in (
        ("RGB", {"quality": 90, "subsampling": 2}),
        ("RGB", {"quality": 60, "subsampling": 0}),
        ("RGB", {"quality": 75, "subsampling": 1, "progressive": True}),
        ("RGB", {"quality": 30, "restart_marker_blocks": 5}),
        ("RGB", {"quality": 90, "optimize": True, "comment": b"remark", "dpi": (72, 72)}),
        ("L", {"quality": 80}),
        ("L", {"quality": 40, "progressive": True}),
        ("CMYK", {"quality": 80}),
        ("RGB", {"quality": 90, "keep_rgb": True}),
    ):
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, "JPEG", **options)
        found.append(buffer.getvalue())
    return found


def make_others(side: int = 300) -> list[bytes]:
    """Sound files of the other formats that are read."""
    picture = Image.open(io.BytesIO(make_jpegs()[0])).resize((side, side // 2))
    found = []
    for kind, mode, options in (
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("WEBP", "RGB", {"quality": 50}),
        ("WEBP", "RGB", {"lossless": True}),
        ("TIFF", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "CMYK", {"compression": "tiff_deflate"}),
    ):
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


def list_mutants(seeds: Sequence[bytes], numbers: range) -> Iterator[tuple[int, bytes]]:
    """Mutant `number` of these seeds, whatever the range it is asked for in."""
    for number in numbers:
        rng = random.Random(f"mutant {number}")
        yield number, mutate(seeds[number % len(seeds)], seeds, rng)
