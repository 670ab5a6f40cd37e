"""What holds for every layout: --val-fraction, --subset, names of classes."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from pipeline.images.imagenet import load_ilsvrc2012
from tests.layout_builders import BUILDERS, fill
from tools.sources.listing import Entry, Listing, put_in_order, split_stem, strip_wnid, take_share
from tools.sources.numbered import find_missing, name_labels
from tools.sources.source import open_source


def make_listing(sizes: list[int], seed: int = 0) -> Listing:
    """Classes of so many images, in an order of `seed`'s."""
    names = [f"class {number}" for number in range(len(sizes))]
    train = [Entry(f"train/{names[label]}/{n}.JPEG", label) for label, size in enumerate(sizes) for n in range(size)]
    random.Random(seed).shuffle(train)
    labels = {name: label for label, name in enumerate(names)}
    return Listing("folder", Path("root"), lambda entry: b"", train, labels=labels)


# --val-fraction


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    fraction=st.floats(0.02, 0.98),
    seed=st.integers(0, 3),
)
def test_a_share_of_each_class_is_taken_whatever_the_order_of_the_listing(sizes, fraction, seed):
    shares = []
    for order in (0, 1):
        listing = make_listing(sizes, order)
        try:
            take_share(listing, fraction, seed)
        except UserError as error:
            assert max(sizes) * fraction < 0.5 or max(sizes) == 1
            assert "takes no image of any class" in str(error)
            return
        _, train, val = put_in_order(listing)
        shares.append((train, val))
    assert shares[0] == shares[1]
    train, val = shares[0]
    assert sorted(entry.path for entry in train + val) == sorted(entry.path for entry in make_listing(sizes).train)
    for label, size in enumerate(sizes):
        taken = sum(entry.label == label for entry in val)
        assert taken <= size - 1 and (abs(taken - fraction * size) <= 0.5 + 1e-9 or taken == size - 1)


def test_another_seed_takes_other_images_and_one_image_more_changes_few(tmp_path):
    def take(sizes: list[int], seed: int) -> set[str]:
        listing = make_listing(sizes)
        take_share(listing, 0.25, seed)
        return {entry.path for entry in listing.val}

    assert take([100], 0) != take([100], 1) and len(take([100], 0)) == 25
    assert len(take([100], 0) - take([101], 0)) <= 1


def test_class_folders_alone_need_the_flag_and_a_val_folder_forbids_it(tmp_path):
    alone = fill(tmp_path / "alone", *(f"{c}/{n}.JPEG" for c in ("cat", "dog") for n in range(4)))
    with pytest.raises(UserError, match=r"class folders and no folder train/.*; give --val-fraction 0.05"):
        open_source(alone)
    source = open_source(alone, val_fraction=0.25)
    assert [len(source.entries(split)) for split in ("train", "val")] == [6, 2]
    assert {entry.label for entry in source.entries("val")} == {0, 1}
    assert source.read(source.entries("val")[0]) == source.entries("val")[0].path.encode()
    both = fill(tmp_path / "both", "train/a/1.JPEG", "train/a/2.JPEG", "val/a/3.JPEG")
    with pytest.raises(UserError, match="has 1 validation images, and --val-fraction takes more"):
        open_source(both, val_fraction=0.5)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_is_between_0_and_1(tmp_path, fraction):
    with pytest.raises(UserError, match=r"--val-fraction .*: expected a number between 0 and 1"):
        open_source(fill(tmp_path, "train/a/1.JPEG"), val_fraction=fraction)


def test_a_share_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--val-fraction 0.1: takes no image of any class, the largest has 4"):
        open_source(fill(tmp_path, *(f"train/a/{n}.JPEG" for n in range(4))), val_fraction=0.1)


# --subset


