"""Published numbers to stand beside ours: only where data set, backbone, shots and settings are those of the paper."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

from maple.report.groups import ANY_SHOTS, Group
from maple.report.records import Evaluation
from maple.report.variants import Variant

ELEVEN = frozenset(
    {"imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397"}
    | {"dtd", "eurosat", "ucf101"}
)
_DOMAINS = frozenset({"imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"})
_AVERAGES = {
    ("base-to-novel", ELEVEN): "average",
    ("transfer", ELEVEN - {"imagenet"}): "average of targets",
    ("transfer", _DOMAINS): "average of domains",
}
_SHOTS = 16
_BACKBONES = {("vit-b-16", "openai"), ("vit-b-16-quickgelu", "openai"), ("vit-b/16", "openai")}


@dataclass(frozen=True)
class Published:
    """One published result, in per cent, and where it was read."""

    protocol: str
    method: str
    title: str
    settings: dict[str, str]
    source_dataset: str
    dataset: str
    values: dict[str, float]
    read_in: str


@cache
def published_numbers() -> tuple[Published, ...]:
    """All that ships in published.csv."""
    text = (resources.files("maple.report") / "published.csv").read_text(encoding="utf-8")
    measures = {"base": "base", "novel": "novel", "harmonic_mean": "harmonic mean", "accuracy": "top1"}
    return tuple(
        Published(
            line["protocol"],
            line["method"],
            line["title"],
            dict(word.split("=", 1) for word in line["settings"].split()),
            line["source_dataset"],
            line["dataset"],
            {name: float(line[column]) for column, name in measures.items() if line[column]},
            line["read_in"],
        )
        for line in csv.DictReader(text.splitlines())
    )


def published_for(group: Group, variant: Variant, dataset: str | None) -> Published | None:
    """The published result that a cell of a table can be held against; `dataset` None is the average over all."""
    found = [
        evaluation
        for (other, name, _), cell in group.cells.items()
        if other == variant and dataset in (None, name)
        for evaluation in cell.values()
    ]
    shots_fit = group.key.shots in (_SHOTS, ANY_SHOTS) or all(one.method == "zero_shot" for one in found)
    if not found or not shots_fit or group.key.part != "test" or any(one.names or one.place for one in found):
        return None
    if not all(_is_published_backbone(evaluation) for evaluation in found):
        return None
    name = _AVERAGES.get((group.key.kind, frozenset(group.datasets))) if dataset is None else dataset
    trained = "all" if group.key.kind == "transfer" else "base"
    if group.key.trained_on not in (trained, "") or (group.key.kind == "transfer" and group.key.classes != "all"):
        return None
    for number in published_numbers():
        where = (number.protocol, number.method, number.source_dataset, number.dataset)
        if where != (group.key.kind, variant.name, group.key.source, name):
            continue
        # In an average, ImageNet has other epochs than the rest.
        held = [one for one in found if dataset is not None or one.row.dataset != "imagenet"]
        if all(_settings_fit(number, one) for one in held):
            return number
    return None


def _is_published_backbone(evaluation: Evaluation) -> bool:
    backbone = evaluation.row.backbone
    return (backbone.name.lower(), (backbone.pretrained or "").lower()) in _BACKBONES


def _settings_fit(number: Published, evaluation: Evaluation) -> bool:
    return all(evaluation.settings.get(key) == value for key, value in number.settings.items())
