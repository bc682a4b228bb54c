"""Evaluations that may stand in one table: same protocol, backbone, shots and source; and the methods in it."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

import numpy as np

from maple.metrics import harmonic_mean, mean_and_deviation
from maple.report.records import ZERO_SHOT, Collection, Evaluation
from maple.report.variants import Variant, in_order, variants_of

Kind = Literal["base-to-novel", "accuracy", "transfer"]
MEASURES = ("base", "novel", "harmonic mean")
ANY_SHOTS = -1


@dataclass(frozen=True)
class Key:
    """What the evaluations of one table share.

    `classes` is the evaluated part ("" for base-to-novel, which has two); `trained_on` the part of the classes seen
    in training; `source` the training data set of a transfer ("" else); `shots` None for all images.
    """

    kind: Kind
    backbone: str
    shots: int | None
    source: str
    trained_on: str
    classes: str
    part: str

    @property
    def caption(self) -> str:
        """The table's heading."""
        what = {
            "base-to-novel": "Base-to-novel generalisation",
            "accuracy": f"Accuracy on {self.classes} classes",
            "transfer": f"Trained on {self.source}, evaluated elsewhere ({self.classes} classes)",
        }[self.kind]
        return f"{what}: {self.conditions}"

    @property
    def conditions(self) -> str:
        """Backbone, shots, and whatever is unusual."""
        shots = "all training images" if self.shots is None else f"{self.shots} shot{'s' if self.shots != 1 else ''}"
        words = [self.backbone] + ([] if self.shots == ANY_SHOTS else [shots])
        if self.kind != "base-to-novel" and self.trained_on not in ("all", ""):
            words.append(f"trained on {self.trained_on} classes")
        if self.part != "test":
            words.append("all images" if self.part == "all" else f"{self.part} images")
        return ", ".join(words)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of accuracies (fractions) over n seeds; no deviation for one."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None where there are no values."""
        if not values:
            return None
        mean, deviation = mean_and_deviation(values)
        return cls(mean, deviation if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Group:
    """The evaluations of one table, by variant, data set, classes and seed."""

    key: Key
    variants: tuple[Variant, ...]
    datasets: tuple[str, ...]
    cells: dict[tuple[Variant, str, str], dict[int, Evaluation]] = field(repr=False, hash=False)
    source_cells: dict[Variant, dict[int, Evaluation]] = field(repr=False, hash=False)

    def evaluations(self, variant: Variant, dataset: str, classes: str | None = None) -> dict[int, Evaluation]:
        """{seed: evaluation}, by seed."""
        found = self.cells.get((variant, dataset, self.key.classes if classes is None else classes), {})
        return dict(sorted(found.items()))

    def values(self, variant: Variant, dataset: str, measure: str) -> dict[int, float]:
        """{seed: fraction} of a measure: base, novel, their harmonic mean (of seeds that have both), or top-1."""
        if measure == MEASURES[2]:
            base, novel = (self.values(variant, dataset, part) for part in MEASURES[:2])
            return {seed: harmonic_mean(base[seed], novel[seed]) for seed in base if seed in novel}
        classes = measure if measure in MEASURES else None
        return {seed: found.row.top1 for seed, found in self.evaluations(variant, dataset, classes).items()}

    def spread(self, variant: Variant, dataset: str, measure: str = "top1") -> Spread | None:
        """Over the seeds of one data set."""
        return Spread.of(list(self.values(variant, dataset, measure).values()))

    def average(self, variant: Variant, measure: str = "top1") -> Spread | None:
        """The mean over data sets of the means over seeds; None unless every data set has one.

        Its deviation is that of the seeds' own averages, over the seeds that have every data set.
        """
        spreads = [self.spread(variant, dataset, measure) for dataset in self.datasets]
        means = [spread.mean for spread in spreads if spread is not None]
        if len(means) < len(self.datasets) or not means:
            return None
        by_seed = self.seed_averages(variant, measure)
        own = Spread.of(list(by_seed.values()))
        return Spread(float(np.mean(means)), own.deviation if own else None, min(s.n for s in spreads if s))

    def harmonic_mean_of_averages(self, variant: Variant) -> Spread | None:
        """Of the average base and the average novel accuracy: the headline number of the papers."""
        base, novel = (self.average(variant, measure) for measure in MEASURES[:2])
        if base is None or novel is None:
            return None
        bases, novels = (self.seed_averages(variant, measure) for measure in MEASURES[:2])
        own = Spread.of([harmonic_mean(bases[seed], novels[seed]) for seed in bases if seed in novels])
        return Spread(harmonic_mean(base.mean, novel.mean), own.deviation if own else None, min(base.n, novel.n))

    def overall(self, variant: Variant) -> Spread | None:
        """The one number to rank by: the harmonic mean (of averages, over several data sets), or average accuracy."""
        if self.key.kind != "base-to-novel":
            return self.average(variant)
        if len(self.datasets) == 1:
            return self.spread(variant, self.datasets[0], MEASURES[2])
        return self.harmonic_mean_of_averages(variant)

    def seed_averages(self, variant: Variant, measure: str) -> dict[int, float]:
        """{seed: mean over data sets}, of the seeds that have all of them."""
        values = [self.values(variant, dataset, measure) for dataset in self.datasets]
        seeds = set.intersection(*(set(found) for found in values)) if values else set()
        return {seed: float(np.mean([found[seed] for found in values])) for seed in sorted(seeds)}


def group_evaluations(collection: Collection) -> list[Group]:
    """All tables: base-to-novel first, then accuracies, then transfers; most evaluations first, then most shots."""
    backbones = _backbone_labels(collection.evaluations)
    learned: dict[Key, list[Evaluation]] = defaultdict(list)
    zero_shot = []
    for evaluation in collection.evaluations:
        if evaluation.method == ZERO_SHOT:
            zero_shot.append(evaluation)
        else:
            learned[_key(evaluation, backbones)].append(evaluation)
    groups = {key: list(found) for key, found in learned.items()}
    for evaluation in zero_shot:
        # Nothing is learned, so neither the shots nor the classes of "training" matter: it stands in every table.
        own = _key(evaluation, backbones, learns=False)
        fitting = [key for key in learned if _fits(own, key, evaluation)]
        for key in fitting or [own]:
            groups.setdefault(key, []).append(evaluation)
    order: tuple[Kind, ...] = ("base-to-novel", "accuracy", "transfer")
    keys = sorted(groups, key=lambda key: (order.index(key.kind), -len(groups[key]), -(key.shots or 0), key.caption))
    return [_group(key, groups[key], collection.evaluations, backbones) for key in keys]


def _key(evaluation: Evaluation, backbones: dict[str, str], *, learns: bool = True) -> Key:
    row = evaluation.row
    parts = evaluation.own and row.classes in ("base", "novel") and not evaluation.names
    paired = parts and (row.source.classes == "base" or not learns)
    kind: Kind = "base-to-novel" if paired else "accuracy" if evaluation.own else "transfer"
    return Key(
        kind,
        backbones[row.backbone.model_dump_json()],
        row.source.shots if learns else ANY_SHOTS,
        _source_label(evaluation) if kind == "transfer" else "",
        row.source.classes if learns else "",
        "" if paired else row.classes,
        row.part,
    )


def _fits(zero_shot: Key, key: Key, evaluation: Evaluation) -> bool:
    """Whether a zero-shot evaluation belongs beside the learned ones of `key`."""
    row = evaluation.row
    if (zero_shot.backbone, zero_shot.part) != (key.backbone, key.part):
        return False
    if key.kind == "base-to-novel":
        return zero_shot.kind == key.kind
    if key.kind == "accuracy":
        return evaluation.own and row.classes == key.classes
    return zero_shot.kind == key.kind and zero_shot.source == key.source and row.classes == key.classes


def _source_label(evaluation: Evaluation) -> str:
    source = evaluation.row.source.dataset
    return PurePath(source).name if PurePath(source).is_absolute() else source


def _group(key: Key, evaluations: list[Evaluation], every: Iterable[Evaluation], backbones: dict[str, str]) -> Group:
    variant_of = variants_of(evaluations)
    members = {_identity(evaluation) for evaluation in evaluations}
    cells: dict[tuple[Variant, str, str], dict[int, Evaluation]] = defaultdict(dict)
    for evaluation in evaluations:
        cells[variant_of(evaluation), evaluation.dataset, evaluation.row.classes].setdefault(
            evaluation.row.seed, evaluation
        )
    source_cells: dict[Variant, dict[int, Evaluation]] = defaultdict(dict)
    if key.kind == "transfer":
        for evaluation in every:
            known = variant_of(evaluation) if _identity(evaluation) in members else None
            row = evaluation.row
            same = evaluation.own and row.classes == key.classes and _source_label(evaluation) == key.source
            trained = evaluation.method == ZERO_SHOT or (row.source.shots, row.source.classes) == (
                key.shots,
                key.trained_on,
            )
            usual = row.part == "test" and not evaluation.names
            if known and same and trained and usual and backbones[row.backbone.model_dump_json()] == key.backbone:
                source_cells[known].setdefault(row.seed, evaluation)
    datasets = tuple(sorted({evaluation.dataset for evaluation in evaluations}))
    return Group(key, in_order(map(variant_of, evaluations)), datasets, dict(cells), dict(source_cells))


def _identity(evaluation: Evaluation) -> tuple[str, str, str]:
    source = "" if evaluation.method == ZERO_SHOT else evaluation.row.source.dataset
    return evaluation.method, source, json.dumps(evaluation.settings, sort_keys=True)


def _backbone_labels(evaluations: Iterable[Evaluation]) -> dict[str, str]:
    """A readable name for each backbone, with as much of its identity as it takes to tell it from the others."""
    labels: dict[str, str] = {}
    fingerprints: dict[str, set[str]] = defaultdict(set)
    for evaluation in evaluations:
        backbone = evaluation.row.backbone
        name = PurePath(backbone.name).name if PurePath(backbone.name).is_absolute() else backbone.name
        words = [word for word in (backbone.pretrained, backbone.precision) if word and word != "fp32"]
        label = f"{name} ({', '.join(words)})" if words else name
        labels[backbone.model_dump_json()] = label
        fingerprints[label].add(backbone.model_dump_json())
    for label, same in fingerprints.items():
        if len(same) > 1:
            for identity in same:
                print_of = json.loads(identity)["fingerprint"][:6] or "no fingerprint"
                labels[identity] = f"{label} [{print_of}]"
    return labels
