"""Batches for a PyTorch loop: shuffled and augmented, for training. Evaluation and plain pixels: evalloader.py.

The decision that shaped it: the epoch is ours, the samples are DALI's. Every rank's reader pads its part to the same
number of batches, and the loader stops before the padding, so that ranks take equal steps. Left out: what is done to
the pixels (graph.py, assemble.py, finish.py), what the options mean (feeding.py), and where shards come from
(shards.py).
"""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.assemble import Batch, InFlight, make_assembler
from pipeline.balance import find_host_share
from pipeline.batches import DRAWN, NUMBERS, Batches, Drawn, read_draws
from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.evalloader import EvalLoader, read_pixels
from pipeline.feeding import (
    DecodeOption,
    check_global_batch,
    check_kinds,
    check_ranks,
    count_local_ranks,
    count_threads,
    make_feed,
)
from pipeline.finish import Transform, Views
from pipeline.graph import GRAPH_VERSION, train_pipeline
from pipeline.manifest import KEY_DIGITS
from pipeline.shards import ShardSet
from pipeline.threads import Job

__all__ = ["Batch", "Draws", "EvalLoader", "TrainLoader", "read_pixels"]


_FORM = ("dtype", "layout")  # of a transform: what its result is kept as changes neither samples nor draws


class Draws(NamedTuple):
    """What was drawn for a training batch: offset (B, 2) as (y, x), flip (B,), shift (B, 3) grey levels, keys."""

    offset: Tensor
    flip: Tensor
    shift: Tensor
    keys: list[str]


class _Begun(NamedTuple):
    """A batch under way: what was drawn, its images, the graph's own memory, and DALI's state right after it."""

    drawn: Drawn
    images: Job[Tensor]
    outputs: dict[str, Any]
    checkpoint: bytes


