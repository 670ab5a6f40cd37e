"""metrics.jsonl: its records, how they are written while a run trains, and how they are read (docs/metrics.md)."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, TypedDict, Unpack

from pipeline.common.errors import UserError
from pipeline.common.files import write_atomic

_BUFFER_BYTES = 1 << 20  # lines are written one by one; while the disk is full, so much waits here


class TrainRecord(TypedDict):
    """Training since the record before it: means over those steps, errors in percent."""

    step: int  # optimiser steps done so far
    epoch: int  # from 1
    loss: float  # cross-entropy, nats
    top1_error: float
    top5_error: float
    lr: float
    images_per_s: float
    data_wait_fraction: float  # share of the time spent waiting for data, 0 to 1
    time_s: float  # of training so far, without evaluations


class GpuFields(TypedDict, total=False):
    """What a TrainRecord of a run on GPUs has besides: the first rank's GPU when it was written."""

    gpu_utilisation: float  # 0 to 1; only where NVML's Python module is installed
    gpu_memory_bytes: int  # in use, by whatever process


class _TrainFields(TrainRecord, GpuFields):
    pass


class EvalRecord(TypedDict):
    """An evaluation of the net as it was after `step` steps; errors in percent."""

    step: int
    epoch: int
    crops: str  # "centre" or "ten"
    num_images: int
    loss: float
    top1_error: float
    top5_error: float


_FIELDS: dict[str, dict[str, type]] = {
    "train": TrainRecord.__annotations__,
    "eval": EvalRecord.__annotations__,
    "event": {"name": str},
}
_OPTIONAL: dict[str, dict[str, type]] = {"train": GpuFields.__annotations__, "eval": {}, "event": {"step": int}}
_ACCEPTED: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float, NoneType), str: (str,)}


class MetricsLog:
    """metrics.jsonl of a run being trained, open at its end. Get one from `MetricsLog.open`; one process writes it.

    All that belongs to a step is logged before that step's checkpoint is saved, and `sync` is called between the two:
    resumption then loses no line and repeats none.
    """

    def __init__(self, file: BinaryIO, echo: Callable[[dict[str, Any]], object] | None = None) -> None:
        self._file, self._echo = file, echo

    @classmethod
    def open(
        cls,
        path: Path,
        after_step: int | None,
        echo: Callable[[dict[str, Any]], object] | None = None,
        *,
        epoch: int = sys.maxsize,
    ) -> "MetricsLog":
        """A new log (`after_step` None), or that of a run resumed from its checkpoint at step `after_step` in `epoch`.

        `echo` is given every record that is written. On resumption the lines from the first one past `after_step` on
        are cut, atomically, with a torn last line. So is the evaluation that ends `epoch`: a checkpoint of the epoch's
        last step is from before it.
        Raises FileExistsError where a new log would overwrite one, and UserError where the old one is damaged.
        """
        if after_step is None:
            return cls(path.open("xb", buffering=_BUFFER_BYTES), echo)
        kept = []
        for line, record in _parse(path) if path.exists() else []:
            if record.get("step", 0) > after_step or (record["kind"] == "eval" and record["epoch"] >= epoch):
                break
            kept.append(line + b"\n")
        write_atomic(path, b"".join(kept))
        return cls(path.open("ab", buffering=_BUFFER_BYTES), echo)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def train(self, **record: Unpack[_TrainFields]) -> None:
        """Log training since the line before."""
        self._write({"kind": "train", **record})

    def eval(self, **record: Unpack[EvalRecord]) -> None:
        """Log an evaluation."""
        self._write({"kind": "eval", **record})

    def event(self, name: str, **fields: Any) -> None:
        """Log something that happened ("lr_cut", "resumed"); give it a `step` if it belongs to one."""
        self._write({"kind": "event", "name": name, **fields})

    def sync(self) -> None:
        """Force the lines to the disk; to be called before a checkpoint is saved. Any thread may."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        problem = _problem(finite)
        if problem:  # a defect of the caller, found before it makes the log unreadable
            raise ValueError(f"metrics record: {problem}")
        self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._echo:
            self._echo(finite)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, each an object with a known `kind` and its numbers (a number or None).

    A last line without its end, as a killed run leaves it, is passed over. Raises UserError for a missing file and for
    any other damage, with the number of the line.
    """
    return [record for _, record in _parse(path)]


def _parse(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end is nothing, or torn
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it, or name another run") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line, parse_constant=_refuse_constant)
            problem = _problem(record)
        except (ValueError, RecursionError):
            problem = "not JSON"
        if problem:
            raise UserError(f"{path}: line {number}: {problem}; restore the file, or delete the damaged line")
        records.append((line, record))
    return records


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _problem(record: Any) -> str | None:
    """What is wrong with a decoded line, if anything. Fields beyond the known ones are nobody's business."""
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in _FIELDS:
        return f"kind is {kind!r:.40}, expected one of {', '.join(_FIELDS)}"
    fields = _FIELDS[kind] | {name: type_ for name, type_ in _OPTIONAL[kind].items() if name in record}
    for name, expected in fields.items():
        if name not in record:
            return f"{kind} without {name}"
        value = record[name]
        too_large = isinstance(value, int | float) and not abs(value) <= sys.float_info.max
        if type(value) not in _ACCEPTED[expected] or too_large:
            return f"{name} is {value!r:.40}, expected {expected.__name__}"
    return None
