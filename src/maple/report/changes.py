"""What each class gains or loses against zero-shot CLIP."""

from dataclasses import dataclass

import numpy as np

from maple.report.groups import MEASURES, Group, Variant
from maple.report.records import ZERO_SHOT
from maple.report.statistics import partner


@dataclass(frozen=True)
class Change:
    """A class's accuracy under a method minus that under zero-shot CLIP, mean over seeds, in fractions."""

    class_name: str
    classes: str
    difference: float


def class_changes(group: Group, method: Variant, dataset: str) -> tuple[list[Change], int]:
    """Every class that has images, greatest gain first, and the number of seeds; nothing without zero-shot CLIP."""
    zero = next((variant for variant in group.variants if variant.name == ZERO_SHOT), None)
    if zero is None:
        return [], 0
    parts = MEASURES[:2] if group.key.kind == "base-to-novel" else (group.key.classes,)
    found: dict[tuple[str, int, str], list[float]] = {}
    seeds = set()
    for part in parts:
        theirs = group.evaluations(zero, dataset, part)
        for seed, ours in group.evaluations(method, dataset, part).items():
            other = partner(ours, theirs, seed, zero)
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
