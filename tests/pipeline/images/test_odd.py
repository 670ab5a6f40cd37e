"""Whatever a file named .JPEG can be, short of damage: colour spaces, codings, formats, depths, sizes."""

import base64
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.images.decode import BadImage, decode
from tests.docs.pictures import SIDE, distance, noise, picture, pixels_of, prepare_raw, save, square

# 16x16 pixels (16 x, 16 y, 255 - 8 x - 8 y), made with libjpeg-turbo 3, which Pillow's interface cannot ask for.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYGCAsICQoKCgoKBggLDAsK"
    "DAkKCgr/2wBDAQICAgICAgUDAwUKBwYHCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgr/yQARCAAQABAD"
    "AREAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AOieicuNI3v+ybVqQ7UfpoAhFP7/ADgcIl3m6i5zXA73ylr3aw5aGkveEXtx/BEk"
    "W7NbNqLB0gL98wVXW4G2DMBtGT3/AJ1ADjlpUNCneHp817oVeYj/2Q=="
)
ARITHMETIC_PROGRESSIVE = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYGCAsICQoKCgoKBggLDAsK"
    "DAkKCgr/2wBDAQICAgICAgUDAwUKBwYHCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgr/ygARCAAQABAD"
    "AREAAhEBAxEB/8wABgAQARD/2gAMAwEAAhADEAAAAf8A0B8DZimkbxJfKdZRZR9ca9+Hs//MAAQQBf/aAAgBAQABBQIWFQx0IR4lEGD/zAAEEQX/"
    "2gAIAQMBAT8BFnHTqxl5E1oTDGmSL49g/8wABBEF/9oACAECAQE/ATsDIj5/rjB1RL3Vdv0b/8wABBAF/9oACAEBAAY/AgrjZtf/zAAEEAX/2gAI"
    "AQEAAT8h0vGJ2y2w/9oADAMBAAIAAwAAABCy0P/MAAQRBf/aAAgBAwEBPxDVw6PhQP/MAAQRBf/aAAgBAgEBPxDVwm8LFFD/zAAEEAX/2gAIAQEA"
    "AT8QsSakdleK8P/Z"
)
LOSSLESS = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAA/8MAEQgAEAAQA1IRAEcRAEIRAP/EABgAAAMBAQAAAAAAAAAAAAAAAAAEBQgH/9oADANSAEcAQgABAADP+f8Av9AX"
    "oC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXKC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXKC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC"
    "9AXKC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXKC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXKC9AXoC9AXoC9AXoC9AXoC9AXoC9A"
    "XoC9AXoC9AXKC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXKC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXKC9AXoC9AXoC9AXoC9AXo"
    "C9AXoC9AXoC9AXoC9AXKC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXKC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXKC9AXoC9AXoC9"
    "AXoC9AXoC9AXoC9AXoC9AXoC9AXKC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXKC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXKC9AX"
    "oC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXKC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AXoC9AX/AP/Z"
)
TWELVE_BITS = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYGCAsICQoKCgoKBggLDAsK"
    "DAkKCgr/2wBDAQICAgICAgUDAwUKBwYHCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgr/wQARDAAQABAD"
    "AREAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAACwz/xAAhEAAABAYDAQAAAAAAAAAAAAAACwwpAQYhRlRiEXFyJv/EABcBAQEBAQAAAAAAAAAA"
    "AAAAAA0MCgv/xAAfEQAABQQDAAAAAAAAAAAAAAAACgsmNkNEU3JUYWL/2gAMAwEAAhEDEQA/AIhIuWTK0fhG/Ma2OtAjwH0VUyUvnNcbehkXTEju"
    "UKcvHra9h78uWTK/MJEb9xrZ60EUyfRVTJS+c1xt6CKamJHcoU5ePW17FJuXLJlasiN+Y1sedByyz6KqZKXzmuNvQCmUxI7lCnLx62vYe/LlkyvW"
    "RG/Ma2POgimT6KqZKXzmuNvQRTUxI7lCnLx62vY//9k="
)

PATCHES = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 0),
    (255, 255, 255),
    (0, 0, 0),
    (200, 120, 40),
    (90, 90, 90),
]


def patches() -> Image.Image:
    """Eight squares of known colours, 128 pixels wide each, in two rows of four."""
    pixels = np.array(PATCHES, np.uint8).reshape(2, 4, 3).repeat(128, axis=0).repeat(128, axis=1)
    return Image.fromarray(pixels)


