"""The DALI graphs: who comes when, what is drawn for it, and its decoded pixels. For training, evaluation, statistics.

The decision that shaped it: a graph ends with uint8 pixels and the random draws. Colour, flip and conversion are one
function for every device (finish.py), so that graphs differ in one thing only, what they give of the pixels: decoded on
the GPU, or there and on host cores at once; JPEGs as they are, for the host (hostpixels.py); or nothing, when pixels
lie uncompressed in shards or in memory (stored.py). Every random operator has a seed of its own, so neither that choice
nor switching one augmentation off changes the draws of the others. Left out: taking what a graph gives (batches.py);
epochs, ranks and checkpoints (loader.py).
"""

import hashlib
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.finish import CROP_SIZE_PX, MAX_OFFSET_PX, Transform
from pipeline.manifest import CLS_DIGITS, ENDINGS, IMAGE_SIZE_PX, KEY_DIGITS
from pipeline.shards import ShardSet, check_index, find_damage

try:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import DataNode, Pipeline, pipeline_def
except ImportError as error:
    raise UserError(
        f"NVIDIA DALI cannot be imported ({error}); it needs Linux on x86-64: pip install nvidia-dali-cuda120"
    ) from error

READER = "reader"
MAX_BUFFERED_SAMPLES = 4096  # of about 25 KB each: 100 MB a rank
_TYPICAL_SAMPLE_BYTES = 32768  # what DALI reserves per buffered sample; its default of 1 MiB would be gigabytes
_OTHER_OPEN_FILES = 64  # libraries, logs, and what a shell hands on
# Changed with every change to the operators that draw or read: a state of another graph cannot be gone on with.
GRAPH_VERSION = 4

Device = Literal["cpu", "gpu"]
Decode = Literal["host", "mixed", "hybrid", "stored"]


@dataclass(frozen=True)
class Feed:
    """Which samples a pipeline reads, and on what: split, local batch size, this rank's part, device, threads, decoder.

    decode: "host" (libjpeg-turbo on the cores), "mixed" (the GPU; on device "cpu" the cores stand in), "hybrid" (the
    first host_share of each batch on the cores, the rest on the GPU), "stored" (no pixels: only keys and draws).
    hw_decoder_load: of what the GPU decodes, the share given to its JPEG engine, where it has one.
    """

    split: str
    batch_size: int
    rank: int
    world_size: int
    device: Device
    device_id: int | None
    num_threads: int
    seed: int = 0
    decode: Decode = "host"
    host_share: float = 0.5
    hw_decoder_load: float = 0.9
    prefetch_batches: int = 2

    @property
    def num_ahead(self) -> int:
        """Batches begun before they are asked for. What a GPU decodes, its graph has begun already."""
        return 0 if self.device == "gpu" and self.decode in ("mixed", "hybrid") else self.prefetch_batches

    @property
    def num_on_host(self) -> int:
        """How many samples of each batch the host's cores decode."""
        share = {"host": 1.0, "mixed": 0.0, "hybrid": self.host_share, "stored": 0.0}[self.decode]
        return round(share * self.batch_size)


