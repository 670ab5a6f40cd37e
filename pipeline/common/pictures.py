"""What every picture does about letters: names may be of any script, and fonts hold some of them each."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.common.errors import printable
from pipeline.common.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ESCAPED_LETTERS = 24  # of a line with escapes: nobody reads them, they only tell names apart


def shorten(name: str, limit: int) -> str:
    """A name from a file as one printable line of at most `limit` characters: what is drawn is never markup."""
    line = printable(" ".join(name.split()))
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def write_png(figure: "Figure", path: Path, dpi: int) -> None:
    """Write a figure, atomically; folders are made. The same figure gives the same bytes, as long as its own font has
    all letters: others come from this machine's fonts, and stand there as escapes where none has them."""
    buffer = io.BytesIO()
    with without_glyph_warnings(), _letters_found(figure):
        figure.savefig(
            buffer, format="png", dpi=dpi, metadata={"Software": None}
        )  # no version: the same bytes anywhere
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """For an SVG, whose letters are the reader's to draw."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


@contextmanager
def _letters_found(figure: "Figure") -> Iterator[None]:
    """Give the texts of a figure the fonts that they need, for as long as the block runs."""
    from matplotlib.font_manager import findfont
    from matplotlib.text import Text

    before = []
    for text in figure.findobj(Text):
        words = text.get_text()
        if missing := _missing(findfont(text.get_fontproperties()), frozenset(words)):
            before.append((text, words, text.get_fontfamily()))
            families, missing = find_fonts(missing)
            text.set_fontfamily([*text.get_fontfamily(), *families])
            text.set_text("\n".join(_escape(line, missing) for line in words.split("\n")))
    yield
    for text, words, family in before:
        text.set_text(words)
        text.set_fontfamily(family)


def find_fonts(letters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """The fewest font families of this machine, roughly, that have these letters, and the letters that none has."""
    from matplotlib.font_manager import fontManager

    held: dict[str, frozenset[str]] = {}
    for font in sorted(fontManager.ttflist, key=lambda font: (font.name, font.fname)):
        if font.name not in held and not font.name.startswith("Last Resort"):  # its boxes stand for any letter
            with suppress(OSError, RuntimeError):  # a damaged font, or one of pictures
                held[font.name] = letters - _missing(font.fname, letters)
    families = []
    while letters and held:
        best = max(held, key=lambda name: len(held[name] & letters))
        if not held[best] & letters:
            break
        families.append(best)
        letters -= held[best]
    return families, letters


def _missing(path: str, letters: frozenset[str]) -> frozenset[str]:
    from matplotlib.font_manager import get_font

    if all(letter.isascii() for letter in letters):
        return frozenset()
    font = get_font(path)
    return frozenset(letter for letter in letters if not letter.isspace() and not font.get_char_index(ord(letter)))


def _escape(line: str, missing: frozenset[str]) -> str:
    if not missing & set(line):
        return line
    return shorten("".join(ascii(letter)[1:-1] if letter in missing else letter for letter in line), _ESCAPED_LETTERS)
