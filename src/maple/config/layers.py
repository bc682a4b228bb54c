"""Settings from layers, later ones on top: a preset, a file, the command line."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from maple.config.settings import (
    BUNDLED_BACKBONE,
    BUNDLED_DATASET,
    BUNDLED_PREFIXES,
    SECTIONS,
    Rule,
    RunSettings,
)
from maple.config.toml import parse_toml
from maple.errors import ConfigError, one_of
from maple.plugins import trust_code


def resolve(layers: Sequence[Mapping[str, Any]], overrides: Sequence[str] = ()) -> RunSettings:
    """Merge settings over the defaults: layers, later ones on top, then `section.key=value` overrides.

    A later layer that names another method replaces the method's settings as a whole. A preset's `rules` give other
    settings for some data sets, shots or backbones: the first that fits is merged directly over its preset. The default
    data set is the bundled one, and so is the default backbone on bundled data. Overrides are one layer: their order
    matters only where two set the same key.

    Raises:
        ConfigError: unknown key, wrong type, out of range, or an override not of the form key=value.

    Example:
        >>> resolve([read_preset("maple_few-shot"), {"data": {"shots": 4}}], ["train.lr=0.01"]).train.lr
        0.01
    """
    layers = [*layers, override_layer(overrides)]
    settings = _validate(layers)
    preset = max((number for number, layer in enumerate(layers) if "rules" in layer), default=None)
    if preset is None:
        return settings
    rules = layers[preset]["rules"]
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        raise ConfigError(
            f"rules = {rules!r}: must be tables, each under [[rules]], with dataset, shots or backbone (when it holds) "
            "and method or train (what it sets)"
        )
    for rule in [Rule(**values) for values in rules]:  # all are checked, although the first that fits applies
        if rule.fits(settings):
            layers.insert(preset + 1, {"method": rule.method, "train": rule.train})
            return _validate(layers)
    return settings


def _validate(layers: Sequence[Mapping[str, Any]]) -> RunSettings:
    """The layers merged over the defaults, without their rules, with the bundled data set and backbone as defaults."""
    merged = merge_layers({"method": RunSettings().method}, *layers)
    merged.pop("rules", None)
    data, backbone = merged.setdefault("data", {}), merged.setdefault("backbone", {})
    if isinstance(data, dict) and isinstance(backbone, dict):  # other values are refused by the validation
        if not data.get("dataset"):
            data["dataset"] = BUNDLED_DATASET
        bundled = str(data["dataset"]).startswith(BUNDLED_PREFIXES)
        if bundled and backbone.get("name") is None and backbone.get("pretrained") is None:
            backbone["name"] = BUNDLED_BACKBONE
    return RunSettings(**merged)


def override_layer(overrides: Sequence[str]) -> dict[str, Any]:
    """`section.key=value` overrides as one layer; values are TOML, and anything else is a string.

    Raises:
        ConfigError: an override not of this form.
    """
    layer: dict[str, Any] = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"the setting {override!r} must have the form section.key=value, as in train.lr=0.002")
        _merge(layer, setting_layer(key.strip(), parse_value(value)))
    if "rules" in layer:
        raise ConfigError(f"rules belong into a preset, not among settings; {one_of('setting', 'rules', SECTIONS)}")
    return layer


def setting_layer(key: str, value: Any) -> dict[str, Any]:
    """A layer with one setting: ("train.lr", 0.1) gives {"train": {"lr": 0.1}}."""
    return reduce(lambda layer, part: {part: layer}, reversed(key.split(".")), value)


def options_layer(**options: Any) -> dict[str, Any]:
    """The settings layer of options that may not be given: those that are None are left out.

    A backbone that is named without `pretrained` resets it: that of a lower layer belongs to another backbone.

    Example:
        >>> options_layer(backbone={"name": "ViT-B-16", "precision": None}, train={"lr": None}, seed=0)
        {'backbone': {'name': 'ViT-B-16', 'pretrained': None}, 'seed': 0}
    """
    layer: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            value = {name: setting for name, setting in value.items() if setting is not None} or None
        if value is not None:
            layer[key] = value
    if "name" in layer.get("backbone", ()):
        layer["backbone"].setdefault("pretrained", None)
    return layer


def merge_layers(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One layer with the effect of these, later ones on top."""
    merged: dict[str, Any] = {}
    for layer in layers:
        method: Any = layer.get("method")
        current: Any = merged.get("method")
        tables = isinstance(method, Mapping) and isinstance(current, dict)
        if tables and "name" in method and method["name"] != current.get("name"):
            del merged["method"]  # its settings are those of another method
        train, below = layer.get("train"), merged.get("train")
        if isinstance(train, Mapping) and isinstance(below, dict) and "epochs" in train:
            below.pop("steps", None)  # epochs that a layer sets count, also above a preset with a budget of steps
        _merge(merged, layer)
    return merged


def _merge(base: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping):
            if not isinstance(base.get(key), dict):
                base[key] = {}  # not the layer's own dictionary, which must not change
            _merge(base[key], value)
        else:
            base[key] = value


def parse_value(text: str) -> Any:
    """A TOML value; anything that is not one is taken as a string, so that names need no quotes.

    The file of a method, PATH/FILE.py:CLASS, is accepted by naming it (`trust_code`).
    """
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text
    return trust_code(value) if isinstance(value, str) else value
