"""Top-1 and top-5 error on the validation images: centre crop or ten crops, each image counted once on any ranks.

Only sums cross ranks, in float64, and the number of images is checked against the shards' manifest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.options import LoaderOptions
from pipeline.shards import ShardSet
from trainer.distributed import Ranks, reduce_sum
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from pipeline.loader import EvalLoader

Crops = Literal["centre", "ten"]
BATCH_SIZE = {"centre": 128, "ten": 16}
TOP = 5
Keep = Callable[[Tensor, Tensor, Tensor], None]  # log-probabilities (B, classes), labels (B,), keys (B,)


@dataclass(frozen=True)
class Errors:
    """num_images evaluated; mean cross-entropy in nats; top-1 and top-5 error in percent."""

    num_images: int
    loss: float
    top1_error: float
    top5_error: float


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 (autocast) or float32; "auto" takes bfloat16 where the hardware multiplies matrices in it."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_amx_tile_supported()  # AVX-512's bf16 alone was slower than float32 here
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def make_eval_loader(
    shards: ShardSet, colors: ColorStats, recipe: Recipe, ranks: Ranks, crops: Crops, options: LoaderOptions
) -> "EvalLoader":
    """The loader of the validation images for nets of `recipe`, in batches that fit `crops`."""
    from pipeline.loader import EvalLoader  # here: it needs DALI, which a prediction does not

    # How training decodes is not for the few images of an evaluation, which fit no cache either.
    options = replace(options, decode="auto", host_share=None, cache_gib=0.0)
    return EvalLoader(
        shards,
        colors,
        recipe.transform(train=False),
        options,
        batch_size=BATCH_SIZE[crops],
        crops=crops,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.feed,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: "EvalLoader",
    ranks: Ranks,
    dtype: torch.dtype,
    num_expected: int,
    keep: Keep | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Errors:
    """The errors of `model` over all ranks, the softmax outputs averaged over ten crops (paper, section 4.1).

    dtype: torch.bfloat16 for autocast, else torch.float32; `keep` is given the outputs of each of this rank's batches;
    `on_batch` is called after each.
    Raises UserError if another number of images came.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    for images, labels in loader:
        if len(labels):
            outputs = log_probabilities(model, images, dtype)
            sums += count_errors(outputs, labels)
            if keep:
                keep(outputs, labels, loader.keys)
        on_batch()
    return to_errors(reduce_sum(sums, ranks), num_expected)


def to_errors(sums: Tensor, num_expected: int) -> Errors:
    """Rates from the sums of count_errors over all ranks. Raises UserError if another number of images came."""
    num_images, loss, wrong1, wrong5 = sums.tolist()
    if num_images != num_expected:
        raise UserError(f"evaluated {num_images:.0f} images, expected {num_expected}; check the shards' index files")
    return Errors(int(num_images), loss / num_images, 100 * wrong1 / num_images, 100 * wrong5 / num_images)


def log_probabilities(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Log of the softmax outputs (B, classes) for images (B, 3, 224, 224), or their mean over views (B, V, 3, ...)."""
    views = images if images.dim() == 5 else images.unsqueeze(1)
    batch, num_views = views.shape[:2]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(views.flatten(0, 1).contiguous(memory_format=torch.channels_last))
    per_view = functional.log_softmax(logits.float(), dim=1).view(batch, num_views, -1)
    return per_view.logsumexp(dim=1) - torch.tensor(float(num_views)).log()


def count_errors(log_outputs: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch, float64 (4,): images, cross-entropy, top-1 mistakes, top-5 mistakes.

    log_outputs (B, classes): logits or log-probabilities. An output that is not a number is a mistake.
    """
    log_outputs = log_outputs.detach().float()
    loss = functional.cross_entropy(log_outputs, labels, reduction="sum")
    own = log_outputs.gather(1, labels[:, None])
    better = (log_outputs > own).sum(dim=1)
    hopeless = log_outputs.isnan().any(dim=1)
    wrong1, wrong5 = ((better >= k) | hopeless for k in (1, TOP))
    count = torch.full_like(loss, len(labels), dtype=torch.float64)
    return torch.stack([count, loss.double(), wrong1.sum().double(), wrong5.sum().double()])
