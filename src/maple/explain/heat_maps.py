"""The files of an explanation, which reports read.

NNN_NAME.png   an image and both of its heat maps
maps.json      "maps": the name, class, predictions and values of each image; "left_out": the unreadable ones
words.json     the words nearest to each learned text token (see `maple.explain.words`)
"""

import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from PIL import Image

from maple import files
from maple.errors import MapleError, visible
from maple.explain.explainer import ExplainedSide, Explanation
from maple.inference import UnreadableImage
from maple.inference.predictor import classes_to_json

PANEL = 256
"""The side of a panel in pixels."""

# Pixels; a figure of 72 dots per inch has fonts of as many points as pixels.
_DPI, _GAP, _LINE, _FONT_SIZE, _BAR_WIDTH, _INDENT = 72, 16, 19, 13, 48, 56
_INK, _SOFT, _BAR = "#1d1f23", "#666b73", "#cf4a2c"
_USUAL_FONT = "DejaVu Sans"
# A font of matplotlib with a box for every letter.
_PLACEHOLDER_FONT = "Last Resort High-Efficiency"
_used_fonts: list[str] = []
_LONGEST = 100


def draw(explanation: Explanation) -> Image.Image:
    """Draw the image, the map of the frozen CLIP and that of the method, each map scaled to its own maximum.

    Class names in any script are drawn where an installed font has their letters.

    Example:
        >>> draw(explanation).save("map.png")
    """
    width = 3 * PANEL + 4 * _GAP
    height = PANEL + 3 * _GAP + _LINE * (max(len(explanation.zero_shot.best), len(explanation.trained.best)) + 3)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def write(left: int, top: int, text: str, *, color: str = _INK, bold: bool = False) -> None:
        """One line of text, shortened at the end of its panel."""
        text = visible(text, "?")[:_LONGEST]
        drawn = figure.text(
            left,
            height - top,
            text,
            transform=None,
            va="top",
            color=color,
            size=_FONT_SIZE,
            weight="bold" if bold else "normal",
            family=font_families(frozenset(text)),
            parse_math=False,
        )
        room = PANEL - (left - _GAP) % (PANEL + _GAP)
        while len(text) > 1 and drawn.get_window_extent().width > room:
            text = text.removesuffix("…")[:-1] + "…"
            drawn.set_text(text)

    with warnings.catch_warnings():
        # A letter that no installed font has is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        panels = (("input of CLIP", None), ("zero-shot CLIP", explanation.zero_shot), ("trained", explanation.trained))
        for number, (title, side) in enumerate(panels):
            left, below = _GAP + number * (PANEL + _GAP), 2 * _GAP + _LINE + PANEL
            write(left, _GAP, title, bold=True)
            bottom = height - (_GAP + _LINE + 4 + PANEL)
            axes = figure.add_axes((left / width, bottom / height, PANEL / width, PANEL / height), frameon=False)
            axes.set_axis_off()
            if side is None:
                axes.imshow(explanation.image, interpolation="bicubic")
                write(left, below, "maps for the class")
                write(left, below + _LINE, explanation.target, bold=True)
                write(left, below + 2 * _LINE, "lighter: more evidence for it", color=_SOFT)
                continue
            # The map over the image in grey. Its colours differ in lightness too, for print in black and white.
            values, grey = np.array(side.values), explanation.image.convert("L")
            extent = (0.0, 1.0, 1.0, 0.0)
            axes.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="bicubic", extent=extent)
            peak = values.max() or 1.0
            axes.imshow(values, cmap="inferno", vmin=0, vmax=peak, alpha=0.55, interpolation="bilinear", extent=extent)
            for row, item in enumerate(side.best):
                top = below + row * _LINE
                size = (_BAR_WIDTH * item.probability, 10)
                figure.add_artist(Rectangle((left, height - top - 12), *size, color=_BAR, transform=None))
                text = f"{100 * item.probability:.0f} %  {item.name}"
                write(left + _INDENT, top, text, bold=item.name == explanation.target)
            if explanation.target not in [item.name for item in side.best]:
                text = f"{100 * side.probability:.1f} %  {explanation.target}"
                write(left, below + len(side.best) * _LINE, text, color=_SOFT)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


