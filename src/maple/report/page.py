"""The report as one HTML page that needs nothing else: tables, figures and pictures are inside."""

import base64
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import PurePath
from typing import Any

from maple.errors import ConfigError
from maple.report.ablations import find_ablations
from maple.report.changes import class_changes
from maple.report.confusion import Confusion, most_confused
from maple.report.duels import duel
from maple.report.examples import FEWEST, Outcome, choose_examples
from maple.report.groups import TITLES, Group, Variant
from maple.report.headline import chosen_method, headline_sentences
from maple.report.records import ZERO_SHOT, Collection, Problem, Run
from maple.report.tables import Table, make_tables

Picture = Callable[[str, str | None, str], bytes | None]
"""(data set as it was asked for, its root, path of the image) -> PNG, or None where there is none to be had."""

_MATRIX_CAPTION = (
    "Rows: what the images show; columns: what was said. The share of each row is the darker the greater it is."
)
MOST_DETAILS = 4
"""How many data sets are looked at closely."""


@dataclass(frozen=True)
class Figure:
    """An SVG with its caption."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Details:
    """One data set from close up."""

    dataset: str
    method: str
    title: str
    figures: tuple[Figure, ...]
    after_examples: tuple[Figure, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    examples_caption: str = ""


@dataclass(frozen=True)
class Chapter:
    """One group: its tables and figures."""

    title: str
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]


@dataclass
class _Pictures:
    """Data URIs of pictures, each asked for once."""

    picture: Picture | None
    found: dict[tuple[str, str | None, str], str | None] = field(default_factory=dict)

    def uri(self, opened: tuple[str, str | None], path: str) -> str | None:
        key = (*opened, path)
        if key not in self.found:
            png = self.picture(*key) if self.picture else None
            self.found[key] = None if png is None else f"data:image/png;base64,{base64.b64encode(png).decode()}"
        return self.found[key]


def make_page(collection: Collection, groups: list[Group], picture: Picture | None = None) -> str:
    """The page's HTML.

    Raises:
        ConfigError: jinja2, matplotlib or scikit-learn is not installed.
    """
    _require_extra()
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    chapters = [_chapter(group, f"g{number}") for number, group in enumerate(groups)]
    details, problems = _details(groups)
    pictures = _Pictures(picture)
    environment = Environment(
        loader=PackageLoader("maple.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # made by matplotlib, which escapes every name in it
    environment.filters["percent"] = lambda fraction: f"{100 * fraction:.0f}\N{NO-BREAK SPACE}%"
    return environment.get_template("page.html.j2").render(
        headline=headline_sentences(groups),
        counts=_counts(collection),
        chapters=chapters,
        details=details,
        uri=pictures.uri,
        runs=[_run_line(run) for run in collection.runs],
        environments=_environments(collection.runs),
        silent=collection.silent,
        problems=(*collection.problems, *problems),
        remarks=[(run.name, run.remarks) for run in collection.runs if run.remarks],
    )


def _require_extra() -> None:
    needed = (("jinja2", "jinja2"), ("matplotlib", "matplotlib"), ("sklearn", "scikit-learn"))
    missing = [package for name, package in needed if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"an HTML report needs {', '.join(missing)}: pip install 'maple-clip[report]'; "
            "--format markdown, latex and csv need nothing more"
        )


def _counts(collection: Collection) -> str:
    evaluations = len(collection.evaluations)
    datasets = len({evaluation.dataset for evaluation in collection.evaluations})
    backbones = len({evaluation.row.backbone for evaluation in collection.evaluations})
    numbers = ((len(collection.runs), "run"), (evaluations, "evaluation"), (datasets, "data set"))
    words = [f"{number} {word}{'s' if number != 1 else ''}" for number, word in (*numbers, (backbones, "backbone"))]
    return " · ".join(words)


def _chapter(group: Group, name: str) -> Chapter:
    from maple.report.ablation_plots import ablation_figure
    from maple.report.plots import datasets_figure, results_figure

    figures = []
    several = len(group.datasets) > 1
    if group.key.kind == "base-to-novel" and any(group.overall(variant) for variant in group.variants):
        over = "Averages over the data sets; the small dots are the seeds'" if several else "The small dots are seeds"
        hm = " own averages. The harmonic mean is that of the averages." if several else "."
        figures.append(
            Figure(
                results_figure(group, f"{name}-results"),
                f"{over}{hm} Bars reach one standard deviation to each side; the dotted line is zero-shot CLIP.",
            )
        )
    if several:
        what = "Harmonic mean" if group.key.kind == "base-to-novel" else "Accuracy"
        figures.append(
            Figure(datasets_figure(group, f"{name}-datasets"), f"{what} on each data set, mean ± standard deviation.")
        )
    for number, ablation in enumerate(find_ablations(group)):
        zero = "; the dotted line is zero-shot CLIP" if any(one.name == ZERO_SHOT for one in group.variants) else ""
        caption = f"{ablation.method} at several values of {ablation.setting}, all else being equal: mean ± standard "
        caption += f"deviation over seeds{' of the averages over data sets' if several else ''}{zero}."
        figures.append(Figure(ablation_figure(group, ablation, f"{name}-ablation{number}"), caption))
    return Chapter(group.key.caption, tuple(make_tables([group])), tuple(figures))


def _details(groups: list[Group]) -> tuple[list[Details], list[Problem]]:
    """The first data sets of the first group that has a learned method."""
    for group in groups:
        method = chosen_method(group) or next((one for one in group.variants if one.name != "zero_shot"), None)
        if method is None:
            continue
        found, problems = [], []
        for number, dataset in enumerate(group.datasets[:MOST_DETAILS]):
            one, wrong = _detail(group, method, dataset, f"d{number}")
            found.append(one)
            problems += [problem for problem in wrong if problem not in problems]
        return [one for one in found if one.figures or one.after_examples or one.outcomes], problems
    return [], []


def _detail(group: Group, method: Variant, dataset: str, name: str) -> tuple[Details, list[Problem]]:
    from maple.report.confusion_plot import confusion_figure
    from maple.report.embeddings import embed
    from maple.report.plots import MOST_CHANGES, changes_figure, curves_figure, embedding_figure

    figures, after = [], []
    title = TITLES.get(method.name, method.name)
    if curves := curves_figure(group, dataset, f"{name}-curves"):
        caption = (
            "Thin lines are seeds, thick lines their mean. Loss: of every step, as a running mean over half an "
            "epoch, and the mean of each epoch. Accuracy: on the training images as they passed, augmented."
        )
        figures.append(Figure(curves, caption))
    changes, seeds = class_changes(group, method, dataset)
    if bars := changes_figure(changes, f"{name}-changes"):
        up, down = (sum(sign * change.difference > 0 for change in changes) for sign in (1, -1))
        caption = (
            f"Of {len(changes)} classes {up} gain, {down} lose and {len(changes) - up - down} stay as they are under "
            f"{method.label}, mean over {seeds} seed{'s' if seeds != 1 else ''}; at most the {MOST_CHANGES} greatest "
            "gains and losses are shown."
        )
        after.append(Figure(bars, caption))
    against, problems = duel(group, method, dataset)
    if against is None:
        return Details(dataset, method.label, title, tuple(figures), tuple(after)), problems
    if matrix := confusion_figure(against, method.label, f"{name}-confusion"):
        after.append(Figure(matrix, _MATRIX_CAPTION))
    if embedding := embed(against):
        after.append(Figure(embedding_figure(embedding, method.label, f"{name}-plane"), _plane_caption(embedding)))
    outcomes = choose_examples(against)
    total = sum(outcome.count for outcome in outcomes)
    caption = (
        f"{total:,} test images, zero-shot CLIP and {method.label} (seed {against.seed}). The pictures were chosen by "
        f"rule, not by look: the four outcomes in proportion to their counts, but at least {FEWEST} of each where "
        "there are so many, and within an outcome evenly spaced along the list of images."
    )
    confusions = tuple(most_confused(against))
    return Details(
        dataset, method.label, title, tuple(figures), tuple(after), confusions, tuple(outcomes), caption
    ), problems


def _plane_caption(embedding: Any) -> str:
    how = embedding.how.replace("-", "\N{NON-BREAKING HYPHEN}")
    words = [
        f"Image features of {len(embedding.labels)} test images of {len(embedding.class_names)} classes, evenly spaced "
        f"along the list of classes, laid out by {how} with a fixed seed; the same images on both sides, "
        "each side laid out by itself."
    ]
    if embedding.unchanged:
        words.append("This method leaves the image tower as it is, so both sides show the same features.")
    elif embedding.before.silhouette is not None and embedding.after.silhouette is not None:
        words.append(
            f"Separation of the classes in all dimensions (silhouette, −1 to 1): {embedding.before.silhouette:.3f} "
            f"before, {embedding.after.silhouette:.3f} after.".replace("-", "−")
        )
    return " ".join(words)


def _run_line(run: Run) -> dict[str, str]:
    command = run.environment.get("command")
    words = [str(word) for word in command] if isinstance(command, list) else []
    if words and PurePath(words[0]).name in ("__main__.py", "maple"):
        words[0] = "maple"
    return {
        "name": run.name,
        "command": shlex.join(words) or "not recorded",
        "started": str(run.environment.get("started", "")),
        "state": "finished" if run.finished else "not finished",
    }


def _environments(runs: tuple[Run, ...]) -> list[dict[str, Any]]:
    """What the runs ran on, each once, with the number of its runs."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        facts = {key: value for key, value in run.environment.items() if key not in ("command", "started", "versions")}
        versions = run.environment.get("versions")
        facts |= versions if isinstance(versions, dict) else {}
        key = json.dumps(facts, sort_keys=True)
        entry = found.setdefault(key, {"facts": {name: str(value) for name, value in facts.items()}, "runs": 0})
        entry["runs"] += 1
    return [entry for entry in found.values() if entry["facts"]]
