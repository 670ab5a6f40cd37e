"""What learns: the network, its update rule and its schedule, on this rank.

The decision that shaped it: one object is what the training loop and every measurement of a step use, so that what is
timed is what trains. Left out: data (feed.py), epochs and records (train.py).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed import Ranks
from trainer.evaluate import choose_dtype
from trainer.model import AlexNet
from trainer.native import keep_freed_memory
from trainer.optim import make_optimizer, make_schedule
from trainer.recipe import Recipe


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> Tensor:
    """Forward, backward, update (paper, section 5: the gradient averaged over the batch). Returns the logits."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(images)
        loss = functional.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return logits


class Learner:
    """A network in training: `model`, the `net` that is called (it averages gradients over ranks), and its rates."""

    def __init__(self, recipe: Recipe, num_classes: int, ranks: Ranks, seed: int = 0) -> None:
        if ranks.device.type == "cpu":
            keep_freed_memory()
        self.dtype = choose_dtype(recipe.precision, ranks.device)
        self.model = AlexNet.from_recipe(recipe, num_classes, seed=seed)
        self.model.to(ranks.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(self.model, recipe)
        self.schedule = make_schedule(recipe, self.optimizer)
        self.net: nn.Module = self.model
        if ranks.world_size > 1:
            on = [ranks.device] if ranks.device.type == "cuda" else None
            self.net = DistributedDataParallel(self.model, device_ids=on, gradient_as_bucket_view=True)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update at the schedule's rates. Returns the logits."""
        return train_step(self.net, self.optimizer, images, labels, self.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
