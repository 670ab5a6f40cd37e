"""Facts about this machine for the doctor. Whatever may hang or crash is found in a process of its own."""

import contextlib
import errno
import importlib.util
import io
import json
import mmap
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Facts = dict[str, Any]

EXTRAS = {
    "ray": ("ray",),
    "parquet": ("pyarrow",),
    "s3": ("fsspec", "s3fs"),
    "onnx": ("onnx", "onnxruntime"),
    "tensorboard": ("tensorboard",),
}
TIMEOUT_S = 90.0
_JPEG_SIZE_PX = 64
_LARGEST_DIFFERENCE = 3.0  # grey levels, mean over pixels: a smooth image survives JPEG nearly unharmed
_BLOCK_BYTES = 4 << 20
_PIECE_BYTES = 128 << 10
_ALIGNMENT = 4096
_MAX_BYTES = 512 << 20
_MAX_PIECES = 512


def gather(shards: str) -> Facts:
    """All facts. Takes some seconds; never longer than the time limits of the processes asked."""
    driver = find_driver()
    if driver.get("gpus"):
        driver |= {"cuda": ask("cuda", timeout_s=30.0).get("cuda")}
    torch = ask("torch")
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    return {
        "platform": {"system": platform.system(), "machine": platform.machine(), "python": sys.version_info[:3]},
        "cpu": {"cores": len(os.sched_getaffinity(0)), **_read_cpu()},
        "memory": _read_memory(),
        "shm_bytes": shm.f_frsize * shm.f_blocks if shm else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "driver": driver,
        "hidden_by": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "torch": torch,
        "dali": ask("dali", "gpu" if torch.get("gpus") else "cpu"),
        "extras": {extra: [n for n in names if not importlib.util.find_spec(n)] for extra, names in EXTRAS.items()},
        "shards": {"folder": shards, **({} if "://" in shards else ask("shards", shards, timeout_s=60.0))},
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


def run_program(command: list[str], timeout_s: float = TIMEOUT_S) -> tuple[str, str]:
    """(what the program printed, "") or ("", what went wrong in one line)."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
        )
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for, as subprocess.run would: in a driver that hangs it does not die
        return "", f"no answer within {timeout_s:.0f} s"
    if process.returncode:
        said = (err or out).strip().splitlines()
        return "", f"{said[-1].strip()[:300] if said else 'it said nothing'} (status {process.returncode})"
    return out, ""


def ask(name: str, *arguments: str, timeout_s: float = TIMEOUT_S) -> Facts:
    """What the function of that name in ASKED finds, in a process of its own, or {"error": ...}."""
    out, error = run_program([sys.executable, "-m", "tools.checks.facts", name, *arguments], timeout_s)
    if error:
        return {"error": error}
    try:
        facts = json.loads(out.strip().splitlines()[-1])  # libraries may have printed before
    except (ValueError, IndexError):
        facts = None
    return facts if isinstance(facts, dict) else {"error": f"facts of {name}: {out[-200:]!r}, expected JSON"}


def find_driver() -> Facts:
    """{"version", "gpus": [{name, memory_bytes, compute_capability}]}, {} without nvidia-smi, or {"error"}."""
    if shutil.which("nvidia-smi") is None:
        return {}
    fields = "driver_version,memory.total,compute_cap,name"
    out, error = run_program(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], 30.0)
    return {"error": error} if error else parse_smi(out)


def parse_smi(out: str) -> Facts:
    """nvidia-smi's lines of "driver, memory in MiB, compute capability, name"."""
    gpus, version = [], None
    for line in filter(str.strip, out.splitlines()):
        parts = [part.strip() for part in line.split(",", 3)]
        if len(parts) != 4:
            return {"error": f"nvidia-smi printed {line[:200]!r}"}
        version = parts[0]
        memory = int(parts[1]) << 20 if parts[1].isdigit() else None  # "[N/A]" on GPUs that share the host's
        gpus.append({"name": parts[3], "memory_bytes": memory, "compute_capability": parts[2]})
    return {"version": version, "gpus": gpus} if gpus else {"error": "nvidia-smi lists no GPU"}


def find_cuda() -> Facts:
    """The newest CUDA that the driver runs, from the driver's library."""
    import ctypes

    number = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    if status:
        return {"error": f"cuDriverGetVersion gave {status}"}
    return {"cuda": f"{number.value // 1000}.{number.value % 1000 // 10}"}


def find_torch() -> Facts:
    """torch's version and builds; of each GPU it sees, whether it computes."""
    import torch
    from torch import distributed

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpu: Facts = {"name": properties.name, "memory_bytes": properties.total_memory, "error": None}
        gpu["compute_capability"] = f"{properties.major}.{properties.minor}"
        try:
            x = torch.eye(64, device=f"cuda:{index}")
            if float((x @ x).sum()) != 64.0:
                gpu["error"] = "a matrix product came out wrong"
        except RuntimeError as error:
            gpu["error"] = str(error).splitlines()[0]
        gpus.append(gpu)
    has_nccl = distributed.is_available() and distributed.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl and gpus else ("found" if has_nccl else None)
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return {"version": torch.__version__, "cuda": torch.version.cuda, "cudnn": cudnn, "nccl": nccl, "gpus": gpus}


def find_shards(folder: str) -> Facts:
    """What a folder of shards holds and how fast its disk gives it."""
    from pipeline.colors import ColorStats
    from pipeline.common.errors import UserError
    from pipeline.manifest import MANIFEST
    from pipeline.shards import ShardSet

    root = Path(folder)
    existing = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    facts: Facts = {"free_bytes": shutil.disk_usage(existing).free, "exists": (root / MANIFEST).is_file()}
    if not facts["exists"]:
        return facts
    try:
        shards = ShardSet.open(root)
        tars = shards.tars("train") + shards.tars("val")
        facts |= {
            "num_shards": len(tars),
            "num_samples": shards.num_samples("train") + shards.num_samples("val"),
            "total_bytes": sum(path.stat().st_size for path in tars),
            "encoding": shards.manifest.encoding,
        }
        if facts["total_bytes"]:
            facts["speed"] = asdict(measure(tars))
    except (UserError, OSError) as error:
        return {**facts, "error": str(error)}
    try:
        ColorStats.load(root, shards.fingerprint)
    except UserError as error:
        facts["colors_error"] = str(error)
    return facts


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes and seconds of the two readings; `direct`: around the page cache for certain."""

    sequential_bytes: int
    sequential_s: float
    random_pieces: int
    random_bytes: int
    random_s: float
    direct: bool


def measure(files: Sequence[Path], budget_s: float = 2.0, clock: Callable[[], float] = time.perf_counter) -> DiskSpeed:
    """Read `files` in order, then 128 KiB pieces of them at random, each for `budget_s` at the most.

    Raises OSError if a file cannot be read, ValueError if all are empty.
    """
    sizes = {path: path.stat().st_size for path in files}
    if not sum(sizes.values()):
        raise ValueError("no bytes to read")
    direct = all(_knows_direct(path) for path in files[:1])
    with mmap.mmap(-1, _BLOCK_BYTES) as buffer:  # of whole pages, as O_DIRECT wants it
        start_s, num_bytes = clock(), 0
        for path in files:
            with _open(path, direct) as file:
                offset = 0
                while offset < sizes[path] and num_bytes < _MAX_BYTES and clock() - start_s < budget_s:
                    got = os.preadv(file, [buffer], offset)
                    offset, num_bytes = offset + got, num_bytes + got
                    if got < _BLOCK_BYTES:
                        break
        sequential_s = clock() - start_s
        draw, pieces, piece_bytes = random.Random(0), 0, 0
        start_s, piece = clock(), memoryview(buffer)[:_PIECE_BYTES]
        with contextlib.ExitStack() as stack, piece:
            opened = {path: stack.enter_context(_open(path, direct)) for path in files if sizes[path]}
            while pieces < _MAX_PIECES and clock() - start_s < budget_s:
                path = draw.choice(list(opened))
                last = max(0, sizes[path] - _PIECE_BYTES) // _ALIGNMENT
                piece_bytes += os.preadv(opened[path], [piece], draw.randint(0, last) * _ALIGNMENT)
                pieces += 1
        return DiskSpeed(num_bytes, sequential_s, pieces, piece_bytes, clock() - start_s, direct)


def _knows_direct(path: Path) -> bool:
    try:
        with _open(path, True) as file, mmap.mmap(-1, _ALIGNMENT) as buffer:
            os.preadv(file, [buffer], 0)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    return True


@contextlib.contextmanager
def _open(path: Path, direct: bool) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        if not direct:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        yield file
    finally:
        os.close(file)


def find_dali(where: str) -> Facts:
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


ASKED: dict[str, Callable[..., Facts]] = {
    "cuda": find_cuda,
    "torch": find_torch,
    "dali": find_dali,
    "shards": find_shards,
}

if __name__ == "__main__":
    print(json.dumps(ASKED[sys.argv[1]](*sys.argv[2:])))
