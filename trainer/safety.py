"""What ends a run: losses that are not finite, steps that hang, a signal."""

import contextlib
import faulthandler
import json
import math
import os
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.common.console import explain_os_error, leave_closed_terminal, show_cursor, warn
from pipeline.common.errors import UserError
from pipeline.manifest import KEY_DIGITS
from trainer.config import LOG_STEPS
from trainer.distributed import Ranks, gather, is_first_to, list_signals, reduce_sum, under_launcher
from trainer.record.runs import CHECKPOINTS

NONFINITE = "nonfinite.jsonl"  # in a run's folder
_STUCK_MARGIN = 0.02  # of ln(classes): so close to it a loss is no better than guessing
_STUCK_EPOCHS, _STUCK_STEPS, _STUCK_FEWEST = 5, 5000, 500


class LossGuard:
    """Told of each step by all ranks alike: `begin`, then `may_update` (skip) or `saw` (stop)."""

    def __init__(
        self, ranks: Ranks, folder: Path, mode: Literal["stop", "skip"], parameters: Sequence[Tensor], skipped: int = 0
    ) -> None:
        """`skipped`: updates left out so far, of a run resumed."""
        self._ranks, self._folder, self._parameters = ranks, folder, parameters
        self.asks = mode == "skip"
        self.skipped, self.has_skipped, self._in_a_row = skipped, False, 0
        self._step, self._about = 0, {"epoch": 0, "lr": 0.0}
        self._keys: deque[tuple[int, Tensor]] = deque(maxlen=LOG_STEPS)
        self._first = torch.zeros((), dtype=torch.int64, device=ranks.device)  # 0: none

    def begin(self, step: int, keys: Tensor, *, epoch: int, lr: float) -> None:
        """`step`, from 1, is about to learn from the samples `keys`, int64 (B,) on the CPU."""
        self._step, self._about, self.has_skipped = step, {"epoch": epoch, "lr": lr}, False
        self._keys.append((step, keys))

    def saw(self, loss: Tensor) -> None:
        """This rank's loss of the step, wherever it is; nothing waits for it."""
        self._first.masked_fill_((self._first == 0) & ~loss.isfinite(), self._step)

    def may_update(self, loss: Tensor) -> bool:
        """Whether loss and gradients are finite on all ranks; else the step counts as skipped.

        Raises UserError, on all ranks, after as many in a row as a record has steps.
        """
        norms = [torch.linalg.vector_norm(p.grad, ord=math.inf) for p in self._parameters if p.grad is not None]
        mine = ~torch.stack([loss.detach().float(), *(norm.float() for norm in norms)]).isfinite().all()
        if not int(reduce_sum(mine.to(torch.int64), self._ranks)):
            self._in_a_row = 0
            return True
        self.has_skipped, self.skipped, self._in_a_row = True, self.skipped + 1, self._in_a_row + 1
        where = self._save_keys(self._step, not bool(loss.isfinite()), "skipped")
        if self._in_a_row >= LOG_STEPS:
            raise UserError(
                f"{self._in_a_row} steps in a row up to step {self._step} had a loss or gradients that are not finite; "
                f"their samples are in {where}: go on from the last checkpoint with --resume, or try a lower --lr"
            )
        return False

    def stop(self, loss: float) -> None:
        """Raises UserError, on all ranks: the mean `loss` up to this step is not finite."""
        found = [number for number in gather(int(self._first), self._ranks) if number]
        first = min(found, default=self._step)
        where = self._save_keys(first, int(self._first) == first, "stopped")
        is_saved = any((self._folder / CHECKPOINTS).glob("*.pt"))
        kept = "the last checkpoint is kept" if is_saved else "no checkpoint had been saved yet"
        raise UserError(
            f"training loss is {loss} after step {self._step}, expected a finite number: step {first} was the first, "
            f"its samples are in {where}; {kept}: try a lower --lr, or --on-nonfinite skip"
        )

    def _save_keys(self, step: int, is_mine: bool, action: str) -> str:
        """Add a line about the batch of `step` on all ranks; says where."""
        keys = next((keys.tolist() for number, keys in self._keys if number == step), [])
        mine = {"loss_finite": not is_mine, "keys": [f"{key:0{KEY_DIGITS}d}" for key in keys]}
        line: dict[str, Any] = {"step": step, **self._about, "action": action, "ranks": gather(mine, self._ranks)}
        path = self._folder / NONFINITE
        if self._ranks.is_first:
            try:
                with path.open("a", encoding="ascii") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:  # what is wrong with the loss comes first
                return f"{path} (not written: {explain_os_error(error)})"
        return str(path)


