"""What the tests of the CPU's operators share: shards of given samples, graphs over them, and the formula in NumPy."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from pipeline.manifest import index_header

CORNERS = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16), (5, 31), (1, 2), (30, 17)]


class Draws(NamedTuple):
    """Of N images: offset int (N, 2) as (y, x), flip int32 (N,), noise float32 (N, 3)."""

    offset: np.ndarray
    flip: np.ndarray
    noise: np.ndarray


def make_draws(num: int, seed: int = 0) -> Draws:
    """Every corner upright and mirrored, then over again, with noise of their own."""
    noise = np.random.default_rng(seed).normal(size=(num, 3)).astype(np.float32)
    offset = np.array([CORNERS[n // 2 % len(CORNERS)] for n in range(num)])
    return Draws(offset, np.arange(num, dtype=np.int32) % 2, noise)


def make_pixels(seed: int = 0, side: int = 256) -> np.ndarray:
    """Smooth colours under noise, so that upsampling and every coefficient matter."""
    y, x = np.mgrid[:side, :side] / side
    smooth = 255 * np.stack([y, x, (np.sin(9 * x * y) + 1) / 2], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 20, (side, side, 3))
    return (smooth + noise).clip(0, 255).astype(np.uint8)


def make_jpeg(seed: int = 0, side: int = 256, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(make_pixels(seed, side)).convert(mode).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def decode_with_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def write_shard(path: Path, samples: Sequence[bytes], ending: str, *, label_first: bool = False) -> Path:
    """A tar of samples 0, 1, ... with labels, and its index, as `alexnet-prep shard` lays them out."""
    rows = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, content in enumerate(samples):
            row = []
            files = [(ending, content), ("cls", b"%05d" % key)]
            for extension, data in reversed(files) if label_first else files:
                member = tarfile.TarInfo(f"{key:09d}.{extension}")
                member.size = len(data)
                row += [extension, tar.offset + tarfile.BLOCKSIZE, len(data), member.name]
                tar.addfile(member, io.BytesIO(data))
            rows.append(" ".join(map(str, row)))
    path.with_suffix(".idx").write_text("\n".join([index_header(len(rows)), *rows]) + "\n")
    return path


def make_graph(
    shard: Path,
    draws: Draws | None = None,
    *,
    batch_size: int,
    ending: str = "jpg",
    num_threads: int = 2,
    reader: dict[str, Any] | None = None,
    pipeline: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A graph of a shard in stored order; `draws` of the samples in turns, or none; `options` of the operator."""

    @pipeline_def(batch_size=batch_size, num_threads=num_threads, device_id=None, **(pipeline or {}))
    def define():
        read = fn.readers.webdataset(
            paths=[str(shard)],
            index_paths=[str(shard.with_suffix(".idx"))],
            ext=["cls" if ending == "rgb" else ending],
            dont_use_mmap=True,
            **(reader or {}),
        )
        operator = fn.alexnet.read_crop_finish if ending == "rgb" else fn.alexnet.decode_crop_finish
        return operator(read, **give(draws, batch_size), **options)

    return define()


def make_label_graph(shard: Path, **options: Any) -> Any:
    """As make_graph of a raw shard, of four samples each batch, with labels that do not come from the shard itself."""
    files = []
    for row in shard.with_suffix(".idx").read_text().splitlines()[1:]:
        _, offset, _, name = row.split()[4:]
        files.append(shard.with_name(f"{shard.name}:{offset}:{name}"))
        files[-1].write_bytes(b"00000")

    @pipeline_def(batch_size=4, num_threads=2, device_id=None)
    def define():
        label, _ = fn.readers.file(files=[str(path) for path in files])
        return fn.alexnet.read_crop_finish(label, **options)

    return define()


def give(draws: Draws | None, batch_size: int) -> dict[str, Any]:
    """Draws as arguments of an operator, a batch after the other."""
    if draws is None:
        return {}

    def cut(values: np.ndarray) -> Any:
        number = 0

        def batch() -> list[np.ndarray]:
            nonlocal number
            number += batch_size
            return [values[n % len(values)] for n in range(number - batch_size, number)]

        return fn.external_source(batch, batch=True)

    positions = (draws.offset / 32).astype(np.float32)
    return {
        "crop_pos_y": cut(positions[:, 0]),
        "crop_pos_x": cut(positions[:, 1]),
        "mirror": cut(draws.flip),
        "noise": cut(draws.noise),
    }


def run(graph: Any) -> np.ndarray:
    """The next batch, copied."""
    (out,) = graph.run()
    return np.array(out.as_array())


class Colours(NamedTuple):
    """What is added, subtracted and multiplied by: (3, 3), (3,), (224, 224, 3) and (3,), None for nothing."""

    basis: np.ndarray | None = None
    mean: np.ndarray | None = None
    mean_image: np.ndarray | None = None
    factor: np.ndarray | None = None

    def options(self, layout: str) -> dict[str, list[float]]:
        """As arguments of an operator."""
        image = self.mean_image
        if image is not None and layout == "CHW":
            image = image.transpose(2, 0, 1)
        given = {"basis": self.basis, "mean": self.mean, "mean_image": image, "factor": self.factor}
        return {name: value.ravel().tolist() for name, value in given.items() if value is not None}


def make_colours(seed: int = 1) -> Colours:
    rng = np.random.default_rng(seed)
    of = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return Colours(7 * of(3, 3), 110 + 9 * of(3), 120 + 30 * of(224, 224, 3), 1 / (60 + 5 * of(3)))


def find_bias(noise: np.ndarray, colours: Colours) -> np.ndarray:
    """float32 (N, 3), as torch computes it."""
    bias = torch.zeros(len(noise), 3)
    if colours.basis is not None:
        bias = (torch.from_numpy(noise)[:, None, :] * torch.from_numpy(colours.basis)).sum(-1)
    return (bias if colours.mean is None else bias - torch.from_numpy(colours.mean)).numpy()


def formula(pixels: Sequence[np.ndarray], draws: Draws, colours: Colours, dtype: Any, layout: str) -> np.ndarray:
    """((pixel + bias) - mean image) * factor of each image, every step rounded to float32."""
    done = []
    for image, (y, x), flip, bias in zip(
        pixels, draws.offset, draws.flip, find_bias(draws.noise, colours), strict=True
    ):
        view = image[y : y + 224, x : x + 224]
        view = view[:, ::-1] if flip else view
        if dtype == types.FLOAT:
            view = view.astype(np.float32) + bias
            view = view if colours.mean_image is None else view - colours.mean_image
            view = view if colours.factor is None else view * colours.factor
        done.append(view if layout == "HWC" else view.transpose(2, 0, 1))
    return np.stack(done)
