"""How every command speaks: results on stdout, progress on stderr, one-line errors, exit codes.

Commands raise, and `run` alone turns exceptions into words and a status (0 done, 1 failed, 2 wrong usage, 130 after
SIGINT, 143 after SIGTERM). rich and everything heavy is imported on use, so that `--help` stays instant.
"""

import contextlib
import errno
import io
import json
import math
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from pipeline.common.errors import UserError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STATUS_FAILED, STATUS_USAGE, STATUS_SIGINT, STATUS_SIGTERM = 1, 2, 130, 143
PLAIN_INTERVAL_S = 10.0
SHOW_CURSOR = "\x1b[?25h"
STDOUT_NAME = "standard output"
DEFAULT_SHARDS, SHARDS_VARIABLE = "shards", "ALEXNET_SHARDS"

# How a command speaks of its work: in words on stderr, not at all, or as a JSON object a line on stdout.
Voice = Literal["words", "quiet", "json"]

_debug = False
_voice: Voice = "words"
_unread: OSError | None = None  # why stdout takes no JSON lines any more


class Terminated(BaseException):
    """SIGTERM, raised where it arrives so that clean-up code runs."""


def _set_debug(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    global _debug
    _debug = _debug or value


class Command(click.Command):
    """A click command that also takes --debug."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As click's own."""
        super().__init__(*args, **kwargs)
        words: dict[str, Any] = {"callback": _set_debug, "help": "Show the traceback of an error."}
        self.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, **words))

    def invoke(self, ctx: click.Context) -> Any:
        """As click's own, which leaves without a word at any broken pipe: only at that of stdout."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if error.filename == STDOUT_NAME:
                raise
            raise UserError(explain_os_error(error)) from error


class Group(click.Group):
    """A group whose commands take --debug too."""

    command_class = Command


class _Results(io.FileIO):
    """stdout, named in its errors."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STDOUT_NAME
            raise


class _Remarks(io.FileIO):
    """stderr: what it cannot take is lost in silence."""

    def write(self, data: "ReadableBuffer", /) -> int:
        with contextlib.suppress(OSError):
            return super().write(data) or memoryview(data).nbytes  # None: full, and told not to wait
        return memoryview(data).nbytes


def take_streams() -> None:
    """Prepare this process's streams: a failed write to stderr is no error, and a stream that was closed before the
    process began is /dev/null. Else its number would be that of the next file opened, and a library's words go there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode)  # noqa: SIM115 - for as long as the process lives
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _rebuild(sys.__stdout__, _Results)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _rebuild(sys.__stderr__, _Remarks)


def _rebuild(stream: Any, kind: type[io.FileIO]) -> io.TextIOWrapper:
    raw = kind(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # as python -u has it
        encoding=stream.encoding,
        errors="backslashreplace",  # names of files may be anything
        newline="\n",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def flush_results(status: int) -> int:
    """`status` or, if it is 0 and stdout cannot take what is left for it, or could not before, 1, having said so.

    To be called last: what the interpreter cannot write at its exit makes the status 120.
    """
    try:
        sys.stdout.flush()
        if _unread:
            raise _unread
    except OSError as error:
        _discard(sys.stdout.fileno())
        if not status and not isinstance(error, BrokenPipeError):  # else it is told already, or nobody listens
            _complain(f"error: {explain_os_error(error)}", STATUS_FAILED)
        return status or STATUS_FAILED
    return status


def run(command: click.Command) -> NoReturn:
    """Run `command` on sys.argv as the whole process, and exit with the status its outcome means."""
    take_streams()
    os.environ["PYTHONSAFEPATH"] = "1"  # processes that we start do not import what lies in the current folder
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        result = command.main(standalone_mode=False)
        status = result if isinstance(result, int) else 0
    except (click.Abort, KeyboardInterrupt):
        status = _complain("interrupted", STATUS_SIGINT)
    except Terminated:
        status = _complain("terminated", STATUS_SIGTERM)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except UserError as error:
        status = _complain(f"error: {error}", STATUS_FAILED)
    except OSError as error:
        status = _complain(f"error: {explain_os_error(error)}", STATUS_FAILED)
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else STATUS_FAILED if left.code else 0
    except Exception as error:  # noqa: BLE001 - a defect of ours, reported as one
        what = " ".join(str(error).split())
        hint = "" if _debug else "; --debug shows the traceback"
        status = _complain(f"internal error: {type(error).__name__}: {what}{hint}", STATUS_FAILED)
    finally:
        show_cursor()
    sys.exit(flush_results(status))


def can_redraw() -> bool:
    """Whether stderr is a terminal on which what was written can change in place."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def show_cursor() -> None:
    """Undo what a live display does to a terminal; for whoever ends the process, or one of its own, by force."""
    if not sys.stderr.closed and can_redraw():
        stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # a live display holds back what has no line end
        with contextlib.suppress(OSError):  # the terminal was closed
            stream.write(SHOW_CURSOR)
            stream.flush()


