"""`alexnet-prep verify`: a clean folder passes, each kind of damage is found and named, and the remedy mends it.

Damage that checksums show is done to copies of a folder; damage that they do not show is forged (forging.py).
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.colorstats import ColorStats
from pipeline.errors import UserError
from pipeline.shardset import ShardSet
from tests.layout_builders import BUILDERS
from tests.tools.forging import forge, read_json, read_members, vouch, write_json
from tools import verify as verify_module
from tools.lock import Lock
from tools.sharder import make_shards
from tools.sources import open_source
from tools.store import open_store
from tools.verify import REMEDIES, Report, verify

TAR, SHARD = "train-000001.tar", "train-000001"
NUM_TRAIN, NUM_VAL = 14, 4
BROKEN = b"this is no image"


def encode(size: tuple[int, int], mode: str, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """2 classes, 14 training images of which one is broken and one lacks its end, 4 validation images."""
    root = tmp_path_factory.mktemp("verify") / "tree"
    rng = np.random.default_rng(0)
    for split, num_images in (("train", NUM_TRAIN // 2), ("val", NUM_VAL // 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(num_images):
                pixels = rng.integers(0, 256, size=(3, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name}_{split}_{number}.png")
    (root / "train/dog/dog_train_2.png").write_bytes(BROKEN)
    (root / "train/cat/cat_train_1.png").write_bytes(encode((40, 30), "RGB")[:-2])
    return root


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory) -> Path:
    """Shards of 4 images: four for training, with 4, 4, 4 and 2 planned images, and one for validation."""
    out = tmp_path_factory.mktemp("verify") / "shards"
    shard(tree, out)
    image = np.arange(256 * 256 * 3, dtype=np.int64).reshape(256, 256, 3) % 251
    flat = image.reshape(-1, 3)
    stats = ColorStats.from_sums(1, (flat.T @ flat).tolist(), image, ShardSet.open(out).fingerprint)
    ColorStats(**{**vars(stats), "num_pixels": (NUM_TRAIN - 1) * 256 * 256}).save(out)
    return out


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of `finished` to damage."""
    return shutil.copytree(finished, tmp_path / "shards")


@pytest.fixture(autouse=True)
def in_this_process(request, monkeypatch):
    """Most tests check many folders of little: worker processes would be most of the time."""

    def run_here(function, units, *, on_result, on_progress, **_options):
        for unit in units:
            on_result(function(unit, on_progress))

    if "in_workers" not in request.fixturenames:
        monkeypatch.setattr(verify_module, "run_units", run_here)


def shard(tree: Path, out: Path, **options) -> None:
    make_shards(open_source(tree), out, **{"samples_per_shard": 4, "num_workers": 1, "max_failures": "9", **options})


def check(folder: Path, **options) -> Report:
    return verify(folder, **{"num_workers": 1, **options})


def find(report: Report, file: str, words: str) -> list:
    return [problem for problem in report.problems if problem.file == file and words in problem.what]


def hash_output(out: Path) -> dict[str, str]:
    files = [path for path in out.iterdir() if path.suffix in (".tar", ".idx")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip(path: Path, position: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


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
    with Lock(open_store(folder), "job", None):
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


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


# Damage that checksums do not show


def test_a_label_out_of_range_is_found(folder):
    members = read_members(folder / TAR)
    members[1] = (members[1][0], b"00002")
    members[3] = (members[3][0], b"1    ")
    forge(folder / TAR, members)
    report = check(folder)
    assert [(p.file, p.key, p.what, p.expected) for p in report.problems] == [
        (TAR, members[1][0][:9], "label 2 is out of range", "5 digits, 0 to 1"),
        (TAR, members[3][0][:9], "label is b'1    '", "5 digits, 0 to 1"),
    ]


def test_a_wrong_label_in_range_is_found_by_its_source(folder):
    members = read_members(folder / TAR)
    right = int(members[1][1])
    members[1] = (members[1][0], b"%05d" % (1 - right))
    forge(folder / TAR, members)
    (problem,) = check(folder).problems
    assert (problem.file, problem.key) == (TAR, members[1][0][:9]) and f"label {1 - right} (" in problem.what


def test_a_duplicate_key_in_a_shard_is_found(folder):
    members = read_members(folder / TAR)
    forge(folder / TAR, members + members[:2])
    report = check(folder)
    assert find(report, TAR, "this key comes again")[0].key == members[0][0][:9]


def test_a_duplicate_key_over_two_shards_is_found(folder):
    members, others = read_members(folder / TAR), read_members(folder / "train-000000.tar")
    forge(folder / TAR, others[:2] + members[2:])
    (problem,) = find(check(folder), TAR, "this key is in train-000000.tar too")
    assert problem.key == others[0][0][:9]


def test_shards_that_are_swapped_are_found(folder):
    members, others = read_members(folder / TAR), read_members(folder / "train-000000.tar")
    forge(folder / TAR, others)
    forge(folder / "train-000000.tar", members)
    report = check(folder)
    assert find(report, TAR, "other keys, or in another order") and find(report, "train-000000.tar", "other keys")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "000000001.txt", "000000001.jpg.exe", "a b\n.jpg", "é.cls"])
