"""How busy the GPU is, for the screen and the record.

The decision that shaped it: best effort. The memory is CUDA's own word; the utilisation needs NVML's Python module
(`pip install nvidia-ml-py`), which is no dependency: without it, that number is not shown. Left out: the GPUs of other
ranks, which do the same work.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GpuLoad:
    """utilisation: 0 to 1, None if nobody can tell; memory in use by all processes, of the total."""

    utilisation: float | None
    memory_bytes: int
    total_bytes: int


def read_gpu_load(device: torch.device) -> GpuLoad | None:
    """Of a CUDA device now; None for another device."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    try:
        utilisation = torch.cuda.utilization(device) / 100.0
    except Exception:  # noqa: BLE001 - NVML's errors have a type that can only be named where NVML is installed
        utilisation = None
    return GpuLoad(utilisation, total - free, total)
