"""What a run is asked to do, and how careful it is to be: made once from flags, and handed to every rank."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pipeline.common.console import Voice
from pipeline.options import LoaderOptions
from trainer.recipe import Recipe

Mode = Literal["data", "columns", "hybrid"]
MODES: tuple[Mode, ...] = get_args(Mode)
LOG_STEPS = 20  # a record every so many steps, and at the end of each epoch


@dataclass(frozen=True)
class Parallel:
    """How the net is spread over ranks, and how gradients are averaged where they are: in buckets of `bucket_mib`, sent
    as `gradients`."""

    mode: Mode = "data"
    bucket_mib: float = 25.0
    gradients: Literal["float32", "bf16"] = "float32"


DATA = Parallel()


@dataclass(frozen=True)
class Safety:
    """How often to save and how much to keep, and what ends a run. None of it changes the numbers of a sound run.

    `checkpoint_minutes`: between saves within an epoch, 0 for none; `keep_checkpoints`: the last so many; `timeout_s`:
    without a step, batch of evaluation or piece of a checkpoint for so long, a run has hung.
    """

    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 3
    on_nonfinite: Literal["stop", "skip"] = "stop"
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Job:
    """One run as asked for. `resume`: the run folder to go on with, else a new one is made under `runs`;
    `restart_epoch`: from the end of its last whole epoch, not from its last step; `or_new`: where that folder holds no
    checkpoint yet, begin in it.

    `shards`: a folder or a URL; `cache_dir`: see ShardSet.open.
    """

    shards: str
    runs: Path
    name: str
    recipe: Recipe
    seed: int
    use_gpu: bool
    resume: Path | None = None
    weights: Path | None = None  # a run's folder or a file to start from, see finetune.py
    cache_dir: str | None = None
    loader: LoaderOptions = LoaderOptions()
    parallel: Parallel = DATA
    restart_epoch: bool = False
    or_new: bool = False
    voice: Voice = "words"
    safety: Safety = Safety()
