"""The figures of a report. Each function returns inline SVG whose ids begin with `name`."""

from math import ceil
from typing import Any

import numpy as np

from maple.descriptions import PlotStyle
from maple.report.comparison import ClassChange
from maple.report.groups import HARMONIC_MEAN, Group, Spread, Variant
from maple.report.plot_style import (
    GAIN,
    GRID,
    INK,
    LOSS,
    PAPER,
    SOFT,
    WIDTH,
    fitted,
    marker,
    new_figure,
    plot_styles,
    styled,
    to_svg,
)
from maple.report.predictions import Embedding, PairedPredictions
from maple.report.series import Ablation, ShotCurves

MOST_CHANGES = 12
MOST_CONFUSION_CLASSES = 40
"""With more the matrix cannot be read; the list of the most frequent mistakes has the essentials."""

_CLASS_COLORS = (
    *("#cf4a2c", "#2f8f8b", "#c08a1e", "#7c68b3", "#4c78a8", "#6f9440"),
    *("#b4638c", "#94734a", "#1f5f8b", "#e08d79", "#5b5f66", "#3aa6b9"),
)
_CLASS_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
_DOTTED = (0, (1, 2))
_LOG_RATIO = 20  # from this ratio of the greatest to the smallest value the axis of an ablation is logarithmic
_COLUMN = 5.0  # inches of a single panel with its labels: printed at a column's width, its text stays legible
_MOST_END_LABELS = 18  # this many lines can be labelled at their ends, which reads without colours; more have a legend
_LABEL_GAP = 0.052  # between two labels, as a part of the panel's height
_DODGE = 0.018  # between the marks of two methods, as a part of the axis, so that no bar hides another


def results_figure(group: Group, name: str) -> str:
    """Methods as rows; a panel each for base, novel and harmonic mean: mean, deviation and the seeds' own values."""
    variants = [variant for variant in group.variants if group.overall(variant)]
    with styled():
        figure, panels = _row_panels(3, len(variants), sharey=True)
        styles = plot_styles(group.variants)
        for panel, measure in zip(panels, group.measures, strict=True):
            # The harmonic mean over data sets is not the mean of the seeds' own, so those are left out.
            alone = group.datasets[0] if len(group.datasets) == 1 else None
            for height, variant in enumerate(variants):
                if not (spread := group.spread(variant, measure)):
                    continue
                seeds = {} if measure == HARMONIC_MEAN and not alone else group.values(variant, measure, alone)
                _dot(panel, spread, list(seeds.values()), height, styles[variant])
                if variant.is_zero_shot:
                    panel.axvline(100 * spread.mean, color=SOFT, linewidth=0.9, linestyle=_DOTTED, zorder=0)
            panel.set_title(measure.capitalize())
            panel.set_xlabel("harmonic mean, %" if measure == HARMONIC_MEAN else "accuracy, %")
            _name_rows(panel, [fitted(variant.label, 40) for variant in variants])
        return to_svg(figure, name, f"Base, novel and harmonic mean of {len(variants)} methods")


def datasets_figure(group: Group, name: str) -> str:
    """Data sets as rows, methods as marks: the harmonic mean (or accuracy) of each, with its deviation."""
    measure = group.measures[-1]
    with styled():
        figure, (panel,) = _row_panels(1, len(group.datasets) * (0.5 + 0.28 * len(group.variants)))
        styles = plot_styles(group.variants)
        step = 0.72 / max(1, len(group.variants))
        for index, variant in enumerate(group.variants):
            label: str | None = fitted(variant.label, 44)
            for row, dataset in enumerate(group.datasets):
                if spread := group.spread(variant, measure, dataset):
                    height = row + (index - (len(group.variants) - 1) / 2) * step
                    _dot(panel, spread, [], height, styles[variant], label)
                    label = None
        for row in range(1, len(group.datasets)):
            panel.axhline(row - 0.5, color=GRID, linewidth=0.7, zorder=0)
        panel.set_xlabel("harmonic mean, %" if measure == HARMONIC_MEAN else "accuracy, %")
        _name_rows(panel, [fitted(dataset) for dataset in group.datasets])
        _legend(figure, panel)
        return to_svg(figure, name, f"{measure} of every method on {len(group.datasets)} data sets")


