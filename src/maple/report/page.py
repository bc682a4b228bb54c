"""The report as one self-contained HTML page: tables, figures and images are inside."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from maple.report import plots, predictions
from maple.report.comparison import class_baselines, class_changes, improved_classes
from maple.report.explanations import explained_runs
from maple.report.groups import Group, Variant
from maple.report.headline import headline_method, headline_sentences
from maple.report.predictions import FEWEST_EXAMPLES, Confusion, Embedding, Outcome
from maple.report.records import Collection, Problem, command_of, harmless
from maple.report.series import ShotCurves, find_ablations
from maple.report.tables import Table, cost_tables, group_tables, shots_tables

ThumbnailLoader = Callable[[str, str | None, str], bytes | None]
"""(data set as it was requested, its root, path of the image) -> PNG, or None where the image cannot be shown."""

_MOST_DETAILS = 4  # data sets that get a closer look


class CaptionedFigure(NamedTuple):
    """An SVG with its caption."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Chapter:
    """A title, a sentence or two, tables and figures: of a group of evaluations, or of what a caller has to add."""

    title: str
    tables: list[Table]
    figures: list[CaptionedFigure]
    text: str = ""


@dataclass(frozen=True)
class Opening:
    """How a page begins: the sentences of its headline, the result first, and its first chapters."""

    headline: tuple[str, ...]
    chapters: tuple[Chapter, ...] = ()


@dataclass(frozen=True)
class CloserLook:
    """One data set: figures before and after the example images, and the most frequent confusions."""

    dataset: str
    method: str
    title: str
    figures: list[CaptionedFigure]
    outcomes: list[Outcome]
    outcomes_caption: str
    confusions: list[Confusion]
    class_figures: list[CaptionedFigure]


def template_environment() -> Any:
    """jinja2's environment of the pages: names from elsewhere are escaped, and control characters left out."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("maple.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: harmless(value) if type(value) is str else value,
    )
    environment.filters["svg"] = Markup  # made by matplotlib, which escapes every name in it
    # Names of classes and files have no spaces, at which a narrow screen could break them.
    environment.filters["breakable"] = lambda text: Markup("_<wbr>").join(harmless(str(text)).split("_"))
    environment.filters["percent"] = lambda fraction: f"{100 * fraction:.0f}\N{NO-BREAK SPACE}%"
    return environment


def make_page(
    collection: Collection,
    groups: list[Group],
    curves: list[ShotCurves],
    load_thumbnail: ThumbnailLoader | None = None,
    opening: Opening | None = None,
) -> str:
    """The page's HTML."""
    problems = list(collection.problems)
    chapters, waiting = list(opening.chapters if opening else ()), dict(enumerate(curves))
    # Of one run an opening says it all.
    for number, group in enumerate(() if opening else groups):
        # Curves over shots come before the first of their groups.
        for index, shot_curves in list(waiting.items()):
            if group.key in {member.key for member in shot_curves.groups.values()}:
                chapters.append(_shots_chapter(waiting.pop(index), f"s{index}"))
        chapters.append(_group_chapter(group, f"g{number}"))
    if costs := cost_tables(collection.costs, collection.methods):
        chapters.append(Chapter("What the methods cost", costs, []))
    closer_looks, explained = _closer_looks(groups, problems), explained_runs(collection, problems)
    runs, environments = _commands(collection)

    @cache
    def uri(opened: tuple[str, str | None], path: str) -> str | None:
        png = load_thumbnail(*opened, path) if load_thumbnail else None
        return None if png is None else f"data:image/png;base64,{base64.b64encode(png).decode()}"

    numbers = {
        "run": len(collection.runs),
        "evaluation": len(collection.evaluations),
        "data set": len({evaluation.dataset for evaluation in collection.evaluations}),
        "backbone": len({evaluation.row.backbone for evaluation in collection.evaluations}),
    }
    template = template_environment().get_template("page.html.j2")
    page: str = template.render(
        headline=opening.headline if opening else headline_sentences(groups, collection.costs),
        counts=" · ".join(f"{number} {word}{'s' if number != 1 else ''}" for word, number in numbers.items()),
        chapters=chapters,
        closer_looks=closer_looks,
        explained=explained,
        uri=uri,
        runs=runs,
        environments=environments,
        without_evaluation=collection.without_evaluation,
        problems=problems,
        remarks=[(run.name, run.remarks) for run in collection.runs if run.remarks],
    )
    return page


