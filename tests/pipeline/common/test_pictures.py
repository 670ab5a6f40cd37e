"""Names of any script in pictures: in a font that has their letters, else as escapes, and never with a warning."""

from pathlib import Path

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from pipeline.common.pictures import find_fonts, shorten, write_png


def draw(path: Path, *words: str) -> bytes:
    figure = Figure(figsize=(3, 1))
    for place, text in enumerate(words):
        figure.text(0.05, 0.1 + 0.4 * place, text, family="DejaVu Sans", weight="bold" if place else "normal")
    write_png(figure, path, 100)
    assert [text.get_text() for text in figure.texts] == list(words)
    return path.read_bytes()


@pytest.fixture
def square_font(tmp_path, monkeypatch) -> str:
    """A font family of one letter, 犬, as a black square."""
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000, isTTF=True)
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder.setupGlyphOrder([".notdef", "dog"])
    builder.setupCharacterMap({ord("犬"): "dog"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "dog": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "dog": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "square.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    font_manager.fontManager.addfont(tmp_path / "square.ttf")
    font_manager.fontManager._findfont_cached.cache_clear()
    return "Square"


@pytest.fixture
def own_fonts(monkeypatch) -> None:
    """A machine that has matplotlib's own fonts alone."""
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


def test_letters_that_no_font_has_are_told_apart_without_a_warning(own_fonts, tmp_path, recwarn):
    pictures = [draw(tmp_path / "a.png", name, f"{name} x") for name in ("翘头剪", "止血钳", "犬" * 40)]
    assert len(set(pictures)) == 3 and not list(recwarn)
    assert pictures[0] == draw(tmp_path / "b.png", "\\u7fd8\\u5934\\u526a", "\\u7fd8\\u5934\\u526a x")


def test_letters_that_some_font_has_are_drawn_in_it(own_fonts, square_font, tmp_path, recwarn):
    assert find_fonts(frozenset("犬翘")) == ([square_font], {"翘"})
    draw(tmp_path / "square.png", "犬")
    draw(tmp_path / "mixed.png", "a 犬", "犬 翘")
    num_dark = [(lambda image: sum(image.histogram()[:64]))(Image.open(tmp_path / name).convert("L"))
                for name in ("square.png", "mixed.png")]  # fmt: skip
    em_px = 10 * 100 / 72
    assert num_dark[0] == pytest.approx(em_px**2, rel=0.2) and num_dark[1] > 2 * num_dark[0]
    assert not list(recwarn)


def test_a_picture_of_plain_letters_is_the_same_whatever_fonts_there_are(own_fonts, tmp_path, request):
    before = draw(tmp_path / "a.png", "café ✓", "dog")
    request.getfixturevalue("square_font")
    assert draw(tmp_path / "b.png", "café ✓", "dog") == before


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("caf\udce9", "caf\\udce9"),
        ("a\n b\t", "a b"),
        ("a\x1b[2J", "a\\x1b[2J"),
        ("x" * 13, "x" * 11 + "…"),
        ("犬", "犬"),
    ],
    ids=ascii,
)
def test_a_name_is_one_printable_line_in_which_no_letter_is_lost(name, shown):
    assert shorten(name, 12) == shown
