"""Units of work for the tests of both engines: functions that another process, here or on a cluster, can import."""

import contextlib
import os
import signal
from pathlib import Path


def double(unit, report):
    for _ in range(unit):
        report((os.getpid(), 1))
    return unit, 2 * unit


def die_at_three(unit, report):
    if unit == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return unit


def leave_at_three(unit, report):
    if unit == 3:
        os._exit(7)
    return unit


def fail_at_three(unit, report):
    if unit == 3:
        raise OSError(28, "No space left on device", "/the/file")
    return unit


def fail_in_code(unit, report):
    return {}[unit]


def is_running(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
