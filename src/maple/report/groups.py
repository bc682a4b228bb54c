"""Group evaluations into tables: same protocol, backbone, shots and source; the methods in each, and their averages."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import PurePath
from typing import Literal

import numpy as np

from maple.descriptions import MethodDescription
from maple.metrics import harmonic_mean, mean_and_deviation
from maple.names import FEATURES
from maple.report.records import Collection, EvaluationRecord

Kind = Literal["base-to-novel", "accuracy", "transfer"]
BASE, NOVEL, HARMONIC_MEAN = MEASURES = ("base", "novel", "harmonic mean")
MEAN_OF_HARMONIC_MEANS = "mean of harmonic means"
ANY_SHOTS = -1
IMAGENET_VARIANTS = frozenset({"imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"})
_FEW_SETTINGS = 3
_LONGEST_VALUE = 40  # characters of a value in a label


@dataclass(frozen=True)
class Variant:
    """A method with the settings (JSON) that distinguish it from its other variants, one row of a table."""

    name: str
    label: str
    settings: str = field(repr=False)
    description: MethodDescription = field(repr=False, compare=False)

    @property
    def is_zero_shot(self) -> bool:
        """Whether nothing is learned."""
        return self.description.is_zero_shot


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of accuracies (fractions) over n seeds; no deviation for one seed."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """The spread of the values; None where there are none."""
        values = list(values)
        if not values:
            return None
        mean, deviation = mean_and_deviation(values)
        return cls(mean, deviation if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Key:
    """What the evaluations of one table share; `shots` None is all training images.

    `source` is the training data set of a transfer, of two of one name with its folder, otherwise "". `trained_on` and
    `classes`, the evaluated ones, are all, base or novel; `classes` is "" for base-to-novel, which has two parts.
    `domains`: whether the targets of a transfer are ImageNet's variants, which have an average of their own.
    """

    kind: Kind
    backbone: str
    shots: int | None
    source: str
    trained_on: str
    classes: str
    part: str
    domains: bool = False

    @property
    def topic(self) -> str:
        """The protocol and the evaluated classes, in words."""
        where = "on variants of ImageNet" if self.domains else "elsewhere"
        return {
            "base-to-novel": "Base-to-novel generalisation",
            "accuracy": f"Accuracy on {self.classes} classes",
            "transfer": f"Trained on {self.source}, evaluated {where}",
        }[self.kind]

    @property
    def caption(self) -> str:
        """The table's heading."""
        classes = f" ({self.classes} classes)" if self.kind == "transfer" else ""
        return f"{self.topic}{classes}: {self.conditions}"

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


Cells = dict[tuple[Variant, str, str], dict[int, EvaluationRecord]]


