"""The official archives: labels by the development kit, bytes by offset, one line for each that is not as it was."""

import io
import os
import sys
import tarfile
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from tests.layout_builders import build_devkit, build_meta, build_official, build_tar
from tools.sources.official import DEVKIT, TRAIN, VAL, read_meta, read_truth
from tools.sources.source import open_source

WNIDS = ("n01440764", "n01443537", "n01484850")


def make_official(
    root: Path,
    train: dict[str, list[str]] | None = None,
    val: list[str] | None = None,
    truth: list[int] | None = None,
    meta: bytes | None = None,
) -> Path:
    """Small archives: an image's content is its name. ILSVRC ids run against the wnids."""
    root.mkdir(exist_ok=True)
    train = {wnid: [f"{wnid}_1.JPEG"] for wnid in WNIDS} if train is None else train
    inner = [(f"{wnid}.tar", build_tar([(name, name.encode()) for name in names])) for wnid, names in train.items()]
    (root / TRAIN).write_bytes(build_tar(inner))
    val = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3)] if val is None else val
    (root / VAL).write_bytes(build_tar([(name, name.encode()) for name in val]))
    (root / DEVKIT).write_bytes(build_devkit(meta or build_meta(list(WNIDS[::-1])), truth or [1, 2, 3]))
    return root


def test_ids_of_the_kit_are_turned_into_ranks_of_wnids(tmp_path):
    source = open_source(make_official(tmp_path, truth=[3, 3, 1]))
    assert [(c.index, c.wnid, c.name) for c in source.classes] == [
        (index, wnid, f"words of {wnid}") for index, wnid in enumerate(WNIDS)
    ]
    assert [(entry.base_name, entry.label) for entry in source.entries("val")] == [
        ("ILSVRC2012_val_00000001.JPEG", 0),
        ("ILSVRC2012_val_00000002.JPEG", 0),
        ("ILSVRC2012_val_00000003.JPEG", 2),
    ]
    for split in ("train", "val"):
        assert [source.read(entry) for entry in source.entries(split)] == [
            entry.base_name.encode() for entry in source.entries(split)
        ]
    assert source.remarks == ()


def test_meta_is_read_as_the_kit_has_it_860_synsets_above_the_1000():
    wnids, titles = read_meta(build_meta([f"n{number:08d}" for number in range(1000)], num_inner=860), "meta.mat")
    assert len(wnids) == len(titles) == 1000 and wnids[1] == "n00000000" and titles["n00000999"] == "words of n00000999"


def test_nothing_is_written_and_no_name_in_an_archive_is_opened(tmp_path):
    """Every file opened while listing and reading, seen by an audit hook, is one of the three archives."""
    names = ["../../outside.JPEG", "/etc/passwd", "n01440764/../../n01440764_2.JPEG"]
    root = make_official(tmp_path / "source", {"n01440764": names, "../n01443537": ["a.JPEG"], "n01484850": ["b.JPEG"]})
    (tmp_path / "outside.JPEG").write_bytes(b"secret")
    opened: list[str] = []
    is_watching = True

    def watch(event: str, arguments: tuple) -> None:
        if is_watching and event == "open":
            opened.append(os.fspath(arguments[0]) if not isinstance(arguments[0], int) else "")

    before = sorted(tmp_path.rglob("*"))
    sys.addaudithook(watch)
    try:
        source = open_source(root)
        contents = {source.read(entry) for entry in source.entries("train")}
    finally:
        is_watching = False
    assert contents == {name.encode() for name in (*names, "a.JPEG", "b.JPEG")}
    assert [c.wnid for c in source.classes] == list(WNIDS)
    assert {path for path in opened if str(tmp_path) in path} == {str(root / name) for name in (TRAIN, VAL, DEVKIT)}
    assert not any("passwd" in path for path in opened) and sorted(tmp_path.rglob("*")) == before


def test_without_validation_no_kit_is_needed(tmp_path):
    make_official(tmp_path)
    (tmp_path / VAL).unlink()
    (tmp_path / DEVKIT).unlink()
    source = open_source(tmp_path)
    assert source.entries("val") == [] and "no validation images" in source.remarks[0]
    assert source.classes[0].name == "tench, Tinca tinca"  # the project's own


def test_an_unpacked_kit_will_do(tmp_path):
    make_official(tmp_path)
    wanted = open_source(tmp_path).splits
    with tarfile.open(tmp_path / DEVKIT) as tar:
        tar.extractall(tmp_path)  # a filter came with Python 3.11.4
    (tmp_path / DEVKIT).unlink()
    assert open_source(tmp_path).splits == wanted


def test_a_class_whose_tar_is_empty_is_passed_over_with_a_remark(tmp_path):
    train = {WNIDS[0]: ["a.JPEG"], WNIDS[1]: [], WNIDS[2]: ["b.JPEG"]}
    source = open_source(make_official(tmp_path, train, truth=[1, 3, 3]))
    assert [c.wnid for c in source.classes] == [WNIDS[0], WNIDS[2]]
    assert f"{TRAIN}: 1 class tars without an image passed over: 'n01443537'" in source.remarks


