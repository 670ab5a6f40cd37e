"""The GPU's way of preparing, made with the codec's CPU backend; and, where there is one, on a real device."""

import numpy as np
import pytest

from pipeline.images.decode import BadImage
from tests.docs.pictures import SIDE, noise, picture, pixels_of, psnr, save
from tools.sharding import gpucodec
from tools.sharding.gpucodec import GpuPreparer, is_in_order
from tools.sharding.hostcodec import Encoding, Prepared
from tools.sharding.preparer import make_preparer

# Rounding once instead of twice moves a pixel by a grey level; a JPEG of both, or a picture that the CPU decoded at a
# fraction, more. Seen on 400 photographs: 55.6 dB raw and 42.6 dB as JPEG in the median, 42.5 and 36.4 in the worst.
RAW_DB, RAW_FRACTION_DB, JPEG_DB = 48, 40, 36


def frames(contents: list[bytes], encoding: Encoding) -> list[np.ndarray]:
    if encoding == "jpeg":
        return [pixels_of(content) for content in contents]
    return [np.frombuffer(content, np.uint8).reshape(SIDE, SIDE, 3) for content in contents]


def in_order() -> list[bytes]:
    """JPEGs that the GPU is given: usual, greyscale, progressive, tall, wide, tiny, large."""
    return [
        save(picture(500, 375, 1), "JPEG", quality=92),
        save(picture(300, 400, 2).convert("L"), "JPEG", quality=92),
        save(picture(300, 333, 3), "JPEG", quality=92, progressive=True),
        save(picture(100, 900, 4), "JPEG", quality=92),
        save(picture(900, 100, 5), "JPEG", quality=92),
        save(picture(20, 30, 6), "JPEG", quality=92),
        save(picture(1000, 800, 7), "JPEG", quality=92),
    ]


def odd() -> list[bytes]:
    """What only the CPU reads: other formats, colours and anything to be mended."""
    usual = save(picture(300, 280), "JPEG")
    at = usual.index(b"\xff\xdb")
    return [
        save(picture(300, 280), "PNG"),
        save(picture(300, 280).convert("CMYK"), "JPEG"),
        save(picture(300, 280), "JPEG", keep_rgb=True),
        usual[:-2],
        usual[:at] + b"\0\0\0" + usual[at:],
        save(picture(300, 280), "JPEG", progressive=True)[:-2],
    ]


BAD = [b"", b"no picture", save(noise(300, 280), "JPEG")[:9000], save(noise(300, 280), "PNG")[:9000]]


def compare(preparer: GpuPreparer, encoding: Encoding) -> list[float]:
    """Every result of a mixed batch against the CPU's, in order; returns by how many dB the codec's pass."""
    spare_db = []
    ordinary, strange = in_order(), odd()
    batch = [BAD[0], *ordinary[:4], *BAD[1:], *strange, *ordinary[4:]]
    on_cpu = make_preparer(device="cpu", encoding=encoding, quality=90)(batch)
    results = preparer(batch)
    assert len(results) == len(batch)
    for data, here, there in zip(batch, on_cpu, results, strict=True):
        if isinstance(here, BadImage):
            assert isinstance(there, BadImage) and there.args == here.args
        elif not is_in_order(data):
            assert there == here
        else:
            assert isinstance(there, Prepared) and there.repair is None
            one, other = frames([here.content, there.content], encoding)
            tolerance = JPEG_DB if encoding == "jpeg" else RAW_FRACTION_DB if data == ordinary[-1] else RAW_DB
            spare_db.append(psnr(one, other) - tolerance)
    return spare_db


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_with_the_codecs_cpu_backend_a_mixed_batch_gives_what_the_cpu_gives(monkeypatch, encoding):
    alone: list[bytes] = []
    usual = gpucodec.try_prepare

    def noting(data: bytes, **options) -> Prepared | BadImage:
        alone.append(data)
        return usual(data, **options)

    monkeypatch.setattr(gpucodec, "try_prepare", noting)
    assert min(compare(GpuPreparer(encoding=encoding, quality=90, on_host=True), encoding)) >= 0
    assert sorted(alone) == sorted([*BAD, *odd()])  # all others went through the codec


def test_on_photographs_both_ways_agree(real_images):
    paths = sorted((real_images / "imagenet-sample/train").glob("*/*"))[::20]
    contents = [path.read_bytes() for path in paths]
    here = make_preparer(device="cpu", encoding="raw", quality=90)(contents)
    there = GpuPreparer(encoding="raw", quality=90, on_host=True)(contents)
    pixels = [frames([result.content for result in results], "raw") for results in (here, there)]
    decibels = [psnr(one, other) for one, other in zip(*pixels, strict=True)]
    assert min(decibels) >= RAW_FRACTION_DB and np.median(decibels) >= 54


def test_a_picture_too_large_for_the_devices_filter_goes_to_the_cpu(monkeypatch):
    monkeypatch.setattr(gpucodec, "LARGEST_SCALE", 2.0)  # 500x375 has 1.5 pixels an output, 1000x800 has 3.1
    alone: list[bytes] = []
    usual = gpucodec.try_prepare
    monkeypatch.setattr(gpucodec, "try_prepare", lambda data, **options: alone.append(data) or usual(data, **options))
    contents = in_order()
    results = GpuPreparer(encoding="jpeg", quality=90, on_host=True)(contents)
    assert alone == [contents[-1]] and all(isinstance(result, Prepared) for result in results)


def test_what_the_codec_gives_back_undone_goes_to_the_cpu(monkeypatch):
    preparer = GpuPreparer(encoding="jpeg", quality=90, on_host=True)
    contents = in_order()[:4]
    all_done = preparer(contents)
    decoder, encoder = preparer._decoder, preparer._encoder

    class Refusing:
        """Decodes all but the second image, encodes all but the last."""

        def decode(self, sources, **options):
            images = decoder.decode(sources, **options)
            return [images[0], None, *images[2:]]

        def encode(self, images, **options):
            return [*encoder.encode(images, **options)[:-1], None]

    monkeypatch.setattr(preparer, "_decoder", Refusing())
    monkeypatch.setattr(preparer, "_encoder", Refusing())
    on_cpu = make_preparer(device="cpu", encoding="jpeg", quality=90)(contents)
    assert preparer(contents) == [all_done[0], on_cpu[1], all_done[2], on_cpu[3]]
    assert all_done[1] != on_cpu[1] and all_done[3] != on_cpu[3]


def test_an_empty_batch_is_no_work():
    assert GpuPreparer(encoding="jpeg", quality=90, on_host=True)([]) == []


def test_the_gpu_is_given_files_that_are_in_order_and_no_others():
    assert all(map(is_in_order, in_order()))
    assert not any(map(is_in_order, [*odd(), *BAD]))
    usual = save(noise(64, 64), "JPEG")
    at = usual.index(b"\xff\xc0") + 4
    for place, change in ((at, b"\x0c"), (at + 1, b"\xff\x00\xff\x00")):  # 12 bits; too many pixels
        assert not is_in_order(usual[:place] + change + usual[place + len(change) :])


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_on_a_gpu_a_mixed_batch_gives_what_the_cpu_gives(encoding):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    assert min(compare(make_preparer(device="gpu", encoding=encoding, quality=90), encoding)) >= 0
