"""A folder of shards, checked from end to end: every problem found, and what mends it."""

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from pipeline.colors import COLOR_FILE, MEAN_IMAGE_FILE, ColorStats
from pipeline.common.console import Progress
from pipeline.common.errors import UserError
from pipeline.common.files import read_json
from pipeline.download import CHECKED
from pipeline.manifest import ENDINGS, IMAGE_SIZE_PX, KEY_DIGITS, MANIFEST, SPLITS, Manifest
from pipeline.shards import ShardSet
from tools.checks.info import list_holders
from tools.checks.shards import Checked, Findings, Problem, Task, check_shard, peek_record, reason_of
from tools.sharding.lock import is_lock
from tools.sharding.output import FAILURES_FILE, JOB_FILE
from tools.sharding.plan import fingerprint_job, name_shards, order_samples
from tools.sharding.record import Record
from tools.sharding.workers import run_units
from tools.sources import LAYOUTS
from tools.sources.listing import find_wnid, split_stem
from tools.sources.source import Entry, Source

REMEDIES = {
    "shard": "make the shard again",
    "manifest": "write the manifest again",
    "job": "write the manifest again; if this comes again, `alexnet-prep shard --force`",
    "colors": "`alexnet-prep pca`",
    "extra": "delete it or keep it elsewhere",
}
_SHARD_FILE = re.compile(r"((?:train|val)-[0-9]{6})\.(tar|idx|json)")
_TEMPORARY = re.compile(r"\..+\.tmp[0-9]+")
_FOLDER_FILES = {MANIFEST, COLOR_FILE, MEAN_IMAGE_FILE, FAILURES_FILE, JOB_FILE, CHECKED}
_COLOR_TOLERANCE = 1e-5  # relative, of colour statistics among themselves: the mean image is float32
_NAMED_BY_FOLDER = {
    ("folder", "train"),
    ("folder", "val"),
    ("kaggle", "train"),
}  # layouts: an image's folder, its class

Recorded = list[tuple[Checked, Record]]


