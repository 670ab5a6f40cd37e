"""Samples as shards hold them: format, fidelity, determinism; and what becomes of a bad image among good ones."""

import hashlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline.images import decode as decoding
from pipeline.images import resize as imaging
from tests.docs.pictures import SIDE, noise, picture, pixels_of, prepare_raw, psnr, save, square
from tests.sharding import read_samples
from tools.sharding.plan import Options, Unit
from tools.sharding.store import FolderStore
from tools.sharding.write import Prepared, Setup, prepare, write_unit
from tools.sources.source import Entry


def test_the_output_is_a_baseline_420_jpeg_of_256_square_without_metadata():
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = save(picture(300, 400), "JPEG", exif=exif, comment=b"a comment", icc_profile=b"x" * 200, dpi=(300, 300))
    output = prepare(data, encoding="jpeg", quality=90).content
    with Image.open(io.BytesIO(output)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIDE, SIDE))
        assert "progressive" not in image.info and image.layer[0][1:3] == (2, 2) and image.layer[1][1:3] == (1, 1)
        with Image.open(io.BytesIO(save(picture(8, 8), "JPEG", quality=90))) as usual:
            assert image.quantization == usual.quantization
    markers = [output[i : i + 2] for i in range(len(output) - 1) if output[i] == 0xFF and output[i + 1] >= 0xC0]
    assert b"\xff\xfe" not in markers  # comment
    assert not {bytes([0xFF, 0xE0 + n]) for n in range(1, 16)} & set(markers[: markers.index(b"\xff\xda")])


def test_quality_is_obeyed():
    data = save(picture(300, 300), "PNG")
    sizes = [len(prepare(data, encoding="jpeg", quality=quality).content) for quality in (50, 90, 100)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_raw_is_what_the_jpeg_encodes():
    data = save(picture(500, 375), "JPEG", quality=95)
    raw, jpeg = (prepare(data, encoding=encoding, quality=100) for encoding in ("raw", "jpeg"))
    assert raw == Prepared(*prepare_raw(data)) and len(raw.content) == SIDE * SIDE * 3
    assert np.abs(square(data) - pixels_of(jpeg.content)).mean() < 1


def test_fidelity_on_photographs_is_that_of_the_best_fast_tools(real_images):
    # Lanczos from a full decode is what the fidelity of every tool is measured against.
    values = []
    for path in sorted((real_images / "imagenet-sample/train").glob("*/*"))[::4]:
        with Image.open(path) as image:
            scale = SIDE / min(image.size)
            width, height = (max(SIDE, round(side * scale)) for side in image.size)
            left, top = (width - SIDE) // 2, (height - SIDE) // 2
            resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        reference = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)))
        values.append(psnr(pixels_of(prepare(path.read_bytes(), encoding="jpeg", quality=90).content), reference))
    assert len(values) == 100
    assert np.mean(values) >= 34.3


def test_bad_images_leave_gaps_in_the_keys_and_the_good_ones_as_they_are(tmp_path):
    good = [save(picture(300, 300, seed), kind) for seed, kind in enumerate(["JPEG", "PNG", "JPEG"])]
    contents = [good[0], b"", good[1], good[2][:1500], good[2], good[0]]

    def read(entry: Entry) -> bytes:
        if entry.path == "3":
            raise FileNotFoundError(2, "No such file or directory", "3")
        return contents[int(entry.path)]

    ticks = []
    unit = Unit("train-000000.tar", "train", tuple(range(6)), tuple(Entry(str(n), n) for n in range(6)))
    written = write_unit(Setup(FolderStore(tmp_path), "job", Options(), read), unit, ticks.append)
    samples = read_samples(tmp_path, "train")
    assert {int(key): (image, int(label)) for key, (image, label) in samples.items()} == {
        n: (prepare(contents[n], encoding="jpeg", quality=90).content, n) for n in (0, 2, 4, 5)
    }
    assert list(map(tuple, written.failures)) == [
        ("1", "the file is empty", "UnidentifiedImageError"),
        ("3", "No such file or directory", "FileNotFoundError"),
    ]
    assert sum(tick.num_images for tick in ticks) == 6 and ticks[0].failures == written.failures


@pytest.mark.parametrize("message", ["Insufficient memory (case 4)", "DefaultCPUAllocator: can't allocate memory"])
@pytest.mark.parametrize("place", ["decode", "resize"])
def test_a_machine_out_of_memory_is_not_the_fault_of_the_image(monkeypatch, message, place):
    def fail(*_arguments, **_options):
        raise (ValueError if place == "decode" else RuntimeError)(message)

    data = save(picture(300, 300), "JPEG")
    if place == "decode":
        monkeypatch.setattr(decoding.simplejpeg, "decode_jpeg_header", lambda *_a, **_o: (300, 300, "YCbCr", "420"))
        monkeypatch.setattr(decoding.simplejpeg, "decode_jpeg", fail)
    else:
        monkeypatch.setattr(imaging, "to_square", fail)
    with pytest.raises(MemoryError, match="memory"):
        prepare(data, encoding="jpeg", quality=90)


DIGEST = """
import hashlib, sys
from pathlib import Path
from tools.sharding.write import prepare
results = [prepare(Path(name).read_bytes(), encoding="jpeg", quality=90) for name in sys.argv[1:]]
print(hashlib.sha256(b"".join(result.content for result in results)).hexdigest())
"""


def test_the_bytes_are_the_same_in_another_process_and_without_vector_units(tmp_path):
    kinds = [(picture(500, 375), "JPEG"), (noise(300, 257), "JPEG"), (noise(40, 90), "PNG"), (noise(900, 880), "JPEG")]
    paths = []
    for index, (image, kind) in enumerate(kinds):
        paths.append(tmp_path / f"{index}")
        paths[-1].write_bytes(save(image, kind, **({"quality": 92} if kind == "JPEG" else {})))
    contents = [path.read_bytes() for path in paths]
    here = b"".join(prepare(data, encoding="jpeg", quality=90).content for data in contents)
    command = [sys.executable, "-c", DIGEST, *map(str, paths)]
    scalar = {"ATEN_CPU_CAPABILITY": "default", "JSIMD_FORCENONE": "1"}  # of torch and of libjpeg-turbo
    environment = {**os.environ, **scalar, "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == hashlib.sha256(here).hexdigest()
