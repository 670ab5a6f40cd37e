"""The contestants of feed.py: stored 256x256 images -> shuffled batches of 128 crops, each library in its best form.

Every way is an endless generator of (images, labels) that is started once, so that a turn of the clock sees the steady
state. How samples are stored and decoded differs; the draws (offset, flip, colour shift) and the arithmetic are the
same: pixel - shift, where shift is the channel mean minus lighting. Conversions to a library's own format happen
before the clock. The race runs it as `python peers/feed.py NAME JOB`.
"""
# mypy: disable-error-code="import-not-found,import-untyped"

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness.children import Contestant, serve
from harness.limits import limit
from harness.samples import (
    BATCH,
    BUFFERED_BATCHES,
    CROP_PX,
    MAX_OFFSET_PX,
    SIZE_PX,
    Augment,
    Batches,
    Job,
    Sample,
    Samples,
    draw_order,
    rng,
)
from peers import with_numba, with_pillow

BYTES_OF_ENCODED = 32768


# Ours.


CROPS = {"dtype": "uint8", "layout": "NHWC", "flip": False, "lighting": None}


def ours(job: Job, kind: str, *, operators: str = "", **transform: Any) -> Batches:
    """The loader of the project that this process imports. `operators`: "stock" for DALI's instead of our own."""
    os.environ["ALEXNET_OPERATORS"] = operators
    import pipeline
    from pipeline import ColorStats, ShardSet, TrainLoader

    if not Path(pipeline.__file__).is_relative_to(job.project):
        raise RuntimeError(f"imported {pipeline.__file__}, expected a file of {job.project}")
    shards = ShardSet.open(job.shards[kind])
    colors = ColorStats.load(shards.root, shards.fingerprint)
    loader: Any
    if hasattr(pipeline, "Transform"):
        prepare(shards, operators)
        loader = TrainLoader(shards, colors, pipeline.Transform(**transform), global_batch_size=BATCH, seed=1)
    else:  # a version whose loader takes all of it as keywords
        old: Any = TrainLoader
        loader = old(shards, colors, global_batch_size=BATCH, seed=1, num_threads=job.workers, **transform)
    while True:
        yield from loader


def prepare(shards: Any, operators: str) -> None:
    """Before the clock: our operators, or what a first epoch by DALI's does besides, the checksums."""
    from pipeline.operators import load_operators
    from pipeline.shards import Checksums

    if operators != "stock" and not load_operators():
        raise ModuleNotFoundError("our own operators cannot be compiled here; the rows `stock` are what runs")
    if operators == "stock" and shards.manifest.encoding == "jpeg":
        Checksums(shards, "train").wait()


# DALI by the book, without us.


