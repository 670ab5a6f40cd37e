"""Broken pictures through the path that makes shards and through decode.c, which feeds training, counted.

It runs in a process of its own under a limit of memory and of CPU time, which the kernel holds, so that neither a crash
nor a picture that grows can be missed. `python -m tests.fuzz.images jpeg 0 10000` prints one JSON object. The mutants:
mutants.py; the sanitizers: kernels.c.
"""

import ctypes
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

from pipeline.images.decode import BadImage
from pipeline.images.resize import read_square
from pipeline.operators.compile import SOURCES, compile_library
from tests.fuzz.mutants import list_mutants, make_jpegs, make_others

ROOM_BYTES = 3 << 30  # above what the process has when it begins: a picture of 150 million pixels takes 3 GB
CPU_S_EACH = 1.0  # on average
MESSAGE_BYTES = 200  # as in crop.h
TOP, LEFT, SIDE = 16, 5, 224
Pixels = NDArray[np.uint8]
Decode = Callable[..., Pixels]  # of bytes, and whether to crop; ValueError for what cannot be decoded


class Crop(ctypes.Structure):
    """As in crop.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("y", "x", "is_flipped", "is_nchw", "is_uint8")),
        *((name, ctypes.c_void_p) for name in ("bias", "mean_image", "factor")),
    ]


def main() -> None:
    kind, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    seeds = make_jpegs() + make_jpegs(700) if kind == "jpeg" else make_others()
    torch.set_num_threads(1)
    read_square(seeds[0])
    decode = load_decoder()
    limit(last - first)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, Any] = {"mutants": 0, "prepared": 0, "repaired": 0, "failures": 0, "fed": 0, "refused": 0}
    found |= {"damaged_below_the_crop": 0, "out_of_memory": 0, "slowest_s": 0.0}
    for _, data in list_mutants(seeds, range(first, last)):
        found["mutants"] += 1
        start_s = time.process_time()
        prepare(data, found)
        if kind == "jpeg":
            feed(data, decode, found)
        found["slowest_s"] = max(found["slowest_s"], time.process_time() - start_s)
    found["peak_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    found["own_decoder"] = decode is not None
    print(json.dumps(found))


def limit(num: int) -> None:
    """From here on the kernel refuses memory, and ends the process when its time is over."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM_BYTES, now + ROOM_BYTES))
    used = int(time.process_time()) + 30
    resource.setrlimit(resource.RLIMIT_CPU, (used + int(CPU_S_EACH * num), used + int(CPU_S_EACH * num) + 1))


def prepare(data: bytes, found: dict[str, Any]) -> None:
    """As `alexnet-prep shard` and `alexnet-predict` do: 256x256 pixels, or the reason for the list of failures."""
    try:
        square = read_square(data)
    except BadImage as error:
        assert error.reason and error.exception
        found["failures"] += 1
    except MemoryError:
        found["out_of_memory"] += 1
    else:
        assert square.pixels.shape == (256, 256, 3) and square.pixels.dtype == np.uint8
        found["prepared"] += 1
        found["repaired"] += square.repair is not None


def feed(data: bytes, decode: Decode | None, found: dict[str, Any]) -> None:
    """A whole picture of 256x256, or an error in words. decode.c judges the whole as the strict codec does, but that it
    converts no CMYK, and the crop as the whole, but for damage below it."""
    strict = attempt(decode_strictly, data)
    found["fed" if strict is not None else "refused"] += 1
    if decode is None:
        return
    whole, crop = attempt(decode, data), attempt(decode, data, True)
    if whole is not None and crop is not None:
        assert strict is not None and (whole == strict).all()
        assert (crop == whole[TOP : TOP + SIDE, LEFT : LEFT + SIDE]).all()
        return
    assert whole is None
    assert strict is None or simplejpeg.decode_jpeg_header(data)[2] == "CMYK"
    found["damaged_below_the_crop"] += crop is not None


def attempt(decode: Callable[..., Pixels], data: bytes, *options: bool) -> Pixels | None:
    try:
        return decode(data, *options)
    except ValueError as error:
        assert str(error)
        return None


def decode_strictly(data: bytes) -> Pixels:
    """By simplejpeg, up to the end marker. Raises ValueError for what is no JPEG of 256x256."""
    pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=np.zeros((256, 256, 3), np.uint8))
    if pixels.shape != (256, 256, 3):
        raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} px")
    return pixels


def load_decoder() -> Decode | None:
    """decode.c: the whole picture, or the crop at (TOP, LEFT), or ValueError; None where it cannot be compiled."""
    library = compile_library(SOURCES / "decode.c", libraries=("-ljpeg",))
    if library is None:
        return None
    bias, factor = np.zeros(3, np.float32), np.ones(3, np.float32)
    window = Crop(TOP, LEFT, 0, 0, 1, bias.ctypes.data, None, factor.ctypes.data)
    window.held = bias, factor

    def decode(data: bytes, is_cropped: bool = False) -> Pixels:
        side = SIDE if is_cropped else 256
        out, message = torch.zeros(side, side, 3, dtype=torch.uint8), ctypes.create_string_buffer(MESSAGE_BYTES)
        where = ctypes.byref(window) if is_cropped else None
        size, address = ctypes.c_size_t(len(data)), ctypes.c_void_p(out.data_ptr())
        failed = library.decode_image(data, size, where, address, message)
        assert failed in (0, 1) and bool(failed) == bool(message.value)
        if failed:
            raise ValueError(message.value.decode())
        return out.numpy()

    return decode


if __name__ == "__main__":
    main()
