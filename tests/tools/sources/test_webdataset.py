"""Tars of samples: pairs by key, splits by name, classes by number or wnid, and nothing lost without a word."""

from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.images.imagenet import load_ilsvrc2012
from tests.layout_builders import build_tar
from tools.sources.source import open_source


def make_tars(root: Path, tars: dict[str, list[tuple[str, bytes]]]) -> Path:
    for name, members in tars.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(build_tar(members))
    return root


def pair(key: str, label: int | bytes, ending: str = "jpg") -> list[tuple[str, bytes]]:
    text = label if isinstance(label, bytes) else str(label).encode()
    return [(f"{key}.{ending}", key.encode()), (f"{key}.cls", text)]


def list_entries(source, split: str) -> list[tuple[str, int, bytes]]:
    return [(entry.path, entry.label, source.read(entry)) for entry in source.entries(split)]


def test_pairs_are_joined_by_key_in_any_order_and_ending(tmp_path):
    members = [*pair("a", 1), *pair("d/c", 0, "png")[::-1], *pair("b", b" 00001\n", "JPEG"), *pair("e", 0, "webp")]
    source = open_source(make_tars(tmp_path, {"x-train-0.tar": members}))
    assert list_entries(source, "train") == [
        ("x-train-0.tar/c.png", 0, b"d/c"),
        ("x-train-0.tar/e.webp", 0, b"e"),
        ("x-train-0.tar/a.jpg", 1, b"a"),
        ("x-train-0.tar/b.jpeg", 1, b"b"),
    ]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"),
        ("train_0.tar", "val_0.tar"),
        ("train/00.tar", "val/00.tar"),
        ("TRAIN00.tar", "Valid00.tar"),
    ],
)
def test_splits_are_told_by_words_in_names_or_folders(tmp_path, train, val):
    source = open_source(make_tars(tmp_path, {train: pair("a", 0), val: pair("b", 0), "test-0.tar": pair("t", 0)}))
    assert list_entries(source, "train") == [(f"{train}/a.jpg", 0, b"a")]
    assert list_entries(source, "val") == [(f"{val}/b.jpg", 0, b"b")]
    assert "1 files of test not used" in source.remarks[0]


def test_names_that_tell_nothing_are_training_images_and_a_share_may_be_taken(tmp_path):
    tars = {f"{n:05d}.tar": pair(f"k{n}", 0) for n in range(4)}
    source = open_source(make_tars(tmp_path, tars))
    assert len(source.entries("train")) == 4 and "all 4 files are taken for training" in source.remarks[0]
    assert len(open_source(tmp_path, val_fraction=0.5).entries("val")) == 2


def test_keys_with_wnids_name_the_classes_whatever_the_numbers(tmp_path):
    members = [*pair("n01443537_5", 3), *pair("n01440764_9", 7), *pair("n01440764_1_n01440764", 7)]
    val = pair("ILSVRC2012_val_00000001", 3)
    source = open_source(make_tars(tmp_path, {"train.tar": members, "val.tar": val}))
    assert [(c.wnid, c.name) for c in source.classes] == [
        ("n01440764", "tench, Tinca tinca"),
        ("n01443537", "goldfish, Carassius auratus"),
    ]
    assert [entry.base_name for entry in source.entries("train")] == [
        "n01440764_1.jpg",
        "n01440764_9.jpg",
        "n01443537_5.jpg",
    ]
    assert source.entries("val")[0].label == 1


def test_a_thousand_labels_are_those_of_ilsvrc2012_and_fewer_keep_their_numbers(tmp_path):
    thousand = [member for label in range(1000) for member in pair(f"k{label:04d}", label)]
    source = open_source(make_tars(tmp_path / "a", {"train.tar": thousand}))
    assert [c.wnid for c in source.classes] == list(load_ilsvrc2012())
    assert any("labels 0 to 999 are taken for the sorted wnids" in remark for remark in source.remarks)
    some = [member for label in (2, 10, 9) for member in pair(f"k{label}", label)]
    source = open_source(make_tars(tmp_path / "b", {"train.tar": some}))
    assert [(c.wnid, c.name) for c in source.classes] == [("02", "02"), ("09", "09"), ("10", "10")]


def test_one_number_for_several_wnids_is_a_class_of_its_own_kind(tmp_path):
    members = [*pair("n01443537_5", 0), *pair("n01440764_9", 0), *pair("n01440764_7", 1)]
    source = open_source(make_tars(tmp_path, {"train.tar": members}))
    assert [c.wnid for c in source.classes] == ["0", "1"]
    assert any("1 of class '0' tell n01440764, such as 'train.tar/n01440764_9.jpg'" in text for text in source.remarks)


def test_one_wnid_under_two_numbers_is_two_classes_by_number(tmp_path):
    members = [*pair("n01440764_9", 0), *pair("n01440764_7", 1)]
    source = open_source(make_tars(tmp_path, {"train.tar": members}))
    assert [c.wnid for c in source.classes] == ["0", "1"]
    assert any("contradict the labels: n01440764 is '0' and '1'" in remark for remark in source.remarks)


