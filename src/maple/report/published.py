"""Published numbers next to ours: only where data set, backbone, shots and settings are those of the paper."""

import csv
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from maple.config import preset_names, read_preset, resolve
from maple.config.settings import LATER_SETTINGS
from maple.names import names_hash
from maple.report.groups import ANY_SHOTS, IMAGENET_VARIANTS, Group, Variant
from maple.report.records import BackboneRecord, CostRow, EvaluationRecord

ELEVEN = frozenset(
    {"imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397"}
    | {"dtd", "eurosat", "ucf101"}
)
_AVERAGES = {
    ("base-to-novel", ELEVEN): "average",
    ("transfer", ELEVEN - {"imagenet"}): "average of targets",
    ("transfer", IMAGENET_VARIANTS): "average of domains",
}
_SHOTS = 16
_BACKBONES = {("vit-b-16", "openai"), ("vit-b-16-quickgelu", "openai"), ("vit-b/16", "openai")}
_COSTS_BACKBONE = "vit-b-16"


@dataclass(frozen=True)
class PublishedResult:
    """One published result, in per cent, and where it was read; `rerun` if others than the authors measured it.

    A run must have its `settings`, where `*` stands for anything but an empty value, and no `steps` but these.
    """

    protocol: str
    method: str
    title: str
    settings: dict[str, str]
    source_dataset: str
    dataset: str
    values: dict[str, float]
    read_in: str
    rerun: bool = False


@dataclass(frozen=True)
class PublishedCost:
    """What a paper or its authors state about the cost of a recipe on ViT-B/16, and where it was read.

    A multiply-add is one operation; `seconds` and `megabytes` are of training on one data set of the base-to-novel
    average, `milliseconds` of training on one image.
    """

    recipe: str
    settings: dict[str, str]
    gflops: float | None
    images_per_second: float | None
    seconds: float | None
    megabytes: float | None
    milliseconds: float | None
    read_in: str


@cache
def published_results() -> tuple[PublishedResult, ...]:
    """The contents of published.csv, and of published_reruns.csv: independent runs of a published recipe."""
    measures = {"base": "base", "novel": "novel", "harmonic_mean": "harmonic mean", "accuracy": "top1"}
    results = []
    for name in ("published.csv", "published_reruns.csv"):
        for line in _read_csv(name):
            values = {measure: float(line.pop(column)) for column, measure in measures.items() if line[column]}
            kept = {key: value for key, value in line.items() if key not in measures}
            results.append(PublishedResult(**kept, values=values, rerun=name == "published_reruns.csv"))
    return tuple(results)


@cache
def _published_costs() -> tuple[PublishedCost, ...]:
    costs = []
    for line in _read_csv("published_costs.csv"):
        for key in line.keys() - {"recipe", "settings", "read_in"}:
            line[key] = float(line[key]) if line[key] else None
        costs.append(PublishedCost(**line))
    return tuple(costs)


def _read_csv(name: str) -> list[dict[str, Any]]:
    text = (resources.files("maple.report") / name).read_text(encoding="utf-8")
    lines: list[dict[str, Any]] = list(csv.DictReader(text.splitlines()))
    for line in lines:
        line["settings"] = dict(word.split("=", 1) for word in shlex.split(line["settings"]))
    return lines


def _is_papers_backbone(clip: BackboneRecord) -> bool:
    return (clip.name.lower(), (clip.pretrained or "").lower()) in _BACKBONES


_TEST_COUNTS = {"all": "test", "base": "test_base", "novel": "test_new"}


@cache
def _statistics() -> dict[str, dict[str, str]]:
    """The lines of statistics.csv by data set."""
    text = resources.files("maple").joinpath("assets", "datasets", "statistics.csv").read_text(encoding="utf-8")
    return {line["dataset"]: line for line in csv.DictReader(text.splitlines())}


