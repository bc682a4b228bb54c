"""Accuracy against the number of training images per class: the same methods at several shots."""

from collections import defaultdict
from dataclasses import dataclass, field, replace

from maple.report.groups import ANY_SHOTS, MEASURES, Group, Key, Spread
from maple.report.records import ZERO_SHOT, Evaluation
from maple.report.variants import Variant, in_order, variants_of

FEWEST_SHOTS = 2


@dataclass(frozen=True)
class ShotCurves:
    """Groups that differ in their shots alone, their methods and data sets made the same.

    Attributes:
        key: theirs, without shots.
        groups: {shots: group}, fewest first; every group names all data sets, so an average over fewer is none.
        variants: all methods, in the order of tables.
    """

    key: Key
    groups: dict[int, Group] = field(hash=False)
    variants: tuple[Variant, ...]

    @property
    def shots(self) -> tuple[int, ...]:
        """Fewest first."""
        return tuple(self.groups)

    @property
    def datasets(self) -> tuple[str, ...]:
        """All of them, by name."""
        return next(iter(self.groups.values())).datasets

    @property
    def caption(self) -> str:
        """The heading of its table."""
        what = {
            "base-to-novel": "Base-to-novel generalisation",
            "accuracy": f"Accuracy on {self.key.classes} classes",
            "transfer": f"Trained on {self.key.source}, evaluated elsewhere",
        }[self.key.kind]
        return f"{what} against shots: {self.key.conditions}"

    @property
    def measures(self) -> tuple[str, ...]:
        """What is shown; methods are ranked by the last."""
        return MEASURES if self.key.kind == "base-to-novel" else ("top1",)

    def members(self) -> set[Key]:
        """The keys of the groups it was made of."""
        return {group.key for group in self.groups.values()}

    def spread(self, variant: Variant, shots: int, dataset: str | None, measure: str) -> Spread | None:
        """Of one data set, or (None) over all; of an average harmonic mean, that of the averages."""
        group = self.groups[shots]
        if dataset is not None:
            return group.spread(variant, dataset, measure)
        return group.overall(variant) if measure == self.measures[-1] else group.average(variant, measure)

    def zero_shot(self) -> Variant | None:
        """Zero-shot CLIP, which is the same at any shots."""
        return next((variant for variant in self.variants if variant.name == ZERO_SHOT), None)


def find_shot_curves(groups: list[Group]) -> list[ShotCurves]:
    """One for each set of groups that differ in nothing but their shots, where there are at least two."""
    alike: dict[Key, dict[int, Group]] = defaultdict(dict)
    for group in groups:
        if group.key.shots not in (None, ANY_SHOTS):
            alike[replace(group.key, shots=ANY_SHOTS)][group.key.shots or 0] = group
    return [_curves(key, dict(sorted(found.items()))) for key, found in alike.items() if len(found) >= FEWEST_SHOTS]


def _curves(key: Key, groups: dict[int, Group]) -> ShotCurves:
    """The groups with one list of methods: what tells two apart at one number of shots does so at all."""
    every = [one for group in groups.values() for cell in group.cells.values() for one in cell.values()]
    variant_of = variants_of(every)
    datasets = tuple(sorted({dataset for group in groups.values() for dataset in group.datasets}))
    made = {}
    for shots, group in groups.items():
        cells: dict[tuple[Variant, str, str], dict[int, Evaluation]] = defaultdict(dict)
        for (_, dataset, classes), cell in group.cells.items():
            for seed, one in cell.items():
                cells[variant_of(one), dataset, classes][seed] = one
        made[shots] = replace(group, variants=in_order(v for v, _, _ in cells), datasets=datasets, cells=dict(cells))
    return ShotCurves(key, made, in_order(variant for group in made.values() for variant in group.variants))
