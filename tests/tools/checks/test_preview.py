"""`alexnet-prep preview`: tiles against oracle.py from the stored pixels and the draws, and the sheet around them."""

import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.shards import ShardSet
from tests import oracle
from tests.tools.checks.forging import read_members
from tools.checks import preview as contactsheet
from tools.checks.preview import (
    AXES,
    FRAMES,
    choose_azimuth_deg,
    copy_samples,
    draw_samples,
    sheet_figure,
    swatches,
    to_8_bit,
    write_sheet,
)

TOLERANCE_GREY = 1e-3  # of a tile: float32, with the mean subtracted and added back
NUM_SAMPLES, NUM_DRAWS = 5, 4


@pytest.fixture(scope="module")
def shards(ready_shards) -> ShardSet:
    return ShardSet.open(ready_shards)


@pytest.fixture(scope="module")
def colors(shards) -> ColorStats:
    return ColorStats.load(shards.root, shards.fingerprint)


@pytest.fixture(scope="module")
def samples(shards, colors):
    return draw_samples(shards, colors, num_samples=NUM_SAMPLES, num_draws=NUM_DRAWS, seed=3)


@pytest.fixture(scope="module")
def figure(samples, colors) -> Figure:
    return sheet_figure(samples, colors)


# What is shown


def test_stored_tiles_are_the_images_of_the_shards(samples, shards):
    stored = oracle.read_samples(shards.tars("train"))
    assert len({sample.key for sample in samples}) == NUM_SAMPLES
    for sample in samples:
        pixels, label = stored[sample.key]
        assert np.array_equal(sample.stored, pixels) and sample.label == label
        assert sample.class_name == shards.manifest.classes[label].name


def test_a_tile_is_the_stored_image_cropped_mirrored_and_shifted_as_drawn(samples, shards):
    stored = oracle.read_samples(shards.tars("train"))
    for sample in samples:
        assert len(sample.views) == NUM_DRAWS
        for view in sample.views:
            expected = oracle.augment(stored[sample.key][0], view.offset, view.flip, view.shift.astype(np.float64))
            np.testing.assert_allclose(view.pixels, expected.transpose(1, 2, 0), rtol=0, atol=TOLERANCE_GREY)


def test_draws_differ_and_follow_from_the_seed(samples, shards, colors):
    draws = [(view.offset, view.flip, *view.shift.tolist()) for sample in samples for view in sample.views]
    assert len(set(draws)) == NUM_SAMPLES * NUM_DRAWS
    assert {view.flip for sample in samples for view in sample.views} == {True, False}
    again = draw_samples(shards, colors, num_samples=NUM_SAMPLES, num_draws=NUM_DRAWS, seed=3)
    for sample, other in zip(samples, again, strict=True):
        assert sample.key == other.key
        assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(sample.views, other.views, strict=True))
    others = draw_samples(shards, colors, num_samples=NUM_SAMPLES, num_draws=1, seed=4)
    assert [sample.key for sample in others] != [sample.key for sample in samples]
    assert draws[0] not in [(v.offset, v.flip, *v.shift.tolist()) for sample in others for v in sample.views]


def test_validation_images_can_be_shown(shards, colors):
    stored = oracle.read_samples(shards.tars("val"))
    for sample in draw_samples(shards, colors, num_samples=24, num_draws=1, split="val"):
        assert np.array_equal(sample.stored, stored[sample.key][0])


@pytest.mark.parametrize("positions", [[0], [63], [15, 16], [40, 3, 17], list(range(64))])
def test_the_copied_shard_holds_these_samples_byte_by_byte(shards, tmp_path, positions):
    copied = copy_samples(shards, "train", positions, tmp_path)
    members = [member for tar in shards.tars("train") for member in read_members(tar)]
    wanted = [member for position in sorted(positions) for member in members[2 * position : 2 * position + 2]]
    (tar,) = copied.tars("train")
    assert read_members(tar) == wanted
    header, *rows = tar.with_suffix(".idx").read_text().splitlines()
    data = tar.read_bytes()
    assert header == f"v1.2 {len(positions)}" and len(rows) == len(positions)
    found = [row.split() for row in rows]
    pairs = [(name, data[int(at) : int(at) + int(size)]) for row in found for _, at, size, name in (row[:4], row[4:])]
    assert pairs == wanted
    assert copied.num_samples("train") == len(positions)


def test_more_samples_than_there_are_is_an_error(shards, colors):
    with pytest.raises(UserError, match="64 train images, 65 asked for; set --samples lower"):
        draw_samples(shards, colors, num_samples=65)


LATE = "jpg 512 99 000000000.jpg cls 50000000 5 000000000.cls"


@pytest.mark.parametrize(
    ("row", "words"),
    [("", "has the row ''"), ("jpg 512 x 0.jpg cls 1 5 0.cls", "has the row"), (LATE, "says 000000000")],
)
def test_an_index_that_does_not_fit_is_an_error_that_names_verify(shards, colors, tmp_path, row, words):
    copy = ShardSet.open(shutil.copytree(shards.root, tmp_path / "shards"))
    path = copy.indices("train")[1]
    path.write_text("\n".join(["v1.2 16", *[row] * 16, ""]))
    with pytest.raises(UserError, match=rf"train-000001.idx: damaged index \({words}.*alexnet-prep verify"):
        draw_samples(copy, colors, num_samples=64)


# The sheet


