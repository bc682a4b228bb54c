"""The figure of an ablation: a setting's values along, accuracy up."""

from typing import Any

from maple.report.ablations import Ablation, Series, measure_of, measures
from maple.report.figures import PAPER, SOFT, WIDTH, Look, looks, plain, styled, to_svg
from maple.report.groups import Group
from maple.report.records import ZERO_SHOT

_WIDE = 20
"""From this ratio of the greatest to the smallest value on, the axis is logarithmic."""


def ablation_figure(group: Group, ablation: Ablation, name: str) -> str:
    """A panel each for base, novel and harmonic mean (or one for accuracy): mean ± deviation at each value."""
    from matplotlib.figure import Figure

    shown = measures(group)
    titles = {"top1": "Accuracy"}
    with styled():
        height = 2.6 + 0.25 * (len(ablation.series) > 1)
        figure = Figure(figsize=(WIDTH if len(shown) > 1 else WIDTH / 2, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05, wspace=0.04)  # type: ignore[union-attr, call-arg]
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        firsts = looks(tuple(series.points[0][1] for series in ablation.series))
        for panel, measure in zip(panels, shown, strict=True):
            for series in ablation.series:
                _line(panel, group, ablation, series, measure, firsts[series.points[0][1]])
            _zero_shot(panel, group, measure)
            panel.set_title(titles.get(measure, measure.capitalize()))
            panel.set_xlabel(plain(ablation.setting))
            panel.grid(axis="y")
            _ticks(panel, ablation)
        panels[0].set_ylabel("%")
        handles, labels = panels[0].get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside lower left", ncols=2)
        return to_svg(figure, name, f"{ablation.method} at {len(ablation.values)} values of {ablation.setting}")


def _line(panel: Any, group: Group, ablation: Ablation, series: Series, measure: str, look: Look) -> None:
    found = [(value, measure_of(group, variant, measure)) for value, variant in series.points]
    # Words stand side by side, where numbers are joined by a line.
    index, count = ablation.series.index(series), len(ablation.series)
    aside = 0.0 if ablation.numeric else 0.14 * (index - (count - 1) / 2)
    points = [(_place(ablation, value) + aside, spread) for value, spread in found if spread]
    panel.errorbar(
        [place for place, _ in points],
        [100 * spread.mean for _, spread in points],
        yerr=[100 * (spread.deviation or 0.0) for _, spread in points],
        color=look.colour,
        linestyle=look.line if ablation.numeric else "none",
        linewidth=1.6,
        elinewidth=1.2,
        capsize=2.5,
        marker=look.marker,
        markersize=10 if look.marker == "*" else 6,
        markeredgecolor=PAPER,
        markeredgewidth=0.6,
        label=plain(series.others or ablation.method, 54),
    )


def _zero_shot(panel: Any, group: Group, measure: str) -> None:
    zero = next((variant for variant in group.variants if variant.name == ZERO_SHOT), None)
    if zero and (spread := measure_of(group, zero, measure)):
        panel.axhline(
            100 * spread.mean, color=SOFT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0, label="zero-shot CLIP"
        )


def _place(ablation: Ablation, value: str) -> float:
    return float(value) if ablation.numeric else float(ablation.values.index(value))


def _ticks(panel: Any, ablation: Ablation) -> None:
    places = [_place(ablation, value) for value in ablation.values]
    if ablation.numeric and min(places) > 0 and max(places) / min(places) >= _WIDE:
        panel.set_xscale("log")
        panel.minorticks_off()
    labels = [plain(value, 16) or "(empty)" for value in ablation.values]
    panel.set_xticks(places, labels)
    if not ablation.numeric:
        panel.set_xlim(-0.5, len(places) - 0.5)
