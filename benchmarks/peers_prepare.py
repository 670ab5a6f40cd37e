"""The contestants of prepare.py: image files -> 256x256 JPEGs of quality 90, each in its best known form on few cores.

The decision that shaped it: the same work for all. Shorter side to 256, central 256x256, 4:2:0 JPEG, written to disk in
WebDataset tars or in the library's own format; processes are started before the clock, because a set of millions
would not notice them. What starts workers in every call (ours, FFCV, LitData, vipsthumbnail) pays for that, and
prepare.py says how much. Left out: the clock's rounds and the comparison of pixels (prepare.py).
Run by prepare.py: `python peers_prepare.py NAME JOB`, answering calls on its standard input.
"""
# mypy: disable-error-code="import-not-found,import-untyped"

import contextlib
import io
import multiprocessing
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import Contestant, serve

SIZE_PX = 256
QUALITY = 90
FFCV_MAX_RESOLUTION_PX = 341  # of the longer side: at 4:3 the shorter is 256; FFCV does not crop

NUM_STAGE_PASSES = 4
STAGES = {  # functions of ours that make up a stage, by the names they are looked up under
    "decode": "pipeline.imaging.decode",
    "resize and crop": "pipeline.imaging.to_square",
    "encode": "tools.preparer.encode",
}

Timed = tuple[int, float, int]  # images, seconds, images worked on
Encode = Callable[[bytes], bytes | None]
_prepare: Encode  # of a worker process


@dataclass(frozen=True)
class Job:
    """files: paths of the images, in order; tree: the folder that holds them as <class>/<file>; out: scratch folder."""

    files: list[str]
    tree: str
    out: Path
    workers: int
    samples_per_shard: int

    def fresh(self) -> Path:
        """An empty folder for one round's output."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        return self.out


# One image: bytes -> JPEG bytes. Heavy libraries are imported when a function is made, in the process that uses it.


def _sizes(width: int, height: int) -> tuple[int, int, int, int]:
    """Resized width and height, then the crop's left and top."""
    shorter = min(width, height)
    wide, high = (max(SIZE_PX, round(side * SIZE_PX / shorter)) for side in (width, height))
    return wide, high, (wide - SIZE_PX) // 2, (high - SIZE_PX) // 2


def make_simplejpeg() -> Encode:
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)

    def prepare(data: bytes) -> bytes:
        pixels = simplejpeg.decode_jpeg(data, "RGB")
        wide, high, left, top = _sizes(pixels.shape[1], pixels.shape[0])
        small = cv2.resize(pixels, (wide, high), interpolation=cv2.INTER_AREA)
        square = small[top : top + SIZE_PX, left : left + SIZE_PX].copy()
        return simplejpeg.encode_jpeg(square, QUALITY, "RGB", "420")

    return prepare