@dataclass(frozen=True)
class Group:
    """The evaluations of one table by variant, data set, classes and seed; each average is computed once.

    `source_cells` are, of a transfer, the evaluations on the training data set itself.
    """

    key: Key
    variants: tuple[Variant, ...]
    datasets: tuple[str, ...]
    cells: Cells = field(repr=False, hash=False)
    source_cells: dict[Variant, dict[int, EvaluationRecord]] = field(repr=False, hash=False)

    @property
    def parts(self) -> tuple[str, ...]:
        """The evaluated parts of the classes."""
        return (BASE, NOVEL) if self.key.kind == "base-to-novel" else (self.key.classes,)

    @property
    def measures(self) -> tuple[str, ...]:
        """The numbers shown of a method; the last ranks the methods."""
        return MEASURES if self.key.kind == "base-to-novel" else ("top1",)

    @property
    def zero_shot(self) -> Variant | None:
        """The method that learns nothing, where it was evaluated."""
        return next((variant for variant in self.variants if variant.is_zero_shot), None)

    def evaluations(self, variant: Variant, dataset: str, classes: str) -> dict[int, EvaluationRecord]:
        """{seed: evaluation}, by seed."""
        return dict(sorted(self.cells.get((variant, dataset, classes), {}).items()))

    def values(self, variant: Variant, measure: str, dataset: str | None = None) -> dict[int, float]:
        """{seed: fraction} on a data set; without one the seeds' own means, of the seeds that have every data set."""
        return self._values.get((variant, measure, dataset), {})

    def spread(self, variant: Variant, measure: str, dataset: str | None = None) -> Spread | None:
        """Over the seeds of a data set; without one the mean over the data sets, None unless each has a value.

        The harmonic mean over several data sets is that of the average base and the average novel accuracy, the
        headline number of the papers; `MEAN_OF_HARMONIC_MEANS` is the other average.
        """
        return self._spreads.get((variant, measure, dataset))

    def overall(self, variant: Variant) -> Spread | None:
        """The one number to rank by."""
        return self.spread(variant, self.measures[-1])

    @cached_property
    def _values(self) -> dict[tuple[Variant, str, str | None], dict[int, float]]:
        values: dict[tuple[Variant, str, str | None], dict[int, float]] = {}
        for variant in self.variants:
            for dataset in self.datasets:
                for measure, part in zip(self.measures, self.parts, strict=False):
                    cell = self.evaluations(variant, dataset, part)
                    values[variant, measure, dataset] = {seed: evaluation.row.top1 for seed, evaluation in cell.items()}
                if HARMONIC_MEAN in self.measures:
                    base, novel = (values[variant, part, dataset] for part in self.parts)
                    both = {seed: harmonic_mean(base[seed], novel[seed]) for seed in base if seed in novel}
                    values[variant, HARMONIC_MEAN, dataset] = both
            for measure in self.measures:
                each = [values[variant, measure, dataset] for dataset in self.datasets]
                seeds = sorted(set.intersection(*(set(by_seed) for by_seed in each)))
                means = {seed: float(np.mean([by_seed[seed] for by_seed in each])) for seed in seeds}
                values[variant, measure, None] = means
        return values

    @cached_property
    def _spreads(self) -> dict[tuple[Variant, str, str | None], Spread | None]:
        spreads = {key: Spread.of(by_seed.values()) for key, by_seed in self._values.items()}
        for variant, measure in product(self.variants, self.measures):
            each = [spread for dataset in self.datasets if (spread := spreads[variant, measure, dataset])]
            if len(each) < len(self.datasets):
                spreads[variant, measure, None] = None
                continue
            # The mean includes seeds that lack a data set; the deviation is that of the seeds' own averages.
            overall, mean = spreads[variant, measure, None], float(np.mean([spread.mean for spread in each]))
            n = min(spread.n for spread in each)
            spreads[variant, measure, None] = Spread(mean, overall.deviation if overall else None, n)
        if HARMONIC_MEAN in self.measures and len(self.datasets) > 1:
            for variant in self.variants:
                spreads[variant, MEAN_OF_HARMONIC_MEANS, None] = spreads[variant, HARMONIC_MEAN, None]
                base, novel = spreads[variant, BASE, None], spreads[variant, NOVEL, None]
                spreads[variant, HARMONIC_MEAN, None] = None
                if base and novel:
                    bases, novels = self.values(variant, BASE), self.values(variant, NOVEL)
                    overall = Spread.of(harmonic_mean(bases[seed], novels[seed]) for seed in bases if seed in novels)
                    mean, n = harmonic_mean(base.mean, novel.mean), min(base.n, novel.n)
                    spreads[variant, HARMONIC_MEAN, None] = Spread(mean, overall.deviation if overall else None, n)
        # Zero-shot CLIP on the same images is one result, also where an earlier sweep has it once for each seed.
        for variant in filter(lambda variant: variant.is_zero_shot, self.variants):
            fixed = {dataset: self._has_one_test(variant, dataset) for dataset in self.datasets}
            for (other, measure, over), spread in list(spreads.items()):
                if other == variant and spread and (fixed[over] if over else all(fixed.values())):
                    spreads[variant, measure, over] = replace(spread, deviation=None)
        return spreads

    def _has_one_test(self, variant: Variant, dataset: str) -> bool:
        """Whether all seeds of a variant were evaluated on the same images."""
        cells = (self.evaluations(variant, dataset, part).values() for part in self.parts)
        return all(len({evaluation.row.items for evaluation in cell}) <= 1 for cell in cells)


def group_evaluations(collection: Collection) -> list[Group]:
    """All groups: base-to-novel first, then accuracies, then transfers; most evaluations first, then most shots."""
    backbones, sources = _backbone_labels(collection.evaluations), _source_labels(collection.evaluations)
    groups: dict[Key, list[EvaluationRecord]] = defaultdict(list)
    zero_shot = []
    for evaluation in collection.evaluations:
        if evaluation.description.is_zero_shot:
            zero_shot.append(evaluation)
        else:
            groups[_key(evaluation, backbones, sources)].append(evaluation)
    learned = list(groups)
    for evaluation in zero_shot:
        # Nothing is learned, so neither the shots nor the classes of "training" matter: it belongs in every table.
        alone = _key(evaluation, backbones, sources)
        for key in [key for key in learned if _fits(alone, key, evaluation)] or [alone]:
            groups[key].append(evaluation)
    order: tuple[Kind, ...] = ("base-to-novel", "accuracy", "transfer")
    keys = sorted(groups, key=lambda key: (order.index(key.kind), -len(groups[key]), -(key.shots or 0), key.caption))
    return [_group(key, groups[key], collection.evaluations, backbones, sources) for key in keys]


