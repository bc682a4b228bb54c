"""The result in one or two plain sentences, computed from the numbers, whoever wins."""

from maple.report.groups import MEASURES, Group, Spread
from maple.report.records import ZERO_SHOT, CostRow
from maple.report.variants import Variant

MAIN = "maple"


def chosen_method(group: Group) -> Variant | None:
    """The learned method that the report speaks of: the best MaPLe, else the best learned one that has a number."""
    ranked = ranking(group)
    learned = [variant for variant in ranked if variant.name != ZERO_SHOT]
    return next((variant for variant in learned if variant.name == MAIN), learned[0] if learned else None)


def ranking(group: Group) -> list[Variant]:
    """The variants that have an overall number, best first."""
    numbers = {variant: group.overall(variant) for variant in group.variants}
    return sorted(
        (variant for variant in group.variants if numbers[variant]),
        key=lambda variant: -(numbers[variant] or Spread(0, None, 0)).mean,
    )


def headline_sentences(groups: list[Group], costs: tuple[CostRow, ...] = ()) -> list[str]:
    """Of the first group in which a method has results on every data set; the result itself comes first.

    Where nothing was evaluated, what the costs are of.
    """
    for group in groups:
        if ranking(group):
            return _sentences(group)
    if not groups and costs:
        conditions = sorted({row.conditions for row in costs})
        methods = len({row.recipe for row in costs})
        said = f"What {methods} method{'s' if methods != 1 else ''} cost{'s' if methods == 1 else ''}"
        if len(conditions) > 1:
            return [f"{said}, under {len(conditions)} conditions.", "Nothing was evaluated here."]
        return [f"{said}: {conditions[0]}.", "Nothing was evaluated here."]
    return ["No method has results on every data set yet, so there is no average to compare."]


def headline(groups: list[Group], costs: tuple[CostRow, ...] = ()) -> str:
    """The sentences as one text."""
    return " ".join(headline_sentences(groups, costs))


def _sentences(group: Group) -> list[str]:
    ranked = ranking(group)
    method = chosen_method(group)
    zero = next((variant for variant in ranked if variant.name == ZERO_SHOT), None)
    subject = method or zero
    if subject is None:
        return []
    sentences = [f"{_capital(subject.label)} reaches {_result(group, subject)} {_where(group, subject)}."]
    if method and zero:
        sentences.append(_against(group, method, zero))
    if method and ranked[0] not in (method, zero):
        best = group.overall(ranked[0])
        sentences.append(f"The best here is {ranked[0].label} with {_points(best)} %.")
    elif method and len(ranked) > 2 and ranked[0] == method:
        second = next(variant for variant in ranked[1:] if variant != zero) if zero in ranked[1:2] else ranked[1]
        if second != zero:
            sentences.append(f"Next comes {second.label} with {_points(group.overall(second))} %.")
    return sentences


def _result(group: Group, variant: Variant) -> str:
    overall = _points(group.overall(variant))
    if group.key.kind != "base-to-novel":
        return f"{overall} % accuracy on {group.key.classes} classes"
    base, novel = (_mean(group, variant, measure) for measure in MEASURES[:2])
    return f"a harmonic mean of {overall} % ({base:.1f} % on base classes, {novel:.1f} % on novel ones)"


def _where(group: Group, subject: Variant) -> str:
    count = len(group.datasets)
    place = f"on {group.datasets[0]}" if count == 1 else f"on average over {count} data sets"
    overall = group.overall(subject)
    seeds = overall.n if overall else 0
    return f"{place} ({group.key.conditions}, {seeds} seed{'s' if seeds != 1 else ''})"


def _against(group: Group, method: Variant, zero: Variant) -> str:
    ours, theirs = group.overall(method), group.overall(zero)
    if ours is None or theirs is None:
        return ""
    difference = 100 * (ours.mean - theirs.mean)
    if round(difference, 1) == 0:
        said = f"That equals zero-shot CLIP, which reaches {_points(theirs)} %"
    else:
        side = "above" if difference > 0 else "below"
        said = f"That is {abs(difference):.1f} points {side} zero-shot CLIP, which reaches {_points(theirs)} %"
    if group.key.kind == "base-to-novel":
        changes = [f"{_mean(group, method, part) - _mean(group, zero, part):+.1f} on {part}" for part in MEASURES[:2]]
        said += f" ({', '.join(changes)} classes)".replace("-", "−")
    spread = ours.deviation
    if spread is None:
        return f"{said}; with one seed there is no telling how much of this is chance."
    if abs(difference) < 100 * spread:
        return f"{said}; the difference is smaller than the spread over seeds (± {100 * spread:.1f})."
    return f"{said}."


def _mean(group: Group, variant: Variant, measure: str) -> float:
    found = group.average(variant, measure)
    return 100 * found.mean if found else float("nan")


def _points(spread: Spread | None) -> str:
    return "?" if spread is None else f"{100 * spread.mean:.1f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
