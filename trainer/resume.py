"""Going on with a run: from which folder and checkpoint, on how many ranks, with which random streams.

The decision that shaped it: weights and velocity are saved whole, so any mode and any number of ranks can go on with
them at the start of an epoch. Inside an epoch the order of the samples left is dealt to the ranks that began it, so
another number of them is refused there, with the way back to the epoch's start. Left out: what a checkpoint holds
(run.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.common.errors import UserError
from pipeline.graph import stream_seed
from pipeline.manifest import MANIFEST
from pipeline.shards import ShardSet
from trainer import checkpoint
from trainer.distributed import Ranks, gather, launch_id, restart_count
from trainer.record.runs import CHECKPOINTS, CONFIG, LAST, read_config
from trainer.saving import list_steps

if TYPE_CHECKING:
    from trainer.config import Job

EPOCH = "epoch.pt"  # in a run's checkpoints: that of the end of its last whole epoch


class Streams(NamedTuple):
    """Seeds of a rank's random streams: of its loader (the same on all ranks), and of its dropout."""

    feed: int
    dropout: int


def find_resumed(job: "Job", ranks: Ranks) -> Path | None:
    """The folder to go on in, on every rank: the one named, or after a restart the one that this job has made."""
    if job.resume is not None or not restart_count():
        return job.resume
    return gather(find_launched(job.runs, launch_id()) if ranks.is_first else None, ranks)[0]


def find_launched(runs: Path, launch: str | None) -> Path | None:
    """The run that the launch of this name has made, if it came that far."""
    if launch is None or not runs.is_dir():
        return None
    made = [path for path in runs.iterdir() if (path / CONFIG).is_file()]
    made.sort(key=lambda path: (path / CONFIG).stat().st_mtime, reverse=True)
    return next((path for path in made if read_config(path).get("launch_id") == launch), None)


def load_resumed(job: "Job", folder: Path | None, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The checkpoint to go on from; None for a new run, and for one that died before its first checkpoint.

    The newest that is whole: `warn` is told of those that are not. Raises UserError if none is.
    """
    if folder is None:
        return None
    if job.restart_epoch and not restart_count():
        path = folder / CHECKPOINTS / EPOCH
        if not path.is_file():
            raise UserError(f"{folder}: no epoch of it has ended, so there is none to restart from; start a new run")
        return checkpoint.load(path)
    saved = list_saved(folder / CHECKPOINTS)
    if not saved and (job.or_new or job.resume is None):
        return None
    problems: list[UserError] = []
    for path in saved or [folder / CHECKPOINTS / LAST]:
        try:
            state = checkpoint.load(path)
        except UserError as error:
            problems.append(error)
        else:
            for problem in problems:
                what, _, _ = str(problem).rpartition("; ")  # without the remedy: it is being taken
                warn(f"warning: {what}; using {path}, of step {state['step']}, in its place")
            return state
    raise problems[0]


def list_saved(folder: Path) -> list[Path]:
    """A run's checkpoints to go on from, the one to try first at the front: last.pt, then by step."""
    last, steps = folder / LAST, list(list_steps(folder).values())
    if not last.is_file():
        return steps
    return [last, *(path for path in steps if not path.samefile(last))]


def check_resumable(saved: dict[str, Any], folder: Path | None, shards: ShardSet, ranks: Ranks) -> None:
    """Raises UserError for other shards, or another number of ranks inside an epoch."""
    num_ranks, step = len(saved["ranks"]), saved["ranks"][0]["loader"]["step"]
    if num_ranks != ranks.world_size and step:
        raise UserError(
            f"{folder}: stopped after {step} steps of epoch {saved['epoch']} on {_ranks(num_ranks)}, got "
            f"{_ranks(ranks.world_size)}; the rest of an epoch belongs to the ranks that began it: resume with as "
            f"many, or begin epoch {saved['epoch']} anew with --restart-epoch"
        )
    if saved["shards_fingerprint"] != shards.fingerprint:
        raise UserError(
            f"{folder}: was trained on shards {saved['shards_fingerprint'][:12]}, {shards.root} "
            f"holds {shards.fingerprint[:12]}; name the run's own with --shards"
        )
    if saved.get("num_classes", shards.num_classes) != shards.num_classes:
        raise UserError(
            f"{folder}: a net of {saved['num_classes']} classes, but {shards.root / MANIFEST} lists "
            f"{shards.num_classes}; restore that file, or start a new run"
        )


def _ranks(number: int) -> str:
    return f"{number} rank" if number == 1 else f"{number} ranks"


def choose_streams(seed: int, saved: dict[str, Any] | None, ranks: Ranks) -> Streams:
    """A new run's streams, or the saved ones' (their positions are in the checkpoint); with another number of ranks,
    streams that no epoch before has used."""
    feed, names = seed, ["dropout", ranks.rank]  # towers of one net, but noise of one's own
    if saved:
        feed = int(saved["feed_seed"])
        if len(saved["ranks"]) != ranks.world_size:
            feed = stream_seed(seed, "epoch", saved["epoch"], "ranks", ranks.world_size)
            names += ["epoch", saved["epoch"], "ranks", ranks.world_size]
    return Streams(feed, stream_seed(seed, *names))
