"""Checkpoints: written beside training, whole or refused, and how a run goes on from one."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from pipeline.common.console import explain_os_error
from pipeline.common.errors import UserError
from pipeline.manifest import MANIFEST
from pipeline.options import stream_seed
from pipeline.shards import ShardSet
from trainer.distributed import Ranks, gather, launch_id, restart_count
from trainer.record.runs import CHECKPOINTS, CONFIG, LAST, read_config

if TYPE_CHECKING:
    from trainer.config import Job


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


_STEP_NAME = re.compile(r"step-(\d{8,})\.pt")
_POLL_S = 5.0  # how often ranks that wait for a write hear of it


def step_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}.pt"


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
        self._on_gpu = False

    def take(self, state: Any) -> Any:
        """`state` with its tensors copied; those from a GPU have arrived after `wait`, as they were at this call."""
        self._on_gpu, self._copied = False, None
        copy = self._copy(state, "")
        if self._on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copy

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            self._on_gpu |= value.is_cuda
            buffer = self._buffer(value, where)
            if value.device.type == "cpu" and value.stride() == buffer.stride():  # alike, and without gaps
                # by one thread: it fills the memory's bandwidth, and several wait for the last where cores are taken
                ctypes.memmove(buffer.data_ptr(), value.data_ptr(), value.nbytes)
                return buffer
            return buffer.copy_(value.detach(), non_blocking=value.is_cuda)
        if isinstance(value, dict):
            kind = OrderedDict if isinstance(value, OrderedDict) else dict
            return kind((key, self._copy(item, f"{where}/{key}")) for key, item in value.items())
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, f"{where}/{number}") for number, item in enumerate(value))
        return value

    def _buffer(self, like: Tensor, where: str) -> Tensor:
        kept = self._buffers.get(where)
        form = (like.shape, like.dtype, like.stride())
        if kept is None or (kept.shape, kept.dtype, kept.stride()) != form:
            kept = torch.empty_like(like, device="cpu", pin_memory=like.is_cuda, requires_grad=False)
            self._buffers[where] = kept
        return kept


class Saver:
    """Saves the checkpoints of a run, from its first rank; the other ranks' savers do nothing but wait along.

    `folder`: of checkpoints; `keep`: so many of the last ones stay, besides what other names point to; `minutes`: after
    so many without a save another one is due, 0: never. `before` is called before each write (in its thread), `tell`
    with the step and a line about each write that failed, `alive` while a write makes progress that ranks wait for.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        keep: int,
        minutes: float,
        before: Callable[[], None],
        tell: Callable[[int, str], None],
        alive: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._ranks, self._keep, self._period_s = folder, ranks, keep, 60 * minutes
        self._before, self._tell, self._alive, self._clock = before, tell, alive, clock
        self._saved_s, self._snapshot = clock(), Snapshot()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._step, self._num_chunks = 0, 0
        if ranks.is_first:
            for left in folder.glob(".*.tmp"):  # by a killed run
                left.unlink(missing_ok=True)

    def prepare(self, state: dict[str, Any]) -> None:
        """Take the memory for copies of `state` now, at the start, where nobody waits for it."""
        if self._ranks.is_first and not self._is_writing():
            self._snapshot.take(state)
            self._snapshot.wait()

    def is_due(self) -> bool:
        """Whether it is time for a save between epochs' ends; only the first rank knows."""
        if not self._ranks.is_first or not self._period_s or self._is_writing():
            return False
        return self._clock() - self._saved_s >= self._period_s

    def begin(self, state: dict[str, Any], step: int, names: tuple[str, ...] = ()) -> None:
        """Copy `state` and begin to write it; `names` and `last.pt` then mean it, too. Nothing may be under way."""
        if not self._ranks.is_first:
            return
        if self._is_writing():
            raise RuntimeError("a checkpoint is still being written")
        self.check()
        copy = self._snapshot.take(state)
        self._saved_s, self._step, self._error = self._clock(), step, None
        self._thread = threading.Thread(target=self._run, args=(copy, step, names), name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Tell of a write that has failed. Raises what was no fault of the disk, UserError for weights not finite."""
        if self._is_writing():
            return
        error, self._error = self._error, None
        if isinstance(error, OSError):
            self._tell(self._step, explain_os_error(error))
        elif error is not None:
            raise error

    def wait(self) -> None:
        """Until nothing is under way, then as `check`. Every rank calls it alike."""
        seen = -1
        while True:
            if self._thread is not None:
                self._thread.join(_POLL_S)
            is_writing, num_chunks = gather((self._is_writing(), self._num_chunks), self._ranks)[0]
            if num_chunks != seen:
                seen = num_chunks
                self._alive()
            if not is_writing:
                return self.check()

    def finish(self) -> None:
        """As `wait`, but that the last save has failed is an error: UserError."""
        failed: list[str] = []
        tell, self._tell = self._tell, lambda _step, what: failed.append(what)
        try:
            self.wait()
        finally:
            self._tell = tell
        if failed:
            kept = next(iter(list_steps(self._folder)), None)
            rest = f"the one of step {kept} is kept" if kept is not None else "there is none before it"
            raise UserError(f"the last checkpoint, of step {self._step}, could not be saved: {failed[0]}; {rest}")

    def close(self) -> None:
        """After an error: let a write that is under way end, and say no more. Of this rank alone."""
        if self._thread is not None:
            self._thread.join()

    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self, state: dict[str, Any], step: int, names: tuple[str, ...]) -> None:
        try:
            self._snapshot.wait()
            _check_finite(state, step)
            self._before()
            self._write(state, step, names)
        except Exception as error:  # noqa: BLE001 - told by `check`, in the thread that trains
            self._error = error

    def _write(self, state: dict[str, Any], step: int, names: tuple[str, ...]) -> None:
        path = self._folder / step_name(step)
        self._folder.mkdir(exist_ok=True)  # whoever took it away: the next save is whole again
        save(path, state, self._count)
        for name in (*names, LAST):
            link(path, self._folder / name)
        steps = list_steps(self._folder)
        kept = [number for number in steps if number <= step][: self._keep]
        for number, other in steps.items():
            if number not in kept:  # older, or of a future that was left by going back to an earlier checkpoint
                other.unlink()

    def _count(self) -> None:
        self._num_chunks += 1


def _check_finite(state: dict[str, Any], step: int) -> None:
    for part in ("model", "optimizer"):
        for tensor in _tensors(state.get(part)):
            if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                raise UserError(
                    f"after step {step} the {part}'s numbers are not finite, so no checkpoint is made of them; the one "
                    "before is kept: go on from it with --resume, or begin anew with a lower --lr"
                )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


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
        return load(path)
    saved = list_saved(folder / CHECKPOINTS)
    if not saved and (job.or_new or job.resume is None):
        return None
    problems: list[UserError] = []
    for path in saved or [folder / CHECKPOINTS / LAST]:
        try:
            state = load(path)
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
