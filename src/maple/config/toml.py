"""Files of settings: presets, settings that were printed, those of a run; in TOML or JSON."""

import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel

from maple.descriptions import ALL_SHOTS, ProtocolName
from maple.errors import ConfigError, one_of
from maple.files import check_values, read_json

RUN_CONFIG = "config.json"

PRESETS = resources.files("maple") / "presets"


def toml_names(folder: Traversable) -> list[str]:
    """The names of the TOML files in a folder of the package, without suffix."""
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


_added: dict[str, dict[str, Any]] = {}
"""Presets of methods from outside the package, by name."""


def preset_names() -> list[str]:
    """Names of the shipped presets, such as `maple_base-to-novel`, and those of `add_presets`."""
    return [*toml_names(PRESETS), *_added]


def add_presets(method: str, titles: Iterable[str], presets: Mapping[str, Mapping[str, Any]]) -> str:
    """Add the presets of a method from outside the package, by protocol; their settings need not name the method.

    They are named TITLE_PROTOCOL, with the first title that no other method has; it is returned. Where there is none
    for few-shot or base-to-novel, 800 steps or the default settings are taken.

    Raises:
        ConfigError: a protocol is unknown.

    Example:
        >>> add_presets("acme", ["acme"], {"few-shot": {"train": {"lr": 0.01}}})
        'acme'
        >>> read_preset("acme_few-shot")
        {'train': {'lr': 0.01}, 'method': {'name': 'acme'}}
    """
    if unknown := presets.keys() - set(protocols := get_args(ProtocolName)):
        raise ConfigError(f"presets of {method}: {one_of('protocol', min(unknown), protocols)}")
    defaults: dict[str, Mapping[str, Any]] = {"base-to-novel": {}, "few-shot": {"train": {"steps": 800}}}
    layers = {
        protocol: {**preset, "method": {"name": method, **preset.get("method", {})}}
        for protocol, preset in {**defaults, **presets}.items()
    }
    for title in titles:
        if _added.get(f"{title}_base-to-novel", layers["base-to-novel"])["method"]["name"] == method:
            break
    _added.update({f"{title}_{protocol}": layer for protocol, layer in layers.items()})
    return title


def preset_of(method: str, endings: Iterable[str]) -> str:
    """The preset of a method with the first of these endings that exists; the path of a TOML file as it is.

    Raises:
        ConfigError: there is none.

    Example:
        >>> preset_of("zero_shot", ["few-shot", "base-to-novel"])
        'zero_shot_base-to-novel'
    """
    if method.endswith(".toml"):
        return method
    presets = preset_names()
    for ending in endings:
        if f"{method}_{ending}" in presets:
            return f"{method}_{ending}"
    ending = "_base-to-novel"
    methods = [name.removesuffix(ending) for name in presets if name.endswith(ending)]
    raise ConfigError(one_of("method", method, methods, ", or the path of your own preset (METHOD.toml)"))


def read_preset(name: str) -> dict[str, Any]:
    """The settings of a shipped preset, of a TOML or JSON file, or of a run by its folder.

    The list of images that a run of `maple fit` keeps is left out: it belongs to the folder of that run.

    Raises:
        ConfigError: neither a preset nor a file, not TOML or JSON, or the settings of several methods.

    Example:
        >>> read_preset("runs/maple_flowers_seed1")["train"]["lr"]
        0.0035
    """
    path = Path(name).expanduser()
    if name in _added:
        return deepcopy(_added[name])
    if name not in preset_names():
        if (path / RUN_CONFIG).is_file():
            path = path / RUN_CONFIG
        elif path.is_dir():
            raise ConfigError(
                f"{name} is not a run folder: it has no {RUN_CONFIG}; give a TOML or JSON file of settings"
            )
        if path.suffix == ".json":
            content = read_toml_or_json(path)
            if isinstance(data := content.get("data"), dict):
                data.pop("listing", None)
            return content
    content = read_named_toml(name, "preset", PRESETS)
    sections = content.values()
    if content and all(isinstance(section, dict) and isinstance(section.get("method"), dict) for section in sections):
        raise ConfigError(
            f"{name} holds the settings of {len(content)} methods, among which `maple fit` chooses; give those of "
            "one, as --print-config prints them with method=NAME"
        )
    return content


def to_toml(settings: BaseModel | Mapping[str, BaseModel]) -> str:
    """Settings as TOML, which `read_preset` reads; several under their names, each in a table.

    TOML has no null: what is None by default is left out, and all training images are `shots = "all"`.

    Example:
        >>> print(to_toml(TrainSettings(lr=0.01)).splitlines()[1])
        lr = 0.01
    """
    several = settings if isinstance(settings, Mapping) else {"": settings}
    tables = {name: _without_none(each.model_dump(mode="json")) for name, each in several.items()}
    return tomli_w.dumps(tables if isinstance(settings, Mapping) else tables[""])


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: _without_none(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    if "shots" in kept and kept["shots"] is None:
        kept["shots"] = ALL_SHOTS
    return {key: value for key, value in kept.items() if value is not None}


def read_named_toml(name: str, kind: str, folder: Traversable, also: Iterable[str] = ()) -> dict[str, Any]:
    """The content of a TOML file of the package, by name, or of a user's, by path.

    Args:
        kind, also: what messages call it, and other names that they list.

    Raises:
        ConfigError: neither a name nor a file, unreadable, or not TOML.
    """
    names = toml_names(folder)
    file: Traversable = folder / f"{name}.toml" if name in names else Path(name).expanduser()
    if not file.is_file():
        raise ConfigError(one_of(kind, name, [*also, *names], ", or the path of a TOML file"))
    return _read_toml(file, name)


def read_toml_or_json(path: Path) -> dict[str, Any]:
    """The content of a TOML file, or of a JSON file if its name ends in .json.

    Raises:
        ConfigError: missing, unreadable, or malformed.
    """
    if path.suffix == ".json":
        content: dict[str, Any] = read_json(path, error=ConfigError, foreign=True)
        return content
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; give a TOML or JSON file")
    return _read_toml(path, str(path))


def _read_toml(file: Traversable, name: str) -> dict[str, Any]:
    try:
        return parse_toml(file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read as UTF-8 text: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from error


def parse_toml(text: str) -> dict[str, Any]:
    """The content of a TOML text; ValueError if it is not TOML, nested too deeply, or holds too large an integer."""
    try:
        content: dict[str, Any] = check_values(tomllib.loads(text))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return content
