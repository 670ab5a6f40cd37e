"""`alexnet-prep doctor`: whether this machine can do the work, and what is missing.

The decision that shaped it: facts are gathered first, anything that may hang or crash in a process of its own
(probes.py), and judged afterwards (verdicts.py). This file runs as that process: `python -m
tools.checks.doctor PROBE`. Left out: mending anything.
"""

import importlib.util
import json
import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.checks import probes
from tools.checks.probes import Facts
from tools.checks.verdicts import Check, judge

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EXTRAS = {
    "ray": ("ray",),
    "parquet": ("pyarrow",),
    "s3": ("fsspec", "s3fs"),
    "onnx": ("onnx", "onnxruntime"),
    "tensorboard": ("tensorboard",),
}
_JPEG_SIZE_PX = 64
_LARGEST_DIFFERENCE = 3.0  # grey levels, mean over pixels: a smooth image survives JPEG nearly unharmed


def examine(shards: str) -> list[Check]:
    """Every check, in the order of the machine from below: platform, memory, driver, libraries, disk."""
    return list(judge(gather(shards)))


def gather(shards: str) -> Facts:
    """All facts. Takes some seconds; never longer than the probes' time limits."""
    driver = probes.find_driver()
    if driver.get("gpus"):
        driver |= {"cuda": probes.ask("cuda", timeout_s=30.0).get("cuda")}
    torch = probes.ask("torch")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    return {
        "platform": {"system": platform.system(), "machine": platform.machine(), "python": sys.version_info[:3]},
        "cpu": {"cores": len(os.sched_getaffinity(0)), **_read_cpu()},
        "memory": _read_memory(),
        "shm_bytes": shm.f_frsize * shm.f_blocks if shm else None,
        "open_files": limit[0],
        "driver": driver,
        "hidden_by": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "torch": torch,
        "dali": probes.ask("dali", "gpu" if torch.get("gpus") else "cpu"),
        "extras": {extra: [name for name in names if not _is_installed(name)] for extra, names in EXTRAS.items()},
        "shards": {"folder": shards, **({} if "://" in shards else probes.ask("shards", shards, timeout_s=60.0))},
    }


def _read_cpu() -> Facts:
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return {"model": fields.get("model name", "unknown"), "flags": fields.get("flags", "").split()}


def _read_memory() -> Facts:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    available = os.sysconf("SC_AVPHYS_PAGES") * page
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024  # free and what the cache would give back
    return {"total_bytes": total, "available_bytes": available}


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def probe_dali(where: str) -> Facts:
    """DALI's version, the codecs beside it, which decoders really decode a JPEG ("cpu", with a GPU "mixed"), whether
    the GPU's left it to the CPU, and whether our own operators can be compiled."""
    from nvidia import nvimgcodec

    from pipeline.operators import load_operators

    jpeg, pixels = make_jpeg()
    devices = ["cpu", "mixed"] if where == "gpu" else ["cpu"]
    found = {device: _try_decoding(device, jpeg, pixels) for device in devices}
    folder = Path(nvimgcodec.__path__[0]) / "extensions"
    names = sorted({file.name.split(".")[0].removeprefix("lib").removesuffix("_ext") for file in folder.glob("*.so*")})
    return {
        "version": version("nvidia-dali-cuda120"),
        "nvimgcodec": nvimgcodec.__version__,
        "extensions": names,
        "decoded": {device: said if isinstance(said, str) else None for device, said in found.items()},
        "fell_back": where == "gpu" and fell_back(found["cpu"], found["mixed"]),
        "operators": load_operators(),
        "hardware": _has_hardware_decoder(jpeg) if where == "gpu" else None,
    }


def make_jpeg() -> "tuple[bytes, NDArray[np.uint8]]":
    """A small picture, smooth with a grain that no two decoders round alike, as JPEG and as pixels (64, 64, 3)."""
    import io

    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:_JPEG_SIZE_PX, 0:_JPEG_SIZE_PX] * (250.0 / _JPEG_SIZE_PX)
    grain = np.random.default_rng(0).integers(0, 5, (_JPEG_SIZE_PX, _JPEG_SIZE_PX, 3))
    pixels = (np.stack([x, y, (x + y) / 2], axis=-1) + grain).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue(), pixels


def fell_back(cpu: "NDArray[np.uint8] | str", mixed: "NDArray[np.uint8] | str") -> bool:
    """Whether pixels of the GPU's decoder are the CPU's to the bit: DALI hands over to the CPU without a word, and two
    decoders do not round alike."""
    return not isinstance(cpu, str) and not isinstance(mixed, str) and bool((cpu == mixed).all())


def _try_decoding(device: str, jpeg: bytes, pixels: "NDArray[np.uint8]") -> "NDArray[np.uint8] | str":
    """The picture as DALI's decoder on `device` gives it back, or what went wrong."""
    import numpy as np
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    encoded = np.frombuffer(jpeg, np.uint8)
    try:
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None if device == "cpu" else 0)
        with pipeline:
            source = fn.external_source(lambda: [encoded])
            pipeline.set_outputs(fn.decoders.image(source, device=device, output_type=types.RGB))
        pipeline.build()
        (output,) = pipeline.run()
        decoded = np.asarray((output if device == "cpu" else output.as_cpu()).at(0))
    except RuntimeError as error:
        return " ".join(str(error).split())[:300]
    if decoded.shape != pixels.shape:
        return f"decoded to shape {decoded.shape}, expected {pixels.shape}"
    difference = float(np.abs(decoded.astype(np.int64) - pixels).mean())
    return decoded if difference <= _LARGEST_DIFFERENCE else f"decoded pixels are {difference:.1f} grey levels off"


def _has_hardware_decoder(jpeg: bytes) -> bool:
    """Whether the GPU has a JPEG engine (A100, H100 and some others) and it decodes."""
    from nvidia import nvimgcodec

    try:
        decoder = nvimgcodec.Decoder(backends=[nvimgcodec.Backend(nvimgcodec.HW_GPU_ONLY)])
        return decoder.decode(jpeg) is not None
    except RuntimeError:
        return False


PROBES: dict[str, Any] = {**probes.PROBES, "dali": probe_dali}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](*sys.argv[2:])))