def _shots_chapter(curves: ShotCurves, name: str) -> Chapter:
    several = len(curves.datasets) > 1
    over = f"the mean over {len(curves.datasets)} data sets" if several else curves.datasets[0]
    zero_shot = " Zero-shot CLIP, which sees no training images, is the level line." if curves.zero_shot else ""
    measure = "Accuracy" if len(curves.measures) == 1 else "Base, novel and harmonic mean"
    caption = (
        f"{measure} against training images per class: {over}. Bars: one standard deviation over seeds.{zero_shot}"
    )
    figures = [CaptionedFigure(plots.shots_figure(curves, f"{name}-mean"), caption)]
    if several:
        svg = plots.shots_figure(curves, f"{name}-datasets", each_dataset=True)
        figures.append(CaptionedFigure(svg, "The same on each data set."))
    return Chapter(curves.caption, shots_tables(curves), figures)


def _group_chapter(group: Group, name: str) -> Chapter:
    figures = []
    several = len(group.datasets) > 1
    is_base_to_novel = group.key.kind == "base-to-novel"
    if is_base_to_novel and any(group.overall(variant) for variant in group.variants):
        over = "Averages over the data sets; the small dots are the seeds'" if several else "The small dots are seeds"
        hm = " own averages. The harmonic mean is that of the averages." if several else "."
        caption = f"{over}{hm} Bars reach one standard deviation to each side; the dotted line is zero-shot CLIP."
        figures.append(CaptionedFigure(plots.results_figure(group, f"{name}-results"), caption))
    if several:
        measure = "Harmonic mean" if is_base_to_novel else "Accuracy"
        caption = f"{measure} on each data set, mean ± standard deviation."
        figures.append(CaptionedFigure(plots.datasets_figure(group, f"{name}-datasets"), caption))
        if method := headline_method(group):
            for number, baseline in enumerate(class_baselines(group, method)):
                if len(shares := improved_classes(group, method, baseline)) > 1:
                    order = " Data sets are in the order of zero-shot CLIP's accuracy, the highest first."
                    caption = f"Classes that are more accurate with {method.label} than with {baseline.label}."
                    caption += order if group.zero_shot else ""
                    svg = plots.improved_classes_figure(shares, baseline.label, f"{name}-improved{number}")
                    figures.append(CaptionedFigure(svg, caption))
    for number, ablation in enumerate(find_ablations(group)):
        zero_shot = "; the dotted line is zero-shot CLIP" if group.zero_shot else ""
        caption = f"{ablation.method} at several values of {ablation.setting}, all else being equal: mean ± standard "
        caption += f"deviation over seeds{' of the averages over data sets' if several else ''}{zero_shot}."
        figures.append(CaptionedFigure(plots.ablation_figure(group, ablation, f"{name}-ablation{number}"), caption))
    return Chapter(group.key.caption, group_tables(group), figures)


def _closer_looks(groups: list[Group], problems: list[Problem]) -> list[CloserLook]:
    """The first data sets of the first group that has a learned method."""
    for group in groups:
        learned = (variant for variant in group.variants if not variant.is_zero_shot)
        if method := headline_method(group) or next(learned, None):
            looks = [
                _closer_look(group, method, dataset, f"d{number}", problems)
                for number, dataset in enumerate(group.datasets[:_MOST_DETAILS])
            ]
            return [look for look in looks if look.figures or look.class_figures or look.outcomes]
    return []


