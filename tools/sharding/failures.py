"""Images that could not be used: what is known of each, and how many are too many.

The decision that shaped it: a failure is data, never silence and never the end of the job by itself; a limit that the
user sets decides when a source is too broken to go on. Left out: what makes an image fail (pipeline/images/decode.py).
"""

import json
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from pipeline.common.errors import UserError

_NUM_NAMED = 3


class Failure(NamedTuple):
    """An image that could not be used: its path in the source, why in words, the name of the exception."""

    source: str
    reason: str
    exception: str


def limit_failures(text: str, num_images: int) -> int:
    """How many images may fail: "25" is a count, "0.1%" a share of the images and at least 1. Raises ValueError."""
    if not re.fullmatch(r"[0-9]+|[0-9]+(\.[0-9]+)?%", text):
        raise ValueError(f"{text!r}: expected a count such as 25 or a percentage such as 0.1%")
    if text.endswith("%"):
        return max(1, int(Fraction(text[:-1]) * num_images / 100))
    return int(text)


def refuse_failures(failures: Sequence[Failure], max_failures: str, num_images: int) -> None:
    """Raise UserError, naming the first few, if more images failed than `limit_failures` allows."""
    limit = limit_failures(max_failures, num_images)
    if len(failures) > limit:
        raise UserError(
            f"{len(failures)} of {num_images} images cannot be used, limit {limit} (--max-failures {max_failures}): "
            f"{name_failures(failures)}; mend them and run again with --force, or go on without them by a higher "
            "--max-failures"
        )


def name_failures(failures: Sequence[Failure]) -> str:
    """The first few, with names quoted, so that a message stays one line whatever they are."""
    return "; ".join(f"{f.source!r}: {f.reason} ({f.exception})" for f in failures[:_NUM_NAMED])


def encode_failures(failures: Sequence[Failure]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(failure._asdict()) + "\n" for failure in failures).encode("ascii")
