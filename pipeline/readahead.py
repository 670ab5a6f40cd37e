"""What DALI's reader will touch, and when: so that shards are local before it does.

The decision that shaped it: DALI reads shard after shard, in an order that depends only on their number, the seed and
the epoch (the sizes of shards and the ranks have no part in it), so the order is asked from DALI itself, by reading a
data set of as many one-sample shards, and not imitated. Left out: fetching (fetch.py).
"""

import bisect
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.shards import ShardSet

# Batches that may be in work beyond those the executor has queued: the reader's own queue (1), the one being read, and
# one for safety. More only means that the gate opens a little later.
BATCHES_AHEAD = 3
_EPOCHS_AHEAD = 4  # of the order to prefer; whatever is not in them yet comes last
_BLOCK_BYTES = 512

Order = Callable[[int], Sequence[int]]  # epoch (from 1) -> positions of shards


class ShardOrder:
    """order(epoch) of `readers.webdataset(shuffle_after_epoch=True, shuffle_after_epoch_seed=seed)`, epochs from 1."""

    def __init__(self, num_shards: int, seed: int) -> None:
        self._num_shards, self._seed = num_shards, seed
        self._epochs: list[list[int]] = []
        self._pipeline: Any = None

    def __call__(self, epoch: int) -> list[int]:
        while len(self._epochs) < epoch:
            if self._pipeline is None:
                self._pipeline = self._build()
            (labels,) = self._pipeline.run()
            self._epochs.append([int(bytes(memoryview(label))) for label in labels])
        return self._epochs[epoch - 1]

    def _build(self) -> Any:
        from pipeline.graph import fn, pipeline_def  # graph.py alone imports DALI

        with tempfile.TemporaryDirectory(prefix="alexnet-order-") as name:
            data, indices = Path(name, "shards"), [Path(name, f"{i}.idx") for i in range(self._num_shards)]
            data.write_bytes(b"".join((b"%08d" % i).ljust(_BLOCK_BYTES) for i in range(self._num_shards)))
            for i, index in enumerate(indices):
                index.write_text(f"v1.2 1\ncls {i * _BLOCK_BYTES} 8 x.cls\n")

            @pipeline_def(batch_size=self._num_shards, num_threads=1, device_id=None, prefetch_queue_depth=1)
            def define() -> Any:
                return fn.readers.webdataset(
                    paths=[str(data)] * self._num_shards,
                    index_paths=[str(index) for index in indices],
                    ext=["cls"],
                    shuffle_after_epoch=True,
                    shuffle_after_epoch_seed=self._seed,
                    tensor_init_bytes=8,
                )

            pipeline = define()
            pipeline.build()  # maps the file: it may go now
            return pipeline


class Gate:
    """Opens when everything that DALI's training reader may read before a given step lies in the local folder.

    `order` gives the shards' positions by epoch; `batch_size` is the rank's own; `buffer` is the reader's initial_fill,
    `prefetch_batches` the executor's queue. For a folder that is local anyway, only the files' presence and sizes are
    checked, once an epoch.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        *,
        batch_size: int,
        buffer: int,
        prefetch_batches: int = 2,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._shards, self._order = shards, order
        self._batch_size, self._ahead = batch_size, buffer + (prefetch_batches + BATCHES_AHEAD) * batch_size
        self._rank, self._world_size = rank, world_size
        self._train = shards.shards("train")
        self._part = lru_cache(maxsize=4)(self._find_part)
        self._opened: tuple[int, int] = (0, 0)  # the epoch, and how many of its shards are known to be there
        self._preferred = 0

    def wait(self, epoch: int, step: int) -> None:
        """Block until batch `step` (from 0) of `epoch` (from 1) can be read. Raises UserError if it cannot be."""
        if step == 0:
            self._shards.check("train")
        if self._shards.remote is None:
            return
        fetcher = self._shards.remote.fetcher
        if self._preferred != epoch:
            self._preferred = epoch
            fetcher.prefer(self._plan(epoch))
        for later, names in self._needed(epoch, step):
            if self._opened < (later, len(names)):
                fetcher.wait(names)
                self._opened = (later, len(names))

    def is_open(self, epoch: int, step: int) -> bool:
        """Whether `wait` would return at once."""
        if self._shards.remote is None:
            return True
        return self._shards.remote.fetcher.has(name for _, names in self._needed(epoch, step) for name in names)

    def _needed(self, epoch: int, step: int) -> Iterator[tuple[int, list[str]]]:
        """The shards of each epoch, in order, that may be read before a batch is there."""
        num_samples = self._ahead + (step + 1) * self._batch_size
        while num_samples > 0:
            names, ends = self._part(epoch)
            yield epoch, names[: bisect.bisect_left(ends, num_samples) + 1]
            num_samples -= ends[-1]
            epoch += 1

    def _plan(self, epoch: int) -> list[str]:
        """All shards in the order of need: this epoch's part, validation after it, then the epochs that follow."""
        val = [shard.file for shard in self._shards.shards("val")]
        later = (name for ahead in range(1, _EPOCHS_AHEAD) for name in self._part(epoch + ahead)[0])
        rest = (shard.file for shard in self._train)
        return [*self._part(epoch)[0], *val, *later, *rest]

    def _find_part(self, epoch: int) -> tuple[list[str], list[int]]:
        """This rank's shards in order, and how many of its samples have been read when each ends."""
        total = self._shards.num_samples("train")
        begin, end = (total * rank // self._world_size for rank in (self._rank, self._rank + 1))
        names, ends, position = [], [], 0
        for shard in (self._train[index] for index in self._order(epoch)):
            first, position = position, position + shard.samples
            if first < end and position > begin:
                names.append(shard.file)
                ends.append(min(position, end) - begin)
        return names, ends
