"""One shard held against its index, its record and its line in the manifest.

The decision that shaped it: there are several witnesses of every fact, and the one that the others contradict is named:
a tar that is as its record says does not become the culprit because the manifest has lost a bit. So the remedy is no
larger than the damage. Left out: taking the tar apart (tarcheck.py), what shows only across shards (verify.py). Runs in
worker processes.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.manifest import KEY_DIGITS, MANIFEST, Shard, index_header
from tools.checks.tars import Findings, Problem, Samples, TarReader

REPORT_EVERY = 200  # samples
_KEY = re.compile(rf"[0-9]{{{KEY_DIGITS}}}")
_FAILURE_FIELDS = {"source", "reason", "exception"}


@dataclass(frozen=True)
class Task:
    """A shard to check. What the manifest says is None where it is unreadable or silent: `listed` is the shard's line,
    `ending` its images' (jpg or rgb)."""

    root: Path
    file: str
    listed: Shard | None
    ending: str | None
    num_classes: int | None
    decode: bool

    def __str__(self) -> str:
        return self.file


class Record(NamedTuple):
    """What a unit's record says: its shard, the index's SHA-256, the job, where images were encoded (cpu, gpu), source
    by key, what was mended by key, failures."""

    shard: Shard
    idx_sha256: str
    job: str
    device: str
    sources: dict[str, str]
    repaired: dict[str, str]
    failures: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Checked:
    """What a shard holds and what is wrong with it; keys and labels in stored order, without record: None."""

    file: str
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    num_bytes: int
    record: Record | None
    problems: tuple[Problem, ...]
    num_problems: int


class _Read(NamedTuple):
    """A tar that could be read: as a manifest would have it, whether it is whole, its samples."""

    shard: Shard
    is_whole: bool
    samples: Samples


def check_shard(task: Task, report: Callable[[int], None]) -> Checked:
    """Read one shard and find everything that is wrong with it; `report(n)` after every so many samples."""
    found = Findings()
    path = task.root / task.file
    record = read_record(path.with_suffix(".json"), found)
    read = _read_tar(task, path, report, found)
    if read:
        is_intact = _compare_counts(task, read, record, found)
        _compare_index(path.with_suffix(".idx"), read, record, found, is_intact=is_intact)
        if record and read.is_whole:
            _compare_sources(path.with_suffix(".json").name, read.samples, record, found)
    elif not path.with_suffix(".idx").is_file():
        found.add("index", path.with_suffix(".idx").name, "missing", "an index beside its tar")
    return Checked(
        file=task.file,
        keys=tuple(read.samples.keys) if read else (),
        labels=tuple(read.samples.labels) if read else (),
        num_bytes=read.shard.bytes if read else 0,
        record=record,
        problems=found.list_problems(),
        num_problems=found.num_problems,
    )


def read_record(path: Path, found: Findings) -> Record | None:
    """The record at `path`; None, and a problem, if there is none or it is not one."""
    expected = "the record of its shard"
    try:
        raw = load_strictly(path)
        shard = Shard(raw["file"], raw["split"], raw["samples"], raw["bytes"], raw["sha256"])
        record = Record(
            shard,
            raw["idx_sha256"],
            raw["job"],
            raw["device"],
            raw["sources"],
            raw["repaired"],
            tuple(raw["failures"]),
        )
        if not _is_well_typed(record):
            raise TypeError("a value of another type")
    except FileNotFoundError:
        found.add("record", path.name, "missing", expected)
    except OSError as error:
        found.add("record", path.name, f"cannot be read: {error.strerror}", expected)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        found.add("record", path.name, f"no record ({type(error).__name__}: {error})", expected)
    else:
        return record
    return None


def load_strictly(path: Path) -> Any:
    """Decoded JSON. Raises OSError, or ValueError for what is none and for an object with a name twice."""
    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_doubles)


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name comes twice in one object")
    return dict(pairs)


def _is_well_typed(record: Record) -> bool:
    shard = record.shard
    texts = (shard.file, shard.split, shard.sha256, record.idx_sha256, record.job, record.device)
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in (shard.samples, shard.bytes))
        and isinstance(record.sources, dict)
        and isinstance(record.repaired, dict)
        and all(_KEY.fullmatch(key) for key in record.sources)
        and all(isinstance(text, str) and text for text in (*record.sources.values(), *record.repaired.values()))
        and all(
            isinstance(failure, dict)
            and set(failure) >= _FAILURE_FIELDS
            and all(isinstance(text, str) for text in failure.values())
            for failure in record.failures
        )
    )


