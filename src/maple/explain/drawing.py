"""One PNG for a picture: what the image tower saw, and both maps over it, with the answers below."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from maple.errors import visible
from maple.explain.explainer import Explanation, Side
from maple.explain.fonts import font_for

PANEL = 256
"""Pixels of a panel's side."""
_GAP = 16
_LINE = 19
_INK, _SOFT, _BAR, _PAPER = (29, 31, 35), (102, 107, 115), (207, 74, 44), (255, 255, 255)
# From dark to light, so that it reads in black and white too.
_COLOURS = np.array([(8, 6, 32), (74, 18, 98), (155, 42, 96), (222, 82, 52), (250, 160, 38), (252, 250, 168)])


def draw(explanation: Explanation) -> Image.Image:
    """The picture, the frozen CLIP's map and the trained method's, side by side; each map scaled to its own maximum."""
    lines = max(len(explanation.zero_shot.best), len(explanation.tuned.best))
    width, height = 3 * PANEL + 4 * _GAP, PANEL + 3 * _GAP + _LINE * (lines + 3)
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    seen = explanation.seen.resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    panels = (
        ("what CLIP sees", seen, None),
        ("zero-shot CLIP", shaded(seen, explanation.zero_shot), explanation.zero_shot),
        ("trained", shaded(seen, explanation.tuned), explanation.tuned),
    )
    for number, (title, image, side) in enumerate(panels):
        left = _GAP + number * (PANEL + _GAP)
        _write(pen, (left, _GAP), title, bold=True)
        sheet.paste(image, (left, _GAP + _LINE + 4))
        below = 2 * _GAP + _LINE + PANEL
        if side is None:
            _write(pen, (left, below), "maps for the class")
            _write(pen, (left, below + _LINE), explanation.target, bold=True)
            _write(pen, (left, below + 2 * _LINE), "lighter: speaks more for it", colour=_SOFT)
        else:
            _answers(pen, (left, below), side, explanation.target)
    return sheet


def shaded(seen: Image.Image, side: Side) -> Image.Image:
    """The picture in grey under the map: dark where nothing speaks for the class, light where most does."""
    values = np.array(side.values, dtype=np.float32)
    peak = float(values.max())
    scaled = np.rint(255 * values / peak).astype(np.uint8) if peak > 0 else np.zeros(values.shape, np.uint8)
    smooth = np.asarray(Image.fromarray(scaled).resize(seen.size, Image.Resampling.BILINEAR), dtype=np.float32) / 255
    grey = np.asarray(seen.convert("L"), dtype=np.float32)[:, :, None]
    mixed = 0.45 * grey + 0.55 * _coloured(smooth)
    return Image.fromarray(np.rint(mixed).clip(0, 255).astype(np.uint8))


def _coloured(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Colours [H, W, 3], 0 to 255, of values [H, W], 0 to 1."""
    places = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(values, places, _COLOURS[:, channel]) for channel in range(3)], axis=-1)


def _answers(pen: ImageDraw.ImageDraw, place: tuple[int, int], side: Side, target: str) -> None:
    left, top = place
    for number, one in enumerate(side.best):
        line = top + number * _LINE
        pen.rectangle((left, line + 3, left + round(48 * one.probability), line + 13), fill=_BAR)
        _write(pen, (left + 56, line), f"{100 * one.probability:.0f} %  {one.name}", bold=one.name == target)
    if target not in [one.name for one in side.best]:
        _write(pen, (left, top + len(side.best) * _LINE), f"{100 * side.probability:.1f} %  {target}", colour=_SOFT)


def _write(
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    *,
    bold: bool = False,
    colour: tuple[int, int, int] = _INK,
) -> None:
    """One line, cut where the panel ends."""
    clean = visible(text, "?")
    font = font_for(clean)
    room = PANEL - (56 if place[0] % (PANEL + _GAP) != _GAP else 0)
    while clean and font.getlength(clean) > room:
        clean = f"{clean[:-2]}…" if clean.endswith("…") else f"{clean[:-1]}…"
    pen.text(place, clean, fill=colour, font=font, stroke_width=0.4 if bold else 0)