def learning_curves_figure(group: Group, dataset: str, name: str) -> str | None:
    """Loss and training accuracy over the epochs: a thin line for each seed, a thick one for their mean."""
    histories: dict[Variant, list[tuple[dict[str, Any], ...]]] = {}
    for variant in group.variants:
        evaluations = [
            evaluation for part in group.parts for evaluation in group.evaluations(variant, dataset, part).values()
        ]
        runs = {evaluation.run.name: evaluation.run for evaluation in evaluations}
        histories[variant] = [run.history for run in runs.values() if run.history]
    if not any(histories.values()):
        return None
    with styled():
        figure, (left, right) = _row_panels(2, 5.2)
        for variant, style in plot_styles(group.variants).items():
            losses = [np.array([epoch["loss"] for epoch in history], float) for history in histories[variant]]
            accuracies = [
                100 * np.array([epoch["logs"].get("accuracy") for epoch in history], float)
                for history in histories[variant]
            ]
            for history in histories[variant]:
                left.plot(*_smoothed_steps(history), color=style.color, linewidth=0.7, alpha=0.4)
            for run in accuracies if len(accuracies) > 1 else []:
                right.plot(np.arange(1, len(run) + 1), run, color=style.color, linewidth=0.6, alpha=0.45)
            # The mean of an epoch belongs to its middle; what was reached after it, to its end.
            for panel, runs_values, offset, label in (
                (left, losses, 0.5, fitted(variant.label, 44)),
                (right, accuracies, 1.0, None),
            ):
                if shortest := min((len(run) for run in runs_values), default=0):
                    mean = np.mean([run[:shortest] for run in runs_values], axis=0)
                    marked = marker(style, 5, star=7, edge=0.6) | ({} if shortest <= 12 else {"marker": None})
                    line = {"linewidth": 1.8, "linestyle": style.line}
                    panel.plot(np.arange(shortest) + offset, mean, **line, **marked, label=label)
        left.set_title("Training loss")
        right.set_title("Training accuracy, %")
        longest = max(len(history) for runs in histories.values() for history in runs)
        for panel in (left, right):
            panel.set_xlabel("epoch")
            panel.grid(axis="y")
            panel.set_xlim(0, 1.02 * longest)
            panel.xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, left)
        return to_svg(figure, name, f"Learning curves on {dataset}")


