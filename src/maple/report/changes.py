"""What each class gains or loses against zero-shot CLIP and against a rival."""

from dataclasses import dataclass

import numpy as np

from maple.report.groups import MEASURES, Group
from maple.report.records import ZERO_SHOT
from maple.report.statistics import partner
from maple.report.variants import Variant

_RIVALS = ("cocoop", "coop")


@dataclass(frozen=True)
class Change:
    """A class's accuracy under a method minus that under a baseline, mean over seeds, in fractions."""

    class_name: str
    classes: str
    difference: float


def class_rivals(group: Group, method: Variant) -> list[Variant]:
    """Whom a method's classes are held against: zero-shot CLIP, and CoCoOp (the paper's choice), else CoOp."""
    found = [variant for variant in group.variants if variant.name == ZERO_SHOT][:1]
    for name in _RIVALS:
        if rivals := [variant for variant in group.variants if variant.name == name and variant != method]:
            return [*found, rivals[0]]
    return found


def class_changes(group: Group, method: Variant, baseline: Variant, dataset: str) -> tuple[list[Change], int]:
    """Every class that has images, greatest gain first, and the number of seeds that both have."""
    parts = MEASURES[:2] if group.key.kind == "base-to-novel" else (group.key.classes,)
    found: dict[tuple[str, int, str], list[float]] = {}
    seeds = set()
    for part in parts:
        theirs = group.evaluations(baseline, dataset, part)
        for seed, ours in group.evaluations(method, dataset, part).items():
            other = partner(ours, theirs, seed, baseline)
            if other is None or other.row.class_names != ours.row.class_names:
                continue
            seeds.add(seed)
            # Two classes may share a name, so the index is part of the key.
            pairs = zip(ours.row.class_names, ours.row.per_class, other.row.per_class, strict=False)
            for index, (name, after, before) in enumerate(pairs):
                if after is not None and before is not None:
                    found.setdefault((part, index, name), []).append(after - before)
    changes = [Change(name, part, float(np.mean(values))) for (part, _, name), values in found.items()]
    return sorted(changes, key=lambda change: -change.difference), len(seeds)
