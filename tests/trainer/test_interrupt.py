"""Ctrl-C in a real terminal: the cursor is back, the settings of the line are as they were, the status is 130."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from pipeline import console

BIN = Path(sys.executable).parent
HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"
NARROW = ["--recipe", "demo", "--set", "width=0.0625", "--global-batch-size", "2", "--epochs", "50"]
KILLED = """
import os, signal, sys
from pipeline import console
from trainer.display import TerminalDisplay
from trainer.tally import Tally
import click

@click.command()
def command():
    child = os.fork()
    if not child:
        TerminalDisplay(Tally(1, 10)).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)

console.run(command)
"""


class Terminal:
    """A process on a terminal of its own, 100 columns wide; what it shows is kept."""

    def __init__(self, words: list[str], cwd: Path) -> None:
        self._leader, follower = pty.openpty()
        termios.tcsetwinsize(follower, (30, 100))
        self.before = termios.tcgetattr(self._leader)
        variables = {k: v for k, v in os.environ.items() if not k.startswith("ALEXNET_")}
        self.process = subprocess.Popen(
            words, cwd=cwd, stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
            env={**variables, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
            # a suite started in the background ignores SIGINT, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
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
    assert "go on with: alexnet-train --resume runs/demo" in said.replace("\r\n", " ")


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
