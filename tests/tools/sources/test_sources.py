"""Finding the layout; folders: canonical order, what is passed over, one line for each way of being neither."""

import os
import pickle
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from tests.layout_builders import BUILDERS, build_folder, build_official, build_tar, fill
from tools.sources import LAYOUTS
from tools.sources.source import Entry, open_source


def test_classes_are_ranked_by_name_and_train_is_ordered_by_class_and_base_name(tmp_path):
    fill(tmp_path, "train/b/2.JPEG", "train/b/10.JPEG", "train/a/z.jpg", "train/B/1.png", "val/a/1.JPEG")
    source = open_source(tmp_path)
    assert [(c.index, c.wnid) for c in source.classes] == [(0, "B"), (1, "a"), (2, "b")]
    assert source.entries("train") == [
        Entry("train/B/1.png", 0),
        Entry("train/a/z.jpg", 1),
        Entry("train/b/10.JPEG", 2),
        Entry("train/b/2.JPEG", 2),
    ]


def test_val_is_ordered_by_base_name_across_classes_with_ties_by_class(tmp_path):
    fill(tmp_path, "train/a/1.JPEG", "train/b/1.JPEG", "val/b/1.JPEG", "val/b/5.JPEG", "val/a/5.JPEG", "val/a/3.JPEG")
    assert [entry.path for entry in open_source(tmp_path).entries("val")] == [
        "val/b/1.JPEG",
        "val/a/3.JPEG",
        "val/a/5.JPEG",
        "val/b/5.JPEG",
    ]


def test_the_order_in_which_files_were_made_does_not_matter(tmp_path):
    names = [f"{split}/{c}/{n}.JPEG" for split in ("train", "val") for c in "abc" for n in range(5)]
    one = open_source(fill(tmp_path / "one", *names))
    two = open_source(fill(tmp_path / "two", *reversed(names)))
    assert one.splits == two.splits and one.classes == two.classes


def test_reading_gives_the_bytes_also_in_another_process(tmp_path):
    source = open_source(fill(tmp_path, "train/a/1.JPEG"))
    read = pickle.loads(pickle.dumps(source.read))
    assert read(source.entries("train")[0]) == b"train/a/1.JPEG"
    assert len(pickle.dumps(source.read)) < 1000  # the listing does not travel with it


def test_images_are_known_by_their_ending_and_the_rest_is_counted(tmp_path):
    endings = ["JPEG", "jpg", "Png", "GIF", "bmp", "webp", "tif", "TIFF"]
    fill(tmp_path, *(f"train/a/{n}.{ending}" for n, ending in enumerate(endings)))
    fill(tmp_path, "train/a/notes.txt", "train/a/jpeg", "train/readme", "train/a/.hidden.jpg", "train/.cache/x.jpg")
    (tmp_path / "train/a/folder.jpg").mkdir()
    source = open_source(tmp_path)
    assert len(source.entries("train")) == len(endings)
    named = "'a/folder.jpg', 'a/jpeg', 'a/notes.txt', 'readme'"
    assert any(remark.startswith(f"train: 4 other files and folders not used: {named};") for remark in source.remarks)


def test_links_are_followed_and_a_broken_one_is_not_lost_in_silence(tmp_path):
    fill(tmp_path / "elsewhere", "pictures/1.JPEG")
    fill(tmp_path / "source", "train/a/2.JPEG")
    (tmp_path / "source/train/b").symlink_to(tmp_path / "elsewhere/pictures")
    (tmp_path / "source/train/a/gone.JPEG").symlink_to(tmp_path / "nothing")
    (tmp_path / "source/train/a/itself.JPEG").symlink_to("itself.JPEG")
    (tmp_path / "source/train/round").symlink_to("round")
    source = open_source(tmp_path / "source")
    assert [entry.path for entry in source.entries("train")] == [
        "train/a/2.JPEG",
        "train/a/gone.JPEG",
        "train/a/itself.JPEG",
        "train/b/1.JPEG",
    ]
    for broken in source.entries("train")[1:3]:
        with pytest.raises(OSError, match=r"No such file|Too many levels of symbolic links"):
            source.read(broken)
    assert any("1 other files and folders not used: 'round'" in remark for remark in source.remarks)


