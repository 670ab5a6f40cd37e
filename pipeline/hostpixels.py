"""A batch's pixels on the host: JPEGs that the graph read are decoded here, uncompressed ones are read by their offset.

The decision that shaped it: the cores decode with libjpeg-turbo itself, in the threads that go on to crop and convert,
not in a graph. It takes three quarters of the time of DALI's decoder for the same bits (which are Pillow's), the pixels
are still in the core's cache for what follows, and an image that cannot be decoded has a name. Left out: what is done
to the pixels (hostfinish.py), and decoding with a GPU (graph.py).
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.graph import Feed
from pipeline.manifest import IMAGE_SIZE_PX
from pipeline.shards import ShardSet
from pipeline.stored import ROW_BYTES, SAMPLE_BYTES, SAMPLE_SHAPE, SampleTable

# Fill rows uint8 (n, 256, 3) with those of the i-th image of a batch from row `top` on.
ReadRows = Callable[[int, NDArray[np.uint8], int], None]


class HostPixels:
    """Pixels of batches: `begin(outputs, keys)` gives what reads them. For graphs that decode on "host" or "stored"."""

    def __init__(self, shards: ShardSet, feed: Feed) -> None:
        """Raises UserError for a damaged index."""
        self._shards, self._feed = shards, feed
        self.is_raw = shards.manifest.encoding == "raw"
        self.table = SampleTable(shards, feed.split) if feed.decode == "stored" else None
        self._local = threading.local()

    def begin(self, outputs: Mapping[str, Any], keys: Tensor) -> ReadRows:
        """For a batch of a graph's. Raises UserError for keys that no index has; so does what is given, for images."""
        if self.table is None:
            encoded = outputs["encoded"]
            return lambda i, rows, top: self._decode(np.asarray(encoded[i]), keys, i, rows, top)
        table, positions = self.table, self.find(keys)
        if self.is_raw:
            return lambda i, rows, top: table.read_into(positions[i], rows.reshape(-1), top * ROW_BYTES)
        return lambda i, rows, top: self._decode(table.read(positions[i]), keys, i, rows, top)

    def find(self, keys: Tensor) -> list[int]:
        """Positions in the table of samples, for a "stored" graph."""
        assert self.table is not None
        return self.table.find(keys.numpy())

    def scratch(self) -> tuple[Tensor, NDArray[np.uint8]]:
        """An image (256, 256, 3) of this thread's own, to be overwritten: as a tensor, and as an array."""
        if not hasattr(self._local, "image"):
            # libjpeg-turbo stores past the caches what begins at a multiple of 32, and this is read at once.
            memory = np.empty(SAMPLE_BYTES + 32, np.uint8)
            start = (16 - memory.ctypes.data) % 32
            array = memory[start : start + SAMPLE_BYTES].reshape(SAMPLE_SHAPE)
            self._local.image = (torch.from_numpy(array), array)
        return self._local.image

    def refuse(self, key: int, reason: str) -> UserError:
        """The error of an image that cannot be decoded."""
        tar = SampleTable(self._shards, self._feed.split).find_tar(key)
        return UserError(
            f"{tar}: sample {key:09d} cannot be decoded ({reason}); list all such with `alexnet-prep verify --decode "
            f"--shards {self._shards.root}`, then make the shards again"
        )

    def _decode(self, data: NDArray[np.uint8], keys: Tensor, i: int, rows: NDArray[np.uint8], top: int) -> None:
        image = rows if len(rows) == IMAGE_SIZE_PX else self.scratch()[1]
        try:
            decode_into(data, image)
        except ValueError as error:
            raise self.refuse(int(keys[i]), str(error)) from error
        if image is not rows:
            rows[...] = image[top : top + len(rows)]


def decode_into(data: NDArray[np.uint8], image: NDArray[np.uint8]) -> None:
    """The pixels of a JPEG of 256x256 into `image` uint8 (256, 256, 3), contiguous. Raises ValueError for any other."""
    pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=image)  # all of it, exactly: a broken end is an error
    if pixels.shape != SAMPLE_SHAPE:
        raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} px, expected {IMAGE_SIZE_PX}x{IMAGE_SIZE_PX}")
