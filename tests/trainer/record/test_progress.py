"""Training on the screen: control codes on terminals only, a line per epoch that stays, JSON lines, silence."""

import io
import itertools
import json

import pytest

from pipeline.common import console
from trainer.record.progress import Progress, TerminalDisplay, choose_display, spell, spell_duration

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
NUMBERS = {
    "images_per_s": 1212.3,
    "data_wait_fraction": 0.013,
    "loss": 1.93,
    "top1_error": 71.25,
    "top5_error": 20.5,
    "lr": 0.01,
    "time_s": 1.0,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def words():
    yield
    console.set_voice("words")


def attach_terminal(monkeypatch):
    """Called by the test itself: between a fixture and its test pytest puts its own sys.stderr back."""
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return screen


def ticking(seconds):
    ticks = itertools.count(0.0, seconds)
    return lambda: next(ticks)


def train(display, epochs=(1, 2), steps=10, every=1):
    for epoch in epochs:
        for step in range(1, steps + 1):
            display.step(epoch, step)
            if step % every == 0:
                display.record({"step": (epoch - 1) * steps + step, "epoch": epoch, **NUMBERS})
        display.evaluating(epoch)
        display.evaluated(50.0 - epoch)
        display.epoch_done(epoch, f"summary {epoch} [ok] 40.5 %")


def record(step, epoch=1, **changes):
    return {**NUMBERS, "step": step, "epoch": epoch, **changes}


def test_piped_output_is_plain_lines_on_stderr_at_most_one_in_ten_seconds_within_an_epoch(capsys):
    seconds = iter([0.0, 0.0])  # the start, and the first line's clock
    now = {"s": 0.0}
    progress = Progress(2, 10, clock=lambda: next(seconds, now["s"]))
    with choose_display("words", progress) as display:
        for step in range(1, 11):
            now["s"] = 3.0 * step
            display.record(record(step))
        display.epoch_done(1, "validation 40.5 %")
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert "\r" not in err
    lines = err.splitlines()
    assert len(lines) == 3  # at 12 s, at 24 s, and the summary
    assert lines[0] == (
        "epoch 1/2  step 4/10  loss 1.930  top-1 error 71.2 %  top-5 20.5 %  rate 0.01  "
        "1,212 images/s (mean 1,212)  waiting for data 1 %  48 s left"  # 4 of 20 steps in 12 s
    )
    assert lines[2] == "epoch 1/2  validation 40.5 %"


def test_a_quiet_run_says_nothing(capsys):
    console.set_voice("quiet")
    with choose_display("quiet", Progress(2, 10, clock=ticking(30.0))) as display:
        train(display)
    console.note("remark")
    assert capsys.readouterr() == ("", "")
    console.warn("error: x")
    assert capsys.readouterr() == ("", "error: x\n")


def test_json_logs_are_one_object_a_line_on_stdout_and_nothing_on_stderr(capsys):
    console.set_voice("json")
    with choose_display("json", Progress(2, 10, clock=ticking(30.0))) as display:
        train(display, epochs=(1,))
        display.record(record(11, epoch=2, loss=float("nan")))
    console.note("a remark")
    out, err = capsys.readouterr()
    assert err == ""
    lines = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert {line["kind"] for line in lines} == {"progress", "epoch", "note"}
    assert lines[0]["step"] == 1 and lines[0]["epochs"] == 2 and lines[0]["best_error"] is None
    epoch = next(line for line in lines if line["kind"] == "epoch")
    assert epoch["epoch"] == 1 and epoch["best_error"] == 49.0 and epoch["left_s"] > 0
    assert lines[-2]["loss"] is None and lines[-2]["epoch"] == 2  # not a number, which JSON cannot say
    assert lines[-1] == {"kind": "note", "text": "a remark"}


def test_a_terminal_sees_bars_and_keeps_one_line_per_epoch(monkeypatch):
    terminal = attach_terminal(monkeypatch)
    with choose_display("words", Progress(2, 10, clock=ticking(3.0))) as display:
        train(display)
    shown = terminal.getvalue()
    assert HIDE_CURSOR in shown
    assert "images/s" in shown
    assert shown.count("epoch 1/2  summary 1 [ok] 40.5 %") == 1
    assert shown.count("epoch 2/2  summary 2 [ok] 40.5 %") == 1


def test_a_terminal_that_cannot_redraw_gets_plain_lines(monkeypatch):
    terminal = attach_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with choose_display("words", Progress(2, 10, clock=ticking(30.0))) as display:
        train(display, epochs=(1,))
    assert "\x1b" not in terminal.getvalue() and "images/s" in terminal.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_picture_holds_both_bars_and_every_number_and_never_more_than_the_width(width):
    from rich.console import Console

    screen = Console(file=io.StringIO(), width=width, force_terminal=False, record=True)
    display = TerminalDisplay(Progress(90, 10009, clock=ticking(30.0)), screen)
    display.evaluated(43.21)
    gpu = {"gpu_utilisation": 0.97, "gpu_memory_bytes": 5 << 30}
    display.record(record(5000, **gpu))
    display.step(1, 5010)
    screen.print(display._live.renderable)
    lines = screen.export_text().splitlines()
    assert len(lines) == 4 and all(len(line) <= width for line in lines)
    assert lines[0].startswith("epoch 1/90") and "5010/10009 steps" in lines[0]
    assert lines[1].startswith("total") and lines[1].rstrip().endswith("left")
    if width >= 80:
        assert lines[2].startswith("loss 1.930  top-1 error 71.2 %  top-5 20.5 %  val. best 43.21 %  rate 0.01")
        assert lines[3].startswith("1,212 images/s (mean 1,212)  waiting for data 1 %  GPU 97 %, 5.0 GiB")


def test_long_numbers_are_not_cut_on_a_terminal_of_80_columns():
    from rich.console import Console

    screen = Console(file=io.StringIO(), width=80, force_terminal=False, record=True)
    display = TerminalDisplay(Progress(90, 10009, clock=ticking(30.0)), screen)
    display.evaluated(99.9)
    long = {"loss": 6.908, "top1_error": 99.9, "top5_error": 99.5, "lr": 0.0000125, "images_per_s": 85123.4}
    display.record(record(5000, **long, data_wait_fraction=1.0, gpu_utilisation=1.0, gpu_memory_bytes=79 << 30))
    screen.print(display._live.renderable)
    shown = screen.export_text()
    assert "rate 1.25e-05" in shown and "GPU 100 %, 79.0 GiB" in shown and "\N{HORIZONTAL ELLIPSIS}" not in shown


def test_an_epochs_line_that_is_longer_than_the_screen_is_broken_between_words():
    from rich.console import Console

    screen = Console(file=io.StringIO(), width=80, force_terminal=False, record=True)
    summary = (
        "top-1 error 89.50 %, top-5 39.50 %, training loss 2.324, top-1 91.41 %, 47 images/s, waiting for data 4 %"
    )
    TerminalDisplay(Progress(3, 20, clock=ticking(30.0)), screen).epoch_done(1, summary)
    lines = screen.export_text().splitlines()
    assert max(map(len, lines)) <= 80 and " ".join(line.rstrip() for line in lines) == f"epoch 1/3  {summary}"


def test_evaluation_is_shown_where_the_steps_were():
    display = TerminalDisplay(Progress(2, 10, clock=ticking(1.0)))
    display.step(1, 10)
    display.evaluating(1)
    assert display._bars.tasks[0].fields["said"] == "evaluating"
    display.step(2, 1)
    assert display._bars.tasks[0].fields["said"] == "1/10 steps" and display._bars.tasks[1].completed == 11


@pytest.mark.parametrize("reason", [None, KeyboardInterrupt, RuntimeError])
def test_the_cursor_is_back_however_training_ends(monkeypatch, reason):
    terminal = attach_terminal(monkeypatch)

    def run():
        with choose_display("words", Progress(1, 10, clock=ticking(1.0))) as display:
            display.record(record(1))
            if reason:
                raise reason

    if reason:
        with pytest.raises(reason):
            run()
    else:
        run()
    shown = terminal.getvalue()
    assert shown.count(HIDE_CURSOR) == 1
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)