def patch_colors(data: bytes) -> np.ndarray:
    """(4, 3): the middle of each patch that the central square shows: the two in the middle of each row."""
    pixels = square(data)
    return np.array([pixels[y, x] for y in (64, 192) for x in (64, 192)])


SEEN = np.array([PATCHES[1], PATCHES[2], PATCHES[5], PATCHES[6]])


def adobe_marker(transform: int) -> bytes:
    return b"\xff\xee" + struct.pack(">H5sHHHB", 14, b"Adobe", 100, 0, 0, transform)


def insert_marker(jpeg: bytes, marker: bytes) -> bytes:
    return jpeg[:2] + marker + jpeg[2:]


def without_adobe(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 16 :]


def inks(image: Image.Image) -> np.ndarray:
    """(H, W, 4) uint8 C, M, Y, K, 255 for full ink, with half of the black taken out of the colours."""
    colors = 255 - np.asarray(image).astype(np.float64)
    black = colors.min(axis=2, keepdims=True) / 2
    return np.dstack([(colors - black) / (255 - black) * 255, black]).round().astype(np.uint8)


def save_planes(planes: np.ndarray, **options) -> bytes:
    """Four planes as they are, in a JPEG whose Adobe marker says CMYK (Pillow's writer inverts what it is given)."""
    image = Image.frombytes("CMYK", planes.shape[1::-1], (255 - planes).tobytes())
    return save(image, "JPEG", quality=98, subsampling=0, **options)


def test_greyscale_becomes_rgb_with_equal_channels():
    grey = picture(300, 280).convert("L")
    pixels = square(save(grey, "JPEG", quality=95))
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    assert distance(save(grey, "JPEG", quality=95), grey) < 1


@pytest.mark.parametrize("progressive", [False, True])
def test_adobe_cmyk_has_its_colours_right(progressive):
    data = save_planes(255 - inks(patches()), progressive=progressive)
    assert b"Adobe" in data
    assert np.abs(patch_colors(data) - SEEN).max() <= 4


def test_cmyk_without_adobes_marker_is_ink():
    data = without_adobe(save_planes(inks(patches())))
    assert b"Adobe" not in data
    assert np.abs(patch_colors(data) - SEEN).max() <= 4


def test_adobe_ycck_has_its_colours_right():
    # Photoshop's YCCK holds inverted K, and inverted C, M, Y converted as if they were R, G, B: as libjpeg undoes it,
    # Y, Cb, Cr of (255 - C', 255 - M', 255 - Y') with C' the inverted ink.
    inverted = 255 - inks(patches())
    ycc = np.asarray(Image.fromarray(255 - inverted[..., :3]).convert("YCbCr"))
    data = save_planes(np.dstack([ycc, inverted[..., 3]]))
    at = data.index(b"\xff\xee")
    data = data[:at] + adobe_marker(2) + data[at + 16 :]
    assert np.abs(patch_colors(data) - SEEN).max() <= 5


def test_pillow_and_we_agree_on_cmyk_to_a_grey_level():
    data = save(patches().convert("CMYK"), "JPEG", quality=98, subsampling=0)
    assert np.abs(decode(data).pixels.astype(int) - pixels_of(data)).max() <= 1


def test_a_large_cmyk_jpeg_is_decoded_at_a_fraction_too():
    data = save(patches().resize((2048, 1024), Image.Resampling.NEAREST).convert("CMYK"), "JPEG", quality=95)
    assert decode(data).divisor == 2
    assert np.abs(patch_colors(data) - SEEN).max() <= 6


def test_rgb_jpegs_are_not_taken_for_ycc():
    data = save(patches(), "JPEG", quality=95, keep_rgb=True)
    assert np.abs(patch_colors(data) - SEEN).max() <= 3


def test_progressive_and_restart_markers_change_nothing():
    image = noise(400, 300)
    usual = prepare_raw(save(image, "JPEG", quality=95))
    for options in ({"progressive": True}, {"restart_marker_blocks": 3}, {"optimize": True}):
        assert prepare_raw(save(image, "JPEG", quality=95, **options)) == usual


@pytest.mark.parametrize("data", [ARITHMETIC, ARITHMETIC_PROGRESSIVE, LOSSLESS], ids=["arithmetic", "both", "lossless"])
def test_rare_codings_are_read(data):
    y, x = np.mgrid[:16, :16]
    expected = np.stack([16 * x, 16 * y, 255 - 8 * x - 8 * y], axis=2)
    decoded = decode(data)
    assert decoded.repair is None
    assert np.abs(decoded.pixels - expected).mean() < 1.2


