"""Parts of a job: together they make the same folder as one run, whoever is last, and whatever was there before."""

import json
import shutil
import subprocess

import pytest

from pipeline.common.errors import UserError
from pipeline.shards import ShardSet
from tests.sharding import BROKEN, PREP, hash_output, make, prep
from tools.sharding.lock import Part
from tools.sources.source import open_source


@pytest.fixture(scope="module")
def whole(small_tree, tmp_path_factory):
    """Hashes of 8 shards, made in one run."""
    return hash_output(make(small_tree, tmp_path_factory.mktemp("whole") / "out", samples_per_shard=2).out)


def make_part(tree, out, number, count, **options):
    return make(tree, out, samples_per_shard=2, part=Part(number, count), **options)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)], ids=str)
def test_parts_in_any_order_make_what_one_run_makes_and_the_last_completes(small_tree, whole, tmp_path, order):
    out = tmp_path / "out"
    for number in order[:-1]:
        summary = make_part(small_tree, out, number, 3)
        assert not summary.is_complete and not (out / "manifest.json").exists()
    assert summary.missing_parts == order[-1:] and summary.num_missing_shards in (2, 3)
    last = make_part(small_tree, out, order[-1], 3)
    assert last.is_complete and (last.images, last.num_missing_shards) == ({"train": 12, "val": 4}, 0)
    assert hash_output(out) == whole
    assert not list(out.glob(".*")) and not (out / "job.json").exists()
    assert make_part(small_tree, out, 2, 3).was_complete


def test_a_part_that_is_first_tells_what_it_made_and_what_is_missing(small_tree, tmp_path):
    summary = make_part(small_tree, tmp_path / "out", 2, 8)
    assert (summary.images, summary.shards) == ({"train": 2, "val": 0}, {"train": 1, "val": 0})
    assert (summary.num_prepared, summary.num_missing_shards) == (2, 7)
    assert summary.missing_parts == (1, 3, 4, 5, 6, 7, 8)
    assert sorted(path.name for path in summary.out.iterdir()) == [
        "job.json", *(f"train-000001.{ending}" for ending in ("idx", "json", "tar"))
    ]  # fmt: skip


def test_more_parts_than_shards_are_no_fault(small_tree, whole, tmp_path):
    for number in range(1, 12):
        summary = make_part(small_tree, tmp_path / "out", number, 11)
    assert summary.is_complete and hash_output(tmp_path / "out") == whole


def test_the_command_without_part_completes_a_folder_of_parts(small_tree, whole, tmp_path):
    make_part(small_tree, tmp_path / "out", 2, 3)
    summary = make(small_tree, tmp_path / "out", samples_per_shard=2)
    assert (summary.num_kept_shards, summary.is_complete) == (3, True) and hash_output(tmp_path / "out") == whole


def test_a_folder_whose_last_writer_died_before_the_manifest_is_completed_by_any_part(small_tree, whole, tmp_path):
    out = tmp_path / "out"
    for number in (1, 2):
        make_part(small_tree, out, number, 2)
    (out / "manifest.json").unlink()
    summary = make_part(small_tree, out, 1, 2)
    assert (summary.num_prepared, summary.is_complete) == (0, True) and hash_output(out) == whole


def test_a_part_leaves_the_half_made_shards_of_the_others_alone(small_tree, whole, tmp_path):
    out = tmp_path / "out"
    make_part(small_tree, out, 1, 2)
    (out / "train-000001.tar").write_bytes(b"renamed a moment ago, its index to follow")
    (out / "train-000003.json").write_text('{"damaged": 1}')
    make_part(small_tree, out, 1, 2)
    assert (out / "train-000001.tar").exists() and (out / "train-000003.json").exists()
    make_part(small_tree, out, 2, 2)
    assert hash_output(out) == whole


def test_a_damaged_shard_of_another_part_is_named_as_missing_and_not_completed_over(small_tree, tmp_path):
    out = tmp_path / "out"
    make_part(small_tree, out, 1, 2)
    (out / "train-000000.tar").write_bytes(b"cut")
    summary = make_part(small_tree, out, 2, 2)
    assert (summary.is_complete, summary.missing_parts, summary.num_missing_shards) == (False, (1,), 1)
    assert make_part(small_tree, out, 1, 2).is_complete