def test_equal_keys_in_two_tars_are_two_images(tmp_path):
    tars = {
        "train-0.tar": [("x.jpg", b"first"), ("x.cls", b"0")],
        "train-1.tar": [("x.jpg", b"second"), ("x.cls", b"0")],
    }
    assert [data for _, _, data in list_entries(open_source(make_tars(tmp_path, tars)), "train")] == [
        b"first",
        b"second",
    ]


def test_members_of_other_kinds_and_labels_without_images_are_counted(tmp_path):
    members = [*pair("a", 0), ("a.json", b"{}"), ("README", b""), ("lonely.cls", b"0")]
    text = "\n".join(open_source(make_tars(tmp_path, {"train.tar": members})).remarks)
    assert "2 members that are neither images nor labels not used" in text and "1 labels without an image" in text


def test_images_with_a_dot_in_their_key_are_named_and_not_called_other_members(tmp_path):
    """By WebDataset's rule a.mask.png is the field mask.png of the sample a; holiday.2012.JPG was meant as a key."""
    members = [*pair("a", 0), ("sub/a.mask.png", b"mask"), *pair("holiday.2012", 1, "JPG"), ("a.json", b"{}")]
    source = open_source(make_tars(tmp_path, {"train.tar": members}))
    assert [entry.base_name for entry in source.entries("train")] == ["a.jpg"]
    text = "\n".join(source.remarks)
    assert (
        "2 images not used for their names, whose endings begin at the first dot: 'a.mask.png', 'holiday.2012.JPG';"
        in (text)
    )
    assert "2 members that are neither images nor labels not used" in text


def test_keys_are_names_and_never_paths(tmp_path):
    (tmp_path / "outside.jpg").write_bytes(b"secret")
    members = [*pair("../outside", 0), *pair("/etc/passwd", 0)]
    assert list_entries(open_source(make_tars(tmp_path / "source", {"train.tar": members})), "train") == [
        ("train.tar/outside.jpg", 0, b"../outside"),
        ("train.tar/passwd.jpg", 0, b"/etc/passwd"),
    ]


def make_own_shards(root: Path) -> None:
    make_tars(root, {"train-000000.tar": pair("000000000", 0)})
    (root / "manifest.json").write_text("{}")


def make_cut(root: Path) -> None:
    make_tars(root, {"train-0.tar": pair("a", 0), "train-1.tar": pair("b", 0)})
    (root / "train-1.tar").write_bytes((root / "train-1.tar").read_bytes()[:1000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_own_shards, "holds shards made by alexnet-prep, expected full-size images"),
        (make_cut, r"train-1.tar: truncated: 'b.jpg' \(header at byte 0\)|train-1.tar: truncated: ends at byte 1000"),
        (
            lambda root: make_tars(root, {"train.tar": [*pair("a", 0), ("b.jpg", b"b")]}),
            "train.tar: 1 of 2 images have no label: 'b'; expected <key>.cls beside each$",
        ),
        (
            lambda root: make_tars(root, {"n01440764.tar": [("n01440764_1.JPEG", b"b")]}),
            "1 of 1 images have no label: 'n01440764_1'; .* a tar of one class belongs unpacked",
        ),
        (lambda root: make_tars(root, {"train.tar": pair("a", b"cat")}), "label of 'a' is b'cat', expected a number"),
        (lambda root: make_tars(root, {"train.tar": pair("a", b"")}), "label of 'a' is b'', expected a number"),
        (lambda root: make_tars(root, {"train.tar": pair("a", b"-1")}), "label of 'a' is b'-1', expected a number"),
        (lambda root: make_tars(root, {"train.tar": pair("a", b"1" * 50)}), "label of 'a' is b'1+', expected a number"),
        (
            lambda root: make_tars(root, {"train.tar": [*pair("a", 0), ("a.png", b"a")]}),
            "'a' has two images, expected one per key",
        ),
        (lambda root: make_tars(root, {"train.tar": pair("a", 0) * 2}), "'a' has two images, expected one per key"),
        (lambda root: make_tars(root, {"train.tar": [*pair("a", 0), ("a.cls", b"0")]}), "'a' has two labels"),
        (lambda root: make_tars(root, {"train.tar": [("a.txt", b"a")]}), "no sample in 'train.tar'; expected SOURCE"),
        (
            lambda root: make_tars(root, {"train.tar": [*pair("img.0", 0), *pair("img.1", 1)]}),
            "no sample in 'train.tar'; 2 images not used .*: 'img.0.jpg', 'img.1.jpg'; write the tars again",
        ),
        (lambda root: make_tars(root, {"val.tar": pair("a", 0)}), "holds 'val.tar', none for training"),
        (
            lambda root: make_tars(root, {"train.tar": pair("a", 0), "more.tar": pair("b", 0)}),
            "'more.tar' tell neither train nor val by their names",
        ),
        (
            lambda root: make_tars(root, {"train.tar": pair("a", 0), "val.tar": pair("b", 5)}),
            "1 classes without training images: '5'",
        ),
    ],
)
def test_what_would_be_lost_or_doubled_is_refused_in_one_line(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)
