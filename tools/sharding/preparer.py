"""Images' bytes -> the encoded samples that a shard holds, on the CPU or on a GPU.

The decision that shaped it: a function of a batch, whatever the device, that gives a failure back as a value. A GPU
gives other bytes than the CPU, within a grey level or so. Left out: how it is done (hostcodec.py, gpucodec.py), where
bytes come from (sources.py) and what becomes of a failure (sharder.py).
"""

from collections.abc import Callable, Sequence
from typing import Literal

from pipeline.images.decode import BadImage
from tools.sharding.gpucodec import GpuPreparer
from tools.sharding.hostcodec import Encoding, Prepared, try_prepare

Device = Literal["cpu", "gpu"]
Preparer = Callable[[Sequence[bytes]], list[Prepared | BadImage]]


def make_preparer(*, device: Device, encoding: Encoding, quality: int) -> Preparer:
    """A function from encoded images to samples in the same order; a bad image becomes its BadImage.

    It raises nothing but MemoryError. `device="gpu"` decodes, resizes and encodes on the current CUDA device and
    leaves odd files to the CPU; raises UserError without such a device.
    """
    if device == "gpu":
        return GpuPreparer(encoding=encoding, quality=quality)

    def prepare_all(contents: Sequence[bytes]) -> list[Prepared | BadImage]:
        return [try_prepare(data, encoding=encoding, quality=quality) for data in contents]

    return prepare_all