def make_opencv() -> Encode:
    import cv2
    import numpy as np

    cv2.setNumThreads(1)

    def prepare(data: bytes) -> bytes:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        wide, high, left, top = _sizes(pixels.shape[1], pixels.shape[0])
        small = cv2.resize(pixels, (wide, high), interpolation=cv2.INTER_AREA)
        square = small[top : top + SIZE_PX, left : left + SIZE_PX]
        return cv2.imencode(".jpg", square, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()

    return prepare


def make_pillow() -> Encode:
    from PIL import Image

    def prepare(data: bytes) -> bytes:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        wide, high, left, top = _sizes(*image.size)
        small = image.resize((wide, high), Image.Resampling.LANCZOS)
        square = small.crop((left, top, left + SIZE_PX, top + SIZE_PX))
        buffer = io.BytesIO()
        square.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
        return buffer.getvalue()

    return prepare


def make_pyvips() -> Encode:
    import os

    os.environ["VIPS_CONCURRENCY"] = "1"
    import pyvips

    def prepare(data: bytes) -> bytes:
        square = pyvips.Image.thumbnail_buffer(
            data, SIZE_PX, height=SIZE_PX, crop="centre", size="both", no_rotate=True
        ).colourspace("srgb")
        return square.jpegsave_buffer(Q=QUALITY, keep="none", subsample_mode="on")

    return prepare


def make_decode_only() -> Encode:
    import simplejpeg

    def prepare(data: bytes) -> None:
        simplejpeg.decode_jpeg(data, "RGB")

    return prepare


def make_decode_and_encode() -> Encode:
    import numpy as np
    import simplejpeg

    def prepare(data: bytes) -> bytes:
        pixels = simplejpeg.decode_jpeg(data, "RGB")
        height, width = pixels.shape[:2]
        left, top = max(0, width - SIZE_PX) // 2, max(0, height - SIZE_PX) // 2
        square = np.ascontiguousarray(pixels[top : top + SIZE_PX, left : left + SIZE_PX])
        return simplejpeg.encode_jpeg(square, QUALITY, "RGB", "420")

    return prepare


# A pool of processes that are warm before the clock runs.


def _start_worker(make: Callable[[], Encode]) -> None:
    global _prepare
    _prepare = make()


def _write_shard(path: Path, start: int, files: list[str]) -> int:
    """One tar, written by the worker that prepares its images; keys are positions in the list."""
    from webdataset import TarWriter

    with TarWriter(str(path), encoder=False) as tar:
        for position, file in enumerate(files, start):
            tar.write({"__key__": f"{position:09d}", "jpg": _prepare(Path(file).read_bytes()), "cls": b"00000"})
    return len(files)


def _prepare_only(files: list[str]) -> int:
    for file in files:
        _prepare(Path(file).read_bytes())
    return len(files)


def _prepare_file(file: str) -> bytes | None:
    return _prepare(Path(file).read_bytes())


def _cut(job: Job, num: int) -> list[tuple[int, list[str]]]:
    """(first position, files) per shard of the first `num` files."""
    return [
        (start, job.files[start : min(num, start + job.samples_per_shard)])
        for start in range(0, num, job.samples_per_shard)
    ]


def _pool(job: Job, make: Callable[[], Encode]) -> Any:
    make()  # a missing library is found out here
    return multiprocessing.get_context("spawn").Pool(job.workers, _start_worker, (make,))


def _pooled(job: Job, make: Callable[[], Encode], *packages: str) -> Contestant:
    pool = _pool(job, make)

    def run(num: int) -> Timed:
        out, start_s = job.fresh(), time.perf_counter()
        tasks = [(out / f"{start:09d}.tar", start, files) for start, files in _cut(job, num)]
        done = sum(pool.starmap(_write_shard, tasks, chunksize=1))
        return done, time.perf_counter() - start_s, done

    return Contestant({"run": run, "stored": partial(_unpack, job)}, packages, pool.terminate)


def _limit(job: Job, make: Callable[[], Encode]) -> Contestant:
    pool = _pool(job, make)

    def run(num: int) -> Timed:
        start_s = time.perf_counter()
        done = sum(pool.imap_unordered(_prepare_only, [files for _, files in _cut(job, num)]))
        return done, time.perf_counter() - start_s, done

    return Contestant({"run": run}, ("simplejpeg", "numpy"), pool.terminate)


def _unpack(job: Job, folder: str) -> int:
    """The stored images of the last round as `folder`/<position>.jpg; how many there were."""
    num = 0
    for tar in sorted(job.out.glob("*.tar")):
        for name, data in _read_tar(tar):
            if name.endswith(".jpg"):
                (Path(folder) / f"{int(name[:-4]):09d}.jpg").write_bytes(data)
                num += 1
    return num


def _read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                yield Path(member.name).name, file.read()


# The contestants.


def ours(job: Job) -> Contestant:
    from tools.sharder import make_shards
    from tools.sources import open_source

    def run(num: int) -> Timed:
        out = job.fresh()
        start_s = time.perf_counter()
        source = open_source(Path(job.tree if num == len(job.files) else job.tree + "-tiny"))
        summary = make_shards(source, out, num_workers=job.workers, samples_per_shard=job.samples_per_shard)
        return summary.images["train"], time.perf_counter() - start_s, num

    def stored(folder: str) -> int:
        import json

        num = 0
        for tar in sorted(job.out.glob("*.tar")):
            sources = json.loads(tar.with_suffix(".json").read_text(encoding="utf-8"))["sources"]
            for name, data in _read_tar(tar):
                if name.endswith(".jpg"):
                    position = int(Path(sources[name[:-4]]).name.partition("_")[0])
                    (Path(folder) / f"{position:09d}.jpg").write_bytes(data)
                    num += 1
        return num

    def stages() -> dict[str, float]:
        return time_stages(Path(job.tree + "-few"), job.fresh)

    packages = ("alexnet-dali", "nvidia-dali-cuda120", "pillow", "simplejpeg", "webdataset", "numpy")
    return Contestant({"run": run, "stored": stored, "stages": stages}, packages)


def time_stages(tree: Path, fresh: Callable[[], Path]) -> dict[str, float]:
    """Where the time of one worker goes: ms an image for reading, each of STAGES, and all the rest of writing a shard.

    `make_shards` runs in this process, with functions replaced by ones that count; a stage does not count what it calls
    of another stage. Of some passes the fastest counts: other work can only add.
    """
    import dataclasses
    import importlib
    from unittest.mock import patch

    import torch

    from tools import sharder
    from tools.sources import open_source

    spent: dict[str, float] = {}
    nested = [0.0]

    def count(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            nested.append(0.0)
            start_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took_s = time.perf_counter() - start_s
                spent[stage] = spent.get(stage, 0.0) + took_s - nested.pop()
                nested[-1] += took_s

        return counting

    def run_here(function: Callable[..., Any], units: Any, *, on_result: Any, on_progress: Any, **_: Any) -> None:
        for unit in units:
            on_result(count("tar, checksums, index, sync", function)(unit, on_progress))

    torch.set_num_threads(1)  # as a worker does
    source = open_source(tree)
    source = dataclasses.replace(source, read=count("read", source.read))
    num, passes = len(source.entries("train")), []
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(sharder, "run_units", run_here))
        for stage, name in STAGES.items():
            module, _, attribute = name.rpartition(".")
            owner = importlib.import_module(module)
            patches.enter_context(patch.object(owner, attribute, count(stage, getattr(owner, attribute))))
        for _ in range(NUM_STAGE_PASSES):
            spent.clear()
            sharder.make_shards(source, fresh(), num_workers=1)
            passes.append({stage: 1e3 * seconds / num for stage, seconds in spent.items()})
    return min(passes, key=lambda stages: sum(stages.values()))


def pillow(job: Job) -> Contestant:
    import webdataset

    pool = _pool(job, make_pillow)

    def run(num: int) -> Timed:
        out, start_s = job.fresh(), time.perf_counter()
        with webdataset.ShardWriter(f"{out}/%06d.tar", maxcount=job.samples_per_shard, verbose=0) as sink:
            for position, data in enumerate(pool.imap(_prepare_file, job.files[:num], chunksize=8)):
                sink.write({"__key__": f"{position:09d}", "jpg": data, "cls": "0"})
        return num, time.perf_counter() - start_s, num

    return Contestant({"run": run, "stored": partial(_unpack, job)}, ("pillow", "webdataset"), pool.terminate)


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
        {"run": run, "stored": partial(_unpack, job)},
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
    "simplejpeg": lambda job: _pooled(job, make_simplejpeg, "simplejpeg", "opencv-python-headless", "webdataset"),
    "opencv": lambda job: _pooled(job, make_opencv, "opencv-python-headless", "webdataset"),
    "ffcv": ffcv,
    "dali-linear": lambda job: dali(job, "INTERP_LINEAR"),
    "dali-lanczos3": lambda job: dali(job, "INTERP_LANCZOS3"),
    "pillow": pillow,
    "litdata": litdata,
    "vipsthumbnail": vipsthumbnail,
    "pyvips": lambda job: _pooled(job, make_pyvips, "pyvips", "pyvips-binary", "webdataset"),
    "decode": lambda job: _limit(job, make_decode_only),
    "decode+encode": lambda job: _limit(job, make_decode_and_encode),
}


def _make(name: str, job: dict[str, Any]) -> Contestant:
    files = Path(job["list"]).read_text(encoding="utf-8").splitlines()
    made = Job(files, job["tree"], Path(job["out"]), job["workers"], job["samples_per_shard"])
    return WAYS[name](made)


if __name__ == "__main__":
    serve(_make)
