"""Names in any script, drawn with a font that has their letters."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import ImageFont

from maple.explain import fonts


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    def forget() -> None:
        fonts._usual.cache_clear()
        fonts._best_of_the_machine.cache_clear()
        fonts._of_the_machine.cache_clear()
        fonts._served.clear()

    forget()
    yield
    forget()


def write_font(path: Path, letters: str, style: str = "Regular") -> str:
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (500, 700), (500, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"u{ord(letter):X}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): f"u{ord(letter):X}" for letter in letters})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": style})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


def chosen(text: str) -> str | None:
    font = fonts.font_for(text)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font.getname()[0]


def test_a_font_of_the_machine_has_the_letters_that_ours_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "a_broken.ttf"
    broken.write_bytes(b"no font")
    machine = [
        str(broken),
        write_font(tmp_path / "b_bold.ttf", "猫 0123456789%", "Bold"),
        write_font(tmp_path / "c_one.ttf", "猫"),
        write_font(tmp_path / "d_both.ttf", "猫犬 0123456789%"),
    ]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: machine)
    assert chosen("a cat, кот, γάτα") == "DejaVu Sans"
    assert chosen("97 %  猫") == "d_both"
    monkeypatch.setattr(fonts, "_of_the_machine", lambda: pytest.fail("a font that has served is asked first"))
    assert chosen("3 %  犬") == "d_both"


def test_lines_share_their_font() -> None:
    assert fonts.font_for("97 %  cat") is fonts.font_for("3 %  dog")


def test_letters_that_no_font_has_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    assert chosen("猫") == "DejaVu Sans"


def test_without_matplotlib_there_is_a_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "find_spec", lambda _: None)
    assert fonts.font_for("cat").getbbox("cat")[2] > 0
