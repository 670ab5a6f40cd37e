"""A graph's batches, one after the other: taken in a thread, checked, and handed over to PyTorch without a copy."""

import math
import os
import re
import threading
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from shlex import quote
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.graph import Pipeline, has_own_operators
from pipeline.manifest import CLS_DIGITS, KEY_DIGITS, MANIFEST
from pipeline.operators import find_failure
from pipeline.options import GraphSpec, Transform
from pipeline.shards import Checksums, ShardSet, find_damage

_LABEL_POWERS = 10 ** np.arange(CLS_DIGITS - 1, -1, -1)
_KEY_POWERS = 10 ** np.arange(KEY_DIGITS - 1, -1, -1)
# Shards of a split up to so many bytes are checked before the first batch (a second or so), others beside the first
# epoch: DALI 2.4 may end the process when its own decoder meets a JPEG that it cannot decode.
_SMALL_BYTES = 1 << 30
_DALI_ERROR = re.compile(r"encountered:\s*(.*?)\s*(?:C\+\+ context:|Current pipeline object|$)", re.DOTALL)


class Batch(NamedTuple):
    """images (B, 3, 224, 224), for ten crops (B, 10, 3, 224, 224); labels int64 (B,); on the loader's device.

    They stay as they are as long as anybody holds them, or a view of them; their memory is used again afterwards.
    """

    images: Tensor
    labels: Tensor


class TakenBatch:
    """A batch as it came out of a graph: images in DALI's memory, the numbers beside them as NumPy arrays, and the
    graph's state right behind it. Filled by the stream's thread."""

    def __init__(self) -> None:
        self.is_done = False
        self.error: Exception | None = None
        self.images: Any = None
        self.numbers: dict[str, NDArray[Any]] = {}
        self.labels: NDArray[np.int64] = np.zeros(0, np.int64)
        self.state: tuple[bytes, int] = (b"", 0)

    def to_batch(self, spec: GraphSpec, transform: Transform | None, num: int | None = None) -> Batch:
        """For PyTorch, without a copy; the first `num` of it."""
        images = torch.from_dlpack(self.images.as_tensor())[:num]
        labels = torch.from_numpy(self.labels[:num])
        if spec.device == "gpu":
            labels = labels.pin_memory().to(images.device, non_blocking=True)
        if transform is not None and transform.layout == "NHWC":
            images = images.movedim(-1, -3)
        return Batch(images, labels)


