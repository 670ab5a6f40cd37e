"""The contestants of feed.py that finish their pixels with one kernel in numba, which they share: FFCV, and decoding by
hand."""
# mypy: disable-error-code="import-not-found,import-untyped"

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness.samples import BATCH, CROP_PX, LONG_EPOCH, MAX_OFFSET_PX, SIZE_PX, Batches, Job, Samples, rng, rotate


def compile_kernel() -> Callable[..., None]:
    """Stored pixels (256, 256, 3) -> cropped, mirrored, shifted float32 planes: the fastest of the forms that were
    tried in numba, a line at a time by way of the cache."""
    import numba

    @numba.njit(nogil=True, fastmath=True)
    def finish(pixels: Any, y: int, x: int, flip: bool, shift: Any, out: Any) -> None:
        line = np.empty((3, CROP_PX), np.float32)
        for row in range(CROP_PX):
            stored = pixels[y + row].reshape(-1)[3 * x : 3 * (x + CROP_PX)]
            for channel in range(3):
                less = shift[channel]
                for column in range(CROP_PX):
                    line[channel, column] = np.float32(stored[3 * column + channel]) - less
            for channel in range(3):
                if flip:
                    for column in range(CROP_PX):
                        out[channel, row, column] = line[channel, CROP_PX - 1 - column]
                else:
                    for column in range(CROP_PX):
                        out[channel, row, column] = line[channel, column]

    return finish


def ffcv(job: Job, mode: str) -> Batches:
    """mode "jpg" (the stored bytes as they are) or "raw"; one numba operation crops, mirrors, shifts and transposes."""
    from dataclasses import replace

    import torch
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.transforms import ToTensor
    from ffcv.writer import DatasetWriter

    encode = RGBImageField.encode

    def encode_as_stored(self: Any, destination: Any, image: Any, malloc: Any) -> None:
        if mode == "raw":
            return encode(self, destination, image, malloc)
        destination["mode"], destination["height"], destination["width"] = 0, SIZE_PX, SIZE_PX
        destination["data_ptr"], storage = malloc(len(image))
        storage[:] = image
        return None

    def convert(path: Path) -> None:
        RGBImageField.encode = encode_as_stored
        writer = DatasetWriter(
            str(path), {"image": RGBImageField(write_mode=mode), "label": IntField()}, num_workers=job.workers
        )
        writer.from_indexed_dataset(_Indexed(job.samples, mode))

    path = job.converted(f"{mode}.beton", convert)
    mean, basis, kernel = job.mean, job.basis, compile_kernel()

    class Finish(Operation):
        def generate_code(self) -> Callable[..., Any]:
            my_range = Compiler.get_iterator()

            def finish(images: Any, out: Any) -> Any:
                for i in my_range(images.shape[0]):
                    y, x = np.random.randint(0, MAX_OFFSET_PX + 1), np.random.randint(0, MAX_OFFSET_PX + 1)
                    flip = np.random.rand() < 0.5
                    a, b, c = np.random.normal(), np.random.normal(), np.random.normal()
                    shift = np.empty(3, np.float32)
                    for channel in range(3):
                        light = basis[channel, 0] * a + basis[channel, 1] * b + basis[channel, 2] * c
                        shift[channel] = mean[channel] - light
                    kernel(images[i], y, x, flip, shift, out[i])
                return out[: images.shape[0]]

            finish.is_parallel = True  # type: ignore[attr-defined]
            return finish

        def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
            shape, dtype = (3, CROP_PX, CROP_PX), np.dtype("float32")
            return replace(previous_state, shape=shape, dtype=dtype, jit_mode=True), AllocationQuery(shape, dtype)

    loader = Loader(
        str(path),
        batch_size=BATCH,
        num_workers=job.workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(len(job.samples)), max(1, LONG_EPOCH // len(job.samples))),
        batches_ahead=3,
        drop_last=True,
        pipelines={
            "image": [SimpleRGBImageDecoder(), Finish(), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    torch.set_num_threads(1)
    while True:
        yield from loader


class _Indexed:
    """(bytes or pixels, label) by number: what FFCV's writer reads from."""

    def __init__(self, samples: Samples, mode: str) -> None:
        self._samples, self._mode = samples, mode

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self._samples.raw[index] if self._mode == "raw" else self._samples.view(index)
        return np.array(image), int(self._samples.labels[index])


def by_hand(job: Job, kind: str) -> Batches:
    """simplejpeg (or raw pixels) and one numba kernel in threads, into buffers that go round."""
    if kind == "jpeg":
        import simplejpeg

    finish = compile_kernel()
    samples, buffers = job.samples, threading.local()

    def work(indices: Any, out: Any) -> None:
        if not hasattr(buffers, "pixels"):
            buffers.pixels = np.empty((SIZE_PX, SIZE_PX, 3), np.uint8)
        generator = rng()
        offsets = generator.integers(0, MAX_OFFSET_PX + 1, (len(indices), 2))
        flips = generator.random(len(indices)) < 0.5
        shifts = job.mean - generator.standard_normal((len(indices), 3), np.float32) @ job.basis.T
        for i, index in enumerate(indices):
            if kind == "jpeg":
                pixels = simplejpeg.decode_jpeg(samples.view(index), "RGB", buffer=buffers.pixels)
            else:
                pixels = samples.raw[index]
            finish(pixels, offsets[i, 0], offsets[i, 1], flips[i], shifts[i], out[i])

    yield from rotate(job, work, (3, CROP_PX, CROP_PX), np.float32)
