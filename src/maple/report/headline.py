"""The result in a few plain sentences, computed from the numbers, whichever method wins."""

from maple.report.groups import BASE, NOVEL, Group, Spread, Variant
from maple.report.records import CostRow


def headline_method(group: Group) -> Variant | None:
    """The learned method that is summarised: the best variant of the headline method, otherwise the best one."""
    learned = [variant for variant in _ranking(group) if not variant.is_zero_shot]
    return next(
        (variant for variant in learned if "headline" in variant.description.roles), learned[0] if learned else None
    )


def headline_sentences(groups: list[Group], costs: tuple[CostRow, ...]) -> list[str]:
    """Of the first group in which a method has results on every data set; the result itself comes first.

    A transfer comes before the accuracy on its source. Without evaluations: what the costs were measured for.
    """
    ranked = [group for group in groups if _ranking(group)]
    if ranked:
        transfers = [group for group in ranked if group.key.kind == "transfer"]
        sources = {group.key.source for group in transfers}
        is_source_alone = ranked[0].key.kind == "accuracy" and set(ranked[0].datasets) <= sources
        return _sentences(transfers[0] if is_source_alone else ranked[0])
    if not groups and costs:
        conditions = sorted({row.conditions for row in costs})
        methods = len({row.recipe for row in costs})
        heading = f"What {methods} method{'s' if methods != 1 else ''} cost{'s' if methods == 1 else ''}"
        where = f", under {len(conditions)} conditions" if len(conditions) > 1 else f": {conditions[0]}"
        return [f"{heading}{where}.", "Nothing was evaluated here."]
    return ["No method has results on every data set yet, so there is no average to compare."]


def _ranking(group: Group) -> list[Variant]:
    """The variants that have an overall number, best first."""
    means = {variant: spread.mean for variant in group.variants if (spread := group.overall(variant))}
    return sorted(means, key=lambda variant: -means[variant])


def _sentences(group: Group) -> list[str]:
    ranking = _ranking(group)
    method = headline_method(group)
    zero_shot = next((variant for variant in ranking if variant.is_zero_shot), None)
    subject = method or ranking[0]
    spread, count = group.overall(subject), len(group.datasets)
    result = f"{_points(spread)} % accuracy on {group.key.classes} classes"
    if group.key.kind == "base-to-novel":
        base, novel = (_points(group.spread(subject, part)) for part in (BASE, NOVEL))
        result = f"a harmonic mean of {_points(spread)} % ({base} % on base classes, {novel} % on novel ones)"
    where = f"on {group.datasets[0]}" if count == 1 else f"on average over {count} data sets"
    seeds = spread.n if spread else 0
    conditions = f"{group.key.conditions}, {seeds} seed{'s' if seeds != 1 else ''}"
    label = f"{subject.label[:1].upper()}{subject.label[1:]}"
    if group.key.kind == "transfer":
        label += f", trained on {group.key.source},"
    sentences = [f"{label} reaches {result} {where} ({conditions})."]
    if method and zero_shot:
        sentences.append(_comparison(group, method, zero_shot))
    if method and ranking[0] not in (method, zero_shot):
        sentences.append(f"The best here is {ranking[0].label} with {_points(group.overall(ranking[0]))} %.")
    elif method == ranking[0] and len(ranking) > 2:
        second = next(variant for variant in ranking[1:] if variant != zero_shot)  # it is named above
        sentences.append(f"Next comes {second.label} with {_points(group.overall(second))} %.")
    return sentences


def _comparison(group: Group, method: Variant, zero_shot: Variant) -> str:
    ours, theirs = group.overall(method), group.overall(zero_shot)
    if ours is None or theirs is None:
        return ""
    difference = 100 * (ours.mean - theirs.mean)
    if round(difference, 1) == 0:
        sentence = f"That equals zero-shot CLIP, which reaches {_points(theirs)} %"
    else:
        side = "above" if difference > 0 else "below"
        sentence = f"That is {abs(difference):.1f} points {side} zero-shot CLIP, which reaches {_points(theirs)} %"
    if group.key.kind == "base-to-novel":
        changes = []
        for part in (BASE, NOVEL):
            after, before = group.spread(method, part), group.spread(zero_shot, part)
            change = 100 * after.mean - 100 * before.mean if after and before else float("nan")
            changes.append(f"{change:+.1f} on {part}".replace("-", "−"))
        sentence += f" ({', '.join(changes)} classes)"
    if ours.deviation is None:
        return f"{sentence}; with one seed this may be chance."
    if abs(difference) < 100 * ours.deviation:
        return f"{sentence}; the difference is smaller than the spread over seeds (± {100 * ours.deviation:.1f})."
    return f"{sentence}."


def _points(spread: Spread | None) -> str:
    return "nan" if spread is None else f"{100 * spread.mean:.1f}"
