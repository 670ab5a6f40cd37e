"""`alexnet-prep verify`: damage that no checksum shows, in shards rewritten so that everything fits (forging.py)."""

import tarfile

import numpy as np
import pytest

from tests.tools.checks import verifying
from tests.tools.checks.forging import forge, read_json, read_members, vouch, write_json
from tests.tools.checks.verifying import (
    BROKEN,
    SHARD,
    TAR,
    check,
    encode,
    find,
)

# Fixtures; imported by name they would be taken for variables that each test redefines.
tree, finished, folder = verifying.tree, verifying.finished, verifying.folder
in_this_process = verifying.in_this_process


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


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.XHDTYPE])
def test_a_member_that_is_no_file_is_named(folder, kind):
    link = tarfile.TarInfo("000000077.jpg")
    link.type, link.linkname = kind, "../../secret"
    with tarfile.open(folder / TAR, "a") as tar:
        tar.addfile(link)
    vouch(folder / TAR, num_samples=4)
    problems = find(check(folder), TAR, "member that is no plain file: '000000077.jpg")
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
    path = folder / f"{SHARD}.idx"
    path.write_text(path.read_text().replace("v1.2 4", "v1.2 5"))
    vouch(folder / TAR, num_samples=5)
    (problem,) = find(check(folder), TAR, "samples 4")
    assert problem.expected == "samples 5"


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
