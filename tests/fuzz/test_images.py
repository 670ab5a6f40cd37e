"""Broken pictures, and pictures made to cost: no crash, bounded memory and time, pixels or a reason.

The limits are the kernel's, in a process of its own. 10,000 mutants of each kind and the sanitizers are marked slow.
"""

import io
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from tests.fuzz.mutants import list_mutants, make_jpegs

ROOT = Path(__file__).resolve().parents[2]


def run_mutants(kind: str, num: int) -> dict:
    words = [sys.executable, "-m", "tests.fuzz.images", kind, "0", str(num)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kind", "num"),
    [
        ("jpeg", 200),
        ("other", 100),
        pytest.param("jpeg", 10_000, marks=pytest.mark.slow),
        pytest.param("other", 10_000, marks=pytest.mark.slow),
    ],
)
def test_mutants_are_decoded_or_have_a_reason_in_bounded_memory(kind, num):
    found = run_mutants(kind, num)
    assert found["mutants"] == num == found["prepared"] + found["failures"] and not found["out_of_memory"]
    assert found["prepared"] > num / 10 and found["failures"] > num / 10  # neither everything nor nothing is broken
    assert found["peak_mib"] < 1024
    if kind == "jpeg":
        assert found["fed"] + found["refused"] == num and found["fed"] > num / 20


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def make_png(width: int, height: int, data: bytes, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def deflate_zeros(num_bytes: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(num_bytes >> 20)) + packer.flush()


def make_jpeg(side: int, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def declare_size(jpeg: bytes, side: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", side, side) + jpeg[at + 4 :]


def repeat_last_scan(jpeg: bytes, times: int) -> bytes:
    at = jpeg.rindex(b"\xff\xda")
    return jpeg[:at] + jpeg[at:-2] * times + jpeg[-2:]


BOMBS = {
    "a JPEG that says 65,500 x 65,500": (lambda: declare_size(make_jpeg(16), 65500), "TooManyPixels"),
    "a JPEG that says 13,000 x 13,000": (lambda: declare_size(make_jpeg(16), 13000), "TooManyPixels"),
    "a PNG that says 65,500 x 65,500": (lambda: make_png(65500, 65500, b""), "DecompressionBombError"),
    "20,000 x 20,000 zeros in a PNG": (
        lambda: make_png(20000, 20000, deflate_zeros(20000 * 20001)), "DecompressionBombError",
    ),
    "5,000 scans of 1,024 x 1,024": (
        lambda: repeat_last_scan(make_jpeg(1024, progressive=True), 5000), "TooManyPixels",
    ),
    "half a gigabyte of text in a PNG": (
        lambda: make_png(16, 16, zlib.compress(bytes(17 * 16)), chunk(b"zTXt", b"a\0\0" + deflate_zeros(1 << 29))),
        "ValueError",
    ),
    "a BMP that says 60,000 x 60,000": (
        lambda: b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(9),
        "DecompressionBombError",
    ),
}  # fmt: skip
DEFUSE = """
import resource, sys
from pathlib import Path
from pipeline.images.decode import BadImage
from pipeline.images.resize import read_square
from tests.fuzz.images import decode_strictly, load_decoder
decoders = [decode for decode in (decode_strictly, load_decoder()) if decode is not None]
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20),) * 2)  # not the pixels of any of these
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for path in sys.argv[1:]:
    data = Path(path).read_bytes()
    try:
        read_square(data)
        print("decoded")
    except BadImage as error:
        print(error.exception)
    fed = 0
    for decode in decoders:
        try:
            decode(data)
            fed += 1
        except ValueError:
            pass
    print("fed" if fed else "refused")
"""


def test_pictures_made_to_cost_memory_or_time_are_refused_before_they_do_or_end_soon(tmp_path):
    """The last has 20,000 scans of few pixels, below the limit on pixels visited: time grows with its bytes alone."""
    made = [make() for make, _ in BOMBS.values()] + [repeat_last_scan(make_jpeg(16, progressive=True), 20_000)]
    paths = [tmp_path / str(number) for number in range(len(made))]
    for path, data in zip(paths, made, strict=True):
        path.write_bytes(data)
    words = [sys.executable, "-c", DEFUSE, *map(str, paths)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [line for _, exception in BOMBS.values() for line in (exception, "refused")]
    lines = done.stdout.splitlines()
    assert lines[: len(expected)] == expected and lines[-1] == "refused" and len(lines) == len(expected) + 2


@pytest.mark.slow
def test_our_c_code_does_nothing_undefined_with_mutants_nor_with_any_shape(tmp_path):
    compiler, program = shutil.which("cc"), tmp_path / "kernels"
    if compiler is None:
        pytest.skip("no C compiler")
    sources = [str(ROOT / "tests/fuzz/kernels.c"), str(ROOT / "trainer/kernels/native.c")]
    flags = ["-O1", "-g", "-mssse3", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run(
        [compiler, *flags, *sources, "-ljpeg", "-lm", "-o", str(program)], capture_output=True, text=True, check=False
    )
    if built.returncode:
        pytest.skip(f"no sanitizers or no libjpeg-turbo: {built.stderr[-300:]}")
    packed = b"".join(struct.pack("<Q", len(data)) + data for _, data in list_mutants(make_jpegs(), range(2000)))
    (tmp_path / "mutants").write_bytes(packed)
    done = subprocess.run([str(program), str(tmp_path / "mutants")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    decoded, refused = (int(words.split()[0]) for words in done.stdout.split(", "))
    assert decoded + refused == 2000 and decoded > 100