def test_parts_of_another_job_are_refused_and_force_takes_back_only_its_own(small_tree, whole, tmp_path):
    out = tmp_path / "out"
    for number in (1, 2):
        make_part(small_tree, out, number, 2)
    (out / "color.json").write_text("{}")
    for force in (False, True):
        with pytest.raises(UserError, match=r"another job.*replace them once with --force and without --part"):
            make_part(small_tree, out, 1, 2, seed=1, force=force)
    before_ns = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    summary = make_part(small_tree, out, 1, 2, force=True)
    assert summary.is_complete and hash_output(out) == whole and not (out / "color.json").exists()
    remade = {name for name, made_ns in before_ns.items() if (out / name).stat().st_mtime_ns != made_ns}
    assert remade == {f"train-00000{n}.tar" for n in (0, 2, 4)} | {"val-000000.tar"}


def test_the_limit_of_failures_holds_for_each_part_and_for_all_together(tree, tmp_path):
    source = open_source(tree)
    out = tmp_path / "out"
    files = [
        json.loads(path.read_text())
        for path in sorted(make(tree, tmp_path / "w", samples_per_shard=2).out.glob("*-*.json"))
    ]
    for record in (files[0], files[2], files[1], files[3]):  # two of part 1, two of part 2
        (tree / next(iter(record["sources"].values()))).write_bytes(BROKEN)
    assert len(source.entries("train")) == 12
    with pytest.raises(UserError, match=r"2 of 16 images cannot be used, limit 1 "):
        make_part(tree, out, 1, 2, max_failures="1", num_workers=1)
    assert make_part(tree, out, 1, 2, max_failures="3").num_failures == 2
    with pytest.raises(UserError, match=r"4 of 16 images cannot be used, limit 3 "):  # its own 2 and the other's
        make_part(tree, out, 2, 2, max_failures="3")
    assert not (out / "manifest.json").exists()
    summary = make(tree, out, samples_per_shard=2, max_failures="4")
    assert (summary.num_prepared, summary.num_failures) == (0, 4)
    assert len((out / "failures.jsonl").read_text().splitlines()) == 4
    assert ShardSet.open(out).manifest.totals == {"train": 8, "val": 4}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_parts_in_processes_that_run_at_the_same_time_make_what_one_run_makes(synth_tree, shard_dir, tmp_path, count):
    out = tmp_path / "out"
    command = [
        str(PREP),
        "shard",
        str(synth_tree),
        "--out",
        str(out),
        "--samples-per-shard",
        "16",
        "--workers",
        "1",
    ]
    parts = [f"{number}/{count}" for number in range(1, count + 1)]
    processes = [
        subprocess.Popen(
            [*command, "--part", part, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for part in parts
    ]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, told
    summaries = [json.loads(stdout) for stdout, _ in told]
    assert any(summary["is_complete"] for summary in summaries)
    assert hash_output(out) == hash_output(shard_dir)
    assert not list(out.glob(".*")) and not (out / "job.json").exists()


def test_the_command_says_which_parts_are_missing(small_tree, tmp_path):
    out = tmp_path / "out"
    make_part(small_tree, out, 1, 2)
    words = prep("shard", small_tree, "--out", out, "--samples-per-shard", 2, "--part", "1/2").stdout
    assert "4 shards of other parts (2) are still missing: no manifest yet" in words and "next:" not in words


def test_what_parts_left_of_an_earlier_failure_list_goes_when_nothing_fails(tree, whole, tmp_path):
    broken = tree / "train/dog/dog_2.png"
    good = broken.read_bytes()
    broken.write_bytes(BROKEN)
    out = make(tree, tmp_path / "out", samples_per_shard=2).out
    broken.write_bytes(good)
    for number in (1, 2):
        make_part(tree, out, number, 2, force=True)
    assert not (out / "failures.jsonl").exists() and hash_output(out) == whole


def test_two_finishers_that_race_write_the_same(small_tree, whole, tmp_path):
    done = make(small_tree, tmp_path / "done", samples_per_shard=2).out
    for round_number in range(3):
        out = shutil.copytree(done, tmp_path / str(round_number))
        (out / "manifest.json").unlink()
        command = [str(PREP), "shard", str(small_tree), "--out", str(out), "--samples-per-shard", "2", "--json"]
        racers = [
            subprocess.Popen([*command, "--part", f"{number}/2"], stdout=subprocess.PIPE, text=True)
            for number in (1, 2)
        ]
        summaries = [json.loads(racer.communicate(timeout=60)[0]) for racer in racers]
        assert [racer.returncode for racer in racers] == [0, 0]
        assert all(summary["is_complete"] and summary["num_prepared"] == 0 for summary in summaries)
        assert hash_output(out) == whole and not list(out.glob(".*"))
