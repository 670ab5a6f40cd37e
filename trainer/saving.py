"""Saving while training goes on: a copy of the state in host memory, written by a thread of its own.

The decision that shaped it: a save is a copy (what training waits for) and a write (what it does not). The copy lies in
memory that is kept from one save to the next, so it costs no page faults, and on a GPU it is made by the device in the
order of the training's own work. At most one write is under way; it makes `step-NUMBER.pt`, then moves the names that
point to it (`last.pt` at the end), then removes the oldest, so a kill at any moment leaves a whole checkpoint under
every name. A write that fails costs only itself: it is told, and the next one tries again. Weights that are not finite
are never saved. Left out: the file's format (checkpoint.py), what a state holds (run.py).

Memory: one copy of weights and velocity on the first rank (488 MB for the paper's net), pinned if they are on a GPU.
"""

import ctypes
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.common.console import explain_os_error
from pipeline.common.errors import UserError
from trainer import checkpoint
from trainer.distributed import Ranks, gather
from trainer.record.runs import LAST

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
        checkpoint.save(path, state, self._count)
        for name in (*names, LAST):
            checkpoint.link(path, self._folder / name)
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
