"""Pictures to show, chosen by rule and not by look: in proportion to how often each outcome happens."""

from dataclasses import dataclass

from maple.report.duels import Duel

OUTCOMES = ("mended", "broken", "both right", "both wrong")
TITLES = {
    "mended": "Mended by prompts",
    "broken": "Broken by prompts",
    "both right": "Right both times",
    "both wrong": "Wrong both times",
}
SHOWN = 24
FEWEST = 3
"""Of each outcome, where there are so many."""


@dataclass(frozen=True)
class Answer:
    """What a method said of an image."""

    name: str
    probability: float
    right: bool


@dataclass(frozen=True)
class Example:
    """One image with both answers."""

    path: str
    opened: tuple[str, str | None]
    classes: str
    truth: str
    before: Answer
    after: Answer


@dataclass(frozen=True)
class Outcome:
    """All images with one outcome, and the ones that are shown."""

    name: str
    count: int
    shown: tuple[Example, ...]

    @property
    def title(self) -> str:
        """Its heading."""
        return TITLES[self.name]


def choose_examples(duel: Duel, shown: int = SHOWN) -> list[Outcome]:
    """At most `shown` images: outcomes in proportion to their counts, evenly spaced in the list; see `shares`."""
    found: dict[str, list[Example]] = {name: [] for name in OUTCOMES}
    for bout in duel.bouts:
        for index in range(len(bout.before.paths)):
            label = int(bout.before.labels[index])
            answers = []
            for predictions in (bout.before, bout.after):
                said = int(predictions.top[index, 0])
                probability = float(predictions.probabilities[index, 0])
                answers.append(Answer(bout.class_names[said], probability, said == label))
            before, after = answers
            outcome = {
                (False, True): "mended",
                (True, False): "broken",
                (True, True): "both right",
                (False, False): "both wrong",
            }[before.right, after.right]
            found[outcome].append(
                Example(
                    bout.after.paths[index], bout.after.opened, bout.classes, bout.class_names[label], before, after
                )
            )
    places = shares([len(found[name]) for name in OUTCOMES], shown)
    return [
        Outcome(name, len(found[name]), tuple(found[name][index] for index in evenly(len(found[name]), count)))
        for name, count in zip(OUTCOMES, places, strict=True)
    ]


def shares(counts: list[int], places: int, fewest: int = FEWEST) -> list[int]:
    """Divide places in proportion to counts, but at least `fewest` to each that has so many, and never too many.

    With more places than there are things, everything gets its place.
    """
    total = sum(counts)
    if total <= places:
        return counts
    given = [min(fewest, count) for count in counts]
    while sum(given) < places:
        # The one that is furthest below its share is next; of equal ones the first.
        lacking = [
            count * places / total - have if have < count else -1e9 for count, have in zip(counts, given, strict=True)
        ]
        given[lacking.index(max(lacking))] += 1
    return given


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` indices below `count`, evenly spaced: the middle of each of as many equal stretches."""
    return [int((place + 0.5) * count / wanted) for place in range(wanted)]
