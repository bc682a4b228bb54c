"""Paired comparisons: methods over the same seeds and data sets, class by class, and image by image."""

import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from maple.metrics import accuracy_interval, harmonic_mean, p_text, sign_test
from maple.report.groups import BASE, HARMONIC_MEAN, NOVEL, Group, Variant
from maple.report.predictions import read_predictions
from maple.report.records import Collection, EvaluationRecord

FEWEST_PAIRS = 5


@dataclass(frozen=True)
class PairedTest:
    """Method minus baseline over n pairs (seed, data set): {measure: mean difference}, in fractions.

    In `wins` and `ties` pairs the deciding (last) measure is higher, or equal; `p` is that of Wilcoxon's two-sided
    signed-rank test on it, 1 where nothing differs.
    """

    method: str
    baseline: str
    pairs: int
    differences: dict[str, float]
    wins: int
    ties: int
    p: float


def paired_tests(group: Group) -> list[PairedTest]:
    """Every method against each of the baselines, where they share at least five pairs."""
    from scipy.stats import wilcoxon

    tests = []
    for baseline in (variant for variant in group.variants if "baseline" in variant.description.roles):
        for method in (variant for variant in group.variants if variant != baseline and not variant.is_zero_shot):
            pairs = _pairs(group, method, baseline)
            if len(pairs) < FEWEST_PAIRS:
                continue
            differences = {measure: np.array([np.subtract(*pair[measure]) for pair in pairs]) for measure in pairs[0]}
            # Equal accuracies must not differ by rounding of the harmonic mean.
            deciding = np.round(differences[group.measures[-1]], 12)
            p = 1.0
            if deciding.any():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # few pairs with ties: the note of the table says so
                    p = float(wilcoxon(deciding).pvalue)
            means = {measure: float(values.mean()) for measure, values in differences.items()}
            wins, ties = int((deciding > 0).sum()), int((deciding == 0).sum())
            tests.append(PairedTest(method.label, baseline.label, len(pairs), means, wins, ties, p))
    return tests


def _pairs(group: Group, method: Variant, baseline: Variant) -> list[dict[str, tuple[float, float]]]:
    """{measure: (method, baseline)} for every data set and seed that both have."""
    pairs = []
    for dataset in group.datasets:
        for seed in group.evaluations(method, dataset, group.parts[0]):
            accuracies: dict[str, tuple[float, float]] = {}
            for measure, part in zip(group.measures, group.parts, strict=False):
                evaluation = group.evaluations(method, dataset, part).get(seed)
                other = evaluation and _partner(group, evaluation, seed, baseline, dataset, part)
                if evaluation and other:
                    accuracies[measure] = evaluation.row.top1, other.row.top1
            if len(accuracies) < len(group.parts):
                continue
            if HARMONIC_MEAN in group.measures:
                base, novel = accuracies[BASE], accuracies[NOVEL]
                accuracies[HARMONIC_MEAN] = harmonic_mean(base[0], novel[0]), harmonic_mean(base[1], novel[1])
            pairs.append(accuracies)
    return pairs


def _partner(
    group: Group, evaluation: EvaluationRecord, seed: int, baseline: Variant, dataset: str, part: str
) -> EvaluationRecord | None:
    """The baseline's evaluation of the same seed; for zero-shot, which is not random, of the same images."""
    others = group.evaluations(baseline, dataset, part)
    if seed in others or not baseline.is_zero_shot:
        return others.get(seed)
    return next((other for other in others.values() if other.row.items == evaluation.row.items), None)


@dataclass(frozen=True)
class ClassChange:
    """A class's accuracy under a method minus that under a baseline, mean over seeds, in fractions."""

    class_name: str
    classes: str
    difference: float


def class_baselines(group: Group, method: Variant) -> list[Variant]:
    """With what the classes of a method are compared: zero-shot CLIP, and the last of the other class baselines."""
    baselines = [group.zero_shot] if group.zero_shot else []
    candidates = [
        variant for variant in group.variants if "class baseline" in variant.description.roles and variant != method
    ]
    return baselines + ([max(candidates, key=lambda variant: variant.description.order)] if candidates else [])


def class_changes(group: Group, method: Variant, baseline: Variant, dataset: str) -> tuple[list[ClassChange], int]:
    """Every class that has images, greatest gain first, and the number of seeds that both have."""
    pairs, seeds = [], set()
    for part in group.parts:
        for seed, evaluation in group.evaluations(method, dataset, part).items():
            other = _partner(group, evaluation, seed, baseline, dataset, part)
            if other is not None and other.row.class_names == evaluation.row.class_names:
                pairs.append((evaluation, other))
                seeds.add(seed)
    return _mean_changes(pairs), len(seeds)


