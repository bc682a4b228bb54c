"""The figures of a report: results, learning curves, class changes, embeddings. Each returns inline SVG."""

from typing import Any

import numpy as np

from maple.report.changes import Change
from maple.report.embeddings import Embedding, Panel
from maple.report.figures import GRID, INK, PAPER, SOFT, WIDTH, Look, looks, plain, styled, to_svg
from maple.report.groups import MEASURES, Group, Spread
from maple.report.records import ZERO_SHOT, Evaluation
from maple.report.variants import Variant

MOST_CHANGES = 12
_PALETTE = (
    *("#cf4a2c", "#2f8f8b", "#c08a1e", "#7c68b3", "#4c78a8", "#6f9440"),
    *("#b4638c", "#94734a", "#1f5f8b", "#e08d79", "#5b5f66", "#3aa6b9"),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")


def results_figure(group: Group, name: str) -> str:
    """Methods as rows; a panel each for base, novel and harmonic mean: mean, deviation and the seeds' own values."""
    variants = [variant for variant in group.variants if group.overall(variant)]
    with styled():
        figure, panels = _panels(3, len(variants), share=True)
        styles = looks(group.variants)
        for panel, measure in zip(panels, MEASURES, strict=True):
            for height, variant in enumerate(variants):
                spread, seeds = _overall(group, variant, measure)
                if spread:
                    _dot(panel, spread, seeds, height, styles[variant])
                    if variant.name == ZERO_SHOT:
                        panel.axvline(100 * spread.mean, color=SOFT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
            panel.set_title(measure.capitalize())
            panel.set_xlabel("accuracy, %" if measure != MEASURES[2] else "harmonic mean, %")
            _rows(panel, [plain(variant.label, 40) for variant in variants])
        return to_svg(figure, name, f"Base, novel and harmonic mean of {len(variants)} methods")


def datasets_figure(group: Group, name: str) -> str:
    """Data sets as rows, methods as marks: the harmonic mean (or accuracy) of each, with its deviation."""
    measure = MEASURES[2] if group.key.kind == "base-to-novel" else "top1"
    with styled():
        figure, (panel,) = _panels(1, len(group.datasets) * (0.5 + 0.28 * len(group.variants)), share=False)
        styles = looks(group.variants)
        step = 0.72 / max(1, len(group.variants))
        for index, variant in enumerate(group.variants):
            look, labelled = styles[variant], False
            for row, dataset in enumerate(group.datasets):
                if not (spread := group.spread(variant, dataset, measure)):
                    continue
                height = row + (index - (len(group.variants) - 1) / 2) * step
                label = None if labelled else plain(variant.label, 44)
                _dot(panel, spread, [], height, look, label)
                labelled = True
        for row in range(1, len(group.datasets)):
            panel.axhline(row - 0.5, color=GRID, linewidth=0.7, zorder=0)
        panel.set_xlabel("harmonic mean, %" if measure == MEASURES[2] else "accuracy, %")
        _rows(panel, [plain(dataset) for dataset in group.datasets])
        _legend(figure, panel)
        return to_svg(figure, name, f"{measure} of every method on {len(group.datasets)} data sets")


def curves_figure(group: Group, dataset: str, name: str) -> str | None:
    """Loss and training accuracy over the epochs: a thin line for each seed, a thick one for their mean."""
    found = {variant: _histories(group, variant, dataset) for variant in group.variants}
    if not any(found.values()):
        return None
    with styled():
        figure, (left, right) = _panels(2, 5.2, share=False)
        styles = looks(group.variants)
        for variant, histories in found.items():
            losses = [_epochs(history, "loss") for history in histories]
            accuracies = [_epochs(history, "accuracy") for history in histories]
            for history in histories:
                steps = _smoothed_steps(history)
                left.plot(*steps, color=styles[variant].colour, linewidth=0.7, alpha=0.4)
            _curves(left, losses, styles[variant], plain(variant.label, 44), thin=False)
            _curves(right, accuracies, styles[variant], None, thin=True)
        left.set_title("Training loss")
        right.set_title("Training accuracy, %")
        longest = max(len(history) for histories in found.values() for history in histories)
        for panel in (left, right):
            panel.set_xlabel("epoch")
            panel.grid(axis="y")
            panel.set_xlim(0, 1.02 * longest)
            panel.xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, left)
        return to_svg(figure, name, f"Learning curves on {dataset}")


def changes_figure(changes: list[Change], baseline: str, name: str) -> str | None:
    """The greatest gains and losses as horizontal bars; novel classes are hatched."""
    gains = [change for change in changes if change.difference > 0][:MOST_CHANGES]
    losses = [change for change in changes if change.difference < 0][-MOST_CHANGES:]
    if not gains and not losses:
        return None
    shown = gains + losses
    with styled():
        figure, (panel,) = _panels(1, 0.62 * len(shown), share=False)
        for height, change in enumerate(shown):
            novel = change.classes == "novel"
            colour = "#2f8f8b" if change.difference > 0 else "#cf4a2c"
            panel.barh(
                height,
                100 * change.difference,
                height=0.68,
                facecolor=PAPER if novel else colour,
                edgecolor=colour,
                hatch="////" if novel else None,
                linewidth=0.9,
            )
        panel.axvline(0, color=INK, linewidth=0.8)
        panel.set_xlabel(f"change in accuracy against {plain(baseline)}, percentage points")
        _rows(panel, [plain(change.class_name) for change in shown])
        panel.margins(x=0.06)
        if len({change.classes for change in shown}) > 1:
            for classes, hatch in (("base classes", None), ("novel classes", "////")):
                face = PAPER if hatch else SOFT
                panel.bar(0, 0, facecolor=face, edgecolor=SOFT, hatch=hatch, label=classes)
            _legend(figure, panel)
        return to_svg(figure, name, f"Classes that gain or lose most, {len(gains)} up and {len(losses)} down")


def embedding_figure(embedding: Embedding, method: str, name: str) -> str:
    """The same images under zero-shot CLIP and under the method, a colour and a marker for each class."""
    with styled():
        figure, panels = _panels(2, 10.6, share=False)
        sides: tuple[tuple[Any, Panel, str], ...] = (
            (panels[0], embedding.before, "Before: zero-shot CLIP"),
            (panels[1], embedding.after, f"After: {plain(method)}"),
        )
        for panel, side, title in sides:
            for label, class_name in enumerate(embedding.class_names):
                points = side.points[embedding.labels == label]
                panel.scatter(
                    points[:, 0],
                    points[:, 1],
                    s=44 if _MARKERS[label % len(_MARKERS)] == "*" else 30,
                    marker=_MARKERS[label % len(_MARKERS)],
                    facecolor=_PALETTE[label % len(_PALETTE)],
                    edgecolor=PAPER,
                    linewidth=0.4,
                    label=plain(class_name) if panel is panels[0] else None,
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


def _panels(count: int, rows: float, *, share: bool) -> tuple[Any, tuple[Any, ...]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.95 + 0.34 * max(2.0, rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05, wspace=0.04)  # type: ignore[union-attr, call-arg]
    panels = figure.subplots(1, count, squeeze=False, sharey=share)[0]
    return figure, tuple(panels)


def _rows(panel: Any, labels: list[str]) -> None:
    """Name the rows from the top down."""
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.45, -0.55)
    panel.grid(axis="x")
    panel.spines["left"].set_visible(False)


def _legend(figure: Any, panel: Any, columns: int = 4) -> None:
    handles, labels = panel.get_legend_handles_labels()
    if len(labels) > 0:
        longest = max(len(label) for label in labels)
        fitting = max(1, min(columns, len(labels), int(108 / (longest + 6))))
        figure.legend(handles, labels, loc="outside lower left", ncols=fitting, columnspacing=1.6, handletextpad=0.6)


def _dot(panel: Any, spread: Spread, seeds: list[float], height: float, look: Look, label: str | None = None) -> None:
    if spread.deviation:
        edges = [100 * (spread.mean - spread.deviation), 100 * (spread.mean + spread.deviation)]
        panel.plot(edges, [height, height], color=look.colour, linewidth=2.2, alpha=0.75, zorder=2)
    offsets = np.linspace(-0.2, 0.2, len(seeds)) if len(seeds) > 1 else [0.0] * len(seeds)
    for value, offset in zip(seeds, offsets, strict=True):
        panel.plot(100 * value, height + offset, "o", markersize=2.6, color=look.colour, alpha=0.6, zorder=2, mew=0)
    panel.plot(
        100 * spread.mean,
        height,
        linestyle="none",
        marker=look.marker,
        markersize=11 if look.marker == "*" else 7,
        color=look.colour,
        markeredgecolor=PAPER,
        markeredgewidth=0.8,
        label=label,
        zorder=3,
    )


def _overall(group: Group, variant: Variant, measure: str) -> tuple[Spread | None, list[float]]:
    """Mean and deviation over data sets, and the seeds' own averages."""
    if measure == MEASURES[2]:
        spread = group.overall(variant)
        if len(group.datasets) > 1:
            return spread, []
        return spread, list(group.values(variant, group.datasets[0], measure).values())
    return group.average(variant, measure), list(group.seed_averages(variant, measure).values())


def _histories(group: Group, variant: Variant, dataset: str) -> list[tuple[dict[str, Any], ...]]:
    """The epochs of every run behind a method's evaluations of a data set."""
    found: dict[str, Evaluation] = {}
    for part in (*MEASURES[:2], group.key.classes):
        for evaluation in group.evaluations(variant, dataset, part).values():
            found.setdefault(evaluation.run.name, evaluation)
    return [evaluation.run.history for evaluation in found.values() if evaluation.run.history]


def _epochs(history: tuple[dict[str, Any], ...], measure: str) -> list[float]:
    values = [epoch["loss"] if measure == "loss" else (epoch.get("logs") or {}).get(measure) for epoch in history]
    return [float("nan") if value is None else float(value) for value in values]


def _smoothed_steps(history: tuple[dict[str, Any], ...]) -> tuple[Any, Any]:
    """Every step's loss over the epochs, as a running mean of half an epoch, at most 400 points."""
    places, losses = [], []
    for index, epoch in enumerate(history):
        steps = [value for value in epoch.get("losses") or [] if isinstance(value, int | float)]
        places += [index + (step + 0.5) / len(steps) for step in range(len(steps))]
        losses += steps
    width = max(1, len(losses) // max(1, 2 * len(history)))
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid") if losses else np.array([])
    middle = np.convolve(places, np.ones(width) / width, mode="valid") if losses else np.array([])
    stride = max(1, len(smooth) // 400)
    return middle[::stride], smooth[::stride]


def _curves(panel: Any, runs: list[list[float]], look: Look, label: str | None, *, thin: bool) -> None:
    scale = 100 if thin else 1
    for run in runs if thin and len(runs) > 1 else []:
        panel.plot(np.arange(1, len(run) + 1), scale * np.array(run), color=look.colour, linewidth=0.6, alpha=0.45)
    shortest = min((len(run) for run in runs), default=0)
    if shortest:
        mean = scale * np.mean([run[:shortest] for run in runs], axis=0)
        # The mean of an epoch belongs to its middle; what was reached after it, to its end.
        places = np.arange(shortest) + (1.0 if thin else 0.5)
        panel.plot(
            places,
            mean,
            color=look.colour,
            linewidth=1.8,
            linestyle=look.line,
            marker=look.marker if shortest <= 12 else None,
            markersize=7 if look.marker == "*" else 5,
            markeredgecolor=PAPER,
            markeredgewidth=0.6,
            label=label,
        )