def _read_tar(task: Task, path: Path, report: Callable[[int], None], found: Findings) -> _Read | None:
    samples = Samples(
        lambda kind, what, expected, key: found.add(kind, task.file, what, expected, key=key),
        ending=task.ending,
        num_classes=task.num_classes,
        decode=task.decode,
    )
    num_reported = 0
    try:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            tar = TarReader(file)
            for member in tar.members(partial(found.add, "structure", task.file)):
                samples.add(member)
                if len(samples.keys) >= num_reported + REPORT_EVERY:
                    report(len(samples.keys) - num_reported)
                    num_reported = len(samples.keys)
        samples.close()
    except FileNotFoundError:
        size = f"a tar of {task.listed.bytes} bytes" if task.listed else "a tar"
        found.add("tar", task.file, "missing", size)
        return None
    except OSError as error:
        found.add("tar", task.file, f"cannot be read: {error.strerror}", "a readable file")
        return None
    report(len(samples.keys) - num_reported)
    split = task.file.partition("-")[0]
    return _Read(Shard(task.file, split, len(samples.keys), tar.offset, tar.digest.hexdigest()), tar.is_whole, samples)


def _compare_counts(task: Task, read: _Read, record: Record | None, found: Findings) -> bool:
    """Hold size, checksum and number of samples against record and manifest; whether the tar is what it should be."""
    is_intact = read.is_whole
    for name in ("file", "split", "bytes", "sha256", *(["samples"] if read.is_whole else [])):
        actual = getattr(read.shard, name)
        listed = getattr(task.listed, name) if task.listed else None
        recorded = getattr(record.shard, name) if record else None
        told = [value for value in (listed, recorded) if value is not None]
        if told and actual not in told:
            found.add("contents", task.file, f"{name} {actual}", f"{name} {told[0]}")
            is_intact = False
            if name == "bytes":
                break  # of a truncated tar checksum and number of samples say nothing new
        elif listed not in (None, actual):
            what = f"{task.file}: {name} {listed}"
            found.add("shards", MANIFEST, what, f"{name} {actual}, as tar and record have it", mend="manifest")
        elif recorded not in (None, actual):
            record_name = Path(task.file).with_suffix(".json").name
            found.add("record", record_name, f"{name} {recorded!r}", f"{name} {actual}, as tar and manifest have it")
    return is_intact


def _compare_index(path: Path, read: _Read, record: Record | None, found: Findings, *, is_intact: bool) -> None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        found.add("index", path.name, "missing", "an index beside its tar")
        return
    except OSError as error:
        found.add("index", path.name, f"cannot be read: {error.strerror}", "a readable file")
        return
    is_recorded = record is not None and hashlib.sha256(data).hexdigest() == record.idx_sha256
    if is_recorded and not is_intact:
        return  # a damaged tar differs from its index: that is no fault of the index
    expected = [index_header(len(read.samples.rows)), *read.samples.rows, ""]
    rows = data.decode("ascii", "backslashreplace").split("\n")
    if rows == expected:
        if record and not is_recorded:
            what = f"idx_sha256 {record.idx_sha256}"
            found.add(
                "record", path.with_suffix(".json").name, what, f"{hashlib.sha256(data).hexdigest()}, the index's"
            )
        return
    if rows[0] != expected[0]:
        found.add("index", path.name, f"stale: starts with {rows[0][:80]!r}", f"{expected[0]!r}, as its tar has it")
    for number, (row, right) in enumerate(zip(rows[1:], expected[1:], strict=False), start=1):
        if row != right:
            key = read.samples.keys[number - 1] if number <= len(read.samples.keys) else ""
            found.add(
                "index rows", path.name, f"row {number} is {row[:200]!r}", f"{right!r}, as its tar has it", key=key
            )
    if len(rows) != len(expected):
        found.add("index", path.name, f"stale: {len(rows)} lines", f"{len(expected)} lines, as its tar has samples")


def _compare_sources(name: str, samples: Samples, record: Record, found: Findings) -> None:
    if list(record.sources) != samples.keys:
        odd = sorted(set(record.sources).symmetric_difference(samples.keys))[:3]
        what = f"keys {', '.join(map(repr, odd))} in record or tar alone" if odd else "keys in another order or twice"
        found.add("record", name, what, "the keys of its tar, in their order")
    if strangers := sorted(record.repaired.keys() - record.sources.keys())[:3]:
        what = f"repaired images {', '.join(map(repr, strangers))} are none of its samples"
        found.add("record", name, what, "keys of its samples")
