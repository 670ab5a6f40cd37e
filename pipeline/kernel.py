"""C files, compiled on this machine when first wanted, for this processor, as far as that can be done.

The decision that shaped it: they are a faster way to the same bits, never needed: without libjpeg-turbo's headers
simplejpeg decodes, without a C compiler torch computes, and tests compare them all. Compiled anew by every process
(half a second), so there is nothing to keep, ship or distrust; without a limit of time, since a process that was frozen
meanwhile would be left without them. Left out: what is computed (decode.c, finish.c, the trainer's native.c) and for
what.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from pipeline.operators.compile import SOURCES, compile_library

MESSAGE_BYTES = 200  # libjpeg's JMSG_LENGTH_MAX
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int


class Kernel(NamedTuple):
    """The compiled functions, called with addresses: see finish.c and decode.c, which may be missing."""

    finish: Callable[..., None]
    finish_stored: Callable[..., int]
    decode: Callable[..., int] | None


@cache
def load_kernel() -> Kernel | None:
    """It needs pixels whose rows are contiguous, and memory for its results that is aligned to 16 bytes."""
    library = compile_library(SOURCES / "decode.c", libraries=("-ljpeg",)) or compile_library(SOURCES / "finish.c")
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
