"""The report as one HTML page that needs nothing else: tables, figures and pictures are inside."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from maple.errors import ConfigError
from maple.report.ablations import find_ablations
from maple.report.changes import class_changes, class_rivals
from maple.report.confusion import Confusion, most_confused
from maple.report.cost_tables import cost_tables
from maple.report.duels import duel
from maple.report.examples import FEWEST, Outcome, choose_examples
from maple.report.explanations import explained_runs
from maple.report.formats import command_of
from maple.report.groups import Group
from maple.report.headline import chosen_method, headline_sentences
from maple.report.records import ZERO_SHOT, Collection, Problem
from maple.report.shot_tables import shots_tables
from maple.report.shots import ShotCurves
from maple.report.tables import Table, make_tables
from maple.report.variants import TITLES, Variant

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


def make_page(
    collection: Collection, groups: list[Group], curves: list[ShotCurves], picture: Picture | None = None
) -> str:
    """The page's HTML.

    Raises:
        ConfigError: jinja2, matplotlib or scikit-learn is not installed.
    """
    _require_extra()
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    chapters = _chapters(groups, curves)
    if costs := cost_tables(collection.costs):
        chapters.append(Chapter("What the methods cost", tuple(costs), ()))
    runs, environments = _run_lines(collection)
    details, problems = _details(groups)
    explained, unreadable = explained_runs(collection.runs)
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
        headline=headline_sentences(groups, collection.costs),
        counts=_counts(collection),
        chapters=chapters,
        details=details,
        explained=explained,
        uri=pictures.uri,
        runs=runs,
        environments=environments,
        silent=collection.silent,
        problems=(*collection.problems, *problems, *unreadable),
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


def _chapters(groups: list[Group], curves: list[ShotCurves]) -> list[Chapter]:
    """A chapter for each group; curves over shots stand before the first of their groups."""
    chapters, waiting = [], list(enumerate(curves))
    for number, group in enumerate(groups):
        for index, one in [entry for entry in waiting if group.key in entry[1].members()]:
            chapters.append(_shots_chapter(one, f"s{index}"))
            waiting.remove((index, one))
        chapters.append(_chapter(group, f"g{number}"))
    return chapters


def _shots_chapter(curves: ShotCurves, name: str) -> Chapter:
    from maple.report.shot_plots import shots_by_dataset_figure, shots_figure

    several = len(curves.datasets) > 1
    over = f"the mean over {len(curves.datasets)} data sets" if several else curves.datasets[0]
    zero = " Zero-shot CLIP, which sees no training images, is the level line." if curves.zero_shot() else ""
    what = "Accuracy" if len(curves.measures) == 1 else "Base, novel and harmonic mean"
    caption = f"{what} against training images per class: {over}. Bars: one standard deviation over seeds.{zero}"
    figures = [Figure(shots_figure(curves, f"{name}-mean"), caption)]
    if several:
        figures.append(Figure(shots_by_dataset_figure(curves, f"{name}-datasets"), "The same on each data set."))
    return Chapter(curves.caption, tuple(shots_tables(curves)), tuple(figures))


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
    for number, baseline in enumerate(class_rivals(group, method)):
        changes, seeds = class_changes(group, method, baseline, dataset)
        if bars := changes_figure(changes, baseline.label, f"{name}-changes{number}"):
            up, down = (sum(sign * change.difference > 0 for change in changes) for sign in (1, -1))
            caption = (
                f"{method.label} against {baseline.label}: of {len(changes)} classes {up} gain, {down} lose and "
                f"{len(changes) - up - down} stay as they are, mean over {seeds} seed{'s' if seeds != 1 else ''}; at "
                f"most the {MOST_CHANGES} greatest gains and losses are shown."
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


def _run_lines(collection: Collection) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """The command of every run and measurement with the number of its environment, and what these are."""
    environments: dict[str, dict[str, Any]] = {}
    lines = []
    made = [(run.name, run.environment, "" if run.finished else "not finished") for run in collection.runs]
    made += [(f"costs of {row.recipe}, {row.conditions}", row.environment, "") for row in collection.costs]
    for name, environment, state in made:
        facts = {key: value for key, value in environment.items() if key not in ("command", "started", "versions")}
        versions = environment.get("versions")
        facts |= versions if isinstance(versions, dict) else {}
        number = ""
        if facts:
            told = {key: str(value) for key, value in facts.items()}
            entry = environments.setdefault(
                json.dumps(told, sort_keys=True), {"number": str(len(environments) + 1), "facts": told, "runs": 0}
            )
            entry["runs"] += 1
            number = entry["number"]
        started = str(environment.get("started", ""))
        command = command_of(environment) or "not recorded"
        lines.append({"name": name, "command": command, "started": started, "state": state, "environment": number})
    return lines, list(environments.values())
