"""`alexnet-prep verify`: a clean folder passes, damage that checksums show is found, and the remedy mends it."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from pipeline.shards import ShardSet
from tests.layout_builders import BUILDERS
from tests.tools.checks import verifying
from tests.tools.checks.forging import forge, read_json, read_members, write_json
from tests.tools.checks.verifying import (
    BROKEN,
    NUM_TRAIN,
    NUM_VAL,
    SHARD,
    TAR,
    check,
    find,
    flip,
    shard,
)
from tools.checks.verify import REMEDIES, verify
from tools.sharding.lock import lock_store
from tools.sharding.store import open_store

# Fixtures; imported by name they would be taken for variables that each test redefines.
tree, finished, folder = verifying.tree, verifying.finished, verifying.folder
in_this_process = verifying.in_this_process


def hash_output(out: Path) -> dict[str, str]:
    files = [path for path in out.iterdir() if path.suffix in (".tar", ".idx")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# A clean folder


@pytest.fixture
def in_workers():
    """A test that names this leaves the worker processes in."""


@pytest.mark.parametrize("decode", [False, True])
def test_a_clean_folder_has_no_problem(finished, decode, in_workers):
    report = verify(finished, num_workers=2, decode=decode)
    assert (report.problems, report.num_problems, report.remarks) == ((), 0, ())
    assert (report.num_shards, report.num_samples) == (5, NUM_TRAIN - 1 + NUM_VAL)
    assert report.num_bytes == sum(path.stat().st_size for path in finished.glob("*.tar"))
    assert (report.delete, report.run) == ((), ())


def test_a_folder_of_odd_files_and_no_failures_is_clean(ready_shards):
    assert check(ready_shards, decode=True).problems == ()


def test_a_shard_of_which_nothing_could_be_used_is_no_problem(tree, tmp_path):
    copy = shutil.copytree(tree, tmp_path / "tree")
    for path in (copy / "val/cat").iterdir():
        path.write_bytes(BROKEN)
    shard(copy, tmp_path / "out", samples_per_shard=2)
    assert (tmp_path / "out/val-000000.json").is_file()
    assert "val-000000.tar" not in [s.file for s in ShardSet.open(tmp_path / "out").manifest.shards]
    assert check(tmp_path / "out").problems == ()


def test_shards_of_raw_pixels_are_clean_and_their_size_is_checked(tree, tmp_path):
    shard(tree, tmp_path / "out", encoding="raw")
    assert check(tmp_path / "out").problems == ()
    tar = tmp_path / "out" / TAR
    members = read_members(tar)
    forge(tar, [(members[0][0], members[0][1][:-1]), *members[1:]])
    (problem,) = check(tmp_path / "out").problems
    assert problem.key == members[0][0][:9] and "196607 bytes, raw pixels have 196608" in problem.what


@pytest.mark.parametrize("layout", BUILDERS)
def test_shards_of_every_layout_are_clean(synth_tree, tmp_path, layout):
    shard(BUILDERS[layout](synth_tree, tmp_path / "source"), tmp_path / "out", samples_per_shard=30)
    report = check(tmp_path / "out")
    assert (report.problems, report.remarks) == ((), ())
    manifest = tmp_path / "out/manifest.json"
    write_json(manifest, {**read_json(manifest), "quality": 91})  # what only the job's fingerprint tells
    assert [problem.mend for problem in check(tmp_path / "out").problems] == ["job"]


def test_that_sources_cannot_be_held_against_the_job_is_said(synth_tree, tmp_path):
    source = BUILDERS["kaggle"](synth_tree, tmp_path / "source")
    next(source.rglob("ILSVRC2012_val_00000003.JPEG")).write_bytes(BROKEN)
    shard(source, tmp_path / "out")
    report = check(tmp_path / "out")
    assert report.problems == ()
    assert report.remarks == (
        "sources not held against the job's fingerprint: the class of an unusable image is not known",
    )


def test_a_lock_is_told_and_no_problem(folder, tree):
    with lock_store(open_store(folder), "job", None):
        (remark,) = check(folder).remarks
        assert remark.startswith(f"in use by process {os.getpid()} on ") and check(folder).problems == ()


def test_what_is_unfinished_or_no_folder_of_shards_is_an_error(folder, tmp_path):
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"unfinished or not a folder of shards \(no manifest.json\)"):
        check(folder)
    with pytest.raises(UserError, match="no such folder"):
        check(tmp_path / "none")


# Damage that checksums show


def test_a_flipped_byte_in_a_tar_is_found(folder):
    flip(folder / TAR, 700)
    report = check(folder)
    (problem,) = report.problems
    assert problem.file == TAR and problem.what.startswith("sha256 ")
    assert problem.expected == "sha256 " + read_json(folder / "manifest.json")["shards"][1]["sha256"]


@pytest.mark.parametrize("kept", [0, 100, 512, 700, -512, -1500, -9000])
def test_a_truncated_tar_is_found_and_the_other_shards_are_still_checked(folder, kept):
    data = (folder / TAR).read_bytes()
    (folder / TAR).write_bytes(data[:kept])
    flip(folder / "val-000000.tar", 600)
    report = check(folder)
    assert find(report, TAR, f"bytes {len(data[:kept])}")[0].expected == f"bytes {len(data)}"
    assert find(report, "val-000000.tar", "sha256")
    assert {problem.file for problem in report.problems} == {TAR, "val-000000.tar"}
    if kept == 700:
        assert find(report, TAR, "' at byte 0 has 188 of its ")
    elif data[:kept][-1024:] != bytes(1024):
        assert find(report, TAR, "truncated") or find(report, TAR, "no header")


@pytest.mark.parametrize("ending", ["tar", "idx", "json"])
def test_a_missing_file_of_a_shard_is_found(folder, ending):
    (folder / f"{SHARD}.{ending}").unlink()
    report = check(folder)
    assert [problem.what for problem in report.problems] == ["missing"]
    assert report.problems[0].file == f"{SHARD}.{ending}"


def test_a_missing_shard_is_found(folder):
    for path in folder.glob(f"{SHARD}.*"):
        path.unlink()
    report = check(folder)
    assert {problem.file for problem in report.problems} == {f"{SHARD}.{ending}" for ending in ("tar", "idx", "json")}


def test_a_stale_index_is_found_row_by_row(folder):
    shutil.copy(folder / "train-000000.idx", folder / f"{SHARD}.idx")
    report = check(folder)
    assert len(find(report, f"{SHARD}.idx", "row")) == 4 and not find(report, TAR, "")
    shutil.copy(folder / "train-000003.idx", folder / f"{SHARD}.idx")
    assert find(check(folder), f"{SHARD}.idx", "stale: starts with 'v1.2 ")


def test_the_witness_that_two_others_contradict_is_the_one_that_is_named(folder):
    for name, field in (("manifest.json", "manifest"), (f"{SHARD}.json", "record")):
        text = (folder / name).read_text()
        sha256 = read_json(folder / f"{SHARD}.json")["sha256"]
        (folder / name).write_text(text.replace(sha256, "0" * 64))
        (problem,) = check(folder).problems
        assert problem.file == name and f"tar and {'record' if field == 'manifest' else 'manifest'}" in problem.expected
        (folder / name).write_text(text)


def test_a_manifest_that_cannot_be_read_does_not_keep_the_shards_from_being_checked(folder):
    (folder / "manifest.json").write_text("{")
    flip(folder / TAR, 700)
    flip(folder / "train-000002.idx", 30)
    report = check(folder)
    assert {problem.file for problem in report.problems} == {"manifest.json", TAR, "train-000002.idx"}


def test_every_problem_is_reported_and_not_only_the_first(folder):
    flip(folder / "train-000000.tar", 700)
    (folder / TAR).write_bytes((folder / TAR).read_bytes()[:5000])
    (folder / "train-000002.tar").unlink()
    shutil.copy(folder / "train-000000.idx", folder / "train-000003.idx")
    (folder / "failures.jsonl").unlink()
    (folder / "color.json").unlink()
    (folder / "val-000009.tar").write_bytes(b"")
    (folder / ".val-000000.tar.tmp12").write_bytes(b"")
    named = {problem.file for problem in check(folder).problems}
    shards = {"train-000000.tar", TAR, "train-000002.tar", "train-000003.idx"}
    assert named == shards | {"failures.jsonl", "color.json", "val-000009.tar", ".val-000000.tar.tmp12"}


def drop_shard(manifest: dict) -> None:
    (gone,) = [shard for shard in manifest["shards"] if shard["file"] == "train-000002.tar"]
    manifest["shards"].remove(gone)
    manifest["totals"]["train"] -= gone["samples"]


CHANGES = {
    "job": (lambda m: m.update(job="0" * 64), f"job '{'0' * 64}'"),
    "layout": (lambda m: m.update(layout="golder"), "layout 'golder'"),
    "encoding": (lambda m: m.update(encoding="jpfg"), "encoding 'jpfg'"),
    "size": (lambda m: m.update(size_px=255), "size_px 255"),
    "type": (lambda m: m.update(seed="0"), "seed: got '0'"),
    "name": (lambda m: m.update(sead=0), "a name or value that no manifest has"),
    "schema": (lambda m: m.update(schema=2), "schema is 2, expected 1"),
    "wnid": (lambda m: m["classes"][0].update(wnid="bat"), "class 0 is 'bat'"),
    "order of wnids": (lambda m: m["classes"][0].update(wnid="zebra"), "wnids that are not in sorted order"),
    "a shard less": (drop_shard, "1 shards not listed, a later one is: train-000002.tar"),
    "a shard of the job": (drop_shard, "does not list train-000002.tar, which is of its job"),
    "quality": (lambda m: m.update(quality=91), "sources, labels and options give job "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_manifest_is_found_and_the_manifest_named(folder, name):
    change_it, words = CHANGES[name]
    manifest = read_json(folder / "manifest.json")
    change_it(manifest)
    write_json(folder / "manifest.json", manifest)
    assert find(check(folder), "manifest.json", words)


@pytest.mark.parametrize("samples_per_shard", [3, 5])
def test_shards_of_another_size_than_the_manifest_says_are_found(folder, samples_per_shard):
    change(folder / "manifest.json", "samples_per_shard", samples_per_shard)
    problems = [problem for problem in check(folder).problems if problem.expected == f"{samples_per_shard} together"]
    full = ["train-000000.tar", TAR, "train-000002.tar", *(["val-000000.tar"] if samples_per_shard == 3 else [])]
    assert [problem.file for problem in problems] == full and {problem.mend for problem in problems} == {"manifest"}


def test_images_that_failed_have_their_place_among_the_jobs_sources(tree, tmp_path):
    copy = shutil.copytree(tree, tmp_path / "tree")
    for name in ("dog/dog_train_0", "cat/cat_train_3", "cat/cat_train_6", "dog/dog_train_5"):
        (copy / f"train/{name}.png").write_bytes(BROKEN)
    for name in ("dog/dog_val_1", "cat/cat_val_0"):
        (copy / f"val/{name}.png").write_bytes(BROKEN)
    shard(copy, tmp_path / "out", seed=1)
    report = check(tmp_path / "out")
    assert (report.problems, report.remarks) == ((), ())
    record = tmp_path / "out/train-000000.json"
    record.write_text(record.read_text().replace("_train_4.png", "_train_4.pnh"))
    report = check(tmp_path / "out")
    assert [problem.mend for problem in report.problems] == ["job"]


def test_files_that_are_not_ours_are_a_remark_and_no_problem(folder):
    (folder / "notes\n.txt").write_text("mine")
    report = check(folder)
    assert report.remarks == ("'notes\\n.txt' is no part of the set",) and report.num_problems == 0


def test_many_problems_of_a_kind_are_counted_and_some_are_shown(synth_tree, tmp_path):
    shard(synth_tree, tmp_path / "out", samples_per_shard=88)
    tar = tmp_path / "out/train-000000.tar"
    forge(tar, [(name, b"00077" if name.endswith("cls") else data) for name, data in read_members(tar)])
    report = check(tmp_path / "out")
    assert report.num_problems == 64
    assert len(report.problems) == 21 and report.problems[-1].what == "and 44 more: bad labels"


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_found(finished, folder, data):
    """In tars, indices and the failure list: any. In JSON: any that changes what the file says, but for what is told to
    people alone and stands nowhere else: `created_by`, the `name` of a class (not its wnid), and which samples came of
    images that had to be `repaired`, and how."""
    files = sorted(path.name for path in finished.iterdir() if path.name not in ("color.json", "mean_image.npy"))
    name = data.draw(st.sampled_from(files))
    position = data.draw(st.integers(0, (folder / name).stat().st_size - 1))
    flip(folder / name, position, data.draw(st.integers(1, 255)))
    try:
        report = check(folder)
        if not report.problems:
            assert name.endswith((".json", ".jsonl")) and tell(folder / name) == tell(finished / name)
        elif not any(problem.mend == "job" for problem in report.problems):
            assert any(Path(problem.file).stem == Path(name).stem for problem in report.problems)
    finally:
        shutil.copy(finished / name, folder / name)


def tell(path: Path) -> object:
    """What a file says, but for what is for people alone."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    raw = {**read_json(path), "repaired": None}
    if path.name == "manifest.json":
        raw["created_by"] = None
        for entry in raw["classes"]:
            entry["name"] = None
    return raw