def _closer_look(group: Group, method: Variant, dataset: str, name: str, problems: list[Problem]) -> CloserLook:
    look = CloserLook(dataset, method.label, method.description.title, [], [], "", [], [])
    if curves := plots.learning_curves_figure(group, dataset, f"{name}-curves"):
        caption = (
            "Thin lines are seeds, thick lines their mean. Loss: of every step, as a running mean over half an "
            "epoch, and the mean of each epoch. Accuracy: on the training images as they passed, augmented."
        )
        look.figures.append(CaptionedFigure(curves, caption))
    for number, baseline in enumerate(class_baselines(group, method)):
        changes, seeds = class_changes(group, method, baseline, dataset)
        if bars := plots.changes_figure(changes, baseline.label, f"{name}-changes{number}"):
            up, down = (sum(sign * change.difference > 0 for change in changes) for sign in (1, -1))
            caption = (
                f"{method.label} against {baseline.label}: of {len(changes)} classes {up} gain, {down} lose and "
                f"{len(changes) - up - down} stay as they are, mean over {seeds} seed{'s' if seeds != 1 else ''}; at "
                f"most the {plots.MOST_CHANGES} greatest gains and losses are shown."
            )
            look.class_figures.append(CaptionedFigure(bars, caption))
    seed, pairs = predictions.pair_predictions(group, method, dataset, problems)
    if not pairs:
        return look
    if matrix := plots.confusion_figure(pairs, method.label, f"{name}-confusion"):
        caption = "Rows: true classes; columns: predicted ones. The darker, the greater the share of the row."
        look.class_figures.append(CaptionedFigure(matrix, caption))
    if embedding := predictions.embed(pairs):
        svg = plots.embedding_figure(embedding, method.label, f"{name}-plane")
        look.class_figures.append(CaptionedFigure(svg, _embedding_caption(embedding)))
    outcomes = predictions.choose_examples(pairs)
    caption = (
        f"{sum(outcome.count for outcome in outcomes):,} test images, zero-shot CLIP and {method.label} (seed {seed}). "
        "The images shown were chosen by rule, not by appearance: the four outcomes in proportion to their counts, but "
        f"at least {FEWEST_EXAMPLES} of each where there are that many, and within an outcome evenly spaced along the "
        "list of images."
    )
    confusions = predictions.most_confused(pairs)
    return replace(look, outcomes=outcomes, outcomes_caption=caption, confusions=confusions)


def _embedding_caption(embedding: Embedding) -> str:
    method = embedding.method.replace("-", "\N{NON-BREAKING HYPHEN}")
    caption = (
        f"Image features of {len(embedding.labels)} test images of {len(embedding.class_names)} classes, evenly spaced "
        f"along the list of classes, laid out by {method} with a fixed seed; the same images on both sides, "
        "each side laid out by itself."
    )
    if embedding.unchanged:
        return f"{caption} This method leaves the image tower as it is, so both sides show the same features."
    if embedding.silhouettes is None:
        return caption
    before, after = (f"{score:.3f}".replace("-", "−") for score in embedding.silhouettes)
    separation = "Separation of the classes in all dimensions (silhouette, −1 to 1)"
    return f"{caption} {separation}: {before} before, {after} after."


def _commands(collection: Collection) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """The command of every run and measurement with the number of its environment, and these environments."""
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
            texts = {key: str(value) for key, value in facts.items()}
            entry: dict[str, Any] = {"number": str(len(environments) + 1), "facts": texts, "runs": 0}
            entry = environments.setdefault(json.dumps(texts, sort_keys=True), entry)
            entry["runs"] += 1
            number = entry["number"]
        started = str(environment.get("started", ""))
        command = command_of(environment) or "not recorded"
        lines.append({"name": name, "command": command, "started": started, "state": state, "environment": number})
    return lines, list(environments.values())
