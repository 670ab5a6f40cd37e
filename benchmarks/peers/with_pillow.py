"""The contestants of feed.py that decode sample by sample with Pillow in worker processes, as most code does.

The worker finishes whole batches, so that only batches travel between processes: each library's fastest way short of
another decoder.
"""
# mypy: disable-error-code="import-not-found,import-untyped"

import sys
from collections.abc import Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from harness.samples import BATCH, LONG_EPOCH, Augment, Batches, Job, Sample, Samples, draw_order, rng


class _PillowSet:
    """What torch's DataLoader takes samples from."""

    def __init__(self, samples: Samples, augment: Augment) -> None:
        self._samples, self._augment = samples, augment

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        crop, shift = self._augment.pillow(self._samples.encoded(index), rng())
        return crop, shift, int(self._samples.labels[index])


class _EndlessOrder:
    """A batch sampler that never ends."""

    def __init__(self, num: int) -> None:
        self._num = num

    def __iter__(self) -> Iterator[list[int]]:
        for batch in draw_order(self._num):
            yield batch.tolist()


def dataloader(job: Job) -> Batches:
    from torch.utils.data import DataLoader

    augment = Augment(job.mean, job.basis)
    yield from DataLoader(
        _PillowSet(job.samples, augment),  # type: ignore[arg-type]
        batch_sampler=_EndlessOrder(len(job.samples)),
        num_workers=job.workers,
        collate_fn=augment.collate_torch,
    )


def webdataset(job: Job) -> Batches:
    import webdataset as wds

    augment = Augment(job.mean, job.basis)
    tars = sorted(map(str, Path(job.shards["jpeg"]).glob("*.tar")))

    def prepare(sample: dict[str, bytes]) -> Sample:
        crop, shift = augment.pillow(sample["jpg"], rng())
        return crop, shift, int(sample["cls"])

    dataset = wds.WebDataset(tars, resampled=True, shardshuffle=False, empty_check=False).shuffle(1024).map(prepare)
    dataset = dataset.batched(BATCH, collation_fn=augment.collate_torch)
    yield from wds.WebLoader(dataset, batch_size=None, num_workers=job.workers)


def mosaic(job: Job) -> Batches:
    streaming = _import_streaming()

    def convert(path: Path) -> None:
        with streaming.MDSWriter(out=str(path), columns={"image": "bytes", "label": "int"}) as writer:
            for index in range(len(job.samples)):
                writer.write(_as_stored(job.samples, index))

    path = job.converted("mds", convert)
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(path), shuffle=True, batch_size=BATCH, epoch_size=LONG_EPOCH)
    loader = streaming.StreamingDataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=job.workers,
        collate_fn=Augment(job.mean, job.basis).collate_stored,
        drop_last=True,
    )
    while True:
        yield from loader


def _import_streaming() -> Any:
    """Mosaic's package imports torchvision for its vision classes, none of which is used here. Beside another build of
    torch torchvision fails to import; names that stand for nothing take its place then."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms.functional"):
            stand_in = MagicMock(__spec__=ModuleSpec(name, None), VisionDataset=object)
            sys.modules[name] = stand_in
    import streaming
    import streaming.base.util

    return streaming


def litdata(job: Job) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    def convert(path: Path) -> None:
        optimize(
            fn=partial(_as_stored, job.samples),
            inputs=list(range(len(job.samples))),
            output_dir=str(path),
            num_workers=1,
            chunk_bytes="16MB",
            verbose=False,
        )

    path = job.converted("litdata", convert)
    times = max(1, LONG_EPOCH // len(job.samples))
    dataset = StreamingDataset(str(path), shuffle=True, drop_last=True, subsample=float(times))
    loader = StreamingDataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=job.workers,
        collate_fn=Augment(job.mean, job.basis).collate_stored,
        persistent_workers=True,
    )
    while True:
        yield from loader


def _as_stored(samples: Samples, index: int) -> dict[str, Any]:
    return {"image": samples.encoded(index), "label": int(samples.labels[index])}


class _FromRecord:
    """Grain's map function, sent to its worker processes: 8 bytes of label, then the image."""

    def __init__(self, augment: Augment) -> None:
        self._augment = augment

    def __call__(self, record: bytes) -> Sample:
        crop, shift = self._augment.pillow(record[8:], rng())
        return crop, shift, int.from_bytes(record[:8], "little")


def grain(job: Job) -> Batches:
    import grain as library
    from array_record.python.array_record_module import ArrayRecordWriter

    def convert(path: Path) -> None:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for index in range(len(job.samples)):
            writer.write(int(job.samples.labels[index]).to_bytes(8, "little") + job.samples.encoded(index))
        writer.close()

    augment = Augment(job.mean, job.basis)
    source = library.sources.ArrayRecordDataSource(str(job.converted("set.arrayrecord", convert)))
    dataset = library.MapDataset.source(source).shuffle(seed=0).repeat().map(_FromRecord(augment))
    batches = dataset.batch(BATCH, drop_remainder=True, batch_fn=augment.collate).to_iter_dataset(
        library.ReadOptions(num_threads=0)
    )
    yield from batches.mp_prefetch(library.MultiprocessingOptions(job.workers, per_worker_buffer_size=2))
