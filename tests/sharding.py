"""What tests of shards do over and over: make some, hash them, read them, run the command, look at processes."""

import hashlib
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.sharding.make import Summary, make_shards
from tools.sources.source import open_source

BROKEN = b"this is no image"
PREP = Path(sys.executable).with_name("alexnet-prep")


def make(tree: Path, out: Path | str, **options: Any) -> Summary:
    return make_shards(open_source(tree), out, **{"samples_per_shard": 4, "num_workers": 2, **options})


def hash_output(out: Path) -> dict[str, str]:
    """What the contract calls the output, tars and indices, with manifest and failure list."""
    names = ("manifest.json", "failures.jsonl")
    files = [path for path in out.iterdir() if path.suffix in (".tar", ".idx") or path.name in names]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_samples(out: Path, split: str, ending: str = "jpg") -> dict[str, tuple[bytes, bytes]]:
    """Key -> (image, label) by Python's tarfile, in stored order."""
    members = {}
    for path in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    keys = list(dict.fromkeys(name.partition(".")[0] for name in members))
    assert set(members) == {f"{key}.{end}" for key in keys for end in (ending, "cls")}
    return {key: (members[f"{key}.{ending}"], members[f"{key}.cls"]) for key in keys}


def prep(*arguments: Any, cwd: Path | None = None, status: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """Run `alexnet-prep` to its end, without the tester's own ALEXNET_ variables."""
    done = subprocess.run(
        [str(PREP), *map(str, arguments)],
        cwd=cwd,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("ALEXNET_")}, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == status, done.stderr
    return done


def wait_until(condition: Callable[[], Any], what: str, limit_s: float = 60) -> Any:
    """What `condition` gives, as soon as it gives something."""
    deadline_s = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"{what}: not within {limit_s} s"
        time.sleep(0.002)
    return found


def list_group(pgid: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(group) == pgid and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until_gone(pgid: int) -> None:
    wait_until(lambda: not list_group(pgid), f"end of the processes of group {pgid}", 30)