class StuckLoss:
    """Notices, once, that the loss stays at ln(classes), that of guessing.

    For 5 epochs, but at least 500 steps and at most 5000: AlexNet's own start may take 2000.
    """

    def __init__(self, num_classes: int, steps_per_epoch: int) -> None:
        self._guessing, self._num_classes = math.log(num_classes), num_classes
        self._long = min(max(_STUCK_EPOCHS * steps_per_epoch, _STUCK_FEWEST), _STUCK_STEPS)
        self._stuck_steps, self._is_told = 0, False

    def watch(self, loss: float, num_steps: int, lr: float) -> str | None:
        """A mean loss over the last `num_steps` steps. Returns what to say about it, if anything."""
        is_stuck = abs(loss - self._guessing) <= _STUCK_MARGIN * self._guessing
        self._stuck_steps = self._stuck_steps + num_steps if is_stuck else 0
        if self._is_told or self._stuck_steps < self._long:
            return None
        self._is_told = True
        return (
            f"for {self._stuck_steps} steps the loss has been that of guessing, ln({self._num_classes}) = "
            f"{self._guessing:.3f}; known causes: a rate too high, so that its ReLUs are dead (--lr is {lr:g}: try a "
            "tenth), or too low; weights of N(0, 0.01), which are for pixels of 0-255, on input of unit variance "
            "(--set init=he); biases of 1, flat for thousands of steps (--set hidden_bias=0.1); labels that do not "
            "belong to the images, or colours of other shards (alexnet-prep verify, preview)"
        )


STATUS_HUNG, STATUS_HUNG_RANK = 1, 70  # alone; as a rank, whose launcher may start it again
HUNG = "hung"
_STDERR = 2
START_S = 1800.0  # the least that a start may take: other machines may still be downloading shards
_ANSWER_S = 1.0  # for another process to write its stacks, or for the ranks' store to say who is first
_LEAVE_S = 5.0  # a rank that is not the first to find it lets that one speak
_STATES = {"R": "running", "S": "sleeping", "D": "waiting for a disk", "T": "stopped", "Z": "ended"}