def _smoothed_steps(history: tuple[dict[str, Any], ...]) -> tuple[Any, Any]:
    """Every step's loss over the epochs, as a running mean of half an epoch, at most 400 points."""
    places: list[float] = []
    losses: list[float] = []
    for index, epoch in enumerate(history):
        steps = [value for value in epoch["losses"] if value is not None]
        places += [index + (step + 0.5) / len(steps) for step in range(len(steps))]
        losses += steps
    if not losses:
        return [], []
    width = max(1, len(losses) // (2 * len(history)))
    middle, smooth = (np.convolve(values, np.ones(width) / width, mode="valid") for values in (places, losses))
    stride = max(1, len(smooth) // 400)
    return middle[::stride], smooth[::stride]


def changes_figure(changes: list[ClassChange], baseline: str, name: str) -> str | None:
    """The greatest gains and losses as horizontal bars; novel classes are hatched."""
    gains = [change for change in changes if change.difference > 0][:MOST_CHANGES]
    losses = [change for change in changes if change.difference < 0][-MOST_CHANGES:]
    if not gains and not losses:
        return None
    shown = gains + losses
    with styled():
        figure, (panel,) = _row_panels(1, 0.62 * len(shown))
        for height, change in enumerate(shown):
            novel = change.classes == "novel"
            color = GAIN if change.difference > 0 else LOSS
            face, hatch = (PAPER, "////") if novel else (color, None)
            bar = {"facecolor": face, "edgecolor": color, "hatch": hatch, "linewidth": 0.9}
            panel.barh(height, 100 * change.difference, height=0.68, **bar)
        panel.axvline(0, color=INK, linewidth=0.8)
        panel.set_xlabel(f"change in accuracy against {fitted(baseline)}, percentage points")
        _name_rows(panel, [fitted(change.class_name) for change in shown])
        panel.margins(x=0.06)
        if len({change.classes for change in shown}) > 1:
            panel.bar(0, 0, facecolor=SOFT, edgecolor=SOFT, hatch=None, label="base classes")
            panel.bar(0, 0, facecolor=PAPER, edgecolor=SOFT, hatch="////", label="novel classes")
            _legend(figure, panel)
        return to_svg(figure, name, f"Classes that gain or lose most, {len(gains)} up and {len(losses)} down")


def improved_classes_figure(shares: dict[str, float], baseline: str, name: str) -> str:
    """The share of the classes of each data set whose accuracy exceeds the baseline's, in this order, as bars."""
    with styled():
        figure, (panel,) = _row_panels(1, 0.62 * len(shares))
        panel.barh(range(len(shares)), [100 * share for share in shares.values()], height=0.68, facecolor=GAIN)
        panel.set_xlim(0, 100)
        panel.set_xlabel(f"classes more accurate than under {fitted(baseline)}, %")
        _name_rows(panel, [fitted(dataset) for dataset in shares])
        return to_svg(figure, name, f"Share of improved classes on {len(shares)} data sets")


def embedding_figure(embedding: Embedding, method: str, name: str) -> str:
    """The same images under zero-shot CLIP and under the method, a colour and a marker for each class."""
    with styled():
        figure, panels = _row_panels(2, 10.6)
        sides = ((embedding.before, "Before: zero-shot CLIP"), (embedding.after, f"After: {fitted(method)}"))
        for panel, (plane, title) in zip(panels, sides, strict=True):
            for label, class_name in enumerate(embedding.class_names):
                shape = _CLASS_MARKERS[label % len(_CLASS_MARKERS)]
                panel.scatter(
                    *plane[embedding.labels == label].T,
                    s=44 if shape == "*" else 30,
                    marker=shape,
                    facecolor=_CLASS_COLORS[label % len(_CLASS_COLORS)],
                    edgecolor=PAPER,
                    linewidth=0.4,
                    label=fitted(class_name) if panel is panels[0] else None,
                )
            panel.set_title(title)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(True)
            panel.spines[:].set_color(GRID)
            panel.set_box_aspect(1)
            panel.margins(0.08)
        _legend(figure, panels[0], columns=3)
        return to_svg(figure, name, f"Image features of {len(embedding.class_names)} classes before and after")


def confusion_figure(pairs: list[PairedPredictions], method: str, name: str) -> str | None:
    """Row-wise shares of the predictions; None for several parts of the classes, or too many classes to be read."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    pair = pairs[0]
    count = len(pair.class_names)
    if len(pairs) > 1 or count > MOST_CONFUSION_CLASSES:
        return None
    shades = LinearSegmentedColormap.from_list("shades", [f"{LOSS}00", LOSS])
    with styled():
        figure = Figure(figsize=(WIDTH, 1.3 + min(5.5, 2.2 + 0.14 * count)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        sides = ((pair.before, "zero-shot CLIP"), (pair.after, fitted(method, 30)))
        for panel, (predictions, title) in zip(panels, sides, strict=True):
            counts = np.zeros((count, count))
            np.add.at(counts, (predictions.labels, predictions.top[:, 0]), 1)
            shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # a class may have no images
            panel.imshow(shares, cmap=shades, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            panel.set_title(title)
            labels, size = [fitted(class_name, 18) for class_name in pair.class_names], max(4.5, min(8.5, 170 / count))
            panel.set_xticks(range(count), labels, rotation=90, fontsize=size)
            panel.set_yticks(range(count), labels, fontsize=size)
            panel.spines[:].set_visible(True)
            panel.spines[:].set_color(GRID)
            for row, column in zip(*np.nonzero(np.round(100 * shares) >= 1), strict=True) if count <= 12 else ():
                text, ink = f"{100 * shares[row, column]:.0f}", PAPER if shares[row, column] > 0.6 else INK
                panel.text(column, row, text, ha="center", va="center", color=ink, fontsize=7)
        return to_svg(figure, name, f"Confusion matrices of {count} classes, in per cent of each row")


def ablation_figure(group: Group, ablation: Ablation, name: str) -> str:
    """A panel each for base, novel and harmonic mean (or one for accuracy): mean ± deviation at each value."""
    measures = group.measures
    places = [float(value) for value in ablation.values] if ablation.numeric else [*range(len(ablation.values))]
    place_of = dict(zip(ablation.values, places, strict=True))
    with styled():
        width, height = WIDTH if len(measures) > 1 else WIDTH / 2, 2.6 + 0.25 * (len(ablation.series) > 1)
        figure, ((*panels,),) = new_figure(width, height, 1, len(measures))
        styles = list(plot_styles(series.points[0][1] for series in ablation.series).values())
        for panel, measure in zip(panels, measures, strict=True):
            for index, series in enumerate(ablation.series):
                points = [(place_of[value], group.spread(variant, measure)) for value, variant in series.points]
                # Words are marks side by side, where numbers are joined by a line.
                aside = 0.0 if ablation.numeric else 0.14 * (index - (len(ablation.series) - 1) / 2)
                label = fitted(series.others or ablation.method, 54)
                line = styles[index].line if ablation.numeric else "none"
                marked = marker(styles[index], 6, star=10, edge=0.6)
                style = {"linestyle": line, "linewidth": 1.6, "elinewidth": 1.2, "capsize": 2.5, **marked}
                panel.errorbar(*_mean_and_bars(points, aside), **style, label=label)
            if group.zero_shot and (spread := group.spread(group.zero_shot, measure)):
                style = {"color": SOFT, "linewidth": 0.9, "linestyle": _DOTTED, "zorder": 0}
                panel.axhline(100 * spread.mean, **style, label="zero-shot CLIP")
            panel.set_title("Accuracy" if measure == "top1" else measure.capitalize())
            panel.set_xlabel(fitted(ablation.setting))
            panel.grid(axis="y")
            if ablation.numeric and min(places) > 0 and max(places) / min(places) >= _LOG_RATIO:
                panel.set_xscale("log")
                panel.minorticks_off()
            panel.set_xticks(places, [fitted(value, 16) or "(empty)" for value in ablation.values])
            if not ablation.numeric:
                panel.set_xlim(-0.5, len(places) - 0.5)
        panels[0].set_ylabel("%")
        if len(panels[0].get_legend_handles_labels()[1]) > 1:
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
        return to_svg(figure, name, f"{ablation.method} at {len(ablation.values)} values of {ablation.setting}")


def _mean_and_bars(points: list[tuple[float, Spread | None]], aside: float = 0.0) -> tuple[list[float], ...]:
    """x, y and error of the points that have a value, in per cent."""
    present = [(place + aside, spread) for place, spread in points if spread]
    means = [100 * spread.mean for _, spread in present]
    return [place for place, _ in present], means, [100 * (spread.deviation or 0.0) for _, spread in present]


def shots_figure(curves: ShotCurves, name: str, *, each_dataset: bool = False) -> str:
    """Accuracy against shots, in the manner of CoOp (IJCV 2022), figure 3: all methods in one panel.

    The mean over the data sets (base-to-novel: a panel each for base, novel and harmonic mean), or a panel for each
    data set.
    """
    description = f"Accuracy of {len(curves.variants)} methods at {len(curves.groups)} shots"
    alone = curves.datasets[0] if len(curves.datasets) == 1 else None
    panels: list[tuple[str, str | None, str]] = [
        ("Accuracy" if measure == "top1" else measure.capitalize(), alone, measure) for measure in curves.measures
    ]
    if each_dataset:
        description = f"The same on each of {len(curves.datasets)} data sets"
        panels = [(fitted(dataset, 26), dataset, curves.measures[-1]) for dataset in curves.datasets]
    across = min(3, len(panels))
    down = ceil(len(panels) / across)
    with styled():
        width, height = (_COLUMN, 3.6 * down) if across == 1 else (WIDTH, 2.3 * down)
        label_ends = len(panels) == 1 and len(curves.variants) <= _MOST_END_LABELS
        longest = max(len(fitted(variant.label, 40)) for variant in curves.variants)
        columns = max(1, min(len(curves.variants), int(15 * width / (longest + 8))))
        legend = 0.0 if label_ends else 0.2 + 0.2 * ceil(len(curves.variants) / columns)
        figure, grid = new_figure(width, height + legend, down, across, h_pad=0.06)
        used = grid.flat[: len(panels)]
        for place, (panel, (title, dataset, measure)) in enumerate(zip(used, panels, strict=True)):
            _draw_shots(panel, curves, measure, dataset)
            panel.set_title(title)
            panel.set_ylabel("%" if place % across == 0 else "")
        for empty in grid.flat[len(panels) :]:
            empty.remove()
        if label_ends:
            _label_ends(grid[0][0])
        else:
            lines = {line.get_label(): line for panel in used for line in _named_lines(panel)}
            layout = {"ncols": columns, "columnspacing": 1.4, "handlelength": 3.0}
            figure.legend(lines.values(), lines, loc="outside lower left", **layout)
        return to_svg(figure, name, description)


def _draw_shots(panel: Any, curves: ShotCurves, measure: str, dataset: str | None) -> None:
    styles = plot_styles(curves.variants)
    learned = [variant for variant in curves.variants if not variant.is_zero_shot]
    shots = list(curves.groups)
    first, last = shots[0], shots[-1]
    ratio = last / first
    panel.set_xscale("log", base=2)
    for index, variant in enumerate(learned):
        style = styles[variant]
        aside = ratio ** (_DODGE * (index - (len(learned) - 1) / 2) / max(1, len(learned) / 4))
        points = [(number * aside, spread) for number, spread in curves.spreads(variant, measure, dataset).items()]
        places, means, deviations = _mean_and_bars(points)
        if not places:
            continue
        bars = {"color": style.color, "linestyle": "none", "elinewidth": 1.0, "capsize": 2, "zorder": 2}
        panel.errorbar(places, means, yerr=deviations, **bars)
        line = {"linestyle": style.line, "linewidth": 1.4, "zorder": 3, "label": fitted(variant.label, 40)}
        panel.plot(places, means, **line, **marker(style, 6.5, star=10, edge=0.4))
    at_any_shots = curves.spreads(curves.zero_shot, measure, dataset).values() if curves.zero_shot else ()
    if curves.zero_shot and (spread := next(filter(None, at_any_shots), None)):
        style = styles[curves.zero_shot]
        line = {"linewidth": 1.2, "linestyle": style.line, "zorder": 0, "label": curves.zero_shot.label}
        panel.axhline(100 * spread.mean, color=style.color, **line)
    panel.set_xlim(first / ratio**0.06, last * ratio**0.06)
    panel.set_xticks(shots, [str(number) for number in shots], color=INK)
    panel.minorticks_off()
    panel.set_xlabel("training images per class")
    panel.grid(axis="y")


def _named_lines(panel: Any) -> list[Any]:
    return [line for line in panel.get_lines() if not str(line.get_label()).startswith("_")]


def _label_ends(panel: Any) -> None:
    """Write each line's name next to its end, with a thin line where names had to move apart."""
    low, high = panel.get_ylim()
    panel.set_ylim(low, high)
    lines = sorted(_named_lines(panel), key=lambda line: line.get_ydata()[-1])
    heights = [float(line.get_ydata()[-1]) for line in lines]
    # Upwards each label is moved to `gap` above the one before, then downwards as far as the panel ends.
    gap, places = _LABEL_GAP * (high - low), [low] * len(heights)
    for index, height in enumerate(heights):
        places[index] = max(height, low, places[index - 1] + gap if index else low)
    top = high
    for index in reversed(range(len(places))):
        places[index] = min(places[index], top)
        top = places[index] - gap
    for line, height, place in zip(lines, heights, places, strict=True):
        # A level line (axhline) has its ends in parts of the panel's width.
        level = len(line.get_xdata()) == 2 and line.get_marker() == "None"
        arrow = {"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3}
        panel.annotate(
            line.get_label(),
            xy=(1.0 if level else line.get_xdata()[-1], height),
            xycoords=line.get_transform(),
            xytext=(1.07, place),
            textcoords=panel.get_yaxis_transform(),
            va="center",
            fontsize=9,
            arrowprops={**arrow, "relpos": (0, 0.5)},
        )


def _row_panels(count: int, rows: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of the page's width with panels side by side, high enough for the rows."""
    figure, panels = new_figure(WIDTH, 0.95 + 0.34 * max(2.0, rows), 1, count, **options)
    return figure, list(panels[0])


def _name_rows(panel: Any, labels: list[str]) -> None:
    """Label the rows from the top down."""
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.45, -0.55)
    panel.grid(axis="x")
    panel.spines["left"].set_visible(False)


def _legend(figure: Any, panel: Any, columns: int = 4) -> None:
    handles, labels = panel.get_legend_handles_labels()
    if labels:
        fitting = max(1, min(columns, len(labels), int(108 / (max(map(len, labels)) + 6))))
        figure.legend(handles, labels, loc="outside lower left", ncols=fitting, columnspacing=1.6, handletextpad=0.6)


def _dot(
    panel: Any, spread: Spread, seeds: list[float], height: float, style: PlotStyle, label: str | None = None
) -> None:
    """Mean and deviation as a mark on a bar, and the seeds' own values as small dots."""
    if spread.deviation:
        edges = [100 * (spread.mean - spread.deviation), 100 * (spread.mean + spread.deviation)]
        panel.plot(edges, [height, height], color=style.color, linewidth=2.2, alpha=0.75, zorder=2)
    offsets = np.linspace(-0.2, 0.2, len(seeds)) if len(seeds) > 1 else [0.0] * len(seeds)
    for value, offset in zip(seeds, offsets, strict=True):
        panel.plot(100 * value, height + offset, "o", markersize=2.6, color=style.color, alpha=0.6, zorder=2, mew=0)
    mark = marker(style, 7, star=11, edge=0.8)
    panel.plot(100 * spread.mean, height, linestyle="none", **mark, label=label, zorder=3)
