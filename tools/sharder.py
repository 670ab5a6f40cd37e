"""Images -> a finished folder of shards: plan, resume, drive the workers, complete.

The decision that shaped it: a job is named by a fingerprint of everything its bytes follow from, and a work unit is one
shard. What an interrupted run of the same job finished is kept, whatever is not accounted for is written again, and
another job's output is never touched unasked. `job.json` marks a folder as ours from before the first shard until the
manifest, which comes last. Left out: writing one shard (shardwriter.py) and where workers run (engines.py).
"""

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.console import Progress, note
from pipeline.errors import UserError
from pipeline.shardset import IMAGE_SIZE_PX, MANIFEST, SCHEMA, SPLITS, Manifest, ShardSet, write_json
from tools.engines import run_units
from tools.outfolder import FAILURES_FILE, check_ours, check_room, claim, find_complete, release, remove_temporaries
from tools.shardwriter import Failure, Setup, Tick, Unit, Written, find_finished, write_failures, write_unit
from tools.sources import Source

ENCODING = "jpeg"
BYTES_PER_IMAGE = 30_000  # of a photograph at quality 90 with its tar headers; an estimate on the safe side
_NUM_NAMED = 3


@dataclass(frozen=True)
class Summary:
    """What a run did: images and shards per split in the folder, shards found finished, images that failed, total size
    of the tars, and images and seconds of this run."""

    out: Path
    images: dict[str, int]
    shards: dict[str, int]
    num_kept_shards: int
    num_failures: int
    num_bytes: int
    num_prepared: int
    duration_s: float
    was_complete: bool

    @property
    def images_per_s(self) -> float:
        return self.num_prepared / max(self.duration_s, 1e-9)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out), "images_per_s": round(self.images_per_s, 1)}


def order_samples(num_samples: int, seed: int | None) -> NDArray[np.int64]:
    """Canonical positions in stored order: shuffled by `seed`, or as they are if it is None."""
    if seed is None:
        return np.arange(num_samples)
    # The raw stream of a bit generator never changes between versions of NumPy; Generator.permutation may.
    return np.argsort(np.random.PCG64(seed).random_raw(num_samples), kind="stable")


