"""A run's folder: how it is made, found and locked, and its config.json, which makes a folder a run."""

import fcntl
import re
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.common.errors import UserError
from pipeline.common.files import read_json, write_json

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
CHECKPOINTS, LAST, BEST = "checkpoints", "last.pt", "best.pt"
_CONFIG_FIELDS: dict[str, type] = {
    "recipe": dict, "seed": int, "shards": str, "shards_fingerprint": str, "num_classes": int, "classes": list,
    "feeding": dict, "parallel": dict, "safety": dict,
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def create_run(runs: Path, name: str) -> Path:
    """A new, empty folder: runs/NAME, or NAME-2, NAME-3, ... where taken. Two processes never get the same one.

    Raises UserError for a name that is not a plain file name.
    """
    _check_name(name)
    runs.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        run = runs / (name if number == 1 else f"{name}-{number}")
        try:
            run.mkdir()
        except FileExistsError:
            number += 1
        else:
            (run / CHECKPOINTS).mkdir()
            return run


def find_newest(runs: Path, name: str, holding: str) -> Path | None:
    """The newest run called `name` (the highest number) with the file `holding` in it, if there is one."""
    _check_name(name)
    numbered = re.compile(re.escape(name) + r"(?:-([2-9]|[1-9]\d+))?")
    folders = [run for run in _folders(runs) if (run / holding).is_file()]
    matches = [(int(match[1] or 1), run) for run in folders if (match := numbered.fullmatch(run.name))]
    return max(matches)[1] if matches else None


def find_run(runs: Path, name: str) -> Path:
    """The newest run called `name` (the highest number) that has a checkpoint to resume from.

    Raises UserError, naming the runs that could be resumed, if there is none.
    """
    newest = find_newest(runs, name, f"{CHECKPOINTS}/{LAST}")
    if newest is not None:
        return newest
    resumable = [run for run in _folders(runs) if (run / CHECKPOINTS / LAST).is_file()]
    found = f"found {', '.join(run.name for run in resumable)}" if resumable else "found none"
    raise UserError(
        f"{runs}: no run called {name!r} with a checkpoint to resume from ({found}); "
        "name one with --resume RUN, or leave out --resume to begin a new one"
    )


def lock_run(run: Path) -> BinaryIO | None:
    """Keep other processes from training in `run` for as long as the file that this returns is open.

    None where the file system has no locks. Raises UserError if another process trains there.
    """
    file = (run / ".lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"{run}: another process trains in it; wait for its end, or begin another run with --name"
        ) from None
    except OSError:
        file.close()
        return None
    return file


def resolve_run(runs: Path, text: str) -> Path:
    """The run that `text` means: the path of a run's folder, or the name of one in `runs`. Raises UserError if none."""
    candidates = [Path(text)]
    if _NAME.fullmatch(text):
        candidates.append(runs / text)
    for candidate in candidates:
        if (candidate / CONFIG).is_file():
            return candidate
    names = [run.name for run in _folders(runs) if (run / CONFIG).is_file()]
    found = f"{runs} has {', '.join(names)}" if names else f"{runs} has no runs"
    raise UserError(
        f"{text}: not a run (no folder with a {CONFIG}); name one of them ({found}) or the path of its folder"
    )


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"run name {name!r}: expected letters, digits, '.', '_' and '-', not starting with '.'; "
            "choose another with --name"
        )


def _folders(runs: Path) -> list[Path]:
    return sorted(path for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []


def write_config(run: Path, config: dict[str, Any]) -> None:
    """Store what the run was asked to do; its presence marks the folder as a run."""
    write_json(run / CONFIG, config)


def read_config(run: Path) -> dict[str, Any]:
    """What `write_config` stored. Raises UserError if it is missing or damaged, a field of another type included."""
    path = run / CONFIG
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds a {type(config).__name__}, expected an object; restore the file")
    for name, expected in _CONFIG_FIELDS.items():
        if name in config and type(config[name]) is not expected:
            raise UserError(f"{path}: {name} is {config[name]!r:.40}, expected {expected.__name__}; restore the file")
    return config


def read_whole_config(run: Path) -> dict[str, Any]:
    """The same of a run to go on with: it must say the recipe, the seed and the shards. Raises UserError if not."""
    config = read_config(run)
    missing = {"recipe", "seed", "shards"} - set(config)
    if missing:
        raise UserError(f"{run / CONFIG}: no {', '.join(sorted(missing))}; restore the file or start a new run")
    return config
