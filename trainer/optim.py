"""The paper's update rule, and when its rates change.

P = Krizhevsky, Sutskever & Hinton, NIPS 2012, with the section; S = the 2012 source released in 2025, net 145.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from pipeline.common.errors import UserError
from trainer.recipe import Recipe

_CUT = 10.0  # P 5: "divide the learning rate by 10"; S the same
_ROUNDING = 1e-9  # points of error; 30.2 - 30.1 falls short of 0.1 in floating point


class PaperSGD(torch.optim.SGD):
    """v := momentum * v - weight_decay * lr * w - lr * g; w := w + v (P 5), in one pass over memory.

    torch's rule applies the rate behind its buffer, so that a cut also shrinks the steps already begun. Here v is
    -buffer_lr * momentum_buffer, and where a group's rate changes, its momentum of that step is multiplied by the old
    rate over the new. In a group with lr 0 nothing moves, the velocity neither (S); nor where there is no gradient.
    """

    def __init__(self, params: ParamsT, lr: float, momentum: float = 0.9, weight_decay: float = 0.0005) -> None:
        super().__init__(params, lr, momentum, weight_decay=weight_decay, fused=True)
        self.register_step_pre_hook(_put_rate_into_velocity)  # a step() of our own would call others' hooks twice

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What state_dict() gave, here or in an earlier version, whose state was the velocity itself."""
        groups, state = state_dict["param_groups"], state_dict["state"]
        if any("decay" in group for group in groups):
            groups = [{**self.defaults, **group, "weight_decay": group["decay"], "buffer_lr": 1.0} for group in groups]
            groups = [{name: group[name] for name in group if name != "decay"} for group in groups]
            state = {index: {"momentum_buffer": -values["velocity"]} for index, values in state.items()}
        super().load_state_dict({"param_groups": groups, "state": state})


