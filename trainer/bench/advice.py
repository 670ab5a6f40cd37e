"""From rates to words: which of feeding, step and their overlap limits training, and what to change.

A pure function of numbers measured in one run; each piece of advice states the number it follows from.
"""

from dataclasses import dataclass
from typing import Literal

Limit = Literal["feeding", "step", "overlap"]

OVERLAP_LOSS = 0.1  # less than 90 % of the slower of the two alone: they get into each other's way
_NEAR_LIMIT = 0.75  # of decoding alone: the decoder itself is what takes the time
_LONGER = 2.0  # one part of an image's time is this many times the other: shorten that one


@dataclass(frozen=True)
class Readings:
    """What one run measured, images/s over all ranks, and the settings it ran with.

    `decode_limit`: the codec alone on all cores (raw shards: reading alone). `decode`: where images are decoded,
    "cpu", "mixed" (the GPU) or "hybrid" (both). `raw_bytes`: all training images, decoded.
    """

    feed: float
    step: float
    together: float
    data_wait_fraction: float
    decode_limit: float
    on_gpu: bool
    precision: Literal["float32", "bf16"]
    encoding: str
    decode: str
    threads_per_rank: int
    num_cores: int
    num_ranks: int
    num_gpus_visible: int
    raw_bytes: int


@dataclass(frozen=True)
class Diagnosis:
    """`limit`, the finding in a sentence, and what to change, the most useful first."""

    limit: Limit
    finding: str
    advice: tuple[str, ...]


def diagnose(r: Readings) -> Diagnosis:
    """Name the limit. Feeding and step alone bound training; well below both, it is their overlap that costs."""
    if r.together < (1 - OVERLAP_LOSS) * min(r.feed, r.step):
        return _diagnose_overlap(r)
    is_feeding = r.feed < r.step
    finding = (
        f"{'feeding' if is_feeding else 'the step'} limits: the loader gives {r.feed / r.step:.2f}x of what the step "
        f"takes; training waits for data {r.data_wait_fraction:.0%} of the time"
    )
    advice = _speed_feeding(r) if is_feeding else _speed_step(r)
    return Diagnosis("feeding" if is_feeding else "step", finding, tuple(advice))


def _diagnose_overlap(r: Readings) -> Diagnosis:
    finding = (
        f"neither alone limits: together they reach {r.together / min(r.feed, r.step):.0%} of the slower one "
        f"(feeding {r.feed:,.0f}, step {r.step:,.0f}, together {r.together:,.0f} images/s)"
    )
    if r.on_gpu:
        return Diagnosis("overlap", finding, tuple(_share_the_gpu(r)))
    finding += f"; both run on the same {r.num_cores} cores"
    feed_s, step_s = 1 / r.feed, 1 / r.step
    share = f"of an image's {1000 * (feed_s + step_s):.2f} ms, feeding takes {feed_s / (feed_s + step_s):.0%}: shorten "
    if step_s > _LONGER * feed_s:
        advice = [share + "the step", *_speed_step(r)]
    elif feed_s > _LONGER * step_s:
        advice = [share + "feeding", *_speed_feeding(r)]
    else:
        advice = [share + "both", *_speed_feeding(r), *_speed_step(r)]
    return Diagnosis("overlap", finding, tuple(advice))


def _share_the_gpu(r: Readings) -> list[str]:
    advice = []
    if r.decode in ("mixed", "hybrid"):
        advice.append(f"decoding ({r.decode}) and step share the GPU: compare with --decode cpu")
    if r.threads_per_rank * r.num_ranks >= r.num_cores:
        fewer = max(1, (r.num_cores - r.num_ranks) // r.num_ranks)
        advice.append(
            f"{r.num_ranks} x {r.threads_per_rank} decoding threads leave none of {r.num_cores} cores to the ranks "
            f"themselves: --threads {fewer}"
        )
    return advice or ["the transfer to the GPU is what is left: look at it with torch.profiler"]


def _speed_feeding(r: Readings) -> list[str]:
    advice, of_limit, gib = [], r.feed / r.decode_limit, r.raw_bytes / 2**30
    if r.threads_per_rank * r.num_ranks < r.num_cores:
        advice.append(
            f"more threads: {r.num_ranks} x {r.threads_per_rank} of {r.num_cores} cores decode; "
            f"--threads {r.num_cores // r.num_ranks}"
        )
    if r.on_gpu and r.decode in ("cpu", "mixed"):
        advice.append(f"decode on cores and GPU at once (now {r.decode}): --decode hybrid")
    if r.encoding == "raw":
        reason = f"the loader is at {of_limit:.0%} of reading alone"
        if of_limit < _NEAR_LIMIT:
            return [*advice, f"{reason}: alexnet-prep doctor --shards DIR times the disk"]
        return [*advice, f"{reason}: a faster disk, or memory for all shards"]
    reason = f"the loader is at {of_limit:.0%} of decoding alone"
    if of_limit >= _NEAR_LIMIT:
        reason += ", so leave decoding out"
    if r.on_gpu and r.decode == "mixed":
        advice.append(f"{reason}: --cache-gib {gib:.1f} keeps all decoded images in the GPU's memory")
    advice.append(f"{reason}: raw shards need no decoding and {gib:.1f} GiB of disk, alexnet-prep shard --encoding raw")
    if of_limit < _NEAR_LIMIT and not r.on_gpu:
        advice.append("or the disk is slow: alexnet-prep doctor --shards DIR times it")
    return advice


def _speed_step(r: Readings) -> list[str]:
    advice = []
    if r.on_gpu and r.precision == "float32":
        advice.append("try --set precision=bf16")
    if r.num_gpus_visible > r.num_ranks or (r.num_gpus_visible and not r.on_gpu):
        advice.append(f"more GPUs are visible: --gpus {r.num_gpus_visible}")
    if not r.num_gpus_visible:
        advice.append("the network runs on the CPU: a GPU is what helps, or a narrower net (--set width=FRACTION)")
    return advice or ["this is what the GPU gives: a larger --global-batch-size fills it better, but trains otherwise"]
