"""How the net is spread over ranks: the batch, the paper's two columns, or convolutions by batch and the rest by unit.

The decision that shaped it: the net stays AlexNet itself. A mode says, of each weight, along which dimension ranks
divide it; its tensors are cut accordingly, and an exchange is hooked in before the layers that need more than their
rank has. In every mode a rank is fed its slice of the global batch's labels and answers with the logits of that
slice, so losses, errors and their sums are the same code. Left out: the collectives (exchange.py) and which mode is
the fastest where (interconnect.py).

- data: every rank has the whole net and a slice of the batch; gradients are averaged.
- columns: P 3.2 and figure 2. Rank r holds tower r of every layer and sees the whole batch. Exchanged are the inputs
  of conv3, fc6 and fc7, and what each tower adds to fc8's outputs.
- hybrid: Krizhevsky, "One weird trick", 2014. Convolutions as in data; of fc6 and fc7 each rank holds some units and
  sees the whole batch.

P = Krizhevsky, Sutskever & Hinton, NIPS 2012, with the section.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pipeline.common.errors import UserError
from trainer.distributed import Ranks
from trainer.exchange import GatherAlong, SumOfParts, all_gather, reduce_gradients
from trainer.model import AlexNet
from trainer.recipe import Recipe

Mode = Literal["data", "columns", "hybrid"]
MODES: tuple[Mode, ...] = get_args(Mode)
_CONVOLUTIONS, _BY_UNIT = ("conv1", "conv2", "conv3", "conv4", "conv5"), ("fc6", "fc7")


@dataclass(frozen=True)
class Parallel:
    """The mode, and how gradients are averaged where they are: in buckets of `bucket_mib`, as `gradients`."""

    mode: Mode = "data"
    bucket_mib: float = 25.0
    gradients: Literal["float32", "bf16"] = "float32"


DATA = Parallel()


def check(mode: Mode, recipe: Recipe, world_size: int) -> None:
    """Raises UserError, with the remedy, for a mode that this recipe or this number of ranks does not allow."""
    if recipe.global_batch_size % world_size:
        raise UserError(
            f"global batch size {recipe.global_batch_size}: expected a multiple of the {world_size} ranks; "
            f"set --global-batch-size {max(1, recipe.global_batch_size // world_size) * world_size}"
        )
    if world_size == 1:
        return
    if mode == "columns":
        if world_size != 2:
            raise UserError(
                f"--parallel columns: {world_size} ranks, expected 2, one a tower; use --parallel data or hybrid"
            )
        if recipe.num_towers != 2 or recipe.lrn_across_towers:
            what = "num_towers=1" if recipe.num_towers != 2 else "lrn_across_towers=true"
            raise UserError(
                f"--parallel columns: recipe {recipe.name} has {what}, so it has no two columns; "
                "use --parallel data or hybrid"
            )
    if mode == "hybrid":
        units = _count_units(recipe)
        if units % world_size:
            raise UserError(
                f"--parallel hybrid: {units} units of fc6 and fc7 cannot be divided among {world_size} ranks; "
                "use a number that divides them, or --parallel data"
            )


def _count_units(recipe: Recipe) -> int:
    with torch.device("meta"):
        return AlexNet(recipe, 1).fc6.out_features


class Split:
    """Which part of each tensor of the net a rank holds, by the tensor's name ("fc6.weight")."""

    def __init__(self, mode: Mode, ranks: Ranks) -> None:
        self.mode: Mode = mode if ranks.world_size > 1 else "data"
        self._rank, self.world_size = ranks.rank, ranks.world_size

    def dim(self, name: str) -> int | None:
        """The dimension that ranks divide; None for a tensor that each holds whole."""
        layer, _, kind = name.rpartition(".")
        if self.mode == "data" or (self.mode == "hybrid" and layer in _CONVOLUTIONS):
            return None
        if layer == "fc8":
            return 1 if kind == "weight" else None  # its inputs: a tower adds its share to every output
        return 0  # kernels, or units

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a tensor, with memory of its own."""
        dim = self.dim(name)
        return whole if dim is None else whole.chunk(self.world_size, dim)[self._rank].clone()

    def join(self, name: str, part: Tensor) -> Tensor:
        """The whole of a tensor, on every rank. Every rank calls it alike."""
        dim = self.dim(name)
        return part if dim is None else torch.cat(all_gather(part, "parameters").unbind(), dim)


def join_model(model: AlexNet, split: Split) -> dict[str, Tensor]:
    """The state of the whole net, the same in every mode. Every rank calls it alike."""
    return {name: split.join(name, tensor) for name, tensor in model.state_dict().items()}


def cut_model(state: Mapping[str, Tensor], split: Split) -> dict[str, Tensor]:
    """This rank's part of a whole net's state."""
    return {name: split.cut(name, tensor) for name, tensor in state.items()}


def join_optimizer(state: dict[str, Any], split: Split) -> dict[str, Any]:
    """An optimiser's state as one process would have it. Every rank calls it alike."""
    return _map_optimizer(state, split.join)


