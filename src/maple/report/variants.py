"""The rows of tables: methods, told apart by the settings in which they differ."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from maple.report.records import ZERO_SHOT, Evaluation

TITLES = {
    ZERO_SHOT: "zero-shot CLIP",
    "coop": "CoOp",
    "cocoop": "CoCoOp",
    "deep_language": "deep language",
    "vpt": "VPT",
    "independent_vl": "IVLP",
    "maple": "MaPLe",
    "kgcoop": "KgCoOp",
    "prograd": "ProGrad",
    "promptsrc": "PromptSRC",
    "linear_probe": "linear probe",
    "clip_adapter": "CLIP-Adapter",
    "tip_adapter": "Tip-Adapter",
    "taskres": "TaskRes",
}
"""How the methods are called in tables, in the order of the table; others follow under their own names."""

_FEW = 3
"""Settings that are all named, however they hang together."""


@dataclass(frozen=True)
class Variant:
    """A method with its settings, as one row of a table. `label` names the settings that tell it from its twins.

    `settings` are those, as JSON.
    """

    name: str
    label: str
    settings: str = field(repr=False)


def in_order(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    """Each once, in the order of tables: by `TITLES`, then by name, then by settings."""
    order = list(TITLES)
    return tuple(
        sorted(
            set(variants),
            key=lambda variant: (
                order.index(variant.name) if variant.name in order else len(order),
                variant.name,
                _natural(variant.label),
            ),
        )
    )


def variants_of(evaluations: Iterable[Evaluation]) -> Callable[[Evaluation], Variant]:
    """Which variant each of these evaluations is of.

    Settings that differ only from one data set, or one number of shots, to another (a template, the epochs that a
    preset gives to large data sets or to few shots) do not make two methods; those that take two values at one do.
    """
    evaluations = tuple(evaluations)
    found: dict[str, dict[tuple[str, int | None], list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for evaluation in evaluations:
        source = evaluation.row.source
        found[evaluation.method][source.dataset, source.shots].append(evaluation.settings)
    telling = {
        method: sorted(
            {
                key
                for settings in places.values()
                for key in {key for one in settings for key in one}
                if len({one.get(key) for one in settings}) > 1
            }
        )
        for method, places in found.items()
    }

    shown = {method: _enough(keys, [e for e in evaluations if e.method == method]) for method, keys in telling.items()}

    def variant_of(evaluation: Evaluation) -> Variant:
        method, settings = evaluation.method, evaluation.settings
        title = TITLES.get(method, method)
        words = [f"{key}={_short(settings.get(key, 'default'))}" for key in shown[method]]
        told = ", ".join([*words, "..."] if len(words) < len(telling[method]) else words)
        chosen = json.dumps({key: settings.get(key) for key in telling[method]})
        return Variant(method, f"{title} ({told})" if told else title, chosen)

    return variant_of


def _enough(keys: Sequence[str], evaluations: Sequence[Evaluation]) -> Sequence[str]:
    """The settings to be named: of more than a few only as many as tell the same apart, the method's own first."""
    if len(keys) <= _FEW:
        return keys
    own = {key for evaluation in evaluations for key in evaluation.row.method}
    chosen: list[str] = []
    kinds = 1
    for key in sorted(keys, key=lambda key: key not in own):
        found = len({tuple(evaluation.settings.get(one) for one in (*chosen, key)) for evaluation in evaluations})
        if found > kinds:
            chosen, kinds = [*chosen, key], found
    return chosen


def _short(value: str) -> str:
    if named := re.match(r"\{'name': '(\w+)'", value):
        return named[1]  # the prompts of another method, with its settings
    if value == "{}":
        return "own"
    return value if len(value) <= 40 else f"{value[:37]}..."


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Sort key under which depth=9 comes before depth=12."""
    words = text.replace("=", " ").replace(",", " ").replace(")", " ").split()
    return [(0, float(word), "") if word.replace(".", "", 1).isdecimal() else (1, 0.0, word) for word in words]