def test_absent_images_and_archives_of_other_tasks_are_remarked(tmp_path):
    make_official(tmp_path, val=["ILSVRC2012_val_00000002.JPEG"])
    for name in ("ILSVRC2012_img_test_v10102019.tar", "ILSVRC2012_img_train_t3.tar"):
        (tmp_path / name).write_bytes(b"")
    text = "\n".join(open_source(tmp_path).remarks)
    assert f"{VAL}: 2 of the 3 images with labels are not there" in text
    assert "'ILSVRC2012_img_test_v10102019.tar', 'ILSVRC2012_img_train_t3.tar' not used" in text


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def remove_kit(root: Path) -> None:
    make_official(root)
    (root / DEVKIT).unlink()


def remove_train(root: Path) -> None:
    make_official(root)
    (root / TRAIN).unlink()


def cut_train(root: Path) -> None:
    make_official(root)
    cut(root / TRAIN, 12_000)


def make_kit_plain(root: Path) -> None:
    make_official(root)
    (root / DEVKIT).write_bytes(b"<html>log in first</html>")


def make_kit_of_another_task(root: Path) -> None:
    make_official(root)
    with tarfile.open(root / DEVKIT, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("ILSVRC2012_devkit_t3/data/meta_clsloc.mat"), io.BytesIO(b""))


def make_flat_train(root: Path) -> None:
    make_official(root)
    (root / TRAIN).write_bytes(build_tar([("n01440764_1.JPEG", b"x")]))


def make_twin_classes(root: Path) -> None:
    make_official(root)
    inner = build_tar([("a.JPEG", b"x")])
    (root / TRAIN).write_bytes(build_tar([("n01440764.tar", inner), ("./n01440764.tar", inner)]))


def make_link(root: Path) -> None:
    make_official(root)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("n01440764_1.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (root / TRAIN).write_bytes(build_tar([("n01440764.tar", buffer.getvalue())]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (remove_kit, rf"holds {VAL} and no {DEVKIT}, which has the labels of the validation images; fetch it from"),
        (remove_train, rf"holds {VAL} and no {TRAIN}, which has the training images"),
        (cut_train, rf"{TRAIN}: truncated: 'n01443537.tar' \(header at byte 10752\) needs 10240 bytes"),
        (make_kit_plain, rf"{DEVKIT}: damaged \(not a gzip file"),
        (
            make_kit_of_another_task,
            f"{DEVKIT}: has no data/meta.mat and no data/ILSVRC2012_validation_ground_truth.txt",
        ),
        (make_flat_train, "holds 'n01440764_1.JPEG', expected a tar of tars"),
        (make_twin_classes, "holds 'n01440764.tar' twice"),
        (make_link, "'n01440764.tar': 1 members are no plain files: 'n01440764_1.JPEG'"),
        (lambda root: make_official(root, train={}), f"{TRAIN}: is empty, expected a tar per class"),
        (
            lambda root: make_official(root, train={"n01440764": ["a.JPEG", "b.JPEG", "x/a.JPEG"]}),
            "1 images are there twice: 'a.JPEG'",
        ),
        (
            lambda root: make_official(root, val=["ILSVRC2012_val_00000004.JPEG"]),
            "holds 'ILSVRC2012_val_00000004.JPEG', expected 'ILSVRC2012_val_00000001.JPEG' to 'ILSVRC2012_val_00000003",
        ),
        (
            lambda root: make_official(root, val=["ILSVRC2012_val_00000000.JPEG"]),
            "holds 'ILSVRC2012_val_00000000.JPEG'",
        ),
        (lambda root: make_official(root, val=["other.JPEG"]), "holds 'other.JPEG', expected"),
        (lambda root: make_official(root, truth=[1, 2, 4]), "line 3: '4', expected an id of meta.mat .1 to 3."),
        (lambda root: make_official(root, meta=b"no matlab"), "data/meta.mat: unreadable"),
        (
            lambda root: make_official(root, meta=build_meta(["n01440764", "n01440764"])),
            "2 lowest synsets, 2 ids and 1 wnids",
        ),
        (
            lambda root: make_official(root, train={"n01440764": ["a.JPEG"]}, truth=[3, 3, 2]),
            "1 classes without training images: 'n01443537'",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_told_in_one_line(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_kit_cut_anywhere_is_damaged_or_has_all_its_labels(tmp_path):
    make_official(tmp_path)
    wanted, whole = open_source(tmp_path).splits, (tmp_path / DEVKIT).read_bytes()
    num_refused = 0
    for num_bytes in range(0, len(whole), 16):
        (tmp_path / DEVKIT).write_bytes(whole[:num_bytes])
        try:
            assert open_source(tmp_path).splits == wanted
        except UserError as error:
            num_refused += 1
            assert f"{DEVKIT}: damaged (" in str(error)
    assert num_refused > len(whole) // 32


def test_an_empty_or_worded_ground_truth_is_refused():
    with pytest.raises(UserError, match="truth: is empty"):
        read_truth(b"", "truth", {1: "n01440764"})
    with pytest.raises(UserError, match="truth, line 2: 'one'"):
        read_truth(b"1\none\n", "truth", {1: "n01440764"})


def test_the_builder_and_these_small_archives_are_found_for_the_same_layout(synth_tree, tmp_path):
    assert open_source(build_official(synth_tree, tmp_path / "a")).layout == "official"
    assert open_source(make_official(tmp_path / "b")).layout == "official"
