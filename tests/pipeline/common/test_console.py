"""How commands speak: status, streams, one-line errors, and no control codes where nobody sees them."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from pipeline.common import console
from pipeline.common.console import Progress, explain_os_error
from tests.streams import KINDS, STDERR, STDOUT, UNBUFFERED, run_broken

PROGRAM = """
import os, signal, subprocess, sys, time, click
from pipeline.common import console
from pipeline.common.errors import UserError

@click.group(cls=console.Group)
def group(): pass

@group.command()
@click.argument("what")
@click.argument("path", default="")
def do(what, path):
    if what == "well": console.say("result"); console.note("remark"); return
    if what == "user": raise UserError("thing: got 1, expected 2; do that")
    if what == "os": open("/nowhere/file")
    if what == "defect": raise KeyError("a\\nb")
    if what == "json": console.print_json({"a": 1}); return
    if what == "int": os.kill(os.getpid(), signal.SIGINT); time.sleep(30)
    if what == "term":
        try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)
        finally: console.note("cleaned up")
    if what == "status": return 7
    if what == "table": console.print_table("title", ["name"], [["a"]])
    if what == "print": print("a library speaks")
    if what == "peer":
        reader, writer = os.pipe(); os.close(reader); os.write(writer, b"a")
    if what == "file":
        with open(path, "w") as file:
            file.write(f"{file.fileno()} "); file.flush()
            subprocess.run([sys.executable, "-c", "import os; os.fstat(1); os.fstat(2); print('open')"], stdout=file)
    if what == "pipe": [console.say("x" * 1000) for _ in range(1000)]
    if what == "quiet": console.set_voice("quiet")
    if what in ("progress", "quiet"):
        with console.Progress("work", 4, "images") as progress:
            for _ in range(4): progress.advance(1, failures="0")

console.run(group)
"""


def run(*arguments, **options):
    command = [sys.executable, "-c", PROGRAM, *arguments]
    options = {"capture_output": True, "text": True, "check": False, "timeout": 60, **options}
    return subprocess.run(command, preexec_fn=heed_interrupts, **options)


def heed_interrupts():
    """A suite that runs in the background of a shell, and so all it starts, would ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("what", "status", "stdout", "stderr"),
    [
        ("well", 0, "result\n", "remark\n"),
        ("user", 1, "", "error: thing: got 1, expected 2; do that\n"),
        ("os", 1, "", "error: /nowhere/file: No such file or directory\n"),
        ("defect", 1, "", "internal error: KeyError: 'a\\nb'; --debug shows the traceback\n"),
        ("int", 130, "", "\ninterrupted\n"),
        ("term", 143, "", "cleaned up\nterminated\n"),
        ("status", 7, "", ""),
    ],
)
def test_each_outcome_has_its_status_and_its_line(what, status, stdout, stderr):
    done = run("do", what)
    assert (done.returncode, done.stdout, done.stderr) == (status, stdout, stderr)