def stream_seed(seed: int, *names: object) -> int:
    """A 31-bit seed for one random stream, a function of the run's seed and the stream's names."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def count_buffered(shards: ShardSet, feed: Feed) -> int:
    """Samples in the shuffle buffer of this rank's reader."""
    return max(1, min(MAX_BUFFERED_SAMPLES, shards.num_samples(feed.split) // feed.world_size))


def train_pipeline(shards: ShardSet, transform: Transform, feed: Feed, *, checkpoint: bytes | None = None) -> Pipeline:
    """Shuffled training samples with their draws, with checkpointing; from `checkpoint` on, where one is given.

    Outputs: label and key, ASCII digits uint8 (5,) and (9,); y and x, float32 (), the crop's place as a fraction of
    the room there is; flip int32 (); noise float32 (3,), standard normal; batches.py reads them. And first of all, if
    the graph decodes, that crop, not flipped: uint8 (224, 224, 3) on feed.device; if the host does, the JPEG's bytes.
    """

    def seed_of(stream: str) -> int:
        return stream_seed(feed.seed, stream, feed.rank)

    def define() -> tuple[DataNode, ...]:
        encoded, label, key = _read(
            shards,
            feed,
            random_shuffle=True,
            initial_fill=count_buffered(shards, feed),
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
        noise = _constant(np.zeros(3))
        if transform.lighting:
            noise = fn.random.normal(shape=[3], seed=seed_of("lighting"))
        return *_decode(encoded, feed, (y, x)), label, key, y, x, flip, noise

    return _build(define, shards, feed, enable_checkpointing=True, checkpoint=checkpoint)


def eval_pipeline(shards: ShardSet, feed: Feed, *, whole: bool) -> Pipeline:
    """Every sample of this rank's part once, in order. Outputs: the image as for training, label, key.

    Pixels: uint8 on feed.device, the image as stored (256, 256, 3) if `whole`, else its central (224, 224, 3).
    """

    def define() -> tuple[DataNode, ...]:
        encoded, label, key = _read(shards, feed, stick_to_shard=True)
        return *_decode(encoded, feed, None if whole else (0.5, 0.5)), label, key

    return _build(define, shards, feed)


def _build(define: Callable[[], Any], shards: ShardSet, feed: Feed, **options: Any) -> Pipeline:
    """Raises UserError for a damaged index."""
    for shard, index in zip(shards.shards(feed.split), shards.indices(feed.split), strict=True):
        check_index(index, shard, ENDINGS[shards.manifest.encoding])
    pipeline = pipeline_def(
        define,
        batch_size=feed.batch_size,
        num_threads=feed.num_threads,
        device_id=feed.device_id,
        prefetch_queue_depth=feed.prefetch_batches,
        seed=stream_seed(feed.seed, "pipeline", feed.rank),
        exec_dynamic=True,  # outputs are handed over, not copied
        enable_conditionals=feed.decode == "hybrid",
        **options,
    )()
    try:
        pipeline.build()
    except RuntimeError:
        find_damage(shards, feed.split)
        raise
    return pipeline


def _read(shards: ShardSet, feed: Feed, **options: Any) -> tuple[DataNode, DataNode, DataNode]:
    """Encoded images uint8 (stored pixels: the label's digits), and the digits of label and key, of this rank's part.

    Pixels that lie uncompressed are left in their tars: the reader would copy them, and its shuffle buffer hold them.
    """
    stored = feed.decode == "stored"
    _allow_open_files(shards.root, len(shards.tars(feed.split)) * (2 if stored else 1))
    read = fn.readers.webdataset(
        name=READER,
        paths=[str(path) for path in shards.tars(feed.split)],
        index_paths=[str(path) for path in shards.indices(feed.split)],
        ext=["cls"] if stored else [ENDINGS[shards.manifest.encoding], "cls"],
        missing_component_behavior="error",
        shard_id=feed.rank,
        num_shards=feed.world_size,
        pad_last_batch=True,  # every rank takes the same number of batches; the loader drops the padding
        dont_use_mmap=True,  # a shard that is cut while mapped would kill the process; like this it is an error
        tensor_init_bytes=CLS_DIGITS if stored else _TYPICAL_SAMPLE_BYTES,
        **options,
    )
    encoded, digits = (read, read) if stored else read
    source = fn.get_property(encoded, key="source_info")  # "folder/train-000000.tar:512:000000042.jpg"
    return encoded, digits, source[-KEY_DIGITS - 4 : -4]


def _allow_open_files(root: Path, num_files: int) -> None:
    """The reader holds every tar of its split open, and so does who reads stored pixels (stored.py); ImageNet-21k has
    more of them than the usual limit of 1024. Raises UserError where the limit cannot be raised far enough."""
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


def _decode(encoded: DataNode, feed: Feed, position: tuple[Any, Any] | None) -> tuple[DataNode, ...]:
    """What a graph gives of its images: bytes, nothing, or uint8 pixels on feed.device, and of those the whole, or the
    224x224 at `position`, fractions (y, x) of the room there is."""
    if feed.decode == "host":
        return (encoded,)
    if feed.decode == "stored":
        return ()
    if feed.decode == "hybrid":
        chosen = np.arange(feed.batch_size) < feed.num_on_host
        on_host = fn.external_source(_Always(chosen), dtype=types.BOOL, ndim=0)
        return (_decode_on_both(encoded, feed, position, on_host),)
    return (_decode_on(encoded, feed, position, True),)


def _decode_on_both(encoded: DataNode, feed: Feed, position: tuple[Any, Any] | None, on_host: DataNode) -> DataNode:
    if on_host:  # DALI splits the batch here and joins it again, in its order
        pixels = _decode_on(encoded, feed, position, False)
    else:
        pixels = _decode_on(encoded, feed, position, True)
    return pixels


def _decode_on(encoded: DataNode, feed: Feed, position: tuple[Any, Any] | None, on_gpu: bool) -> DataNode:
    options = _decoder(feed, on_gpu)
    if position is None:
        pixels = fn.decoders.image(encoded, **options)
    else:
        y, x = position
        pixels = fn.decoders.image_crop(
            encoded, crop=(CROP_SIZE_PX, CROP_SIZE_PX), crop_pos_y=y, crop_pos_x=x, **options
        )
    return pixels.gpu() if feed.device == "gpu" else pixels


class _Always:
    """A source that gives the same batch every time; it takes the number of the batch, so that it has no state."""

    def __init__(self, batch: NDArray[Any]) -> None:
        self._batch = batch

    def __call__(self, number: int) -> NDArray[Any]:
        return self._batch


def _decoder(feed: Feed, on_gpu: bool) -> dict[str, Any]:
    # Fancy upsampling is what the CPU codec does: asked for by name, so that the GPU's agrees with it.
    options: dict[str, Any] = {"output_type": types.RGB, "jpeg_fancy_upsampling": True, "adjust_orientation": False}
    if not on_gpu or feed.device == "cpu":
        return {"device": "cpu", **options}
    sizes = {"preallocate_width_hint": IMAGE_SIZE_PX, "preallocate_height_hint": IMAGE_SIZE_PX}
    return {"device": "mixed", "hw_decoder_load": feed.hw_decoder_load, **sizes, **options}


def _constant(value: NDArray[Any]) -> DataNode:
    return types.Constant(value.astype(np.float32) if value.dtype == np.float64 else value, device="cpu")
