"""What a rank's training reads: the loader as the recipe wants it, over epochs, and where it is.

The decision that shaped it: whatever makes the loader begin its random streams anew (another graph, another number of
ranks from some epoch on) gives it a seed of its own, derived from the run's, so that no epoch is ever repeated. Ranks
that need the whole batch decode a share each and exchange pixels, a quarter of the bytes of finished input. Left out:
the loader itself (pipeline.loader).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.assemble import FromGraph
from pipeline.colors import ColorStats
from pipeline.feeding import DecodeOption
from pipeline.finish import Transform, Views
from pipeline.graph import Feed, stream_seed
from pipeline.loader import Batch, TrainLoader
from pipeline.shards import ShardSet
from trainer.distributed import Ranks
from trainer.exchange import all_gather
from trainer.recipe import Recipe


@dataclass(frozen=True)
class Feeding:
    """Where images are decoded and kept: arguments of pipeline.TrainLoader. Samples and draws do not depend on it."""

    decode: DecodeOption = "auto"
    host_share: float | None = None
    hw_decoder_load: float = 0.9
    cache: Literal["raw"] | None = None
    prefetch_batches: int = 2


def make_train_loader(
    shards: ShardSet,
    colors: ColorStats,
    recipe: Recipe,
    ranks: Ranks,
    seed: int = 0,
    num_threads: int | None = None,
    feeding: Feeding = Feeding(),
    *,
    as_pixels: bool = False,
) -> TrainLoader:
    """`as_pixels`: crops as uint8, to be exchanged and then finished, with their draws."""
    return TrainLoader(
        shards,
        colors,
        global_batch_size=recipe.global_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.feed,
        mean=recipe.mean,
        lighting=recipe.lighting,
        crop=recipe.crop,
        flip=recipe.flip,
        unit_variance=recipe.unit_variance,
        layout="NHWC",
        seed=seed,
        num_threads=num_threads,
        decode=feeding.decode,
        host_share=feeding.host_share,
        hw_decoder_load=feeding.hw_decoder_load,
        cache=feeding.cache,
        prefetch_batches=feeding.prefetch_batches,
        dtype="uint8" if as_pixels else "float32",
        with_draws=as_pixels,
    )


def exchange_pixels(images: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' crops uint8 (B, 224, 224, 3) and colour shifts float32 (B, 3), from this rank's: images uint8
    (b, 3, 224, 224), channels last in memory, shift (b, 3). On the images' device, in rank order."""
    pixels = all_gather(images.permute(0, 2, 3, 1), "input").flatten(0, 1)
    return pixels, all_gather(shift.to(images.device), "input").flatten(0, 1)


class TrainFeed:
    """This rank's training batches from `epoch` on. Iterate once an epoch, after `begin_epoch`.

    `whole`: images are those of all ranks, in rank order; labels are this rank's own in any case. `seed`: of the
    loader's streams; a state is only good for the same.
    """

    def __init__(
        self,
        shards: ShardSet,
        colors: ColorStats,
        recipe: Recipe,
        ranks: Ranks,
        *,
        seed: int,
        epoch: int = 1,
        num_threads: int | None = None,
        feeding: Feeding = Feeding(),
        whole: bool = False,
    ) -> None:
        self._shards, self._colors, self._recipe, self._ranks = shards, colors, recipe, ranks
        self.seed, self._num_threads, self._feeding, self._whole = seed, num_threads, feeding, whole
        self._lighting = self._lighting_in(epoch)
        self._loader = self._make_loader()

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def step(self) -> int:
        """Batches given so far in this epoch."""
        return self._loader.step

    @property
    def keys(self) -> Tensor:
        """Of this rank's samples in the latest batch: int64 (b,), on the CPU."""
        return self._loader.keys

    def begin_epoch(self, epoch: int) -> None:
        """To be told before each epoch: from `lighting_off_epoch` on it is another graph that reads."""
        if self._lighting_in(epoch) != self._lighting:
            self._lighting = self._lighting_in(epoch)
            del self._loader  # with its cache, if it has one: the next one asks for as much memory
            self._loader = self._make_loader()

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        return self._exchange(batches) if self._whole else batches

    def _exchange(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        finish = _Finish(self._colors, replace(self._recipe, lighting=self._lighting), self._loader.feed)
        for images, labels in batches:
            draws = self._loader.draws
            assert draws is not None  # as_pixels asks for them
            yield Batch(finish(*exchange_pixels(images, draws.shift)), labels)

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any], epoch: int) -> None:
        """Go on in `epoch` where `state` was taken. Raises UserError naming what differs."""
        if self._lighting_in(epoch) == self._lighting_in(epoch - 1) or state["step"]:
            self._loader.load_state_dict(state)  # else: a new graph begins with this epoch

    def _lighting_in(self, epoch: int) -> Literal["paper", "original"] | None:
        off = self._recipe.lighting_off_epoch
        return None if off is not None and epoch >= off else self._recipe.lighting

    def _make_loader(self) -> TrainLoader:
        recipe, seed = replace(self._recipe, lighting=self._lighting), self.seed
        if recipe != self._recipe:  # another graph begins its streams anew: it must not repeat the first epochs
            seed = stream_seed(seed, "no lighting")
        return make_train_loader(
            self._shards,
            self._colors,
            recipe,
            self._ranks,
            seed,
            self._num_threads,
            self._feeding,
            as_pixels=self._whole,
        )


class _Finish:
    """Colour shift, mean and scale of exchanged pixels, by what the loader itself would have finished them with."""

    def __init__(self, colors: ColorStats, recipe: Recipe, feed: Feed) -> None:
        transform = Transform(
            mean=recipe.mean, lighting=recipe.lighting, unit_variance=recipe.unit_variance, layout="NHWC"
        )
        self._finish = FromGraph(colors, transform, feed, cropped=True)

    def __call__(self, pixels: Tensor, shift: Tensor) -> Tensor:
        """pixels uint8 (B, 224, 224, 3), cropped and flipped, shift float32 (B, 3); to float32 (B, 3, 224, 224)."""
        num = len(pixels)
        views = Views(torch.arange(num), torch.zeros(num, 2, dtype=torch.int32), torch.zeros(num, dtype=torch.int32))
        return self._finish({"pixels": pixels}, views.source, views._replace(shift=shift)).result()
