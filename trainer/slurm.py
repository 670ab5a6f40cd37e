"""Ranks started by Slurm's srun, put in torch's own names.

The decision that shaped it: only a step of several tasks counts, as srun alone describes one. An sbatch script sees
SLURM_NTASKS and SLURM_PROCID too, though it is one process. Left out: asking Slurm anything; the environment says all.
"""

import re
from collections.abc import MutableMapping

from pipeline.common.errors import UserError

_FIRST_PORT, _NUM_PORTS = 20000, 12000  # below the ports that Linux hands out by itself


def adopt(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from srun's variables.

    Does nothing outside of a step of several tasks, or where RANK is set (torchrun under srun). MASTER_ADDR and
    MASTER_PORT are kept where set. Raises UserError for an environment that cannot be srun's.
    """
    num_tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or num_tasks == "1":
        return
    try:
        rank, local_rank = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
        node = int(environment["SLURM_NODEID"])
        local_size = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])[node]
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        host = first_host(environment["SLURM_STEP_NODELIST"])
        world_size = int(num_tasks)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"Slurm's environment is not understood ({type(error).__name__}: {error}); start ranks with srun, or with "
            "torchrun inside of it"
        ) from error
    environment.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(local_size)
    )
    environment.setdefault("MASTER_ADDR", host)
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + (31 * job + step) % _NUM_PORTS))


def first_host(nodes: str) -> str:
    """The first of a list as Slurm abbreviates it: "gpu[03-05,09]-ib,login" is gpu03-ib and so on."""
    match = re.match(r"([^,\[\]]*)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?", nodes)
    if not match or not match[0]:
        raise ValueError(f"no host in {nodes!r}")
    return (match[1] or "") + (match[2] or "") + (match[3] or "")


def expand_counts(counts: str) -> list[int]:
    """Tasks of each node: "2(x3),1" is 2, 2, 2, 1."""
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise ValueError(f"no counts in {counts!r}")
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded
