"""Decoding on the host: every way to the bits of a full decode by Pillow, and a name for what cannot be decoded."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline.assemble import run_ahead
from pipeline.finish import Transform, Views
from pipeline.hostfinish import CpuFinisher
from pipeline.hostpixels import decode_into

from pipeline import kernel
from pipeline.common.errors import UserError
from tests.pipeline.loading import list_images, record

NUM_IMAGES = 4


class Encoded:
    """A JPEG as DALI hands it over."""

    def __init__(self, data: bytes) -> None:
        self._array = np.frombuffer(data, np.uint8)

    def data_ptr(self) -> int:
        return self._array.ctypes.data

    def shape(self) -> list[int]:
        return [len(self._array)]


def make_jpeg(side=256, seed=0, mode="RGB", **options) -> bytes:
    """Smooth colours under noise, so that upsampling and every coefficient matter."""
    y, x = np.mgrid[:side, :side] / side
    smooth = 255 * np.stack([y, x, (np.sin(9 * x * y) + 1) / 2], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 20, (side, side, 3))
    image = Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def decode_with_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(scope="module")
def compiled():
    found = kernel.load_kernel()
    if found is None or found.decode is None:
        pytest.skip("no C compiler, or no headers of libjpeg-turbo")
    return found


@pytest.fixture(scope="module")
def views() -> Views:
    """Every row offset and every column offset, upright and mirrored, of the images in turns."""
    offset = torch.tensor([(k, (7 * k) % 33) for k in range(33)] * 2)
    flip = torch.tensor([0] * 33 + [1] * 33)
    shift = torch.from_numpy(np.random.default_rng(4).normal(0, 20, (66, 3)).astype(np.float32))
    return Views(torch.arange(66), offset, flip, shift)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"mode": "L"}], ids=str)
def test_the_codec_gives_the_bits_of_pillow(options):
    data = make_jpeg(**options)
    image = np.empty((256, 256, 3), np.uint8)
    decode_into(np.frombuffer(data, np.uint8), image)
    assert np.array_equal(image, decode_with_pillow(data))


@pytest.mark.parametrize(("dtype", "layout"), [*itertools.product(["float32", "uint8"], ["NCHW", "NHWC"])])
@pytest.mark.parametrize("mean", ["image", "channel"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"mode": "L"}], ids=str)
def test_decoding_row_by_row_gives_the_bits_of_a_full_decode(colors, views, compiled, options, mean, dtype, layout):
    jpegs = [make_jpeg(seed=n, **options) for n in range(NUM_IMAGES)]
    images = [torch.from_numpy(decode_with_pillow(data).copy()) for data in jpegs]
    finisher = CpuFinisher(Transform(mean=mean, dtype=dtype, layout=layout), colors, 2, compiled)
    assert finisher.decodes
    encoded = [Encoded(jpegs[n % NUM_IMAGES]) for n in range(66)]
    got = finisher.begin_encoded(encoded, views, pytest.fail).result()
    expected = finisher.begin(lambda n: images[n % NUM_IMAGES], views).result()
    assert torch.equal(got, expected) and got.stride() == expected.stride()


@pytest.fixture
def stored(tmp_path):
    """Three uncompressed images, the first at byte 512: an open file, where each begins, and the pixels."""
    images = np.random.default_rng(5).integers(0, 256, (3, 256, 256, 3), np.uint8)
    path = tmp_path / "raw.tar"
    path.write_bytes(bytes(512) + images.tobytes())
    with path.open("r+b") as file:
        yield file, np.array([512 + n * images[0].nbytes for n in range(3)]), torch.from_numpy(images)


@pytest.mark.parametrize(("dtype", "layout"), [*itertools.product(["float32", "uint8"], ["NCHW", "NHWC"])])
@pytest.mark.parametrize("mean", ["image", "channel"])
def test_reading_row_by_row_gives_the_bits_of_whole_images(colors, views, compiled, stored, mean, dtype, layout):
    file, starts, images = stored
    finisher = CpuFinisher(Transform(mean=mean, dtype=dtype, layout=layout), colors, 2, compiled)
    assert finisher.reads
    files, order = np.full(66, file.fileno(), np.int32), np.arange(66) % 3
    got = finisher.begin_stored(files, starts[order], views, pytest.fail).result()
    expected = finisher.begin(lambda n: images[n % 3], views).result()
    assert torch.equal(got, expected) and got.stride() == expected.stride()


@pytest.mark.parametrize("num_missing", [None, 33 * 768, 2 * 196_608], ids=["closed", "last rows", "two images"])
def test_stored_pixels_that_cannot_be_read_are_refused_and_their_number_told(
    colors, views, compiled, stored, num_missing
):
    file, starts, _ = stored
    files = np.full(66, file.fileno(), np.int32)
    order = np.where(np.arange(66) == 17, 2, 0)
    if num_missing is None:
        files[17] = -1
    else:
        file.truncate(512 + 3 * 196_608 - num_missing)
    reason = "the file ends there" if num_missing else "Bad file descriptor"
    job = CpuFinisher(Transform(), colors, 2, compiled).begin_stored(
        files, starts[order], views, lambda n, why: UserError(f"image {n}: {why}")
    )
    with pytest.raises(UserError, match=f"image 17: {reason}"):
        job.result()


@pytest.mark.parametrize("options", [{}, {"dtype": "uint8"}, {"mean": "channel", "layout": "NHWC"}], ids=str)
def test_without_the_codecs_headers_or_a_compiler_batches_are_the_same(make_train, monkeypatch, compiled, options):
    expected = record(make_train(**options))
    compile_library = kernel.compile_library
    for without in (["decode.c"], ["decode.c", "finish.c"]):

        def compile_others(source, *flags, without=without, **options):
            return None if source.name in without else compile_library(source, *flags, **options)

        with monkeypatch.context() as patch:
            kernel.load_kernel.cache_clear()
            patch.setattr(kernel, "compile_library", compile_others)
            found = kernel.load_kernel()
            assert found is None if "finish.c" in without else found.decode is None
            assert record(make_train(**options)) == expected
    kernel.load_kernel.cache_clear()


@pytest.mark.parametrize("crops", ["centre", "ten"])
def test_evaluation_on_the_host_sees_the_pixels_that_the_graph_decodes(make_eval, crops):
    one, other = (list_images(make_eval(crops=crops, decode=decode)) for decode in ("host", "mixed"))
    assert one == other


# What cannot be decoded


def cut(data: bytes) -> bytes:
    return data[: len(data) // 3]


DAMAGES = {
    "cut": cut,
    "zeros": lambda data: bytes(len(data)),
    "other size": lambda _: make_jpeg(side=64),
    "larger": lambda _: make_jpeg(side=300),
    "nothing": lambda _: b"\xff\xd8",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_cannot_be_decoded_is_refused_and_its_number_told(colors, views, compiled, damage):
    data = make_jpeg()
    with pytest.raises(ValueError, match=r"."):
        decode_into(np.frombuffer(damage(data), np.uint8), np.empty((256, 256, 3), np.uint8))
    encoded = [Encoded(damage(data) if n == 17 else data) for n in range(66)]
    finisher = CpuFinisher(Transform(), colors, 2, compiled)
    job = finisher.begin_encoded(encoded, views, lambda n, why: UserError(f"image {n}: {why}"))
    with pytest.raises(UserError, match=r"image 17: ."):
        job.result()


@pytest.mark.parametrize("size", [64, 300])
def test_another_size_is_told(colors, views, compiled, size):
    finisher = CpuFinisher(Transform(), colors, 2, compiled)
    job = finisher.begin_encoded([Encoded(make_jpeg(side=size))] * 66, views, lambda n, why: UserError(why))
    with pytest.raises(UserError, match=f"{size}x{size} px, expected 256x256"):
        job.result()


# Running ahead


def test_running_ahead_keeps_the_order_and_begins_no_more_than_it_should():
    begun = []
    items = run_ahead((begun.append(n) or n for n in range(6)), 2)
    seen = []
    for n in items:
        seen.append(n)
        assert begun == list(range(min(6, n + 3)))
    assert seen == list(range(6))
    assert list(run_ahead(iter("ab"), 5)) == ["a", "b"] and list(run_ahead(iter("ab"), 0)) == ["a", "b"]
