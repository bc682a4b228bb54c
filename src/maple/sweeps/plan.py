"""From a protocol, methods, data sets and seeds to run settings and the evaluations of each run.

Source: SPEC section 5; MaPLe (CVPR 2023) section 4.1.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from maple.clip import tower_depths
from maple.config import Positive, RunSettings, Settings, preset_names, read_preset, read_toml, resolve, setting_layer
from maple.data import known_names, require_possible
from maple.errors import ConfigError, DataError, one_of
from maple.methods import method_settings
from maple.runs import complete, content_name

Protocol = Literal["base-to-novel", "few-shot", "cross-dataset", "domain-generalization"]
PROTOCOLS: tuple[Protocol, ...] = ("base-to-novel", "few-shot", "cross-dataset", "domain-generalization")

_RECIPES: dict[Protocol, tuple[str, ...]] = {
    "base-to-novel": ("base-to-novel",),
    "few-shot": ("few-shot", "base-to-novel"),
    "cross-dataset": ("cross-dataset", "base-to-novel"),
    "domain-generalization": ("domain-generalization", "cross-dataset", "base-to-novel"),
}
"""Whose recipe a protocol takes: its own preset of the method, else the next one's."""


_FEW = (1, 2, 4, 8, 16)
"""Training images per class of the few-shot protocol."""

Point = list[tuple[str, Any]]
"""Settings of one point of a sweep: (section.key, value) pairs."""

_DECIDED = ("dataset", "shots", "classes")
"""What a sweep decides of the data by itself."""

_TOWERS = {
    "prompt_depth": ("text", "image"),
    "text_prompt_depth": ("text",),
    "vision_prompt_depth": ("image",),
}
"""Whose blocks limit a depth."""


