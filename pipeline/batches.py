"""What comes out of a graph: its batches, epoch after epoch, and what their numbers and draws say.

The decision that shaped it: pixels are taken as they lie in DALI's memory, and numbers are read a batch at a time, by
NumPy and torch; as operators of the graph the same costs a tenth of the decoding. Labels are checked here, before a
loss sees them. Left out: the graphs (graph.py), and what is made of their pixels (assemble.py).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.finish import MAX_OFFSET_PX
from pipeline.graph import Feed, Pipeline
from pipeline.manifest import CLS_DIGITS, KEY_DIGITS, MANIFEST
from pipeline.shards import ShardSet, find_damage
from pipeline.stored import SampleTable

NUMBERS = ["label", "key"]  # what every graph gives besides pixels
DRAWN = ["y", "x", "flip", "noise"]  # and a training graph besides those
_LABEL_POWERS = 10 ** np.arange(CLS_DIGITS - 1, -1, -1)


class Batches:
    """The batches of a graph, endlessly; pixels in DALI's own memory, handed over. It knows where its epoch ends.

    Every rank's part of an epoch is padded to the same number of batches, which end with its padding.
    """

    def __init__(
        self, pipeline: Pipeline, shards: ShardSet, feed: Feed, names: Sequence[str], *, num_taken: int = 0
    ) -> None:
        """`names` of the graph's outputs besides its image; `num_taken` before, in this epoch, by a restored graph."""
        self._pipeline, self._shards, self._feed = pipeline, shards, feed
        image = {"host": ["encoded"], "stored": []}.get(feed.decode, ["pixels"])
        self._names = [*image, *names]
        self._num_batches = math.ceil(math.ceil(shards.num_samples(feed.split) / feed.world_size) / feed.batch_size)
        self._num_taken = num_taken
        self._is_running = False

    @property
    def num_left(self) -> int:
        """Batches of this epoch that are not taken yet."""
        return self._num_batches - self._num_taken

    def take(self) -> dict[str, Any]:
        """The next batch's outputs by name: torch tensors (B, ...), but "encoded": DALI's list of JPEGs uint8 (bytes,).

        Raises UserError that names the shard, or what finds it.
        """
        try:
            if not self._is_running:
                self._pipeline.schedule_run()
                self._is_running = True
            outputs = self._pipeline.share_outputs()
        except RuntimeError as error:
            find_damage(self._shards, self._feed.split)
            root = self._shards.root
            raise UserError(
                f"{root}: a {self._feed.split} sample cannot be read or decoded; find it with `alexnet-prep verify "
                f"--decode --shards {root}`"
            ) from error
        self._pipeline.release_outputs()
        self._pipeline.schedule_run()
        self._num_taken += 1
        taken = {name: _hand_over(name, output) for name, output in zip(self._names, outputs, strict=True)}
        self._check_labels(taken["label"], taken["key"])
        return taken

    def _check_labels(self, digits: Tensor, keys: Tensor) -> None:
        """A label that no class has would be an error of the loss, on a GPU one that ends the process."""
        values = digits.numpy() - np.uint8(ord("0"))  # NumPy: a fifth of torch's time for so few numbers
        labels, num_classes = values @ _LABEL_POWERS, self._shards.num_classes
        if values.max() > 9 or labels.max() >= num_classes:
            at = int(((values > 9).any(axis=1) | (labels >= num_classes)).nonzero()[0][0])
            key, said = int(read_number(keys)[at]), bytes(digits[at].tolist())
            shards = self._shards
            raise UserError(
                f"{SampleTable(shards, self._feed.split).find_tar(key)}: sample {key:0{KEY_DIGITS}d} has the label "
                f"{said!r}, expected {CLS_DIGITS} digits, 0 to {num_classes - 1} (the classes of {MANIFEST}); list all "
                f"such with `alexnet-prep verify --shards {shards.root}`, then make the shards again"
            )

    def finish_epoch(self) -> None:
        """Read on to the end of the epoch, the only place where DALI can begin the next one."""
        while self.num_left > 0:
            self.take()
        self._num_taken = 0

    def checkpoint(self) -> bytes:
        """The graph's state after the batches taken, for train_pipeline."""
        return self._pipeline.checkpoint()


def _hand_over(name: str, output: Any) -> Any:
    if name == "encoded":
        return output
    if name == "pixels":
        return torch.from_dlpack(output.as_tensor())
    # Copied: beside a GPU they may lie in pinned memory, which torch does not take over.
    return torch.from_numpy(np.array(output.as_tensor()))


class Drawn(NamedTuple):
    """A batch's labels and keys int64 (B,), offset int32 (B, 2) as (y, x), flip int32 (B,), shift float32 (B, 3)."""

    labels: Tensor
    keys: Tensor
    offset: Tensor
    flip: Tensor
    shift: Tensor


def read_draws(outputs: Mapping[str, Tensor], basis: Tensor | None) -> Drawn:
    """What a training graph's outputs say. `basis` (3, 3): of the colour shift (ColorStats.lighting_basis), or None.

    For a batch at a time: as operators of the graph the same costs a tenth of the decoding.
    """
    offset = (torch.stack([outputs["y"], outputs["x"]], dim=-1) * MAX_OFFSET_PX).to(torch.int32)  # whole already
    noise = outputs["noise"]
    shift = torch.zeros_like(noise) if basis is None else (noise[:, None, :] * basis).sum(-1)
    return Drawn(read_number(outputs["label"]), read_number(outputs["key"]), offset, outputs["flip"], shift)


def read_number(digits: Tensor) -> Tensor:
    """The numbers int64 (B,) that ASCII digits (B, n) spell."""
    powers = torch.tensor([10**place for place in reversed(range(digits.shape[1]))])
    return ((digits.to(torch.int64) - ord("0")) * powers).sum(-1)
