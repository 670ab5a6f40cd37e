"""What only shows across shards: are these the images of the job, each once, under the right label, in the right place?

The decision that shaped it: the plan is computed again. The order of the keys follows from the seed and the numbers of
images; and the job's fingerprint, taken over every source path, label and option before the first shard was written,
follows from what the folder says now, or something in it has changed. Left out: what a single shard can tell
(shardcheck.py).
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.manifest import KEY_DIGITS, MANIFEST, SPLITS, Manifest
from tools.checks.shards import Checked
from tools.checks.tars import Findings
from tools.sharding.plan import fingerprint_job, order_samples
from tools.sources.listing import find_wnid, split_stem
from tools.sources.source import Entry, Source

# Where the folder of an image names its class.
_NAMED_BY_FOLDER = {("folder", "train"), ("folder", "val"), ("kaggle", "train")}


def check_plan(manifest: Manifest | None, shards: list[Checked], found: Findings) -> list[str]:
    """Everything that holds across `shards`, which are in the order of their names. Returns what it could not check."""
    _check_jobs(manifest, shards, found)
    for split in SPLITS:
        _check_keys(_of(split, shards), found)
    if not manifest:
        return []
    _check_counts(manifest, shards, found)
    if all(shard.record for shard in shards):
        for split in SPLITS:
            _check_order(manifest, split, _of(split, shards), found)
        _check_classes(manifest, shards, found)
        if not found.num_problems and not any(shard.num_problems for shard in shards):
            return _check_fingerprint(manifest, shards, found)
    return []


def _of(split: str, shards: list[Checked]) -> list[Checked]:
    return [shard for shard in shards if shard.file.startswith(f"{split}-")]


def _check_jobs(manifest: Manifest | None, shards: list[Checked], found: Findings) -> None:
    """All records and the manifest name one job."""
    jobs = Counter(shard.record.job for shard in shards if shard.record)
    if not jobs:
        return
    right = manifest.job if manifest and manifest.job in jobs else jobs.most_common(1)[0][0]
    if manifest and manifest.job != right:
        found.add("job", MANIFEST, f"job {manifest.job!r}", f"{right!r}, as the records have it", mend="manifest")
    for shard in shards:
        if shard.record and shard.record.job != right:
            record = Path(shard.file).with_suffix(".json").name
            found.add("job", record, f"of job {shard.record.job!r}", f"{right!r}, as the others")


def _check_keys(shards: list[Checked], found: Findings) -> None:
    """No key is in two shards of a split."""
    if not shards:
        return
    apart = [np.unique(np.array(shard.keys, dtype=np.int64)) for shard in shards]
    keys, owners = np.concatenate(apart), np.repeat(np.arange(len(shards)), [len(part) for part in apart])
    order = np.argsort(keys, kind="stable")
    keys, owners = keys[order], owners[order]
    for position in np.flatnonzero(keys[1:] == keys[:-1]):
        first, second = (shards[owner].file for owner in owners[position : position + 2])
        key = f"{keys[position]:0{KEY_DIGITS}d}"
        found.add("duplicate keys", second, f"this key is in {first} too", "each key in one shard", key=key)


def _check_counts(manifest: Manifest, shards: list[Checked], found: Findings) -> None:
    """Every shard was given `samples_per_shard` images, the last of a split at most so many."""
    for split in SPLITS:
        mine = _of(split, shards)
        for shard in mine:
            if not shard.record:
                continue
            planned, full = _count_planned(shard), manifest.samples_per_shard
            if planned > full or (planned < full and shard is not mine[-1]):
                samples = len(shard.record.sources)
                what = f"{samples} samples and {planned - samples} failures"
                found.add("plan", shard.file, what, f"{full} together", mend=_blame(shard))


def _check_order(manifest: Manifest, split: str, shards: list[Checked], found: Findings) -> None:
    """A shard's keys are the positions that the seed puts there, but for as many as it has failures."""
    planned = [_count_planned(shard) for shard in shards]
    order = order_samples(sum(planned), manifest.seed if split == "train" else None)
    for shard, here in zip(shards, np.split(order, np.cumsum(planned)[:-1]) if shards else [], strict=True):
        keys = [int(key) for key in shard.record.sources] if shard.record else []
        kept = set(keys)
        if [position for position in here.tolist() if position in kept] != keys:
            by = f"seed {manifest.seed}" if split == "train" else "canonical order"
            found.add("plan", shard.file, f"other keys, or in another order, than by {by} and the records of {split}",
                      "the keys planned for it", mend=_blame(shard))  # fmt: skip


