"""The folder that shards are written to: whose it is, what in it may be removed, whether there is room.

The decision that shaped it: nothing is overwritten or removed on the strength of its name alone. A folder is ours if
it is empty or says which job it belongs to (manifest, `job.json` of an unfinished job, or a shard's record); in a
folder that is ours, what the current job cannot account for is swept away. Left out: what a shard holds.
"""

import os
import re
import shutil
from pathlib import Path

from pipeline.colorstats import COLOR_FILE, MEAN_IMAGE_FILE
from pipeline.errors import UserError
from pipeline.shardset import MANIFEST, SCHEMA, ShardSet, read_json, write_json

JOB_FILE = "job.json"
FAILURES_FILE = "failures.jsonl"
# The manifest first: from then on the folder counts as unfinished.
_FOLDER_FILES = (MANIFEST, COLOR_FILE, MEAN_IMAGE_FILE, FAILURES_FILE)
_SHARD_FILE = re.compile(r"(train|val)-\d{6}\.(tar|idx|json)")
_TEMPORARY_FILE = re.compile(r"\.(?P<name>.+)\.tmp(?P<pid>\d+)")
_NUM_NAMED = 3


def find_complete(out: Path, job: str) -> ShardSet | None:
    """The finished output of `job`, if that is what `out` holds. Raises UserError if it is, and is damaged."""
    return ShardSet.open(out) if _job_in(out / MANIFEST) == job else None


def check_ours(out: Path, job: str, *, force: bool) -> None:
    """Raise UserError unless `out` may be written: new, empty, or of this job (with `force`: of any job of ours)."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, expected a folder; choose another --out")
    names = _list_names(out)
    if not names:
        return
    records = (name for name in names if _SHARD_FILE.fullmatch(name) and name.endswith(".json"))
    owner = next((found for name in (MANIFEST, JOB_FILE, *records) if (found := _job_in(out / name))), None)
    if owner is None:
        shown = ", ".join(repr(name) for name in names[:_NUM_NAMED])
        raise UserError(
            f"{out}: holds {len(names)} files that are no shards made here ({shown}...), expected a new or empty "
            "folder; choose another --out"
        )
    if owner != job and not force:
        raise UserError(
            f"{out}: holds shards of another job ({owner[:12]}, this one is {job[:12]}): other images or options; "
            "replace them with --force, or choose another --out"
        )


def check_room(out: Path, needed_bytes: int, *, kept: set[str]) -> None:
    """Raise UserError if `needed_bytes` will not fit, counting what `claim` will free. `kept` are names of tars."""
    folder = out
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    freed = sum(_size_of(out / name) for name in _list_ours(out, kept))
    free = shutil.disk_usage(folder).free + freed
    if needed_bytes > free:
        raise UserError(
            f"{out}: about {_in_gb(needed_bytes)} needed, {_in_gb(free)} free on its disk; "
            "free some space or choose another --out"
        )


def claim(out: Path, job: str, *, kept: set[str]) -> None:
    """Make the folder, mark it as this job's, and remove what an earlier job or a killed run left but for `kept`."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / JOB_FILE, {"schema": SCHEMA, "job": job})
    for name in _list_ours(out, kept):
        (out / name).unlink(missing_ok=True)
    remove_temporaries(out)


def release(out: Path) -> None:
    """Take the mark of an unfinished job away, once the manifest is there."""
    (out / JOB_FILE).unlink(missing_ok=True)


def remove_temporaries(out: Path) -> None:
    """Remove half-written files of ours whose writers are no longer alive."""
    for path in out.iterdir():
        match = _TEMPORARY_FILE.fullmatch(path.name)
        if match and _is_ours(match["name"]) and not _is_alive(int(match["pid"])):
            path.unlink(missing_ok=True)


def _job_in(path: Path) -> str | None:
    """The job that a manifest, mark or record names; None if there is no such file or it names none."""
    try:
        raw = read_json(path)
    except UserError:
        return None
    job = raw.get("job") if isinstance(raw, dict) else None
    return job if isinstance(job, str) else None


def _is_ours(name: str) -> bool:
    return name in (*_FOLDER_FILES, JOB_FILE) or bool(_SHARD_FILE.fullmatch(name))


def _list_names(out: Path) -> list[str]:
    """What lies in `out`, but for half-written files of ours: these a run leaves that is killed before its mark."""
    if not out.is_dir():
        return []
    names = sorted(path.name for path in out.iterdir())
    temporary = {name for name in names if (match := _TEMPORARY_FILE.fullmatch(name)) and _is_ours(match["name"])}
    return [name for name in names if name not in temporary]


def _list_ours(out: Path, kept: set[str]) -> list[str]:
    """Files of ours that do not belong to the tars `kept`, in the order to remove them."""
    names = set(_list_names(out))
    stems = {Path(file).stem for file in kept}
    shard_files = [name for name in names if _SHARD_FILE.fullmatch(name) and Path(name).stem not in stems]
    # Records before tars: without its record a shard is not taken for finished.
    return [name for name in _FOLDER_FILES if name in names] + sorted(
        shard_files, key=lambda name: name[-5:] != ".json"
    )


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _in_gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
