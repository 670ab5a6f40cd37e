"""Batches for a PyTorch loop: shuffled and augmented for training, each image exactly once for evaluation.

The decision that shaped it: the epoch is ours, the samples are DALI's. Every rank's reader pads its part to the same
number of batches; a training loader stops before the padding and an evaluation loader cuts it off, so that ranks take
equal steps and nothing is counted twice. Tensors are DALI's own memory, handed over without a copy. Left out: what is
done to the pixels (graph.py) and where shards come from (shardset.py).
"""

import contextlib
import json
import math
import os
from collections.abc import Generator, Iterator
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from pipeline.colorstats import ColorStats
from pipeline.errors import UserError
from pipeline.graph import CROP_SIZE_PX, READER, Feed, Transform, eval_pipeline, pixel_pipeline, train_pipeline
from pipeline.shardset import ShardSet

_OUTPUTS = ["images", "labels"]
_DRAWS = ["offset", "flip", "shift", "source"]


class Batch(NamedTuple):
    """images (B, 3, 224, 224), for ten crops (B, 10, 3, 224, 224); labels int64 (B,); on the loader's device."""

    images: Tensor
    labels: Tensor


class Draws(NamedTuple):
    """What was drawn for a training batch: offset (B, 2) as (y, x), flip (B,), shift (B, 3) grey levels, keys."""

    offset: Tensor
    flip: Tensor
    shift: Tensor
    keys: list[str]


class TrainLoader:
    """Endless training data, an epoch per `for` loop: the part of `rank` out of `world_size`, shuffled, augmented.

    `len(loader)` steps an epoch on every rank; the last incomplete global batch of an epoch is dropped (other images
    each time, since the order changes). A loop that is left early goes on where it was. `state_dict()` between any two
    batches, loaded into a loader made with the same arguments, gives the same remaining batches: identical bits on the
    CPU, the same samples and draws on a GPU.

    `global_batch_size` is the sum over ranks. `device` "cpu" or "gpu" (the current CUDA device). `mean`, `lighting`,
    `crop`, `flip`, `unit_variance`, `dtype`, `layout`: see graph.Transform. `with_draws` keeps the latest batch's
    random draws in `loader.draws`. Raises UserError for sizes and ranks that do not fit.
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
        mean: str = "image",
        lighting: str | None = "paper",
        crop: bool = True,
        flip: bool = True,
        unit_variance: bool = False,
        dtype: str = "float32",
        layout: str = "NCHW",
        seed: int = 0,
        num_threads: int | None = None,
        with_draws: bool = False,
    ) -> None:
        _check_ranks(rank, world_size)
        if global_batch_size < 1 or global_batch_size % world_size:
            raise UserError(
                f"global batch size {global_batch_size}: expected a positive multiple of the {world_size} ranks; "
                "set --global-batch-size"
            )
        num_samples = shards.num_samples("train")
        if num_samples < global_batch_size:
            raise UserError(
                f"{shards.root}: {num_samples} training images, fewer than one global batch of {global_batch_size}; "
                "set --global-batch-size lower"
            )
        self.local_batch_size = global_batch_size // world_size
        self.epoch = 1
        self.draws: Draws | None = None
        self._step = 0
        self._num_steps = num_samples // global_batch_size
        self._transform = Transform(mean, lighting, crop, flip, unit_variance, dtype, layout)
        self._feed = _make_feed("train", self.local_batch_size, rank, world_size, device, num_threads, seed)
        self._signature = {
            "DALI version": version("nvidia-dali-cuda120"),
            "shards": shards.fingerprint,
            "global batch size": global_batch_size,
            "world size": world_size,
            "rank": rank,
            "seed": seed,
            "device": device,
            "transform": asdict(self._transform),
            "draws kept": with_draws,
        }
        self._outputs = _OUTPUTS + (_DRAWS if with_draws else [])
        self._build = lambda **restore: train_pipeline(
            shards, colors, self._transform, self._feed, with_draws=with_draws, **restore
        )
        self._iterator = self._iterate(self._build())

    def _iterate(self, pipeline: Pipeline) -> DALIGenericIterator:
        return DALIGenericIterator(
            pipeline,
            self._outputs,
            reader_name=READER,
            last_batch_policy=LastBatchPolicy.FILL,
            prepare_first_batch=False,
        )

    def __len__(self) -> int:
        return self._num_steps

    @property
    def step(self) -> int:
        """Batches given so far in this epoch."""
        return self._step

    def __iter__(self) -> Iterator[Batch]:
        while self._step < self._num_steps:
            outputs = next(self._iterator)[0]
            self._step += 1
            if len(self._outputs) > len(_OUTPUTS):
                keys = [sample_key(bytes(row.tolist()).rstrip(b"\0").decode()) for row in outputs["source"]]
                self.draws = Draws(outputs["offset"], outputs["flip"], outputs["shift"], keys)
            yield Batch(_as_nchw(outputs["images"], self._transform.layout), outputs["labels"])
        self._finish_epoch()

    def _finish_epoch(self) -> None:
        _finish(self._iterator)  # at most one batch is left: the incomplete one
        self.epoch += 1
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """Where this rank is: plain strings and integers, to be given to `load_state_dict` on the same rank."""
        return {
            "epoch": self.epoch,
            "step": self._step,
            "signature": json.dumps(self._signature, sort_keys=True),
            "dali": _as_bytes(self._iterator.checkpoints()[0]).hex(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError naming what differs, if this loader is not alike."""
        saved = json.loads(state["signature"])
        for name, here in self._signature.items():
            if saved.get(name) != here:
                raise UserError(
                    f"the loader's state was saved with {name} {saved.get(name)}, this one has {here}; "
                    "resume with the same settings, or start a new run"
                )
        self._iterator = self._iterate(self._build(checkpoint=bytes.fromhex(state["dali"])))
        self.epoch, self._step = int(state["epoch"]), int(state["step"])


