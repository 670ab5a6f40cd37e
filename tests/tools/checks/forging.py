"""Shards with a fault that no checksum shows: rewritten with Python's tarfile, everything about them made to fit."""

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

from pipeline.shards import ShardSet

Members = list[tuple[str, bytes]]


def read_members(tar: Path) -> Members:
    with tarfile.open(tar) as opened:
        return [(member.name, opened.extractfile(member).read()) for member in opened]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def forge(tar: Path, members: Members) -> None:
    """Write `members` as `tar`, with the index, record and manifest that go with it. Sources keep their order."""
    rows: dict[str, str] = {}
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as opened:
        for number, (name, data) in enumerate(members):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            key, _, ending = name.partition(".")
            same = number and members[number - 1][0].partition(".")[0] == key and ending == "cls"
            row = f"{key}#{number - 1 if same else number}"
            rows[row] = f"{rows[row]} " if row in rows else ""
            rows[row] += f"{ending} {opened.offset + 512} {len(data)} {name}"
            opened.addfile(header, io.BytesIO(data))
    index = "\n".join([f"v1.2 {len(rows)}", *rows.values(), ""]).encode()
    tar.with_suffix(".idx").write_bytes(index)
    keys = [key for key in dict.fromkeys(row.partition("#")[0] for row in rows) if re.fullmatch("[0-9]{9}", key)]
    record = read_json(tar.with_suffix(".json"))
    record["sources"] = dict(zip(keys, list(record["sources"].values()) + ["x/y/z"] * len(keys), strict=False))
    write_json(tar.with_suffix(".json"), record)
    vouch(tar, num_samples=len(rows))


def vouch(tar: Path, *, num_samples: int) -> None:
    """Make record and manifest say what `tar` and its index are now."""
    record, manifest = read_json(tar.with_suffix(".json")), read_json(tar.with_name("manifest.json"))
    facts = {
        "samples": num_samples,
        "bytes": tar.stat().st_size,
        "sha256": hashlib.sha256(tar.read_bytes()).hexdigest(),
    }
    idx_sha256 = hashlib.sha256(tar.with_suffix(".idx").read_bytes()).hexdigest()
    write_json(tar.with_suffix(".json"), {**record, **facts, "idx_sha256": idx_sha256})
    for shard in manifest["shards"]:
        if shard["file"] == tar.name:
            manifest["totals"][shard["split"]] += facts["samples"] - shard["samples"]
            shard.update(facts)
    write_json(tar.with_name("manifest.json"), manifest)
    colors = tar.with_name("color.json")
    if colors.is_file():
        write_json(colors, {**read_json(colors), "shards_fingerprint": ShardSet.open(tar.parent).fingerprint})
