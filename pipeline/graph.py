"""The DALI graphs, whole: training, centre crop, ten crops, plain pixels. The paper's section 4.1 is here.

    readers.webdataset -> decode the crop's region -> flip, (pixel - (mean - lighting)) / scale, type, layout

`device` and `decode` choose the devices of these operators and nothing else: what the CPU tests is what a GPU runs. On
the CPU the two last steps are one operator of our own where it can be compiled (operators/), else DALI's.
"""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.manifest import CLS_DIGITS, ENDINGS, IMAGE_SIZE_PX, KEY_DIGITS
from pipeline.operators import load_operators
from pipeline.options import (
    CROP_SIZE_PX,
    FIVE_OFFSETS_PX,
    MAX_OFFSET_PX,
    Constants,
    Crops,
    GraphSpec,
    Transform,
    stream_seed,
)
from pipeline.shards import ShardSet, check_index, check_raw, find_damage

try:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import DataNode, Pipeline, pipeline_def
except ImportError as error:
    raise UserError(
        f"NVIDIA DALI cannot be imported ({error}); it needs Linux on x86-64: pip install nvidia-dali-cuda120"
    ) from error

# Changed with every change to the operators that draw or read: a state of another graph cannot be gone on with.
GRAPH_VERSION = 6
NUMBERS = ("label", "key")  # what every graph gives besides images
DRAWS = ("y", "x", "flip", "noise")  # and a training graph besides those
MAX_BUFFERED_SAMPLES = 4096  # of about 25 KB each: 100 MB a rank
_TYPICAL_SAMPLE_BYTES = 32768  # what DALI reserves per buffered sample; its default of 1 MiB would be gigabytes
_OTHER_OPEN_FILES = 64  # libraries, logs, and what a shell hands on
_TYPES = {"float32": types.FLOAT, "float16": types.FLOAT16, "uint8": types.UINT8}


class View(NamedTuple):
    """What is seen of an image: the crop's place as fractions of the room there is, mirrored or not, the lighting's
    noise (3,). Numbers for all images of a batch, or CPU nodes with one for each."""

    y: Any = 0.5
    x: Any = 0.5
    flip: Any = 0
    noise: DataNode | None = None


def train_graph(
    shards: ShardSet, colors: ColorStats, transform: Transform, spec: GraphSpec, *, checkpoint: bytes | None = None
) -> Pipeline:
    """Shuffled training samples, augmented; with checkpointing, and from `checkpoint` on where one is given.

    Outputs: images on spec.device, (3, 224, 224) or (224, 224, 3), of the transform's type and size; label and key,
    ASCII digits uint8 (5,) and (9,); and the draws: y and x, float32 (); flip int32 (); noise float32 (3,).
    """

    num_buffered, constants = count_buffered(shards, spec), transform.constants(colors)

    def seed_of(stream: str) -> int:  # of each operator its own: switching one off leaves the draws of the others
        return stream_seed(spec.seed, stream, spec.rank)

    def define() -> tuple[DataNode, ...]:
        stored, label, key = _read(
            shards,
            spec,
            random_shuffle=True,
            initial_fill=num_buffered,
            shuffle_after_epoch=True,
            shuffle_after_epoch_seed=stream_seed(spec.seed, "shards"),  # the one stream that ranks share
            seed=seed_of("buffer"),
        )
        y = x = _constant(0.5)
        if transform.crop:
            # k / 32 for integer k: uniform positions would give offsets 0 and 32 half their weight
            positions = [k / MAX_OFFSET_PX for k in range(MAX_OFFSET_PX + 1)]
            y = fn.random.uniform(values=positions, seed=seed_of("crop y"))
            x = fn.random.uniform(values=positions, seed=seed_of("crop x"))
        flip = (
            fn.random.coin_flip(seed=seed_of("flip")) if transform.flip else types.Constant(np.int32(0), device="cpu")
        )
        noise = _constant(np.zeros(3))
        if transform.lighting:
            noise = fn.random.normal(shape=[3], seed=seed_of("lighting"))
        view = View(y, x, flip, noise if transform.lighting else None)
        images = _decode_and_finish(stored, view, transform, constants, spec)
        return images, label, key, y, x, flip, noise

    return _build(define, shards, spec, enable_checkpointing=True, checkpoint=checkpoint)


