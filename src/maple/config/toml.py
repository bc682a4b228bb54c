"""Presets and other files of settings, in TOML."""

import tomllib
from collections.abc import Iterable
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from maple.errors import ConfigError, one_of
from maple.files import check_values

PRESETS = resources.files("maple") / "presets"


def toml_names(folder: Traversable) -> list[str]:
    """The names of the TOML files in a folder of the package, without suffix."""
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def preset_names() -> list[str]:
    """Names of the shipped presets, such as `maple_base-to-novel`."""
    return toml_names(PRESETS)


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
    """The settings of a shipped preset, or of a TOML file.

    Raises:
        ConfigError: neither a preset nor a file, or not TOML.
    """
    return read_named_toml(name, "preset", PRESETS)


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
