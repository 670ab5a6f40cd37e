"""Predictions as a CSV file, as plain lines and as tables: the same five best classes in every form.

The decision that shaped it: what comes from outside (paths, class names) may hold anything, so that it is escaped for
the screen and kept byte for byte in files. A CSV file is written whole or not at all. Left out: making predictions
(predict.py, ensemble.py).
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.shardset import write_atomic

if TYPE_CHECKING:
    from trainer.predict import Guess

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


def printable(text: object) -> str:
    """Text for a screen or a line: control characters and what is not Unicode as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def format_line(what: object, best: "Sequence[Guess]") -> str:
    """One line, tabs between: what, then "probability name" of each class."""
    return "\t".join([printable(what), *(f"{guess.probability:.4f} {printable(guess.name)}" for guess in best)])
