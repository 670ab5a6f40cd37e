"""Damaged files: what is whole is used and said to be repaired, what is not is refused by name; bombs; random bytes."""

import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pipeline.images import decode as decoding
from pipeline.images.decode import BadImage, decode
from tests.docs.pictures import SIDE, noise, picture, pixels_of, prepare_raw, save

WHOLE = save(noise(320, 300), "JPEG", quality=90)
PROGRESSIVE = save(noise(320, 300), "JPEG", quality=90, progressive=True)
RESTARTING = save(noise(320, 300), "JPEG", quality=90, restart_marker_blocks=3)
CMYK = save(noise(320, 300).convert("CMYK"), "JPEG")
KINDS = {"baseline": WHOLE, "progressive": PROGRESSIVE, "restarts": RESTARTING, "cmyk": CMYK}
JFIF_REVISION_AT = WHOLE.index(b"JFIF\0") + 5


def scans(jpeg: bytes) -> list[int]:
    return [match.start() for match in re.finditer(b"\xff\xda", jpeg)]


def assert_repaired(data: bytes, like: bytes, text: str) -> None:
    """`data` gives the pixels of `like`, and says so."""
    result, usual = prepare_raw(data), prepare_raw(like)
    assert usual.repair is None
    assert result.content == usual.content
    assert result.repair is not None and re.search(text, result.repair), result.repair
    assert "\n" not in result.repair