@pytest.mark.parametrize("layout", BUILDERS)
def test_a_subset_keeps_its_classes_only_in_every_layout(synth_tree, tmp_path, layout):
    root = BUILDERS[layout](synth_tree, tmp_path / "source")
    whole = open_source(root)
    wnids = [c.wnid for c in whole.classes]
    names = tmp_path / "names.txt"
    names.write_text(f"# two of four\n\n{wnids[3]}  # the last\n{wnids[1]} its name\n{wnids[1]}\n")
    source = open_source(root, subset=names)
    assert [c.wnid for c in source.classes] == [wnids[1], wnids[3]]
    for split in ("train", "val"):
        kept = [entry for entry in whole.entries(split) if entry.label in (1, 3)]
        assert [(entry.path, entry.label) for entry in source.entries(split)] == [
            (entry.path, {1: 0, 3: 1}[entry.label]) for entry in kept
        ]
    assert any(f"2 classes of {names}; 44 images of other classes not used" in remark for remark in source.remarks)


def test_a_subset_that_windows_has_saved_is_read(tmp_path):
    tree = fill(tmp_path / "tree", "train/a/1.JPEG", "train/b/1.JPEG")
    (tmp_path / "names").write_bytes(b"\xef\xbb\xbfb\r\n")
    assert [c.wnid for c in open_source(tree, subset=tmp_path / "names").classes] == ["b"]


def test_a_class_name_with_spaces_or_a_hash_may_be_in_a_subset(tmp_path):
    tree = fill(tmp_path / "tree", "train/tench fish/1.JPEG", "train/tench/1.JPEG", "train/c#/1.JPEG")
    (tmp_path / "names").write_text("tench fish\nc#\n")
    assert [c.wnid for c in open_source(tree, subset=tmp_path / "names").classes] == ["c#", "tench fish"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"a\nn1\nn2 thing\n",
            r"names: 2 classes that .*tree does not have: 'n1', 'n2 thing'; expected names such as 'a'",
        ),
        (b"# nothing\n\n", "names: names no class"),
        (b"\xff\xfe", "names: not UTF-8 text"),
        (None, "names: No such file or directory; expected a text file of wnids"),
        (b"only", "no training image of these classes"),
    ],
)
def test_a_subset_that_does_not_fit_is_refused_in_one_line(tmp_path, content, message):
    tree = fill(tmp_path / "tree", "train/a/1.JPEG", "train/b/1.JPEG", "val/a/1.JPEG", "val/only/1.JPEG")
    if content is not None:
        (tmp_path / "names").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source(tree, subset=tmp_path / "names")
    assert "\n" not in str(caught.value)


def test_a_subset_knows_a_class_however_its_accents_are_written(tmp_path):
    tree = fill(tmp_path / "tree", "train/e\u0301tude/1.JPEG", "train/b/1.JPEG")
    (tmp_path / "names").write_text("\u00e9tude\n", encoding="utf-8")
    assert [c.wnid for c in open_source(tree, subset=tmp_path / "names").classes] == ["e\u0301tude"]


# What names tell besides


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], ["train-00001-of-00003"]),
        (["train-1-of-3", "train-3-of-3"], ["train-2-of-3"]),
        (["train-0-of-2", "train-1-of-2", "val-1-of-2"], ["val-0-of-2"]),
        (["data2/train-00000-of-00002-8e07edf9.parquet"], ["data2/train-00001-of-00002"]),
        (["train-000000.tar", "train-000002.tar", "val-000000.tar"], ["train-000001"]),
        (
            ["train/0.tar", "train/9.tar", "train/11.tar", "val/1.tar"],
            [f"train/{n}" for n in (*range(1, 9), 10)] + ["val/0"],
        ),
        (["train-1.tar", "train-2.tar"], []),
        (["train-101.tar", "train-102.tar", "train-104.tar"], ["train-103"]),
        (["n01440764.tar", "n01443537.tar", "n01484850.tar"], []),
        (["train-2012.tar", "train-2015.tar", "train-x.tar"], []),
        (["train-0.parquet", "train-2.tar"], []),
    ],
)
def test_files_that_the_numbers_of_others_tell_of_are_found(there, missing):
    assert find_missing(there) == missing


def test_an_absurd_total_is_no_work():
    assert find_missing(["train-00000-of-99999999999.tar"])[0] == "train-00001-of-99999999999"


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_a_set_with_a_missing_file_is_refused_and_read_where_that_is_allowed(synth_tree, tmp_path, layout):
    root = BUILDERS[layout](synth_tree, tmp_path, num_files=3)
    gone = next(path for path in sorted(root.rglob("*train*")) if "0001" in path.name)
    gone.unlink()
    name = str(gone.relative_to(root).with_suffix(""))
    with pytest.raises(UserError, match=f"files are missing by the numbers .*'{name}'; .* --allow-missing"):
        open_source(root)
    source = open_source(root, allow_missing=True)
    assert 0 < len(source.entries("train")) < 64 and any(name in remark for remark in source.remarks)


