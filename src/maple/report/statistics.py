"""Paired comparisons: does one method beat another over the same seeds and data sets?"""

import warnings
from dataclasses import dataclass

import numpy as np

from maple.metrics import harmonic_mean
from maple.report.groups import MEASURES, Group
from maple.report.records import ZERO_SHOT, Evaluation
from maple.report.variants import Variant

FEWEST_PAIRS = 5
BASELINES = (ZERO_SHOT, "coop")


@dataclass(frozen=True)
class Comparison:
    """Method minus baseline over n pairs (seed, data set), in fractions.

    Attributes:
        differences: {measure: mean difference}.
        wins, ties: in how many pairs the deciding (last) measure is higher, or equal.
        p: two-sided, Wilcoxon's signed-rank test on the deciding measure; None where it cannot be computed.
    """

    method: str
    baseline: str
    pairs: int
    differences: dict[str, float]
    wins: int
    ties: int
    p: float | None


def compare(group: Group) -> list[Comparison]:
    """Every method against zero-shot CLIP and CoOp, where they share at least five pairs."""
    comparisons = []
    for baseline in group.variants:
        if baseline.name not in BASELINES:
            continue
        for method in group.variants:
            if method == baseline or method.name == ZERO_SHOT:
                continue
            pairs = paired(group, method, baseline)
            if len(pairs) >= FEWEST_PAIRS:
                comparisons.append(_compare(method, baseline, pairs))
    return comparisons


def paired(group: Group, method: Variant, baseline: Variant) -> list[dict[str, tuple[float, float]]]:
    """{measure: (method, baseline)} for every data set and seed that both have."""
    pairs = []
    for dataset in group.datasets:
        if group.key.kind != "base-to-novel":
            theirs = group.evaluations(baseline, dataset)
            for seed, one in group.evaluations(method, dataset).items():
                if rival := partner(one, theirs, seed, baseline):
                    pairs.append({"top1": (one.row.top1, rival.row.top1)})
            continue
        cells = {
            (variant, part): group.evaluations(variant, dataset, part)
            for variant in (method, baseline)
            for part in MEASURES[:2]
        }
        for seed in cells[method, "base"]:
            found: dict[str, tuple[float, float]] = {}
            for part in MEASURES[:2]:
                ours = cells[method, part].get(seed)
                other = partner(ours, cells[baseline, part], seed, baseline) if ours else None
                if ours and other:
                    found[part] = (ours.row.top1, other.row.top1)
            if len(found) == len(MEASURES[:2]):
                means = [harmonic_mean(found["base"][side], found["novel"][side]) for side in (0, 1)]
                pairs.append({**found, MEASURES[2]: (means[0], means[1])})
    return pairs


def partner(evaluation: Evaluation, others: dict[int, Evaluation], seed: int, baseline: Variant) -> Evaluation | None:
    """The baseline's evaluation of the same seed; for zero-shot, which has no chance in it, of the same images."""
    if seed in others:
        return others[seed]
    if baseline.name == ZERO_SHOT:
        return next((other for other in others.values() if other.row.items == evaluation.row.items), None)
    return None


def _compare(method: Variant, baseline: Variant, pairs: list[dict[str, tuple[float, float]]]) -> Comparison:
    differences = {measure: np.array([pair[measure][0] - pair[measure][1] for pair in pairs]) for measure in pairs[0]}
    # Equal accuracies must not differ by rounding of the harmonic mean.
    deciding = np.round(differences[list(differences)[-1]], 12)
    return Comparison(
        method.label,
        baseline.label,
        len(pairs),
        {measure: float(found.mean()) for measure, found in differences.items()},
        int((deciding > 0).sum()),
        int((deciding == 0).sum()),
        _wilcoxon(deciding),
    )


def _wilcoxon(differences: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> float | None:
    """The two-sided p-value; 1 where nothing differs; None without scipy."""
    if not differences.any():
        return 1.0
    try:
        from scipy.stats import wilcoxon
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few pairs with ties: said in the table's note
        return float(wilcoxon(differences).pvalue)