@pytest.mark.parametrize("like", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("num_lost", [1, 2])
def test_a_missing_end_marker_is_supplied_and_nothing_else_changed(like, num_lost):
    assert_repaired(like[:-num_lost], like, "Premature end of JPEG file; end marker supplied$")


def test_bytes_between_header_segments_are_dropped():
    at = WHOLE.index(b"\xff\xdb")
    assert_repaired(WHOLE[:at] + b"\0\1\2" + WHOLE[at:], WHOLE, "3 extraneous bytes before marker 0xdb")
    assert_repaired(WHOLE[:at] + b"\xff\0\7" + WHOLE[at:-2], WHOLE, "3 bytes between segments dropped; end marker")


def test_bytes_left_over_before_the_end_marker_are_dropped():
    # libjpeg has read a few of them ahead and counts the rest.
    for extra in (b"\0" * 12, b"\x55" * decoding.MAX_EXTRANEOUS_BYTES):
        assert_repaired(WHOLE[:-2] + extra + b"\xff\xd9", WHOLE, r"^Corrupt.* \d+ extraneous bytes before marker 0xd9$")
    text = r"Premature end.*; Corrupt.* \d+ extraneous bytes before marker 0xd9; end marker supplied"
    assert_repaired(WHOLE[:-2] + b"\0" * 12, WHOLE, text)


def test_more_left_over_than_that_is_a_scan_out_of_step():
    extra = b"\x55" * (decoding.MAX_EXTRANEOUS_BYTES + 9)
    with pytest.raises(BadImage, match=r"10\d\d extraneous bytes before marker 0xd9 \(ValueError\)"):
        decode(WHOLE[:-2] + extra + b"\xff\xd9")


def test_parameters_that_every_decoder_ignores_are_put_right():
    revision = bytearray(WHOLE)
    revision[JFIF_REVISION_AT] = 9
    assert_repaired(bytes(revision), WHOLE, "unknown JFIF revision number 9.01; JFIF revision 9 read as 1")
    scan = bytearray(WHOLE)
    scan[scans(WHOLE)[0] + 12] = 10  # last coefficient of a baseline scan, always 63
    assert_repaired(bytes(scan), WHOLE, "Invalid SOS parameters")
    adobe = b"\xff\xee" + struct.pack(">H5sHHHB", 14, b"Adobe", 100, 0, 0, 7)
    at = WHOLE.index(b"\xff\xdb")
    assert_repaired(WHOLE[:2] + adobe + WHOLE[at:], WHOLE, "Unknown Adobe color transform code 7")


def test_what_follows_the_picture_is_of_no_account():
    for trailing in (b"\0garbage" * 100, save(noise(8, 8), "JPEG"), b"\xff" * 9):
        assert prepare_raw(WHOLE + trailing) == prepare_raw(WHOLE)


@pytest.mark.parametrize("like", [WHOLE, PROGRESSIVE], ids=["baseline", "progressive"])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9", b"\0" * 5000 + b"\xff\xd9"], ids=["cut", "end marker", "zeros"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.999])
def test_a_scan_cut_short_is_a_failure_whatever_was_put_behind(like, end, share):
    with pytest.raises(BadImage):
        decode(like[: int(len(like) * share)] + end)


def test_a_cmyk_scan_cut_short_is_a_failure():
    with pytest.raises(BadImage, match="premature end of data segment"):
        decode(CMYK[: len(CMYK) // 2] + b"\xff\xd9")


def test_progressive_scans_that_were_never_sent_are_noticed():
    at = [PROGRESSIVE.rindex(b"\xff\xc4", 0, scan) for scan in scans(PROGRESSIVE)[1:]]  # tables come before each scan
    with pytest.raises(BadImage, match=r"scans are missing.*\(MissingScans\)"):
        decode(PROGRESSIVE[: at[1]] + b"\xff\xd9")
    with pytest.raises(BadImage, match="Premature end"):
        decode(PROGRESSIVE[: at[-1]])
    # All there but for the lowest bits of Y: a picture, only not as good as it was, and libjpeg has no warning for it.
    result = decode(PROGRESSIVE[: at[-1]] + b"\xff\xd9")
    assert result.repair == "progressive scans are missing: the lowest bits were not sent"
    assert 0 < np.abs(result.pixels.astype(int) - pixels_of(PROGRESSIVE)).mean() < 12


def test_a_component_that_was_never_sent_is_noticed_in_a_sequential_file_too():
    # A greyscale file that declares two components more, for which no scan comes.
    grey = save(noise(64, 64).convert("L"), "JPEG")
    at = grey.index(b"\xff\xc0")
    frame = bytearray(grey[at : at + 13]) + b"\2\x11\0\3\x11\0"
    frame[3], frame[9] = frame[3] + 6, 3
    data = grey[:at] + bytes(frame) + grey[at + 13 :]
    with pytest.raises(BadImage, match=r"not every component was sent \(MissingScans\)"):
        decode(data)


def test_fill_bytes_before_markers_are_part_of_the_format():
    at = WHOLE.index(b"\xff\xdb")
    filled = WHOLE[:at] + b"\xff" * 3 + WHOLE[at:-2] + b"\xff" * 5 + WHOLE[-2:]
    assert prepare_raw(filled) == prepare_raw(WHOLE)
    assert_repaired(filled[:-2], WHOLE, "^Premature end of JPEG file; end marker supplied$")  # nothing was dropped


def test_garbage_before_the_picture_is_not_searched_for_one():
    with pytest.raises(BadImage, match="not one of JPEG"):
        decode(b"\0\0" + WHOLE)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"not an image at all", "not one of JPEG, PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not one of JPEG, PNG"),
        (b"\xff\xd8", "the file ends before its picture begins"),
        (b"\xff\xd8\xff\xd9", "the file ends before its picture begins"),
        (WHOLE[: scans(WHOLE)[0]], "the file ends before its picture begins|Premature end"),
        (b"\x89PNG\r\n\x1a\n", "not one of|truncated"),
        (save(picture(300, 300), "PNG")[:3000], "truncated"),
        (save(picture(300, 300), "GIF")[:3000], "truncated"),
        (save(picture(300, 300), "BMP")[:3000], "truncated"),
        (save(picture(300, 300), "WEBP")[:3000], "decoder|truncated"),
        (save(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "pixel mode F is not supported"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else f"{len(value)} bytes",
)
def test_what_cannot_be_used_says_why_in_one_line(data, reason):
    seen = []
    for _ in range(2):
        with pytest.raises(BadImage, match=reason) as caught:
            prepare_raw(data)
        seen.append(str(caught.value))
    assert caught.value.reason and caught.value.exception.isidentifier()
    assert "\n" not in seen[0] and "0x7" not in seen[0]
    assert seen[0] == seen[1]


def patch_size(jpeg: bytes, height: int, width: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def test_more_pixels_than_the_limit_are_refused_from_the_header(monkeypatch):
    def fail(*_arguments, **_options):
        raise AssertionError("decoded")

    png = save(picture(400, 300), "PNG")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 119_999)
    monkeypatch.setattr(decoding.simplejpeg, "decode_jpeg", fail)
    monkeypatch.setattr(Image.Image, "convert", fail)
    for data in (png, save(picture(400, 300), "JPEG"), save(picture(400, 300), "JPEG", progressive=True)):
        with pytest.raises(BadImage, match=r"400 x 300 pixels, limit 119999 \(TooManyPixels\)"):
            decode(data)
    monkeypatch.undo()
    monkeypatch.setattr(decoding, "MAX_PIXELS", 120_000)
    assert decode(png).pixels.shape == (300, 400, 3)


def test_a_jpeg_bomb_is_refused_from_its_header():
    with pytest.raises(BadImage, match=r"65000 x 65000 pixels, limit 150000000 \(TooManyPixels\)"):
        decode(patch_size(WHOLE, 65_000, 65_000))


def test_a_progressive_jpeg_of_endless_scans_is_refused_from_their_number(monkeypatch):
    last = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xc4") : -2]
    data = PROGRESSIVE[:-2] + last * 50 + b"\xff\xd9"
    monkeypatch.setattr(decoding, "MAX_SCANNED_PIXELS", 320 * 300 * 50)
    with pytest.raises(BadImage, match=r"60 scans of 320 x 300 pixels, limit 4800000 \(TooManyPixels\)"):
        decode(data)
    decode(PROGRESSIVE)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_bombs_in_other_formats_are_refused():
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(b""))
    gif = bytearray(save(picture(30, 30), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_000, 65_000)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (40 << 20), zip=True)
    for data in (png, bytes(gif), save(picture(30, 30), "PNG", pnginfo=text)):
        assert len(data) < 100_000
        with pytest.raises(BadImage, match=r"limit|too large"):
            decode(data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_give_an_image_or_a_bad_image_and_nothing_else(data):
    kind = data.draw(
        st.sampled_from(["JPEG", "JPEG", "JPEG", "PROGRESSIVE", "CMYK", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
    )
    image = picture(40, 30)
    if kind == "PROGRESSIVE":
        content = bytearray(save(image, "JPEG", progressive=True))
    else:
        content = bytearray(save(image.convert("CMYK"), "JPEG") if kind == "CMYK" else save(image, kind))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["change", "insert", "delete"])):
            case "change":
                content[at] = data.draw(st.integers(0, 255))
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 9))]
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    try:
        output = prepare_raw(bytes(content))
    except BadImage as error:
        assert error.reason and "\n" not in error.reason
        return
    assert len(output.content) == SIDE * SIDE * 3


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_behind_a_start_marker_are_no_image_and_nothing_worse(tail):
    with pytest.raises(BadImage):
        decode(b"\xff\xd8" + tail)
