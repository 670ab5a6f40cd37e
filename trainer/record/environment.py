"""What a run ran on and with: environment.json, what its last bits depend on, and how busy the GPU is."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from trainer.kernels.native import load_native

_PROGRAM_TIMEOUT_S = 10.0


def environment() -> dict[str, Any]:
    """What the run ran on and with, for environment.json: versions, hardware, commit, command, time. No host name."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpus else None
    source = Path(__file__).resolve().parents[2]
    git = ("git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "git_commit": _output(*git) if (source / ".git").exists() else None,
        "python": platform.python_version(),
        "alexnet_dali": _version("alexnet-dali"),
        "torch": torch.__version__,
        "dali": _version("nvidia-dali-cuda120"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda,
        "os": platform.platform(),
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "gpu_driver": driver.splitlines()[0] if driver else None,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a program prints, or None: the record is best effort, and training does not fail for want of it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROGRAM_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() or None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def list_arithmetic(device: torch.device) -> dict[str, str]:
    """What the last bits of a step depend on besides weights, samples and draws; of a GPU nothing, whose bits vary."""
    if device.type == "cuda":
        return {}
    return {
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "LRN": "torch's operations" if load_native() is None else "compiled C",
    }


def find_changes(before: dict[str, str], device: torch.device) -> str:
    """How the arithmetic of a resumed run differs from `before`, in words; empty if it does not."""
    now = list_arithmetic(device)
    changed = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{name}: {before[name]} before, {now[name]} now" for name in changed)


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