def variants_of(evaluations: Sequence[EvaluationRecord]) -> Callable[[EvaluationRecord], Variant]:
    """Which variant each of these evaluations belongs to.

    Settings that differ only from one data set, or one number of shots, to another (a template, the epochs that a
    preset gives to large data sets or to few shots) do not make two variants; those with two values at one do.
    """
    sources: dict[tuple[str, str, int | None], list[dict[str, str]]] = defaultdict(list)
    members: dict[str, list[EvaluationRecord]] = defaultdict(list)
    for evaluation in evaluations:
        source = evaluation.row.source
        sources[evaluation.method, source.dataset, source.shots].append(evaluation.settings)
        members[evaluation.method].append(evaluation)
    distinguishing: dict[str, set[str]] = {method: set() for method in members}
    for (method, _, _), settings in sources.items():
        for key in {key for values in settings for key in values}:
            if len({values.get(key) for values in settings}) > 1:
                distinguishing[method].add(key)
    named = {method: _settings_to_name(sorted(keys), members[method]) for method, keys in distinguishing.items()}

    def settings_of(evaluation: EvaluationRecord) -> str:
        return json.dumps({key: evaluation.settings.get(key) for key in sorted(distinguishing[evaluation.method])})

    def label_of(evaluation: EvaluationRecord, longest: int) -> str:
        method, settings = evaluation.method, evaluation.settings
        words = [f"{key}={_short(settings.get(key, 'default'), longest)}" for key in named[method]]
        words += ["..."] if len(words) < len(distinguishing[method]) else []
        return evaluation.description.title + (f" ({', '.join(words)})" if words else "")

    # Of every variant a label of its own: two methods may share a title, and two long values their beginning.
    variants = {(each.method, settings_of(each)): each for each in evaluations}
    labels = {variant: label_of(each, _LONGEST_VALUE) for variant, each in variants.items()}
    for longest in (2 * _LONGEST_VALUE, 4 * _LONGEST_VALUE):
        for variant in _sharing_a_label(labels):
            labels[variant] = label_of(variants[variant], longest)
    for variant in _sharing_a_label(labels):
        labels[variant] += f" [{variant[0]}]"
    for number, variant in enumerate(sorted(_sharing_a_label(labels)), start=1):
        labels[variant] += f" #{number}"

    def variant_of(evaluation: EvaluationRecord) -> Variant:
        method, settings = variant = evaluation.method, settings_of(evaluation)
        return Variant(method, labels[variant], settings, evaluation.description)

    return variant_of


def _sharing_a_label(labels: Mapping[tuple[str, str], str]) -> list[tuple[str, str]]:
    counts = Counter(labels.values())
    return [variant for variant, label in labels.items() if counts[label] > 1]


