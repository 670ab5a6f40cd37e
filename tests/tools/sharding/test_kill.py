"""Kill -9 at any moment, and run again: nothing doubled, nothing lost, and what was finished is not touched."""

import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from tests.sharding import PREP, hash_output, list_group, prep, read_samples, wait_until, wait_until_gone

NUM_KILLS = 20
SAMPLES_PER_SHARD = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill") / "tree"
    prep("synth", root, "--classes", 4, "--train", 144, "--val", 16)
    return root


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("kill") / "shards"
    prep("shard", source, "--out", out, "--samples-per-shard", SAMPLES_PER_SHARD)
    return hash_output(out)


def start(source: Path, out: Path) -> subprocess.Popen:
    command = [str(PREP), "shard", str(source), "--out", str(out), "--samples-per-shard", str(SAMPLES_PER_SHARD)]
    return subprocess.Popen(
        [*command, "--workers", "2", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def count_changes(out: Path, seen: set[tuple[str, int]]) -> int:
    """How many files have been seen so far, each temporary and each version of a file counting."""
    for path in out.glob("*") if out.exists() else ():
        try:
            seen.add((path.name, path.stat().st_ino))
        except FileNotFoundError:
            continue
    return len(seen)


def list_finished(out: Path) -> dict[str, tuple[int, int]]:
    """Tars with a record: inode and time of change."""
    found = [path.with_suffix(".tar") for path in out.glob("*-*.json")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def check_whole(source: Path, out: Path, undisturbed: dict[str, str]) -> None:
    assert hash_output(out) == undisturbed
    assert (len(read_samples(out, "train")), len(read_samples(out, "val"))) == (144, 16)
    assert not list(out.glob(".*")) and not (out / "job.json").exists()


@pytest.mark.slow
def test_20_kills_at_random_moments_lose_and_double_nothing_and_keep_what_was_finished(
    source, undisturbed, tmp_path, record_property
):
    """The moments are spread by progress, over the files a whole run makes (about three for each of 20 shards, and
    as many temporaries); who is killed is drawn too: the command alone, or all its processes."""
    random_ = random.Random(7)
    story = []
    for number in range(NUM_KILLS):
        out = tmp_path / str(number)
        moment, with_workers = random_.randrange(1, 90), random_.random() < 0.5
        seen: set[tuple[str, int]] = set()
        with start(source, out) as process:
            wait_until(
                lambda: count_changes(out, seen) >= moment or process.poll() is not None,  # noqa: B023
                f"{moment} files",
            )
            if with_workers:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        wait_until_gone(process.pid)
        finished = list_finished(out) if out.exists() else {}
        was_complete = (out / "manifest.json").exists()
        again = start(source, out)
        stdout, stderr = again.communicate(timeout=120)
        assert again.returncode == 0, stderr
        summary = json.loads(stdout)
        assert list_finished(out).items() >= finished.items()
        assert was_complete == summary["was_complete"] and summary["num_kept_shards"] == len(finished)
        assert summary["images"] == {"train": 144, "val": 16}
        check_whole(source, out, undisturbed)
        story.append((moment, "all" if with_workers else "command", len(finished), was_complete))
    record_property("kills (files seen, killed, shards finished, complete)", story)
    assert len({finished for _, _, finished, _ in story}) > 5, story  # the moments were spread indeed


@pytest.mark.slow
def test_a_run_that_is_killed_over_and_over_still_ends(source, undisturbed, tmp_path):
    out = tmp_path / "out"
    kept: dict[str, tuple[int, int]] = {}
    num_kills = 0
    while True:
        goal = len(kept) + 4
        with start(source, out) as process:
            wait_until(lambda: len(list(out.glob("*-*.json"))) >= goal or process.poll() is not None, "progress")  # noqa: B023
            process.kill()
        wait_until_gone(process.pid)
        finished = list_finished(out)
        assert finished.items() >= kept.items()
        kept = finished
        if (out / "manifest.json").exists():
            break
        num_kills += 1
    assert num_kills >= 3
    prep("shard", source, "--out", out, "--samples-per-shard", SAMPLES_PER_SHARD)
    check_whole(source, out, undisturbed)


def test_a_killed_job_does_not_hold_up_the_next_and_a_living_one_does(source, undisturbed, tmp_path):
    out = tmp_path / "out"
    with start(source, out) as process:
        try:
            wait_until(lambda: list(out.glob("*-*.json")) or process.poll() is not None, "the first record")
            os.kill(process.pid, signal.SIGSTOP)  # alive, if not working
            refused = prep("shard", source, "--out", out, "--samples-per-shard", SAMPLES_PER_SHARD, status=1)
            other = prep("shard", source, "--out", out, "--seed", 1, "--force", status=1)
        finally:
            process.kill()  # a stopped process does not end by itself
    held = f"error: {out}: in use by process {process.pid} on "
    assert refused.stderr.splitlines()[-1].startswith(held) and f"({PREP} shard {source} " in refused.stderr
    assert other.stderr.splitlines()[-1].startswith(held)
    wait_until_gone(process.pid)
    done = prep("shard", source, "--out", out, "--samples-per-shard", SAMPLES_PER_SHARD)
    assert f"the lock of process {process.pid} on" in done.stderr and "is stale and removed" in done.stderr
    check_whole(source, out, undisturbed)
    assert list_group(process.pid) == []
