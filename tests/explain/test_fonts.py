"""Class names in any script, drawn with installed fonts that have their letters."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from maple.explain import Explanation, heat_maps
from maple.explain.explainer import ExplainedSide
from maple.inference.predictor import ClassProbability


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fonts of this test alone, in addition to matplotlib's own."""
    monkeypatch.setattr(heat_maps.fontManager, "ttflist", list(heat_maps.fontManager.ttflist))
    monkeypatch.setattr(heat_maps, "_used_fonts", [])

    def clear() -> None:
        heat_maps.font_families.cache_clear()
        heat_maps._font_files.cache_clear()

    clear()
    yield
    clear()


def install(path: Path, letters: str) -> None:
    """Install a font whose letters are filled boxes."""
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
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    heat_maps.fontManager.ttflist.append(font_manager.FontEntry(fname=str(path), name=path.stem, weight=400))


def families(text: str) -> list[str]:
    return heat_maps.font_families(frozenset(text))


def explanation(name: str) -> Explanation:
    side = ExplainedSide((ClassProbability(name, 0.7),), 0.7, ((0.1, 0.2), (0.3, 0.4)))
    return Explanation("image", name, Image.new("RGB", (32, 32), "teal"), side, side)


def test_installed_fonts_have_the_letters_that_the_usual_one_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_broken.ttf").write_bytes(b"not a font")
    heat_maps.fontManager.ttflist.append(font_manager.FontEntry(fname=str(tmp_path / "a_broken.ttf"), name="a_broken"))
    install(tmp_path / "c_one.ttf", "猫")
    install(tmp_path / "d_both.ttf", "猫犬")
    install(tmp_path / "e_other.ttf", "글")
    assert families("a cat, кот, γάτα") == ["DejaVu Sans"]
    assert families("97 %  猫犬") == ["DejaVu Sans", "d_both"]
    assert families("猫 글") == ["DejaVu Sans", "d_both", "e_other"], "two scripts in one name"
    covered = heat_maps._covered

    def of_used_fonts(family: str, letters: frozenset[str]) -> frozenset[str]:
        assert family in ("DejaVu Sans", "d_both", "e_other")
        return covered(family, letters)

    monkeypatch.setattr(heat_maps, "_covered", of_used_fonts)
    assert families("3 %  犬") == ["DejaVu Sans", "d_both"], "fonts that were used before are tried first"


def test_a_name_is_drawn_with_the_letters_of_its_font(tmp_path: Path) -> None:
    before = np.asarray(heat_maps.draw(explanation("猫猫猫")))
    heat_maps.font_families.cache_clear()
    heat_maps._font_files.cache_clear()
    install(tmp_path / "cats.ttf", "猫")
    after = np.asarray(heat_maps.draw(explanation("猫猫猫")))
    assert before.shape == after.shape
    assert (before != after).any()


def test_letters_that_no_font_has_are_not_an_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert families("\U000f0000") == ["DejaVu Sans"]
        heat_maps.draw(explanation("\U000f0000 $x_1$ and \n"))


def test_a_long_name_ends_with_its_panel() -> None:
    short, long = (np.asarray(heat_maps.draw(explanation("W" * length))) for length in (5, 500))
    assert short.shape == long.shape
    gaps = slice(16 + 256 + 1, 16 + 256 + 15)
    assert (long[:, gaps] == 255).all()
    assert (short != long).any()
