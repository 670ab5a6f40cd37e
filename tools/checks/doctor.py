"""`alexnet-prep doctor`: what this machine has and lacks, each check a line with its remedy."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from shlex import quote
from typing import Literal

from tools.checks.facts import Facts, gather

State = Literal["ok", "warning", "problem"]

# CUDA's major version -> oldest driver (NVIDIA, "CUDA Compatibility", minor version compatibility)
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
DALI_CUDA = 12  # nvidia-dali-cuda120
STATE_WIDTH = 7  # letters of the longest state
_GIB = 1 << 30
_LEAST_MEMORY_BYTES = 4 * _GIB  # the paper's network, its velocity and activations, a shuffle buffer, DALI's buffers
_LEAST_SHM_BYTES = _GIB // 4  # NCCL's rings between a few GPUs; containers get 64 MiB unless told otherwise
_LEAST_FREE_BYTES = 5 * _GIB  # some checkpoints of half a gigabyte
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


def examine(shards: str) -> list[Check]:
    """Every check, in the order of the machine from below: platform, memory, driver, libraries, disk."""
    return list(judge(gather(shards)))


def spell(check: Check, name_width: int, num_columns: int | None) -> list[str]:
    """The lines for a check, broken between words for a terminal of `num_columns`; None: never broken."""
    start = f"{check.state:<{STATE_WIDTH}}  {check.name:<{name_width}}  "
    room = num_columns and max(num_columns - len(start), 20)
    lines: list[str] = []
    for text in filter(None, (check.found, check.remedy and f"-> {check.remedy}")):
        parts = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) if room else [text]
        lines += [(" " * len(start) if lines or number else start) + part for number, part in enumerate(parts)]
    return lines or [start]


def _check(name: str, found: str, *, warning: str = "", problem: str = "") -> Check:
    """A check that is well unless there is a remedy for a warning or for a problem."""
    return Check(name, "problem" if problem else "warning" if warning else "ok", found, problem or warning)


def judge(facts: Facts) -> Iterator[Check]:
    """The checks that follow from the facts."""
    yield from _judge_host(facts)
    yield from _judge_gpus(facts["driver"], facts["torch"], facts["hidden_by"])
    yield _judge_torch(facts["torch"], facts["driver"])
    yield _judge_nccl(facts["torch"])
    yield from _judge_dali(facts["dali"])
    for extra, missing in facts["extras"].items():
        hint = f"not installed ({', '.join(missing)}); if wanted: pip install 'alexnet-dali[{extra}]'"
        yield _check(f"extra {extra}", hint if missing else "installed")
    yield from _judge_shards(facts["shards"], facts["memory"])


def _judge_host(facts: Facts) -> Iterator[Check]:
    """Platform, CPU, memory and limits."""
    it, python = facts["platform"], tuple(facts["platform"]["python"])
    problem = "" if python >= (3, 11) else "Python 3.11 or newer is needed"
    if (it["system"], it["machine"]) != ("Linux", "x86_64"):
        problem = "NVIDIA DALI needs Linux on x86-64"
    found = f"{it['system']} on {it['machine']}, Python {'.'.join(map(str, python))}"
    yield _check("platform", found, problem=problem)

    it = facts["cpu"]
    vectors = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in it["flags"]]
    found = f"{it['model']}, {it['cores']} cores, {' '.join(vectors) or 'no AVX2'}"
    remedy = "" if "avx2" in vectors else "without AVX2 decoding and arithmetic take several times as long"
    yield _check("cpu", found, warning=remedy)

    it = facts["memory"]
    remedy = f"less than {_size(_LEAST_MEMORY_BYTES)}: end other programs, or take a smaller --global-batch-size"
    found = f"{_size(it['total_bytes'])}, {_size(it['available_bytes'])} available"
    yield _check("memory", found, warning=remedy if it["available_bytes"] < _LEAST_MEMORY_BYTES else "")

    shm_bytes = facts["shm_bytes"] or 0
    remedy = "NCCL wants more between GPUs; in a container: docker --shm-size=1g"
    found = "none" if facts["shm_bytes"] is None else _size(shm_bytes)
    yield _check("/dev/shm", found, warning=remedy if shm_bytes < _LEAST_SHM_BYTES else "")

    limit, num_shards = facts["open_files"], facts["shards"].get("num_shards", 0)
    needed = num_shards + _SPARE_FILES
    remedy = f"{num_shards} shards want {needed}: ulimit -n {needed}" if 0 <= limit < needed else ""
    yield _check("open files", f"at most {limit}" if limit >= 0 else "no limit", warning=remedy)


def _judge_gpus(driver: Facts, torch: Facts, hidden_by: str | None) -> Iterator[Check]:
    oldest = OLDEST_DRIVER[DALI_CUDA]
    if not driver:
        remedy = f"training runs on the CPU; a GPU needs NVIDIA's driver, {oldest} or newer"
        yield _check("driver", "no nvidia-smi: no NVIDIA driver", warning=remedy)
        return
    if "error" in driver:
        remedy = "training runs on the CPU; reinstall NVIDIA's driver, or reboot"
        yield _check("driver", driver["error"], warning=remedy)
        return
    found = f"{driver['version']}, runs CUDA {driver.get('cuda') or '(unknown)'}"
    remedy = f"DALI for CUDA {DALI_CUDA} needs driver {oldest} or newer"
    yield _check("driver", found, problem=remedy if _major(driver["version"]) < oldest else "")
    visible = torch.get("gpus", [])
    for number, gpu in enumerate(visible or driver["gpus"]):
        memory = _size(gpu["memory_bytes"]) if gpu["memory_bytes"] else "memory unknown"
        found = f"{gpu['name']}, {memory}, compute capability {gpu['compute_capability']}"
        warning = problem = ""
        if not visible and hidden_by in ("", "-1"):
            warning = f"hidden by CUDA_VISIBLE_DEVICES={hidden_by!r}: unset it"
        elif not visible:
            problem = "torch does not see it: see the line of torch"
        elif gpu["error"]:
            found, problem = f"{found}: {gpu['error']}", "torch's build must know this GPU"
        yield _check(f"gpu {number}", found, warning=warning, problem=problem)


def _judge_torch(it: Facts, driver: Facts) -> Check:
    if "error" in it:
        return _check("torch", it["error"], problem="pip install torch")
    if not it["cuda"]:
        remedy = "there is a GPU: install a CUDA build (pytorch.org, Get started)" if driver.get("gpus") else ""
        return _check("torch", f"{it['version']}, built for the CPU", problem=remedy)
    major = _major(it["cuda"])
    oldest = OLDEST_DRIVER.get(major, 0)
    is_old = driver.get("version") and _major(driver["version"]) < oldest
    remedy = f"CUDA {major} needs driver {oldest} or newer: update it, or install torch for an older CUDA"
    found = f"{it['version']}, CUDA {it['cuda']}, cuDNN {it['cudnn']}"
    return _check("torch", found, problem=remedy if is_old else "")


def _judge_nccl(torch: Facts) -> Check:
    missing = "not in this build of torch"
    if not torch.get("nccl") and len(torch.get("gpus", [])) > 1:
        return _check("nccl", missing, problem="several GPUs need it: install torch's CUDA build")
    return _check("nccl", torch.get("nccl") or f"{missing}; only several GPUs need it")


def _judge_dali(it: Facts) -> Iterator[Check]:
    if "error" in it:
        yield _check("dali", it["error"], problem="pip install nvidia-dali-cuda120")
        return
    yield _check("dali", f"{it['version']}, nvImageCodec {it['nvimgcodec']} with {', '.join(it['extensions'])}")
    for where, error in it["decoded"].items():
        if error:
            remedy = "reinstall nvidia-dali-cuda120 and nvidia-nvimgcodec-cu12"
            yield _check(f"decoder {where}", error, problem=remedy)
        elif where == "mixed" and it["fell_back"]:
            remedy = "the GPU decodes nothing: reinstall nvidia-nvjpeg-cu12 and nvidia-nvimgcodec-cu12"
            yield _check("decoder mixed", "its pixels are the CPU's to the bit", warning=remedy)
        else:
            yield _check(f"decoder {where}", "decodes JPEG")
    remedy = "for half as much speed again on the CPU: apt-get install g++ libjpeg-dev (libjpeg-turbo's headers)"
    missing = f"DALI's own, since ours could not be compiled; {remedy}"
    yield _check("operators", "ours, compiled for this CPU" if it["operators"] else missing)
    if it["hardware"] is not None:
        yield _check("decoder hardware", "found" if it["hardware"] else "none on this GPU; its cores decode")


def _judge_shards(it: Facts, memory: Facts) -> Iterator[Check]:
    folder = it["folder"]
    if "://" in folder:
        yield _check("shards", f"{folder}: not on a disk, not looked at")
        return
    if "free_bytes" in it:
        few = it["free_bytes"] < _LEAST_FREE_BYTES
        remedy = f"less than {_size(_LEAST_FREE_BYTES)}: checkpoints and shards need room" if few else ""
        yield _check("free space", f"{folder}: {_size(it['free_bytes'])}", warning=remedy)
    if "error" in it:
        error = it["error"] if folder in it["error"] else f"{folder}: {it['error']}"
        yield _check("shards", error, problem="or name another folder with --shards")
    elif not it["exists"]:
        yield _check("shards", f"{folder}: none yet", warning=f"alexnet-prep shard SOURCE --out {quote(folder)}")
    else:
        what = f"{it['num_samples']:,} images ({it['encoding']}) in {it['num_shards']:,} shards"
        yield _check("shards", f"{folder}: {what}, {_size(it['total_bytes'])}")
    if it.get("colors_error"):
        yield _check("colours", it["colors_error"], warning="training needs them")
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
        return _check("disk", f"{found}; {_size(speed['sequential_bytes'])} are too little to judge by")
    remedy = "slower than a GPU: copy the shards to a local SSD"
    if it["total_bytes"] < memory["available_bytes"] / 2:
        remedy = "slower than a GPU in the first epoch; then memory holds all shards"
    return _check("disk", found, warning="" if images_per_s >= _SLOW_IMAGES_PER_S else remedy)


def _major(text: str) -> int:
    head = text.split(".")[0]
    return int(head) if head.isdigit() else 0


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:,.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / (1 << 20):,.0f} MiB"
