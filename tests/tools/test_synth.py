"""The synthetic tree: deterministic, odd where ImageNet is odd, and not to be told apart by colour."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.common.errors import UserError
from tools.synth import EXIF_ORIENTATION, EXIF_ROTATED, SHAPES, TEXTURES, draw_colors, form_of, make_tree


def list_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def hash_tree(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in list_files(root)}


def test_totals_are_spread_evenly_and_files_are_named_as_imagenet_names_them(tmp_path):
    make_tree(tmp_path / "t", num_classes=3, num_train=10, num_val=5)
    names = [str(path.relative_to(tmp_path / "t")) for path in list_files(tmp_path / "t")]
    train = [name for name in names if name.startswith("train/")]
    assert [sum(name.startswith(f"train/n0000000{k}/") for name in train) for k in (1, 2, 3)] == [4, 3, 3]
    assert "train/n00000002/n00000002_0.JPEG" in train
    assert sorted(Path(name).name for name in names if name.startswith("val/")) == [
        f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 6)
    ]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_tree(tmp_path / name, num_classes=2, num_train=4, num_val=2, seed=seed)
    a, b, c = (hash_tree(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and not set(a.values()) & set(c.values())


def test_no_picture_is_used_twice(synth_tree):
    hashes = list(hash_tree(synth_tree).values())
    assert len(set(hashes)) == len(hashes) == 88


def test_the_tree_holds_every_kind_of_odd_file(synth_tree):
    kinds = set()
    for path in list_files(synth_tree / "train"):
        assert path.suffix == ".JPEG"
        with Image.open(path) as image:
            assert 200 <= min(image.size) <= 400 and max(image.size) <= 640
            kinds |= {f"{image.format} {image.mode}"}
            kinds |= {"progressive"} if "progressive" in image.info else set()
            kinds |= {"rotated"} if image.getexif().get(EXIF_ORIENTATION) == EXIF_ROTATED else set()
    assert kinds == {"JPEG RGB", "JPEG L", "JPEG CMYK", "PNG RGB", "progressive", "rotated"}


def test_each_class_is_a_shape_and_a_texture_of_its_own_and_the_first_ten_differ_in_both():
    num_classes = len(SHAPES) * len(TEXTURES)
    forms = [form_of(label) for label in range(num_classes)]
    assert len(set(forms)) == num_classes == 100
    assert len({shape for shape, _ in forms[:10]}) == len({texture for _, texture in forms[:10]}) == 10


def test_mean_colour_does_not_give_the_class_away(tmp_path):
    make_tree(tmp_path / "t", num_classes=10, num_train=300, num_val=100)

    def mean_colors(split: str) -> tuple[np.ndarray, np.ndarray]:
        paths = list_files(tmp_path / "t" / split)
        colors = [np.asarray(Image.open(path).convert("RGB")).mean(axis=(0, 1)) for path in paths]
        return np.array(colors), np.array([int(path.parent.name[1:]) - 1 for path in paths])

    colors, labels = mean_colors("train")
    centres = np.array([colors[labels == label].mean(axis=0) for label in range(10)])
    seen, expected = mean_colors("val")
    nearest = ((seen[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest != expected).mean() >= 0.78  # chance is 0.90, with a standard deviation of 0.03


def test_background_and_texture_colours_are_drawn_alike():
    rng = np.random.default_rng(0)
    colors = np.array([draw_colors(rng) for _ in range(2000)])
    assert np.abs(colors.mean(axis=0) - 127).max() < 8  # no place is lighter, darker or more of one hue
    luma = np.sort(colors @ [0.299, 0.587, 0.114], axis=1)
    assert np.diff(luma, axis=1).min() > 45


def test_without_validation_images_there_is_no_val_folder(tmp_path):
    make_tree(tmp_path / "t", num_classes=1, num_train=1, num_val=0)
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["train"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 101}, "101 classes: expected 1 to 100 "),
        ({"num_classes": 10, "num_train": 9}, "9 training images for 10 classes: expected at least one per class"),
    ],
)
def test_impossible_totals_are_refused(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        make_tree(tmp_path / "t", **arguments)
    assert not (tmp_path / "t").exists()


def test_a_destination_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        make_tree(tmp_path, num_classes=1, num_train=1, num_val=0)
    with pytest.raises(UserError, match="is a file"):
        make_tree(tmp_path / "mine.txt", num_classes=1, num_train=1, num_val=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_run_leaves_nothing_that_looks_like_a_tree(tmp_path):
    def interrupt(_amount: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        with pytest.raises(KeyboardInterrupt):
            make_tree(tmp_path / name, num_classes=1, num_train=2, num_val=0, on_progress=interrupt)
    assert list((tmp_path / "there").iterdir()) == [] and not (tmp_path / "new").exists()
