"""Checkpoints: everything a run needs to go on, in one file that is either whole or refused.

The decision that shaped it: a checkpoint is written beside its name, forced to the disk and renamed, and carries the
SHA-256 of its every byte, checked before anything is believed, so that neither a full disk nor a flipped bit can cost
more than the time since the checkpoint before. The checksum is the comment of torch's zip archive, so torch.load reads
the file as well. (The archive's own CRC-32s leave out its headers, and a flipped bit there can pass for other weights.)
Reading never runs code: `weights_only=True`. Left out: what the state holds and when to save it (run.py, train.py).

A state is a dict of tensors, dicts, lists, tuples, str, bytes, int, float, bool and None, nested at will. DALI's
serialised reader state travels as the bytes or str DALI gives; NumPy scalars and arrays must become Python numbers
and tensors first.
"""

import hashlib
import io
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from pipeline.common.errors import UserError

CHECKPOINT_SCHEMA = 1
_PLAIN = (str, bytes, int, float, bool, type(None))
_NO_COMMENT = b"\0\0"  # a zip archive ends in the length of its comment and the comment
_MARK = b"sha256 "
_COMMENT_BYTES = len(_MARK) + 64
_CHUNK_BYTES = 16 << 20
# What torch raises on a sound file with senseless contents: that, too, ends in one line and not in a traceback.
_SENSELESS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, AssertionError)


def save(path: Path, state: dict[str, Any], progress: Callable[[], None] | None = None) -> None:
    """Write `state` to `path`: readers see the old checkpoint or the whole new one, also after a power cut.

    Adds the `schema` field. Needs no memory to speak of: tensors go to the file as they lie. `progress` is called after
    every 16 MiB. The temporary file's name follows from the path's (`.NAME.tmp`), so that the next save to it replaces
    what a killed one has left.

    Raises OSError, with the path, when writing fails (a full disk): `path` is then as it was and no temporary file is
    left. Raises TypeError for a value that `load` would refuse.
    """
    state = {**state, "schema": CHECKPOINT_SCHEMA}
    _check_plain(state, "state")
    temporary = _temporary(path)
    try:
        with temporary.open("wb", buffering=0) as file:
            sealing = Sealing(file, progress)
            torch.save(state, cast(BinaryIO, sealing))  # all that it calls is write and flush
            sealing.seal()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def load(path: Path) -> dict[str, Any]:
    """The state saved in `path`, every tensor on the CPU.

    Raises UserError for a file that is missing, cut short, altered, of another schema, or not a checkpoint of this
    project (one with pickled code, for instance, which is not run).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; {_remedy(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {_remedy(path)}") from error
    problem = _broken_seal(data)
    if problem:
        raise UserError(f"{path}: {problem}; {_remedy(path)}")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = "holds more than tensors and plain values (code in its pickle?), which is refused"
        raise UserError(f"{path}: {what}; {_remedy(path)}") from error
    except _SENSELESS as error:
        raise UserError(f"{path}: not a checkpoint ({_brief(error)}); {_remedy(path)}") from error
    schema = state.get("schema") if isinstance(state, dict) else None
    if type(schema) is not int or schema != CHECKPOINT_SCHEMA:
        raise UserError(f"{path}: schema is {_brief(repr(schema))}, expected {CHECKPOINT_SCHEMA}; {_remedy(path)}")
    return state


def is_sealed(path: Path) -> bool:
    """Whether a file ends as those that `save` wrote: a checkpoint of this project, whole or not."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _COMMENT_BYTES))
            return file.read(len(_MARK)) == _MARK
    except OSError:
        return False


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, atomically: a hard link, or a copy where links are not possible.

    Saving to `source` later does not change `target`, since `save` renames a new file into place.
    """
    temporary = _temporary(target)
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except FileNotFoundError:
            raise
        except OSError:  # FAT, some network file systems, another device
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)  # rename(2) leaves it where both already are one file
    _sync_folder(target.parent)


class Sealing:
    """What torch writes its zip archive to: into `file`, and at the end, as the archive's comment, the SHA-256 of all
    bytes before the digest's own."""

    def __init__(self, file: BinaryIO | io.RawIOBase, progress: Callable[[], None] | None = None) -> None:
        self._file, self._progress = file, progress
        self._digest, self._held = hashlib.sha256(), b""
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Never fails: torch's writer turns an exception into an unrelated one. `seal` raises what went wrong."""
        view = memoryview(data).cast("B")
        joined = self._held + bytes(view[-len(_NO_COMMENT) :])
        if len(view) >= len(_NO_COMMENT):
            self._write(memoryview(self._held))
            self._write(view[: -len(_NO_COMMENT)])
        else:
            self._write(memoryview(joined)[: -len(_NO_COMMENT)])
        self._held = joined[-len(_NO_COMMENT) :]  # to be replaced, if these are the archive's last
        return len(view)

    def flush(self) -> None:
        """For torch; nothing is buffered but the last two bytes."""

    def seal(self) -> None:
        """Raises the OSError of the first write that failed."""
        if self._held != _NO_COMMENT:
            raise RuntimeError("torch.save ended its archive with a comment; there is no room for the checksum")
        self._write(memoryview(_COMMENT_BYTES.to_bytes(2, "little") + _MARK))
        self._write(memoryview(self._digest.hexdigest().encode()))
        if self._error is not None:
            raise self._error

    def _write(self, view: memoryview) -> None:
        self._digest.update(view)
        while self._error is None and len(view):
            try:
                view = view[self._file.write(view[:_CHUNK_BYTES]) or 0 :]
            except OSError as error:
                self._error = error
            if self._progress is not None:
                self._progress()


def _broken_seal(data: bytes) -> str | None:
    """What is wrong with the bytes of a checkpoint, if anything."""
    if not data:
        return "the file is empty"
    if data[-_COMMENT_BYTES:-64] != _MARK:
        return f"cut short, or not a checkpoint ({len(data)} bytes, no checksum at their end)"
    if hashlib.sha256(memoryview(data)[:-64]).hexdigest().encode() != data[-64:]:
        return "damaged (its checksum does not match)"
    return None


def _check_plain(value: Any, where: str) -> None:
    """Refuse now what `load` would refuse later, when the run is gone."""
    if isinstance(value, torch.Tensor) or type(value) in _PLAIN:
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for position, item in enumerate(value):
            _check_plain(item, f"{where}[{position}]")
    else:
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold; "
            "make it a tensor, a container or a plain value first"
        )


def _brief(text: object) -> str:
    return " ".join(str(text).split())[:120]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _sync_folder(folder: Path) -> None:
    """Make a rename last: the entry lives in the folder, not in the file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remedy(path: Path) -> str:
    others = sorted(other.name for other in path.parent.glob("*.pt") if other != path)
    beside = f" (beside it: {', '.join(others[:5])})" if others else ""
    return f"use another checkpoint of the run{beside} with --checkpoint PATH, or resume from another run"
