"""Preparation of whole images against a slow exact filter."""

import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.images import decode as decoding
from pipeline.images import resize as imaging
from pipeline.images.decode import BadImage
from tests import oracle
from tests.docs.pictures import SIDE, noise, picture, pixels_of, save, square

# Each pass rounds to whole grey levels: half a level after the first, spread over the taps of the second, and half
# again; a level more for 16-bit weights. Seen on noise: 2 and 0.33.
MAX_ERROR, MEAN_ERROR = 3, 0.4


@settings(max_examples=25, deadline=None)
@example(253, 445, 0)  # as many rows are needed as come out
@example(259, 254, 0)
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


def test_a_bad_image_can_be_sent_between_processes():
    error = BadImage("no picture", "ValueError")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.reason, copy.exception, str(copy)) == ("no picture", "ValueError", "no picture (ValueError)")