@cache
def published_counts() -> dict[str, dict[str, int]]:
    """Classes and test images of the published data sets: of all classes, and of the base and the novel half."""
    columns = ("classes", "test", "test_base", "test_new")
    return {
        dataset: {name: int(line[name]) for name in columns if line[name]} for dataset, line in _statistics().items()
    }


def published_names_hash(dataset: str) -> str:
    """The `names_hash` of all class names of a published data set; "" where it is not recorded."""
    return _statistics().get(dataset, {}).get("class_names_sha256", "")


def differences_from_papers(evaluations: Sequence[EvaluationRecord]) -> list[str]:
    """Say where a data set of a published name has other classes, class names or images, on the papers' backbone."""
    notes: dict[str, None] = {}
    names: dict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    for evaluation in evaluations:
        row = evaluation.row
        if not _is_papers_backbone(row.backbone) or row.part != "test":
            continue
        images = published_counts().get(row.dataset, {}).get(_TEST_COUNTS[row.classes])
        found_and_published = [
            (f"{here:,} {unit}", f"{published:,}")
            for unit, here, published in (
                ("classes", len(row.class_names), _published_classes(row.dataset, row.classes)),
                ("test images", row.images, images),
            )
            if published not in (None, here)
        ]
        if found_and_published:
            here, published = map(" and ".join, zip(*found_and_published, strict=True))
            which = "" if row.classes == "all" else f", {row.classes} classes"
            notes[f"{row.dataset}{which}: {here} here, {published} published"] = None
        names[evaluation.dataset][row.classes] = row.class_names
        if row.source.class_names and row.source.dataset in published_counts():
            notes[f"{row.source.dataset}: classes are renamed here"] = None
        expected = None
        if not evaluation.description.is_zero_shot:
            expected = _published_classes(row.source.dataset, row.source.classes)
        if expected and (trained := evaluation.run.trained_classes) not in (None, expected):
            notes[f"{row.source.dataset}: trained on {trained:,} classes here, {expected:,} published"] = None
    for dataset, by_part in names.items():
        whole = by_part.get("all") or (*by_part.get("base", ()), *by_part.get("novel", ()))
        published_names = published_names_hash(dataset)
        if len(whole) == _published_classes(dataset, "all") and published_names not in ("", names_hash(whole)):
            notes[f"{dataset}: other class names than the published ones"] = None
    return list(notes)