@dataclass(frozen=True)
class Report:
    """What was read, what is wrong with it, and what mends it: files in `root` to delete, then commands to run."""

    root: Path
    problems: tuple[Problem, ...]
    num_problems: int
    remarks: tuple[str, ...]
    delete: tuple[str, ...]
    run: tuple[str, ...]
    num_shards: int
    num_samples: int
    num_bytes: int
    decoded: bool
    duration_s: float

    @property
    def megabytes_per_s(self) -> float:
        return self.num_bytes / 1e6 / max(self.duration_s, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """As `alexnet-prep verify --json` prints it."""
        problems = [
            {"shard": p.file, "key": p.key, "what": p.what, "expected": p.expected, "remedy": REMEDIES[p.mend]}
            for p in self.problems
        ]
        return {
            "root": str(self.root),
            "is_clean": not self.num_problems,
            "num_problems": self.num_problems,
            "problems": problems,
            "remedy": {"delete": list(self.delete), "run": list(self.run)},
            "remarks": list(self.remarks),
            "num_shards": self.num_shards,
            "num_samples": self.num_samples,
            "num_bytes": self.num_bytes,
            "decoded": self.decoded,
            "duration_s": round(self.duration_s, 3),
            "megabytes_per_s": round(self.megabytes_per_s, 1),
        }


def verify(root: str | Path, *, num_workers: int, decode: bool = False) -> Report:
    """Check the finished folder `root`; with `decode`, decode every image too.

    Raises UserError if there is nothing to verify: no such folder, or an unfinished one (no manifest).
    """
    start_s = time.monotonic()
    root = Path(root)
    if not (root / MANIFEST).is_file():
        ShardSet.open(root)  # says what there is instead, and what to do
    found = Findings()
    manifest = _read_manifest(root / MANIFEST, found)
    names = sorted(path.name for path in root.iterdir())
    tasks = _list_tasks(root, manifest, names, found, decode=decode)
    results: dict[str, Checked] = {}
    with Progress("verify", sum(manifest.totals.values()) if manifest else 0, "images") as progress:
        run_units(
            check_shard,
            tasks,
            num_workers=num_workers,
            on_result=lambda checked: results.update({checked.file: checked}),
            on_progress=progress.advance,
            preload=("tools.checks.shards",),
        )
    shards = [results[task.file] for task in tasks]
    unchecked = check_plan(manifest, shards, found)
    _check_failures(root / FAILURES_FILE, shards, found)
    if manifest and not any(problem.file == MANIFEST for shard in shards for problem in shard.problems):
        _check_colors(ShardSet(root, manifest), names, found)  # else their fingerprint is not of what is there
    remarks = (*unchecked, *_check_names(root, manifest, {Path(task.file).stem for task in tasks}, names, found))
    problems = tuple(chain(found.list_problems(), *(shard.problems for shard in shards)))
    delete, run = _plan_mending(root, problems, manifest, shards, names)
    return Report(
        root=root,
        problems=problems,
        num_problems=found.num_problems + sum(shard.num_problems for shard in shards),
        remarks=remarks,
        delete=delete,
        run=run,
        num_shards=len(shards),
        num_samples=sum(len(shard.keys) for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        decoded=decode,
        duration_s=time.monotonic() - start_s,
    )


def _read_manifest(path: Path, found: Findings) -> Manifest | None:
    def complain(what: str, expected: str) -> None:
        found.add("manifest", MANIFEST, what, expected, mend="manifest")

    try:
        raw = read_json(path)
        manifest = Manifest.parse(raw, path)
    except UserError as error:
        complain(" ".join(reason_of(error, path).split()), "a manifest")
        return None
    wnids = [entry.wnid for entry in manifest.classes]
    if json.loads(json.dumps(manifest.to_json())) != raw:
        complain("a name or value that no manifest has", "what `alexnet-prep shard` writes")
    if manifest.encoding not in ENDINGS:
        complain(f"encoding {manifest.encoding!r}", " or ".join(ENDINGS))
    if manifest.layout not in LAYOUTS:
        complain(f"layout {manifest.layout!r}", " or ".join(LAYOUTS))
    if manifest.size_px != IMAGE_SIZE_PX:
        complain(f"size_px {manifest.size_px}", f"{IMAGE_SIZE_PX}")
    if sorted(set(wnids)) != wnids:
        complain("wnids that are not in sorted order, each once", "a class's index is the rank of its wnid")
    return manifest


def _list_tasks(
    root: Path, manifest: Manifest | None, names: list[str], found: Findings, *, decode: bool
) -> list[Task]:
    """A task for each shard of the manifest and each that lost all its images; without a manifest, for each on disk."""
    listed = {shard.file: shard for shard in manifest.shards} if manifest else {}
    files = set(listed)
    for file in {f"{match[1]}.tar" for name in names if (match := _SHARD_FILE.fullmatch(name))} - files:
        record = peek_record(root / file) if manifest else None
        if not manifest or (record and not record.samples):  # such a shard is rightly not in the manifest
            files.add(file)
    for split in SPLITS:
        here = {file for file in files if file.startswith(f"{split}-")}
        wanted = name_shards(split, int(max(here)[-10:-4]) + 1, 1) if here else []
        if absent := [name for name in wanted if name not in here]:
            what = f"{len(absent)} shards not listed, a later one is: {absent[0]}"
            found.add("shards", MANIFEST, what, "shards numbered without a gap", mend="manifest")
    ending = ENDINGS.get(manifest.encoding) if manifest else None
    num_classes = len(manifest.classes) if manifest else None
    return [Task(root, file, listed.get(file), ending, num_classes, decode) for file in sorted(files)]


def _check_failures(path: Path, shards: list[Checked], found: Findings) -> None:
    """failures.jsonl holds what the records hold, in the order of the shards."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except (OSError, ValueError, RecursionError) as error:
        found.add("failures", path.name, f"cannot be read ({error})", "one JSON object a line", mend="manifest")
        return
    recorded = [(shard, failure) for shard in shards if shard.record for failure in shard.record.failures]
    if not all(shard.record for shard in shards) or lines == [failure for _, failure in recorded]:
        return  # without all records, which is reported, nobody can tell what it should hold
    what = f"{len(lines)} failures, other than recorded"
    found.add("failures", path.name, what, f"the {len(recorded)} of the shards' records", mend="manifest")
    if any(line not in [failure for _, failure in recorded] for line in lines):
        for shard, failure in recorded:  # list or record, one has changed: only making the shard again tells which
            if failure not in lines:
                what = f"failure of {failure['source']!r}"
                found.add("failures", shard.record_name, what, f"the same as in {path.name}")


def _check_colors(shards: ShardSet, names: list[str], found: Findings) -> None:
    """Colour statistics, where there are any, are of these shards and agree among themselves."""
    if COLOR_FILE not in names and MEAN_IMAGE_FILE not in names:
        return
    try:
        stats = ColorStats.load(shards.root, shards.fingerprint)
    except UserError as error:
        what = reason_of(error, shards.root / COLOR_FILE)
        found.add("colors", COLOR_FILE, what, "statistics of these shards", mend="colors")
        return
    num_pixels = shards.num_samples("train") * IMAGE_SIZE_PX**2
    mean = stats.mean_image.mean(axis=(0, 1), dtype=np.float64)
    product = stats.eigenvectors * stats.eigenvalues @ stats.eigenvectors.T
    largest = max(1.0, float(stats.eigenvalues.max()))
    claims = {
        f"num_pixels {stats.num_pixels}": stats.num_pixels == num_pixels,
        f"mean {stats.mean.tolist()}": np.allclose(stats.mean, mean, rtol=_COLOR_TOLERANCE),
        "eigenvectors": np.allclose(stats.eigenvectors.T @ stats.eigenvectors, np.eye(3), atol=_COLOR_TOLERANCE),
        "covariance": np.allclose(product, stats.covariance, atol=_COLOR_TOLERANCE * largest),
    }
    for what, holds in claims.items():
        if not holds:
            expected = f"{num_pixels} pixels, the mean image's mean, an eigenbasis of the covariance"
            found.add("colors", COLOR_FILE, f"{what} does not fit the rest", expected, mend="colors")


def _check_names(
    root: Path, manifest: Manifest | None, stems: set[str], names: list[str], found: Findings
) -> Iterator[str]:
    """Problems for files that look like ours and are not of this set; a remark for each other."""
    for each in list_holders(root):
        yield ("in use by {holder}" if each["is_alive"] else "left locked by {holder}, which is gone").format(**each)
    for name in names:
        match = _SHARD_FILE.fullmatch(name)
        if match and match[1] not in stems:
            record = peek_record(root / name)
            if manifest and record and record.job == manifest.job:
                what = f"does not list {name}, which is of its job"
                found.add("shards", MANIFEST, what, "every shard of the job", mend="manifest")
            else:
                found.add("extra files", name, "of a shard that is not listed", "no such file", mend="extra")
        elif _TEMPORARY.fullmatch(name):
            found.add("extra files", name, "left by a run that was killed", "no such file", mend="extra")
        elif not match and name not in _FOLDER_FILES and not is_lock(name):
            yield f"{name!r} is no part of the set"


def _plan_mending(
    root: Path, problems: tuple[Problem, ...], manifest: Manifest | None, shards: list[Checked], names: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files to delete, then commands to run. A shard whose record is gone is made again; without a manifest a folder
    counts as unfinished; and a folder in which nothing says whose it is any more is refused."""
    mends = {problem.mend for problem in problems}
    pca = f"alexnet-prep pca --shards {quote(str(root))}"
    if not mends & {"shard", "manifest", "job"}:
        return (), (pca,) if "colors" in mends else ()
    again = f"alexnet-prep shard SOURCE --out {quote(str(root))}"
    same = "  # the source and the options of before"
    bad = {Path(problem.file).stem for problem in problems if problem.mend == "shard"}
    then = (pca,) if COLOR_FILE in names else ()  # it goes with what it was computed on
    if any(shard.record and Path(shard.file).stem not in bad for shard in shards):
        records = sorted(f"{stem}.json" for stem in bad if f"{stem}.json" in names)
        return (MANIFEST, *records), (again + same, *then)
    if manifest:
        return (), (f"{again} --force{same}", *then)
    return tuple(name for name in names if name in _FOLDER_FILES or _SHARD_FILE.fullmatch(name)), (again + same, *then)


def check_plan(manifest: Manifest | None, shards: list[Checked], found: Findings) -> list[str]:
    """Everything that holds across `shards`, which are in the order of their names. Returns what it could not check."""
    recorded = [(shard, shard.record) for shard in shards if shard.record]
    _check_jobs(manifest, recorded, found)
    for split in SPLITS:
        _check_keys([shard for shard in shards if shard.split == split], found)
    if not manifest:
        return []
    for split in SPLITS:
        files = [shard.file for shard in shards if shard.split == split]
        _check_counts(manifest, _of(split, recorded), files[-1:], found)
    if len(recorded) == len(shards):
        for split in SPLITS:
            _check_order(manifest, split, _of(split, recorded), found)
        _check_classes(manifest, recorded, found)
        if not found.num_problems and not any(shard.num_problems for shard in shards):
            return _check_fingerprint(manifest, recorded, found)
    return []


def _of(split: str, recorded: Recorded) -> Recorded:
    return [(shard, record) for shard, record in recorded if shard.split == split]


def _check_jobs(manifest: Manifest | None, recorded: Recorded, found: Findings) -> None:
    """All records and the manifest name one job."""
    jobs = Counter(record.job for _, record in recorded)
    if not jobs:
        return
    right = manifest.job if manifest and manifest.job in jobs else jobs.most_common(1)[0][0]
    if manifest and manifest.job != right:
        found.add("job", MANIFEST, f"job {manifest.job!r}", f"{right!r}, as the records have it", mend="manifest")
    for shard, record in recorded:
        if record.job != right:
            found.add("job", shard.record_name, f"of job {record.job!r}", f"{right!r}, as the others")


def _check_keys(shards: list[Checked], found: Findings) -> None:
    """No key is in two of the shards, which are a split's."""
    apart = [np.unique(np.array(shard.keys, dtype=np.int64)) for shard in shards]
    keys = np.concatenate([np.empty(0, np.int64), *apart])
    owners = np.repeat(np.arange(len(shards)), [len(part) for part in apart])
    order = np.argsort(keys, kind="stable")
    keys, owners = keys[order], owners[order]
    for position in np.flatnonzero(keys[1:] == keys[:-1]):
        first, second = (shards[owner].file for owner in owners[position : position + 2])
        key = f"{keys[position]:0{KEY_DIGITS}d}"
        found.add("duplicate keys", second, f"this key is in {first} too", "each key in one shard", key=key)


def _check_counts(manifest: Manifest, recorded: Recorded, last: list[str], found: Findings) -> None:
    """Every shard of a split was given `samples_per_shard` images, the `last` at most so many."""
    full = manifest.samples_per_shard
    for shard, record in recorded:
        if record.num_planned > full or (record.num_planned < full and shard.file not in last):
            what = f"{len(record.sources)} samples and {len(record.failures)} failures"
            found.add("plan", shard.file, what, f"{full} together", mend=_blame(shard))


def _check_order(manifest: Manifest, split: str, recorded: Recorded, found: Findings) -> None:
    """A shard's keys are the positions that the seed puts there, but for as many as it has failures."""
    ends = np.cumsum([record.num_planned for _, record in recorded], dtype=np.int64)
    order = order_samples(int(ends[-1]) if recorded else 0, manifest.seed if split == "train" else None)
    for (shard, record), here in zip(recorded, np.split(order, ends)[: len(recorded)], strict=True):
        keys = [int(key) for key in record.sources]
        kept = set(keys)
        if [position for position in here.tolist() if position in kept] != keys:
            by = f"seed {manifest.seed}" if split == "train" else "canonical order"
            what = f"other keys, or in another order, than by {by} and the records of {split}"
            found.add("plan", shard.file, what, "the keys planned for it", mend=_blame(shard))


def _check_classes(manifest: Manifest, recorded: Recorded, found: Findings) -> None:
    """Where an image's folder names its class, it is the class of its label."""
    folders: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for shard, _, label, source in _list_samples(recorded):
        if folder := _class_folder(manifest, shard, source):
            folders[label][folder] += 1
    wnids = {entry.index: entry.wnid for entry in manifest.classes}
    for label, counts in folders.items():
        if label in wnids and wnids[label] not in counts and len(counts) == 1:
            what = f"class {label} is {wnids[label]!r}"
            wnids[label] = next(iter(counts))
            found.add("classes", MANIFEST, what, f"{wnids[label]!r}, as its sources have it", mend="manifest")
    for shard, key, label, source in _list_samples(recorded):
        folder = _class_folder(manifest, shard, source)
        if folder is not None and label in wnids and folder != wnids[label]:
            what = f"label {label} ({wnids[label]!r}) of source {source!r}"
            found.add("classes", shard.file, what, "the class that the source's folder names", key=key)


def _check_fingerprint(manifest: Manifest, recorded: Recorded, found: Findings) -> list[str]:
    splits = {split: _list_entries(manifest, split, _of(split, recorded)) for split in SPLITS}
    listed = {split: entries for split, entries in splits.items() if entries is not None}
    if len(listed) < len(SPLITS):
        return ["sources not held against the job's fingerprint: the class of an unusable image is not known"]
    job = fingerprint_job(
        Source(manifest.layout, manifest.classes, listed, lambda _: b""),
        seed=manifest.seed,
        quality=manifest.quality,
        samples_per_shard=manifest.samples_per_shard,
        encoding=manifest.encoding,
        device=" ".join(sorted({record.device for _, record in recorded})),
    )
    if job != manifest.job:
        what = f"sources, labels and options give job {job!r}"
        found.add("job", MANIFEST, what, f"{manifest.job!r}: one of them has changed", mend="job")
    return []


def _list_entries(manifest: Manifest, split: str, recorded: Recorded) -> list[Entry] | None:
    """The split's images in canonical order, failures among them; None if where these belong cannot be told."""
    entries = {int(key): Entry(source, label) for _, key, label, source in _list_samples(recorded)}
    labels = {entry.wnid: entry.index for entry in manifest.classes}
    lost = []
    for shard, record in recorded:
        for failure in record.failures:
            source = failure["source"]
            base_name = source.rpartition("/")[2]
            wnid = _class_folder(manifest, shard, source) or find_wnid(base_name, base_name)
            if wnid not in labels:
                return None
            lost.append(Entry(source, labels[wnid]))

    def canonical(entry: Entry) -> tuple[object, ...]:
        stem = split_stem(entry.base_name)[0]
        first = (entry.label, stem) if split == "train" else (stem, entry.label)
        return (*first, entry.base_name, entry.path)

    gaps = [position for position in range(len(entries) + len(lost)) if position not in entries]
    if len(gaps) != len(lost):
        return None  # other keys than planned: reported
    entries.update(zip(gaps, sorted(lost, key=canonical), strict=True))
    return [entries[position] for position in range(len(entries))]


def _list_samples(recorded: Recorded) -> Iterator[tuple[Checked, str, int, str]]:
    """Shard, key, label and source of every sample of the shards whose record fits their tar."""
    for shard, record in recorded:
        if len(record.sources) == len(shard.labels):
            for (key, source), label in zip(record.sources.items(), shard.labels, strict=True):
                yield shard, key, label, source


def _class_folder(manifest: Manifest, shard: Checked, source: str) -> str | None:
    """The class that the folder of an image names, in layouts and splits where one does."""
    if (manifest.layout, shard.split) not in _NAMED_BY_FOLDER:
        return None
    return source.rpartition("/")[0].rpartition("/")[2]


def _blame(shard: Checked) -> str:
    """A shard that agrees with its record and index is not at fault for not fitting what the manifest says."""
    return "shard" if shard.num_problems else "manifest"
