"""Ablations: variants of one method that differ in exactly one setting, as tables; ablation_plots.py draws them."""

import json
from collections import defaultdict
from dataclasses import dataclass

from maple.report.groups import MEASURES, Group, Spread
from maple.report.records import ZERO_SHOT
from maple.report.variants import TITLES, Variant

_FEWEST_NUMBERS = 3
"""Two numbers make no curve."""
_FEWEST_WORDS = 2


@dataclass(frozen=True)
class Series:
    """Variants in the order of the values of one setting; `others` says which settings they share, "" for the usual."""

    others: str
    points: tuple[tuple[str, Variant], ...]


@dataclass(frozen=True)
class Ablation:
    """One setting of one method; `numeric` where its values are numbers, in their order."""

    method: str
    setting: str
    numeric: bool
    series: tuple[Series, ...]

    @property
    def values(self) -> tuple[str, ...]:
        """All values, in order."""
        found = dict.fromkeys(value for series in self.series for value, _ in series.points)
        return tuple(sorted(found, key=float)) if self.numeric else tuple(found)


def find_ablations(group: Group) -> list[Ablation]:
    """Every setting of which a method has at least three numbers, or two words, all else being equal."""
    methods: dict[str, list[Variant]] = defaultdict(list)
    for variant in group.variants:
        if variant.name != ZERO_SHOT and group.overall(variant):
            methods[variant.name].append(variant)
    found = []
    for name, variants in methods.items():
        for setting in dict.fromkeys(key for variant in variants for key in _settings(variant)):
            series, numeric = _series(variants, setting)
            if series:
                found.append(Ablation(TITLES.get(name, name), setting, numeric, tuple(series)))
    return found


def measure_of(group: Group, variant: Variant, measure: str) -> Spread | None:
    """Base, novel or harmonic mean (of the averages, over several data sets), or average accuracy."""
    return group.overall(variant) if measure == measures(group)[-1] else group.average(variant, measure)


def measures(group: Group) -> tuple[str, ...]:
    """What an ablation in this group shows; the last is what methods are ranked by."""
    return MEASURES if group.key.kind == "base-to-novel" else ("top1",)


def _series(variants: list[Variant], setting: str) -> tuple[list[Series], bool]:
    alike: dict[str, list[tuple[str, Variant]]] = defaultdict(list)
    for variant in variants:
        own = dict(_settings(variant))
        value = own.pop(setting, None)
        if value is not None:
            alike[_told(own)].append((value, variant))
    numeric = all(_is_number(value) for points in alike.values() for value, _ in points)
    fewest = _FEWEST_NUMBERS if numeric else _FEWEST_WORDS
    kept = {others: points for others, points in alike.items() if len(points) >= fewest}
    if numeric:
        kept = {others: sorted(points, key=lambda point: float(point[0])) for others, points in kept.items()}
    return [Series(others, tuple(points)) for others, points in kept.items()], numeric


def _settings(variant: Variant) -> dict[str, str]:
    """What tells the variant from its twins."""
    found: dict[str, str | None] = json.loads(variant.settings)
    return {key: value for key, value in found.items() if value is not None}


def _told(settings: dict[str, str]) -> str:
    return ", ".join(f"{key}={value or '(empty)'}" for key, value in settings.items())


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