def test_a_foreign_member_is_named_and_never_written(folder, name):
    forge(folder / TAR, [*read_members(folder / TAR), (name, b"x")])
    before = sorted(path.name for path in folder.parent.rglob("*"))
    problems = find(check(folder), TAR, "foreign member ")
    assert len(problems) == 1 and "\n" not in problems[0].what
    assert sorted(path.name for path in folder.parent.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_file_is_named(folder, kind):
    link = tarfile.TarInfo("000000077.jpg")
    link.type, link.linkname = kind, "../../secret"
    with tarfile.open(folder / TAR, "a") as tar:
        tar.addfile(link)
    vouch(folder / TAR, num_samples=4)
    problems = find(check(folder), TAR, "member that is no plain file: '000000077.jpg'")
    assert len(problems) == 1


@pytest.mark.parametrize("tail", [b"x" * 512, bytes(5120) + b"x"])
def test_data_behind_the_end_of_a_tar_is_found(folder, tail):
    with (folder / TAR).open("ab") as file:
        file.write(tail)
    vouch(folder / TAR, num_samples=4)
    assert find(check(folder), TAR, "data after the end mark at byte ")


def test_an_index_that_is_as_recorded_and_wrong_is_found(folder):
    path = folder / f"{SHARD}.idx"
    header, first, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *rows, first, ""]))
    vouch(folder / TAR, num_samples=4)
    assert len(find(check(folder), path.name, "row ")) == 4
    path.write_text("\n".join([header, first, *rows, rows[-1], ""]))
    vouch(folder / TAR, num_samples=4)
    assert [problem.what for problem in find(check(folder), path.name, "")] == [
        f"row 5 is {rows[-1]!r}",
        "stale: 7 lines",
    ]


def test_a_number_of_samples_that_all_agree_on_and_the_tar_does_not_hold_is_found(folder):
    vouch(folder / TAR, num_samples=5)
    manifest = read_json(folder / "manifest.json")
    manifest["totals"]["train"] += 1
    assert find(check(folder), TAR, "samples 4") or find(check(folder), "manifest.json", "total of train")


def test_a_record_of_other_keys_or_with_a_name_twice_is_found(folder):
    path = folder / f"{SHARD}.json"
    text, record = path.read_text(), read_json(path)
    keys = list(record["sources"])
    for sources, words in (
        (dict(zip([*keys[:-1], "000000099"], record["sources"].values(), strict=True)), "in record or tar alone"),
        (dict(reversed(record["sources"].items())), "keys in another order"),
    ):
        write_json(path, {**record, "sources": sources})
        assert find(check(folder), path.name, words)
    path.write_text(text.replace('"samples"', '"samples": 3,\n "samples"'))
    assert find(check(folder), path.name, "a name comes twice in one object")
    write_json(path, {**record, "repaired": {"000000099": "trailing garbage"}})
    assert find(check(folder), path.name, "repaired images '000000099' are none of its samples")


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_sample_without_its_image_or_label_is_found(folder, left_out):
    members = read_members(folder / TAR)
    key = members[left_out][0][:9]
    forge(folder / TAR, members[:left_out] + members[left_out + 1 :])
    report = check(folder)
    assert [problem.key for problem in find(report, TAR, "has .")] == [key]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (encode((256, 256), "RGB")[:-40], "cannot be decoded"),
        (BROKEN, "cannot be decoded (UnidentifiedImageError"),
        (encode((256, 255), "RGB"), "256x255 RGB"),
        (encode((256, 256), "L"), "256x256 L"),
        (encode((256, 256), "RGB", "PNG"), "cannot be decoded"),
    ],
    ids=["truncated", "none", "small", "grey", "png"],
)
def test_an_image_that_is_no_256x256_rgb_jpeg_is_found_by_decoding(folder, image, words):
    members = read_members(folder / TAR)
    members[2] = (members[2][0], image)
    forge(folder / TAR, members)
    assert check(folder).problems == ()
    (problem,) = check(folder, decode=True).problems
    assert (problem.file, problem.key) == (TAR, members[2][0][:9]) and words in problem.what


def test_failures_that_do_not_fit_the_records_are_found(folder):
    path = folder / "failures.jsonl"
    line = path.read_text()
    for text in (line * 2, "", line.replace("train_2", "train_3"), "{"):
        path.write_text(text)
        named = [problem.file for problem in check(folder).problems]
        assert named[0] == "failures.jsonl" and named[1:] == (["train-000003.json"] if "train_3" in text else [])


def test_samples_and_failures_are_held_against_what_was_planned(folder):
    record = read_json(folder / f"{SHARD}.json")
    record["failures"].append({"source": "train/cat/no.png", "reason": "x", "exception": "X"})
    write_json(folder / f"{SHARD}.json", record)
    assert find(check(folder), TAR, "4 samples and 1 failures") or find(check(folder), TAR, "3 samples and 2 failures")


def test_colour_statistics_of_other_shards_or_changed_are_found(folder):
    whole = read_json(folder / "color.json")
    for field, value, words in (
        ("shards_fingerprint", "0" * 64, "computed on shards 000000000000"),
        ("mean", [1.0, 2.0, 3.0], "mean [1.0, 2.0, 3.0] does not fit"),
        ("covariance", (np.array(whole["covariance"]) * 1.01).tolist(), "covariance does not fit"),
        ("num_pixels", 7, "num_pixels 7"),
    ):
        write_json(folder / "color.json", {**whole, field: value})
        (problem,) = check(folder).problems
        assert problem.file == "color.json" and words in problem.what
        assert check(folder).run == (f"alexnet-prep pca --shards {folder}",)


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