class EvalLoader:
    """Every image of a split exactly once over all ranks, in order, `len(loader)` steps on every rank.

    `crops`: "centre" or "ten" (four corners and the centre, then their mirror images). A rank may get fewer images, or
    none, in its last batches: it still gets a batch, so that it joins every reduction. Can be iterated any number of
    times, each time from the start to the end.
    """

    def __init__(
        self,
        shards: ShardSet,
        colors: ColorStats,
        *,
        batch_size: int = 128,
        crops: Literal["centre", "ten"] = "centre",
        split: str = "val",
        rank: int = 0,
        world_size: int = 1,
        device: Literal["cpu", "gpu"] = "cpu",
        mean: str = "image",
        unit_variance: bool = False,
        dtype: str = "float32",
        layout: str = "NCHW",
        num_threads: int | None = None,
    ) -> None:
        _check_ranks(rank, world_size)
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: expected 1 or more")
        if crops not in ("centre", "ten"):
            raise UserError(f"crops {crops!r}: expected 'centre' or 'ten'")
        num_samples = shards.num_samples(split)
        if not num_samples:
            raise UserError(f"{shards.root}: no {split} images; add a {split}/ folder to the source and shard it again")
        transform = Transform(mean, None, False, False, unit_variance, dtype, layout)
        num_parts = min(world_size, num_samples)  # DALI needs a sample for each part; ranks beyond them get none
        self._num_steps = math.ceil(math.ceil(num_samples / num_parts) / batch_size)
        self._transform, self._crops = transform, crops
        self._empty_on = "cuda" if device == "gpu" else "cpu"
        self._iterator: DALIGenericIterator | None = None
        self._running: Generator[dict[str, Tensor], None, None] | None = None
        if rank < num_parts:
            feed = _make_feed(split, batch_size, rank, num_parts, device, num_threads, 0)
            self._iterator = _once(eval_pipeline(shards, colors, transform, feed, crops=crops))

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[Batch]:
        if self._iterator is None:
            for _ in range(self._num_steps):
                yield self._empty()
            return
        if self._running is not None:
            self._running.close()  # an earlier loop that was left, but is still held by somebody
        self._running = _from_start(self._iterator)
        for outputs in self._running:
            yield Batch(_as_nchw(outputs["images"], self._transform.layout), outputs["labels"])

    def _empty(self) -> Batch:
        views = (10,) if self._crops == "ten" else ()
        images = torch.empty(
            (0, *views, 3, CROP_SIZE_PX, CROP_SIZE_PX),
            dtype=getattr(torch, self._transform.dtype),
            device=self._empty_on,
        )
        return Batch(images, torch.empty(0, dtype=torch.int64, device=self._empty_on))


def read_pixels(
    shards: ShardSet,
    *,
    split: str = "train",
    batch_size: int = 64,
    device: Literal["cpu", "gpu"] = "cpu",
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """Every stored image of a split once, in order, unchanged: images uint8 (B, 256, 256, 3) RGB, labels int64 (B,)."""
    feed = _make_feed(split, batch_size, 0, 1, device, num_threads, 0)
    for outputs in _from_start(_once(pixel_pipeline(shards, feed))):
        yield Batch(outputs["images"], outputs["labels"])


def sample_key(source: str) -> str:
    """The nine-digit key in DALI's description of a sample, "path.tar:offset:000000001.jpg"."""
    return source.rsplit(":", 1)[-1].split(".", 1)[0]


def _once(pipeline: Pipeline) -> DALIGenericIterator:
    return DALIGenericIterator(
        pipeline, _OUTPUTS, reader_name=READER, last_batch_policy=LastBatchPolicy.PARTIAL, prepare_first_batch=False
    )


def _from_start(iterator: DALIGenericIterator) -> Generator[dict[str, Tensor], None, None]:
    try:
        for outputs in iter(lambda: next(iterator, None), None):
            yield outputs[0]
    except GeneratorExit:  # a loop left early; after an error of DALI's there is nothing to read on to
        _finish(iterator)
        raise
    iterator.reset()


def _finish(iterator: DALIGenericIterator) -> None:
    """Read on to the end of the epoch, the only place where DALI can begin the next one."""
    with contextlib.suppress(StopIteration):
        while True:
            next(iterator)
    iterator.reset()


def _as_nchw(images: Tensor, layout: str) -> Tensor:
    """Shape (..., 3, 224, 224) in either memory layout: NHWC becomes what torch calls channels_last."""
    return images.movedim(-1, -3) if layout == "NHWC" else images


def _as_bytes(checkpoint: bytes | str) -> bytes:
    return checkpoint.encode("latin-1") if isinstance(checkpoint, str) else bytes(checkpoint)


def _check_ranks(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} of {world_size}: expected 0 <= rank < world size")


def _make_feed(
    split: str, batch_size: int, rank: int, world_size: int, device: str, num_threads: int | None, seed: int
) -> Feed:
    if device not in ("cpu", "gpu"):
        raise UserError(f"device {device!r}: expected 'cpu' or 'gpu'")
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError("device 'gpu': no CUDA GPU is visible; use device 'cpu' (alexnet-train --gpus 0)")
    return Feed(
        split=split,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        device="gpu" if device == "gpu" else "cpu",
        device_id=torch.cuda.current_device() if device == "gpu" else None,
        num_threads=num_threads or len(os.sched_getaffinity(0)),
        seed=seed,
    )
