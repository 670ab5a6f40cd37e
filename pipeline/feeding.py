"""What the loaders' options mean on this machine: ranks, threads, devices, decoders. Checked before anything is built.

The decision that shaped it: an option that cannot be had here is refused, never replaced by another; but on device
"cpu" the cores stand in for the GPU as a decoder, so that every graph can be tested anywhere. Left out: what the
options do (graph.py, stored.py).
"""

import os
from numbers import Integral
from typing import Literal

import torch

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.graph import Decode, Feed
from pipeline.shards import ShardSet

DecodeOption = Literal["auto", "host", "mixed", "hybrid"]
_DECODERS = ("auto", "host", "mixed", "hybrid")


def make_feed(
    shards: ShardSet,
    split: str,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    device: str,
    num_threads: int,
    decode: DecodeOption,
    automatic: Literal["hybrid", "mixed"],
    cached: bool = False,
    host_share: float | None = None,
    hw_decoder_load: float = 0.9,
    prefetch_batches: int = 2,
    seed: int = 0,
) -> Feed:
    """A Feed; `automatic` is what "auto" means on a GPU. Raises UserError for what this machine or set cannot do."""
    if device not in ("cpu", "gpu"):
        raise UserError(f"device {device!r}: expected 'cpu' or 'gpu'")
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError("device 'gpu': no CUDA GPU is visible; use device 'cpu' (alexnet-train --gpus 0)")
    if prefetch_batches < 1:
        raise UserError(f"prefetch_batches {prefetch_batches}: expected 1 or more")
    if num_threads < 1:
        raise UserError(f"num_threads {num_threads}: expected 1 or more")
    for name, share in (("host_share", host_share), ("hw_decoder_load", hw_decoder_load)):
        if share is not None and not 0 <= share <= 1:
            raise UserError(f"{name} {share}: expected 0 to 1")
    decoder = _choose_decoder(shards, decode, device, automatic, cached)
    if host_share is not None and decoder != "hybrid":
        raise UserError(
            f"host_share {host_share}: of no use to the decoder {decoder!r}; set decode 'hybrid', or leave it out"
        )
    return Feed(
        split=split,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        device="gpu" if device == "gpu" else "cpu",
        device_id=torch.cuda.current_device() if device == "gpu" else None,
        num_threads=num_threads,
        seed=seed,
        decode=decoder,
        host_share=0.5 if host_share is None else host_share,
        hw_decoder_load=hw_decoder_load,
        prefetch_batches=prefetch_batches,
    )


def _choose_decoder(
    shards: ShardSet, decode: DecodeOption, device: str, automatic: Literal["hybrid", "mixed"], cached: bool
) -> Decode:
    if decode not in _DECODERS:
        raise UserError(f"decode {decode!r}: expected one of {', '.join(_DECODERS)}")
    raw = shards.manifest.encoding == "raw"
    if raw and decode != "auto":
        raise UserError(f"{shards.root}: raw shards need no decoder, got decode {decode!r}; leave it out")
    if raw or cached:
        return "stored"
    if decode == "auto":
        return automatic if device == "gpu" else "host"
    return decode


def check_kinds(shards: ShardSet, colors: ColorStats, **counts: int) -> None:
    """Raises UserError for a folder's name in place of what is in it, and for `counts` that are no whole numbers."""
    if not isinstance(shards, ShardSet):
        raise UserError(f"shards is {shards!r}, expected a ShardSet: ShardSet.open({str(shards)!r})")
    if not isinstance(colors, ColorStats):
        raise UserError(f"colors is {colors!r}, expected ColorStats: ColorStats.load(shards.root, shards.fingerprint)")
    for name, count in counts.items():
        if not isinstance(count, Integral):
            raise UserError(f"{name} is {count!r}, expected a whole number")


def check_ranks(rank: int, world_size: int) -> None:
    """Raises UserError for a rank that there is not."""
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} of {world_size}: expected 0 <= rank < world size")


def check_global_batch(shards: ShardSet, global_batch_size: int, world_size: int) -> None:
    """Raises UserError for a batch that the ranks cannot share, or that is larger than the training set."""
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


def count_local_ranks(world_size: int) -> int:
    """Ranks that share this machine's cores and memory: what the launcher says, else all."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(int(said), world_size) if said.isdecimal() and int(said) else world_size


def count_threads(num_local_ranks: int = 1) -> int:
    """This rank's share of the cores, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // num_local_ranks)