@lru_cache(1000)
def font_families(letters: frozenset[str]) -> list[str]:
    """DejaVu Sans, and installed families with the letters that it lacks: matplotlib takes each letter from the first.

    Letters that no font has are left to matplotlib, which draws boxes.
    """
    families = [_USUAL_FONT]
    missing = letters - _covered(_USUAL_FONT, letters)
    while missing:
        # A machine may have thousands of fonts, and most names are in one script: try the fonts that were used before.
        family = next((used for used in _used_fonts if _covered(used, missing) == missing), None)
        family = family or max((*_used_fonts, *_font_files()), key=lambda name: len(_covered(name, missing)))
        covered = _covered(family, missing)
        if not covered:
            break
        families.append(family)
        if family not in _used_fonts:
            _used_fonts.append(family)
        missing -= covered
    return families


@cache
def _font_files() -> dict[str, str]:
    """The plainest file of each installed family that matplotlib knows."""
    files: dict[str, str] = {}
    for font in sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400)):
        if font.name != _PLACEHOLDER_FONT:
            files.setdefault(font.name, font.fname)
    return files


def _covered(family: str, letters: frozenset[str]) -> frozenset[str]:
    try:
        font = FT2Font(_font_files()[family])
        return frozenset(letter for letter in letters if font.get_char_index(ord(letter)))
    except (OSError, RuntimeError):
        return frozenset()  # a damaged font file


FOLDER = "explanation"
"""The folder of an explanation in a run's."""
MAPS = "maps.json"
_WRITTEN_NAME = re.compile(r"\d{3,}_[\w-]*\.png", flags=re.ASCII)


def write_maps(
    folder: Path, results: Iterable[Explanation | UnreadableImage]
) -> Iterator[tuple[dict[str, Any] | UnreadableImage, Path | None]]:
    """Draw each explanation as it comes; at the end, move all files into the folder and remove those of earlier maps.

    If the iteration is stopped early, the folder stays as it was. Without a readable image nothing is written.

    Yields:
        The entry of an image in maps.json, with its PNG; or an image that could not be read, with None.

    Raises:
        ConfigError: the folder cannot be written.

    Example:
        >>> for entry, png in write_maps(Path("maps"), explainer.explain(find_images(["photos"]))):
        ...     print(png)
    """
    maps: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    earlier = {str(entry.get("png")) for entry in read_maps(folder)}
    with _work_folder(folder) as work:
        for result in results:
            if isinstance(result, UnreadableImage):
                left_out.append({"source": result.source, "reason": result.reason})
                yield result, None
                continue
            stem = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePath(result.source).stem).strip("-")[:40]
            name = f"{len(maps) + 1:03}_{stem or 'image'}.png"
            with files.output_errors(folder):
                draw(result).save(work / name)
            sides = {"zero_shot": _side_to_json(result.zero_shot), "trained": _side_to_json(result.trained)}
            maps.append({"source": result.source, "class": result.target, "png": name, **sides})
            yield maps[-1], folder / name
        if not maps:
            return
        with files.output_errors(folder):
            for entry in maps:
                files.move(work / entry["png"], folder / entry["png"])
            files.write_json(folder / MAPS, {"maps": maps, "left_out": left_out})
            for name in earlier - {entry["png"] for entry in maps}:
                # A damaged maps.json must not name other files for removal.
                if _WRITTEN_NAME.fullmatch(name):
                    (folder / name).unlink(missing_ok=True)


def read_maps(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of an earlier maps.json; none where there is no such file, or a damaged one.

    Example:
        >>> [entry["png"] for entry in read_maps(Path("runs/pets/explanation"))]
        ['001_cat.png']
    """
    with suppress(MapleError):
        maps: Any = files.read_json(folder / MAPS).get("maps")
        return [entry for entry in maps if isinstance(entry, dict)] if isinstance(maps, list) else []
    return []


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`; an empty `folder` is removed with it."""
    with files.output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-")
    try:
        with work:
            yield Path(work.name)
    finally:
        with suppress(OSError):
            folder.rmdir()


def _side_to_json(side: ExplainedSide) -> dict[str, Any]:
    values = [list(row) for row in side.values]
    return {"best": classes_to_json(side.best), "probability": side.probability, "values": values}
