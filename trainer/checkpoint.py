"""Checkpoints: what one holds, how it is written beside training, and how a run goes on from it."""

import contextlib
import ctypes
import hashlib
import io
import os
import pickle
import re
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from pipeline.common.console import explain_os_error
from pipeline.common.errors import UserError
from pipeline.common.files import sync_folder
from pipeline.manifest import MANIFEST
from pipeline.options import stream_seed
from pipeline.shards import ShardSet
from trainer.distributed import Ranks, gather, launch_id, restart_count
from trainer.record.runs import CHECKPOINTS, CONFIG, LAST, read_config

if TYPE_CHECKING:
    from trainer.config import Job

CHECKPOINT_SCHEMA = 1
EPOCH = "epoch.pt"  # in a run's checkpoints: that of the end of its last whole epoch
_STEP_NAME = re.compile(r"step-(\d{8,})\.pt")
_POLL_S = 5.0  # how often ranks that wait for a write hear of it
_PLAIN = (str, bytes, int, float, bool, type(None))
_NO_COMMENT = b"\0\0"  # a zip archive ends in the length of its comment and the comment
_MARK = b"sha256 "
_COMMENT_BYTES = len(_MARK) + 64
# What torch raises on a sound file with senseless contents: that, too, ends in one line and not in a traceback.
_SENSELESS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, AssertionError)