class TrainLoader:
    """Endless training data, an epoch per `for` loop: the part of `rank` out of `world_size`, shuffled, augmented.

    `len(loader)` steps an epoch on every rank; the last incomplete global batch of an epoch is dropped (other images
    each time, since the order changes). A loop that is left early goes on where it was. `state_dict()` between any two
    batches, loaded into a loader made with the same arguments, gives the same remaining batches: identical bits on the
    CPU, the same samples and draws on a GPU.

    `global_batch_size` is the sum over ranks. `device` "cpu" or "gpu" (the current CUDA device). `mean`, `lighting`,
    `crop`, `flip`, `unit_variance`, `dtype`, `layout`: see finish.Transform. `with_draws` keeps the latest batch's
    random draws in `loader.draws`.

    `decode`, of JPEG shards: "host" (the cores), "mixed" (the GPU), "hybrid" (both, `host_share` of each batch on the
    cores; None: found by timing both), "auto" (hybrid on a GPU, else host). `hw_decoder_load`: of what the GPU decodes,
    the share of its JPEG engine. `cache` "raw": decode once, then feed from memory, the GPU's if the images fit there.
    `num_local_ranks`: ranks that share this machine's cores and memory (default: LOCAL_WORLD_SIZE, or all).
    `num_threads`: of each rank (default: its share of the cores). `prefetch_batches`: decoded ahead. None of these
    changes the samples or the draws. Raises UserError for values that do not fit.
    """

    def __init__(
        self,
        shards: ShardSet,
        colors: ColorStats,
        *,
        global_batch_size: int = 128,
        rank: int = 0,
        world_size: int = 1,
        device: Literal["cpu", "gpu"] = "cpu",
        decode: DecodeOption = "auto",
        host_share: float | None = None,
        hw_decoder_load: float = 0.9,
        cache: Literal["raw"] | None = None,
        mean: str = "image",
        lighting: str | None = "paper",
        crop: bool = True,
        flip: bool = True,
        unit_variance: bool = False,
        dtype: str = "float32",
        layout: str = "NCHW",
        seed: int = 0,
        num_threads: int | None = None,
        num_local_ranks: int | None = None,
        prefetch_batches: int = 2,
        with_draws: bool = False,
    ) -> None:
        check_kinds(shards, colors, global_batch_size=global_batch_size, rank=rank, world_size=world_size, seed=seed)
        check_ranks(rank, world_size)
        check_global_batch(shards, global_batch_size, world_size)
        if cache not in (None, "raw"):
            raise UserError(f"cache {cache!r}: expected 'raw' or None")
        shards.fetch("train")
        num_local_ranks = num_local_ranks or count_local_ranks(world_size)
        self.local_batch_size = global_batch_size // world_size
        self.epoch = 1
        self.draws: Draws | None = None
        self.keys = torch.zeros(0, dtype=torch.int64)  # of the latest batch, on the CPU
        self._step = 0
        self._num_steps = shards.num_samples("train") // global_batch_size
        self._shards, self._with_draws = shards, with_draws
        transform = Transform(mean, lighting, crop, flip, unit_variance, dtype, layout)
        feed = make_feed(
            shards,
            "train",
            batch_size=self.local_batch_size,
            rank=rank,
            world_size=world_size,
            device=device,
            num_threads=count_threads(num_local_ranks) if num_threads is None else num_threads,
            decode=decode,
            automatic="hybrid",
            cached=cache is not None,
            host_share=host_share,
            hw_decoder_load=hw_decoder_load,
            prefetch_batches=prefetch_batches,
            seed=seed,
        )
        if feed.decode == "hybrid" and host_share is None:
            feed = replace(feed, host_share=find_host_share(shards, feed))
        self.feed = feed
        self._assemble = make_assembler(
            shards, colors, transform, feed, cropped=True, cached=cache is not None, num_local_ranks=num_local_ranks
        )
        self._signature = {
            "DALI version": version("nvidia-dali-cuda120"),
            "graph": GRAPH_VERSION,
            "shards": shards.fingerprint,
            "global batch size": global_batch_size,
            "world size": world_size,
            "rank": rank,
            "seed": seed,
            "device": device,
            "decoder": feed.decode,
            "transform": {name: value for name, value in asdict(transform).items() if name not in _FORM},
        }
        self._in_flight = InFlight(feed)
        self._source = torch.arange(self.local_batch_size)
        self._basis = torch.from_numpy(colors.lighting_basis(lighting)).float() if lighting else None
        self._ahead: deque[_Begun] = deque()
        self._start = lambda checkpoint=None, num_taken=0: Batches(
            train_pipeline(shards, transform, feed, checkpoint=checkpoint),
            shards,
            feed,
            NUMBERS + DRAWN,
            num_taken=num_taken,
        )
        self._batches: Batches = self._start()
        self._checkpoint = self._batches.checkpoint()

    def __len__(self) -> int:
        return self._num_steps

    @property
    def step(self) -> int:
        """Batches given so far in this epoch."""
        return self._step

    def __iter__(self) -> Iterator[Batch]:
        while self._step < self._num_steps:
            while self._can_begin():
                self._ahead.append(self._begin())
            begun = self._ahead.popleft()
            images, (labels, keys, offset, flip, shift) = begun.images.result(), begun.drawn
            self._step += 1
            self._checkpoint = begun.checkpoint
            self.keys = keys
            if self._with_draws:
                self.draws = Draws(offset, flip, shift, [f"{key:0{KEY_DIGITS}d}" for key in keys.tolist()])
            labels = labels.to(images.device, non_blocking=True)
            self._in_flight.hold(begun)
            del begun  # DALI's memory is free again while the loop has the batch
            yield Batch(images, labels)
        self._finish_epoch()

    def _can_begin(self) -> bool:
        """Whether another batch should be begun now."""
        return self._step + len(self._ahead) < self._num_steps and len(self._ahead) <= self.feed.num_ahead

    def _begin(self) -> _Begun:
        if not self._step and not self._ahead:
            self._shards.check("train")
        outputs = self._batches.take()
        drawn = read_draws(outputs, self._basis)
        views = Views(self._source, drawn.offset, drawn.flip, drawn.shift)
        return _Begun(drawn, self._assemble(outputs, drawn.keys, views, 1), outputs, self._batches.checkpoint())

    def _finish_epoch(self) -> None:
        self._batches.finish_epoch()  # at most one batch is left: the incomplete one
        self._shards.check("train")  # an epoch of replaced shards does not count
        self._checkpoint = self._batches.checkpoint()
        self.epoch += 1
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """Where this rank is: plain strings and integers, to be given to `load_state_dict` on the same rank."""
        return {
            "epoch": self.epoch,
            "step": self._step,
            "signature": json.dumps(self._signature, sort_keys=True),
            "dali": self._checkpoint.hex(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError for what is no such state, and naming what differs, if this
        loader is not alike; it then stays as it was."""
        try:
            saved = dict(json.loads(state["signature"]))
            epoch, step, checkpoint = int(state["epoch"]), int(state["step"]), bytes.fromhex(state["dali"])
            if epoch < 1 or not 0 <= step <= self._num_steps:
                raise ValueError(f"step {step} of epoch {epoch}")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"not the state of a loader ({type(error).__name__}: {error}), expected what state_dict() gave; "
                "resume from another checkpoint, or start a new run"
            ) from error
        for name, here in self._signature.items():
            if saved.get(name) != here:
                raise UserError(
                    f"the loader's state was saved with {name} {saved.get(name)}, this one has {here}; "
                    "resume with the same settings, or start a new run"
                )
        try:
            batches = self._start(checkpoint, step)
        except RuntimeError as error:
            raise UserError(
                f"DALI cannot go on from the loader's state ({' '.join(str(error).split())[:200]}); resume from "
                "another checkpoint, or start a new run"
            ) from error
        while self._ahead:
            self._ahead.popleft().images.wait()  # they write to memory that is used again
        self._batches, self._checkpoint, self.epoch, self._step = batches, checkpoint, epoch, step
