"""Any image's bytes -> the 256x256 RGB pixels that a shard holds, or a prediction is made from.

AlexNet's preparation (paper, section 2: shorter side to 256, then the central 256x256) with torch's antialiased bicubic
filter on uint8. The same pixels come out in any process, batch and order, on any CPU.
"""

import math
from typing import NamedTuple

import numpy as np

from pipeline.images.decode import BadImage, Decoded, Pixels, decode
from pipeline.manifest import IMAGE_SIZE_PX

_SUPPORT_PX = 2  # of the bicubic filter, on each side, at scale 1


class Square(NamedTuple):
    """Pixels (256, 256, 3) uint8 RGB; `repair` says what was wrong with a file that could be used all the same."""

    pixels: Pixels
    repair: str | None


def read_square(data: bytes) -> Square:
    """Decode an image and cut it to size. Raises BadImage."""
    decoded = decode(data)
    try:
        return Square(to_square(decoded), decoded.repair)
    except RuntimeError as error:
        raise BadImage.of(error) from error


def to_square(decoded: Decoded) -> Pixels:
    """Shorter side resized to 256, longer to round(longer * 256 / shorter), cropped at (that - 256) // 2.

    Antialiased bicubic filter (a = -0.5, as Pillow's), horizontally and then vertically, rounded after each pass.
    """
    import torch

    axes = rows, columns = find_windows(decoded.height, decoded.width, decoded.divisor)
    # Columns behind the crop are not touched by the filter, and cutting them off would be a copy.
    part = np.ascontiguousarray(decoded.pixels[rows.start : rows.stop, columns.start :])
    # An axis that is to stay as long as it is torch leaves out, whatever its scale: such a one gets an output more.
    sizes = [axis.skip + IMAGE_SIZE_PX for axis in axes]
    sizes = [
        size + (length == size and axis.scale != 1)
        for size, length, axis in zip(sizes, part.shape[:2], axes, strict=True)
    ]
    # torch wants channels last: half the time. It sees them so if the batch axis is there before the permute.
    batch = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
    # The operator behind F.interpolate, which would not take both sizes and scales.
    larger = torch.ops.aten._upsample_bicubic2d_aa(batch, sizes, False, 1 / rows.scale, 1 / columns.scale)
    crop = (slice(axis.skip, axis.skip + IMAGE_SIZE_PX) for axis in axes)
    return larger[(0, slice(None), *crop)].permute(1, 2, 0).contiguous().numpy()


class Window(NamedTuple):
    """One axis: decoded pixels start:stop hold what outputs skip:skip + 256 of them need; `scale` pixels an output."""

    start: int
    stop: int
    skip: int
    scale: float


def find_windows(height: int, width: int, divisor: int = 1) -> tuple[Window, Window]:
    """The windows of rows and columns of a picture of height x width pixels, decoded at 1 / divisor."""
    shorter = min(height, width)
    return _find_window(height, shorter, divisor), _find_window(width, shorter, divisor)


def _find_window(side: int, shorter: int, divisor: int) -> Window:
    """Cut off what is outside the crop, so that the work is bounded for a picture of 1 x 50,000 pixels.

    The end is cut exactly. The start is cut only at a multiple of 256 * divisor outputs, which is a whole decoded
    pixel or, because the longer side is rounded, within a quarter of an output of one: nothing is cut there, and
    nothing shifted, up to an aspect of about 3.
    """
    resized = max(IMAGE_SIZE_PX, round(side * IMAGE_SIZE_PX / shorter))
    offset = (resized - IMAGE_SIZE_PX) // 2
    scale = side / divisor / resized
    reach = math.ceil(_SUPPORT_PX * max(scale, 1.0)) + 1  # in decoded pixels
    step = IMAGE_SIZE_PX * divisor
    first = max(0, offset - math.ceil(reach / scale)) // step * step
    stop = min(-(-side // divisor), math.ceil((offset + IMAGE_SIZE_PX) * scale) + reach)
    return Window(round(first * scale), stop, offset - first, scale)
