"""Small files, read and written whole: a reader, or a crash at any instant, finds the old file or the whole new one."""

import json
import os
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.machine import temporary_for


def read_json(path: Path) -> Any:
    """Decoded JSON of `path`. Raises UserError if it cannot be read, is not JSON, or has a name twice in an object."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_doubles)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); restore the file or make it again") from error


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name comes twice in one object")
    return dict(pairs)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` so that a reader sees the old file or the whole new one, never a part."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def user_cache() -> Path | None:
    """The user's folder for what can be made again; None for a user without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(named) if named.startswith("/") else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "alexnet-dali" if folder.is_absolute() else None


def sync_folder(path: Path) -> None:
    """Make sure that the names in a folder outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename. On any failure the temporary file is removed and `path`, which the
    error names, is as it was."""
    temporary = temporary_for(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None:  # of the system: a failed write does not say where
            error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
