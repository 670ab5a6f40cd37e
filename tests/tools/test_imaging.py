"""Preparation of whole images against a slow exact filter; format, fidelity, determinism; batches."""

import hashlib
import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import UserError
from tests import oracle
from tests.tools.pictures import SIDE, noise, picture, pixels_of, prepare_raw, psnr, save, square
from tools import decoding, imaging
from tools.imaging import BadImage, Prepared, make_preparer, prepare

# Each pass rounds to whole grey levels: half a level after the first, spread over the taps of the second, and half
# again; a level more for 16-bit weights. Seen on noise: 2 and 0.33.
MAX_ERROR, MEAN_ERROR = 3, 0.4


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 5))
def test_resize_and_crop_equal_the_exact_filter_within_rounding_for_every_shape(width, height, seed):
    # Beyond an aspect of 3 the start of the longer side may be cut within a quarter of an output pixel: below.
    width, height = min(width, 3 * height), min(height, 3 * width)
    image = noise(width, height, seed)
    difference = np.abs(square(save(image, "PNG", compress_level=0)) - oracle.central_square(np.asarray(image)))
    assert difference.shape == (SIDE, SIDE, 3)
    assert difference.max() <= MAX_ERROR and difference.mean() <= MEAN_ERROR


@pytest.mark.parametrize(("width", "height"), [(1, 5000), (5000, 1), (3000, 8), (16, 4096), (256, 1500), (512, 2500)])
def test_extreme_aspects_with_whole_scales_are_exact_though_only_the_middle_is_touched(width, height):
    image = noise(width, height)
    difference = np.abs(square(save(image, "PNG")) - oracle.central_square(np.asarray(image)))
    assert difference.max() <= MAX_ERROR and difference.mean() <= MEAN_ERROR


@settings(max_examples=300, deadline=None)
@example(769, 6000)  # half a pixel of the decoded picture at every other multiple of 256 outputs
@given(st.integers(1, 4000), st.integers(1, 65_535))
def test_windows_hold_what_the_crop_needs_and_little_more_and_start_within_a_quarter_of_an_output(one, other):
    shorter, longer = min(one, other), max(one, other)
    divisor = next((divisor for divisor in (8, 4, 2) if shorter >= 384 * divisor), 1)
    for side, window in zip((longer, shorter), imaging.find_windows(longer, shorter, divisor), strict=True):
        resized = max(SIDE, round(side * SIDE / shorter))
        assert window.scale == pytest.approx(side / divisor / resized)
        support = 2 * max(window.scale, 1.0)
        first_output = (resized - SIDE) // 2 - window.skip
        assert first_output >= 0
        assert abs(window.start - first_output * window.scale) <= 0.25 * window.scale + 1e-6
        # What the crop's first and last output see, in decoded pixels.
        first, last = ((resized - SIDE) // 2 + at for at in (0.5, SIDE - 0.5))
        assert window.start == 0 or window.start <= first * window.scale - support
        assert window.stop == -(-side // divisor) or window.stop >= last * window.scale + support
        assert window.skip <= SIDE * divisor + (support + 2) / window.scale + 1
        assert window.stop - window.start <= (window.skip + SIDE) * window.scale + support + 4


@pytest.mark.parametrize(("width", "height"), [(1001, 271), (301, 3001), (30_000, 7)])
def test_other_extreme_aspects_are_within_a_quarter_of_a_pixel(width, height):
    image = picture(width, height)
    exact = oracle.central_square(np.asarray(image))
    difference = np.abs(square(save(image, "PNG")) - exact)
    slope = max(np.abs(np.diff(exact, axis=axis)).max() for axis in (0, 1))
    assert difference.max() <= MAX_ERROR + 0.25 * slope


@pytest.mark.parametrize(("width", "height"), [(768, 768), (1500, 1029), (4100, 600), (3201, 3211), (769, 2001)])
def test_a_large_jpeg_decoded_at_a_fraction_stays_in_place_and_faithful(width, height):
    data = save(picture(400, 401).resize((width, height), Image.Resampling.BICUBIC), "JPEG", quality=95)
    decoded = decoding.decode(data)
    divisor = {768: 2, 1029: 2, 600: 1, 3201: 8, 769: 2}[min(width, height)]
    assert decoded.divisor == divisor
    assert decoded.pixels.shape == (-(-height // divisor), -(-width // divisor), 3)
    difference = np.abs(square(data) - oracle.central_square(pixels_of(data)))
    assert difference.mean() < 0.6 and difference.max() <= 6


def test_a_jpeg_of_less_than_three_times_the_size_is_decoded_in_full():
    data = save(noise(767, 800), "JPEG", quality=95)
    assert decoding.decode(data).divisor == 1
    assert np.abs(square(data) - oracle.central_square(pixels_of(data))).max() <= MAX_ERROR


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
    raw, jpeg = prepare_raw(data), prepare(data, encoding="jpeg", quality=100)
    assert raw == Prepared(raw.content, None) and len(raw.content) == SIDE * SIDE * 3
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


def test_a_batch_keeps_its_order_and_isolates_bad_images():
    good = [save(picture(300, 300, seed), kind) for seed, kind in enumerate(["JPEG", "PNG", "JPEG"])]
    contents = [good[0], b"", good[1], good[2][:1500], good[2], good[0]]
    results = make_preparer(device="cpu", encoding="jpeg", quality=90)(contents)
    assert [type(result) for result in results] == [Prepared, BadImage, Prepared, BadImage, Prepared, Prepared]
    for data, result in zip(contents, results, strict=True):
        if isinstance(result, Prepared):
            assert result == prepare(data, encoding="jpeg", quality=90)
    assert make_preparer(device="cpu", encoding="raw", quality=90)([]) == []


def test_a_bad_image_can_be_sent_between_processes():
    error = BadImage("no picture", "ValueError")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.reason, copy.exception, str(copy)) == ("no picture", "ValueError", "no picture (ValueError)")


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
        monkeypatch.setattr(imaging, "resize", fail)
    with pytest.raises(MemoryError, match="memory"):
        make_preparer(device="cpu", encoding="jpeg", quality=90)([data])


def test_a_gpu_is_asked_for_in_vain_with_a_remedy():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"no CUDA device.*--device cpu"):
        make_preparer(device="gpu", encoding="jpeg", quality=90)


DIGEST = """
import hashlib, sys
from pathlib import Path
from tools.imaging import make_preparer
contents = [Path(name).read_bytes() for name in sys.argv[1:]]
results = make_preparer(device="cpu", encoding="jpeg", quality=90)(contents)
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
