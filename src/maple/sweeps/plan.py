"""Expand a sweep (protocol, methods, data sets, seeds, varied settings) into runs and their evaluations.

Source: SPEC section 5; MaPLe (CVPR 2023) section 4.1.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from maple.clip import tower_depths
from maple.config import (
    Positive,
    RunSettings,
    Settings,
    read_named_toml,
    read_preset,
    resolve,
    setting_layer,
    toml_names,
)
from maple.data import known_names
from maple.data.catalogue import DATASET_GROUPS, canonical_name, require_possible, template_of
from maple.descriptions import ProtocolName
from maple.errors import ConfigError, DataError, MapleError
from maple.feature_files import read_features
from maple.methods import METHODS, MethodSettings, method_settings
from maple.methods import recipe_of as method_recipe
from maple.names import is_features
from maple.runs import complete, content_name
from maple.runs.spec import cached_backbone, open_dataset
from maple.runs.training import fresh_method

PROTOCOLS: dict[ProtocolName, tuple[str, ...]] = {
    "base-to-novel": ("base-to-novel",),
    "few-shot": ("few-shot", "base-to-novel"),
    "cross-dataset": ("cross-dataset", "base-to-novel"),
    "domain-generalization": ("domain-generalization", "cross-dataset", "base-to-novel"),
}
"""The protocols, and whose preset of a method each takes: the first one that exists."""

_DECIDED_BY_SWEEP = {
    "data.dataset": "--datasets (datasets)",
    "data.shots": "--shots (shots)",
    "data.classes": "another protocol: it chooses the classes",
    "seed": "--seeds (seeds)",
}
"""Settings that a sweep decides by itself, and what to give instead."""
_SHIPPED = resources.files("maple") / "presets" / "sweeps"
PAPERS_TARGETS = {"cross-dataset": "cross10", "domain-generalization": "imagenet-variants"}
Point = list[tuple[str, Any]]
"""One combination of the varied settings: (section.key, value) pairs."""


class SweepSettings(Settings):
    """The settings of a sweep.

    `methods` are the first parts of preset names (`maple`, `maple-shallow`, `coop`, ...) or paths of TOML files.
    `datasets` are trained on one by one (base-to-novel, few-shot), or are the targets of `source` (cross-dataset,
    domain-generalization). `grid` maps settings (`train.lr`; `prompt_depth` means `method.prompt_depth`) to the values
    to try, in every combination; prompt depths in it are for a CLIP of `depths_of` blocks, if given, and are scaled
    for a CLIP with fewer. `variants` are sets of settings that belong together, each tried at every point of
    the grid. `shots` defaults to 16, and to 1, 2, 4, 8, 16 in the few-shot protocol. `paper11`, `cross10` and
    `imagenet-variants` are the papers' lists of data sets; the targets of transfer protocols default to theirs, from
    ImageNet.

    Example:
        >>> SweepSettings(protocol="base-to-novel", methods=["coop", "maple"], datasets=["eurosat"]).seeds
        [1, 2, 3]
    """

    protocol: ProtocolName
    methods: Annotated[list[str], Field(min_length=1)]
    datasets: Annotated[list[str], Field(min_length=1)]
    source: str | None = None
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[1, 2, 3], min_length=1)
    shots: list[Positive | None] = Field(default=[16], min_length=1)
    grid: dict[str, list[Any]] = Field(default={})
    depths_of: Positive | None = None
    variants: list[dict[str, Any]] = Field(default=[])
    settings: dict[str, Any] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _papers_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        protocol, datasets = values.get("protocol"), values.get("datasets")
        if protocol == "few-shot":
            values = {"shots": [1, 2, 4, 8, 16], **values}
        if datasets is None and protocol in PAPERS_TARGETS:
            datasets = [PAPERS_TARGETS[protocol]]
            values = {"source": "imagenet", **values}
        if isinstance(datasets, list):
            values = {**values, "datasets": [name for each in datasets for name in _group(each)]}
        return values


@dataclass(frozen=True)
class PlannedEvaluation:
    """One evaluation of a finished run: on which data set (None: its own) and on which part of the classes."""

    dataset: str | None
    classes: str


@dataclass(frozen=True)
class PlannedRun:
    """One training and its evaluations; `name` is that of the run folder, `recipe` the preset of the settings.

    Example:
        >>> run = plan_sweep(SweepSettings(**read_sweep("demo")))[0]
        >>> run.label, [evaluation.classes for evaluation in run.evaluations]
        ('zero_shot icons-objects/neon', ['base', 'novel'])
    """

    name: str
    label: str
    recipe: str
    settings: RunSettings
    evaluations: tuple[PlannedEvaluation, ...]


def _group(name: Any) -> list[Any]:
    """The data sets of a group, or the name as it is."""
    return DATASET_GROUPS.get(name, [name]) if isinstance(name, str) else [name]


def sweep_names() -> list[str]:
    """Return the names of the shipped sweeps.

    Example:
        >>> "demo" in sweep_names()
        True
    """
    return toml_names(_SHIPPED)


def read_sweep(name: str) -> dict[str, Any]:
    """Read the settings of a protocol, of a shipped sweep, or of a user's TOML file.

    Raises:
        ConfigError: not the name of a protocol, a sweep or a file; or not TOML.

    Example:
        >>> read_sweep("few-shot")
        {'protocol': 'few-shot'}
    """
    if name in PROTOCOLS:
        return {"protocol": name}
    return read_named_toml(name, "sweep", _SHIPPED, PROTOCOLS)


def plan_sweep(sweep: SweepSettings, on_dropped: Callable[[str], None] = lambda _: None) -> list[PlannedRun]:
    """Return the runs of a sweep, ordered so that whole comparisons finish early: by seed, then by method.

    A method that does not support new classes is not evaluated on them. Points of the grid and recipes with equal
    settings are one run. Zero-shot CLIP, which learns nothing, is one run on each data set, that of the first seed and
    number of shots; it is one for each seed where the seed draws the test images, from a folder that its user has not
    divided. A prompt depth beyond the blocks of the backbone is left out, where the configuration of the backbone
    states their number.

    Args:
        on_dropped: called with a sentence for each depth that is left out or scaled, and each recipe like another.

    Raises:
        ConfigError: an unknown method or setting, a protocol without what it needs, or no run is left.
        DataError: an unknown data set, or a transfer protocol without a source.

    Example:
        >>> len(plan_sweep(SweepSettings(protocol="few-shot", methods=["maple"], datasets=["eurosat"], seeds=[1])))
        5
    """
    data = sweep.settings.get("data")
    given = sweep.settings.keys() | ({f"data.{key}" for key in data} if isinstance(data, Mapping) else set())
    for key, instead in _DECIDED_BY_SWEEP.items():
        if key in given:  # it would be overruled silently
            raise ConfigError(f"{key} cannot be set for all runs of a sweep; give {instead} instead")
    for name in (*sweep.datasets, *([] if sweep.source is None else [sweep.source])):
        require_possible(name)
    runs: dict[str, PlannedRun] = {}
    learning_nothing: dict[str, str] = {}
    dropped: dict[str, None] = {}
    for dataset, evaluations in _training_sets(sweep):
        drawn: bool | None = None  # whether the seed draws the test images; looked up once, if it matters
        for seed, method, shots, point in product(sweep.seeds, sweep.methods, sweep.shots, _points(sweep)):
            recipe = recipe_of(method, sweep.protocol)
            classes = "base" if sweep.protocol == "base-to-novel" else "all"
            decided: dict[str, Any] = {"data": {"dataset": dataset, "shots": shots, "classes": classes}, "seed": seed}
            layers = [read_preset(recipe), sweep.settings, decided]
            try:
                if sweep.depths_of:
                    point, reasons = _scaled(point, sweep.depths_of, resolve(layers))
                    dropped |= dict.fromkeys(reasons)
                as_given = resolve([*layers, *(setting_layer(*pair) for pair in point)])
                settings = complete(as_given)
                _, config = method_settings(settings.method)
            except ConfigError as error:
                if len(sweep.methods) == 1:
                    raise
                raise ConfigError(f"{method}: {error}") from error  # the same settings may suit another method
            reasons = [text for key, value in point if (text := _too_deep(settings, config, key, value))]
            if reasons := reasons or _needs_a_clip(settings):
                dropped |= dict.fromkeys(reasons)
                continue
            learns = "zero-shot" not in METHODS[settings.method["name"]].report_roles
            if drawn is None and not learns:
                drawn = len(sweep.seeds) > 1 and _seed_draws_test(settings, evaluations)
            by_seed = learns or drawn
            words = [Path(recipe).stem if recipe.endswith(".toml") else recipe.rpartition("_")[0]]
            words.append(settings.data.dataset)
            if len(sweep.shots) > 1 and learns:
                words.append("all shots" if shots is None else f"{shots} shots")
            words += [f"{key.rpartition('.')[2]}={value}" for key, value in point]
            words += [f"seed {seed}"] if by_seed or len(sweep.seeds) == 1 else []
            possible = tuple(e for e in evaluations if config.supports_new_classes or not _on_new_classes(sweep, e))
            run = PlannedRun(content_name(as_given), " ".join(words), recipe, settings, possible)
            if not learns:
                # All that its predictions depend on; how the others are trained does not matter.
                fixed = settings.model_dump(mode="json", include={"method", "backbone", "data", "evaluate"})
                fixed |= {"data": {**fixed["data"], "shots": None}, "seed": seed if by_seed else None}
                if (same := learning_nothing.setdefault(json.dumps(fixed, sort_keys=True), run.name)) != run.name:
                    run = replace(run, name=same)
            first = runs.setdefault(run.name, run)
            if first.recipe != recipe:
                pair = f"{first.recipe} and {recipe} have equal settings on {settings.backbone.name}"
                dropped[f"{pair}: they are one run, in the row of {first.recipe}"] = None
    if not runs:
        raise ConfigError(f"nothing is left of the sweep: {'; '.join(dropped)}; choose smaller values")
    for reason in dropped:
        on_dropped(reason)
    return list(runs.values())


def _points(sweep: SweepSettings) -> list[Point]:
    """Return every combination of the values of the grid with every variant."""
    grid = [list(zip(sweep.grid, values, strict=True)) for values in product(*sweep.grid.values())]
    return [
        [(key if "." in key else f"method.{key}", value) for key, value in (*variant.items(), *point)]
        for variant, point in product(sweep.variants or [{}], grid)
    ]


def _blocks(settings: RunSettings, config: MethodSettings, key: str) -> int | None:
    """The blocks that the prompt depth `key` may reach on the backbone; None if it is another setting, or unknown."""
    towers = config.depth_limits.get(key.removeprefix("method."))
    depths = None if towers is None else tower_depths(settings.backbone.name)
    return None if towers is None or depths is None else min(depths[("text", "image").index(name)] for name in towers)


def _scaled(point: Point, depths_of: int, settings: RunSettings) -> tuple[Point, list[str]]:
    """The point with its prompt depths scaled to a backbone with fewer than `depths_of` blocks; what was scaled."""
    _, config = method_settings({"name": settings.method["name"]})
    scaled, reasons = [], []
    for key, value in point:
        blocks = _blocks(settings, config, key)
        if blocks is not None and blocks < depths_of and isinstance(value, int):
            depth = max(1, round(value * blocks / depths_of))
            name = key.removeprefix("method.")
            reasons.append(
                f"{name}={value} of {depths_of} blocks is {depth} of the {blocks} of {settings.backbone.name}"
            )
            value = depth
        scaled.append((key, value))
    return scaled, reasons


def _too_deep(settings: RunSettings, config: MethodSettings, key: str, depth: Any) -> str | None:
    """Say why a value of the grid is left out, if it is a prompt depth beyond the blocks of the backbone."""
    blocks = _blocks(settings, config, key)
    if blocks is None or not isinstance(depth, int) or depth <= blocks:
        return None
    name = key.removeprefix("method.")
    towers = config.depth_limits[name]
    return (
        f"{name}={depth} of {settings.method['name']} is left out: {settings.backbone.name} has {blocks} blocks "
        f"({' and '.join(towers)} tower)"
    )


def _needs_a_clip(settings: RunSettings) -> list[str]:
    """Say why a method is left out on a data set of features, if it cannot be trained on them.

    Files that cannot be read are not a reason: each run on them fails, as on other data sets.
    """
    if not is_features(settings.data.dataset):
        return []
    try:
        class_names = read_features(settings.data.dataset).class_names
    except MapleError:
        return []
    try:
        fresh_method(settings, cached_backbone(settings.backbone.name, None, "fp32", torch.device("cpu")), class_names)
    except MapleError as error:
        return [f"{settings.method['name']} is left out on {settings.data.dataset}: {error}"]
    return []


def _on_new_classes(sweep: SweepSettings, evaluation: PlannedEvaluation) -> bool:
    """Whether an evaluation is on classes that the run was not trained on."""
    return evaluation.classes == "novel" or (sweep.protocol == "cross-dataset" and evaluation.dataset is not None)


def _seed_draws_test(settings: RunSettings, evaluations: tuple[PlannedEvaluation, ...]) -> bool:
    """Whether the seed chooses the test images of an evaluation: those of undivided images that are also trained on.

    Other images that their user has not divided are evaluated whole. A data set that cannot be read counts as drawn:
    its runs fail one by one, as those of the other methods.
    """
    if template_of(settings.data.dataset) is not None or all(planned.dataset for planned in evaluations):
        return False
    try:
        return open_dataset(settings).drawn_split
    except MapleError:
        return True


def _training_sets(sweep: SweepSettings) -> list[tuple[str, tuple[PlannedEvaluation, ...]]]:
    """Return (training data set, evaluations of its runs) pairs."""
    if sweep.protocol in ("base-to-novel", "few-shot"):
        if sweep.source is not None:
            problem = f"{sweep.protocol} trains on each of its data sets; leave it out"
            raise ConfigError(f"source = {sweep.source!r}: {problem}")
        parts = ("base", "novel") if sweep.protocol == "base-to-novel" else ("all",)
        return [(dataset, tuple(PlannedEvaluation(None, part) for part in parts)) for dataset in sweep.datasets]
    if sweep.source is None:
        raise DataError(
            f"{sweep.protocol} needs a source to train on: give --source with one of {', '.join(known_names())}, "
            "or the path of a folder"
        )
    targets: dict[str, str] = {}
    for name in sweep.datasets:
        targets.setdefault(canonical_name(name), name)
    targets.pop(canonical_name(sweep.source), None)
    return [(sweep.source, tuple(PlannedEvaluation(name, "all") for name in (None, *targets.values())))]


def recipe_of(method: str, protocol: ProtocolName) -> str:
    """Return the preset that a method uses in a protocol, ConfigError if unknown; the path of a TOML file as it is."""
    return method_recipe(method, PROTOCOLS[protocol])
