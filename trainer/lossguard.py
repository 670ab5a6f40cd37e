"""What a loss may say that ends a run or deserves a word: not finite, or for long no better than guessing.

The decision that shaped it: by default nothing waits for the device. The first step whose loss was not finite is noted
on the device, the keys of the latest batches on the host, and both are looked at when a record is due; by then the
weights are ruined, so the run stops and its last checkpoint, which is from before, is what counts. `skip` asks before
each update instead, which makes the host wait for the device in every step; loss and gradients of all ranks must be
finite, else weights and velocity stay as they are. Left out: what to do with the samples; their keys, and by the
shards' records their sources, are in nonfinite.jsonl.
"""

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.common.console import explain_os_error
from pipeline.common.errors import UserError
from pipeline.manifest import KEY_DIGITS
from trainer.config import LOG_STEPS
from trainer.distributed import Ranks, gather, reduce_sum
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
