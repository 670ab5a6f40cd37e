"""The DALI graphs: training, centre crop, ten crops, and plain pixels. Written once, for `device="cpu"` and `"gpu"`.

The decision that shaped it: colour noise is a shift of the mean, and DALI's `crop_mirror_normalize` takes a mean per
sample, so that a training image costs two operators: a decoder that decodes only the crop, and one pass that flips,
subtracts and scales. A mean *image* is subtracted after that pass, hence after the flip, as the released source does.
Every random operator has a seed of its own, so switching one augmentation off does not change the draws of the others.
Left out: epochs, ranks, tensors and checkpoints (loader.py).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.colorstats import ORIGINAL_DIVISOR, ColorStats
from pipeline.errors import UserError
from pipeline.shardset import CLS_DIGITS, IMAGE_SIZE_PX, ShardSet

try:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import DataNode, Pipeline, pipeline_def
except ImportError as error:
    raise UserError(
        f"NVIDIA DALI cannot be imported ({error}); it needs Linux on x86-64: pip install nvidia-dali-cuda120"
    ) from error

CROP_SIZE_PX = 224
MAX_OFFSET_PX = IMAGE_SIZE_PX - CROP_SIZE_PX  # offsets 0..32: 33 of them, as the released source draws
READER = "reader"
MAX_BUFFERED_SAMPLES = 4096  # of about 25 KB each: 100 MB a rank
_TYPICAL_SAMPLE_BYTES = 32768  # what DALI reserves per buffered sample; its default of 1 MiB would be gigabytes
# Offsets (y, x) of the five views: four corners and the centre (paper, section 4.1; source: corners at 0 and 32).
FIVE_OFFSETS_PX = ((0, 0), (0, 32), (32, 0), (32, 32), (16, 16))

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Transform:
    """How a stored image becomes network input: output = (pixel + colour shift - mean) / scale.

    mean: "image" (the central 224x224 of the mean image) or "channel"; lighting: "paper", "original" (which also
    divides by 1.1) or None; crop: random offset, else the centre; flip: mirror with probability 0.5; unit_variance:
    divide by the standard deviation of each channel; dtype: "float32" or "float16"; layout: "NCHW" or "NHWC" in memory.
    """

    mean: str = "image"
    lighting: str | None = "paper"
    crop: bool = True
    flip: bool = True
    unit_variance: bool = False
    dtype: str = "float32"
    layout: str = "NCHW"

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[object, ...]] = {
            "mean": ("image", "channel"),
            "lighting": ("paper", "original", None),
            "dtype": ("float32", "float16"),
            "layout": ("NCHW", "NHWC"),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise UserError(f"{field} is {getattr(self, field)!r}, expected one of {', '.join(map(str, values))}")


@dataclass(frozen=True)
class Feed:
    """Which samples a pipeline reads, and on what: split, local batch size, this rank's part, device, threads."""

    split: str
    batch_size: int
    rank: int
    world_size: int
    device: Device
    device_id: int | None
    num_threads: int
    seed: int = 0
    prefetch_batches: int = 2