def cut_optimizer(state: dict[str, Any], split: Split) -> dict[str, Any]:
    """This rank's part of an optimiser's state as one process has it."""
    return _map_optimizer(state, split.cut)


def _map_optimizer(state: dict[str, Any], change: Any) -> dict[str, Any]:
    changed = {}
    for group in state["param_groups"]:
        name = f"{group['layer']}.{group['kind']}"  # one parameter a group: optim.make_optimizer
        for index in group["params"]:
            values = state["state"].get(index, {})
            changed[index] = {
                key: change(name, value) if isinstance(value, Tensor) and value.dim() else value
                for key, value in values.items()
            }
    return {**state, "state": changed}


def whole_model(model: AlexNet, recipe: Recipe, split: Split) -> AlexNet:
    """The net as one process has it, on this rank's device; `model` itself where nothing is divided."""
    if split.mode == "data":
        return model
    weight = model.fc8.weight
    with torch.device("meta"):
        whole = AlexNet(recipe, model.num_classes)
    whole.to_empty(device=weight.device).to(weight.dtype)
    whole.load_state_dict(join_model(model, split))
    return whole.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def divide(model: AlexNet, split: Split) -> None:
    """Cut the whole net in place to this rank's part, and hook the exchanges in."""
    if split.mode == "data":
        return
    for layer_name, layer in model.named_children():
        for kind, weight in list(layer.named_parameters()):
            part = split.cut(f"{layer_name}.{kind}", weight.detach())
            setattr(layer, kind, nn.Parameter(part))
    if split.mode == "columns":
        model.recipe = replace(model.recipe, num_towers=1)  # of this rank: normalisation has one tower's maps
        for layer in (model.conv2, model.conv4, model.conv5):
            layer.groups //= 2
        model.conv3.register_forward_pre_hook(_gather_maps)
        model.fc6.register_forward_pre_hook(partial(_gather, dim=1))
    else:  # each rank's images to all; DistributedDataParallel averages the convolutions' gradients, ours are summed
        model.fc6.register_forward_pre_hook(partial(_gather, dim=0, sum_to_mean=True))
    model.fc7.register_forward_pre_hook(partial(_gather, dim=1))
    model.fc8 = _PartialOutputs(model.fc8)


def _gather(_layer: nn.Module, inputs: tuple[Tensor], dim: int, sum_to_mean: bool = False) -> Tensor:
    (x,) = inputs
    return GatherAlong.apply(x, dim, float(torch.distributed.get_world_size()) if sum_to_mean else 1.0)


def _gather_maps(_layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    (x,) = inputs
    maps_last = x.permute(0, 2, 3, 1)  # as they lie in memory under channels_last
    return GatherAlong.apply(maps_last, 3, 1.0).permute(0, 3, 1, 2)


class _PartialOutputs(nn.Linear):
    """fc8 over this rank's inputs: logits of this rank's slice of the batch, summed over ranks."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.weight.shape[1], layer.weight.shape[0]
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return SumOfParts.apply(functional.linear(x, self.weight), self.bias)


def connect(model: AlexNet, split: Split, options: Parallel, ranks: Ranks) -> nn.Module:
    """The module to call in training: `model`, already on its device, where no gradient needs averaging; else wrapped.

    Gradients are views of the buckets that are averaged, so they exist once.
    """
    if ranks.world_size == 1 or split.mode == "columns":
        return model
    if split.mode == "hybrid":
        divided = [name for name, _ in model.named_parameters() if not name.startswith(_CONVOLUTIONS)]
        # of torch's own model-parallel wrappers; the public way, a wrapper around a part, would cut forward() in two
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, divided)
    on = [ranks.device] if ranks.device.type == "cuda" else None
    net = DistributedDataParallel(model, device_ids=on, bucket_cap_mb=options.bucket_mib, gradient_as_bucket_view=True)
    net.register_comm_hook(options.gradients == "bf16", reduce_gradients)
    return net