def dali(job: Job, kind: str) -> Batches:
    """kind: "jpeg" and "raw" to float32, "uint8": decoded crops alone."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    tars = sorted(Path(job.shards["raw" if kind == "raw" else "jpeg"]).glob("*.tar"))
    positions = [k / MAX_OFFSET_PX for k in range(MAX_OFFSET_PX + 1)]
    window = {"crop": (CROP_PX, CROP_PX)}

    @pipeline_def(batch_size=BATCH, num_threads=job.workers, device_id=None, prefetch_queue_depth=2, exec_dynamic=True)
    def graph() -> Any:
        data, label = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["rgb" if kind == "raw" else "jpg", "cls"],
            random_shuffle=True,
            initial_fill=1024,
            tensor_init_bytes=SIZE_PX * SIZE_PX * 3 if kind == "raw" else BYTES_OF_ENCODED,
            name="reader",
        )
        place = {"crop_pos_y": fn.random.uniform(values=positions), "crop_pos_x": fn.random.uniform(values=positions)}
        if kind == "raw":
            image = fn.reshape(data, shape=[SIZE_PX, SIZE_PX, 3], layout="HWC")
        else:
            image = fn.decoders.image_crop(data, output_type=types.RGB, **window, **place)
            if kind == "uint8":
                return image, label
        basis, mean = types.Constant(job.basis), types.Constant(job.mean)
        shift = mean - fn.reductions.sum(basis * fn.random.normal(shape=[3]), axes=[1])
        if kind != "raw":
            place = {}
        image = fn.crop_mirror_normalize(
            image, **window, **place, mean=shift, mirror=fn.random.coin_flip(), dtype=types.FLOAT, output_layout="CHW"
        )
        return image, label

    # without copies; the reader goes round its files for ever
    for (batch,) in DALIGenericIterator(graph(), ["images", "labels"], size=-1):
        yield batch["images"], batch["labels"]


# TensorFlow.


def tfdata(job: Job) -> Batches:
    import tensorflow as tf

    def convert(path: Path) -> None:
        with tf.io.TFRecordWriter(str(path)) as writer:
            for index in range(len(job.samples)):
                image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[job.samples.encoded(index)]))
                label = tf.train.Feature(int64_list=tf.train.Int64List(value=[int(job.samples.labels[index])]))
                features = tf.train.Features(feature={"image": image, "label": label})
                writer.write(tf.train.Example(features=features).SerializeToString())

    path = job.converted("set.tfrecord", convert)
    mean, basis = tf.constant(job.mean), tf.constant(job.basis)

    def prepare(record: Any) -> tuple[Any, Any]:
        kinds = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
        sample = tf.io.parse_single_example(record, kinds)
        offset = tf.random.uniform([2], 0, MAX_OFFSET_PX + 1, tf.int32)
        window = tf.concat([offset, [CROP_PX, CROP_PX]], 0)
        pixels = tf.io.decode_and_crop_jpeg(sample["image"], window, channels=3)
        pixels = tf.image.random_flip_left_right(pixels)
        shift = mean - tf.linalg.matvec(basis, tf.random.normal([3]))
        return tf.transpose(tf.cast(pixels, tf.float32) - shift, [2, 0, 1]), sample["label"]

    dataset = tf.data.TFRecordDataset(str(path)).shuffle(1024).repeat()
    dataset = dataset.map(prepare, num_parallel_calls=job.workers, deterministic=False)
    dataset = dataset.batch(BATCH, drop_remainder=True).prefetch(BUFFERED_BATCHES)
    options = tf.data.Options()
    options.threading.private_threadpool_size = job.workers
    yield from dataset.with_options(options).as_numpy_iterator()


# Threads and a codec.


def spdl(job: Job) -> Batches:
    """SPDL's own decoder (FFmpeg's) in its own threads, the rest in NumPy."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    augment = Augment(job.mean, job.basis)
    to_rgb = spdl.io.get_video_filter_desc(pix_fmt="rgb24")
    single = spdl.io.decode_config(decoder_options={"threads": "1"})

    def decode(index: int) -> Sample:
        packets = spdl.io.demux_image(job.samples.encoded(index))
        frames = spdl.io.decode_packets(packets, decode_config=single, filter_desc=to_rgb)
        pixels = spdl.io.to_numpy(spdl.io.convert_frames(frames))
        crop, shift = augment.draw(pixels, rng())
        return crop, shift, int(job.samples.labels[index])

    def indices() -> Iterator[int]:
        for batch in draw_order(len(job.samples)):
            yield from batch.tolist()

    pipeline = (
        PipelineBuilder()
        .add_source(indices())
        .pipe(decode, concurrency=job.workers)
        .aggregate(BATCH, drop_last=True)
        .pipe(augment.collate)
        .add_sink(BUFFERED_BATCHES)
        .build(num_threads=job.workers + 1, max_failures=0)
    )
    with pipeline.auto_stop():
        yield from pipeline