def _put_rate_into_velocity(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for group in optimizer.param_groups:
        lr, moved = group["lr"], [weight for weight in group["params"] if weight.grad is not None]
        if lr == 0.0:
            for weight in moved:
                weight.grad = None  # torch passes it over
        elif moved:
            group["momentum"] = optimizer.defaults["momentum"] * group.get("buffer_lr", lr) / lr
            group["buffer_lr"] = lr
            for weight in moved:
                state = optimizer.state[weight]
                buffer = state.get("momentum_buffer")
                state["momentum_buffer"] = torch.zeros_like(weight) if buffer is None else _lay_out(buffer, weight)
                weight.grad = _lay_out(weight.grad, weight)


def _lay_out(values: Tensor, like: Tensor) -> Tensor:
    """In memory as `like`: torch's fused kernel on the CPU does not look at strides."""
    return values if values.stride() == like.stride() else torch.empty_like(like).copy_(values)


def make_optimizer(model: nn.Module, recipe: Recipe) -> PaperSGD:
    """One group per parameter, with its `layer` ("conv1") and `kind` ("weight", "bias"); a Schedule sets the rates."""
    groups: list[dict[str, Any]] = []
    for name, parameter in model.named_parameters():
        layer, _, kind = name.removeprefix("module.").rpartition(".")  # DistributedDataParallel adds the prefix
        decay = recipe.bias_decay if kind == "bias" and recipe.bias_decay is not None else recipe.weight_decay
        groups.append({"params": [parameter], "layer": layer, "kind": kind, "weight_decay": decay})
    return PaperSGD(groups, lr=recipe.lr, momentum=recipe.momentum)


class Schedule(ABC):
    """Sets the optimiser's rates before each step; epochs count from 1, the steps of an epoch from 0.

    A subclass says what the weights' rate is. On top of that, in every schedule: biases may have a fixed rate of their
    own (`bias_lr`), and conv1's weights and biases follow `conv1_lr_events` from the first of these epochs on.
    """

    def __init__(self, recipe: Recipe, optimizer: torch.optim.Optimizer) -> None:
        """`optimizer`: its groups name their `kind` and `layer`, as `make_optimizer` makes them."""
        self._recipe, self._optimizer = recipe, optimizer
        self._lr = recipe.lr

    @property
    def lr(self) -> float:
        """The weights' rate of the latest step begun (conv1's may differ): the one that logs show."""
        return self._lr

    def begin_step(self, epoch: int, step: int, steps_per_epoch: int) -> None:
        self._lr = self.rate(epoch, step, steps_per_epoch)
        conv1 = [lr for start, lr in self._recipe.conv1_lr_events if start <= epoch]
        for group in self._optimizer.param_groups:
            if conv1 and group["layer"] == "conv1":
                group["lr"] = conv1[-1]
            elif group["kind"] == "bias" and self._recipe.bias_lr is not None:
                group["lr"] = self._recipe.bias_lr
            else:
                group["lr"] = self._lr

    def end_epoch(self, epoch: int, top1_error: float) -> str | None:
        """To be told once, after each epoch, the top-1 error of the centre crop in percent. Returns what the log should
        say about the epochs to come, if anything; then ask `finished`.
        """
        return None if self.finished(epoch) else self._event(epoch + 1)

    def finished(self, epoch: int) -> bool:
        """Whether training is over after this many epochs; also true of a finished run's restored schedule."""
        return epoch >= self._recipe.epochs

    @abstractmethod
    def rate(self, epoch: int, step: int, steps_per_epoch: int) -> float:
        """The weights' rate at this step: a pure function of the arguments, the recipe and the state."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for the state of another kind of schedule."""
        if set(state) != set(self.state_dict()):
            got, expected = ", ".join(state) or "nothing", ", ".join(self.state_dict()) or "nothing"
            raise UserError(
                f"schedule {self._recipe.schedule}: got state {got}, expected {expected}; resume with the run's recipe"
            )

    def _event(self, epoch: int) -> str | None:
        rates = [lr for start, lr in self._recipe.conv1_lr_events if start == epoch]
        return f"conv1 {f'at rate {rates[0]:g}' if rates[0] else 'frozen'} from epoch {epoch}" if rates else None


class Plateau(Schedule):
    """P 5: a tenth of the rate when the validation error stops improving, `plateau_cuts` times; then training ends.

    "Stops" is ours: for `plateau_patience` epochs in a row the error has not been `plateau_min_drop` points or more
    below that of the last improvement. The count starts anew at a cut, the error to beat does not.
    """

    def __init__(self, recipe: Recipe, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(recipe, optimizer)
        self._best_error, self._stalled_epochs, self._cuts = math.inf, 0, 0

    def rate(self, epoch: int, step: int, steps_per_epoch: int) -> float:
        return self._recipe.lr / _CUT**self._cuts

    def end_epoch(self, epoch: int, top1_error: float) -> str | None:
        self._stalled_epochs += 1
        if self._best_error - top1_error >= self._recipe.plateau_min_drop - _ROUNDING:
            self._best_error, self._stalled_epochs = top1_error, 0
        if self._stalled_epochs < self._recipe.plateau_patience:
            return super().end_epoch(epoch, top1_error)
        stall = f"no improvement on {self._best_error:.2f} % for {self._stalled_epochs} epochs"
        if self._cuts == self._recipe.plateau_cuts:
            return f"{stall} after the last cut: training ends"
        self._cuts, self._stalled_epochs = self._cuts + 1, 0
        cut = f"{stall}: rate {self.rate(epoch, 0, 1):g} from epoch {epoch + 1}"
        return "; ".join(filter(None, (cut, super().end_epoch(epoch, top1_error))))

    def finished(self, epoch: int) -> bool:
        return super().finished(epoch) or self._stalled_epochs >= self._recipe.plateau_patience

    def state_dict(self) -> dict[str, Any]:
        return {"best_error": self._best_error, "stalled_epochs": self._stalled_epochs, "cuts": self._cuts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._best_error, self._stalled_epochs = float(state["best_error"]), int(state["stalled_epochs"])
        self._cuts = int(state["cuts"])


class Milestones(Schedule):
    """S: a tenth of the rate from the start of each epoch in `lr_milestones`."""

    def rate(self, epoch: int, step: int, steps_per_epoch: int) -> float:
        return self._recipe.lr / _CUT ** sum(milestone <= epoch for milestone in self._recipe.lr_milestones)

    def _event(self, epoch: int) -> str | None:
        cut = f"rate {self.rate(epoch, 0, 1):g} from epoch {epoch}" if epoch in self._recipe.lr_milestones else None
        return "; ".join(filter(None, (cut, super()._event(epoch)))) or None


class Cosine(Schedule):
    """Half a cosine from `lr` to 0 over all steps, after a linear rise over `warmup_epochs`. In neither P nor S."""

    def rate(self, epoch: int, step: int, steps_per_epoch: int) -> float:
        done = (epoch - 1) * steps_per_epoch + step
        warmup, total = self._recipe.warmup_epochs * steps_per_epoch, self._recipe.epochs * steps_per_epoch
        if done < warmup:
            return self._recipe.lr * min(1.0, (done + 1) / warmup)
        return self._recipe.lr * 0.5 * (1.0 + math.cos(math.pi * (done - warmup) / (total - warmup)))


def make_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer) -> Schedule:
    """The recipe's schedule over an optimiser from `make_optimizer`."""
    kinds: dict[str, type[Plateau | Milestones | Cosine]] = {
        "plateau": Plateau,
        "milestones": Milestones,
        "cosine": Cosine,
    }
    return kinds[recipe.schedule](recipe, optimizer)