class SweepSettings(Settings):
    """What a sweep consists of.

    `methods` are the first parts of presets' names (`maple`, `maple-shallow`, `coop`, ...) or paths of TOML files.
    `datasets` are trained on one by one (base-to-novel, few-shot), or are the targets of `source` (cross-dataset,
    domain-generalization). `grid` maps settings (`train.lr`; `prompt_depth` means `method.prompt_depth`)
    to the values to try, in every combination. `variants` are sets of settings that belong together, tried one after
    the other (with each point of the grid). `shots` are 16 where nothing is said; 1, 2, 4, 8, 16 in few-shot.
    """

    protocol: Protocol
    methods: Annotated[list[str], Field(min_length=1)]
    datasets: Annotated[list[str], Field(min_length=1)]
    source: str | None = None
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[1, 2, 3], min_length=1)
    shots: list[Positive | None] = Field(default=[16], min_length=1)
    grid: dict[str, list[Any]] = Field(default={})
    variants: list[dict[str, Any]] = Field(default=[])
    settings: dict[str, Any] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _shots_of_the_protocol(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("protocol") == "few-shot" and "shots" not in values:
            return {**values, "shots": list(_FEW)}
        return values


@dataclass(frozen=True)
class Evaluation:
    """One question to a finished run: which data set (None: its own) and which part of the classes."""

    dataset: str | None
    classes: str


@dataclass(frozen=True)
class PlannedRun:
    """One training and the evaluations that it serves.

    Attributes:
        name: the folder's name, by content.
        label: what a reader sees, such as "maple emoji-food seed 1".
        recipe: the preset that the settings come from.
    """

    name: str
    label: str
    recipe: str
    settings: RunSettings
    evaluations: tuple[Evaluation, ...]


def sweep_names() -> list[str]:
    """Names of the shipped sweeps, such as `demo`."""
    return sorted(entry.name.removesuffix(".toml") for entry in _shipped().iterdir() if entry.name.endswith(".toml"))


def read_sweep(name: str) -> dict[str, Any]:
    """The settings of a shipped sweep, or of a TOML file of the user's.

    Raises:
        ConfigError: neither a protocol's name, nor a sweep's, nor a file; or not TOML.
    """
    if name in PROTOCOLS:
        return {"protocol": name}
    if name in sweep_names():
        return read_toml(_shipped() / f"{name}.toml", name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"{one_of('sweep', name, [*PROTOCOLS, *sweep_names()])}, or the path of a TOML file")
    return read_toml(path, name)


def plan_sweep(sweep: SweepSettings, on_dropped: Callable[[str], None] = lambda _: None) -> list[PlannedRun]:
    """The runs of a sweep, in an order that finishes whole comparisons early: seed by seed, then method by method.

    A method that cannot speak of classes it was not trained on is not asked about them.
    Two points of the grid that come to the same settings are one run. A depth of the grid beyond the blocks of the
    backbone is left out, where the backbone's configuration tells how many it has.

    Args:
        on_dropped: called with a sentence for each such depth, method and backbone.

    Raises:
        ConfigError: unknown method or setting, a protocol without what it needs, or nothing is left to do.
        DataError: the source of a transfer is missing.
    """
    runs: dict[str, PlannedRun] = {}
    dropped: dict[str, None] = {}
    for settings, recipe, evaluations, point in _expanded(sweep):
        told = [f"{key.rpartition('.')[2]}={value}" for key, value in point]
        if words := [word for key, value in point if (word := _too_deep(settings, key, value))]:
            dropped |= dict.fromkeys(words)
            continue
        if len(sweep.shots) > 1:
            told.insert(0, "all shots" if settings.data.shots is None else f"{settings.data.shots} shots")
        name = content_name(settings)
        label = " ".join([_method_label(recipe), settings.data.dataset, *told, f"seed {settings.seed}"])
        runs.setdefault(name, PlannedRun(name, label, recipe, settings, evaluations))
    if not runs:
        raise ConfigError(f"nothing is left of the sweep: {'; '.join(dropped)}; choose smaller values")
    for word in dropped:
        on_dropped(word)
    return list(runs.values())


def _expanded(sweep: SweepSettings) -> Iterator[tuple[RunSettings, str, tuple[Evaluation, ...], Point]]:
    points = _points(sweep)
    _check_settings(sweep.settings)
    for name in (*sweep.datasets, *([] if sweep.source is None else [sweep.source])):
        require_possible(name)
    for dataset, evaluations in _sources(sweep):
        for seed, method, shots, point in product(sweep.seeds, sweep.methods, sweep.shots, points):
            recipe = recipe_of(method, sweep.protocol)
            classes = "base" if sweep.protocol == "base-to-novel" else "all"
            asked = {"data": {"dataset": dataset, "shots": shots, "classes": classes}, "seed": seed}
            layers: list[Mapping[str, Any]] = [read_preset(recipe), sweep.settings, asked]
            layers += [setting_layer(key, value) for key, value in point]
            try:
                settings = complete(resolve(layers))
                _, chosen = method_settings(settings.method)
            except ConfigError as error:
                if len(sweep.methods) == 1:
                    raise
                raise ConfigError(f"{method}: {error}") from error  # what is wrong with one method may suit another
            asked_of = [one for one in evaluations if chosen.supports_new_classes or not _new_classes(sweep, one)]
            yield settings, recipe, tuple(asked_of), point


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of all runs that the sweep itself decides: they would be overruled in silence.

    Raises:
        ConfigError: there is one.
    """
    data = settings.get("data")
    given = [f"data.{key}" for key in _DECIDED if isinstance(data, Mapping) and key in data]
    given += ["seed"] if "seed" in settings else []
    if given:
        told = {"data.dataset": "--datasets (datasets)", "data.shots": "--shots (shots)", "seed": "--seeds (seeds)"}
        instead = told.get(given[0], "another protocol: it chooses the classes")
        raise ConfigError(f"{given[0]} cannot be set for all runs of a sweep; give {instead} instead")


def _points(sweep: SweepSettings) -> list[Point]:
    """Every combination of the grid's values with every variant."""
    grid = [list(zip(sweep.grid, values, strict=True)) for values in product(*sweep.grid.values())]
    points = product(sweep.variants or [{}], grid)
    return [
        [(key if "." in key else f"method.{key}", value) for key, value in (*variant.items(), *point)]
        for variant, point in points
    ]


def _too_deep(settings: RunSettings, key: str, depth: Any) -> str | None:
    """What is wrong with a depth of the grid: the backbone has fewer blocks."""
    name = key.removeprefix("method.")
    if name not in _TOWERS or not isinstance(depth, int):
        return None
    depths = tower_depths(settings.backbone.name)
    method = settings.method["name"]
    towers = ("text",) if name == "prompt_depth" and method == "deep_language" else _TOWERS[name]
    if depths is None:
        return None
    blocks = min(dict(zip(("text", "image"), depths, strict=True))[tower] for tower in towers)
    if depth <= blocks:
        return None
    where = " and ".join(towers)
    return f"{name}={depth} of {method} is left out: {settings.backbone.name} has {blocks} blocks ({where} tower)"


def _new_classes(sweep: SweepSettings, evaluation: Evaluation) -> bool:
    """Whether an evaluation is about classes that the run was not trained on."""
    return evaluation.classes == "novel" or (sweep.protocol == "cross-dataset" and evaluation.dataset is not None)


def _sources(sweep: SweepSettings) -> list[tuple[str, tuple[Evaluation, ...]]]:
    """(training data set, evaluations of its runs) pairs."""
    if sweep.protocol in ("base-to-novel", "few-shot"):
        if sweep.source is not None:
            raise ConfigError(
                f"source = {sweep.source!r}: {sweep.protocol} trains on each of its data sets; leave it out"
            )
        parts = ("base", "novel") if sweep.protocol == "base-to-novel" else ("all",)
        return [(dataset, tuple(Evaluation(None, part) for part in parts)) for dataset in sweep.datasets]
    if sweep.source is None:
        raise DataError(
            f"{sweep.protocol} needs a source to train on: give --source with one of {', '.join(known_names())}, "
            "or the path of a folder"
        )
    targets = [None, *(name for name in sweep.datasets if name != sweep.source)]
    return [(sweep.source, tuple(Evaluation(name, "all") for name in targets))]


def recipe_of(method: str, protocol: Protocol) -> str:
    """The preset that a method takes for a protocol: its own, or the next one's; a TOML file is itself.

    Raises:
        ConfigError: there is no such method.
    """
    if method.endswith(".toml"):
        return method
    known = preset_names()
    for wanted in _RECIPES[protocol]:
        if f"{method}_{wanted}" in known:
            return f"{method}_{wanted}"
    methods = dict.fromkeys(name.partition("_base-to-novel")[0] for name in known if name.endswith("_base-to-novel"))
    raise ConfigError(f"{one_of('method', method, methods)}, or the path of a preset of yours (METHOD.toml)")


def _method_label(recipe: str) -> str:
    return Path(recipe).stem if recipe.endswith(".toml") else recipe.rpartition("_")[0]


def _shipped() -> Any:
    return resources.files("maple") / "presets" / "sweeps"
