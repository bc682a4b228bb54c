"""Which font can draw a name: the one at hand, or one of the machine's that knows more scripts."""

from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_PLAIN = ("Regular", "Book", "Roman", "Medium")
_BESIDE = frozenset("0123456789% ")
"""What a line has beside a name."""
# The machine's fonts that have served: names come in one script, mostly, and a machine may have thousands of fonts.
_served: list[Path] = []


def font_for(text: str, size: int = 13) -> Font:
    """DejaVu Sans, which comes with matplotlib; for a text of letters that it lacks, the machine's font with most.

    Without matplotlib it is Pillow's own font.

    Args:
        text: one line. A text in two scripts that no font has both of still shows boxes.
        size: in pixels.
    """
    usual = _usual()
    if usual is None:
        return ImageFont.load_default(size + 1)
    lacking = frozenset(text) - _letters(usual)
    return _opened(_best_of_the_machine(lacking, usual) if lacking else usual, size)


@cache
def _usual() -> Path | None:
    if find_spec("matplotlib") is None:
        return None
    from matplotlib import get_data_path

    return Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _opened(font: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font, size)


@cache
def _letters(font: Path) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(str(font)).get_charmap()))


@lru_cache(1000)
def _best_of_the_machine(lacking: frozenset[str], usual: Path) -> Path:
    wanted = lacking | _BESIDE
    for font in _served:
        if _fitness(font, wanted)[0] == len(wanted):
            return font
    best = max([usual, *_of_the_machine()], key=lambda font: _fitness(font, wanted))
    if best not in _served:
        _served.append(best)
    return best


@cache
def _of_the_machine() -> list[Path]:
    """The machine's font files, in a stable order."""
    from matplotlib.font_manager import findSystemFonts

    return sorted(Path(found) for found in findSystemFonts())


def _fitness(font: Path, letters: frozenset[str]) -> tuple[int, bool]:
    """How many of the letters a font file has, and whether it is a font for plain text, neither bold nor thin."""
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(str(font))
        if not face.scalable:
            return 0, False
        return sum(face.get_char_index(ord(letter)) != 0 for letter in letters), face.style_name in _PLAIN
    except (OSError, RuntimeError):
        return 0, False