def leave_closed_terminal() -> None:
    """From here on, what is written to a terminal that was closed is lost in silence: else every write fails."""
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            _discard(stream)


def _discard(stream: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream)
    os.close(null)


def _raise_terminated(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def _complain(line: str, status: int) -> int:
    if _debug:
        traceback.print_exc()
    _remark(line)
    return status


def explain_os_error(error: OSError) -> str:
    """One line for a failed system call: what, which file, what to do."""
    permissions = "choose a folder you may write, or change its permissions"
    remedies = {
        errno.ENOSPC: "free some space or choose another folder",
        errno.EDQUOT: "free some of your quota or choose another folder",
        errno.EACCES: permissions,
        errno.EPERM: permissions,
        errno.EROFS: "choose a folder on a writable file system",
        errno.ENOTDIR: "a part of that path is a file; choose another folder",
    }
    where = f"{error.filename}: " if error.filename else ""
    remedy = f"; {remedies[error.errno]}" if error.errno in remedies else ""
    return f"{where}{error.strerror or error}{remedy}"


def say(text: str) -> None:
    """A result, to stdout."""
    click.echo(text)


def spell_command(*words: object, shards: object = None, usual: object = DEFAULT_SHARDS) -> str:
    """A command to be typed: its words, quoted for a shell, and --shards unless it would take that folder anyway.

    `usual`: what it takes where no variable names a folder.
    """
    is_taken = shards is None or str(shards) == (os.environ.get(SHARDS_VARIABLE) or str(usual))
    flags = () if is_taken else ("--shards", shards)
    return shlex.join(map(str, (*words, *flags)))


def set_voice(voice: Voice) -> None:
    """How remarks of this process are made from now on; results and errors are not affected."""
    global _voice
    _voice = voice


def note(text: str) -> None:
    """A remark about the work, to stderr; with another voice not at all, or as {"kind": "note", "text": ...}."""
    if _voice == "words":
        _remark(text)
    elif _voice == "json":
        print_line({"kind": "note", "text": text})


def warn(text: str) -> None:
    """What must be known with any voice, to stderr."""
    _remark(text)


def _remark(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it has left, or a log's disk is full: the work goes on
        click.echo(text, err=True)


def print_line(value: dict[str, Any]) -> bool:
    """A JSON object on a line of its own, to stdout, at once; a number that is not finite as null. Returns whether
    stdout took it: if not, that is told once, nothing more is printed, the work goes on, and its status will be 1."""
    global _unread
    if _unread:
        return False
    finite = {
        name: None if isinstance(number, float) and not math.isfinite(number) else number
        for name, number in value.items()
    }
    try:
        click.echo(json.dumps(finite, allow_nan=False))
    except OSError as error:
        if error.filename != STDOUT_NAME:
            raise
        _unread = error
        _discard(sys.stdout.fileno())
        warn(f"warning: {STDOUT_NAME}: {error.strerror}; no more JSON lines, the work goes on and ends with status 1")
    return _unread is None


def print_json(value: dict[str, Any]) -> None:
    """The single JSON object that --json promises, to stdout."""
    click.echo(json.dumps(value, indent=1))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table to stdout: the first column left-aligned, the others right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left")
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


class Progress:
    """Progress on stderr: a rich bar on a terminal, else a plain line at most every ten seconds; as a remark is made.

    `with Progress("sharding", 1000, "images") as progress: progress.advance(5, failures="0")`
    """

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = 0
        self._start_s = self._said_s = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if _voice == "words" and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            notes = (TextColumn("{task.fields[notes]}"), TimeRemainingColumn())
            self._bar = Progress(*columns, *notes, console=Console(stderr=True))
            self._task = self._bar.add_task(self._label, total=self._total, notes="")
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal was closed: the work went on
                self._bar.stop()

    def advance(self, amount: int, **notes: str) -> None:
        """Count `amount` more as done; `notes` are shown beside the rate."""
        self._done += amount
        now_s = time.monotonic()
        rate = self._done / max(now_s - self._start_s, 1e-9)
        shown = "  ".join([f"{rate:,.0f} {self._unit}/s", *(f"{name} {value}" for name, value in notes.items())])
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, notes=shown)
        elif now_s - self._said_s >= PLAIN_INTERVAL_S:
            self._said_s = now_s
            left_s = (self._total - self._done) / max(rate, 1e-9)
            note(f"{self._label}: {self._done}/{self._total} {self._unit}  {shown}  {left_s:.0f} s left")
