"""Errors as a table, predictions as a CSV file and as plain lines.

Paths and class names may hold anything: they are escaped for the screen and kept byte for byte in files.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common.console import print_table
from pipeline.common.errors import UserError, printable
from pipeline.common.files import write_atomic

if TYPE_CHECKING:
    from trainer.nets.predict import Guess

TOP = 5
_CELLS = ("wnid", "name", "probability")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[tuple[Sequence[object], "Sequence[Guess]"]]) -> None:
    """Rows of some values and the best classes: `columns`, then wnid_1, name_1, probability_1, ..., probability_5.

    UTF-8; bytes of file names that are not stay as they are. Cells of classes that there are not are empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *(f"{kind}_{place}" for place in range(1, TOP + 1) for kind in _CELLS)])
    for values, best in rows:
        cells = [cell for guess in best for cell in (guess.wnid, guess.name, f"{guess.probability:.8g}")]
        writer.writerow([*values, *cells, *[""] * (len(_CELLS) * (TOP - len(best)))])
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))


def check_target(path: Path) -> None:
    """Raises UserError if a file cannot be made there, before hours of work are done for it."""
    if path.is_dir():
        raise UserError(f"{path}: a folder, expected the name of a file to write")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first, or name another file")


_ILSVRC2012 = "ILSVRC-2012 validation"
# Net, data, and its error in %, top-1 and top-5: with the centre crop, and with ten crops.
PUBLISHED: tuple[tuple[str, str, float | None, float | None, float | None, float | None], ...] = (
    ("the paper, 1 CNN", _ILSVRC2012, None, None, 40.7, 18.2),
    ("the paper, 5 CNNs averaged", _ILSVRC2012, None, None, 38.1, 16.4),
    ("the 2012 source, net 145", _ILSVRC2012, None, None, 40.66, 18.21),
    ("the 2012 source, epoch 135", _ILSVRC2012, None, None, 40.25, 17.99),
    ("Caffe's bvlc_alexnet", _ILSVRC2012, 42.9, 19.8, None, None),
    ("torchvision's alexnet", _ILSVRC2012, 43.48, 20.93, None, None),
    ("the paper, 1 CNN", "ILSVRC-2010 test", 39.0, 18.3, 37.5, 17.0),
    ("the 2012 source, net 145", "ILSVRC-2010 test", 39.02, 18.30, 37.47, 17.00),
)
_ERRORS = ("top1_error", "top5_error", "ten_crop_top1_error", "ten_crop_top5_error")


def list_errors(
    results: Sequence[dict[str, Any]], average: dict[str, Any] | None, *, is_ilsvrc2012: bool
) -> list[list[str]]:
    """The rows of the paper's table 2, a name and four errors: a net each, their average, what was published."""
    rows = [(Path(result["run"]).name, *(result[name] for name in _ERRORS)) for result in results]
    if average:
        rows.append((f"{average['num_nets']} CNNs averaged", *(average[name] for name in _ERRORS)))
    cells = [[name, *(f"{error:.2f}" for error in errors)] for name, *errors in rows]
    if is_ilsvrc2012:
        cells += [
            [name, *("" if error is None else f"{error:g}" for error in errors)]
            for name, data, *errors in PUBLISHED
            if data == _ILSVRC2012
        ]
    return cells


def print_errors(results: Sequence[dict[str, Any]], average: dict[str, Any] | None, *, is_ilsvrc2012: bool) -> None:
    """The table of list_errors, to stdout."""
    from rich.markup import escape

    rows = [
        [escape(printable(cell)) for cell in row] for row in list_errors(results, average, is_ilsvrc2012=is_ilsvrc2012)
    ]
    columns = ["error, %", "centre, top-1", "top-5", "ten crops, top-1", "top-5"]
    print_table(f"{results[0]['num_images']:,} validation images", columns, rows)


def format_line(what: object, best: "Sequence[Guess]") -> str:
    """One line, tabs between: what, then "probability name" of each class."""
    return "\t".join([printable(what), *(f"{guess.probability:.4f} {printable(guess.name)}" for guess in best)])
