"""`alexnet-prep doctor`: what this machine has and lacks, each check a line with its remedy."""

import importlib.util
import json
import os
import platform
import resource
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

from tools.checks import facts as probes
from tools.checks.facts import Facts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


State = Literal["ok", "warning", "problem"]

# CUDA's major version -> oldest driver (NVIDIA, "CUDA Compatibility", minor version compatibility)
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
DALI_CUDA = 12  # nvidia-dali-cuda120
STATE_WIDTH = 7  # letters of the longest state
_GIB = 1 << 30
_LEAST_MEMORY_BYTES = 4 * _GIB  # the paper's network, its velocity and activations, a shuffle buffer, DALI's buffers
_LEAST_SHM_BYTES = _GIB // 4  # NCCL's rings between a few GPUs; containers get 64 MiB unless told otherwise
_LEAST_FREE_BYTES = 5 * _GIB  # some checkpoints of half a gigabyte
_NONE_VISIBLE = ("", "-1")  # of CUDA_VISIBLE_DEVICES
_SPARE_FILES = 256  # beside one for each shard
_SLOW_IMAGES_PER_S = 3000  # less than one GPU takes
_LEAST_READ_BYTES = 32 << 20  # less does not tell the speed of a disk


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, what was found, and the remedy unless all is well."""

    name: str
    state: State
    found: str
    remedy: str = ""


def spell(check: Check, name_width: int, num_columns: int | None) -> list[str]:
    """The lines for a check, broken between words for a terminal of `num_columns`; None: never broken."""
    start = f"{check.state:<{STATE_WIDTH}}  {check.name:<{name_width}}  "
    room = num_columns and max(num_columns - len(start), 20)
    lines: list[str] = []
    for text in filter(None, (check.found, check.remedy and f"-> {check.remedy}")):
        parts = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) if room else [text]
        lines += [(" " * len(start) if lines or number else start) + part for number, part in enumerate(parts)]
    return lines or [start]


def judge(facts: Facts) -> Iterator[Check]:
    """The checks that follow from the facts."""
    yield _judge_platform(facts["platform"])
    yield _judge_cpu(facts["cpu"])
    yield from _judge_memory(facts["memory"], facts["shm_bytes"])
    yield _judge_open_files(facts["open_files"], facts["shards"].get("num_shards", 0))
    yield from _judge_gpus(facts["driver"], facts["torch"], facts["hidden_by"])
    yield _judge_torch(facts["torch"], facts["driver"])
    yield _judge_nccl(facts["torch"])
    yield from _judge_dali(facts["dali"])
    yield from _judge_extras(facts["extras"])
    yield from _judge_shards(facts["shards"], facts["memory"])


def _judge_platform(it: Facts) -> Check:
    python = ".".join(map(str, it["python"]))
    found = f"{it['system']} on {it['machine']}, Python {python}"
    if (it["system"], it["machine"]) != ("Linux", "x86_64"):
        return Check("platform", "problem", found, "NVIDIA DALI needs Linux on x86-64")
    if tuple(it["python"]) < (3, 11):
        return Check("platform", "problem", found, "Python 3.11 or newer is needed")
    return Check("platform", "ok", found)


def _judge_cpu(it: Facts) -> Check:
    vectors = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in it["flags"]]
    found = f"{it['model']}, {it['cores']} cores, {' '.join(vectors) or 'no AVX2'}"
    if "avx2" not in vectors:
        return Check("cpu", "warning", found, "without AVX2 decoding and arithmetic take several times as long")
    return Check("cpu", "ok", found)


def _judge_memory(it: Facts, shm_bytes: int | None) -> Iterator[Check]:
    found = f"{_size(it['total_bytes'])}, {_size(it['available_bytes'])} available"
    few = it["available_bytes"] < _LEAST_MEMORY_BYTES
    remedy = f"less than {_size(_LEAST_MEMORY_BYTES)}: end other programs, or take a smaller --global-batch-size"
    yield Check("memory", "warning" if few else "ok", found, remedy if few else "")
    if shm_bytes is None or shm_bytes < _LEAST_SHM_BYTES:
        found = "none" if shm_bytes is None else _size(shm_bytes)
        yield Check("/dev/shm", "warning", found, "NCCL wants more between GPUs; in a container: docker --shm-size=1g")
    else:
        yield Check("/dev/shm", "ok", _size(shm_bytes))


def _judge_open_files(limit: int, num_shards: int) -> Check:
    needed = num_shards + _SPARE_FILES
    if 0 <= limit < needed:
        return Check(
            "open files", "warning", f"at most {limit}", f"{num_shards} shards want {needed}: ulimit -n {needed}"
        )
    return Check("open files", "ok", f"at most {limit}" if limit >= 0 else "no limit")


def _judge_gpus(driver: Facts, torch: Facts, hidden_by: str | None) -> Iterator[Check]:
    oldest = OLDEST_DRIVER[DALI_CUDA]
    if not driver:
        remedy = f"training runs on the CPU; a GPU needs NVIDIA's driver, {oldest} or newer"
        yield Check("driver", "warning", "no nvidia-smi: no NVIDIA driver", remedy)
        return
    if "error" in driver:
        yield Check(
            "driver", "warning", driver["error"], "training runs on the CPU; reinstall NVIDIA's driver, or reboot"
        )
        return
    found = f"{driver['version']}, runs CUDA {driver.get('cuda') or '(unknown)'}"
    if _major(driver["version"]) < oldest:
        yield Check("driver", "problem", found, f"DALI for CUDA {DALI_CUDA} needs driver {oldest} or newer")
    else:
        yield Check("driver", "ok", found)
    visible = torch.get("gpus", [])
    for number, gpu in enumerate(visible or driver["gpus"]):
        memory = _size(gpu["memory_bytes"]) if gpu["memory_bytes"] else "memory unknown"
        found = f"{gpu['name']}, {memory}, compute capability {gpu['compute_capability']}"
        if not visible and hidden_by in _NONE_VISIBLE:
            yield Check(f"gpu {number}", "warning", found, f"hidden by CUDA_VISIBLE_DEVICES={hidden_by!r}: unset it")
        elif not visible:
            yield Check(f"gpu {number}", "problem", found, "torch does not see it: see the line of torch")
        elif gpu["error"]:
            yield Check(f"gpu {number}", "problem", f"{found}: {gpu['error']}", "torch's build must know this GPU")
        else:
            yield Check(f"gpu {number}", "ok", found)


def _judge_torch(it: Facts, driver: Facts) -> Check:
    if "error" in it:
        return Check("torch", "problem", it["error"], "pip install torch")
    if not it["cuda"]:
        found = f"{it['version']}, built for the CPU"
        if driver.get("gpus"):
            return Check("torch", "problem", found, "there is a GPU: install a CUDA build (pytorch.org, Get started)")
        return Check("torch", "ok", found)
    found = f"{it['version']}, CUDA {it['cuda']}, cuDNN {it['cudnn']}"
    oldest = OLDEST_DRIVER.get(_major(it["cuda"]))
    if oldest and driver.get("version") and _major(driver["version"]) < oldest:
        remedy = (
            f"CUDA {_major(it['cuda'])} needs driver {oldest} or newer: update it, or install torch for an older CUDA"
        )
        return Check("torch", "problem", found, remedy)
    return Check("torch", "ok", found)


def _judge_nccl(torch: Facts) -> Check:
    if torch.get("nccl"):
        return Check("nccl", "ok", torch["nccl"])
    if len(torch.get("gpus", [])) > 1:
        return Check(
            "nccl", "problem", "not in this build of torch", "several GPUs need it: install torch's CUDA build"
        )
    return Check("nccl", "ok", "not in this build of torch; only several GPUs need it")


def _judge_dali(it: Facts) -> Iterator[Check]:
    if "error" in it:
        yield Check("dali", "problem", it["error"], "pip install nvidia-dali-cuda120")
        return
    yield Check("dali", "ok", f"{it['version']}, nvImageCodec {it['nvimgcodec']} with {', '.join(it['extensions'])}")
    for where, error in it["decoded"].items():
        if error:
            remedy = "reinstall nvidia-dali-cuda120 and nvidia-nvimgcodec-cu12"
            yield Check(f"decoder {where}", "problem", error, remedy)
        elif where == "mixed" and it["fell_back"]:
            remedy = "the GPU decodes nothing: reinstall nvidia-nvjpeg-cu12 and nvidia-nvimgcodec-cu12"
            yield Check("decoder mixed", "warning", "its pixels are the CPU's to the bit", remedy)
        else:
            yield Check(f"decoder {where}", "ok", "decodes JPEG")
    if it["operators"]:
        yield Check("operators", "ok", "ours, compiled for this CPU")
    else:
        remedy = "for half as much speed again on the CPU: apt-get install g++ libjpeg-dev (libjpeg-turbo's headers)"
        yield Check("operators", "ok", f"DALI's own, since ours could not be compiled; {remedy}")
    if it["hardware"] is not None:
        found = "found" if it["hardware"] else "none on this GPU; its cores decode"
        yield Check("decoder hardware", "ok", found)


def _judge_extras(missing: dict[str, list[str]]) -> Iterator[Check]:
    for extra, names in missing.items():
        hint = f"not installed ({', '.join(names)}); if wanted: pip install 'alexnet-dali[{extra}]'"
        yield Check(f"extra {extra}", "ok", hint if names else "installed")


def _judge_shards(it: Facts, memory: Facts) -> Iterator[Check]:
    folder = it["folder"]
    if "://" in folder:
        yield Check("shards", "ok", f"{folder}: not on a disk, not looked at")
        return
    if "free_bytes" in it:
        few = it["free_bytes"] < _LEAST_FREE_BYTES
        remedy = f"less than {_size(_LEAST_FREE_BYTES)}: checkpoints and shards need room" if few else ""
        yield Check("free space", "warning" if few else "ok", f"{folder}: {_size(it['free_bytes'])}", remedy)
    if "error" in it:
        error = it["error"] if folder in it["error"] else f"{folder}: {it['error']}"
        yield Check("shards", "problem", error, "or name another folder with --shards")
    elif not it["exists"]:
        yield Check("shards", "warning", f"{folder}: none yet", f"alexnet-prep shard SOURCE --out {quote(folder)}")
    else:
        what = f"{it['num_samples']:,} images ({it['encoding']}) in {it['num_shards']:,} shards"
        yield Check("shards", "ok", f"{folder}: {what}, {_size(it['total_bytes'])}")
    if it.get("colors_error"):
        yield Check("colours", "warning", it["colors_error"], "training needs them")
    if it.get("speed"):
        yield _judge_disk(it, memory)


def _judge_disk(it: Facts, memory: Facts) -> Check:
    speed = it["speed"]
    per_s = speed["sequential_bytes"] / max(speed["sequential_s"], 1e-9)
    pieces_per_s = speed["random_pieces"] / max(speed["random_s"], 1e-9)
    images_per_s = per_s * it["num_samples"] / max(it["total_bytes"], 1)
    found = (
        f"{per_s / 1e6:,.0f} MB/s in order (about {images_per_s:,.0f} images/s), {pieces_per_s:,.0f} random reads/s "
        f"of 128 KiB{'' if speed['direct'] else ', page cache perhaps'}"
    )
    if speed["sequential_bytes"] < _LEAST_READ_BYTES:
        return Check("disk", "ok", f"{found}; {_size(speed['sequential_bytes'])} are too little to judge by")
    if images_per_s >= _SLOW_IMAGES_PER_S:
        return Check("disk", "ok", found)
    if it["total_bytes"] < memory["available_bytes"] / 2:
        return Check("disk", "warning", found, "slower than a GPU in the first epoch; then memory holds all shards")
    return Check("disk", "warning", found, "slower than a GPU: copy the shards to a local SSD")


def _major(text: str) -> int:
    head = text.split(".")[0]
    return int(head) if head.isdigit() else 0


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:,.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / (1 << 20):,.0f} MiB"


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
