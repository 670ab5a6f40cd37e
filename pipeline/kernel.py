"""C files, compiled on this machine when first wanted, for this processor; None where there is no C compiler.

The decision that shaped it: they are a faster way, never needed: finish.c's bits are those that finish.py gets with
torch, and a test compares the two. Compiled anew by every process (half a second), so there is nothing to keep, ship or
distrust. Left out: what is computed (finish.c, the trainer's native.c) and for what.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import Tensor

SOURCE = Path(__file__).with_name("finish.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC")
_LIMIT_S = 60

# (pixels uint8 (224, 224, 3), is_flipped, bias (3,), mean_image or None, factor (3,), out float32, is_nchw)
Kernel = Callable[[Tensor, bool, Tensor, Tensor | None, Tensor, Tensor, bool], None]


def compile_library(source: Path, *flags: str) -> ctypes.CDLL | None:
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
                [compiler, "-shared", compiled, "-o", library, "-lm"],
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=_LIMIT_S)
            return ctypes.CDLL(library)
        except (OSError, subprocess.SubprocessError):  # a compiler without headers, a folder mounted noexec, ...
            return None


@cache
def load_kernel() -> Kernel | None:
    """The compiled function, or None. It needs pixels whose rows are contiguous, and an `out` aligned to 16 bytes."""
    library = compile_library(SOURCE)
    if library is None:
        return None
    function = library.finish
    pointer = ctypes.c_void_p
    function.argtypes = [pointer, ctypes.c_ssize_t, ctypes.c_int, *[pointer] * 4, ctypes.c_int]
    function.restype = None

    def finish(
        pixels: Tensor, is_flipped: bool, bias: Tensor, mean: Tensor | None, factor: Tensor, out: Tensor, is_nchw: bool
    ) -> None:
        function(
            pixels.data_ptr(),
            pixels.stride(0),
            is_flipped,
            bias.data_ptr(),
            None if mean is None else mean.data_ptr(),
            factor.data_ptr(),
            out.data_ptr(),
            is_nchw,
        )

    return finish