class BatchStream:
    """The batches of a graph, epoch after epoch of `num_steps`, without the padding behind them.

    They are taken in a thread: an exception that interrupts the caller's (Ctrl-C, another signal) loses none.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        names: Sequence[str],
        shards: ShardSet,
        spec: GraphSpec,
        num_steps: int,
        num_taken: int = 0,
    ) -> None:
        """`names` of the graph's outputs besides images; `num_taken` before, in this epoch, by a restored graph."""
        self._pipeline, self._names, self._shards, self._spec = pipeline, names, shards, spec
        self._num_steps, self._num_taken = num_steps, num_taken
        # Every rank's part of an epoch is padded to the same number of batches.
        self._num_batches = math.ceil(math.ceil(shards.num_samples(spec.split) / spec.world_size) / spec.batch_size)
        self._is_running, self._process = False, os.getpid()
        self._requests, self._answers = SimpleQueue[Any](), SimpleQueue[None]()
        thread = threading.Thread(target=_serve, args=(self._requests,), name="alexnet-loader", daemon=True)
        thread.start()
        weakref.finalize(self, _stop, self._requests, thread)
        self._next: TakenBatch | None = None
        self.first_state = (self._checkpoint(), num_taken)
        is_strict = spec.encoding == "raw" or has_own_operators(spec)
        self._checksums = None if is_strict else Checksums(shards, spec.split)
        self._is_small = sum(shard.bytes for shard in shards.shards(spec.split)) <= _SMALL_BYTES

    def peek(self) -> TakenBatch:
        """The next batch, which stays the next. Raises UserError that names the shard, or what finds it; the same
        again when asked again."""
        if os.getpid() != self._process:
            raise UserError(
                f"this loader was made in process {self._process}, of which this one ({os.getpid()}) is a fork; make "
                "it in the process that reads it, started by multiprocessing's 'spawn'"
            )
        if self._checksums is not None:
            if self._is_small:
                self._checksums.wait()
            self._checksums.raise_if_damaged()
        on_gpu = self._spec.device == "gpu"
        stream = torch.cuda.current_stream(self._spec.device_id) if on_gpu else None
        taken = self._next = self._next or TakenBatch()
        if not taken.is_done:
            self._requests.put(partial(self._fill, taken, stream))  # once more after an interruption: nothing happens
        while not taken.is_done:
            self._answers.get()  # interrupted at any place, neither this nor `put` leaves a lock behind
        if taken.error is not None:
            raise taken.error
        return taken

    def pop(self) -> None:
        """The batch that was peeked at is delivered."""
        self._next = None

    def put_back(self, taken: TakenBatch) -> None:
        """It is not, after all."""
        self._next = taken

    def check(self) -> None:
        """Raises UserError if a shard is missing, was replaced or, where that would not be noticed, is damaged."""
        self._shards.check(self._spec.split)
        if self._checksums is not None:
            self._checksums.wait()

    def _fill(self, taken: TakenBatch, cuda_stream: Any) -> None:
        if not taken.is_done:
            self._take(taken, cuda_stream)
            taken.is_done = True
        self._answers.put(None)

    def _take(self, taken: TakenBatch, cuda_stream: Any) -> None:
        try:
            if self._num_taken == self._num_steps:  # the last batches of an epoch are padding, or incomplete
                while self._num_taken < self._num_batches:
                    self._share(cuda_stream)
                self._num_taken = 0
            taken.images, *others = self._share(cuda_stream)
            # Copied: beside a GPU they may lie in pinned memory, which torch does not take over.
            taken.numbers = {
                name: np.array(output.as_tensor()) for name, output in zip(self._names, others, strict=True)
            }
            taken.labels = self._read_labels(taken.numbers)
            taken.state = (self._checkpoint(), self._num_taken)
        except Exception as error:  # noqa: BLE001 - a thread has no caller: told where the batch is asked for
            taken.error = error

    def _share(self, cuda_stream: Any) -> Sequence[Any]:
        try:
            if not self._is_running:
                self._pipeline.schedule_run()
                self._is_running = True
            outputs = self._pipeline.share_outputs(cuda_stream)
        except RuntimeError as error:
            raise _explain(error, self._shards, self._spec, self._checksums) from error
        self._pipeline.release_outputs()
        self._pipeline.schedule_run()
        self._num_taken += 1
        return outputs

    def _read_labels(self, numbers: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
        """A label that no class has would be an error of the loss, on a GPU one that ends the process."""
        digits, num_classes = numbers["label"], self._shards.num_classes
        labels, is_number = (
            _read_number(digits, _LABEL_POWERS),
            ((digits >= ord("0")) & (digits <= ord("9"))).all(axis=1),
        )
        wrong = np.flatnonzero(~is_number | (labels >= num_classes))
        if len(wrong):
            key, said = int(_read_number(numbers["key"], _KEY_POWERS)[wrong[0]]), bytes(digits[wrong[0]].tolist())
            tar = _find_tar(self._shards, self._spec.split, key)
            raise UserError(
                f"{tar}: sample {key:0{KEY_DIGITS}d} has the label {said!r}, expected {CLS_DIGITS} digits, 0 to "
                f"{num_classes - 1} (the classes of {MANIFEST}); list all such with `alexnet-prep verify --shards "
                f"{quote(str(self._shards.root))}`, then make the shards again"
            )
        return labels

    def _checkpoint(self) -> bytes:
        return self._pipeline.checkpoint() if "noise" in self._names else b""  # of a training graph


def _serve(requests: "SimpleQueue[Any]") -> None:
    while (request := requests.get()) is not None:
        request()
        del request  # it holds the stream, which ends this thread when nobody holds it any more


def _stop(requests: "SimpleQueue[Any]", thread: threading.Thread) -> None:
    requests.put(None)
    if thread is not threading.current_thread():
        thread.join()


def read_keys(numbers: dict[str, NDArray[Any]]) -> Tensor:
    """The keys of a batch: int64 (B,), on the host."""
    return torch.from_numpy(_read_number(numbers["key"], _KEY_POWERS))


def _read_number(digits: NDArray[np.uint8], powers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers int64 (B,) that ASCII digits (B, n) spell."""
    return (digits.astype(np.int64) - ord("0")) @ powers


def _explain(error: RuntimeError, shards: ShardSet, spec: GraphSpec, checksums: Checksums | None) -> UserError:
    """What DALI's error means: the sample that cannot be decoded, the damaged shard, or DALI's own reason."""
    if failure := find_failure(error):
        return _refuse(Path(failure.path), failure.key, failure.reason, shards, spec)
    try:
        find_damage(shards, spec.split)
        if checksums is not None:
            checksums.wait()  # DALI's decoder does not say which sample: the SHA-256 finds the shard
    except UserError as damage:
        return damage
    found_reason = _DALI_ERROR.search(str(error))
    reason = " ".join((found_reason[1] if found_reason else str(error)).split())
    return UserError(
        f"{shards.root}: DALI stopped reading {spec.split} ({reason}); `alexnet-prep doctor` checks this machine, "
        f"`alexnet-prep verify --decode --shards {quote(str(shards.root))}` the shards"
    )


def _refuse(tar: Path, key: str, reason: str, shards: ShardSet, spec: GraphSpec) -> UserError:
    if spec.encoding == "raw":
        return UserError(
            f"{tar}: sample {key} cannot be read ({reason}); restore it, or run `alexnet-prep shard` again with --force"
        )
    return UserError(
        f"{tar}: sample {key} cannot be decoded ({reason}); list all such with `alexnet-prep verify --decode --shards "
        f"{quote(str(shards.root))}`, then make the shards again"
    )


def _find_tar(shards: ShardSet, split: str, key: int) -> Path:
    """The tar of a sample, by the indices."""
    name = f" {key:0{KEY_DIGITS}d}.cls".encode()
    return next(
        (
            tar
            for tar, index in zip(shards.tars(split), shards.indices(split), strict=True)
            if name in index.read_bytes()
        ),
        shards.root,
    )