# The remedy


def change(path: Path, field: str, value: object) -> None:
    write_json(path, {**read_json(path), field: value})


def drop_label(tar: Path) -> None:
    forge(tar, read_members(tar)[:-1])


DAMAGES = {
    "flipped byte": lambda out: flip(out / TAR, 700),
    "truncated": lambda out: (out / TAR).write_bytes((out / TAR).read_bytes()[:3000]),
    "no tar": lambda out: (out / TAR).unlink(),
    "no shard": lambda out: [path.unlink() for path in out.glob(f"{SHARD}.*")],
    "stale index": lambda out: shutil.copy(out / "train-000000.idx", out / f"{SHARD}.idx"),
    "record": lambda out: change(out / f"{SHARD}.json", "sha256", "0" * 64),
    "other job": lambda out: change(out / f"{SHARD}.json", "job", "0" * 64),
    "label": lambda out: forge(
        out / TAR, [(n, b"00009" if n.endswith("cls") else d) for n, d in read_members(out / TAR)]
    ),
    "half a sample": lambda out: drop_label(out / TAR),
    "manifest": lambda out: (out / "manifest.json").write_text("{"),
    "seed": lambda out: change(out / "manifest.json", "seed", 5),
    "quality": lambda out: change(out / "manifest.json", "quality", 91),
    "failures": lambda out: (out / "failures.jsonl").unlink(),
    "every tar": lambda out: [flip(path, 700) for path in out.glob("*.tar")],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_following_the_remedy_gives_the_very_shards_again(tree, finished, folder, name):
    DAMAGES[name](folder)
    report = check(folder)
    assert report.num_problems
    made = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    for file in report.delete:
        (folder / file).unlink()
    assert report.run[0].startswith(f"alexnet-prep shard SOURCE --out {folder}")
    shard(tree, folder, force="--force" in report.run[0])
    assert report.run[1:] == (f"alexnet-prep pca --shards {folder}",)
    assert check(folder).problems == () and hash_output(folder) == hash_output(finished)
    if name != "every tar":  # shards that are whole are kept
        assert (folder / "train-000002.tar").stat().st_mtime_ns == made["train-000002.tar"]


def test_every_problem_has_a_remedy_in_words(folder):
    flip(folder / TAR, 700)
    (folder / "val-000009.tar").write_bytes(b"")
    report = check(folder)
    facts = json.loads(json.dumps(report.to_json()))
    assert [problem["remedy"] for problem in facts["problems"]] == [REMEDIES[p.mend] for p in report.problems]
    assert facts["remedy"]["delete"] == ["manifest.json", f"{SHARD}.json"]
    assert facts["is_clean"] is False and facts["num_problems"] == 2