def _published_classes(dataset: str, part: str) -> int | None:
    """The number of classes in a part of a published data set; the base half is the larger one if it is odd."""
    total = published_counts().get(dataset, {}).get("classes")
    return None if total is None else {"all": total, "base": total - total // 2, "novel": total // 2}.get(part)


def published_result(
    group: Group, variant: Variant, dataset: str | None, *, rerun: bool = False
) -> PublishedResult | None:
    """The published result that a cell of a table can be compared with; `dataset` None is the average over all.

    It may also be the source of a transfer. With `rerun`, that of an independent run of the published recipe.
    """
    key = group.key
    cells = [cell for (other, name, _), cell in group.cells.items() if other == variant and dataset in (None, name)]
    if key.kind == "transfer" and dataset == key.source:
        cells = [group.source_cells.get(variant, {})]
    evaluations = [evaluation for cell in cells for evaluation in cell.values()]
    if (
        not evaluations
        or key.part != "test"
        or any(evaluation.names or evaluation.location for evaluation in evaluations)
        or (key.shots not in (_SHOTS, ANY_SHOTS) and not variant.is_zero_shot)
        or not all(_is_papers_backbone(evaluation.row.backbone) for evaluation in evaluations)
        or key.trained_on not in ("all" if key.kind == "transfer" else "base", "")
        or (key.kind == "transfer" and key.classes != "all")
        or differences_from_papers(evaluations)
    ):
        return None
    name = _AVERAGES.get((key.kind, frozenset(group.datasets))) if dataset is None else dataset
    for result in published_results():
        if (
            (result.protocol, result.method, result.rerun) == (key.kind, variant.name, rerun)
            and (result.source_dataset, result.dataset) == (key.source, name)
            and all(_is_comparable(evaluation, result) for evaluation in evaluations)
        ):
            return result
    return None


def _is_comparable(evaluation: EvaluationRecord, result: PublishedResult) -> bool:
    """Whether an evaluation has the settings of a published result, and what else its recipe says."""
    required = _required_settings(result, evaluation)
    if not _has_settings(evaluation, required):
        return False
    source = evaluation.row.source
    recipes = recipes_of(result.method, result.protocol, source.dataset, source.shots)
    given = {key: value for key, value in evaluation.settings.items() if key not in required}
    return not recipes or any(follows(given, recipe) for recipe in recipes)


def follows(settings: Mapping[str, str], recipe: Mapping[str, str]) -> bool:
    """Whether settings have the values of a recipe, where they have its keys; 1 and 1.0 are the same value."""
    return all(
        value == recipe[key] or _number(value) == _number(recipe[key])
        for key, value in settings.items()
        if key in recipe
    )


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


_RECIPE_OF_TRAINING = (
    *("optimizer", "lr", "batch_size", "momentum", "weight_decay", "crop_scale", "flip", "schedule", "warmup_epochs"),
    *("warmup_lr", "drop_last", "views"),
)


@cache
def _presets(suffix: str) -> list[dict[str, Any]]:
    return [read_preset(name) for name in preset_names() if name.endswith(f"_{suffix}")]


@cache
def recipes_of(method: str, protocol: str, dataset: str, shots: int | None) -> list[dict[str, str]]:
    """The settings that a method's presets for a published protocol name, and those of its training but its epochs."""
    suffixes = {"accuracy": ["few-shot"], "transfer": ["cross-dataset", "base-to-novel"]}.get(protocol, [protocol])
    for suffix in suffixes:
        data = {"data": {"dataset": dataset, "shots": shots}, "backbone": {"name": "ViT-B-16"}}
        settings = [resolve([preset, data]) for preset in _presets(suffix) if preset["method"]["name"] == method]
        if settings:
            dumped = [each.model_dump(mode="json") for each in settings]
            return [
                {key: str(value) for key, value in each["method"].items() if key not in ("name", "epochs")}
                | {key: str(each["train"][key]) for key in _RECIPE_OF_TRAINING}
                for each in dumped
            ]
    return []


def _required_settings(result: PublishedResult, evaluation: EvaluationRecord) -> Mapping[str, str]:
    """The settings of a published result on the data set of an evaluation; of an average, each may have its own."""
    recipe = (result.protocol, result.title, result.source_dataset)
    for other in published_results():
        if (other.protocol, other.title, other.source_dataset, other.dataset) == (*recipe, evaluation.row.dataset):
            return other.settings
    # ImageNet has other epochs than the rest, but not the steps of 2SFS instead.
    if evaluation.row.dataset == "imagenet":
        return {key: value for key, value in result.settings.items() if key == "steps"}
    return result.settings


def _has_settings(evaluation: EvaluationRecord, required: Mapping[str, str]) -> bool:
    later = {key: str(value) for key, value in LATER_SETTINGS["method"].items()}
    settings = {**later, **evaluation.settings}
    # A budget of steps replaces the epochs.
    return ("steps" in required or settings.get("steps", "None") == "None") and all(
        settings.get(key, "") not in ("", "None", "{}", "[]") if value == "*" else settings.get(key) == value
        for key, value in required.items()
    )


def published_costs(row: CostRow) -> list[PublishedCost]:
    """What was published of this recipe, one for each source; only on the papers' backbone."""
    # A user's file may have the name of a recipe.
    if row.recipe.partition("-")[0] != row.name or row.backbone.lower().replace("/", "-") != _COSTS_BACKBONE:
        return []
    settings = {key: str(value) for key, value in row.method.items()}
    return [
        cost for cost in _published_costs() if cost.recipe == row.recipe and cost.settings.items() <= settings.items()
    ]
