"""Preparation of one image against a slow exact filter, and every oddity that a file named .JPEG can be."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tools import imaging
from tools.imaging import BadImage, prepare, to_square

SIDE = 256


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colourful picture, so that lossy coding and filters change little."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = rng.uniform(0.5, 3, size=(3, 2))
    planes = [127 + 110 * np.sin(a * 6 * x / width + b * 6 * y / height) for a, b in waves]
    return Image.fromarray(np.stack(planes, axis=2).round().astype(np.uint8))


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def lanczos(size_in: int, size_out: int) -> np.ndarray:
    """(size_out, size_in) weights of an antialiasing Lanczos filter with three lobes, as defined."""
    scale = size_in / size_out
    spread = max(scale, 1.0)
    x = (np.arange(size_in)[None] + 0.5 - (np.arange(size_out)[:, None] + 0.5) * scale) / spread
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def exact_square(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (256, 256, 3): resize all of it in float64, then crop."""
    height, width, _ = pixels.shape
    shorter = min(height, width)
    rows, columns = (max(SIDE, round(side * SIDE / shorter)) for side in (height, width))
    resized = np.tensordot(lanczos(height, rows), pixels.astype(np.float64), axes=1)
    resized = np.tensordot(resized, lanczos(width, columns), axes=(1, 1)).swapaxes(1, 2)
    top, left = (rows - SIDE) // 2, (columns - SIDE) // 2
    return resized[top : top + SIDE, left : left + SIDE].clip(0, 255)


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(np.float64)


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@settings(max_examples=30, deadline=None)
@given(st.integers(24, 500), st.integers(24, 500))
def test_resize_and_crop_equal_an_exact_filter_within_rounding_for_every_shape(width, height):
    image = picture(width, height)
    difference = np.abs(pixels_of(to_square(save(image, "PNG", compress_level=0))) - exact_square(pixels_of(image)))
    assert difference.shape == (SIDE, SIDE, 3)
    # Two passes, each rounding to whole grey levels; Pillow's weights have a finite precision.
    assert difference.max() <= 2 and difference.mean() <= 0.5


def test_a_photograph_keeps_fidelity_with_the_exact_filter(real_images):
    path = sorted((real_images / "imagenet-sample/train").glob("*/*"))[0]
    with Image.open(path) as image:
        exact = exact_square(pixels_of(image))
    error = ((pixels_of(to_square(path.read_bytes())) - exact) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 50


@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (1500, 1029), (4100, 600), (513, 2001), (2049, 2055)])
def test_a_large_jpeg_decoded_at_a_fraction_stays_faithful(width, height):
    data = save(picture(width, height), "JPEG", quality=95)
    difference = np.abs(pixels_of(to_square(data)) - exact_square(pixels_of(decode(data))))
    assert difference.mean() < 0.7 and difference.max() <= 6


def test_a_jpeg_of_less_than_four_times_the_size_is_decoded_in_full():
    noise = np.random.default_rng(0).integers(0, 256, size=(1023, 1030, 3), dtype=np.uint8)
    data = save(Image.fromarray(noise), "JPEG", quality=95)
    difference = np.abs(pixels_of(to_square(data)) - exact_square(pixels_of(decode(data))))
    assert difference.max() <= 2


def test_the_output_is_a_baseline_420_jpeg_of_256_square_without_metadata():
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = save(picture(300, 400), "JPEG", exif=exif, comment=b"a comment", icc_profile=b"x" * 200, dpi=(300, 300))
    output = prepare(data, quality=90)
    with decode(output) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIDE, SIDE))
        assert "progressive" not in image.info and image.layer[0][1:3] == (2, 2) and image.layer[1][1:3] == (1, 1)
        assert image.quantization == decode(save(picture(8, 8), "JPEG", quality=90)).quantization
    markers = [output[i : i + 2] for i in range(len(output) - 1) if output[i] == 0xFF and output[i + 1] >= 0xC0]
    assert b"\xff\xfe" not in markers  # comment
    assert not {bytes([0xFF, 0xE0 + n]) for n in range(1, 16)} & set(markers[: markers.index(b"\xff\xda")])
    assert prepare(data, quality=90) == output


def test_quality_is_obeyed():
    data = save(picture(300, 300), "PNG")
    sizes = [len(prepare(data, quality=quality)) for quality in (50, 90, 100)]
    assert sizes[0] < sizes[1] < sizes[2]


def close(data: bytes, expected: Image.Image, tolerance: float = 3.0) -> bool:
    return bool(np.abs(pixels_of(to_square(data)) - exact_square(pixels_of(expected))).mean() < tolerance)


def test_greyscale_becomes_rgb_with_equal_channels():
    data = save(picture(300, 280).convert("L"), "JPEG", quality=95)
    pixels = pixels_of(to_square(data))
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    assert close(data, picture(300, 280).convert("L"))


def test_cmyk_jpegs_have_their_colours_right():
    image = picture(300, 280)
    data = save(image.convert("CMYK"), "JPEG", quality=95)
    assert decode(data).mode == "CMYK" and b"Adobe" in data
    assert close(data, image)