def test_remarks_tell_of_empty_classes_missing_val_and_unlabelled_test(tmp_path):
    fill(tmp_path, "train/a/1.JPEG", "test/1.JPEG")
    (tmp_path / "train/b").mkdir()
    source = open_source(tmp_path)
    assert [c.wnid for c in source.classes] == ["a"] and source.entries("val") == []
    text = "\n".join(source.remarks)
    assert "1 class folders without an image passed over: 'b'" in text
    assert "no folder val/" in text and "test/ not used" in text


IN_TARS = ["no name tells train or val", "1 members that are neither", "1 labels without an image"]
NO_CLASSES = {"subset": "none.txt"}
LOST = {  # what is there, options, the error that ends it, and the remarks before it
    "a stray file": (("train/a/1.JPEG", "train/LICENSE", "val/b/2.JPEG"), {}, "1 classes without training images",
                     ["train: 1 other files and folders not used: 'LICENSE'"]),
    "an empty split": (("train/a/1.JPEG", "train/LICENSE", "val/README"), {}, "no image in a class folder",
                       ["train: 1 other files and folders not used: 'LICENSE'"]),
    "a folder down": (("x/train/a/1.JPEG", "x/test/1.JPEG"), NO_CLASSES, "1 classes that",
                      ["folder layout found in", "test/ not used"]),
    "kaggle": (("ILSVRC/Data/CLS-LOC/train/a/1.JPEG", "ILSVRC/Data/CLS-LOC/val/README"), {}, "holds no image",
               ["kaggle layout found in", "LOC_synset_mapping.txt not found"]),
    "webdataset": (("x.tar",), NO_CLASSES, "1 classes that",
                   [IN_TARS[0], "classes are called by their numbers", *IN_TARS[1:]]),
    "webdataset, no sample": (("y.tar",), {}, "no sample in", IN_TARS),
}  # fmt: skip
TARS = {"x.tar": ("1.jpg", "1.cls", "2.cls", "odd"), "y.tar": ("2.cls", "odd")}


@pytest.mark.parametrize("kind", LOST)
def test_remarks_are_told_before_the_error_that_follows_them(tmp_path, capsys, kind):
    names, options, error, remarks = LOST[kind]
    fill(tmp_path / "s", *names)
    for name in set(names) & set(TARS):
        (tmp_path / "s" / name).write_bytes(build_tar([(member, b"0") for member in TARS[name]]))
    (tmp_path / "none.txt").write_text("none")
    with pytest.raises(UserError, match=error):
        open_source(tmp_path / "s", **{name: tmp_path / value for name, value in options.items()})
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(remarks), told
    for line, remark in zip(told, remarks, strict=True):
        assert line.startswith(f"{tmp_path / 's'}: {remark}")


def test_a_file_name_that_is_not_utf8_is_listed_and_read(tmp_path):
    folder = os.fsencode(fill(tmp_path, "train/a/1.JPEG") / "train/a")
    Path(os.fsdecode(folder + b"/\xff.JPEG")).write_bytes(b"odd")
    source = open_source(tmp_path)
    assert source.read(source.entries("train")[1]) == b"odd"


def make_missing(root: Path) -> Path:
    return root / "missing"


def make_file(root: Path) -> Path:
    return fill(root, "file") / "file"


def make_empty(root: Path) -> Path:
    return root


def make_other(root: Path) -> Path:
    return fill(root, "ILSVRC/x.JPEG", "LOC_val_solution.csv")


def make_train_a_file(root: Path) -> Path:
    return fill(root, "train")


def make_no_classes(root: Path) -> Path:
    return fill(root, "train/1.JPEG")


def make_empty_classes(root: Path) -> Path:
    return fill(root, "train/a/images/1.JPEG", "train/b/notes.txt")


def make_flat_val(root: Path) -> Path:
    return fill(root, "train/a/1.JPEG", "val/1.JPEG", "val/2.JPEG")