OURS = ("alexnet-dali", "nvidia-dali-cuda120", "torch", "numpy", "numba", "simplejpeg")
WAYS: dict[str, tuple[Callable[[Job], Batches], tuple[str, ...]]] = {
    "ours": (lambda job: ours(job, "jpeg", mean="channel"), OURS),
    "ours-mean-image": (lambda job: ours(job, "jpeg", mean="image"), OURS),
    "ours-uint8": (lambda job: ours(job, "jpeg", **CROPS), OURS),
    "ours-raw": (lambda job: ours(job, "raw", mean="channel"), OURS),
    "stock": (lambda job: ours(job, "jpeg", operators="stock", mean="channel"), OURS),
    "stock-uint8": (lambda job: ours(job, "jpeg", operators="stock", **CROPS), OURS),
    "stock-raw": (lambda job: ours(job, "raw", operators="stock", mean="channel"), OURS),
    "other": (lambda job: ours(job, "jpeg", mean="channel"), OURS),
    "other-uint8": (lambda job: ours(job, "jpeg", **CROPS), OURS),
    "other-raw": (lambda job: ours(job, "raw", mean="channel"), OURS),
    "dali": (lambda job: dali(job, "jpeg"), ("nvidia-dali-cuda120", "torch")),
    "dali-uint8": (lambda job: dali(job, "uint8"), ("nvidia-dali-cuda120", "torch")),
    "dali-raw": (lambda job: dali(job, "raw"), ("nvidia-dali-cuda120", "torch")),
    "ffcv": (lambda job: with_numba.ffcv(job, "jpg"), ("ffcv", "torch", "numba", "numpy")),
    "ffcv-raw": (lambda job: with_numba.ffcv(job, "raw"), ("ffcv", "torch", "numba", "numpy")),
    "by-hand": (lambda job: with_numba.by_hand(job, "jpeg"), ("simplejpeg", "numba", "numpy")),
    "by-hand-raw": (lambda job: with_numba.by_hand(job, "raw"), ("numba", "numpy")),
    "tfdata": (tfdata, ("tensorflow", "tensorflow-cpu")),
    "spdl": (spdl, ("spdl", "spdl-io", "numpy")),
    "dataloader": (with_pillow.dataloader, ("torch", "pillow")),
    "webdataset": (with_pillow.webdataset, ("webdataset", "torch", "pillow")),
    "mosaic": (with_pillow.mosaic, ("mosaicml-streaming", "torch", "pillow")),
    "litdata": (with_pillow.litdata, ("litdata", "torch", "pillow")),
    "grain": (with_pillow.grain, ("grain", "array-record", "pillow")),
    "limit-full": (lambda job: limit(job, "full"), ("pillow",)),
    "limit-crop": (lambda job: limit(job, "crop"), ("pillow",)),
    "limit-convert": (lambda job: limit(job, "convert"), ("numpy",)),
}


def _make(name: str, raw: dict[str, Any]) -> Contestant:
    job = Job(
        Samples(raw["samples"]),
        raw["shards"],
        Path(raw["out"]),
        Path(raw["project"]),
        raw["workers"],
        np.array(raw["mean"], np.float32),
        np.array(raw["basis"], np.float32),
    )
    make, packages = WAYS[name]
    stream = iter(make(job))
    next(stream)  # a missing library, a conversion, a compiler: all of it here

    def run(skip: int, seconds: float) -> tuple[int, float, int]:
        """Images and seconds of whole batches, after `skip` batches that may have lain ready; images of both."""
        for _ in range(skip):
            next(stream)
        num, start_s = 0, time.perf_counter()
        while True:
            images, _ = next(stream)
            num += len(images)
            took_s = time.perf_counter() - start_s
            if took_s >= seconds:
                return num, took_s, num + skip * BATCH

    def check(path: str) -> str:
        """One batch, saved as it is; answers the type it came as."""
        images, labels = next(stream)
        np.savez(path, images=np.asarray(images), labels=np.asarray(labels))
        return type(images).__name__

    return Contestant({"run": run, "check": check}, packages)


if __name__ == "__main__":
    from peers import feed  # by its name: what worker processes are sent must not live in __main__

    serve(feed._make)
