"""A finished folder of shards, checked from end to end: every problem found, and what mends it.

The decision that shaped it: nothing stops at the first problem, and nothing is believed because it says so. Shards are
read in parallel (shardcheck.py), then held against each other and against the plan they came from (plancheck.py). Left
out: mending. A damaged shard is made again by the command that made it, once the files named here are deleted.
"""

import json
import re
import time
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
from pipeline.download import CHECKED
from pipeline.manifest import ENDINGS, IMAGE_SIZE_PX, MANIFEST, SPLITS, Manifest
from pipeline.shards import ShardSet
from tools.checks.info import list_holders
from tools.checks.plan import check_plan
from tools.checks.shards import Checked, Task, check_shard, load_strictly
from tools.checks.tars import Findings, Problem
from tools.sharding.lock import is_lock
from tools.sharding.output import FAILURES_FILE, JOB_FILE
from tools.sharding.plan import name_shards
from tools.sharding.workers import run_units
from tools.sources import LAYOUTS

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
        return {
            "root": str(self.root),
            "is_clean": not self.num_problems,
            "num_problems": self.num_problems,
            "problems": [
                {"shard": p.file, "key": p.key, "what": p.what, "expected": p.expected, "remedy": REMEDIES[p.mend]}
                for p in self.problems
            ],
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
        raw = load_strictly(path)
        manifest = Manifest.parse(raw, path)
    except (UserError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
        complain(reason.partition("; make the shards again")[0], "a manifest")
        return None
    if json.loads(json.dumps(manifest.to_json())) != raw:
        complain("a name or value that no manifest has", "what `alexnet-prep shard` writes")
    if manifest.encoding not in ENDINGS:
        complain(f"encoding {manifest.encoding!r}", " or ".join(ENDINGS))
    if manifest.layout not in LAYOUTS:
        complain(f"layout {manifest.layout!r}", " or ".join(LAYOUTS))
    if manifest.size_px != IMAGE_SIZE_PX:
        complain(f"size_px {manifest.size_px}", f"{IMAGE_SIZE_PX}")
    wnids = [entry.wnid for entry in manifest.classes]
    if sorted(set(wnids)) != wnids:
        complain("wnids that are not in sorted order, each once", "a class's index is the rank of its wnid")
    return manifest


def _list_tasks(
    root: Path, manifest: Manifest | None, names: list[str], found: Findings, *, decode: bool
) -> list[Task]:
    """A task for each shard of the manifest and each that lost all its images; without a manifest, for each on disk."""
    listed = {shard.file: shard for shard in manifest.shards} if manifest else {}
    on_disk = {f"{match[1]}.tar" for name in names if (match := _SHARD_FILE.fullmatch(name))}
    lost = {file for file in on_disk - set(listed) if not manifest or _peek(root / file).get("samples") == 0}
    files = sorted(lost.union(listed))
    for split in SPLITS:
        here = {file for file in files if file.startswith(f"{split}-")}
        wanted = name_shards(split, int(max(here)[-10:-4]) + 1, 1) if here else []
        if absent := [name for name in wanted if name not in here]:
            what = f"{len(absent)} shards not listed, a later one is: {absent[0]}"
            found.add("shards", MANIFEST, what, "shards numbered without a gap", mend="manifest")
    return [
        Task(
            root=root,
            file=file,
            listed=listed.get(file),
            ending=ENDINGS.get(manifest.encoding) if manifest else None,
            num_classes=len(manifest.classes) if manifest else None,
            decode=decode,
        )
        for file in files
    ]


def _peek(tar: Path) -> dict[str, Any]:
    """What the record of `tar` says, {} if nothing. (All its images lost: then it is rightly not in the manifest.)"""
    try:
        raw = load_strictly(tar.with_suffix(".json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _check_failures(path: Path, shards: list[Checked], found: Findings) -> None:
    """failures.jsonl holds what the records hold, in the order of the shards."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except (OSError, ValueError, RecursionError) as error:
        found.add("failures", path.name, f"cannot be read ({error})", "one JSON object a line", mend="manifest")
        return
    if not all(shard.record for shard in shards):
        return  # reported; what it should hold cannot be told
    recorded = [(shard.file, failure) for shard in shards if shard.record for failure in shard.record.failures]
    if lines == [failure for _, failure in recorded]:
        return
    what = f"{len(lines)} failures, other than recorded"
    found.add("failures", path.name, what, f"the {len(recorded)} of the shards' records", mend="manifest")
    if any(line not in [failure for _, failure in recorded] for line in lines):
        for file, failure in recorded:  # list or record, one has changed: only making the shard again tells which
            if failure not in lines:
                record = Path(file).with_suffix(".json").name
                found.add("failures", record, f"failure of {failure['source']!r}", f"the same as in {path.name}")


def _check_colors(shards: ShardSet, names: list[str], found: Findings) -> None:
    """Colour statistics, where there are any, are of these shards and agree among themselves."""
    if COLOR_FILE not in names and MEAN_IMAGE_FILE not in names:
        return
    try:
        stats = ColorStats.load(shards.root, shards.fingerprint)
    except UserError as error:
        what = str(error).removeprefix(f"{shards.root / COLOR_FILE}: ").partition("; run `")[0]
        found.add("colors", COLOR_FILE, what, "statistics of these shards", mend="colors")
        return
    num_pixels = shards.num_samples("train") * IMAGE_SIZE_PX**2
    mean = stats.mean_image.mean(axis=(0, 1), dtype=np.float64)
    claims = {
        f"num_pixels {stats.num_pixels}": stats.num_pixels == num_pixels,
        f"mean {stats.mean.tolist()}": np.allclose(stats.mean, mean, rtol=_COLOR_TOLERANCE),
        "eigenvectors": np.allclose(stats.eigenvectors.T @ stats.eigenvectors, np.eye(3), atol=_COLOR_TOLERANCE),
        "covariance": np.allclose(
            stats.eigenvectors * stats.eigenvalues @ stats.eigenvectors.T,
            stats.covariance,
            atol=_COLOR_TOLERANCE * max(1.0, float(stats.eigenvalues.max())),
        ),
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
            if manifest and _peek(root / f"{match[1]}.tar").get("job") == manifest.job:
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
