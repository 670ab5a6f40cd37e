"""The pictures show what they should: the right lines at the right places, every kernel in its cell, the same bytes."""

import math

import numpy as np
import pytest
from PIL import Image

from trainer.report.curves import curves_figure, smooth
from trainer.report.pictures import BLUE, kernel_grid, kernels_figure, write_png


def train(step, epoch, **changed):
    record = {"step": step, "epoch": epoch, "loss": 2.0, "top1_error": 80.0, "top5_error": 30.0, "lr": 0.01}
    return {"kind": "train", **record, "images_per_s": 200.0, "data_wait_fraction": 0.01, "time_s": 1.0, **changed}


def evaluation(step, epoch, crops="centre", **changed):
    record = {"step": step, "epoch": epoch, "crops": crops, "num_images": 200}
    return {"kind": "eval", **record, "loss": 1.5, "top1_error": 60.0, "top5_error": 20.0, **changed}


METRICS = [
    train(50, 1, top1_error=85.0),
    train(100, 1, loss=None, top1_error=75.0),
    evaluation(100, 1, top1_error=70.0),
    {"kind": "event", "name": "lr_cut", "step": 100, "epoch": 1, "text": "rate 0.001 from epoch 2"},
    {"kind": "event", "name": "resumed"},
    train(150, 2),
    train(200, 2),
    evaluation(200, 2, top1_error=55.0, top5_error=15.0),
    evaluation(200, 2, crops="ten", top1_error=50.0),
]


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def points(line):
    return list(zip(*map(list, line.get_data()), strict=True))


def test_curves_show_every_measurement_over_epochs():
    top1, top5, losses, _ = (lines(axes) for axes in curves_figure(METRICS).axes)
    assert points(top1["validation, centre crop"]) == [(1.0, 70.0), (2.0, 55.0)]
    assert points(top5["validation, centre crop"]) == [(1.0, 20.0), (2.0, 15.0)]
    assert points(top1["validation, ten crops"]) == [(2.0, 50.0)]
    assert points(top1["training, as logged"]) == [(0.5, 85.0), (1.0, 75.0), (1.5, 80.0), (2.0, 80.0)]
    assert points(losses["validation, centre crop"]) == [(1.0, 1.5), (2.0, 1.5)]


def test_training_is_drawn_twice_raw_and_faint_then_smooth_and_bold():
    jagged = [train(step, 1, top1_error=50.0 + 20.0 * (step % 2)) for step in range(1, 121)]
    axes = curves_figure(jagged).axes[0]
    raw, smoothed = (line for line in axes.get_lines() if line.get_color() == BLUE)
    assert raw.get_alpha() < 0.5
    assert np.ptp(raw.get_ydata()) == 20.0
    assert smoothed.get_alpha() is None
    assert np.ptp(smoothed.get_ydata()) < 5.0


def test_a_loss_that_was_not_finite_leaves_a_gap():
    raw = curves_figure(METRICS).axes[2].get_lines()[0]
    assert [math.isnan(value) for value in raw.get_ydata()] == [False, True, False, False]


def test_cuts_of_the_learning_rate_are_marked_where_they_happened_and_told_in_the_legend():
    figure = curves_figure(METRICS)
    for axes in figure.axes[:3]:
        assert [1.0, 1.0] in [list(line.get_xdata()) for line in axes.get_lines()]
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "learning rate cut" in told and len(told) == len(set(told)) == 5  # training and validation, two ways each


def test_the_level_of_guessing_is_drawn_and_told_where_the_classes_are_known():
    def guessing(figure):
        return [line.get_ydata()[0] for axes in figure.axes for line in axes.get_lines() if line.get_gid() == "level"]

    assert guessing(curves_figure(METRICS)) == []
    assert guessing(curves_figure(METRICS, 1000)) == pytest.approx([99.9, math.log(1000)])
    said = [text.get_text() for axes in curves_figure(METRICS, 1000).axes for text in axes.texts]
    assert said == ["guessing: 99.9", "guessing: 6.908"]


def test_axes_name_their_quantity_and_unit():
    axes = curves_figure(METRICS).axes
    assert [one.get_title() for one in axes] == ["Top-1 error", "Top-5 error", "Loss", "Learning rate"]
    assert [one.get_ylabel() for one in axes] == ["error (%)", "error (%)", "cross-entropy (nats)", "rate"]
    assert {one.get_xlabel() for one in axes} == {"epochs"}


def test_the_house_style_is_applied():
    errors = curves_figure(METRICS).axes[0]
    assert not errors.spines["top"].get_visible()
    assert errors.yaxis.get_gridlines()[0].get_visible()


@pytest.mark.parametrize(
    "metrics",
    [[], METRICS[:1], METRICS[2:3], METRICS[3:5], [train(0, 0), evaluation(0, 0)]],
    ids=["nothing", "one line", "one evaluation", "events only", "epoch 0"],
)
def test_a_run_of_any_length_can_be_drawn(tmp_path, metrics):
    write_png(curves_figure(metrics, 10), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1680, 1125)


