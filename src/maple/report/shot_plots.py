"""The figures of accuracy against shots, in the manner of CoOp (IJCV 2022), figure 3."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from maple.report.figures import INK, PAPER, WIDTH, Look, looks, plain, styled, to_svg
from maple.report.records import ZERO_SHOT
from maple.report.shots import ShotCurves
from maple.report.variants import Variant

_COLUMN = 5.0
"""Inches of a single panel with its labels: printed at a column's width, its text stays legible."""
_MOST_LABELS = 18
"""So many lines can be labelled at their ends, which reads without colours; more have a legend."""
_GAP = 0.052
"""Between two labels, as a part of the panel's height."""
_ACROSS = 3
_DODGE = 0.018
"""How far the methods' marks stand beside each other, as a part of the axis, so that no bar hides another."""
_TITLES = {"top1": "Accuracy"}


def shots_figure(curves: ShotCurves, name: str) -> str:
    """All methods in one panel (or one each for base, novel and harmonic mean): the mean over the data sets."""
    dataset = curves.datasets[0] if len(curves.datasets) == 1 else None
    titles = [_TITLES.get(measure, measure.capitalize()) for measure in curves.measures]
    panels = [(title, dataset, measure) for title, measure in zip(titles, curves.measures, strict=True)]
    return _figure(curves, panels, name, f"Accuracy of {len(curves.variants)} methods at {len(curves.shots)} shots")


def shots_by_dataset_figure(curves: ShotCurves, name: str) -> str:
    """A panel for each data set."""
    panels = [(plain(dataset, 26), dataset, curves.measures[-1]) for dataset in curves.datasets]
    return _figure(curves, panels, name, f"The same on each of {len(curves.datasets)} data sets")


def _figure(curves: ShotCurves, panels: Sequence[tuple[str, str | None, str]], name: str, description: str) -> str:
    from matplotlib.figure import Figure

    across = min(_ACROSS, len(panels))
    down = ceil(len(panels) / across)
    alone = len(panels) == 1 and len(curves.variants) <= _MOST_LABELS
    with styled():
        width = _COLUMN if across == 1 else WIDTH
        legend, columns = (0.0, 1) if alone else _legend_room(curves, width)
        figure = Figure(figsize=(width, (3.6 if across == 1 else 2.3) * down + legend), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.04)  # type: ignore[union-attr, call-arg]
        grid = figure.subplots(down, across, squeeze=False)
        styles = looks(curves.variants)
        for place, (title, dataset, measure) in enumerate(panels):
            panel = grid[place // across][place % across]
            _panel(panel, curves, dataset, measure, styles)
            panel.set_title(title)
            panel.set_ylabel("%" if place % across == 0 else "")
        for empty in grid.flat[len(panels) :]:
            empty.remove()
        if alone:
            _label_ends(grid[0][0])
        else:
            handles = {line.get_label(): line for panel in grid.flat[: len(panels)] for line in _named(panel)}
            figure.legend(
                handles.values(), handles, loc="outside lower left", ncols=columns, columnspacing=1.4, handlelength=3.0
            )
        return to_svg(figure, name, description)


def _legend_room(curves: ShotCurves, width: float) -> tuple[float, int]:
    """Inches of height, and columns."""
    longest = max(len(plain(variant.label, 40)) for variant in curves.variants)
    columns = max(1, min(len(curves.variants), int(15 * width / (longest + 8))))
    return 0.2 + 0.2 * ceil(len(curves.variants) / columns), columns


def _named(panel: Any) -> list[Any]:
    return [line for line in panel.get_lines() if not str(line.get_label()).startswith("_")]


def _label_ends(panel: Any) -> None:
    """Write each line's name beside its end, with a thin line where names had to move apart."""
    low, high = panel.get_ylim()
    panel.set_ylim(low, high)
    lines = sorted(_named(panel), key=lambda line: line.get_ydata()[-1])
    heights = [float(line.get_ydata()[-1]) for line in lines]
    for line, height, place in zip(lines, heights, _apart(heights, _GAP * (high - low), low, high), strict=True):
        panel.annotate(
            line.get_label(),
            # The level line has its ends in parts of the panel's width.
            xy=(1.0 if len(line.get_xdata()) == 2 and line.get_marker() == "None" else line.get_xdata()[-1], height),
            xycoords=line.get_transform(),
            xytext=(1.07, place),
            textcoords=panel.get_yaxis_transform(),
            va="center",
            fontsize=9,
            arrowprops={
                "arrowstyle": "-",
                "color": line.get_color(),
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def _apart(heights: list[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending heights, moved as little as it takes to lie `gap` apart inside the limits."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, low, placed[-1] + gap if placed else low))
    top = high
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], top)
        top = placed[index] - gap
    return placed


def _panel(panel: Any, curves: ShotCurves, dataset: str | None, measure: str, styles: dict[Variant, Look]) -> None:
    learned = [variant for variant in curves.variants if variant.name != ZERO_SHOT]
    panel.set_xscale("log", base=2)
    ratio = curves.shots[-1] / curves.shots[0]
    for index, variant in enumerate(learned):
        points = [(shots, curves.spread(variant, shots, dataset, measure)) for shots in curves.shots]
        found = [(shots, spread) for shots, spread in points if spread]
        if not found:
            continue
        look, aside = styles[variant], ratio ** (_DODGE * (index - (len(learned) - 1) / 2) / max(1, len(learned) / 4))
        places, means = [shots * aside for shots, _ in found], [100 * spread.mean for _, spread in found]
        deviations = [100 * (spread.deviation or 0.0) for _, spread in found]
        panel.errorbar(
            places, means, yerr=deviations, color=look.colour, linestyle="none", elinewidth=1.0, capsize=2, zorder=2
        )
        panel.plot(
            places,
            means,
            color=look.colour,
            linestyle=look.line,
            linewidth=1.4,
            marker=look.marker,
            markersize=10 if look.marker == "*" else 6.5,
            markeredgecolor=PAPER,
            markeredgewidth=0.4,
            label=plain(variant.label, 40),
            zorder=3,
        )
    if zero := curves.zero_shot():
        known = (curves.spread(zero, shots, dataset, measure) for shots in curves.shots)
        if spread := next((one for one in known if one), None):
            look = styles[zero]
            panel.axhline(
                100 * spread.mean, color=look.colour, linewidth=1.2, linestyle=look.line, zorder=0, label=zero.label
            )
    panel.set_xlim(curves.shots[0] / ratio**0.06, curves.shots[-1] * ratio**0.06)
    panel.set_xticks(curves.shots, [str(shots) for shots in curves.shots], color=INK)
    panel.minorticks_off()
    panel.set_xlabel("training images per class")
    panel.grid(axis="y")
