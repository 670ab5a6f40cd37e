"""TrainLoader, EvalLoader and read_pixels: a graph's batches as epochs for a PyTorch loop, over ranks, resumable."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batches import Batch, BatchStream, read_keys
from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.graph import (
    DRAWS,
    GRAPH_VERSION,
    NUMBERS,
    eval_graph,
    has_own_operators,
    pixel_graph,
    train_graph,
)
from pipeline.manifest import SPLITS
from pipeline.options import (
    MAX_OFFSET_PX,
    Crops,
    Device,
    LoaderOptions,
    Transform,
    check_global_batch,
    check_kinds,
    check_ranks,
    make_spec,
)
from pipeline.shards import GET_VAL, ShardSet

__all__ = ["Batch", "Draws", "EvalLoader", "TrainLoader", "read_pixels"]

_FORM = ("dtype", "layout", "size_px", "channels")  # of a transform: they change neither samples nor draws


class Draws(NamedTuple):
    """What was drawn for a training batch: offset int32 (B, 2) as (y, x), flip int32 (B,), shift float32 (B, 3) in grey
    levels, keys int64 (B,); on the host."""

    offset: Tensor
    flip: Tensor
    shift: Tensor
    keys: Tensor


_REMEDIES = {  # for what no setting changes
    "graph": "go on with the version of alexnet-dali that saved it",
    "DALI version": "install that version of nvidia-dali-cuda120",
}


class TrainLoader:
    """Endless training data, an epoch per `for` loop: the part of `rank` out of `world_size`, shuffled, augmented.

    `len(loader)` steps an epoch on every rank; the last incomplete global batch of an epoch is dropped (other images
    each time, since the order changes). All loops share one stream: a loop that is left early, in whatever way, is gone
    on with by the next one, and two at a time get different batches. After the last batch of an epoch the next loop
    begins the next epoch. `state_dict()` between any two batches, loaded into a loader made with the same arguments,
    gives the same remaining batches: identical bits on the CPU, the same samples and draws on a GPU.

    `global_batch_size` is the sum over ranks; `device` "cpu" or "gpu" (the current CUDA device). `draws` and `keys` are
    those of the latest batch. Raises UserError for values that do not fit.
    """

    def __init__(
        self,
        shards: ShardSet,
        colors: ColorStats,
        transform: Transform = Transform(),
        options: LoaderOptions = LoaderOptions(),
        *,
        global_batch_size: int = 128,
        rank: int = 0,
        world_size: int = 1,
        device: Device = "cpu",
        seed: int = 0,
    ) -> None:
        check_kinds(shards, colors, global_batch_size=global_batch_size, rank=rank, world_size=world_size, seed=seed)
        check_ranks(rank, world_size)
        check_global_batch(shards, global_batch_size, world_size)
        self.local_batch_size = global_batch_size // world_size
        self.spec = spec = make_spec(
            shards, "train", options, batch_size=self.local_batch_size, device=device, rank=rank, world_size=world_size,
            seed=seed,
        )  # fmt: skip
        self.transform, self._shards = transform, shards
        self._num_steps = num_steps = shards.num_samples("train") // global_batch_size
        self._signature = {
            "DALI version": version("nvidia-dali-cuda120"),
            "graph": GRAPH_VERSION,
            "shards": shards.fingerprint,
            "global batch size": global_batch_size,
            "world size": world_size,
            "rank": rank,
            "seed": seed,
            "device": device,
            "decoder": f"{spec.decode}, " + ("our own operators" if has_own_operators(spec) else "DALI's operators"),
            "transform": {name: value for name, value in asdict(transform).items() if name not in _FORM},
        }
        shards.fetch("train")
        self._basis = transform.constants(colors).basis

        def start(checkpoint: bytes | None = None, num_taken: int = 0) -> BatchStream:
            graph = train_graph(shards, colors, transform, spec, checkpoint=checkpoint)
            return BatchStream(graph, (*NUMBERS, *DRAWS), shards, spec, num_steps, num_taken)

        self._start = (
            start  # without self in it: a loader's memory is free when nobody holds it, not one collection later
        )
        self._stream, self._at = start(), _Place(1, 0)

    def __len__(self) -> int:
        return self._num_steps

    @property
    def epoch(self) -> int:
        """The epoch, from 1, that the latest batch is of, or the next where no batch of one was given yet."""
        return self._at.epoch

    @property
    def step(self) -> int:
        """Batches given so far in this epoch."""
        return self._at.step

    @property
    def keys(self) -> Tensor:
        """Of the latest batch: int64 (B,), on the host."""
        latest = self._at.latest
        return torch.empty(0, dtype=torch.int64, device="cpu") if latest is None else read_keys(latest.numbers)

    @property
    def draws(self) -> Draws | None:
        """What was drawn for the latest batch; None before the first."""
        latest = self._at.latest
        if latest is None:
            return None
        numbers = latest.numbers
        offset = np.stack([numbers["y"], numbers["x"]], axis=-1) * MAX_OFFSET_PX  # whole numbers already
        noise = torch.from_numpy(numbers["noise"])
        shift = torch.zeros_like(noise)
        if self._basis is not None:
            shift = (noise[:, None, :] * torch.from_numpy(self._basis)).sum(-1)
        return Draws(torch.from_numpy(offset.astype(np.int32)), torch.from_numpy(numbers["flip"]), shift, self.keys)

    def __iter__(self) -> Iterator[Batch]:
        if self._at.step == self._num_steps:
            self.end_epoch()
        return _Epoch(self)

    def end_epoch(self) -> None:
        """Go on to the next epoch, as a loop does behind its last batch. Raises UserError if shards were replaced or
        damaged in this one."""
        self._stream.check()
        self._at = _Place(self._at.epoch + 1, 0, self._at.latest)

    def state_dict(self) -> dict[str, Any]:
        """Where this rank is: plain strings and integers, to be given to `load_state_dict` on the same rank."""
        latest = self._at.latest
        checkpoint, num_taken = self._stream.first_state if latest is None else latest.state
        return {
            "epoch": self._at.epoch,
            "step": self._at.step,
            "taken": num_taken,
            "signature": json.dumps(self._signature, sort_keys=True),
            "dali": checkpoint.hex(),
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
                    f"{_REMEDIES.get(name, 'resume with the same settings')}, or start a new run"
                )
        try:
            stream = self._start(checkpoint, int(state["taken"]))
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"DALI cannot go on from the loader's state ({' '.join(str(error).split())[:200]}); resume from "
                "another checkpoint, or start a new run"
            ) from error
        self._stream, self._at = stream, _Place(epoch, step)


class _Latest(NamedTuple):
    """Of the batch given last: numbers, the graph's state behind it; on a GPU its memory, until the next is given."""

    numbers: dict[str, NDArray[Any]]
    state: tuple[bytes, int]
    images: Any


