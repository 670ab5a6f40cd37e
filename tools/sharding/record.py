"""The record beside a finished shard (`train-000000.json`), read strictly: the mark that the shard is complete."""

import re
from dataclasses import dataclass, fields
from typing import Any

from pipeline.manifest import KEY_DIGITS

_KEY = re.compile(rf"[0-9]{{{KEY_DIGITS}}}")
_FAILURE_FIELDS = {"source", "reason", "exception"}


@dataclass(frozen=True)
class Record:
    """What a unit of work left: its tar as the manifest lists it, the index's SHA-256, the job, where images were
    encoded (cpu, gpu), the source of each key, what was mended in it, and the images that could not be used."""

    file: str
    split: str
    samples: int
    bytes: int
    sha256: str
    idx_sha256: str
    job: str
    device: str
    sources: dict[str, str]
    repaired: dict[str, str]
    failures: list[dict[str, str]]

    @property
    def num_planned(self) -> int:
        """Images that the unit was given."""
        return len(self.sources) + len(self.failures)

    @classmethod
    def parse(cls, raw: Any) -> "Record":
        """A checked record from decoded JSON. Raises KeyError or TypeError for anything that is none."""
        record = cls(**{field.name: raw[field.name] for field in fields(cls)})
        texts = (record.file, record.split, record.sha256, record.idx_sha256, record.job, record.device)
        is_sound = (
            all(isinstance(text, str) for text in texts)
            and all(type(number) is int for number in (record.samples, record.bytes))
            and all(_holds_texts(each) and all(each.values()) for each in (record.sources, record.repaired))
            and all(_KEY.fullmatch(key) for key in record.sources)
            and all(_holds_texts(each) and each.keys() >= _FAILURE_FIELDS for each in record.failures)
        )
        if not is_sound:
            raise TypeError("a value of another type")
        return record


def _holds_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
