"""Facts about this machine for the doctor, found without a chance to hang or to crash it."""

import contextlib
import errno
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 90.0
Facts = dict[str, Any]


def run_program(command: list[str], timeout_s: float = TIMEOUT_S) -> tuple[str, str]:
    """(what the program printed, "") or ("", what went wrong in one line)."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
        )
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return "", f"no answer within {timeout_s:.0f} s"
    if process.returncode:
        said = (err or out).decode(errors="replace").strip().splitlines()
        return "", f"{said[-1].strip()[:300] if said else 'it said nothing'} (status {process.returncode})"
    return out.decode(errors="replace"), ""


def ask(probe: str, *arguments: str, timeout_s: float = TIMEOUT_S) -> Facts:
    """The facts of a probe of doctor.py, or {"error": ...}."""
    out, error = run_program([sys.executable, "-m", "tools.checks.doctor", probe, *arguments], timeout_s)
    if error:
        return {"error": error}
    try:
        facts = json.loads(out.strip().splitlines()[-1])  # libraries may have printed before
    except (ValueError, IndexError):
        return {"error": f"its probe printed {out[-200:]!r}, expected JSON"}
    return facts if isinstance(facts, dict) else {"error": f"its probe printed {out[-200:]!r}, expected an object"}


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


def probe_cuda() -> Facts:
    """The newest CUDA that the driver runs, from the driver's library."""
    import ctypes

    number = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    if status:
        return {"error": f"cuDriverGetVersion gave {status}"}
    return {"cuda": f"{number.value // 1000}.{number.value % 1000 // 10}"}


def probe_torch() -> Facts:
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


def probe_shards(folder: str) -> Facts:
    """What a folder of shards holds and how fast its disk gives it."""
    from dataclasses import asdict

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


PROBES = {"cuda": probe_cuda, "torch": probe_torch, "shards": probe_shards}


_BLOCK_BYTES = 4 << 20
_PIECE_BYTES = 128 << 10
_ALIGNMENT = 4096
_MAX_BYTES = 512 << 20
_MAX_PIECES = 512


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