def _check_classes(manifest: Manifest, shards: list[Checked], found: Findings) -> None:
    """Where an image's folder names its class, it is the class of its label."""
    folders: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for shard, _, label, source in _list_samples(shards):
        if folder := _class_folder(manifest, shard, source):
            folders[label][folder] += 1
    wnids = {entry.index: entry.wnid for entry in manifest.classes}
    for label, counts in folders.items():
        if label in wnids and wnids[label] not in counts and len(counts) == 1:
            what = f"class {label} is {wnids[label]!r}"
            found.add("classes", MANIFEST, what, f"{next(iter(counts))!r}, as its sources have it", mend="manifest")
            wnids[label] = next(iter(counts))
    for shard, key, label, source in _list_samples(shards):
        folder = _class_folder(manifest, shard, source)
        if folder is not None and label in wnids and folder != wnids[label]:
            what = f"label {label} ({wnids[label]!r}) of source {source!r}"
            found.add("classes", shard.file, what, "the class that the source's folder names", key=key)


def _check_fingerprint(manifest: Manifest, shards: list[Checked], found: Findings) -> list[str]:
    splits = {split: _list_entries(manifest, split, _of(split, shards)) for split in SPLITS}
    listed = {split: entries for split, entries in splits.items() if entries is not None}
    if len(listed) < len(SPLITS):
        return ["sources not held against the job's fingerprint: the class of an unusable image is not known"]
    source = Source(manifest.layout, manifest.classes, listed, lambda _: b"")
    devices = {shard.record.device for shard in shards if shard.record}
    job = fingerprint_job(
        source,
        seed=manifest.seed,
        quality=manifest.quality,
        samples_per_shard=manifest.samples_per_shard,
        encoding=manifest.encoding,
        device=" ".join(sorted(devices)),
    )
    if job != manifest.job:
        what = f"sources, labels and options give job {job!r}"
        found.add("job", MANIFEST, what, f"{manifest.job!r}: one of them has changed", mend="job")
    return []


def _list_entries(manifest: Manifest, split: str, shards: list[Checked]) -> list[Entry] | None:
    """The split's images in canonical order, failures among them; None if where these belong cannot be told."""
    entries = {int(key): Entry(source, label) for _, key, label, source in _list_samples(shards)}
    labels = {entry.wnid: entry.index for entry in manifest.classes}
    lost = []
    for shard in shards:
        for failure in shard.record.failures if shard.record else ():
            source = failure["source"]
            base_name = source.rpartition("/")[2]
            wnid = _class_folder(manifest, shard, source) or find_wnid(base_name, base_name)
            if wnid not in labels:
                return None
            lost.append(Entry(source, labels[wnid]))
    lost.sort(key=lambda entry: _canonical(entry, split))
    gaps = [position for position in range(len(entries) + len(lost)) if position not in entries]
    if len(gaps) != len(lost):
        return None  # other keys than planned: reported
    entries.update(zip(gaps, lost, strict=True))
    return [entries[position] for position in range(len(entries))]


def _list_samples(shards: list[Checked]) -> Iterator[tuple[Checked, str, int, str]]:
    """Shard, key, label and source of every sample of the shards whose record fits their tar."""
    for shard in shards:
        if shard.record and len(shard.record.sources) == len(shard.labels):
            for (key, source), label in zip(shard.record.sources.items(), shard.labels, strict=True):
                yield shard, key, label, source


def _count_planned(shard: Checked) -> int:
    return len(shard.record.sources) + len(shard.record.failures) if shard.record else 0


def _class_folder(manifest: Manifest, shard: Checked, source: str) -> str | None:
    """The class that the folder of an image names, in layouts and splits where one does."""
    if (manifest.layout, shard.file.partition("-")[0]) not in _NAMED_BY_FOLDER:
        return None
    return source.rpartition("/")[0].rpartition("/")[2]


def _canonical(entry: Entry, split: str) -> tuple[object, ...]:
    stem = split_stem(entry.base_name)[0]
    first = (entry.label, stem) if split == "train" else (stem, entry.label)
    return (*first, entry.base_name, entry.path)


def _blame(shard: Checked) -> str:
    """A shard that agrees with its record and index is not at fault for not fitting what the manifest says."""
    return "shard" if shard.num_problems else "manifest"
