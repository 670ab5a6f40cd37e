"""What a rank trains on: the loader as the recipe wants it, epoch by epoch.

Whatever makes the loader begin its random streams anew (another graph, another number of ranks from some epoch on)
gives it a seed of its own, derived from the run's, so that no epoch is repeated.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from pipeline.colors import ColorStats
from pipeline.loader import Batch, TrainLoader
from pipeline.options import LoaderOptions, stream_seed
from pipeline.shards import ShardSet
from trainer.distributed import Ranks
from trainer.parallel import all_gather
from trainer.recipe import Recipe


def make_train_loader(
    shards: ShardSet,
    colors: ColorStats,
    recipe: Recipe,
    ranks: Ranks,
    seed: int,
    options: LoaderOptions,
    *,
    as_pixels: bool = False,
) -> TrainLoader:
    """`as_pixels`: crops as uint8, to be exchanged and then finished, with their draws."""
    transform = recipe.transform(train=True)
    return TrainLoader(
        shards,
        colors,
        replace(transform, dtype="uint8") if as_pixels else transform,
        options,
        global_batch_size=recipe.global_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.feed,
        seed=seed,
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
        options: LoaderOptions,
        whole: bool = False,
    ) -> None:
        self._shards, self._colors, self._recipe, self._ranks = shards, colors, recipe, ranks
        self.seed, self._options, self._whole = seed, options, whole
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
            del self._loader  # and with it its memory: the next one asks for as much
            self._loader = self._make_loader()

    def end_epoch(self) -> None:
        """As a loop does behind its last batch, where none is left."""
        self._loader.end_epoch()

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        return self._exchange(batches) if self._whole else batches

    def _exchange(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        finish = self._loader.transform.constants(self._colors).finisher(self._ranks.device)
        for images, labels in batches:
            draws = self._loader.draws
            assert draws is not None  # a batch was given
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
            self._options,
            as_pixels=self._whole,
        )
