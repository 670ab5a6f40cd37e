"""C files, compiled on this machine when first wanted, for this processor, as far as that can be done.

The decision that shaped it: they are a faster way to the same bits, never needed: without libjpeg-turbo's headers
simplejpeg decodes, without a C compiler torch computes, and tests compare them all. Compiled anew by every process
(half a second), so there is nothing to keep, ship or distrust; without a limit of time, since a process that was frozen
meanwhile would be left without them. Left out: what is computed (decode.c, finish.c, the trainer's native.c) and for
what.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

MESSAGE_BYTES = 200  # libjpeg's JMSG_LENGTH_MAX
_FOLDER = Path(__file__).parent / "operators"
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int


class Kernel(NamedTuple):
    """The compiled functions, called with addresses: see finish.c and decode.c, which may be missing."""

    finish: Callable[..., None]
    finish_stored: Callable[..., int]
    decode: Callable[..., int] | None


def compile_library(source: Path, *flags: str, libraries: tuple[str, ...] = ("-lm",)) -> ctypes.CDLL | None:
    """A C file as a library of this process, or None. With -fopenmp its threads are those of the OpenMP that is already
    loaded, torch's: two of them in one process would fight for the cores."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="alexnet-kernel-") as folder:
        compiled, library = str(Path(folder, "kernel.o")), str(Path(folder, "kernel.so"))
        try:
            for command in (
                [compiler, *_FLAGS, *flags, "-c", str(source), "-o", compiled],
                [compiler, "-shared", compiled, "-o", library, *libraries],
            ):
                subprocess.run(command, check=True, capture_output=True)
            return ctypes.CDLL(library)
        except (OSError, subprocess.SubprocessError):  # a compiler without headers, a folder mounted noexec, ...
            return None


@cache
def load_kernel() -> Kernel | None:
    """It needs pixels whose rows are contiguous, and memory for its results that is aligned to 16 bytes."""
    library = compile_library(_FOLDER / "decode.c", libraries=("-ljpeg",)) or compile_library(_FOLDER / "finish.c")
    if library is None:
        return None
    finish, finish_stored, decode = library.finish, library.finish_stored, getattr(library, "decode", None)
    finish.argtypes = [_POINTER, ctypes.c_ssize_t, _INT, *[_POINTER] * 4, _INT, _INT]
    finish.restype = None
    for of_batches in (finish_stored, decode):
        if of_batches is not None:
            of_batches.argtypes = [_INT, *[_POINTER] * 8, _INT, _INT, _POINTER]
            of_batches.restype = _INT
    return Kernel(finish, finish_stored, decode)