def list_texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def list_pictures(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def test_each_row_is_the_stored_image_and_its_views(figure, samples):
    pictures = list_pictures(figure)
    for number, sample in enumerate(samples):
        row = pictures[number * (1 + NUM_DRAWS) : (number + 1) * (1 + NUM_DRAWS)]
        assert np.array_equal(row[0], sample.stored)
        for picture, view in zip(row[1:], sample.views, strict=True):
            assert np.array_equal(picture, to_8_bit(view.pixels))


def test_what_was_drawn_stands_below_each_view(figure, samples):
    texts = list_texts(figure)
    for sample in samples:
        assert any(text.startswith(f"{sample.key}\n") for text in texts)
        for view in sample.views:
            y, x = view.offset
            signed = [f"{name}{value:+.1f}".replace("-", "−") for name, value in zip("RGB", view.shift, strict=True)]
            assert f"({y}, {x}){'  mirrored' if view.flip else ''}\n{' '.join(signed)}" in texts


def test_brackets_in_the_stored_image_are_the_corners_of_the_crop(figure, samples):
    axes = figure.axes[0]
    for view, (colour, _) in zip(samples[0].views, FRAMES, strict=True):
        corners = {(line.get_xdata()[1], line.get_ydata()[1]) for line in axes.lines if line.get_color() == colour}
        y, x = view.offset
        assert corners == {(x + dx - 0.5, y + dy - 0.5) for dx in (0, 224) for dy in (0, 224)}


def test_axes_of_the_cloud_are_two_standard_deviations_along_the_eigenvectors(figure, colors):
    (cloud,) = [axes for axes in figure.axes if axes.name == "3d"]
    for axis, (colour, _, _) in enumerate(AXES):
        (line,) = [line for line in cloud.lines if line.get_color() == colour]
        ends = np.array(line.get_data_3d()).T
        reach = 2 * np.sqrt(colors.eigenvalues[axis]) * colors.eigenvectors[:, axis]
        np.testing.assert_allclose(ends, [colors.mean - reach, colors.mean + reach], atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_no_axis_is_seen_end_on(seed):
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    round_, up = np.radians(choose_azimuth_deg(basis)), np.radians(22)
    eye = np.array([np.cos(up) * np.cos(round_), np.cos(up) * np.sin(round_), np.sin(up)])
    assert max(np.degrees(np.arccos(np.abs(eye @ basis)))) > 50
    assert min(np.degrees(np.arccos(np.abs(eye @ basis)))) > 20  # 0: a point


def test_swatches_go_from_two_standard_deviations_below_the_mean_to_two_above(colors):
    for axis in range(3):
        row = swatches(colors, axis)
        np.testing.assert_allclose(row[4], colors.mean)
        step = np.sqrt(colors.eigenvalues[axis]) * colors.eigenvectors[:, axis]
        np.testing.assert_allclose(row, np.clip([colors.mean + half / 2 * step for half in range(-4, 5)], 0, 255))


def test_grey_levels_beyond_what_can_be_shown_are_cut_off_and_not_wrapped():
    assert to_8_bit(np.array([-3.2, 0.4, 254.6, 259.0], np.float32)).tolist() == [0, 0, 255, 255]


def test_styles_differ_by_line_as_well_as_by_colour():
    assert len({str(line) for _, line in FRAMES}) == len({colour for colour, _ in FRAMES}) == len(FRAMES) >= NUM_DRAWS
    assert len({line for _, line, _ in AXES}) == len({marker for _, _, marker in AXES}) == 3


@pytest.mark.parametrize("num_samples", [1, 8])
def test_nothing_lies_outside_the_page_or_over_another_thing(shards, colors, num_samples):
    figure = sheet_figure(draw_samples(shards, colors, num_samples=num_samples), colors)
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    flat = [box for box, axes in zip(boxes, figure.axes, strict=True) if axes.name != "3d"]
    overlaps = [a for n, a in enumerate(flat) for b in flat[:n] if a.overlaps(b)]
    assert not overlaps
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    page = figure.bbox
    for text in figure.texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= page.width and box.y0 >= 0 and box.y1 <= page.height


def test_the_same_samples_give_the_same_bytes_at_150_dots_per_inch(samples, colors, tmp_path, monkeypatch):
    write_sheet(samples, colors, tmp_path / "a.png")
    monkeypatch.setitem(mpl.rcParams, "axes.facecolor", "red")  # somebody's own style
    monkeypatch.setitem(mpl.rcParams, "axes.labelsize", 30.0)
    write_sheet(samples, colors, tmp_path / "below/b.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "below/b.png").read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG" and image.width > 1500
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "b.png", "below"]
    assert contactsheet._DPI == 150


@pytest.mark.parametrize("name", ["$x_{$", "日本", "<b>\\frac", "caf\udce9"], ids=ascii)
def test_a_class_may_be_called_anything_and_nothing_is_said_of_it(samples, colors, tmp_path, recwarn, name):
    write_sheet([replace(samples[0], class_name=name)], colors, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").is_file() and not list(recwarn)


def test_the_figure_of_the_readme_is_small_and_made_of_this(pytestconfig):
    path = Path(pytestconfig.rootpath) / "docs/images/preview.png"
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1200
    assert path.stat().st_size < 400_000


def test_reading_needs_no_more_of_a_tar_than_the_samples(shards, colors, tmp_path):
    """A tar whose other samples are overwritten gives the same preview of these."""
    copy = ShardSet.open(shutil.copytree(shards.root, tmp_path / "shards"))
    chosen = {sample.key for sample in draw_samples(shards, colors, num_samples=2, num_draws=1)}
    for tar in copy.tars("train"):
        with tarfile.open(tar) as opened:
            others = [(m.offset_data, m.size) for m in opened if m.name[:9] not in chosen]
        with tar.open("r+b") as file:
            for offset, size in others:
                file.seek(offset)
                file.write(bytes(size))
    assert {s.key for s in draw_samples(copy, colors, num_samples=2, num_draws=1)} == chosen
