"""Images -> a finished folder of shards: lock, resume, drive the workers, complete.

A job is named by a fingerprint of everything its bytes follow from, and a work unit is one shard. What an interrupted
run of the same job finished is kept, whatever is not accounted for is written again, and another job's output is never
touched unasked. `job.json` marks a folder as ours from before the first shard until the manifest, which comes last,
from whoever finds all shards finished.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.common.console import Progress, note
from pipeline.common.errors import UserError
from pipeline.manifest import IMAGE_SIZE_PX, MANIFEST, SCHEMA, SPLITS, Manifest
from tools.sharding.lock import Part, lock_store, refuse_held
from tools.sharding.output import (
    FAILURES_FILE,
    JOB_FILE,
    Failure,
    Written,
    check_ours,
    claim,
    encode_failures,
    encode_json,
    find_complete,
    find_finished,
    find_unrecorded,
    list_ours,
    name_failures,
    refuse_failures,
    remove_temporaries,
)
from tools.sharding.plan import RAW_QUALITY, Encoding, Options, Plan
from tools.sharding.store import Store, open_store
from tools.sharding.workers import count_cpus, run_units, run_units_on_ray
from tools.sharding.write import Setup, Tick, write_unit
from tools.sources.source import Source

_PRELOAD = ("tools.sharding.write", "torch", "webdataset")


@dataclass(frozen=True)
class Summary:
    """What a run did. Images, shards and failures are those of the whole output or, if that is not complete yet, those
    of this part. `missing_parts` are the parts of which shards are missing."""

    out: Path | str
    images: dict[str, int]
    shards: dict[str, int]
    num_kept_shards: int
    num_failures: int
    num_repaired: int
    num_bytes: int
    num_prepared: int
    duration_s: float
    was_complete: bool
    is_complete: bool
    num_missing_shards: int = 0
    missing_parts: tuple[int, ...] = ()

    @property
    def images_per_s(self) -> float:
        return self.num_prepared / max(self.duration_s, 1e-9)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out), "images_per_s": round(self.images_per_s, 1)}


def make_shards(
    source: Source,
    out: str | Path,
    *,
    num_workers: int | None = None,
    samples_per_shard: int = 5000,
    seed: int = 0,
    quality: int = 90,
    encoding: Encoding = "jpeg",
    max_failures: str = "0.1%",
    force: bool = False,
    part: Part | None = None,
    engine: str = "local",
    ray_address: str | None = None,
) -> Summary:
    """Make, or finish making, the shards of `source` in the folder or bucket `out`; the same bytes for any number of
    workers, any engine, and in whatever parts.

    Units run in `num_workers` local processes (None: one per CPU) or, with `engine` "ray", in as many tasks of the Ray
    cluster (None: one per CPU of it) at `ray_address` (None: a Ray of its own on this machine).

    A complete output of the same job is left as it is. With `part`, only that share of the shards is made, and whoever
    finds all of them finished completes the output. `max_failures` is of all images: each part holds its own failures
    against it, and who completes holds all of them. Raises UserError for a folder of another job or of other files or
    in use, too little disk space, too many failures, a split of which nothing is left, or a worker that dies; OSError
    for a folder that cannot be written. Shards that were finished stay, and the same call goes on from there.
    """
    start_s = time.monotonic()
    quality = RAW_QUALITY if encoding == "raw" else quality
    plan = Plan(source, Options(seed, samples_per_shard, quality, encoding))
    run = _Run(plan, open_store(out), part, force, max_failures, start_s)
    if engine == "ray":
        run_all = partial(run_units_on_ray, num_tasks=num_workers, address=ray_address)
    else:
        run_all = partial(run_units, num_workers=num_workers or count_cpus(), preload=_PRELOAD)
    refuse_held(run.store, plan.job, part)
    if not (done := run.inspect()):
        run.check_room(num_workers or count_cpus())
        with lock_store(run.store, plan.job, part) as check_lock:
            # Looked at again: whoever held the lock until now may have finished it.
            done = run.inspect() or run.make(run_all, check_lock)
    return done


@dataclass
class _Run:
    """One call of `make_shards`."""

    plan: Plan
    store: Store
    part: Part | None
    force: bool
    max_failures: str
    start_s: float

    def inspect(self) -> Summary | None:
        """The summary, if there is nothing to do. Raises UserError if `store` is not to be written. Changes nothing."""
        items = self.store.list()
        check_ours(self.store, items, self.plan.job, force=self.force, part=self.part)
        if self.force or not (manifest := find_complete(self.store, items, self.plan.job)):
            return None
        if JOB_FILE in items:  # else nothing is changed: the disk may be a read-only one
            self.store.delete(JOB_FILE)
        written = find_finished(self.store, items, self.plan.shards, self.plan.job)
        return self._summarise(written, num_kept=len(manifest.shards), num_prepared=0, was_complete=True)

    def check_room(self, num_workers: int) -> None:
        """By what is listed: what of it is finished shows only under the lock."""
        items, files = self.store.list(), self.plan.share(self.part)
        redone = set(files if self.force else find_unrecorded(items, files))
        kept = set(self.plan.shards) - redone
        freed = sum(items[name].bytes for name in list_ours(items, kept)) if not self.part else 0
        image_bytes = self.plan.options.estimate_bytes()
        largest = max((self.plan.shards[file].num_images for file in redone), default=0)
        self.store.check_room(
            self.plan.count_images(redone) * image_bytes,
            freed_bytes=freed,
            open_bytes=min(num_workers, len(redone)) * largest * image_bytes,
        )

    def make(self, run_all: Callable[..., None], check_lock: Callable[[], None]) -> Summary:
        """Write what is missing of this part and, if it was the last, complete the output."""
        store, plan = self.store, self.plan
        items, files = store.list(), plan.share(self.part)
        kept = {} if self.force else find_finished(store, items, files, plan.job)
        claim(store, items, plan.job, kept=kept, redone=files if self.force else (), is_alone=not self.part)
        remove_temporaries(store)
        if kept:
            note(f"{store}: {len(kept)} of {len(files)} shards were finished before and are kept")
        failures = [failure for unit in kept.values() for failure in unit.failures]
        self._refuse_failures(failures)
        left = {file for file in files if file not in kept}
        num_left = plan.count_images(left)
        try:
            with Progress("shard", num_left, "images") as progress:

                def show(tick: Tick) -> None:
                    check_lock()
                    failures.extend(tick.failures)
                    self._refuse_failures(failures)
                    progress.advance(tick.num_images, failures=str(len(failures)))

                setup = Setup(store, plan.job, plan.options, plan.source.read)
                run_all(
                    partial(write_unit, setup), plan.units(left), on_result=lambda _: check_lock(), on_progress=show
                )
        finally:
            remove_temporaries(store)
        check_lock()
        return self._finish(len(kept), num_left)

    def _finish(self, num_kept: int, num_prepared: int) -> Summary:
        items = self.store.list()
        missing = find_unrecorded(items, self.plan.shards)
        if not missing or not self.part:
            found = find_finished(self.store, items, self.plan.shards, self.plan.job)
            missing = [file for file in self.plan.shards if file not in found]
        lost = set(missing) & set(self.plan.share(self.part))
        if lost:
            raise UserError(
                f"{self.store}: {len(lost)} shards were written and are not there as they were ({min(lost)}...), "
                "expected one folder for all workers that nobody else changes; run the same command again"
            )
        if not missing:
            self._complete(found)
        else:
            found = find_finished(self.store, items, self.plan.share(self.part), self.plan.job)
        return self._summarise(found, num_kept=num_kept, num_prepared=num_prepared, missing=missing)

    def _complete(self, written: dict[str, Written]) -> None:
        """Write the failure list and, last, the manifest. Two that do it at once write the same."""
        # A shard without a single usable image is not worth a reader's while: DALI refuses an empty index.
        shards = tuple(unit.shard for unit in written.values() if unit.shard.samples)
        failures = [failure for unit in written.values() for failure in unit.failures]
        self._refuse_failures(failures)
        totals = {split: sum(shard.samples for shard in shards if shard.split == split) for split in SPLITS}
        for split in SPLITS:
            if self.plan.source.entries(split) and not totals[split]:
                lost = [failure for unit in written.values() if unit.shard.split == split for failure in unit.failures]
                raise UserError(
                    f"{split}: none of {len(lost)} images can be used, expected at least one; {name_failures(lost)}; "
                    f"mend them and run again with --force; {self._list_failures(failures)}"
                )
        if failures:
            self.store.write(FAILURES_FILE, encode_failures(failures))
        elif FAILURES_FILE in self.store.list():  # of a run that was refused, before the images were mended
            self.store.delete(FAILURES_FILE)
        options = self.plan.options
        manifest = Manifest(
            schema=SCHEMA,
            created_by=f"alexnet-dali {version('alexnet-dali')}",
            layout=self.plan.source.layout,
            seed=options.seed,
            size_px=IMAGE_SIZE_PX,
            encoding=options.encoding,
            quality=options.quality,
            samples_per_shard=options.samples_per_shard,
            classes=self.plan.source.classes,
            shards=shards,
            totals=totals,
            job=self.plan.job,
        )
        self.store.write(MANIFEST, encode_json(manifest.to_json()))
        self.store.delete(JOB_FILE)  # no longer unfinished

    def _refuse_failures(self, failures: Sequence[Failure]) -> None:
        try:
            refuse_failures(failures, self.max_failures, self.plan.num_images)
        except UserError as error:
            raise UserError(f"{error.args[0]}; {self._list_failures(failures)}") from None

    def _list_failures(self, failures: Sequence[Failure]) -> str:
        """Write the failures of a job that is refused. Says where they are."""
        try:
            self.store.write(FAILURES_FILE, encode_failures(failures))
        except (OSError, UserError) as error:  # of a folder, of a bucket
            return f"their list could not be written: {getattr(error, 'strerror', None) or error}"
        return f"the {len(failures)} so far are listed in {self.store.locate(FAILURES_FILE)}"

    def _summarise(
        self,
        written: dict[str, Written],
        *,
        num_kept: int,
        num_prepared: int,
        missing: Sequence[str] = (),
        was_complete: bool = False,
    ) -> Summary:
        shards = [unit.shard for unit in written.values() if unit.shard.samples]
        place = {file: number for number, file in enumerate(self.plan.shards)}
        parts = {place[file] % self.part.count + 1 for file in missing} if self.part else set()
        return Summary(
            out=getattr(self.store, "root", None) or str(self.store),
            images={split: sum(shard.samples for shard in shards if shard.split == split) for split in SPLITS},
            shards={split: sum(shard.split == split for shard in shards) for split in SPLITS},
            num_kept_shards=num_kept,
            num_failures=sum(len(unit.failures) for unit in written.values()),
            num_repaired=sum(unit.num_repaired for unit in written.values()),
            num_bytes=sum(shard.bytes for shard in shards),
            num_prepared=num_prepared,
            duration_s=time.monotonic() - self.start_s,
            was_complete=was_complete,
            is_complete=not missing,
            num_missing_shards=len(missing),
            missing_parts=tuple(sorted(parts)),
        )
