"""Kaggle's folders: labels by LOC_val_solution.csv, names by LOC_synset_mapping.txt."""

import shutil
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from tests.layout_builders import build_kaggle
from tools.sources.source import open_source

CLS_LOC = "ILSVRC/Data/CLS-LOC"
HEADER = "ImageId,PredictionString\n"


def make_kaggle(root: Path, solution: str = "", mapping: str | None = None) -> Path:
    for name in ("train/n1/n1_1.JPEG", "train/n2/n2_1.JPEG", "val/v_1.JPEG", "val/v_2.JPEG"):
        path = root / CLS_LOC / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (root / "LOC_val_solution.csv").write_text(solution or f"{HEADER}v_2,n1 1 2 3 4 \nv_1,n2 1 2 3 4 n2 5 6 7 8 \n")
    if mapping is not None:
        (root / "LOC_synset_mapping.txt").write_text(mapping)
    return root


def test_labels_and_names_come_from_the_lists(tmp_path):
    source = open_source(make_kaggle(tmp_path, mapping="n1 one, first\n\nn2 two\nn3 not here\n"))
    assert [(entry.path, entry.label) for entry in source.entries("val")] == [("val/v_1.JPEG", 1), ("val/v_2.JPEG", 0)]
    assert [(c.wnid, c.name) for c in source.classes] == [("n1", "one, first"), ("n2", "two")]
    assert source.read(source.entries("val")[0]) == b"val/v_1.JPEG"


def test_lists_that_windows_has_saved_are_read(tmp_path):
    root = make_kaggle(tmp_path, mapping="n1 one\nn2 two\n")
    for name in ("LOC_val_solution.csv", "LOC_synset_mapping.txt"):
        path = root / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    source = open_source(root)
    assert [entry.label for entry in source.entries("val")] == [1, 0]
    assert [(c.wnid, c.name) for c in source.classes] == [("n1", "one"), ("n2", "two")]


@pytest.mark.parametrize("inside", ["", "ILSVRC", "ILSVRC/Data", CLS_LOC])
def test_it_is_found_from_each_of_its_folders_and_from_the_one_above(synth_tree, tmp_path, inside):
    root = build_kaggle(synth_tree, tmp_path / "imagenet")
    wanted = open_source(root)
    for path in (root / inside, tmp_path):
        source = open_source(path)
        assert source.layout == "kaggle" and source.splits == wanted.splits and source.classes == wanted.classes


def test_a_missing_mapping_and_absent_images_are_remarked(tmp_path):
    make_kaggle(tmp_path, f"{HEADER}v_2,n1 1 2 3 4\nv_1,n2 1 2 3 4\nv_3,n2 1 2 3 4\n")
    (tmp_path / CLS_LOC / "test").mkdir()
    text = "\n".join(open_source(tmp_path).remarks)
    assert "LOC_synset_mapping.txt not found" in text and "val: 1 images of LOC_val_solution.csv are not there" in text
    assert "test/ not used" in text


def test_val_sorted_into_class_folders_needs_no_list(synth_tree, tmp_path):
    shutil.copytree(synth_tree, tmp_path / CLS_LOC)
    source = open_source(tmp_path)
    assert source.layout == "kaggle" and len(source.entries("val")) == 24


def test_what_lies_in_val_beside_its_images_is_named(tmp_path):
    val = make_kaggle(tmp_path) / CLS_LOC / "val"
    (val / "n1").mkdir()
    (val / "n1/v_3.JPEG").write_bytes(b"of a sorting that was broken off")
    (val / "notes.txt").write_text("")
    assert any(
        remark.startswith("val: 2 other files and folders not used: 'n1', 'notes.txt'; images end in")
        for remark in open_source(tmp_path).remarks
    )


def test_ids_of_the_list_are_looked_up_and_never_opened(tmp_path):
    (tmp_path / "secret.JPEG").write_bytes(b"secret")
    rows = "v_1,n1 1 2 3 4\nv_2,n1 1 2 3 4\n../../../../secret,n1 1 2 3 4\n/etc/passwd,n2 1 2 3 4\n"
    source = open_source(make_kaggle(tmp_path / "source", HEADER + rows))
    assert [entry.path for entry in source.entries("val")] == ["val/v_1.JPEG", "val/v_2.JPEG"]


def remove_solution(root: Path) -> None:
    make_kaggle(root)
    (root / "LOC_val_solution.csv").unlink()


def empty_val(root: Path) -> None:
    make_kaggle(root)
    for path in (root / CLS_LOC / "val").iterdir():
        path.unlink()


def make_binary(root: Path) -> None:
    make_kaggle(root)
    (root / "LOC_val_solution.csv").write_bytes(HEADER.encode() + b"\xff\xfe")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (remove_solution, "val: 2 images and no LOC_val_solution.csv there or up to 3 folders above"),
        (empty_val, "val: holds no image, expected"),
        (make_binary, "LOC_val_solution.csv: not a CSV file in UTF-8"),
        (lambda root: make_kaggle(root, "a,b\nc,d\n"), r"begins with \['a', 'b'\], expected ImageId,PredictionString"),
        (lambda root: make_kaggle(root, HEADER + "v_1,n1 1 2 3 4\n"), "no label for 1 of the 2 images .*'v_2.JPEG'"),
        (
            lambda root: make_kaggle(root, HEADER + "v_1,\nv_2,n1\n"),
            "line 2: 'v_1,', expected an image id and one wnid",
        ),
        (lambda root: make_kaggle(root, HEADER + "v_1\n"), "line 2: 'v_1', expected"),
        (
            lambda root: make_kaggle(root, HEADER + "v_1,n1 1 2 3 4 n2 1 2 3 4\n"),
            "line 2: .* expected an image id and one",
        ),
        (lambda root: make_kaggle(root, HEADER + "v_1,n1\nv_1,n2\nv_2,n1\n"), "'v_1' is 'n2' here and 'n1' before"),
        (lambda root: make_kaggle(root, HEADER + "v_1,n1\nv_2,n9\n"), "1 classes without training images: 'n9'"),
        (
            lambda root: make_kaggle(root, mapping="n1 one\nn2\n"),
            "LOC_synset_mapping.txt, line 2: 'n2', expected a wnid",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused_in_one_line(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)
