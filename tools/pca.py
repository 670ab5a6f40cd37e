"""The colour statistics of the training pixels: exact sums over every pixel, decoded as training decodes them.

Products are summed in float64 whose every partial sum is a whole number below 2^53, hence exact: the result does not
depend on batches, threads or order.
"""

from typing import Literal

import numpy as np
import torch

from pipeline.colors import ColorStats
from pipeline.common.console import Progress
from pipeline.common.errors import UserError
from pipeline.loader import read_pixels
from pipeline.manifest import IMAGE_SIZE_PX
from pipeline.shards import ShardSet

BATCH_SIZE = 64  # 64 * 65,536 pixels * 255^2 < 2^39: far from 2^53


def compute(shards: ShardSet, *, device: str, num_threads: int, progress: Progress) -> ColorStats:
    """Mean, covariance, eigenbasis and mean image of all training pixels of `shards`.

    device: "cpu", "gpu", or "auto" (a GPU where one is visible). Raises UserError if there is no training image, or if
    a shard gives fewer samples than its manifest says.
    """
    num_samples = shards.num_samples("train")
    if not num_samples:
        raise UserError(f"{shards.root}: no training images to compute colours from")
    products = torch.zeros((3, 3), dtype=torch.int64)
    image_sum = torch.zeros((IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), dtype=torch.int64)
    num_seen = 0
    on: Literal["cpu", "gpu"] = "cpu"
    if device == "gpu" or (device == "auto" and torch.cuda.is_available()):
        on = "gpu"
    for images, _ in read_pixels(shards, batch_size=BATCH_SIZE, device=on, num_threads=num_threads):
        products += sum_products(images).cpu()
        image_sum += images.sum(dim=0, dtype=torch.int32).cpu()
        num_seen += len(images)
        progress.advance(len(images))
    if num_seen != num_samples:
        raise UserError(f"{shards.root}: read {num_seen} training images, expected {num_samples}; shard again")
    return ColorStats.from_sums(num_seen, products.tolist(), image_sum.numpy().astype(np.int64), shards.fingerprint)


def sum_products(images: torch.Tensor) -> torch.Tensor:
    """Sums of c_i * c_j over all pixels of uint8 (B, H, W, 3): int64 (3, 3), exact."""
    total = torch.zeros((3, 3), dtype=torch.float64, device=images.device)
    for image in images:  # one image at a time stays in the cache
        pixels = image.reshape(-1, 3).to(torch.float64)
        total += pixels.T @ pixels
    return total.to(torch.int64)