def name_shards(split: str, num_samples: int, samples_per_shard: int) -> list[str]:
    return [f"{split}-{number:06d}.tar" for number in range(-(-num_samples // samples_per_shard))]


def plan_units(source: Source, *, seed: int, samples_per_shard: int) -> Iterator[Unit]:
    """The shards of `source`, train in a global shuffle, val in canonical order. Made one by one: listings are long."""
    for split in SPLITS:
        entries = source.entries(split)
        order = order_samples(len(entries), seed if split == "train" else None)
        for number, file in enumerate(name_shards(split, len(entries), samples_per_shard)):
            positions = order[number * samples_per_shard : (number + 1) * samples_per_shard].tolist()
            yield Unit(file, split, tuple(positions), tuple(entries[position] for position in positions))


def fingerprint_job(source: Source, *, seed: int, quality: int, samples_per_shard: int) -> str:
    """SHA-256 (hex) over what the output follows from, except the images' bytes."""
    options = (SCHEMA, source.layout, seed, quality, IMAGE_SIZE_PX, ENCODING, samples_per_shard)
    digest = hashlib.sha256(repr(options).encode())
    for split in SPLITS:
        digest.update(f"\n{split}".encode())
        for entry in source.entries(split):
            digest.update(f"\n{entry.label} {entry.path}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def limit_failures(text: str, num_images: int) -> int:
    """How many images may fail: "25" is a count, "0.1%" a share of the images and at least 1. Raises ValueError."""
    if not re.fullmatch(r"[0-9]+|[0-9]+(\.[0-9]+)?%", text):
        raise ValueError(f"{text!r}: expected a count such as 25 or a percentage such as 0.1%")
    if text.endswith("%"):
        return max(1, int(Fraction(text[:-1]) * num_images / 100))
    return int(text)


def refuse_failures(failures: list[Failure], max_failures: str, num_images: int) -> None:
    """Raise UserError, naming the first few, if more images failed than `limit_failures` allows."""
    limit = limit_failures(max_failures, num_images)
    if len(failures) > limit:
        raise UserError(
            f"{len(failures)} of {num_images} images cannot be used, limit {limit} (--max-failures {max_failures}): "
            f"{_name_failures(failures)}; mend them and run again with --force, or go on without them by a higher "
            "--max-failures"
        )


def _name_failures(failures: list[Failure]) -> str:
    """The first few, with names quoted, so that a message stays one line whatever they are."""
    return "; ".join(f"{f.source!r}: {f.reason} ({f.exception})" for f in failures[:_NUM_NAMED])


def estimate_bytes(quality: int) -> int:
    """Bytes of an average stored photograph: 1 at quality 90, 0.6 at 75, 1.5 at 95, 4 at 100 times BYTES_PER_IMAGE."""
    return round(BYTES_PER_IMAGE * (10 / max(100 - quality, 1)) ** 0.6)


def make_shards(
    source: Source,
    out: str | Path,
    *,
    num_workers: int,
    samples_per_shard: int = 5000,
    seed: int = 0,
    quality: int = 90,
    max_failures: str = "0.1%",
    force: bool = False,
) -> Summary:
    """Make, or finish making, the shards of `source` in the folder `out`; the same bytes for any number of workers.

    A complete output of the same job is left as it is. Raises UserError for a folder of another job or of other files,
    too little disk space, too many failures, a split of which nothing is left, or a worker that dies; OSError for a
    folder that cannot be written. Shards that were finished stay, and the same call goes on from there.
    """
    start_s = time.monotonic()
    out = Path(out).absolute()
    job = fingerprint_job(source, seed=seed, quality=quality, samples_per_shard=samples_per_shard)
    check_ours(out, job, force=force)
    if not force and (complete := find_complete(out, job)):
        release(out)
        kept = len(complete.manifest.shards)
        return _summarise(complete, num_kept=kept, num_prepared=0, start_s=start_s, was_complete=True)

    num_images = sum(len(source.entries(split)) for split in SPLITS)
    files = [name for split in SPLITS for name in name_shards(split, len(source.entries(split)), samples_per_shard)]
    written: dict[str, Written] = {}
    if not force:
        written = {file: found for file in files if (found := find_finished(out, file, job))}
    num_kept, num_left = len(written), num_images - sum(_count_seen(unit) for unit in written.values())
    check_room(out, num_left * estimate_bytes(quality), kept=set(written))
    claim(out, job, kept=set(written))
    if num_kept:
        note(f"{out}: {num_kept} of {len(files)} shards were finished before and are kept")

    failures = [failure for unit in written.values() for failure in unit.failures]
    refuse_failures(failures, max_failures, num_images)
    setup = Setup(out, job, quality, source.read)
    units = plan_units(source, seed=seed, samples_per_shard=samples_per_shard)
    try:
        with Progress("shard", num_left, "images") as progress:

            def show(tick: Tick) -> None:
                failures.extend(tick.failures)
                refuse_failures(failures, max_failures, num_images)
                progress.advance(tick.num_images, failures=str(len(failures)))

            run_units(
                partial(write_unit, setup),
                (unit for unit in units if unit.file not in written),
                num_workers=num_workers,
                on_result=lambda unit: written.update({unit.shard.file: unit}),
                on_progress=show,
                preload=("tools.shardwriter", "webdataset"),
            )
    finally:
        remove_temporaries(out)
    _complete(source, setup, [written[file] for file in files], seed=seed, samples_per_shard=samples_per_shard)
    return _summarise(ShardSet.open(out), num_kept=num_kept, num_prepared=num_left, start_s=start_s, was_complete=False)


def _count_seen(unit: Written) -> int:
    return unit.shard.samples + len(unit.failures)


def _complete(source: Source, setup: Setup, written: list[Written], *, seed: int, samples_per_shard: int) -> None:
    """Write the failure list and, last, the manifest."""
    # A shard without a single usable image is not worth a reader's while: DALI refuses an empty index.
    shards = tuple(unit.shard for unit in written if unit.shard.samples)
    failures = [failure for unit in written for failure in unit.failures]
    totals = {split: sum(shard.samples for shard in shards if shard.split == split) for split in SPLITS}
    for split in SPLITS:
        if source.entries(split) and not totals[split]:
            lost = [failure for unit in written if unit.shard.split == split for failure in unit.failures]
            raise UserError(
                f"{split}: none of {len(lost)} images can be used, expected at least one; {_name_failures(lost)}; "
                "mend them and run again with --force"
            )
    write_failures(setup.out / FAILURES_FILE, failures)
    manifest = Manifest(
        schema=SCHEMA,
        created_by=f"alexnet-dali {version('alexnet-dali')}",
        layout=source.layout,
        seed=seed,
        size_px=IMAGE_SIZE_PX,
        encoding=ENCODING,
        quality=setup.quality,
        samples_per_shard=samples_per_shard,
        classes=source.classes,
        shards=shards,
        totals=totals,
        job=setup.job,
    )
    write_json(setup.out / MANIFEST, manifest.to_json())
    release(setup.out)


def _summarise(shards: ShardSet, *, num_kept: int, num_prepared: int, start_s: float, was_complete: bool) -> Summary:
    failures = shards.root / FAILURES_FILE
    return Summary(
        out=shards.root,
        images=dict(shards.manifest.totals),
        shards={split: len(shards.shards(split)) for split in SPLITS},
        num_kept_shards=num_kept,
        num_failures=len(failures.read_bytes().splitlines()) if failures.is_file() else 0,
        num_bytes=sum(shard.bytes for shard in shards.manifest.shards),
        num_prepared=num_prepared,
        duration_s=time.monotonic() - start_s,
        was_complete=was_complete,
    )