def stream_seed(seed: int, *names: object) -> int:
    """A 31-bit seed for one random stream, a function of the run's seed and the stream's names."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def train_pipeline(
    shards: ShardSet,
    colors: ColorStats,
    transform: Transform,
    feed: Feed,
    *,
    with_draws: bool = False,
    checkpoint: bytes | None = None,
) -> Pipeline:
    """Shuffled, augmented training batches, with checkpointing; from `checkpoint` on, where one is given.

    Outputs: images float (3, 224, 224) or (224, 224, 3), labels int64 (); with `with_draws` also the random draws:
    offset int32 (2,) as (y, x), flip int32 (), shift float32 (3,) in grey levels, and source, uint8 text naming the
    sample (zero-padded).
    """

    def seed_of(stream: str) -> int:
        return stream_seed(feed.seed, stream, feed.rank)

    def define() -> tuple[DataNode, ...]:
        num_local = shards.num_samples(feed.split) // feed.world_size
        jpegs, labels, source = _read(
            shards,
            feed,
            random_shuffle=True,
            initial_fill=max(1, min(MAX_BUFFERED_SAMPLES, num_local)),
            shuffle_after_epoch=True,
            shuffle_after_epoch_seed=stream_seed(feed.seed, "shards"),  # the one stream that ranks share
            seed=seed_of("buffer"),
        )
        y = x = _constant(np.array(0.5))
        if transform.crop:
            # k / 32 for integer k: uniform positions would give offsets 0 and 32 half their weight
            positions = [k / MAX_OFFSET_PX for k in range(MAX_OFFSET_PX + 1)]
            y = fn.random.uniform(values=positions, seed=seed_of("crop y"))
            x = fn.random.uniform(values=positions, seed=seed_of("crop x"))
        flip = fn.random.coin_flip(seed=seed_of("flip")) if transform.flip else _constant(np.array(0, np.int32))
        shift = fn.constant(fdata=[0.0, 0.0, 0.0], shape=[3])
        if transform.lighting:
            basis = _constant(colors.lighting_basis(transform.lighting))
            shift = fn.reductions.sum(basis * fn.random.normal(shape=[3], seed=seed_of("lighting")), axes=[1])
        image = fn.decoders.image_crop(
            jpegs, crop=(CROP_SIZE_PX, CROP_SIZE_PX), crop_pos_y=y, crop_pos_x=x, **_decoder(feed.device)
        )
        divisor = ORIGINAL_DIVISOR if transform.lighting == "original" else 1.0
        outputs = [_normalise(image, colors, transform, feed.device, divisor, shift=shift, mirror=flip), labels]
        if with_draws:
            offset = fn.cast(fn.stack(y, x) * MAX_OFFSET_PX, dtype=types.INT32)  # whole numbers already
            outputs += [offset, flip, shift, fn.pad(source)]
        return tuple(_place(output, feed.device) if index < 2 else output for index, output in enumerate(outputs))

    return _build(define, feed, enable_checkpointing=True, checkpoint=checkpoint)


def eval_pipeline(shards: ShardSet, colors: ColorStats, transform: Transform, feed: Feed, *, crops: str) -> Pipeline:
    """Every sample of this rank's part once, in order: the centre crop, or ten crops (paper, section 4.1).

    Outputs: images (3, 224, 224), for crops="ten" (10, 3, 224, 224): five offsets, then their mirror images; labels.
    """

    def define() -> tuple[DataNode, ...]:
        jpegs, labels, _ = _read(shards, feed, stick_to_shard=True)
        if crops == "centre":
            size = (CROP_SIZE_PX, CROP_SIZE_PX)
            images = _normalise(
                fn.decoders.image_crop(jpegs, crop=size, **_decoder(feed.device)), colors, transform, feed.device
            )
        else:
            whole = fn.decoders.image(jpegs, **_decoder(feed.device))
            views = [
                _normalise(
                    whole,
                    colors,
                    transform,
                    feed.device,
                    mirror=mirror,
                    crop_pos_y=y / MAX_OFFSET_PX,
                    crop_pos_x=x / MAX_OFFSET_PX,
                )
                for mirror in (0, 1)
                for y, x in FIVE_OFFSETS_PX
            ]
            images = fn.stack(*views)
        return _place(images, feed.device), _place(labels, feed.device)

    return _build(define, feed)


def pixel_pipeline(shards: ShardSet, feed: Feed) -> Pipeline:
    """Every sample of this rank's part once, in order, as stored. Outputs: images uint8 (256, 256, 3) RGB, labels."""

    def define() -> tuple[DataNode, ...]:
        jpegs, labels, _ = _read(shards, feed, stick_to_shard=True)
        return fn.decoders.image(jpegs, **_decoder(feed.device)), _place(labels, feed.device)

    return _build(define, feed)


