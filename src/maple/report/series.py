"""Series of results: ablations, variants of a method that differ in one setting; and accuracy against shots."""

import json
from collections import defaultdict
from dataclasses import dataclass, field, replace

from maple.report.groups import ANY_SHOTS, Cells, Group, Key, Spread, Variant, in_order, variants_of

# Two numbers do not make a curve; two words can be compared.
_FEWEST_NUMBERS = 3
_FEWEST_WORDS = 2
_FEWEST_SHOTS = 2


@dataclass(frozen=True)
class AblationSeries:
    """Variants in the order of one setting's values; `others` are the settings that they share, "" for the usual."""

    others: str
    points: tuple[tuple[str, Variant], ...]


@dataclass(frozen=True)
class Ablation:
    """One setting of one method; `numeric` where its values are numbers, in their order."""

    method: str
    setting: str
    numeric: bool
    series: tuple[AblationSeries, ...]

    @property
    def values(self) -> tuple[str, ...]:
        """All values, in order."""
        values = dict.fromkeys(value for series in self.series for value, _ in series.points)
        return tuple(sorted(values, key=float)) if self.numeric else tuple(values)


def find_ablations(group: Group) -> list[Ablation]:
    """Every setting of which a method has at least three numbers, or two words, all other settings being equal."""
    methods: dict[str, list[tuple[Variant, dict[str, str]]]] = defaultdict(list)
    for variant in group.variants:
        if not variant.is_zero_shot and group.overall(variant):
            settings = {key: value for key, value in json.loads(variant.settings).items() if value is not None}
            methods[variant.name].append((variant, settings))
    ablations = []
    for variants in methods.values():
        title = variants[0][0].description.title
        for setting in dict.fromkeys(key for _, settings in variants for key in settings):
            by_others: dict[str, list[tuple[str, Variant]]] = defaultdict(list)
            for variant, settings in variants:
                if setting in settings:
                    others = {key: value for key, value in settings.items() if key != setting}
                    label = ", ".join(f"{key}={value or '(empty)'}" for key, value in others.items())
                    by_others[label].append((settings[setting], variant))
            numeric = all(_is_number(value) for points in by_others.values() for value, _ in points)
            fewest = _FEWEST_NUMBERS if numeric else _FEWEST_WORDS
            series = [
                AblationSeries(label, tuple(sorted(points, key=lambda point: float(point[0])) if numeric else points))
                for label, points in by_others.items()
                if len(points) >= fewest
            ]
            if series:
                ablations.append(Ablation(title, setting, numeric, tuple(series)))
    return ablations


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class ShotCurves:
    """Groups that differ in their shots alone, with the same methods and data sets.

    `groups` is {shots: group}, fewest first; each names all data sets, so there is no average over fewer. `variants`
    and `datasets` are those of all groups, in the order of tables.
    """

    key: Key
    groups: dict[int, Group] = field(hash=False)
    variants: tuple[Variant, ...]
    datasets: tuple[str, ...]
    measures: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The heading of its table."""
        return f"{self.key.topic} against shots: {self.key.conditions}"

    @property
    def zero_shot(self) -> Variant | None:
        """The method that learns nothing, and is the same at any shots."""
        return next((variant for variant in self.variants if variant.is_zero_shot), None)

    def spreads(self, variant: Variant, measure: str, dataset: str | None = None) -> dict[int, Spread | None]:
        """{shots: spread} on a data set; without one the mean over all."""
        return {shots: group.spread(variant, measure, dataset) for shots, group in self.groups.items()}


def find_shot_curves(groups: list[Group]) -> list[ShotCurves]:
    """One for each set of groups that differ in nothing but their shots, where there are at least two."""
    by_key: dict[Key, dict[int, Group]] = defaultdict(dict)
    for group in groups:
        if group.key.shots not in (None, ANY_SHOTS):
            by_key[replace(group.key, shots=ANY_SHOTS)][group.key.shots or 0] = group
    curves = []
    for key, by_shots in by_key.items():
        if len(by_shots) < _FEWEST_SHOTS:
            continue
        # Settings that distinguish two variants at one number of shots do so at all.
        variant_of = variants_of(
            [evaluation for group in by_shots.values() for cell in group.cells.values() for evaluation in cell.values()]
        )
        datasets = tuple(sorted({dataset for group in by_shots.values() for dataset in group.datasets}))
        renamed = {}
        for shots, group in sorted(by_shots.items()):
            cells: Cells = defaultdict(dict)
            for (_, dataset, classes), cell in group.cells.items():
                for seed, evaluation in cell.items():
                    cells[variant_of(evaluation), dataset, classes][seed] = evaluation
            variants = in_order(variant for variant, _, _ in cells)
            renamed[shots] = replace(group, variants=variants, datasets=datasets, cells=dict(cells))
        variants = in_order(variant for group in renamed.values() for variant in group.variants)
        measures = next(iter(renamed.values())).measures
        curves.append(ShotCurves(key, renamed, variants, datasets, measures))
    return curves
