"""How the net is spread over ranks, and what they send each other within a step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pipeline.common.errors import UserError
from trainer.config import Mode, Parallel
from trainer.distributed import Ranks
from trainer.model import AlexNet, shapes_of
from trainer.recipe import Recipe

Kind = Literal["parameters", "activations", "input"]
# torch 2.13 renamed both; the old names go on working, with a warning
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """What one rank has sent: bytes and number of collectives, by kind."""

    sent_bytes: dict[str, float] = field(default_factory=lambda: {"parameters": 0.0, "activations": 0.0, "input": 0.0})
    collectives: dict[str, int] = field(default_factory=lambda: {"parameters": 0, "activations": 0, "input": 0})

    def add(self, kind: Kind, sent_bytes: float) -> None:
        self.sent_bytes[kind] += sent_bytes
        self.collectives[kind] += 1


_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank sends within the block, backward passes included."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def _count(kind: Kind, sent_bytes: float) -> None:
    for traffic in _counting:
        traffic.add(kind, sent_bytes)


def all_gather(x: Tensor, kind: Kind) -> Tensor:
    """Every rank's `x` (all of one shape), in rank order: (world size, *x.shape)."""
    world_size = dist.get_world_size()
    parts = x.new_empty((world_size, *x.shape))
    _all_gather(parts.view(-1), x.contiguous().view(-1))
    _count(kind, (world_size - 1) * x.nbytes)
    return parts


def reduce_scatter(parts: Tensor, kind: Kind) -> Tensor:
    """The sum over ranks of `parts[rank]`, for this rank; parts (world size, ...)."""
    world_size = dist.get_world_size()
    mine = parts.new_empty(parts.shape[1:])
    _reduce_scatter(mine.view(-1), parts.contiguous().view(-1))
    _count(kind, (world_size - 1) * parts.nbytes / world_size)
    return mine


def reduce_gradients(compress: bool, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel's averaging of a bucket, as its communication hook; `compress`: sent as bfloat16."""
    world_size = dist.get_world_size()
    gradients = bucket.buffer()
    sent = (gradients.to(torch.bfloat16) if compress else gradients).div_(world_size)
    _count("parameters", 2 * (world_size - 1) * sent.nbytes / world_size)
    future = dist.all_reduce(sent, async_op=True).get_future()

    def finish(done: torch.futures.Future[Any]) -> Tensor:
        value = done.value()
        averaged: Tensor = value[0] if isinstance(value, list) else value
        return gradients.copy_(averaged) if compress else averaged

    return future.then(finish)


class GatherAlong(torch.autograd.Function):
    """All ranks' tensors (all of one shape) side by side along `dim`; each is given back the sum of its gradients.

    `factor` multiplies that sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, factor: float) -> Tensor:
        """`x` of every rank, in the order of ranks, along `dim`."""
        ctx.dim, ctx.factor = dim, factor
        parts = all_gather(x, "activations")
        return parts.flatten(0, 1) if dim == 0 else torch.cat(parts.unbind(), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """This rank's part of the gradients, summed over ranks, times `factor`; none for `dim` and `factor`."""
        world_size = dist.get_world_size()
        if ctx.dim == 0:
            parts = gradient.contiguous().unflatten(0, (world_size, -1))
        else:
            parts = torch.stack(gradient.chunk(world_size, ctx.dim))
        mine = reduce_scatter(parts, "activations")
        return mine if ctx.factor == 1 else mine * ctx.factor, None, None


class SumOfParts(torch.autograd.Function):
    """This rank's slice of the batch of: the sum over ranks of `part` (batch, outputs), plus `bias` (outputs,).

    Its gradient is that of the mean over ranks of their losses. Every rank sees the whole batch's, so that `bias` gets
    the same gradient on all without an exchange.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, bias: Tensor) -> Tensor:
        """(batch / ranks, outputs) of the sum, in float32 or more."""
        ctx.dtypes = part.dtype, bias.dtype
        part = part.to(torch.promote_types(part.dtype, torch.float32))  # outputs are few: sums of 16 bits save nothing
        return reduce_scatter(part.unflatten(0, (dist.get_world_size(), -1)), "activations") + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The whole batch's gradient of `part`, and that of `bias`."""
        whole = all_gather(gradient, "activations").flatten(0, 1) / dist.get_world_size()
        part_dtype, bias_dtype = ctx.dtypes
        return whole.to(part_dtype), whole.sum(0).to(bias_dtype)


_CONVOLUTIONS, _BY_UNIT = ("conv1", "conv2", "conv3", "conv4", "conv5"), ("fc6", "fc7")


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
        (units,) = shapes_of(recipe)["fc6"].given
        if units % world_size:
            raise UserError(
                f"--parallel hybrid: {units} units of fc6 and fc7 cannot be divided among {world_size} ranks; "
                "use a number that divides them, or --parallel data"
            )


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
