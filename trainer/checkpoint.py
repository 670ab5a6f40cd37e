"""Checkpoints: everything a run needs to go on, in one file that is either whole or refused.

The decision that shaped it: a checkpoint is written beside its name, forced to the disk and renamed, and carries the
SHA-256 of its every byte, checked before anything is believed, so that neither a full disk nor a flipped bit can cost
more than the time since the checkpoint before. The checksum is the comment of torch's zip archive, so torch.load reads
the file as well. (The archive's own CRC-32s leave out its headers, and a flipped bit there can pass for other weights.)
Reading never runs code: `weights_only=True`. Left out: what the state holds and when to save it (train.py).

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
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError

CHECKPOINT_SCHEMA = 1
_PLAIN = (str, bytes, int, float, bool, type(None))
_NO_COMMENT = b"\0\0"  # a zip archive ends in the length of its comment and the comment
_MARK = b"sha256 "
_COMMENT_BYTES = len(_MARK) + 64
# What torch raises on a sound file with senseless contents: that, too, ends in one line and not in a traceback.
_SENSELESS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, AssertionError)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`: readers see the old checkpoint or the whole new one, also after a power cut.

    Adds the `schema` field. Needs host memory for one copy of the state. The temporary file has a fixed name
    (`.NAME.tmp`), so that a run killed while saving leaves at most one, which its next save replaces.

    Raises OSError, with the path, when writing fails (a full disk): `path` is then as it was and no temporary file is
    left. Raises TypeError for a value that `load` would refuse.
    """
    state = {**state, "schema": CHECKPOINT_SCHEMA}
    _check_plain(state, "state")
    serialised = io.BytesIO()  # in memory first: torch's writer turns a failed write into an unrelated RuntimeError
    torch.save(state, serialised)
    _seal(serialised)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(serialised.getbuffer())
            file.flush()
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


def _seal(archive: io.BytesIO) -> None:
    """Append to torch's zip archive, as its comment, the SHA-256 of all bytes before the digest's own."""
    archive.seek(-len(_NO_COMMENT), os.SEEK_END)
    if archive.read() != _NO_COMMENT:
        raise RuntimeError("torch.save ended its archive with a comment; there is no room for the checksum")
    archive.seek(-len(_NO_COMMENT), os.SEEK_END)
    archive.write(_COMMENT_BYTES.to_bytes(2, "little") + _MARK)
    archive.write(hashlib.sha256(archive.getbuffer()).hexdigest().encode())


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
