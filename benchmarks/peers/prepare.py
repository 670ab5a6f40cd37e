"""The contestants of prepare.py: image files -> 256x256 JPEGs of quality 90, each in its best known form on few cores.

The same work for all: shorter side to 256, central 256x256, 4:2:0 JPEG, written to disk in WebDataset tars or in the
library's own format. What starts workers in every call (ours, FFCV, LitData, vipsthumbnail) pays for that, and
prepare.py says how much. The race runs it as `python peers/prepare.py NAME JOB`.
"""
# mypy: disable-error-code="import-not-found,import-untyped"

import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from harness.children import Contestant, serve
from harness.prepare_images import (
    QUALITY,
    SIZE_PX,
    Encode,
    make_decode_and_encode,
    make_decode_only,
    make_opencv,
    make_pillow,
    make_pyvips,
    make_simplejpeg,
)
from peers.prepare_ours import ours
from peers.prepare_pool import Job, Timed, limit, pooled, prepare_file, start_pool, unpack

FFCV_MAX_RESOLUTION_PX = 341  # of the longer side: at 4:3 the shorter is 256; FFCV does not crop


def pillow(job: Job) -> Contestant:
    import webdataset

    pool = start_pool(job, make_pillow)

    def run(num: int) -> Timed:
        out, start_s = job.fresh(), time.perf_counter()
        with webdataset.ShardWriter(f"{out}/%06d.tar", maxcount=job.samples_per_shard, verbose=0) as sink:
            for position, data in enumerate(pool.imap(prepare_file, job.files[:num], chunksize=8)):
                sink.write({"__key__": f"{position:09d}", "jpg": data, "cls": "0"})
        return num, time.perf_counter() - start_s, num

    return Contestant({"run": run, "stored": partial(unpack, job)}, ("pillow", "webdataset"), pool.terminate)