@pytest.mark.parametrize("arguments", [("do",), ("do", "--nothing", "well"), ("undo",)], ids=" ".join)
def test_wrong_usage_is_status_2_on_stderr(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and "Usage:" in done.stderr and done.stdout == ""


def test_debug_adds_the_traceback_to_the_line():
    done = run("do", "--debug", "user")
    assert done.returncode == 1 and "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("\nerror: thing: got 1, expected 2; do that\n")


def test_json_is_one_object():
    assert json.loads(run("do", "json").stdout) == {"a": 1}


def test_a_reader_that_leaves_is_no_traceback():
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "do", "pipe"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def run_with_broken(stream, kind, unbuffered, *words):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    return run_broken([sys.executable, "-c", PROGRAM, *words], stream, kind, environment)


@pytest.mark.parametrize("unbuffered", UNBUFFERED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("what", "status"), [("well", 0), ("user", 1), ("defect", 1), ("--bad", 2), ("int", 130), ("term", 143)]
)
def test_a_remark_that_cannot_be_written_ends_no_work_and_changes_no_status(what, status, kind, unbuffered):
    said = "result\n" if what == "well" else ""
    assert run_with_broken(STDERR, kind, unbuffered, "do", what) == (status, said)


@pytest.mark.parametrize("unbuffered", UNBUFFERED)
@pytest.mark.parametrize("words", [("do", "well"), ("do", "json"), ("do", "table"), ("do", "print"), ("--help",)])
def test_a_result_that_cannot_be_written_is_one_line_and_status_1(words, unbuffered):
    status, said = run_with_broken(STDOUT, "full", unbuffered, *words)
    lines = [line for line in said.splitlines() if line != "remark"]
    assert lines == ["error: standard output: No space left on device; free some space or choose another folder"]
    assert status == 1


@pytest.mark.parametrize("unbuffered", UNBUFFERED)
@pytest.mark.parametrize("words", [("do", "well"), ("do", "table"), ("do", "print"), ("--help",)])
def test_a_reader_of_results_that_has_left_is_status_1_without_a_word(words, unbuffered):
    status, said = run_with_broken(STDOUT, "left", unbuffered, *words)
    assert (status, said.replace("remark\n", "")) == (1, "")


@pytest.mark.parametrize("unbuffered", UNBUFFERED)
@pytest.mark.parametrize("words", [("do", "well"), ("do", "table"), ("--help",)])
def test_results_for_a_stream_that_was_closed_are_wanted_by_nobody(words, unbuffered):
    status, said = run_with_broken(STDOUT, "closed", unbuffered, *words)
    assert (status, said.replace("remark\n", "")) == (0, "")


def test_a_file_opened_by_a_command_is_none_of_its_streams_though_all_were_closed(tmp_path):
    path = tmp_path / "numbers"

    def close() -> None:
        for stream in range(3):
            os.close(stream)

    command = [sys.executable, "-c", PROGRAM, "do", "file", str(path)]
    assert subprocess.run(command, preexec_fn=close, timeout=60).returncode == 0
    number, of_a_child = path.read_text().split()
    assert int(number) > 2 and of_a_child == "open"


def test_a_broken_pipe_that_is_not_a_stream_is_told():
    done = run("do", "peer")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: Broken pipe\n")


def show(what: str) -> bytes:
    """What the program writes to a terminal."""
    reader, terminal = pty.openpty()
    run("do", what, capture_output=False, stderr=terminal, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal nobody holds any more
        while part := os.read(reader, 4096):
            shown += part
    os.close(reader)
    return shown


def test_progress_draws_a_bar_on_a_terminal_and_no_control_codes_elsewhere():
    assert run("do", "progress").stderr == ""
    shown = show("progress")
    assert b"\x1b[" in shown and b"4/4" in shown and b"failures 0" in shown


def test_who_is_to_be_quiet_draws_no_bar():
    assert show("quiet").replace(console.SHOW_CURSOR.encode(), b"") == b""


def test_work_goes_on_though_the_terminal_of_its_bar_was_closed():
    program = (
        "import os\nfrom pipeline.common.console import Progress, say\n"
        "with Progress('work', 4, 'images') as progress:\n"
        "    os.write(1, b'begun ')\n    os.read(0, 1)\n    progress.advance(4)\n"
        "say('done')\n"
    )
    reader, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    assert os.read(process.stdout.fileno(), 6) == b"begun "
    os.close(reader)
    assert process.communicate(b"!")[0] == b"done\n"


def test_without_a_terminal_progress_is_a_plain_line_now_and_then(capsys, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    with Progress("shard", 1000, "images") as progress:
        for _ in range(10):
            now_s[0] += 4.0
            progress.advance(40, failures="2")
    assert capsys.readouterr().err.splitlines() == [
        "shard: 120/1000 images  10 images/s  failures 2  88 s left",
        "shard: 240/1000 images  10 images/s  failures 2  76 s left",
        "shard: 360/1000 images  10 images/s  failures 2  64 s left",
    ]


def test_a_table_is_plain_text_with_aligned_columns(capsys):
    console.print_table("title", ["name", "n"], [["a", "1"], ["long", "1,000"]])
    text = capsys.readouterr().out
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    assert "\x1b" not in text and lines[0] == "title" and lines[-1].split() == ["long", "1,000"]
    assert len(lines[-1]) == len(lines[-2]) == len(lines[1])  # numbers end where their heading does


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (28, "x: No space left on device; free some space or choose another folder"),
        (13, "x: Permission denied; choose a folder you may write, or change its permissions"),
        (20, "x: Not a directory; a part of that path is a file; choose another folder"),
        (5, "x: Input/output error"),
    ],
)
def test_a_failed_system_call_is_told_with_its_file_and_remedy(number, text):
    assert explain_os_error(OSError(number, os.strerror(number), "x")) == text


def test_a_failed_system_call_without_a_file_is_told_too():
    assert explain_os_error(OSError(5, "Input/output error")) == "Input/output error"
    assert explain_os_error(OSError("odd")) == "odd"


def test_the_statuses_of_signals_are_the_shells():
    assert console.STATUS_SIGINT == 128 + signal.SIGINT and console.STATUS_SIGTERM == 128 + signal.SIGTERM
