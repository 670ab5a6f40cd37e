"""The CPU's fast path as two operators of DALI, from a stored image to network input; compiled here when first wanted.

`fn.alexnet.decode_crop_finish` takes JPEGs, `fn.alexnet.read_crop_finish` the labels of raw shards: see plugin.cc.
"""

import os
import re
import threading
from functools import cache
from typing import NamedTuple

from pipeline.common.console import note
from pipeline.common.errors import UserError
from pipeline.operators.compile import BuildError, Headers, NoCompiler, build_plugin

SWITCH = "ALEXNET_OPERATORS"  # "stock": as if the operators could not be compiled
_FAILURE = re.compile(r"^alexnet: (?P<path>.*):\d+:(?P<name>[^:/]*): (?P<reason>.*)$", re.MULTILINE)
_lock = threading.Lock()


class Failure(NamedTuple):
    """A sample that cannot be decoded or read: its shard's path, its key, and the reason."""

    path: str
    key: str
    reason: str


def load_operators() -> bool:
    """Load the operators into this process's DALI, compiled once for this machine; False where that cannot be.

    A note says why, but for a machine without a compiler; DALI's stock operators do the same, slower. Raises UserError
    for an unknown ALEXNET_OPERATORS.
    """
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "stock"):
        raise UserError(f"{SWITCH} is {switch!r}, expected stock, or nothing")
    with _lock:
        return not switch and _load()


@cache
def _load() -> bool:
    """Once in a process: DALI ends it when an operator is registered a second time."""
    from nvidia.dali import plugin_manager

    try:
        with build_plugin(find_headers()) as path:
            plugin_manager.load_library(str(path))
    except NoCompiler:
        return False
    except (BuildError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        note(f"the CPU's images go through DALI's stock operators, at two thirds of the speed: {reason}")
        return False
    return True


def find_headers() -> Headers:
    """Those of the DALI that is installed."""
    import nvidia.dali
    from nvidia.dali import sysconfig

    flags = [flag for flag in sysconfig.get_compile_flags() if not flag.startswith("-I")]
    return Headers(nvidia.dali.__version__, sysconfig.get_include_dir(), flags, sysconfig.get_link_flags())


def find_failure(error: BaseException) -> Failure | None:
    """The sample that an operator named in an error of DALI's, if it is one of these."""
    found = _FAILURE.search(str(error))
    if found is None:
        return None
    return Failure(found["path"], found["name"].partition(".")[0], found["reason"])
