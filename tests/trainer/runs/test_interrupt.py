"""Ctrl-C in a real terminal: the cursor is back, the settings of the line are as they were, the status is 130. A
terminal that is closed. And a signal that comes while a net is evaluated."""

import errno
import fcntl
import io
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from pipeline.common import console
from tests.trainer import running
from trainer import checkpoint
from trainer.distributed import Ranks
from trainer.safety import StopRequest

BIN, ROOT = Path(sys.executable).parent, Path(__file__).resolve().parents[3]
HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"
NARROW = ["--recipe", "demo", "--set", "width=0.0625", "--global-batch-size", "2", "--epochs", "50"]
KILLED = """
import os, signal, sys
from pipeline.common import console
from trainer.record.progress import Progress, TerminalDisplay
import click

@click.command()
def command():
    child = os.fork()
    if not child:
        TerminalDisplay(Progress(1, 10)).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)

console.run(command)
"""

# alexnet-train, as if the machine had so many GPUs; told to stop in its evaluation of this number, if there is one.
EVALUATING = """
import os, signal
from trainer import train
from trainer.commands import train as cli

evaluate, number = train.evaluate, [0]

def evaluate_and_stop(*words, on_batch, **named):
    def stop():
        if number[0] == int(os.environ.get("AT", "0")) and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        on_batch()
    number[0] += 1
    return evaluate(*words, on_batch=stop, **named)

cli.choose_devices = lambda _: (int(os.environ["NUM_RANKS"]), False)
train.evaluate = evaluate_and_stop
if __name__ == "__main__":
    cli.train()
"""


class Terminal:
    """A process on a terminal of its own, 100 columns wide; what it shows is kept."""

    def __init__(self, words: list[str], cwd: Path, on_hangup: signal.Handlers = signal.SIG_DFL) -> None:
        def own_it() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGHUP, on_hangup)
            # a suite started in the background ignores SIGINT, and so would its children
            signal.signal(signal.SIGINT, signal.default_int_handler)

        self._leader, follower = pty.openpty()
        termios.tcsetwinsize(follower, (30, 100))
        self.before = termios.tcgetattr(self._leader)
        variables = {k: v for k, v in os.environ.items() if not k.startswith("ALEXNET_")}
        self.process = subprocess.Popen(
            words, cwd=cwd, stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
            env={**variables, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
            preexec_fn=own_it,
        )  # fmt: skip
        os.close(follower)
        self.shown = b""

    def read_until(self, text: bytes) -> None:
        """Until `text` has been shown, or until the process has let go of the terminal."""
        while text not in self.shown:
            try:
                self.shown += os.read(self._leader, 65536)
            except OSError as error:  # how Linux says that nobody is left
                assert error.errno == errno.EIO
                return

    def close(self) -> int:
        """As when its window is closed. Returns the status with which the process then ends."""
        os.close(self._leader)
        return self.process.wait(timeout=120)

    def wait(self) -> None:
        self.read_until(b"\0 never shown")
        self.process.wait(timeout=60)
        self.after = termios.tcgetattr(self._leader)


def test_ctrl_c_leaves_the_terminal_as_it_was_and_says_how_to_go_on(ready_shards, tmp_path):
    terminal = Terminal([str(BIN / "alexnet-train"), "--shards", str(ready_shards), "--gpus", "0", *NARROW], tmp_path)
    terminal.read_until(b"images/s")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait()
    assert terminal.process.returncode == 130, terminal.shown.decode()
    assert terminal.shown.count(HIDE_CURSOR) == 1
    assert terminal.shown.rindex(SHOW_CURSOR) > terminal.shown.rindex(HIDE_CURSOR)
    assert terminal.after == terminal.before
    said = terminal.shown.decode()
    assert "epoch 1/50" in said and "total" in said and "waiting for data" in said
    answer = "SIGINT: finishing the step, saving; Ctrl-C again to leave without saving"
    assert said.count(answer) == 1
    assert "go on with: alexnet-train --resume runs/demo" in said.partition(answer)[2].replace("\r\n", " ")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_answered_at_once_however_long_the_step_takes(number, status, capfd):
    said, deadline = "", time.monotonic() + 60
    with StopRequest(Ranks(0, 1, torch.device("cpu"))) as stop:
        os.kill(os.getpid(), number)
        while not said.endswith("\n"):  # nobody has asked `stop` yet
            assert time.monotonic() < deadline
            said += capfd.readouterr().err
        assert stop.status() == status
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert said.startswith(f"{number.name}: finishing the step, saving")
    assert ("Ctrl-C again to leave without saving" in said) == (number == signal.SIGINT)


@pytest.mark.parametrize(("on_hangup", "status"), [(signal.SIG_DFL, 129), (signal.SIG_IGN, 0)], ids=["", "under nohup"])
def test_a_terminal_that_is_closed_ends_training_saved_and_under_nohup_it_goes_on(
    ready_shards, finished, tmp_path, on_hangup, status
):
    words = [str(BIN / "alexnet-train"), "--shards", str(ready_shards), *running.NARROW]
    terminal = Terminal(words, tmp_path, on_hangup)
    terminal.read_until(b"epoch 1/3  top-1 error")
    assert terminal.close() == status
    saved = checkpoint.load(tmp_path / "runs" / "demo" / "checkpoints" / "last.pt")
    assert saved["step"] < 96 if status else saved["step"] == 96
    if status:
        running.run("alexnet-train", "--resume", "demo", cwd=tmp_path)
    running.assert_same_run(tmp_path / "runs" / "demo", finished)


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_in_an_evaluation_does_not_wait_for_its_end_and_loses_nothing(
    ready_shards, finished, tmp_path, num_ranks
):
    program = tmp_path / "train.py"
    program.write_text(EVALUATING)
    words = [sys.executable, program, "--shards", ready_shards, *running.NARROW, "--resume", "auto"]
    variables = {**running.environment(), "PYTHONPATH": str(ROOT), "NUM_RANKS": str(num_ranks)}

    def train(name: str, at: int, status: int) -> str:
        done = subprocess.run(
            [*map(str, words), "--name", name], cwd=tmp_path, env={**variables, "AT": str(at)}, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done.stderr

    if num_ranks > 1:
        train("straight", 0, 0)
        finished = tmp_path / "runs" / "straight"
    for at in (2, 1):  # the second time, in the first evaluation of the resumed run: the same one again
        assert "stopped after step 64 (epoch 2); go on with: " in train("stopped", at, 143)
        evals = [record for record in running.read_records(tmp_path / "runs" / "stopped") if record["kind"] == "eval"]
        assert [record["epoch"] for record in evals] == [1]
    train("stopped", 0, 0)
    running.assert_same_run(tmp_path / "runs" / "stopped", finished)


def test_the_cursor_comes_back_even_if_a_rank_was_killed_while_it_was_hidden(tmp_path):
    terminal = Terminal([sys.executable, "-c", KILLED], tmp_path)
    terminal.wait()
    assert terminal.process.returncode == 0, terminal.shown.decode()
    assert terminal.shown.rindex(SHOW_CURSOR) > terminal.shown.rindex(HIDE_CURSOR)


@pytest.mark.parametrize("name", ["dumb", ""])
def test_a_terminal_without_control_codes_gets_none(name, monkeypatch):
    class Dumb(io.StringIO):
        def isatty(self):
            return True

    screen = Dumb()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", name) if name else monkeypatch.delenv("TERM", raising=False)
    console.show_cursor()
    assert screen.getvalue() == ""
