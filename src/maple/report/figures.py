"""How figures look, and matplotlib's way to SVG for a page with a light and a dark side.

Nothing global is changed. Ink, grid and paper are drawn in stand-in colours and become CSS variables of the page; text
stays text, in the page's font.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from maple.errors import visible
from maple.report.variants import Variant

INK, SOFT, GRID, PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--grid)", PAPER: "var(--paper)"}

WIDTH = 7.2
"""Inches, drawn at 72 units each."""

_NARROW = 6.0
"""Inches below which a figure is not stretched to the page's width."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn: colour, and marker and line that tell it apart without colour."""

    colour: str
    marker: str
    line: Any


_LOOKS = {
    "zero_shot": Look("#7d838c", "o", (0, (1, 1.5))),
    "coop": Look("#c08a1e", "s", (0, (5, 2))),
    "cocoop": Look("#94734a", "P", (0, (3, 1.5, 1, 1.5))),
    "deep_language": Look("#6f9440", "^", (0, (7, 2, 1, 2))),
    "vpt": Look("#2f8f8b", "D", (0, (2, 1))),
    "independent_vl": Look("#7c68b3", "v", (0, (6, 1.5, 2, 1.5))),
    "maple": Look("#cf4a2c", "*", "-"),
    "kgcoop": Look("#4c78a8", "X", (0, (4, 1, 1, 1, 1, 1))),
    "prograd": Look("#b4638c", "h", (0, (8, 3))),
    "promptsrc": Look("#5a6b2f", "<", (0, (1, 3))),
    "linear_probe": Look("#99612b", ">", (0, (3, 3))),
    "clip_adapter": Look("#1f5f8b", "p", (0, (9, 2, 2, 2))),
    "tip_adapter": Look("#8a4f7d", "d", (0, (2, 2, 6, 2))),
    "taskres": Look("#23272e", "8", (0, (6, 2, 1, 2, 1, 2))),
}
_OTHERS = (
    Look("#3d7a8c", "H", (0, (4, 1, 1, 1, 1, 1))),
    Look("#a3526f", "8", (0, (8, 3))),
    Look("#6b6a1f", "X", (0, (1, 3))),
    Look("#85502b", "p", (0, (3, 3))),
    Look("#455f9c", "d", (0, (9, 2, 2, 2))),
    Look("#6d3f77", "h", (0, (2, 2, 6, 2))),
    Look("#2b6b4a", "<", (0, (6, 2, 1, 2, 1, 2))),
    Look("#8f2f2f", ">", (0, (4, 3, 1, 3))),
)


def looks(variants: tuple[Variant, ...]) -> dict[Variant, Look]:
    """Each method has its own look on every page; further variants of one method, and unknown ones, take others."""
    found: dict[Variant, Look] = {}
    taken: set[str] = set()
    spare = 0
    for variant in variants:
        look = _LOOKS.get(variant.name)
        if look is None or variant.name in taken:
            look = _OTHERS[spare % len(_OTHERS)]
            spare += 1
        taken.add(variant.name)
        found[variant] = look
    return found


_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,
    "text.usetex": False,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.solid_capstyle": "round",
    "hatch.linewidth": 0.8,
    "path.simplify": True,
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in this package's style inside, and leave matplotlib's settings as they were."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        # Names in other scripts are drawn by the reader's fonts, not by matplotlib's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def to_svg(figure: Any, name: str, description: str) -> str:
    """The figure as inline SVG whose ids begin with `name`; `description` is read out where it cannot be seen."""
    import matplotlib

    buffer = io.StringIO()
    matplotlib.rcParams["svg.hashsalt"] = name
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "inherit-font", text).replace("inherit-font", "var(--font)")
    width, height = (float(found) for found in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0])
    head = f'<svg role="img" aria-label="{_attribute(description)}" viewBox="0 0 {width:g} {height:g}"'
    if width < _NARROW * 72:
        # Drawn for a column; its text is to be as large as that of the wide ones.
        head += f' style="max-width: {100 * width / (WIDTH * 72):.0f}%; min-width: {width:.0f}px"'
    # A function, since a name may hold a backslash, which a replacement text would take for a reference.
    return re.sub(r"<svg [^>]*>", lambda _: head + ' xmlns="http://www.w3.org/2000/svg">', text, count=1)


def plain(text: str, longest: int = 34) -> str:
    """A name that fits into a figure: nothing unprintable, cut where too long."""
    clean = visible(text, "?")
    return clean if len(clean) <= longest else f"{clean[: longest - 1]}…"


def _attribute(text: str) -> str:
    for character, entity in (("&", "&amp;"), ('"', "&quot;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(character, entity)
    return text
