"""One training step on this rank: network, update rule and rates, for the training loop and for every measurement."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import DATA, Parallel
from trainer.distributed import Ranks
from trainer.evaluate import choose_dtype
from trainer.kernels.native import keep_freed_memory, release_freed_memory
from trainer.model import AlexNet
from trainer.optim import make_optimizer, make_schedule
from trainer.parallel import (
    Split,
    connect,
    cut_model,
    cut_optimizer,
    divide,
    join_model,
    join_optimizer,
    whole_model,
)
from trainer.recipe import Recipe

REST_S = 60.0


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    may_update: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Forward, backward, update (paper, section 5: the gradient averaged over the batch). Returns the logits.

    `may_update`, given the loss when the gradients are there, can leave the update out.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(images)
        loss = functional.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    if may_update is None or may_update(loss):
        optimizer.step()
    return logits


def explain_out_of_memory(error: torch.OutOfMemoryError, global_batch_size: int, world_size: int) -> str:
    """One line: what torch says of the memory, the batch, and what to type instead."""
    what = ". ".join(" ".join(str(error).split()).split(". ")[:3])
    local_size = global_batch_size // world_size
    each = f" ({local_size} on each of {world_size} GPUs)" if world_size > 1 else ""
    smaller = f"--global-batch-size {local_size // 2 * world_size} or more --gpus"
    remedy = smaller if local_size > 1 else "--set width=0.5"
    return f"{what}, with --global-batch-size {global_batch_size}{each}; use {remedy}"


class Learner:
    """A network in training: `model`, this rank's part of it, the `net` that is called, its update rule and its rates.

    `state_dict` and `whole_model` are collective, and the same in every mode: every rank calls them alike.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        ranks: Ranks,
        seed: int = 0,
        parallel: Parallel = DATA,
        start: Callable[[AlexNet], None] | None = None,
    ) -> None:
        """`start` may change the whole net's weights before ranks divide it."""
        if ranks.device.type == "cpu":
            keep_freed_memory()
        self._recipe, self._rested_s = recipe, time.monotonic()
        self.dtype = choose_dtype(recipe.precision, ranks.device)
        self.split = Split(parallel.mode, ranks)
        self.model = AlexNet.from_recipe(recipe, num_classes, seed=seed)
        if start is not None:
            start(self.model)
        divide(self.model, self.split)
        self.model.to(ranks.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(self.model, recipe)
        self.schedule = make_schedule(recipe, self.optimizer)
        self.net = connect(self.model, self.split, parallel, ranks)

    def rest(self) -> None:
        """Between epochs: host memory that was freed goes back to the system, once a minute at the most."""
        if time.monotonic() - self._rested_s >= REST_S:
            release_freed_memory()
            self._rested_s = time.monotonic()

    def step(self, images: Tensor, labels: Tensor, may_update: Callable[[Tensor], bool] | None = None) -> Tensor:
        """One update at the schedule's rates, unless `may_update` says no. Returns the logits."""
        return train_step(self.net, self.optimizer, images, labels, self.dtype, may_update)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": join_model(self.model, self.split),
            "optimizer": join_optimizer(self.optimizer.state_dict(), self.split),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(cut_model(state["model"], self.split))
        self.optimizer.load_state_dict(cut_optimizer(state["optimizer"], self.split))
        self.schedule.load_state_dict(state["schedule"])

    def whole_model(self) -> AlexNet:
        """The net as one process has it, for evaluation."""
        return whole_model(self.model, self._recipe, self.split)
