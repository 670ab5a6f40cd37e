"""The limits of feed.py: limits.c, compiled when asked for and driven by threads, a batch in each call."""

import ctypes
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
from harness.samples import CROP_PX, MAX_OFFSET_PX, SIZE_PX, Batches, Job, rng, rotate


def limit(job: Job, kind: str) -> Batches:
    """limits.c in threads: "full" and "crop" decode, "convert" from raw pixels."""
    library = _build_limits(job)
    samples = job.samples
    tops = [np.empty((SIZE_PX, SIZE_PX, 3), np.uint8) for _ in range(64)]  # a place for each thread's full decode
    places = threading.local()

    def work(indices: Any, out: Any) -> None:
        n = len(indices)
        generator = rng()
        offsets = generator.integers(0, MAX_OFFSET_PX + 1, (n, 2), np.int32)
        sources = [samples.raw[index] if kind == "convert" else samples.view(index) for index in indices]
        pointers = np.array([source.ctypes.data for source in sources], np.uint64)
        sizes = np.array([source.nbytes for source in sources], np.uint64)
        if kind == "full":
            if not hasattr(places, "pixels"):
                places.pixels = tops.pop()
            done = library.decode_full(_at(pointers), _at(sizes), n, _at(places.pixels), ctypes.c_size_t(0))
        elif kind == "crop":
            done = library.decode_crop(_at(pointers), _at(sizes), n, _at(offsets), _at(out))
        else:
            flips = (generator.random(n) < 0.5).astype(np.uint8)
            shifts = (job.mean - generator.standard_normal((n, 3), np.float32) @ job.basis.T).astype(np.float32)
            done = library.convert(_at(pointers), n, _at(offsets), _at(flips), _at(shifts), _at(out))
        if done != n:
            raise RuntimeError(f"{done} images of {n}")

    if kind == "full":
        yield from rotate(job, work, (1,), np.uint8)  # the pixels are thrown away
    elif kind == "crop":
        yield from rotate(job, work, (CROP_PX, CROP_PX, 3), np.uint8)
    else:
        yield from rotate(job, work, (3, CROP_PX, CROP_PX), np.float32)


def _at(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _build_limits(job: Job) -> ctypes.CDLL:
    """limits.c compiled here, on Pillow's libjpeg-turbo."""
    import PIL

    bundled = sorted((Path(PIL.__file__).parent.parent / "pillow.libs").glob("libjpeg-*.so*"))
    source, target = Path(__file__).with_name("limits.c"), job.out / "limits.so"
    job.out.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(target)]
    try:
        subprocess.run(command if bundled else [*command, "-ljpeg"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise ModuleNotFoundError(f"limits.c cannot be compiled (compiler, libjpeg's headers): {reason}") from error
    if bundled:
        ctypes.CDLL(str(bundled[0]), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(target))


def _pillow_jpeg() -> dict[str, str]:
    from PIL import features

    return {"libjpeg-turbo of Pillow": str(features.version("libjpeg_turbo"))}