def improved_classes(group: Group, method: Variant, baseline: Variant) -> dict[str, float]:
    """The share of the classes of each data set whose accuracy under the method exceeds that under the baseline.

    Data sets are in the order of zero-shot CLIP's accuracy, the highest first, where all were measured: the domain
    shift, by which figure 5 of MaPLe's paper orders them, is not a number that a report has.
    """
    shares = {}
    for dataset in group.datasets:
        changes, _ = class_changes(group, method, baseline, dataset)
        if changes:
            shares[dataset] = sum(change.difference > 0 for change in changes) / len(changes)
    if group.zero_shot is None:
        return shares
    known = {dataset: group.spread(group.zero_shot, group.measures[-1], dataset) for dataset in shares}
    means = {dataset: spread.mean for dataset, spread in known.items() if spread}
    return dict(sorted(shares.items(), key=lambda item: -means[item[0]])) if len(means) == len(shares) else shares


def _mean_changes(pairs: Iterable[tuple[EvaluationRecord, EvaluationRecord]]) -> list[ClassChange]:
    differences: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for method, baseline in pairs:
        # Two classes may share a name, so the index is part of the key.
        rows = zip(method.row.class_names, method.row.per_class, baseline.row.per_class, strict=False)
        for index, (name, after, before) in enumerate(rows):
            if after is not None and before is not None:
                differences[method.row.classes, index, name].append(after - before)
    changes = [ClassChange(name, part, float(np.mean(values))) for (part, _, name), values in differences.items()]
    return sorted(changes, key=lambda change: -change.difference)


@dataclass(frozen=True)
class MeasuredAccuracy:
    """How often a method is right on n images, in fractions."""

    title: str
    right: int
    images: int

    @classmethod
    def of(cls, evaluation: EvaluationRecord) -> "MeasuredAccuracy":
        """The accuracy of an evaluation."""
        row = evaluation.row
        return cls(evaluation.description.title, round(row.top1 * row.images), row.images)

    @property
    def fraction(self) -> float:
        """Right predictions over images."""
        return self.right / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, 95 %."""
        return accuracy_interval(self.right, self.images)


@dataclass(frozen=True)
class PairedAccuracy:
    """A method and zero-shot CLIP on the same images; `changes` has the greatest gain first.

    `fixed` and `regressed` images are classified correctly by the method only, and by zero-shot CLIP only; `p` is that
    of the exact sign test on these (McNemar's).
    """

    method: MeasuredAccuracy
    zero_shot: MeasuredAccuracy
    fixed: int
    regressed: int
    p: float
    changes: tuple[ClassChange, ...]

    @property
    def is_significant(self) -> bool:
        """Whether so great a difference is unlikely to be chance, p < 0.05."""
        return self.p < 0.05

    @property
    def verdict(self) -> str:
        """The images on which the two differ, and the result of the test, in words."""
        chance = "unlikely to be chance" if self.is_significant else "may be chance"
        return (
            f"{self.fixed:,} correct that zero-shot CLIP gets wrong, {self.regressed:,} wrong that it gets right "
            f"(sign test: {p_text(self.p)}, {chance})"
        )


def held_out(collection: Collection) -> tuple[EvaluationRecord | None, EvaluationRecord | None]:
    """A method's and zero-shot CLIP's evaluation on the test images of the run's own data set and class names."""
    evaluations = [
        evaluation
        for evaluation in collection.evaluations
        if evaluation.on_own_data
        and not evaluation.names
        and (evaluation.row.classes, evaluation.row.part) == ("all", "test")
    ]
    method = next((evaluation for evaluation in evaluations if not evaluation.description.is_zero_shot), None)
    baselines = (evaluation for evaluation in evaluations if evaluation.description.is_zero_shot)
    return method, next(
        (evaluation for evaluation in baselines if method is None or evaluation.row.items == method.row.items), None
    )


def paired_accuracy(method: EvaluationRecord, zero_shot: EvaluationRecord) -> PairedAccuracy | None:
    """Compare two evaluations image by image; None where they have other images, or no predictions were kept.

    Raises:
        ValueError: a file of predictions is damaged, or a row holds no accuracies per class.
    """
    after, before = read_predictions(method), read_predictions(zero_shot)
    names = method.row.class_names
    if after is None or before is None or after.paths != before.paths or names != zero_shot.row.class_names:
        return None
    right_after, right_before = (predictions.top[:, 0] == predictions.labels for predictions in (after, before))
    fixed, regressed = int(np.sum(right_after & ~right_before)), int(np.sum(right_before & ~right_after))
    if not (method.row.per_class and zero_shot.row.per_class):
        raise ValueError("a row holds no accuracies per class")
    changes = tuple(_mean_changes([(method, zero_shot)]))
    accuracies = MeasuredAccuracy.of(method), MeasuredAccuracy.of(zero_shot)
    return PairedAccuracy(*accuracies, fixed, regressed, sign_test(fixed, regressed), changes)
