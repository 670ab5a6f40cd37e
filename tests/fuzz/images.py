"""Broken pictures through the path that makes shards and through the path that feeds training, counted.

The decision that shaped it: it runs in a process of its own under a limit of memory and of CPU time, which the kernel
holds, so that neither a crash nor a picture that grows can be missed. `python -m tests.fuzz.images jpeg 0 10000` prints
one JSON object. Left out: the mutants (mutants.py); the sanitizers (kernels.c).
"""

import ctypes
import json
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from pipeline.hostpixels import decode_into

from pipeline.images.decode import BadImage
from pipeline.images.resize import read_square
from pipeline.kernel import MESSAGE_BYTES, Kernel, load_kernel
from tests.fuzz.mutants import list_mutants, make_jpegs, make_others

ROOM_BYTES = 3 << 30  # above what the process has when it begins: a picture of 150 million pixels takes 3 GB
CPU_S_EACH = 1.0  # on average


def main() -> None:
    kind, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    seeds = make_jpegs() + make_jpegs(700) if kind == "jpeg" else make_others()
    torch.set_num_threads(1)
    read_square(seeds[0])
    kernel = load_kernel()
    limit(last - first)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, Any] = {"mutants": 0, "prepared": 0, "repaired": 0, "failures": 0, "fed": 0, "refused": 0}
    found |= {"decoders_differ": 0, "out_of_memory": 0, "slowest_s": 0.0}
    for _, data in list_mutants(seeds, range(first, last)):
        found["mutants"] += 1
        start_s = time.process_time()
        prepare(data, found)
        if kind == "jpeg":
            feed(data, kernel, found)
        found["slowest_s"] = max(found["slowest_s"], time.process_time() - start_s)
    found["peak_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    found["kernel"] = kernel is not None and kernel.decode is not None
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


def feed(data: bytes, kernel: Kernel | None, found: dict[str, Any]) -> None:
    """As the loaders do, by both decoders: a whole picture of 256x256, or an error in words."""
    image = np.zeros((256, 256, 3), np.uint8)
    stored = np.frombuffer(data, np.uint8)
    try:
        decode_into(stored, image)
        is_read = True
    except ValueError as error:
        assert str(error)
        is_read = False
    found["fed" if is_read else "refused"] += 1
    if kernel is None or kernel.decode is None:
        return
    out, message = torch.zeros(224 * 224 * 3, dtype=torch.uint8), ctypes.create_string_buffer(MESSAGE_BYTES)
    address, size = np.array([stored.ctypes.data], np.uint64), np.array([len(data)], np.uint64)
    offset, flip = np.array([[16, 16]], np.int32), np.zeros(1, np.int32)
    bias, factor = np.zeros((1, 3), np.float32), np.ones(3, np.float32)
    failed = kernel.decode(
        1,
        *(array.ctypes.data for array in (address, size, offset, flip, bias)),
        None,
        factor.ctypes.data,
        out.data_ptr(),
        0,
        1,
        message,
    )
    assert failed in (-1, 0) and (failed == -1) == (not message.value)
    if is_read and failed == -1:
        assert (out.numpy().reshape(224, 224, 3) == image[16:240, 16:240]).all()
    found["decoders_differ"] += is_read != (failed == -1)


if __name__ == "__main__":
    main()
