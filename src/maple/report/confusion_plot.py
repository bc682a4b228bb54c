"""The confusion matrices of zero-shot CLIP and of a method, side by side."""

import numpy as np

from maple.report.duels import Duel, Predictions
from maple.report.figures import GRID, INK, PAPER, WIDTH, plain, styled, to_svg

MOST_CLASSES = 40
"""With more a matrix cannot be read; the list of the most frequent mistakes says what matters."""


def confusion_figure(duel: Duel, method: str, name: str) -> str | None:
    """Row-wise shares of the answers; None for several parts of the classes, or for too many classes to be read."""
    bout = duel.bouts[0]
    count = len(bout.class_names)
    if len(duel.bouts) > 1 or count > MOST_CLASSES:
        return None
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    shades = LinearSegmentedColormap.from_list("shades", ["#cf4a2c00", "#cf4a2c"])
    with styled():
        figure = Figure(figsize=(WIDTH, 1.3 + min(5.5, 2.2 + 0.14 * count)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        sides = ((bout.before, "zero-shot CLIP"), (bout.after, plain(method, 30)))
        for panel, (predictions, title) in zip(panels, sides, strict=True):
            shares = _shares(predictions, count)
            panel.imshow(shares, cmap=shades, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            panel.set_title(title)
            labels = [plain(class_name, 18) for class_name in bout.class_names]
            panel.set_xticks(range(count), labels, rotation=90, fontsize=_size(count))
            panel.set_yticks(range(count), labels, fontsize=_size(count))
            panel.spines[:].set_visible(True)
            panel.spines[:].set_color(GRID)
            if count <= 12:
                for row, column in zip(*np.nonzero(np.round(100 * shares) >= 1), strict=True):
                    share = shares[row, column]
                    ink = PAPER if share > 0.6 else INK
                    panel.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=7)
        return to_svg(figure, name, f"Confusion matrices of {count} classes, in per cent of each row")


def _size(count: int) -> float:
    return max(4.5, min(8.5, 170 / count))


def _shares(predictions: Predictions, count: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """[C, C]: of the images of each class, the share that is said to be of each; 0 for a class without images."""
    cells = predictions.labels.astype(np.int64) * count + predictions.top[:, 0]
    matrix = np.bincount(cells, minlength=count * count).reshape(count, count).astype(np.float64)
    totals = matrix.sum(axis=1, keepdims=True)
    shares: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = matrix / np.maximum(totals, 1)
    return shares