def test_ycck_jpegs_have_their_colours_right():
    # Photoshop's YCCK holds the inks C, M, Y, converted as if they were R, G, B, and inverted K. Build such planes (the
    # writer inverts what it is given) in a CMYK file, then declare the transform.
    image = picture(320, 320)
    inks = 255 - np.asarray(image)  # of a picture without black
    ycc = np.asarray(Image.fromarray(inks).convert("YCbCr"))
    planes = np.dstack([ycc, np.full(ycc.shape[:2], 255, np.uint8)])
    data = save(Image.frombytes("CMYK", image.size, (255 - planes).tobytes()), "JPEG", quality=95, subsampling=0)
    at = data.index(b"Adobe") + 11  # version, flags0, flags1 (two bytes each), then the transform: 0 CMYK, 2 YCCK
    assert data[at] == 0
    assert close(data[:at] + b"\x02" + data[at + 1 :], image)


def test_exif_orientation_is_ignored():
    image = picture(400, 300)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert prepare(save(image, "JPEG", exif=exif), quality=90) == prepare(save(image, "JPEG"), quality=90)


def test_progressive_is_read_as_the_same_picture():
    image = picture(400, 300)
    assert close(save(image, "JPEG", progressive=True, quality=95), image)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_other_formats_are_read_by_their_content(kind):
    assert close(save(picture(300, 270), kind), picture(300, 270), tolerance=12 if kind == "GIF" else 3)


def test_transparency_is_dropped():
    image = picture(300, 270)
    hidden = image.copy()
    hidden.putalpha(Image.linear_gradient("L").resize(image.size))
    assert close(save(hidden, "PNG"), image)
    assert close(save(hidden.convert("LA"), "PNG"), image.convert("L"))


def test_a_palette_with_a_transparent_colour_keeps_its_colours():
    image = picture(300, 270).quantize(16)
    assert close(save(image, "PNG", transparency=3), image)
    assert close(save(image, "PNG", transparency=bytes(range(16))), image)


def test_black_and_white_is_filtered_and_not_sampled():
    checker = Image.fromarray((np.indices((512, 512)).sum(axis=0) % 2).astype(bool))
    pixels = pixels_of(to_square(save(checker, "PNG")))
    assert checker.mode == "1" and np.abs(pixels[8:-8, 8:-8] - 127.5).max() < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
    image = Image.fromarray(np.tile(ramp, (256, 1)))
    pixels = pixels_of(to_square(save(image, kind)))
    assert np.abs(pixels[..., 0] - np.tile(ramp / 257, (256, 1))).max() <= 0.5


def test_16_bit_colour_is_scaled_and_not_clipped():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    ramp = np.linspace(0, 65535, 256).round().astype(">u2")
    row = b"\0" + np.stack([ramp, ramp[::-1], ramp], axis=1).tobytes()
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 256, 256, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(row * 256)) + chunk(b"IEND", b"")
    pixels = pixels_of(to_square(png))
    assert (
        np.abs(pixels[0, :, 0] - np.arange(256)).max() <= 1
        and np.abs(pixels[0, :, 1] - 255 + np.arange(256)).max() <= 1
    )


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (300, 300), color) for color in ("red", "blue")]
    pixels = pixels_of(to_square(save(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    assert (pixels == [255, 0, 0]).all()


def test_tiny_images_are_enlarged():
    assert (pixels_of(to_square(save(Image.new("RGB", (1, 1), (9, 200, 77)), "PNG"))) == [9, 200, 77]).all()
    assert to_square(save(picture(2, 900), "PNG")).size == (SIDE, SIDE)


def test_trailing_garbage_is_of_no_account():
    data = save(picture(300, 300), "JPEG")
    assert prepare(data + b"\0garbage" * 100, quality=90) == prepare(data, quality=90)


def test_more_pixels_than_the_limit_are_refused_from_the_header(monkeypatch):
    data = save(picture(400, 300), "PNG")
    header_only = data[: data.index(b"IDAT") - 4]  # nothing to decode: whoever tries fails otherwise
    monkeypatch.setattr(imaging, "MAX_PIXELS", 119_999)
    with pytest.raises(BadImage, match=r"400 x 300 pixels, limit 119999 \(TooManyPixels\)"):
        prepare(header_only + data[-12:], quality=90)
    monkeypatch.setattr(imaging, "MAX_PIXELS", 120_000)
    prepare(data, quality=90)


def test_a_decompression_bomb_is_refused():
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    with pytest.raises(BadImage):
        prepare(b"\x89PNG\r\n\x1a\n" + chunk, quality=90)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image at all",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        save(picture(300, 300), "JPEG")[:3000],
        save(picture(300, 300), "PNG")[:3000],
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        save(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
    ],
    ids=["empty", "text", "jpeg-head", "png-head", "cut-jpeg", "cut-png", "svg", "float-tiff"],
)
def test_what_cannot_be_used_says_why_in_one_line(data):
    with pytest.raises(BadImage) as caught:
        prepare(data, quality=90)
    assert caught.value.reason and caught.value.exception.isidentifier()
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_give_an_image_or_a_bad_image_and_nothing_else(data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]))
    content = bytearray(save(picture(40, 30), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        output = prepare(bytes(content[: data.draw(st.integers(0, len(content)))]), quality=90)
    except BadImage:
        return
    assert decode(output).size == (SIDE, SIDE)
