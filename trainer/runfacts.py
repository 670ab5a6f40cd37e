"""What stands about a run in its config.json, what its ranks must have in common, and their random states.

The decision that shaped it: all of it is read off what the run was asked for and what it has opened, so that the loop
(train.py) need not know how it is put into words. Left out: the checkpoint's other contents (run.py).
"""

import hashlib
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pipeline.colors import ColorStats
from pipeline.shards import ShardSet
from trainer.config import Job
from trainer.distributed import Ranks, launch_id
from trainer.kernels.native import load_native
from trainer.nets.finetune import Start
from trainer.nets.weights import list_classes
from trainer.recipe import to_dict

_OF_THIS_MACHINE = ("num_threads", "num_local_ranks")


def describe(job: Job, shards: ShardSet, ranks: Ranks, started_from: Start | None) -> dict[str, Any]:
    """For config.json."""
    return {
        "recipe": to_dict(job.recipe),
        "seed": job.seed,
        "shards": shards.location,
        "shards_fingerprint": shards.fingerprint,
        "num_classes": shards.num_classes,
        "classes": list_classes(shards.manifest.classes),
        "world_size": ranks.world_size,
        "device": ranks.device.type,
        "feeding": {name: value for name, value in asdict(job.loader).items() if name not in _OF_THIS_MACHINE},
        "weights": started_from and asdict(started_from),
        "parallel": asdict(job.parallel),
        "safety": asdict(job.safety),
        "launch_id": launch_id(),
    }


def list_facts(job: Job, shards: ShardSet, colors: ColorStats, saved: dict[str, Any] | None) -> dict[str, str]:
    """What has to be the same on all ranks; `saved`: the checkpoint to go on from."""
    return {
        "shards": shards.fingerprint[:12],
        "colours (SHA-256)": hashlib.sha256(colors.mean_image.tobytes()).hexdigest()[:12],
        **{f"recipe field {name}": str(value) for name, value in to_dict(job.recipe).items()},
        "--seed": str(job.seed),
        "--weights": str(job.weights),
        "--parallel": str(job.parallel),
        **{f"--{name.replace('_', '-')}": str(value) for name, value in asdict(job.safety).items()},
        "the step to resume from": str(saved["step"]) if saved else "0",
    }


def list_arithmetic(ranks: Ranks) -> dict[str, str]:
    """What the last bits of a step depend on besides weights, samples and draws; of a GPU nothing, whose bits vary."""
    if ranks.device.type == "cuda":
        return {}
    return {
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "LRN": "torch's operations" if load_native() is None else "compiled C",
    }


def name_changes(before: dict[str, str], ranks: Ranks) -> str:
    """How the arithmetic of a resumed run differs from `before`, in words; empty if it does not."""
    now = list_arithmetic(ranks)
    changed = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{name}: {before[name]} before, {now[name]} now" for name in changed)


def get_random_state(ranks: Ranks) -> dict[str, Tensor]:
    """Of this rank: torch's on the CPU, and on its GPU."""
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], ranks: Ranks) -> None:
    """As `get_random_state` gave it."""
    torch.set_rng_state(state["cpu"])
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"])