class Watchdog:
    """`with Watchdog(ranks, timeout_s) as watchdog: ... watchdog.beat("step 5")`. Every rank makes one alike.

    From the first beat on, nothing may take longer than `timeout_s`; until then, START_S if that is longer. A process
    that was frozen (Ctrl-Z) has not hung: time is counted in ticks. faulthandler's timer, which is less kind, ends a
    process in which not even these ticks come.
    """

    def __init__(
        self,
        ranks: Ranks,
        timeout_s: float,
        *,
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], object] | None = None,
    ) -> None:
        self._ranks, self._timeout_s, self._end, self._clock = ranks, timeout_s, end, clock
        self._write = write or (lambda text: os.write(_STDERR, text.encode(errors="replace")))
        self._tick_s = min(timeout_s / 10, 5.0)
        self._limit_s = max(timeout_s, START_S)
        self._idle_s, self._last_s, self._after = 0.0, clock(), "the start"
        self._has_moved = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._peers: list[tuple[int, str, int]] = []

    def __enter__(self) -> "Watchdog":
        faulthandler.register(signal.SIGUSR1, file=_STDERR, all_threads=True)
        self._peers = gather((self._ranks.rank, socket.gethostname(), os.getpid()), self._ranks)
        self._last_s = self._clock()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR1)

    def beat(self, after: str) -> None:
        """Something has moved: `after` says what, in the words of "nothing has moved since ..."."""
        self._after, self._limit_s, self._has_moved = after, self._timeout_s, True

    def _watch(self) -> None:
        while not self._over.wait(self._tick_s):
            faulthandler.dump_traceback_later(3 * self._limit_s, exit=True, file=_STDERR)
            if self.tick():
                return

    def tick(self) -> bool:
        """Count the time since the tick before, one and a half ticks at the most; True once this has ended the run."""
        now_s = self._clock()
        passed_s, self._last_s = now_s - self._last_s, now_s
        if self._has_moved:
            self._has_moved, self._idle_s = False, 0.0
            return False
        self._idle_s += min(max(passed_s, 0.0), 1.5 * self._tick_s)
        if self._idle_s < self._limit_s:
            return False
        self._give_up()
        return True

    def _give_up(self) -> None:
        status = STATUS_HUNG_RANK if under_launcher() else STATUS_HUNG
        if not self._is_first():
            time.sleep(_LEAVE_S)
            self._end(status)
            return
        rank = f"rank {self._ranks.rank}: " if self._ranks.world_size > 1 else ""
        self._write(
            f"error: {rank}nothing has moved for {self._limit_s:g} s, since {self._after}: a file system or a peer "
            "that does not answer? What all threads are doing:\n" + dump_stacks()
        )
        for number, host, process in self._peers:
            if process != os.getpid() and host == socket.gethostname():
                self._write(f"rank {number} (process {process}, {find_state(process)}):\n")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGUSR1)
                time.sleep(_ANSWER_S)
        self._write(
            "error: ended after --timeout-s; the last checkpoint is kept: go on with --resume, or with a longer "
            "--timeout-s if it was only slow\n"
        )
        show_cursor()  # the display will not get to it
        self._end(status)

    def _is_first(self) -> bool:
        """Whether no rank of this machine has begun to tell; also true if the ranks' store does not answer."""
        answers: list[bool] = []
        what = f"{HUNG}/{socket.gethostname()}"
        asking = threading.Thread(target=lambda: answers.append(is_first_to(what)), daemon=True)
        asking.start()
        asking.join(_ANSWER_S)
        return answers[0] if answers else True


def dump_stacks() -> str:
    """The stacks of all threads of this process."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def find_state(process: int) -> str:
    """What Linux says about a process: one that is stopped, or waits for a disk, shows no stacks."""
    try:
        letter = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "gone"
    return _STATES.get(letter, letter)


class StopRequest:
    """SIGINT, SIGTERM and SIGHUP as a wish to stop, on which all ranks agree: `with StopRequest(ranks) as stop: ...`.

    SIGINT and SIGTERM are answered at once. A second SIGINT is a KeyboardInterrupt, as ever; not under a launcher,
    which passes on what a terminal has sent to all, and which ends its ranks itself.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._received = ranks, 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in list_signals():
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT and not under_launcher():
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            leave_closed_terminal()
        elif not self._received and not under_launcher():  # a launcher of ours has said so itself
            again = "; Ctrl-C again to leave without saving" if number == signal.SIGINT else ""
            said = f"{signal.Signals(number).name}: finishing the step, saving{again}"
            threading.Thread(target=warn, args=(said,), daemon=True).start()  # here, stderr may be in use
        self._received = self._received or number

    def status(self) -> int:
        """0, or the exit status (129, 130, 143) of the signal that any rank has received. All must ask in step."""
        number = self._received
        if self._ranks.world_size > 1:
            asked = torch.tensor(number)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)  # on the CPU: the GPU's queue is not waited for
            number = int(asked)
        return 128 + number if number else 0