def make_unknown_class(root: Path) -> Path:
    return fill(root, "train/a/1.JPEG", "val/a/1.JPEG", "val/other/1.JPEG")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_missing, "missing: no such folder; expected SOURCE/train/<class>/"),
        (make_file, "file: is a file; give the folder it is in; expected SOURCE/train/<class>/"),
        (make_empty, "is empty and no folder train/; expected"),
        (make_other, "holds 'ILSVRC', 'LOC_val_solution.csv' and no folder train/; expected"),
        (make_train_a_file, "holds 'train' and no folder train/"),
        (make_no_classes, "train: holds no folders, expected one per class"),
        (make_empty_classes, "none of its 2 class folders holds an image; expected files ending in"),
        (make_flat_val, "val: 0 class folders and 2 other files, but no image in a class folder"),
        (make_unknown_class, "val: 1 classes without training images: 'other'; expected the classes of train/"),
    ],
)
def test_anything_else_is_refused_in_one_line(tmp_path, make, message):
    with pytest.raises(UserError) as caught:
        open_source(make(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_long_list_of_names_is_cut(tmp_path):
    with pytest.raises(UserError, match="'f7' and 12 more and no folder train/"):
        open_source(fill(tmp_path, *(f"f{n}" for n in range(0, 10)), *(f"g{n}" for n in range(10))))


# Finding the layout


@pytest.mark.parametrize("layout", BUILDERS)
def test_a_layout_is_found_in_the_only_folder_below(synth_tree, tmp_path, layout):
    BUILDERS[layout](synth_tree, tmp_path / "above/imagenet")
    source = open_source(tmp_path / "above")
    assert source.layout == layout and len(source.entries("train")) == 64
    assert source.remarks[0].startswith(f"{layout} layout found in {tmp_path / 'above/imagenet'}")


def test_two_sources_in_one_folder_need_a_choice(synth_tree, tmp_path):
    build_official(synth_tree, tmp_path)
    build_folder(synth_tree, tmp_path)
    with pytest.raises(UserError, match=r"more than one source: folder in .*, official in .*; .* choose by --layout"):
        open_source(tmp_path)
    assert {name: open_source(tmp_path, layout=name).layout for name in ("folder", "official")} == {
        "folder": "folder",
        "official": "official",
    }


def test_nothing_known_lists_what_was_looked_for_and_found(tmp_path):
    with pytest.raises(UserError) as caught:
        open_source(fill(tmp_path, "readme.txt", "images/1.JPEG"))
    message = str(caught.value)
    assert "holds 'images', 'readme.txt' and no folder train/; expected" in message and "\n" not in message
    for layout in LAYOUTS:
        assert f"({layout})" in message


def test_a_layout_that_is_not_there_is_refused_by_name(tmp_path):
    fill(tmp_path, "train/a/1.JPEG")
    with pytest.raises(UserError, match=r"holds 'train'; expected SOURCE/\*train\*.tar .*\(webdataset\)$"):
        open_source(tmp_path, layout="webdataset")
    with pytest.raises(
        UserError, match="layout 'tfrecord': expected one of folder, kaggle, official, parquet, webdataset"
    ):
        open_source(tmp_path, layout="tfrecord")


def test_a_folder_of_a_split_is_met_with_the_one_that_was_meant(tmp_path):
    fill(tmp_path, "train/a/1.JPEG", "val/a/2.JPEG")
    with pytest.raises(UserError, match=f"did you mean {tmp_path}\\?$"):
        open_source(tmp_path / "val")


def test_other_names_of_validation_folders_are_remarked(tmp_path):
    source = open_source(fill(tmp_path, "train/a/1.JPEG", "valid/a/1.JPEG"))
    assert any("'valid' not used: validation images are looked for in val/" in remark for remark in source.remarks)


def test_a_replaced_file_is_read_anew(tmp_path):
    for content in (b"one", b"other"):
        (tmp_path / "train.tar").unlink(missing_ok=True)
        (tmp_path / "train.tar").write_bytes(build_tar([("a.jpg", content), ("a.cls", b"0")]))
        source = open_source(tmp_path)
        assert source.read(source.entries("train")[0]) == content


def test_folders_of_splits_are_not_taken_for_classes(tmp_path):
    fill(tmp_path, "val/1.JPEG", "test/2.JPEG", "extra/3.JPEG")
    with pytest.raises(UserError, match="holds 'extra', 'test', 'val' and no folder train/"):
        open_source(tmp_path, val_fraction=0.5)