def eval_graph(
    shards: ShardSet, colors: ColorStats, transform: Transform, spec: GraphSpec, crops: Crops = "centre"
) -> Pipeline:
    """Every sample of this rank's part once, in order. Outputs: images, label, key, as for training; of "ten" crops
    (10, 3, 224, 224) or (10, 224, 224, 3): four corners and the centre, then their mirror images."""
    constants = transform.constants(colors)

    def define() -> tuple[DataNode, ...]:
        stored, label, key = _read(shards, spec, stick_to_shard=True)
        if crops == "centre":
            view = View()
            return _decode_and_finish(stored, view, transform, constants, spec), label, key
        whole = _decode(stored, None, spec)
        views = [
            _finish(_crop(whole, view), view, transform, constants, spec)
            for view in (
                View(y / MAX_OFFSET_PX, x / MAX_OFFSET_PX, flip) for flip in (0, 1) for y, x in FIVE_OFFSETS_PX
            )
        ]
        return fn.stack(*views), label, key

    return _build(define, shards, spec)


def pixel_graph(shards: ShardSet, spec: GraphSpec) -> Pipeline:
    """Every sample of this rank's part once, in order. Outputs: the stored image uint8 (256, 256, 3), label, key."""

    def define() -> tuple[DataNode, ...]:
        stored, label, key = _read(shards, spec, stick_to_shard=True)
        return _decode(stored, None, spec), label, key

    return _build(define, shards, spec)


def has_own_operators(spec: GraphSpec) -> bool:
    """Whether the cores decode by our own operators, which refuse a damaged JPEG; DALI's take it in silence."""
    return spec.decode == "cpu" and load_operators()


