"""The figures of accuracy against shots, in the manner of CoOp (IJCV 2022), figure 3."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from maple.report.figures import INK, PAPER, WIDTH, Look, looks, plain, styled, to_svg
from maple.report.groups import Variant
from maple.report.records import ZERO_SHOT
from maple.report.shots import ShotCurves

_COLUMN = 4.6
"""Inches of a single panel with its legend: printed at a column's width, its text stays legible."""
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
    longest = max(len(plain(variant.label, 40)) for variant in curves.variants)
    with styled():
        width = _COLUMN if across == 1 else WIDTH
        columns = max(1, min(len(curves.variants), int(15 * width / (longest + 8))))
        legend = 0.2 * ceil(len(curves.variants) / columns)
        tall = 3.1 if across == 1 else 2.3
        figure = Figure(figsize=(width, tall * down + legend + 0.2), layout="constrained")
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
        handles: dict[str, Any] = {}
        for panel in grid.flat[: len(panels)]:
            found, labels = panel.get_legend_handles_labels()
            handles |= {label: handle for handle, label in zip(found, labels, strict=True) if label not in handles}
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower left", ncols=columns, columnspacing=1.4,
            handlelength=3.0, handletextpad=0.6,
        )  # fmt: skip
        return to_svg(figure, name, description)


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
        bars = panel.errorbar(
            [shots * aside for shots, _ in found],
            [100 * spread.mean for _, spread in found],
            yerr=[100 * (spread.deviation or 0.0) for _, spread in found],
            color=look.colour,
            linestyle=look.line,
            linewidth=1.5,
            elinewidth=1.0,
            capsize=2,
            marker=look.marker,
            markersize=9 if look.marker == "*" else 5.5,
            markeredgecolor=PAPER,
            markeredgewidth=0.5,
            label=plain(variant.label, 40),
        )
        for bar in bars[2]:
            bar.set_linestyle("-")
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