def _build(define: Callable[[], tuple[DataNode, ...]], feed: Feed, **options: Any) -> Pipeline:
    pipeline = pipeline_def(
        define,
        batch_size=feed.batch_size,
        num_threads=feed.num_threads,
        device_id=feed.device_id,
        prefetch_queue_depth=feed.prefetch_batches,
        seed=stream_seed(feed.seed, "pipeline", feed.rank),
        exec_dynamic=True,  # outputs are handed over, not copied
        **options,
    )()
    pipeline.build()
    return pipeline


def _read(shards: ShardSet, feed: Feed, **options: Any) -> tuple[DataNode, DataNode, DataNode]:
    """Encoded images uint8, labels int64 (), source text uint8, of this rank's part."""
    encoded, digits = fn.readers.webdataset(
        name=READER,
        paths=[str(path) for path in shards.tars(feed.split)],
        index_paths=[str(path) for path in shards.indices(feed.split)],
        ext=["jpg", "cls"],
        missing_component_behavior="error",
        shard_id=feed.rank,
        num_shards=feed.world_size,
        pad_last_batch=True,  # every rank takes the same number of batches; the loader drops the padding
        tensor_init_bytes=_TYPICAL_SAMPLE_BYTES,
        **options,
    )
    powers = _constant(10 ** np.arange(CLS_DIGITS - 1, -1, -1, dtype=np.int64))
    labels = fn.reductions.sum((fn.cast(digits, dtype=types.INT64) - ord("0")) * powers)
    return encoded, labels, fn.get_property(encoded, key="source_info")


def _decoder(device: Device) -> dict[str, Any]:
    # Fancy upsampling is what the CPU codec does: asked for by name, so that the GPU's agrees with it.
    return {
        "device": "mixed" if device == "gpu" else "cpu",
        "output_type": types.RGB,
        "jpeg_fancy_upsampling": True,
        "adjust_orientation": False,
    }


def _normalise(
    image: DataNode,
    colors: ColorStats,
    transform: Transform,
    device: Device,
    divisor: float = 1.0,
    *,
    shift: DataNode | None = None,
    mirror: DataNode | int = 0,
    **crop_position: float,
) -> DataNode:
    """(pixel + shift - mean) / scale for the 224x224 crop at `crop_position` (default: the centre)."""
    scale = divisor * (colors.std.clip(min=1.0) if transform.unit_variance else np.ones(3))
    mean = colors.mean if transform.mean == "channel" else np.zeros(3)
    dtype = types.FLOAT16 if transform.dtype == "float16" else types.FLOAT
    with_image = transform.mean == "image"
    output = fn.crop_mirror_normalize(
        image,
        device=device,
        crop=(CROP_SIZE_PX, CROP_SIZE_PX),
        mean=mean.tolist() if shift is None else _constant(mean) - shift,
        std=scale.tolist(),
        mirror=mirror,
        dtype=types.FLOAT if with_image else dtype,
        output_layout=transform.layout[1:],
        **crop_position,
    )
    if with_image:
        output = output - _constant(_central(colors.mean_image, transform.layout, scale), device)
        if dtype != types.FLOAT:
            output = fn.cast(output, dtype=dtype)
    return output


def _central(mean_image: NDArray[np.float32], layout: str, scale: NDArray[np.float64]) -> NDArray[np.float32]:
    """The centre of the mean image (source: this part is subtracted from every crop, wherever the crop lies)."""
    edge = MAX_OFFSET_PX // 2
    centre = (mean_image[edge : edge + CROP_SIZE_PX, edge : edge + CROP_SIZE_PX] / scale).astype(np.float32)
    return np.ascontiguousarray(centre.transpose(2, 0, 1)) if layout == "NCHW" else centre


def _constant(value: NDArray[Any], device: Device = "cpu") -> DataNode:
    array = value.astype(np.float32) if value.dtype == np.float64 else value
    return types.Constant(array, device=device)


def _place(node: DataNode, device: Device) -> DataNode:
    return node.gpu() if device == "gpu" else node