def test_the_same_records_give_the_same_bytes_whatever_the_users_style(tmp_path, monkeypatch):
    import matplotlib as mpl

    write_png(curves_figure(METRICS), tmp_path / "one.png")
    monkeypatch.setitem(mpl.rcParams, "font.size", 30.0)
    monkeypatch.setitem(mpl.rcParams, "savefig.facecolor", "black")
    write_png(curves_figure(METRICS), tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert mpl.rcParams["font.size"] == 30.0


def test_smoothing_keeps_a_constant_ignores_gaps_and_averages_a_window():
    assert smooth([]).shape == (0,)
    assert smooth(np.full(100, 3.0)) == pytest.approx(np.full(100, 3.0))
    gappy = np.full(90, 5.0)
    gappy[::2] = math.nan
    assert smooth(gappy) == pytest.approx(np.full(90, 5.0))
    ramp = np.arange(90.0)
    assert smooth(ramp)[45] == pytest.approx(np.mean(ramp[42:49]))
    assert smooth(ramp)[0] == pytest.approx(np.mean(ramp[:4]))
    assert np.isnan(smooth([math.nan, math.nan])).all()


def solid_kernels(number, size=11):
    """Kernel i is one colour throughout: (1, i / number, -i / number) of its own scale."""
    weight = np.empty((number, 3, size, size))
    for index in range(number):
        weight[index] = np.array([1.0, index / number, -index / number])[:, None, None] * 10.0**-index
    return weight


def solid_colour(index, number):
    return tuple(np.rint(127.5 + 127.5 * np.array([1.0, index / number, -index / number])))


@pytest.mark.parametrize(
    ("number", "towers", "columns"),
    [(96, 2, 16), (96, 1, 16), (6, 1, 6), (6, 2, 3), (48, 2, 12), (1, 1, 1), (17, 1, 9)],
)
def test_every_kernel_stands_in_its_own_cell_in_order(number, towers, columns):
    grids = kernel_grid(solid_kernels(number), towers)
    assert len(grids) == towers
    per_tower = number // towers
    scale, rest = divmod(grids[0].shape[1], 12 * columns - 1)
    assert scale >= 1
    assert rest == 0
    for index in range(number):
        place = index % per_tower
        top, left = place // columns * 12 * scale, place % columns * 12 * scale
        cell = grids[index // per_tower][top : top + 11 * scale, left : left + 11 * scale]
        assert cell.shape == (11 * scale, 11 * scale, 3)
        assert np.ptp(cell, axis=(0, 1)).max() == 0
        assert cell[0, 0] == pytest.approx(solid_colour(index, number), abs=1)  # halves round either way


def test_gaps_and_missing_cells_are_white():
    (grid,) = kernel_grid(solid_kernels(17), 1)
    scale = grid.shape[1] // (12 * 9 - 1)
    assert (grid[11 * scale : 12 * scale] == 255).all()
    assert (grid[:, 11 * scale : 12 * scale] == 255).all()
    assert (grid[12 * scale :, -11 * scale :] == 255).all()  # seventeen kernels in two rows of nine


def test_a_kernel_is_scaled_by_its_own_largest_weight_over_all_three_colours_with_zero_grey():
    weight = np.zeros((2, 3, 2, 2))
    weight[0, 0, 0, 0], weight[0, 1, 0, 1], weight[0, 2, 1, 0] = 4.0, -2.0, 1.0
    (grid,) = kernel_grid(weight, 1)
    scale = grid.shape[0] // 2
    pixels = grid[::scale, ::scale]
    assert pixels[0, 0].tolist() == [255, 128, 128]
    assert pixels[0, 1].tolist() == [128, 64, 128]
    assert pixels[1, 0].tolist() == [128, 128, 159]
    assert (pixels[:, 3:5] == 128).all()  # the second kernel is zero: grey, and no division by it


def test_weights_that_are_not_finite_do_not_spoil_the_others():
    weight = solid_kernels(2)
    weight[0, 0, 0, 0] = math.nan
    weight[1, 0, 0, 0] = math.inf
    (grid,) = kernel_grid(weight, 1)
    assert tuple(grid[-1, 0]) == solid_colour(0, 2)
    assert tuple(grid[-1, -1]) == solid_colour(1, 2)


@pytest.mark.parametrize(
    ("shape", "towers"), [((6, 3, 11), 1), ((6, 4, 11, 11), 1), ((0, 3, 11, 11), 1), ((6, 3, 2, 2), 4)]
)
def test_what_are_no_kernels_is_refused(shape, towers):
    with pytest.raises(ValueError, match="expected"):
        kernel_grid(np.zeros(shape), towers)


@pytest.mark.parametrize(("number", "towers"), [(96, 2), (6, 1), (2, 2)])
def test_the_picture_holds_the_grids_pixel_for_pixel_the_first_tower_on_top(tmp_path, number, towers):
    path = tmp_path / "new folder" / "kernels.png"
    write_png(kernels_figure(solid_kernels(number), towers), path)
    picture = np.asarray(Image.open(path).convert("RGB"))
    tops = []
    for grid in kernel_grid(solid_kernels(number), towers):
        height, width, _ = grid.shape
        starts = [
            top
            for top in range(len(picture) - height + 1)
            if np.array_equal(picture[top : top + height, 24 : 24 + width], grid)
        ]
        assert len(starts) == 1
        tops += starts
    assert tops == sorted(tops)
    assert (picture[:, -20:] == 255).all()  # nothing runs out of the page
    write_png(kernels_figure(solid_kernels(number), towers), tmp_path / "again.png")
    assert path.read_bytes() == (tmp_path / "again.png").read_bytes()
