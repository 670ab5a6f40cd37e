"""Training on the screen: control codes on terminals only, a line per epoch that stays, a sane terminal afterwards."""

import io
import itertools

import pytest

from trainer.display import TrainDisplay, _duration

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
NUMBERS = {"images_per_s": 1212.3, "data_wait_fraction": 0.013, "loss": 1.93, "top1_error": 71.25}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def attach_terminal(monkeypatch):
    """Called by the test itself: between a fixture and its test pytest puts its own sys.stderr back."""
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return screen


def ticking(seconds):
    ticks = itertools.count(0.0, seconds)
    return lambda: next(ticks)


def test_piped_output_is_plain_lines_on_stderr_at_most_one_in_ten_seconds_within_an_epoch(capsys):
    with TrainDisplay(2, 10, clock=ticking(3.0)) as display:
        for step in range(1, 11):
            display.step(1, step, **NUMBERS)
        display.epoch_done(1, "validation 40.5 %")
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert "\r" not in err
    lines = err.splitlines()
    assert len(lines) == 3  # at 12 s, at 24 s, and the summary
    assert lines[0].startswith("epoch 1/2  step 4/10  loss 1.930  top-1 error 71.2 %  1,212 images/s")
    assert "waiting for data 1 %" in lines[0]
    assert lines[0].endswith("48 s left")  # 4 of 20 steps in 12 s
    assert lines[2] == "epoch 1/2  validation 40.5 %"


def test_time_left_is_judged_from_the_steps_of_this_process_alone(capsys):
    with TrainDisplay(10, 10, steps_done=50, clock=ticking(20.0)) as display:
        display.step(6, 1, **NUMBERS)
    assert capsys.readouterr().err.rstrip().endswith("16 min 20 s left")  # 49 steps at 20 s


def test_a_terminal_sees_a_live_line_and_keeps_one_line_per_epoch(monkeypatch):
    terminal = attach_terminal(monkeypatch)
    with TrainDisplay(2, 10, clock=ticking(3.0)) as display:
        for epoch in (1, 2):
            display.step(epoch, 10, **NUMBERS)
            display.epoch_done(epoch, f"summary {epoch} [ok] 40.5 %")
    shown = terminal.getvalue()
    assert HIDE_CURSOR in shown
    assert "images/s" in shown
    assert shown.count("epoch 1/2  summary 1 [ok] 40.5 %") == 1
    assert shown.count("epoch 2/2  summary 2 [ok] 40.5 %") == 1


@pytest.mark.parametrize("reason", [None, KeyboardInterrupt, RuntimeError])
def test_the_cursor_is_back_however_training_ends(monkeypatch, reason):
    terminal = attach_terminal(monkeypatch)

    def train():
        with TrainDisplay(1, 10, clock=ticking(1.0)) as display:
            display.step(1, 1, **NUMBERS)
            if reason:
                raise reason

    if reason:
        with pytest.raises(reason):
            train()
    else:
        train()
    shown = terminal.getvalue()
    assert shown.count(HIDE_CURSOR) == 1
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)


def test_durations_have_two_units_at_most():
    assert [_duration(s) for s in (0, 59.6, 200, 7500, 471_600)] == [
        *("0 s", "1 min 00 s", "3 min 20 s", "2 h 05 min", "5 d 11 h")
    ]
