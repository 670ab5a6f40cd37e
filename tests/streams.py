"""Processes with nowhere to write: a stream that is a full disk, a pipe whose reader has left, or closed."""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

STDOUT, STDERR = 1, 2
KINDS = ("full", "left", "closed")
UNBUFFERED = ("", "1")  # PYTHONUNBUFFERED; an empty one is none


@contextlib.contextmanager
def open_broken(kind: str) -> Iterator[int | None]:
    """A descriptor that takes nothing; None where there is to be none."""
    if kind == "closed":
        yield None
        return
    if kind == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def run_broken(
    words: Sequence[str], stream: int, kind: str, environment: Mapping[str, str], cwd: Path | None = None
) -> tuple[int, str]:
    """Status of a process whose `stream` is broken, and what it wrote to the other one."""
    other = STDOUT + STDERR - stream
    with open_broken(kind) as descriptor:
        streams = {"stdout": None, "stderr": None}
        streams[{STDOUT: "stdout", STDERR: "stderr"}[stream]] = descriptor
        streams[{STDOUT: "stdout", STDERR: "stderr"}[other]] = subprocess.PIPE

        def close() -> None:
            if descriptor is None:
                os.close(stream)

        process = subprocess.Popen(words, env=dict(environment), cwd=cwd, text=True, preexec_fn=close, **streams)
        said = process.communicate(timeout=120)[other - 1]
    return process.returncode, said