def test_12_bits_are_a_failure_that_says_so():
    with pytest.raises(BadImage, match="precision 12"):
        decode(TWELVE_BITS)


@pytest.mark.parametrize("factors", [(0x22, 0x12, 0x11), (0x22, 0x21, 0x12), (0x41, 0x11, 0x21)])
def test_sampling_factors_without_a_name_are_read(factors):
    # A single unit, all blocks grey but for the first of Cb, whose mean is 64 above: 16 * 32 / 8.
    tables = [[16] * 64] * 2
    head = bytearray(save(Image.new("RGB", (16, 16)), "JPEG", qtables=tables, subsampling=0))
    frame, scan = head.index(b"\xff\xc0"), head.index(b"\xff\xda")
    blocks = [(factor >> 4) * (factor & 15) for factor in factors]
    for component, factor in enumerate(factors):
        head[frame + 11 + 3 * component] = factor
    width, height = 8 * max(factor >> 4 for factor in factors), 8 * max(factor & 15 for factor in factors)
    head[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    y, cb, cr = "001010", "111110100000" + "00", "0000"  # code of the size, the difference, end of block
    bits = y * blocks[0] + cb + "0000" * (blocks[1] - 1) + cr * blocks[2]
    bits += "1" * (-len(bits) % 8)
    data = bytes(head[: scan + 14]) + int(bits, 2).to_bytes(len(bits) // 8) + b"\xff\xd9"
    decoded = decode(data)
    assert decoded.pixels.shape == (height, width, 3) and decoded.repair is None
    first = decoded.pixels[0, 0].astype(int)
    assert np.abs(first - [128, 106, 241]).max() <= 1


def test_orientation_and_colour_profile_are_ignored():
    image = picture(400, 300)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(image, "JPEG", exif=exif, icc_profile=b"not a profile" * 9)
    assert prepare_raw(turned) == prepare_raw(save(image, "JPEG"))


def test_a_thumbnail_inside_is_not_the_picture():
    thumbnail = save(noise(64, 64), "JPEG")
    marker = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    data = save(picture(300, 300), "JPEG")
    assert prepare_raw(insert_marker(data, marker)) == prepare_raw(data)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_other_formats_are_read_by_their_content(kind):
    assert distance(save(picture(300, 270), kind), picture(300, 270)) < (12 if kind == "GIF" else 3)


def test_lossless_formats_of_the_same_pixels_give_the_same_bytes():
    image = noise(280, 300)
    assert len({prepare_raw(save(image, kind)) for kind in ("PNG", "BMP", "TIFF")}) == 1


def test_transparency_is_dropped():
    image = picture(300, 270)
    hidden = image.copy()
    hidden.putalpha(Image.linear_gradient("L").resize(image.size))
    assert distance(save(hidden, "PNG"), image) < 1
    assert distance(save(hidden.convert("LA"), "PNG"), image.convert("L")) < 1


@pytest.mark.parametrize("transparency", [3, bytes(range(16))], ids=["one", "graded"])
def test_a_palette_with_a_transparent_colour_keeps_its_colours(transparency):
    image = picture(300, 270).quantize(16)
    assert distance(save(image, "PNG", transparency=transparency), image) < 1


def test_black_and_white_is_filtered_and_not_sampled():
    checker = Image.fromarray((np.indices((512, 512)).sum(axis=0) % 2).astype(bool))
    pixels = square(save(checker, "PNG"))
    assert checker.mode == "1" and np.abs(pixels[8:-8, 8:-8] - 127.5).max() < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
    pixels = square(save(Image.fromarray(np.tile(ramp, (256, 1))), kind))
    assert np.abs(pixels[..., 0] - np.tile(ramp / 257, (256, 1))).max() <= 0.5


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_16_bit_colour_is_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(">u2")
    row = b"\0" + np.stack([ramp, ramp[::-1], ramp], axis=1).tobytes()
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 256, 256, 16, 2, 0, 0, 0))
    pixels = square(png + chunk(b"IDAT", zlib.compress(row * 256)) + chunk(b"IEND", b""))
    grey = np.arange(256)
    assert np.abs(pixels[0] - np.stack([grey, grey[::-1], grey], axis=1)).max() <= 1


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (300, 300), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        data = save(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(square(data) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 5000), (5000, 1)], ids=str)
def test_tiny_and_thin_images_are_enlarged(kind, size):
    pixels = square(save(Image.new("RGB", size, (9, 200, 77)), kind))
    assert pixels.shape == (SIDE, SIDE, 3) and np.abs(pixels - [9, 200, 77]).max() <= 2
