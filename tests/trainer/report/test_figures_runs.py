"""Several runs in one picture: named by what differs, drawn as logged, compared at one level of training error."""

import pytest
from PIL import Image

from trainer.report.curves import (
    common_level,
    first_reached,
    name_runs,
    overfitting_figure,
    training_error,
    training_errors_figure,
)
from trainer.report.pictures import write_png


def run(errors, validation=(), steps=20):
    """A run of an epoch for each error, logged after 20 steps and at the epoch's end (47 steps)."""
    records = []
    for epoch, error in enumerate(errors, start=1):
        for at in (steps, 47):
            records.append({"kind": "train", "step": 47 * (epoch - 1) + at, "epoch": epoch, "top1_error": error,
                            "loss": error / 50})  # fmt: skip
        if epoch <= len(validation):
            records.append({"kind": "eval", "crops": "centre", "epoch": epoch, "step": 47 * epoch, "loss": 1.0,
                            "top1_error": validation[epoch - 1]})  # fmt: skip
    return records


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_the_training_error_of_an_epoch_is_the_mean_over_its_steps():
    metrics = run([80.0, 60.0])
    metrics[1]["top1_error"], metrics[3]["top1_error"] = 50.0, None  # the second half of each epoch
    epochs, errors = training_error(metrics)
    assert epochs.tolist() == [1, 2]
    assert errors == pytest.approx([(20 * 80 + 27 * 50) / 47, 60.0])
    assert training_error(metrics, "loss")[1] == pytest.approx([1.6, 1.2])


def test_a_level_is_reached_between_measurements_and_only_from_above():
    epochs, errors = training_error(run([80.0, 40.0, 20.0, 30.0, 10.0]))
    assert first_reached(epochs, errors, 30.0) == pytest.approx(2.5)
    assert first_reached(epochs, errors, 80.0) == 1.0
    assert first_reached(epochs, errors, 5.0) is None


def test_runs_are_compared_at_the_papers_level_where_all_reach_it_else_at_the_lowest_they_share():
    fast, slow = training_error(run([50.0, 20.0])), training_error(run([90.0, 61.0]))
    assert common_level([fast, fast]) == 25.0
    assert common_level([fast, slow]) == 65.0
    assert common_level([training_error(run([100.0])), fast]) == 100.0


def test_relu_and_tanh_are_drawn_as_lines_of_their_own_with_the_epochs_they_took():
    figure = training_errors_figure({"relu": run([60.0, 20.0]), "tanh": run([90.0, 60.0, 25.0])})
    shown = lines(figure.axes[0])
    assert sorted(shown) == ["relu: 25 % after 1.9 epochs", "tanh: 25 % after 3.0 epochs"]
    relu, tanh = (shown[name] for name in sorted(shown))
    assert relu.get_ydata().tolist() == [60.0, 20.0] and tanh.get_ydata().tolist() == [90.0, 60.0, 25.0]
    assert relu.get_color() != tanh.get_color() and relu.get_linestyle() != tanh.get_linestyle()
    assert figure.axes[0].get_ylabel() == "training error (top-1, %)"


def test_runs_are_named_by_the_fields_that_differ_and_else_by_their_names():
    relu, tanh = (
        {"name": "small", "activation": "relu", "lr": 0.01},
        {"name": "small", "activation": "tanh", "lr": 0.01},
    )
    assert name_runs(["a", "b"], [relu, tanh]) == ["relu", "tanh"]
    assert name_runs(["a", "b"], [relu, {**relu, "dropout": 0.5}]) == ["dropout none", "dropout 0.5"]
    assert name_runs(["a", "b"], [relu, relu]) == ["a", "b"]
    assert name_runs(["a", "b", "c"], [relu, relu, tanh]) == ["a", "b", "c"]


def test_training_and_validation_stand_side_by_side_on_one_scale():
    runs = {"dropout 0.5": run([60.0, 40.0], [55.0, 45.0]), "dropout 0": run([60.0, 10.0], [55.0, 50.0])}
    panels = overfitting_figure(runs).axes
    assert [axes.get_title() for axes in panels[:2]] == ["dropout 0.5", "dropout 0"]
    assert panels[0].get_ylim() == panels[1].get_ylim()
    for axes, metrics in zip(panels[:2], runs.values(), strict=True):
        assert lines(axes)["training"].get_ydata().tolist() == training_error(metrics)[1].tolist()
    assert lines(panels[1])["validation"].get_ydata().tolist() == [55.0, 50.0]
    assert lines(panels[3])["training"].get_ydata() == pytest.approx([1.2, 0.2])
    assert panels[2].get_ylabel() == "loss (nats)"


def test_a_later_run_that_is_higher_than_the_first_is_not_cut():
    panels = overfitting_figure({"low": run([40.0, 20.0], [45.0]), "high": run([90.0, 80.0], [95.0])}).axes
    for axes in panels:
        bottom, top = axes.get_ylim()
        assert bottom == 0 and all(max(line.get_ydata()) < top for line in lines(axes).values())


@pytest.mark.parametrize("runs", [{}, {"a": []}, {"a": run([50.0])}, {f"r{n}": run([90.0, 50.0]) for n in range(7)}])
def test_any_number_of_runs_of_any_length_can_be_drawn(tmp_path, runs):
    write_png(training_errors_figure(runs), tmp_path / "one.png")
    write_png(overfitting_figure(runs), tmp_path / "two.png")
    for name in ("one.png", "two.png"):
        with Image.open(tmp_path / name) as picture:
            colors = picture.convert("RGB").getcolors(maxcolors=1 << 24)
        assert colors is not None and len(colors) > 10  # axes, ticks and words at the least: decoded, and not blank


def test_labels_are_drawn_as_they_are_and_never_as_markup(tmp_path):
    label = "$\\frac{a$\n" + "x" * 200
    (shown,) = lines(training_errors_figure({label: run([50.0])}).axes[0])
    assert shown.startswith("$\\frac{a$ xxx") and "…: 50 % after" in shown and max(map(len, shown.splitlines())) < 70
    write_png(training_errors_figure({label: run([50.0])}), tmp_path / "drawn.png")  # the markup would not parse