def test_who_ends_the_process_by_force_can_show_the_cursor_while_the_display_lives(monkeypatch):
    terminal = attach_terminal(monkeypatch)
    with choose_display("words", Progress(1, 10, clock=ticking(1.0))):
        assert SHOW_CURSOR not in terminal.getvalue()
        console.show_cursor()
        assert SHOW_CURSOR in terminal.getvalue()


# What it adds up to


def test_errors_are_means_over_the_epoch_so_far_weighted_by_steps():
    progress = Progress(2, 100)
    progress.add(record(20, top1_error=90.0, loss=6.0))
    now = progress.add(record(25, top1_error=80.0, loss=5.0))
    assert now.top1_error == pytest.approx((20 * 90 + 5 * 80) / 25) and now.loss == pytest.approx(5.8)
    assert progress.add(record(120, epoch=2, top1_error=50.0)).top1_error == 50.0


def test_the_mean_rate_is_images_over_time_not_the_mean_of_rates():
    progress = Progress(2, 100)
    progress.add(record(10, images_per_s=100.0))
    now = progress.add(record(20, images_per_s=300.0))
    assert now.images_per_s == 300.0 and now.mean_images_per_s == pytest.approx(
        150.0
    )  # half the images, thrice the time


def test_time_left_is_judged_from_the_steps_of_this_process_alone():
    progress = Progress(10, 10, steps_done=50, clock=ticking(20.0))
    assert spell_duration(progress.add(record(51, epoch=6)).left_s) == "16 min 20 s"  # 49 steps at 20 s
    assert progress.add(record(52, epoch=6)).mean_images_per_s == pytest.approx(NUMBERS["images_per_s"])


def test_the_best_error_is_that_of_the_run_to_resume_until_a_lower_one_comes():
    progress = Progress(10, 10, steps_done=50, best_error=40.0)
    for error, best in ((41.0, 40.0), (float("nan"), 40.0), (39.5, 39.5)):
        progress.add_evaluation(error)
        assert progress.best_error == best
    assert "val. best 39.50 %" in spell(progress.add(record(51, epoch=6)))


def test_durations_have_two_units_at_most():
    assert [spell_duration(s) for s in (0, 59.6, 200, 7500, 471_600)] == [
        *("0 s", "1 min 00 s", "3 min 20 s", "2 h 05 min", "5 d 11 h")
    ]
