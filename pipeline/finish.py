"""From uint8 pixels to network input: crop, flip, colour shift, mean, scale, type. The same on every device.

The decision that shaped it: output = (pixel + shift - mean) * factor is written once, for torch. A GPU does it for the
whole batch, in one kernel where torch.compile can make one; a CPU image by image (hostfinish.py), with the same bits.
Left out: where pixels and draws come from (graph.py, hostpixels.py).
"""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.colors import ORIGINAL_DIVISOR, ColorStats
from pipeline.common.console import note
from pipeline.common.errors import UserError
from pipeline.manifest import IMAGE_SIZE_PX

CROP_SIZE_PX = 224
MAX_OFFSET_PX = IMAGE_SIZE_PX - CROP_SIZE_PX  # offsets 0..32: 33 of them, as the released source draws
CENTRE_PX = (MAX_OFFSET_PX // 2, MAX_OFFSET_PX // 2)
# Offsets (y, x) of the five views: four corners and the centre (paper, section 4.1; source: corners at 0 and 32).
FIVE_OFFSETS_PX = ((0, 0), (0, 32), (32, 0), (32, 32), CENTRE_PX)


@dataclass(frozen=True)
class Transform:
    """How a stored image becomes network input: output = (pixel + colour shift - mean) / scale.

    mean: "image" (the central 224x224 of the mean image, whatever the crop, subtracted after the flip: so does the
    source) or "channel"; lighting: "paper", "original" (which also divides by 1.1) or None; crop: random offset, else
    the centre; flip: mirror with probability 0.5; unit_variance: divide by the standard deviation of each channel;
    dtype: "float32", "float16", "bfloat16", or "uint8": cropped and flipped pixels, no arithmetic; layout: "NCHW" or
    "NHWC" in memory.
    """

    mean: str = "image"
    lighting: str | None = "paper"
    crop: bool = True
    flip: bool = True
    unit_variance: bool = False
    dtype: str = "float32"
    layout: str = "NCHW"

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[object, ...]] = {
            "mean": ("image", "channel"),
            "lighting": ("paper", "original", None),
            "dtype": ("float32", "float16", "bfloat16", "uint8"),
            "layout": ("NCHW", "NHWC"),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise UserError(f"{field} is {getattr(self, field)!r}, expected one of {', '.join(map(str, values))}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Views(NamedTuple):
    """The parts of some images that become network input, on the host: view n is of image source[n].

    source int64 (N,), offset int (N, 2) as (y, x), flip (N,) 0 or 1, shift float32 (N, 3) in grey levels, or None.
    """

    source: Tensor
    offset: Tensor
    flip: Tensor
    shift: Tensor | None = None


class Constants(NamedTuple):
    """What a transform subtracts and multiplies by, float32 (3,) and (224, 224, 3); None for nothing."""

    mean: Tensor | None
    mean_image: Tensor | None
    factor: Tensor | None

    @classmethod
    def of(cls, transform: Transform, colors: ColorStats) -> "Constants":
        if transform.dtype == "uint8":
            return cls(None, None, None)
        divisor = ORIGINAL_DIVISOR if transform.lighting == "original" else 1.0
        scale = divisor * (colors.std.clip(min=1.0) if transform.unit_variance else np.ones(3))
        top, left = CENTRE_PX
        centre = colors.mean_image[top : top + CROP_SIZE_PX, left : left + CROP_SIZE_PX]
        with_image = transform.mean == "image"
        return cls(
            mean=None if with_image else torch.from_numpy(colors.mean).float(),
            mean_image=torch.from_numpy(np.ascontiguousarray(centre)) if with_image else None,
            factor=torch.from_numpy(1 / scale).float() if (scale != 1).any() else None,
        )

    def bias(self, shift: Tensor | None) -> Tensor | None:
        """What is added to every pixel of a view: (N, 3), or (1, 3) where all views have the same."""
        if self.mean is None:
            return shift
        return -self.mean[None] if shift is None else shift - self.mean


def finish_batch(
    images: Tensor, views: Views, constants: Constants, bias: Tensor | None, dtype: torch.dtype, layout: str
) -> Tensor:
    """All views at once, (N, 3, 224, 224), on the device where everything lies. images: uint8 (M, height, width, 3).

    Plain torch, so that it can be compiled into one kernel, and run anywhere if it cannot.
    """
    steps = torch.arange(CROP_SIZE_PX, device=images.device)
    rows = views.offset[:, 0, None] + steps
    columns = views.offset[:, 1, None] + torch.where(views.flip[:, None] > 0, CROP_SIZE_PX - 1 - steps, steps)
    pixels = images[views.source[:, None, None], rows[:, :, None], columns[:, None, :]]
    if dtype != torch.uint8:
        pixels = pixels.to(torch.float32)
        if bias is not None:
            pixels = pixels + bias[:, None, None, :]
        if constants.mean_image is not None:
            pixels = pixels - constants.mean_image
        if constants.factor is not None:
            pixels = pixels * constants.factor
    pixels = pixels.to(dtype).permute(0, 3, 1, 2)
    return pixels.contiguous() if layout == "NCHW" else pixels


class GpuFinisher:
    """Finishes batches on a CUDA device: `finisher(images, views)`, see finish_batch."""

    def __init__(self, transform: Transform, colors: ColorStats, device: torch.device) -> None:
        self._transform, self._device = transform, device
        self._constants = Constants(*(_to(value, device) for value in Constants.of(transform, colors)))
        self._finish = torch.compile(finish_batch, dynamic=False) if _can_compile() else finish_batch

    def __call__(self, images: Tensor, views: Views) -> Tensor:
        views = Views(*(_to(value, self._device) for value in views))  # type: ignore[arg-type]
        arguments = (
            images,
            views,
            self._constants,
            self._constants.bias(views.shift),
            self._transform.torch_dtype,
            self._transform.layout,
        )
        try:
            return self._finish(*arguments)
        except Exception as error:  # a compiler fails in its own ways; without one the result is the same
            if self._finish is finish_batch:
                raise
            self._finish = finish_batch
            note(f"torch.compile failed ({type(error).__name__}): pixels are finished in several kernels, not in one")
            return self._finish(*arguments)


def _to(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device, non_blocking=True)


def _can_compile() -> bool:
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")  # Triton compiles its launchers
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))