class State(TypedDict):
    """The contents of a checkpoint: whole, whatever the number of ranks and the parallel mode."""

    model: dict[str, Tensor]  # by the names of AlexNet
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    recipe: dict[str, Any]
    num_classes: int
    shards_fingerprint: str
    seed: int  # the run's; the loader's, feed_seed, differs where an epoch has begun on another number of ranks
    feed_seed: int
    step: int  # done
    epoch: int  # from 1: the one to go on in
    time_s: float  # of training, without evaluations
    best_error: float  # %, lowest top-1 error of an evaluation; infinite before the first
    skipped: int  # updates left out with --on-nonfinite skip
    is_best: bool
    arithmetic: dict[str, str]  # what the last bits depend on besides
    ranks: list[dict[str, Any]]  # of each rank: the loader's state, the sums since the last record, random states
    schema: NotRequired[int]  # added by `save`


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path`: readers see the old checkpoint or the whole new one, also after a power cut.

    The file is what torch.save writes, its SHA-256 is the comment of the zip archive. Raises OSError, with the path,
    when writing fails (a full disk): `path` is then as it was and no temporary file is left. Raises TypeError for a
    value that `load` would refuse.
    """
    state = {**state, "schema": CHECKPOINT_SCHEMA}
    _check_plain(state, "state")
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            sealing = Sealing(file)
            torch.save(state, cast(IO[bytes], sealing))
            sealing.seal()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


class Sealing:
    """What torch.save writes to. The SHA-256 is of the bytes that torch gave, not of what the disk has made of them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._held = file, hashlib.sha256(), b""
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Never fails: torch would turn an OSError into an unrelated error. `seal` raises it."""
        view = memoryview(data).cast("B")
        if len(view) >= len(_NO_COMMENT):
            self._put(self._held)
            self._put(view[: -len(_NO_COMMENT)])
            self._held = bytes(view[-len(_NO_COMMENT) :])  # to be replaced, if these are the archive's last
        else:
            joined = self._held + bytes(view)
            self._put(joined[: -len(_NO_COMMENT)])
            self._held = joined[-len(_NO_COMMENT) :]
        return len(view)

    def flush(self) -> None:
        """For torch."""

    def seal(self) -> None:
        """End the archive with a comment: the SHA-256 of all bytes before the digest's own."""
        if self._held != _NO_COMMENT:
            raise RuntimeError("torch.save ended its archive with a comment; there is no room for the checksum")
        self._put(_COMMENT_BYTES.to_bytes(2, "little") + _MARK)
        self._put(self._digest.hexdigest().encode())
        if self._error:
            raise self._error
        self._file.flush()

    def _put(self, piece: bytes | memoryview) -> None:
        self._digest.update(piece)
        try:
            if not self._error:
                self._file.write(piece)
        except OSError as error:
            self._error = error


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


def load(path: Path) -> dict[str, Any]:
    """The state saved in `path` (`State`, where a run has saved it), every tensor on the CPU.

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


def _broken_seal(data: bytes) -> str | None:
    """What is wrong with the bytes of a checkpoint, if anything."""
    if not data:
        return "the file is empty"
    if data[-_COMMENT_BYTES:-64] != _MARK:
        return f"cut short, or not a checkpoint ({len(data)} bytes, no checksum at their end)"
    if hashlib.sha256(memoryview(data)[:-64]).hexdigest().encode() != data[-64:]:
        return "damaged (its checksum does not match)"
    return None


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
    sync_folder(target.parent)


def _brief(text: object) -> str:
    return " ".join(str(text).split())[:120]


def _temporary(path: Path) -> Path:
    """Its name follows from the path's, so that the next save replaces what a killed one has left."""
    return path.with_name(f".{path.name}.tmp")


def _remedy(path: Path) -> str:
    others = sorted(other.name for other in path.parent.glob("*.pt") if other != path)
    beside = f" (beside it: {', '.join(others[:5])})" if others else ""
    return f"use another checkpoint of the run{beside} with --checkpoint PATH, or resume from another run"


def list_steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run's folder of checkpoints that are called after their step, newest first."""
    if not folder.is_dir():  # taken away while the run goes on, say
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := _STEP_NAME.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


class Snapshot:
    """Copies of the tensors in a state, in host memory that the next `take` uses again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, state: Any) -> Any:
        """`state` with its tensors copied; those from a GPU have arrived after `wait`, as they were at this call."""
        copy = self._copy(state, "")
        if torch.cuda.is_initialized():
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copy

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            buffer = self._buffers.get(where)
            if buffer is None or (buffer.shape, buffer.dtype, buffer.stride()) != (
                value.shape, value.dtype, value.stride()
            ):  # fmt: skip
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
                self._buffers[where] = buffer
            if value.device.type == "cpu" and value.stride() == buffer.stride():  # alike, and without gaps
                # by one thread: it fills the memory's bandwidth, and several wait for the last where cores are taken
                ctypes.memmove(buffer.data_ptr(), value.data_ptr(), value.nbytes)
                return buffer
            return buffer.copy_(value.detach(), non_blocking=value.is_cuda)
        if isinstance(value, dict):
            return type(value)((key, self._copy(item, f"{where}/{key}")) for key, item in value.items())
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, f"{where}/{number}") for number, item in enumerate(value))
        return value


class Saver:
    """Saves the checkpoints of a run, from its first rank; the other ranks' savers do nothing but wait along.

    `folder`: of checkpoints; `keep`: so many of the last ones stay, besides what other names point to; `minutes`: after
    so many without a save another one is due, 0: never. `before` is called before each write (in its thread); `tell`
    about each write that failed, with the step, what went wrong and which one is kept; `alive` while ranks wait for a
    write that makes progress.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        keep: int,
        minutes: float,
        before: Callable[[], None],
        tell: Callable[[int, str, str], None],
        alive: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._ranks, self._keep, self._period_s = folder, ranks, keep, 60 * minutes
        self._before, self._tell, self._alive, self._clock = before, tell, alive, clock
        self._saved_s, self._snapshot = clock(), Snapshot()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._step = 0
        if ranks.is_first:
            for left in folder.glob(".*.tmp"):  # by a killed run
                left.unlink(missing_ok=True)

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Take the memory for copies of `state` now, at the start, where nobody waits for it."""
        if self._ranks.is_first and not self._is_writing():  # from that memory
            self._snapshot.take(state)

    def is_due(self) -> bool:
        """Whether it is time for a save between epochs' ends; only the first rank knows."""
        is_possible = self._ranks.is_first and self._period_s and not self._is_writing()
        return bool(is_possible) and self._clock() - self._saved_s >= self._period_s

    def begin(self, state: Mapping[str, Any], step: int, names: tuple[str, ...] = ()) -> None:
        """Copy `state` and begin to write it; `names` and `last.pt` then mean it, too. Nothing may be under way."""
        if not self._ranks.is_first:
            return
        if self._is_writing():
            raise RuntimeError("a checkpoint is still being written")
        self.check()
        copy = self._snapshot.take(state)
        self._saved_s, self._step = self._clock(), step
        self._thread = threading.Thread(target=self._run, args=(copy, step, names), name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Tell of a write that has failed. Raises what was no fault of the disk, UserError for weights not finite."""
        problem = self._take_problem()
        if problem:
            self._tell(self._step, *problem)

    def wait(self) -> None:
        """Until nothing is under way, then as `check`. Every rank calls it alike."""
        self._wait()
        self.check()

    def finish(self) -> None:
        """As `wait`, but that the last save has failed is an error: UserError."""
        self._wait()
        problem = self._take_problem()
        if problem:
            raise UserError(f"the last checkpoint, of step {self._step}, could not be saved: {'; '.join(problem)}")

    def close(self) -> None:
        """After an error: let a write that is under way end, and say no more. Of this rank alone."""
        if self._thread is not None:
            self._thread.join()

    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _wait(self) -> None:
        seen, num_bytes = -1, 0
        while True:
            if self._thread is not None:
                self._thread.join(_POLL_S)
            with contextlib.suppress(FileNotFoundError):  # not begun, or renamed
                num_bytes = _temporary(self._path(self._step)).stat().st_size
            is_writing, num_bytes = gather((self._is_writing(), num_bytes), self._ranks)[0]
            if num_bytes != seen:
                seen = num_bytes
                self._alive()
            if not is_writing:
                return

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.pt"

    def _take_problem(self) -> tuple[str, str] | None:
        """What was wrong with the disk in the last write, and which checkpoint is kept; raises any other error."""
        if self._is_writing() or self._error is None:
            return None
        error, self._error = self._error, None
        if not isinstance(error, OSError):
            raise error
        kept = next(iter(list_steps(self._folder)), None)
        rest = f"the one of step {kept} is kept" if kept is not None else "there is none before it"
        return explain_os_error(error), rest

    def _run(self, state: dict[str, Any], step: int, names: tuple[str, ...]) -> None:
        try:
            self._snapshot.wait()
            _check_finite(state, step)
            self._before()
            self._write(state, step, names)
        except Exception as error:  # noqa: BLE001 - told by `check`, in the thread that trains
            self._error = error

    def _write(self, state: dict[str, Any], step: int, names: tuple[str, ...]) -> None:
        path = self._path(step)
        self._folder.mkdir(exist_ok=True)  # whoever took it away: the next save is whole again
        save(path, state)
        for name in (*names, LAST):
            link(path, self._folder / name)
        steps = list_steps(self._folder)
        kept = [number for number in steps if number <= step][: self._keep]
        for number, other in steps.items():
            if number not in kept:  # older, or of a future that was left by going back to an earlier checkpoint
                other.unlink()


def _check_finite(state: dict[str, Any], step: int) -> None:
    slots = state["optimizer"]["state"].values()
    parts = {"model": [*state["model"].values()], "optimizer": [value for slot in slots for value in slot.values()]}
    for part, values in parts.items():
        numbers = [
            value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
        ]
        if not all(torch.stack(value.aminmax()).isfinite().all() for value in numbers):
            raise UserError(
                f"after step {step} the {part}'s numbers are not finite, so no checkpoint is made of them; the one "
                "before is kept: go on from it with --resume, or begin anew with a lower --lr"
            )


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
    made = sorted(runs.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime, reverse=True) if launch else []
    return next((path.parent for path in made if read_config(path.parent).get("launch_id") == launch), None)


def load_resumed(job: "Job", folder: Path | None, warn: Callable[[str], None]) -> State | None:
    """The checkpoint to go on from; None for a new run, and for one that died before its first checkpoint.

    The newest that is whole: `warn` is told of those that are not. Raises UserError if none is.
    """
    if folder is None:
        return None
    if job.restart_epoch and not restart_count():
        path = folder / CHECKPOINTS / EPOCH
        if not path.is_file():
            raise UserError(f"{folder}: no epoch of it has ended, so there is none to restart from; start a new run")
        return cast(State, load(path))
    saved = list_saved(folder / CHECKPOINTS)
    if not saved and (job.or_new or job.resume is None):
        return None
    problems: list[UserError] = []
    for path in saved or [folder / CHECKPOINTS / LAST]:
        try:
            state = cast(State, load(path))
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


def check_resumable(saved: State, folder: Path | None, shards: ShardSet, ranks: Ranks) -> None:
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


def choose_streams(seed: int, saved: State | None, ranks: Ranks) -> Streams:
    """A new run's streams, or the saved ones' (their positions are in the checkpoint); with another number of ranks,
    streams that no epoch before has used."""
    feed, names = seed, ["dropout", ranks.rank]  # towers of one net, but noise of one's own
    if saved:
        feed = int(saved["feed_seed"])
        if len(saved["ranks"]) != ranks.world_size:
            feed = stream_seed(seed, "epoch", saved["epoch"], "ranks", ranks.world_size)
            names += ["epoch", saved["epoch"], "ranks", ranks.world_size]
    return Streams(feed, stream_seed(seed, *names))