def dali(job: Job, interpolation: str) -> Contestant:
    import simplejpeg
    from nvidia.dali import fn, pipeline_def, types
    from webdataset import TarWriter

    batch = 32

    @pipeline_def(batch_size=batch, num_threads=job.workers, device_id=None, prefetch_queue_depth=2)
    def graph(files: list[str]) -> Any:
        data, position = fn.readers.file(files=files, labels=list(range(len(files))), name="reader")
        pixels = fn.decoders.image(data, output_type=types.RGB, adjust_orientation=False)
        small = fn.resize(pixels, resize_shorter=SIZE_PX, interp_type=getattr(types, interpolation), antialias=True)
        # a crop's start is rounded to the nearest by default; ours and everybody's is rounded down
        return fn.crop(small, crop=(SIZE_PX, SIZE_PX), rounding="truncate"), position

    threads = ThreadPoolExecutor(job.workers)  # simplejpeg lets go of the GIL

    def encode(square: Any) -> bytes:
        return simplejpeg.encode_jpeg(square, QUALITY, "RGB", "420")

    def run(num: int) -> Timed:
        out, start_s = job.fresh(), time.perf_counter()
        pipeline = graph(files=job.files[:num])
        pipeline.build()
        done = 0
        with TarWriter(f"{out}/000000.tar", encoder=False) as tar:
            for _ in range(-(-num // batch)):
                squares, positions = (output.as_array() for output in pipeline.run())
                left = min(batch, num - done)  # the last batch is filled up
                for position, data in zip(positions[:left], threads.map(encode, squares[:left]), strict=True):
                    tar.write({"__key__": f"{int(position[0]):09d}", "jpg": data, "cls": b"00000"})
                done += left
        return done, time.perf_counter() - start_s, done

    return Contestant(
        {"run": run, "stored": partial(unpack, job)},
        ("nvidia-dali-cuda120", "simplejpeg", "webdataset"),
        threads.shutdown,
    )


class _Decoded:
    """What FFCV's writer reads from: (pixels, label) by position."""

    def __init__(self, files: list[str]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        import simplejpeg

        return simplejpeg.decode_jpeg(Path(self._files[position]).read_bytes(), "RGB"), 0


def ffcv(job: Job) -> Contestant:
    import cv2
    import numpy as np
    import simplejpeg  # noqa: F401 - used in the writer's processes
    from ffcv.fields import IntField, RGBImageField
    from ffcv.reader import Reader
    from ffcv.writer import DatasetWriter

    cv2.setNumThreads(1)

    def run(num: int) -> Timed:
        out, start_s = job.fresh(), time.perf_counter()
        image = RGBImageField(write_mode="jpg", max_resolution=FFCV_MAX_RESOLUTION_PX, jpeg_quality=QUALITY)
        writer = DatasetWriter(str(out / "set.beton"), {"image": image, "label": IntField()}, num_workers=job.workers)
        writer.from_indexed_dataset(_Decoded(job.files[:num]), chunksize=min(100, job.samples_per_shard))
        return num, time.perf_counter() - start_s, num

    def stored(folder: str) -> int:
        path = job.out / "set.beton"
        reader = Reader(str(path))
        sizes = {int(row["ptr"]): int(row["size"]) for row in reader.alloc_table}
        data = np.memmap(path, np.uint8, "r")
        for position, row in enumerate(reader.metadata):
            start = int(row["f0"]["data_ptr"])
            (Path(folder) / f"{position:09d}.jpg").write_bytes(data[start : start + sizes[start]].tobytes())
        return len(reader.metadata)

    return Contestant({"run": run, "stored": stored}, ("ffcv", "opencv-python-headless", "simplejpeg", "numpy"))


def _litdata_sample(prepare: Encode, item: tuple[int, str]) -> dict[str, Any]:
    return {"position": item[0], "image": prepare(Path(item[1]).read_bytes())}


class _LateSimplejpeg:
    """`make_simplejpeg()` made on first use: LitData pickles the function."""

    def __init__(self) -> None:
        self._prepare: Encode | None = None

    def __call__(self, data: bytes) -> bytes | None:
        self._prepare = self._prepare or make_simplejpeg()
        return self._prepare(data)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def litdata(job: Job) -> Contestant:
    make_simplejpeg()
    from litdata import StreamingDataset, optimize

    def run(num: int) -> Timed:
        out, start_s = job.fresh() / "set", time.perf_counter()
        optimize(
            fn=partial(_litdata_sample, _LateSimplejpeg()),
            inputs=list(enumerate(job.files[:num])),
            output_dir=str(out),
            num_workers=job.workers,
            chunk_bytes="16MB",
            verbose=False,
        )
        return num, time.perf_counter() - start_s, num

    def stored(folder: str) -> int:
        dataset = StreamingDataset(str(job.out / "set"), shuffle=False)
        for position in range(len(dataset)):
            sample = dataset[position]
            (Path(folder) / f"{sample['position']:09d}.jpg").write_bytes(sample["image"])
        return len(dataset)

    return Contestant({"run": run, "stored": stored}, ("litdata", "opencv-python-headless", "simplejpeg", "torch"))


def vipsthumbnail(job: Job) -> Contestant:
    program = shutil.which("vipsthumbnail")
    if program is None:
        raise ModuleNotFoundError("no program vipsthumbnail (Debian: libvips-tools)")
    shown = subprocess.run([program, "--vips-version"], capture_output=True, text=True, check=True).stdout

    def run(num: int) -> Timed:
        out, start_s = job.fresh(), time.perf_counter()
        parts = [job.files[start : num : job.workers] for start in range(job.workers)]
        options = ["--size", f"{SIZE_PX}x{SIZE_PX}", "--smartcrop", "centre", "--no-rotate"]
        running = [
            subprocess.Popen(
                [program, *options, "-o", f"{out}/%s.jpg[Q={QUALITY},strip]", *part],
                env={"VIPS_CONCURRENCY": "1"},
            )
            for part in parts
            if part
        ]
        if any(process.wait() for process in running):
            raise RuntimeError("vipsthumbnail failed")
        return num, time.perf_counter() - start_s, num

    def stored(folder: str) -> int:
        files = sorted(job.out.glob("*.jpg"))
        for file in files:
            shutil.copyfile(file, Path(folder) / f"{int(file.name.partition('_')[0]):09d}.jpg")
        return len(files)

    return Contestant({"run": run, "stored": stored, "version": lambda: shown.split()[-1]}, ())


WAYS: dict[str, Callable[[Job], Contestant]] = {
    "ours": ours,
    "simplejpeg": lambda job: pooled(job, make_simplejpeg, "simplejpeg", "opencv-python-headless", "webdataset"),
    "opencv": lambda job: pooled(job, make_opencv, "opencv-python-headless", "webdataset"),
    "ffcv": ffcv,
    "dali-linear": lambda job: dali(job, "INTERP_LINEAR"),
    "dali-lanczos3": lambda job: dali(job, "INTERP_LANCZOS3"),
    "pillow": pillow,
    "litdata": litdata,
    "vipsthumbnail": vipsthumbnail,
    "pyvips": lambda job: pooled(job, make_pyvips, "pyvips", "pyvips-binary", "webdataset"),
    "decode": lambda job: limit(job, make_decode_only),
    "decode+encode": lambda job: limit(job, make_decode_and_encode),
}


def _make(name: str, job: dict[str, Any]) -> Contestant:
    files = Path(job["list"]).read_text(encoding="utf-8").splitlines()
    made = Job(files, job["tree"], Path(job["out"]), job["workers"], job["samples_per_shard"])
    return WAYS[name](made)


if __name__ == "__main__":
    serve(_make)