def count_buffered(shards: ShardSet, spec: GraphSpec) -> int:
    """Samples in the shuffle buffer of this rank's reader."""
    return max(1, min(MAX_BUFFERED_SAMPLES, shards.num_samples(spec.split) // spec.world_size))


def _read(shards: ShardSet, spec: GraphSpec, **options: Any) -> tuple[DataNode, DataNode, DataNode]:
    """Stored images uint8 (bytes,), and the digits of label and key, of this rank's part.

    Raw pixels are left in their tars where our own operator reads them by the place of their label: the reader would
    copy them, and its shuffle buffer hold them.
    """
    ending, by_label = ENDINGS[spec.encoding], spec.encoding == "raw" and has_own_operators(spec)
    _allow_open_files(shards.root, len(shards.tars(spec.split)) * (2 if by_label else 1))
    read = fn.readers.webdataset(
        name="reader",
        paths=[str(path) for path in shards.tars(spec.split)],
        index_paths=[str(path) for path in shards.indices(spec.split)],
        ext=["cls"] if by_label else [ending, "cls"],
        missing_component_behavior="error",
        shard_id=spec.rank,
        num_shards=spec.world_size,
        pad_last_batch=True,  # every rank takes the same number of batches; the loader drops the padding
        dont_use_mmap=True,  # a shard that is cut while mapped would kill the process; like this it is an error
        tensor_init_bytes=CLS_DIGITS if by_label else _TYPICAL_SAMPLE_BYTES,
        **options,
    )
    stored, digits = (read, read) if by_label else read
    if has_own_operators(spec):
        return stored, digits, fn.alexnet.read_key(stored)
    source = fn.get_property(stored, key="source_info")  # "folder/train-000000.tar:512:000000042.jpg"
    return stored, digits, source[-KEY_DIGITS - 4 : -4]


def _decode_and_finish(
    stored: DataNode, view: View, transform: Transform, constants: Constants, spec: GraphSpec
) -> DataNode:
    if spec.device == "gpu" or not has_own_operators(spec) or transform.is_padded:
        return _finish(_decode(stored, view, spec), view, transform, constants, spec)
    arithmetic: dict[str, Any] = {"dtype": types.UINT8}
    if transform.dtype != "uint8":
        arithmetic = {"dtype": types.FLOAT, "mean": constants.mean.tolist(), "factor": constants.factor.tolist()}
        if constants.mean_image is not None:
            arithmetic["mean_image"] = _lay_out(constants.mean_image, transform).flatten().tolist()
        if view.noise is not None and constants.basis is not None:
            arithmetic |= {"noise": view.noise, "basis": constants.basis.flatten().tolist()}
    images = _run_own(
        stored,
        spec,
        crop_pos_y=view.y,
        crop_pos_x=view.x,
        mirror=view.flip,
        output_layout="CHW" if transform.layout == "NCHW" else "HWC",
        **arithmetic,
    )
    return fn.cast(images, dtype=types.FLOAT16) if transform.dtype == "float16" else images


def _decode(stored: DataNode, view: View | None, spec: GraphSpec) -> DataNode:
    """uint8 pixels on spec.device: the crop (224, 224, 3) of the view, or without one the whole (256, 256, 3)."""
    if spec.decode == "hybrid":
        # DALI splits the batch here and joins it again, in its order.
        on_host = fn.external_source(_Always(np.arange(spec.batch_size) < spec.num_on_host), dtype=types.BOOL, ndim=0)
        return _decode_on_both(stored, view, spec, on_host)
    if spec.decode == "mixed":
        return _decode_by_dali(stored, view, spec, on_gpu=True)
    return _decode_on_cores(stored, view, spec)


def _decode_on_both(stored: DataNode, view: View | None, spec: GraphSpec, on_host: DataNode) -> DataNode:
    if on_host:
        pixels = _decode_on_cores(stored, view, spec)
    else:
        pixels = _decode_by_dali(stored, view, spec, on_gpu=True)
    return pixels


def _decode_on_cores(stored: DataNode, view: View | None, spec: GraphSpec) -> DataNode:
    if not load_operators():
        return _decode_by_dali(stored, view, spec, on_gpu=False)
    if view is None:
        pixels = _run_own(stored, spec, whole=True)
    else:
        pixels = _run_own(stored, spec, crop_pos_y=view.y, crop_pos_x=view.x, dtype=types.UINT8, output_layout="HWC")
    return _place(pixels, spec)


def _decode_by_dali(stored: DataNode, view: View | None, spec: GraphSpec, *, on_gpu: bool) -> DataNode:
    if spec.encoding == "raw":
        pixels = fn.reshape(stored, shape=[IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3], layout="HWC")
        return _place(pixels if view is None else _crop(pixels, view), spec)
    # Fancy upsampling is what the CPU's codec does: asked for by name, so that the GPU's agrees with it.
    options: dict[str, Any] = {"output_type": types.RGB, "jpeg_fancy_upsampling": True, "adjust_orientation": False}
    if not on_gpu or spec.device == "cpu":  # on device "cpu" the cores stand in for the GPU
        options["device"] = "cpu"
    else:
        hints = {"preallocate_width_hint": IMAGE_SIZE_PX, "preallocate_height_hint": IMAGE_SIZE_PX}
        options |= {"device": "mixed", "hw_decoder_load": spec.hw_decoder_load, **hints}
        if spec.cache_gib:  # DALI keeps whole images alone, by the name of their file
            cache = {"cache_size": int(spec.cache_gib * 1024), "cache_type": "threshold", "cache_threshold": 0}
            pixels = fn.decoders.image(stored, **options, **cache)
            return pixels if view is None else _crop(pixels, view)
    if view is None:
        return _place(fn.decoders.image(stored, **options), spec)
    where = {"crop": (CROP_SIZE_PX, CROP_SIZE_PX), "crop_pos_y": view.y, "crop_pos_x": view.x}
    return _place(fn.decoders.image_crop(stored, **where, **options), spec)


def _run_own(stored: DataNode, spec: GraphSpec, **arguments: Any) -> DataNode:
    """Our own operator for JPEGs, or the one that reads raw pixels by the place of their label (`stored`)."""
    operator = fn.alexnet.read_crop_finish if spec.encoding == "raw" else fn.alexnet.decode_crop_finish
    return operator(stored, **arguments)


def _crop(whole: DataNode, view: View) -> DataNode:
    return fn.crop(whole, crop=(CROP_SIZE_PX, CROP_SIZE_PX), crop_pos_y=view.y, crop_pos_x=view.x)


def _place(pixels: DataNode, spec: GraphSpec) -> DataNode:
    return pixels.gpu() if spec.device == "gpu" else pixels


def _finish(crop: DataNode, view: View, transform: Transform, constants: Constants, spec: GraphSpec) -> DataNode:
    """Flip, (pixel - (mean - lighting) - mean image) / scale, type, layout, padding, of uint8 pixels (224, 224, 3)."""
    options: dict[str, Any] = {"mirror": view.flip, "output_layout": "CHW" if transform.layout == "NCHW" else "HWC"}
    if transform.dtype == "uint8":
        return fn.crop_mirror_normalize(crop, dtype=types.UINT8, mean=0.0, std=1.0, **options)
    if transform.size_px != CROP_SIZE_PX:  # zeros at the right and bottom; a mirrored window has them at its left
        at_left = fn.cast(view.flip, dtype=types.FLOAT) if isinstance(view.flip, DataNode) else float(view.flip)
        side = {"crop": (transform.size_px, transform.size_px), "crop_pos_y": 0.0, "crop_pos_x": at_left}
        options |= {**side, "out_of_bounds_policy": "pad", "fill_values": 0.0}
    mean: Any = constants.mean.tolist()
    if view.noise is not None and constants.basis is not None:
        lighting = fn.reductions.sum(_constant(constants.basis) * view.noise, axes=[1])
        mean = _constant(constants.mean) - lighting  # a tensor of each image, on the CPU for the GPU's operator too
    options |= {"mean": mean, "std": (1 / constants.factor).tolist(), "pad_output": transform.channels == 4}
    if constants.mean_image is None:
        return fn.crop_mirror_normalize(crop, dtype=_TYPES[transform.dtype], **options)
    image = _lay_out(constants.mean_image * constants.factor, transform)
    images = fn.crop_mirror_normalize(crop, dtype=types.FLOAT, **options) - _constant(image, spec.device)
    return images if transform.dtype == "float32" else fn.cast(images, dtype=_TYPES[transform.dtype])


def _lay_out(image: NDArray[np.float32], transform: Transform) -> NDArray[np.float32]:
    """(224, 224, 3) as a batch's images lie in memory: with the transform's padding and layout."""
    after = transform.size_px - CROP_SIZE_PX
    image = np.pad(image, ((0, after), (0, after), (0, transform.channels - 3)))
    return np.ascontiguousarray(image.transpose(2, 0, 1) if transform.layout == "NCHW" else image)


class _Always:
    """A source that gives the same batch every time; it takes the number of the batch, so that it has no state."""

    def __init__(self, batch: NDArray[Any]) -> None:
        self._batch = batch

    def __call__(self, number: int) -> NDArray[Any]:
        return self._batch


def _constant(value: ArrayLike, device: str = "cpu") -> DataNode:
    return types.Constant(np.asarray(value, np.float32), device=device)


def _build(define: Callable[[], Any], shards: ShardSet, spec: GraphSpec, **options: Any) -> Pipeline:
    """Raises UserError for a damaged index."""
    for shard, index in zip(shards.shards(spec.split), shards.indices(spec.split), strict=True):
        check_index(index, shard, ENDINGS[spec.encoding])
        if spec.encoding == "raw":
            check_raw(index, shard)
    pipeline = pipeline_def(
        define,
        batch_size=spec.batch_size,
        num_threads=spec.num_threads,
        device_id=spec.device_id,
        prefetch_queue_depth=spec.prefetch_batches,
        seed=stream_seed(spec.seed, "pipeline", spec.rank),
        exec_dynamic=True,  # outputs are handed over, not copied
        enable_conditionals=spec.decode == "hybrid",
        **options,
    )()
    try:
        pipeline.build()
    except RuntimeError:
        find_damage(shards, spec.split)
        raise
    return pipeline


def _allow_open_files(root: Path, num_files: int) -> None:
    """Shards are held open, all of a split; ImageNet-21k has more than the usual limit of 1024. Raises UserError where
    the limit cannot be raised far enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + num_files
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
        if num_files > hard - _OTHER_OPEN_FILES:
            raise UserError(
                f"{root}: {num_files} files have to be open at once, this process may open {hard} (ulimit -Hn); raise "
                "that limit, or make the shards again with more --samples-per-shard"
            )
    if soft not in (resource.RLIM_INFINITY, wanted) and num_files > soft // 4:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