def in_order(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    """Each once, in the order of tables: by method, then by settings, depth=9 before depth=12."""

    def key(variant: Variant) -> tuple[int, str, list[tuple[int, float, str]]]:
        words = re.sub("[=,)]", " ", variant.label).split()
        natural = [(0, float(word), "") if word.replace(".", "", 1).isdecimal() else (1, 0.0, word) for word in words]
        return variant.description.order, variant.name, natural

    return tuple(sorted(set(variants), key=key))


def _settings_to_name(keys: Sequence[str], evaluations: Sequence[EvaluationRecord]) -> Sequence[str]:
    """Of more than a few settings only as many as distinguish the variants, the method's own first."""
    if len(keys) <= _FEW_SETTINGS:
        return keys
    of_method = {key for evaluation in evaluations for key in evaluation.row.method}
    chosen: list[str] = []
    kinds = 1
    for key in sorted(keys, key=lambda key: key not in of_method):
        count = len({tuple(evaluation.settings.get(name) for name in (*chosen, key)) for evaluation in evaluations})
        if count > kinds:
            chosen, kinds = [*chosen, key], count
    return chosen


def _short(value: str, longest: int) -> str:
    if nested := re.match(r"\{'name': '(\w+)'", value):
        return nested[1]  # the prompts of another method, with its settings
    if value == "{}":
        return "own"
    return value if len(value) <= longest else f"{value[: longest - 3]}..."


def _key(evaluation: EvaluationRecord, backbones: dict[str, str], sources: dict[str, str]) -> Key:
    row, learns = evaluation.row, not evaluation.description.is_zero_shot
    parts = evaluation.on_own_data and row.classes in ("base", "novel") and not evaluation.names
    paired = parts and (row.source.classes == "base" or not learns)
    kind: Kind = "base-to-novel" if paired else "accuracy" if evaluation.on_own_data else "transfer"
    return Key(
        kind,
        backbones[row.backbone.model_dump_json()],
        row.source.shots if learns else ANY_SHOTS,
        sources[row.source.dataset] if kind == "transfer" else "",
        row.source.classes if learns else "",
        "" if paired else row.classes,
        row.part,
        kind == "transfer" and row.dataset in IMAGENET_VARIANTS,
    )


def _fits(zero_shot: Key, key: Key, evaluation: EvaluationRecord) -> bool:
    """Whether a zero-shot evaluation belongs with the learned ones of `key`."""
    if (zero_shot.backbone, zero_shot.part) != (key.backbone, key.part):
        return False
    if key.kind == "base-to-novel":
        return zero_shot.kind == key.kind
    transfer = (zero_shot.source, zero_shot.domains) == (key.source, key.domains)
    same_data = evaluation.on_own_data if key.kind == "accuracy" else transfer
    return evaluation.row.classes == key.classes and same_data


def _source_labels(evaluations: Iterable[EvaluationRecord]) -> dict[str, str]:
    """A readable name for each training data set; of two that would share it, with the folder that holds it."""
    paths = {evaluation.row.source.dataset: PurePath(evaluation.row.source.dataset) for evaluation in evaluations}
    labels = {dataset: path.name if path.is_absolute() else dataset for dataset, path in paths.items()}
    counts = Counter(labels.values())
    return {
        dataset: f"{label} in {paths[dataset].parent}" if counts[label] > 1 and label != dataset else label
        for dataset, label in labels.items()
    }


def _group(
    key: Key,
    evaluations: list[EvaluationRecord],
    every: Iterable[EvaluationRecord],
    backbones: dict[str, str],
    sources: dict[str, str],
) -> Group:
    variant_of = variants_of(evaluations)
    cells: Cells = defaultdict(dict)
    for evaluation in evaluations:
        by_seed = cells[variant_of(evaluation), evaluation.dataset, evaluation.row.classes]
        by_seed.setdefault(evaluation.row.seed, evaluation)

    def identity(evaluation: EvaluationRecord) -> tuple[str, str, str]:
        source = "" if evaluation.description.is_zero_shot else evaluation.row.source.dataset
        return evaluation.method, source, json.dumps(evaluation.settings, sort_keys=True)

    members = {identity(evaluation) for evaluation in evaluations}
    source_cells: dict[Variant, dict[int, EvaluationRecord]] = defaultdict(dict)
    for evaluation in every if key.kind == "transfer" else ():
        row = evaluation.row
        trained_alike = (row.source.shots, row.source.classes) == (key.shots, key.trained_on)
        if (
            identity(evaluation) in members
            and (evaluation.on_own_data and row.classes == key.classes and sources[row.source.dataset] == key.source)
            and (evaluation.description.is_zero_shot or trained_alike)
            and (row.part == "test" and not evaluation.names)
            and backbones[row.backbone.model_dump_json()] == key.backbone
        ):
            source_cells[variant_of(evaluation)].setdefault(row.seed, evaluation)
    datasets = tuple(sorted({evaluation.dataset for evaluation in evaluations}))
    return Group(key, in_order(map(variant_of, evaluations)), datasets, dict(cells), dict(source_cells))


def _backbone_labels(evaluations: Iterable[EvaluationRecord]) -> dict[str, str]:
    """A readable name for each backbone; of two that would share it, with the start of the fingerprint."""
    labels: dict[str, str] = {}
    identities: dict[tuple[str, str], set[str]] = defaultdict(set)
    for evaluation in evaluations:
        backbone = evaluation.row.backbone
        name = PurePath(backbone.name).name if PurePath(backbone.name).is_absolute() else backbone.name
        words = [word for word in (backbone.pretrained, backbone.precision) if word and word != "fp32"]
        label = f"{name} ({', '.join(words)})" if words else name
        is_table = name.startswith(FEATURES)
        if is_table:
            label = f"features of {backbone.computed_by}" if backbone.computed_by else "features"
        labels[backbone.model_dump_json()] = label
        # Each data set of features has files of its own, and these are its backbone.
        identities[label, evaluation.dataset if is_table else ""].add(backbone.model_dump_json())
    for (label, _), same in identities.items():
        for identity in same if len(same) > 1 else ():
            labels[identity] = f"{label} [{json.loads(identity)['fingerprint'][:6] or 'no fingerprint'}]"
    return labels
