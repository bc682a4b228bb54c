"""The look of figures, and matplotlib's way to SVG for a page with a light and a dark theme.

Nothing global is changed. Ink, grid and paper are drawn in placeholder colours that become CSS variables of the page;
text stays text, in the page's font.
"""

import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from html import escape
from importlib import resources
from typing import Any

from maple.descriptions import PlotStyle
from maple.errors import visible
from maple.report.groups import Variant
from maple.report.records import harmless

INK, SOFT, GRID, PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
GAIN, LOSS = "#2f8f8b", "#cf4a2c"
WIDTH = 7.2
"""Inches, drawn at 72 units each."""

_CSS_VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--grid)", PAPER: "var(--paper)"}
_NARROW = 6.0  # inches below which a figure is not stretched to the page's width
_SPARE_STYLES = (
    PlotStyle("#3d7a8c", "H", (0, (4, 1, 1, 1, 1, 1))),
    PlotStyle("#a3526f", "8", (0, (8, 3))),
    PlotStyle("#6b6a1f", "X", (0, (1, 3))),
    PlotStyle("#85502b", "p", (0, (3, 3))),
    PlotStyle("#455f9c", "d", (0, (9, 2, 2, 2))),
    PlotStyle("#6d3f77", "h", (0, (2, 2, 6, 2))),
    PlotStyle("#2b6b4a", "<", (0, (6, 2, 1, 2, 1, 2))),
    PlotStyle("#8f2f2f", ">", (0, (4, 3, 1, 3))),
)


def plot_styles(variants: Iterable[Variant]) -> dict[Variant, PlotStyle]:
    """Each method has its own style on every page; its further variants, and methods without one, get spare ones."""
    styles: dict[Variant, PlotStyle] = {}
    methods: set[str] = set()
    spare = 0
    for variant in variants:
        style = variant.description.plot_style
        if style is None or variant.name in methods:
            style = _SPARE_STYLES[spare % len(_SPARE_STYLES)]
            spare += 1
        methods.add(variant.name)
        styles[variant] = style
    return styles


def marker(style: PlotStyle, size: float, star: float, edge: float) -> dict[str, Any]:
    """Arguments of a marked line; a star looks smaller than other marks, so it has a size of its own."""
    return {
        "color": style.color,
        "marker": style.marker,
        "markersize": star if style.marker == "*" else size,
        "markeredgecolor": PAPER,
        "markeredgewidth": edge,
    }


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the style of report.mplstyle inside, and leave matplotlib's settings as they were."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        with resources.as_file(resources.files("maple.report") / "templates" / "report.mplstyle") as path:
            matplotlib.rcParams.update(matplotlib.rc_params_from_file(path, use_default_template=False))
        # Names in other scripts are drawn by the reader's fonts, not by matplotlib's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(
    width: float, height: float, rows: int, columns: int, h_pad: float = 0.05, **options: Any
) -> tuple[Any, Any]:
    """A figure in inches, and its panels as an array [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=h_pad, wspace=0.04)  # type: ignore[union-attr, call-arg]
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def to_svg(figure: Any, name: str, description: str) -> str:
    """The figure as inline SVG whose ids begin with `name`; `description` is its text for screen readers."""
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
    for placeholder, variable in _CSS_VARIABLES.items():
        text = text.replace(placeholder, variable)
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "var(--font)", text)
    width, height = (float(number) for number in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0])
    head = f'<svg role="img" aria-label="{escape(harmless(description))}" viewBox="0 0 {width:g} {height:g}"'
    if width < _NARROW * 72:
        # Drawn for a column; its text should be as large as that of the wide ones.
        head += f' style="max-width: {100 * width / (WIDTH * 72):.0f}%; min-width: {width:.0f}px"'
    # A function, because a name may hold a backslash, which a replacement text would take for a reference.
    return re.sub(r"<svg [^>]*>", lambda _: head + ' xmlns="http://www.w3.org/2000/svg">', text, count=1)


def fitted(text: str, longest: int = 34) -> str:
    """A name that fits into a figure: nothing unprintable, cut where too long."""
    clean = visible(text, "?")
    return clean if len(clean) <= longest else f"{clean[: longest - 1]}…"