def test_an_image_whose_name_tells_another_class_than_its_folder_is_told(tmp_path):
    names = ("n01440764/n01440764_1", "n01440764/n01443537_2", "n01440764/n01443537_3", "cat/n01443537_9")
    tree = fill(tmp_path, *(f"train/{name}.JPEG" for name in names), "val/n01440764/ILSVRC2012_val_00000001.JPEG")
    [remark] = open_source(tree).remarks
    assert "contradict the labels: 2 of class 'n01440764' tell n01443537, such as 'train/n01440764/n01443537_" in remark


def test_classes_that_differ_in_how_accents_are_written_alone_are_refused(tmp_path):
    tree = fill(tmp_path, "train/e\u0301tude/1.JPEG", "val/\u00e9tude/2.JPEG")
    with pytest.raises(UserError, match=r"the classes 'e\\u0301tude' and '\\xe9tude' look alike"):
        open_source(tree)


# Names


def test_the_table_has_the_1000_wnids_in_sorted_order_with_names():
    table = load_ilsvrc2012()
    assert len(table) == 1000 and list(table) == sorted(table)
    assert all(wnid[0] == "n" and wnid[1:].isdigit() and len(wnid) == 9 and name for wnid, name in table.items())
    places = {
        0: "tench, Tinca tinca",
        1: "goldfish, Carassius auratus",
        388: "giant panda, panda",
        999: "toilet tissue",
    }
    assert all(list(table.values())[place].startswith(name) for place, name in places.items())


def test_the_table_knows_the_classes_of_the_real_images(real_images):
    wnids = {path.name for path in (real_images / "imagenet-sample/train").iterdir()}
    assert len(wnids) == 400 and wnids <= load_ilsvrc2012().keys()


def test_known_wnids_have_their_names_and_others_their_own(tmp_path):
    source = open_source(fill(tmp_path, "train/n01440764/1.JPEG", "train/n00000001/1.JPEG", "train/shoe/1.JPEG"))
    assert [c.name for c in source.classes] == ["n00000001", "tench, Tinca tinca", "shoe"]


@pytest.mark.parametrize(
    ("base_name", "wanted"),
    [
        ("n01440764_10026_n01440764.JPEG", "n01440764_10026.JPEG"),
        ("ILSVRC2012_val_00000293_n02110627.JPEG", "ILSVRC2012_val_00000293.JPEG"),
        ("n01440764_10026_n01440764", "n01440764_10026"),
        ("n01440764_10026.JPEG", "n01440764_10026.JPEG"),
        ("n01440764.JPEG", "n01440764.JPEG"),
    ],
)
def test_the_wnid_behind_a_name_is_cut_off(base_name, wanted):
    assert strip_wnid(base_name) == wanted


def test_the_ending_does_not_decide_the_order():
    assert (
        split_stem("a.b.jpg") == ("a.b", ".jpg") and split_stem(".jpg") == (".jpg", "") and split_stem("a") == ("a", "")
    )
    for ending in (".JPEG", ".jpg", ""):
        listing = make_listing([0])
        # "-" sorts before ".", "_" after it: with the endings, the order would depend on them.
        listing.train = [Entry(f"train/{name}{ending}", 0) for name in ("a_1", "a", "a-1")]
        _, train, _ = put_in_order(listing)
        assert [split_stem(entry.base_name)[0] for entry in train] == ["a", "a-1", "a_1"]


def test_titles_of_another_thousand_classes_are_not_taken_for_ilsvrc2012s():
    titles = {label: f"thing {label:04d}" for label in range(1000)}
    assert name_labels({5}, {}, titles)[0][5] == "thing 0005"
    assert name_labels({5}, {}, dict(enumerate(load_ilsvrc2012().values())))[0][5] == list(load_ilsvrc2012())[5]
