"""The folder or bucket of shards: whose it is, what is finished, which images could not be used."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePath
from typing import Any, NamedTuple

from pipeline.colors import COLOR_FILE, MEAN_IMAGE_FILE
from pipeline.common.errors import UserError
from pipeline.common.machine import is_running, machine_id
from pipeline.manifest import MANIFEST, SCHEMA, Manifest, Shard
from pipeline.shards import ShardSet
from tools.sharding.lock import Part, is_lock
from tools.sharding.record import Record
from tools.sharding.store import FolderStore, Item, Store

JOB_FILE = "job.json"
FAILURES_FILE = "failures.jsonl"
TEMPORARY_AGE_S = 3600.0  # without a change, after which a half-written file of another machine is nobody's
# The manifest first: from then on the folder counts as unfinished.
_FOLDER_FILES = (MANIFEST, COLOR_FILE, MEAN_IMAGE_FILE, FAILURES_FILE)
_SHARD_FILE = re.compile(r"(train|val)-\d{6}\.(tar|idx|json)")
_TEMPORARY_FILE = re.compile(r"\.(?P<name>.+?)(\.(?P<machine>[0-9a-f]{8}))?\.tmp(?P<pid>\d+)", re.DOTALL)
_NUM_NAMED = 3
_NUM_READERS = 8  # records read at a time: a bucket answers slowly, but many at once


class Failure(NamedTuple):
    """An image that could not be used: its path in the source, why in words, the name of the exception."""

    source: str
    reason: str
    exception: str


def limit_failures(text: str, num_images: int) -> int:
    """How many images may fail: "25" is a count, "0.1%" a share of the images and at least 1. Raises ValueError."""
    if not re.fullmatch(r"[0-9]+|[0-9]+(\.[0-9]+)?%", text):
        raise ValueError(f"{text!r}: expected a count such as 25 or a percentage such as 0.1%")
    if text.endswith("%"):
        return max(1, int(Fraction(text[:-1]) * num_images / 100))
    return int(text)


def refuse_failures(failures: Sequence[Failure], max_failures: str, num_images: int) -> None:
    """Raise UserError, naming the first few, if more images failed than `limit_failures` allows."""
    limit = limit_failures(max_failures, num_images)
    if len(failures) > limit:
        raise UserError(
            f"{len(failures)} of {num_images} images cannot be used, limit {limit} (--max-failures {max_failures}): "
            f"{name_failures(failures)}; mend them and run again with --force, or go on without them by a higher "
            "--max-failures"
        )


def name_failures(failures: Sequence[Failure]) -> str:
    """The first few, with names quoted, so that a message stays one line whatever they are."""
    return "; ".join(f"{f.source!r}: {f.reason} ({f.exception})" for f in failures[:_NUM_NAMED])


def encode_failures(failures: Sequence[Failure]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(failure._asdict()) + "\n" for failure in failures).encode("ascii")


@dataclass(frozen=True)
class Written:
    """A complete unit."""

    shard: Shard
    failures: tuple[Failure, ...]
    num_repaired: int

    @classmethod
    def of(cls, record: Record) -> "Written":
        """What its record tells of a unit, without the names of its images."""
        shard = Shard(record.file, record.split, record.samples, record.bytes, record.sha256)
        return cls(shard, tuple(Failure(**failure) for failure in record.failures), len(record.repaired))


def find_complete(store: Store, items: Mapping[str, Item], job: str) -> Manifest | None:
    """The manifest of the finished output of `job`, if `store` holds that. Raises UserError if it does, and a tar is
    not as it should be (in a folder: or an index)."""
    if MANIFEST not in items or find_job(store, MANIFEST) != job:
        return None
    if isinstance(store, FolderStore):
        return ShardSet.open(store.root).manifest
    manifest = Manifest.parse(json.loads(store.read(MANIFEST)), store.locate(MANIFEST))
    for shard in manifest.shards:
        size = items[shard.file].bytes if shard.file in items else None
        if size != shard.bytes:
            got = "missing" if size is None else f"{size} bytes"
            raise UserError(
                f"{store.locate(shard.file)}: {got}, expected {shard.bytes} bytes; restore it, or run "
                "`alexnet-prep shard` again with --force"
            )
    return manifest


def check_ours(store: Store, items: Mapping[str, Item], job: str, *, force: bool, part: Part | None) -> None:
    """Raise UserError unless `store` may be written: new, empty, or of this job (with `force`: of any job of ours)."""
    names = _list_visible(items)
    if not names:
        return
    records = (name for name in names if _SHARD_FILE.fullmatch(name) and name.endswith(".json"))
    marks = (name for name in (MANIFEST, JOB_FILE, *records) if name in items)
    owner = next((found for name in marks if (found := find_job(store, name))), None)
    if owner is None:
        shown = ", ".join(repr(name) for name in names[:_NUM_NAMED])
        raise UserError(
            f"{store}: holds {len(names)} files that are no shards made here ({shown}...), expected a new or empty "
            "folder; choose another --out"
        )
    if owner != job and (part or not force):
        remedy = "replace them once with --force and without --part" if part else "replace them with --force"
        raise UserError(
            f"{store}: holds shards of another job ({owner[:12]}, this one is {job[:12]}): other images or options; "
            f"{remedy}, or choose another --out"
        )


def list_ours(items: Iterable[str], kept: Iterable[str]) -> list[str]:
    """Files of ours that do not belong to the tars `kept`, in the order to remove them."""
    names = _list_visible(items)
    stems = {PurePath(file).stem for file in kept}
    shard_files = [name for name in names if _SHARD_FILE.fullmatch(name) and PurePath(name).stem not in stems]
    # Records before tars: without its record a shard is not taken for finished.
    return [name for name in _FOLDER_FILES if name in names] + sorted(
        shard_files, key=lambda name: name[-5:] != ".json"
    )


def claim(
    store: Store,
    items: Mapping[str, Item],
    job: str,
    *,
    kept: Iterable[str],
    redone: Iterable[str],
    is_alone: bool,
) -> None:
    """Mark the store as this job's, unfinished until there is a manifest, and remove what is not to stay.

    Who is alone here removes what an earlier job or a killed run left, but for the tars `kept`. One part among others
    takes back only the tars `redone` and, if there are any, what was made of the whole.
    """
    store.write(JOB_FILE, encode_json({"schema": SCHEMA, "job": job}))
    records = [_record_of(file) for file in redone]
    for name in list_ours(items, kept) if is_alone else (*_FOLDER_FILES, *records) if records else ():
        if name in items:
            store.delete(name)


def remove_temporaries(store: Store) -> None:
    """Remove half-written files of ours whose writers are no longer alive."""
    items = store.list()
    now_s = max((item.modified_s for item in items.values()), default=0.0)  # this job has just written its mark
    for name, item in items.items():
        match = _TEMPORARY_FILE.fullmatch(name)
        if not match or not _is_ours(match["name"]):
            continue
        if match["machine"] == machine_id():
            is_dead = not is_running(int(match["pid"]))
        else:
            is_dead = now_s - item.modified_s > TEMPORARY_AGE_S
        if is_dead:
            store.delete(name)


def find_finished(store: Store, items: Mapping[str, Item], files: Iterable[str], job: str) -> dict[str, Written]:
    """Those of `files` that are complete: record of this job, tar of its size, unchanged index. In the given order."""
    listed = [file for file in files if _record_of(file) in items and file in items]
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        found = pool.map(lambda file: _find_one(store, items[file], file, job), listed)
        return {file: written for file, written in zip(listed, found, strict=True) if written}


def find_unrecorded(items: Iterable[str], files: Iterable[str]) -> list[str]:
    """Those of `files` without a record: certainly not finished."""
    names = set(items)
    return [file for file in files if _record_of(file) not in names]


def _find_one(store: Store, tar: Item, file: str, job: str) -> Written | None:
    try:
        record = Record.parse(json.loads(store.read(_record_of(file))))
        index = store.read(PurePath(file).with_suffix(".idx").name)
        digest = hashlib.sha256(index).hexdigest()
        if (record.job, record.file, record.bytes, record.idx_sha256) == (job, file, tar.bytes, digest):
            return Written.of(record)
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        pass  # damaged in whatever way: it is written again
    return None


def _record_of(file: str) -> str:
    return PurePath(file).with_suffix(".json").name


def find_job(store: Store, name: str) -> str | None:
    """The job that a manifest, mark or record names; None if there is no such file or it names none."""
    try:
        raw = json.loads(store.read(name))
    except (OSError, ValueError, RecursionError):
        return None
    job = raw.get("job") if isinstance(raw, dict) else None
    return job if isinstance(job, str) else None


def _is_ours(name: str) -> bool:
    return name in (*_FOLDER_FILES, JOB_FILE) or is_lock(name) or bool(_SHARD_FILE.fullmatch(name))


def _list_visible(items: Iterable[str]) -> list[str]:
    """What lies there, but for locks and half-written files of ours, which a run killed before its mark may leave."""

    def is_hidden(name: str) -> bool:
        match = _TEMPORARY_FILE.fullmatch(name)
        return is_lock(name) or bool(match and _is_ours(match["name"]))

    return sorted(name for name in items if not is_hidden(name))


def encode_json(value: Any) -> bytes:
    """JSON as it is written to files: indented, with a line's end."""
    return (json.dumps(value, indent=1) + "\n").encode()