class _Place(NamedTuple):
    """Where a training loader is: epoch from 1, batches given in it, and the latest of them."""

    epoch: int
    step: int
    latest: _Latest | None = None


class _Epoch(Iterator[Batch]):
    """What is left of a training loader's epoch; over when that epoch is, whoever took its batches."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader, self._epoch = loader, loader.epoch

    def __next__(self) -> Batch:
        loader, before = self._loader, self._loader._at
        if before.epoch != self._epoch:
            raise StopIteration
        if before.step == len(loader):
            loader.end_epoch()
            raise StopIteration
        taken = loader._stream.peek()
        batch = taken.to_batch(loader.spec, loader.transform)
        try:
            held = taken.images if loader.spec.device == "gpu" else None
            loader._at = _Place(before.epoch, before.step + 1, _Latest(taken.numbers, taken.state, held))
            loader._stream.pop()
            return batch
        except BaseException:  # a signal's, just now: what was not delivered is not consumed
            loader._stream.put_back(taken)
            loader._at = before
            raise


class EvalLoader:
    """Every image of a split exactly once over all ranks, in order, `len(loader)` steps on every rank.

    `crops`: "centre" or "ten" (four corners and the centre, then their mirror images); the transform's own crop, flip
    and lighting are for training alone. A rank may get fewer images, or none, in its last batches: it still gets a
    batch, so that it joins every reduction. Each loop goes from the start to the end, beside others too. `keys`: of the
    batch given last, int64 (B,) on the host. Raises UserError for values that do not fit and a split without images.
    """

    def __init__(
        self,
        shards: ShardSet,
        colors: ColorStats,
        transform: Transform = Transform(),
        options: LoaderOptions = LoaderOptions(),
        *,
        batch_size: int = 128,
        crops: Crops = "centre",
        split: str = "val",
        rank: int = 0,
        world_size: int = 1,
        device: Device = "cpu",
    ) -> None:
        check_kinds(shards, colors, batch_size=batch_size, rank=rank, world_size=world_size)
        check_ranks(rank, world_size)
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: expected 1 or more")
        if crops not in ("centre", "ten"):
            raise UserError(f"crops {crops!r}: expected 'centre' or 'ten'")
        num_samples = shards.num_samples(split) if split in SPLITS else 0
        num_parts = max(1, min(world_size, num_samples))  # DALI needs a sample for each part; other ranks get none
        self.spec = spec = make_spec(
            shards, split, options, batch_size=batch_size, device=device, rank=rank, world_size=num_parts
        )
        if not num_samples:
            kind = "validation" if split == "val" else split
            raise UserError(f"{shards.root}: no {kind} images; {GET_VAL}")
        self.transform = transform = replace(transform, lighting=None, crop=False, flip=False)
        self._views = (10,) if crops == "ten" else ()
        self._num_steps = num_steps = math.ceil(math.ceil(num_samples / num_parts) / batch_size)
        self._num_images = 0
        self.keys = torch.empty(0, dtype=torch.int64, device="cpu")
        if rank < num_parts:
            shards.fetch(split)
            self._num_images = num_samples * (rank + 1) // num_parts - num_samples * rank // num_parts

        def start() -> BatchStream:
            graph = eval_graph(shards, colors, transform, spec, crops)
            return BatchStream(graph, NUMBERS, shards, spec, num_steps)

        self._start = start
        self._idle = start() if self._num_images else None  # at the start of an epoch

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[Batch]:
        if not self._num_images:
            return iter([self._make_empty() for _ in range(self._num_steps)])
        stream, self._idle = self._idle or self._start(), None
        return _Pass(self, stream)

    def _make_empty(self) -> Batch:
        transform, on = self.transform, "cuda" if self.spec.device == "gpu" else "cpu"
        shape = (0, *self._views, transform.channels, transform.size_px, transform.size_px)
        images = torch.empty(shape, dtype=transform.torch_dtype, device=on)
        return Batch(images, torch.empty(0, dtype=torch.int64, device=on))


class _Pass(Iterator[Batch]):
    """One loop over an evaluation loader. Its stream serves the next loop if this one comes to its end."""

    def __init__(self, loader: EvalLoader, stream: "BatchStream") -> None:
        self._loader, self._stream, self._step, self._is_over = loader, stream, 0, False

    def __next__(self) -> Batch:
        loader, step = self._loader, self._step
        if step == len(loader):
            if not self._is_over:
                self._stream.check()  # errors counted on damaged shards are not told
                loader._idle, self._is_over = self._stream, True
            raise StopIteration
        num_left = max(0, loader._num_images - step * loader.spec.batch_size)
        taken = self._stream.peek()
        batch = taken.to_batch(loader.spec, loader.transform, num_left)
        try:
            loader.keys, self._step = read_keys(taken.numbers)[:num_left], step + 1
            self._stream.pop()
            return batch
        except BaseException:
            self._stream.put_back(taken)
            self._step = step
            raise


def read_pixels(
    shards: ShardSet,
    *,
    split: str = "train",
    batch_size: int = 64,
    device: Device = "cpu",
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """Every stored image of a split once, in order, unchanged: images uint8 (B, 256, 256, 3) RGB, labels int64 (B,)."""
    spec = make_spec(shards, split, LoaderOptions(num_threads=num_threads), batch_size=batch_size, device=device)
    shards.fetch(split)
    num_steps = math.ceil(shards.num_samples(split) / batch_size)
    stream = BatchStream(pixel_graph(shards, spec), NUMBERS, shards, spec, num_steps)
    for step in range(num_steps):
        yield stream.peek().to_batch(spec, None, shards.num_samples(split) - step * batch_size)
        stream.pop()
    stream.check()
